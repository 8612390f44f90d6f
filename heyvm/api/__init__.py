"""HTTP: the only package that knows routes, schemas, tokens and status codes."""
