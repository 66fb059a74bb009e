"""The commands, a module each: `run` is given the words behind the command's name, and returns the exit code."""
