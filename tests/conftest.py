"""What holds for all tests."""

from __future__ import annotations

import os
import tempfile

from hypothesis import settings

settings.register_profile("shared machines", deadline=None)  # a busy machine is no failure of what is tested
settings.load_profile("shared machines")

os.environ["STREAMMERGE_CACHE"] = (
    tempfile.gettempdir() + "/streammerge-tests"
)  # what the user knows of cards is left alone
