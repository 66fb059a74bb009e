"""Other programs read what we write, and mean the same by it."""
