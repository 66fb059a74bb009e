"""Reading and writing checkpoints: safetensors, torch zips, shards."""
