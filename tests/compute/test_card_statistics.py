"""What a card measures of tensors in stretches of many blocks is what the CPU measures block by block, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.standin import Cards
from streammerge.compute.expressions import PIECE
from streammerge.methods import METHODS
from streammerge.methods.registry import BlockMethod
from tests.make.models import assert_same_bytes, merge_to, near, normal, save_models
from tests.references.cases import CASES, ONE_CASE_EACH, mostly


def is_measured(name: str) -> bool:
    method = METHODS[name]
    return method.kind == "gram" or (isinstance(method, BlockMethod) and method.statistics is not None)


MEASURED = [case for case in CASES if is_measured(case.method)]


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> list[Path]:
    """Models of tensors of several blocks, with many equal values, zeros, and a tensor that all have the same."""
    coarse = (normal((5 * PIECE + 11,), 1) * 8).round() / 8
    base = {
        "coarse": coarse.half(),
        "matrix": normal((520, 1010), 2, torch.float16),
        "filters": normal((130, 100, 5, 5), 3, torch.float16),
    }
    models = {f"m{number}": near(base, number, 0.1) for number in (1, 2, 3)}
    for number, model in enumerate(models.values()):
        model["coarse"] = ((coarse + normal(coarse.shape, 10 + number) * 0.2) * 8).round().div(8).half()
        model["coarse"][: 2 * PIECE : number + 2] = coarse[: 2 * PIECE : number + 2].half()
    same = {"same": normal((3 * PIECE + 5,), 4, torch.float16), "nothing": torch.zeros(2 * PIECE + 3).half()}
    paths = save_models(
        tmp_path_factory.mktemp("large"), **{name: {**made, **same} for name, made in {"base": base, **models}.items()}
    )
    return list(paths.values())


@pytest.fixture(scope="module")
def on_the_cpu(large, tmp_path_factory):
    """What torch makes of a case on the CPU; made once."""
    folder, made = tmp_path_factory.mktemp("cpu"), {}

    def merged(case):
        if str(case) not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("STREAMMERGE_KERNELS", "off")
                made[str(case)] = merge_to(folder / "out.safetensors", case.merge(large))
        return made[str(case)]

    return merged


@pytest.mark.parametrize("case", mostly([one for one in ONE_CASE_EACH if one in MEASURED], MEASURED), ids=str)
def test_stretches_give_the_bytes_of_blocks(large, on_the_cpu, tmp_path, case):
    with Cards(blocks=8).there() as cards:
        made = merge_to(tmp_path / "card.safetensors", case.merge(large), device="cuda")
    assert cards.lanes
    assert_same_bytes(made, on_the_cpu(case))
