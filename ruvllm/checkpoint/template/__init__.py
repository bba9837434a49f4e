"""Untrusted chat templates: the Jinja sandbox, its budget, and the functions that templates may call."""
