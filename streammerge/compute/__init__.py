"""Expressions and how they become numbers: on the CPU or on a card, a block at a time."""
