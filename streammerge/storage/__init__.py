"""What is written: files, journals and hashes, and how they survive a crash."""
