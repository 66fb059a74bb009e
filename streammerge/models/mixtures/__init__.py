"""Mixtures of experts: how architectures call their experts, and how mixtures are built of dense models."""
