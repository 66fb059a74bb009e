"""What becomes of every tensor, where it goes and what it costs, from headers alone."""
