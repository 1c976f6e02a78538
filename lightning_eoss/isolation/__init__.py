"""A module evaluated without a trace."""
