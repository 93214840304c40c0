"""Implement the update: the reference, and faster paths that make the same one."""
