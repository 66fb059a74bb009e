"""Models: anything that has named tensors and can produce any range of them."""
