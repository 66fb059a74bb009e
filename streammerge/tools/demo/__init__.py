"""Models nobody trained, with the names and shapes of real ones: to try streammerge on, to test it, to time it."""
