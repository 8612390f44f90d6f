"""The ways of running sandboxes, by the name that a request uses."""
