"""Adapters: files of changes to a model, such as LoRAs: what is known of them, and models with adapters in them."""
