"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("shared machines", deadline=None)  # a busy machine is no failure of what is tested
settings.load_profile("shared machines")
