"""What methods want to know of whole tensors, gathered block by block."""
