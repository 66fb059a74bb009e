"""Campaigns that try to lose a user's data: killed, starved, lied to, fuzzed. `make stress` runs them in full."""
