"""Data sets that a site can train on without writing code."""
