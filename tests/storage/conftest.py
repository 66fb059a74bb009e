"""What the tests of outputs share: two models with integers among their tensors."""

from __future__ import annotations

import pytest

from tests.make.models import make_tensors, save_models, with_integers


@pytest.fixture
def paths(tmp_path):
    return save_models(tmp_path, a=with_integers(make_tensors(1)), b=with_integers(make_tensors(2)))
