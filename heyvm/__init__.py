"""heyvm: sandboxes over HTTP, on one machine."""
