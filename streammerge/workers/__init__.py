"""Workers: who computes what, when, and where its bytes go."""
