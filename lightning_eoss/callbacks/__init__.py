"""When to measure, what, and where it goes: one callback a file."""
