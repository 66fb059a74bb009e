"""Timing a merge against its floor."""
