"""Torch zips, read without running anything that they hold."""
