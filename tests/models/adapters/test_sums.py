"""Adapters added up to one: exactly, of whatever ranks, or refused; factors are never averaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from streammerge.cli.main import main
from streammerge.errors import MergeError, PlanError
from tests.make.models import Tensors, assert_same_bytes, load_model, merge_to, save_model
from tests.models.adapters.baking import WEIGHT, bake, numbers, parts

OUT, IN = 12, 10
MODULE = "lora_unet_mid_block_x"


def lora(
    seed: int, rank: int, alpha: float | None = None, module: str = MODULE, kernel: int = 0, **more: Any
) -> Tensors:
    ones, behind = ((1, 1), (kernel, kernel)) if kernel else ((), ())
    up, down = numbers(OUT, rank, *ones, seed=seed), numbers(rank, IN, *behind, seed=seed + 50)
    alphas = {} if alpha is None else {"alpha": alpha}
    return parts(module, lora_up__weight=up, lora_down__weight=down, **alphas, **more)


def product(adapter: Tensors, module: str = MODULE) -> torch.Tensor:
    up, down = (adapter[f"{module}.lora_{part}.weight"].double() for part in ("up", "down"))
    scale = float(adapter[f"{module}.alpha"]) / down.shape[0] if f"{module}.alpha" in adapter else 1.0
    return scale * (up.flatten(1) @ down.flatten(1))


def add_up(folder: Path, *adapters: Tensors, weights: list[float], **options: Any) -> Tensors:
    models = [
        {"model": str(save_model(folder / f"lora{n}.safetensors", adapter)), "parameters": {"weight": weight}}
        for n, (adapter, weight) in enumerate(zip(adapters, weights, strict=True))
    ]
    return merge_to(folder / "sum.safetensors", {"merge_method": "linear", "models": models}, **options)


@pytest.mark.parametrize("kernel", [0, 1, 3])
def test_the_sum_is_that_of_the_products(tmp_path, kernel):
    adapters = [lora(1, 4, 2.0, kernel=kernel), lora(2, 3, kernel=kernel), lora(3, 4, 1.0, kernel=kernel)]
    weights = [0.8, -0.5, 2.0]
    made = add_up(tmp_path, *adapters, weights=weights)
    products = [weight * product(adapter) for weight, adapter in zip(weights, adapters, strict=True)]
    exact = torch.stack(products).sum(0)
    assert torch.allclose(product(made), exact, atol=1e-6)
    assert made[f"{MODULE}.lora_down.weight"].shape[0] == 11
    assert made.keys() == {f"{MODULE}.lora_up.weight", f"{MODULE}.lora_down.weight"}


def test_weights_are_not_divided_by_their_sum(tmp_path):
    one = lora(1, 4)
    assert torch.allclose(product(add_up(tmp_path, one, one, weights=[1, 1])), 2 * product(one), atol=1e-6)
    recipe = {
        "merge_method": "linear",
        "models": [str(tmp_path / "lora0.safetensors"), str(tmp_path / "lora1.safetensors")],
        "parameters": {"normalize": True},
    }
    made = merge_to(tmp_path / "mean.safetensors", recipe)
    assert torch.allclose(product(made), product(one), atol=1e-6)


@pytest.mark.parametrize("words", [[], ["--rank", "2"]])
def test_weights_whose_sum_is_zero_are_not_divided_by_it(tmp_path, capsys, words):
    one, two = (str(save_model(tmp_path / f"{n}.safetensors", lora(n, 4))) for n in (1, 2))
    out = tmp_path / "out.safetensors"
    assert main([f"{one}:1", f"{two}:-1", "-p", "normalize=true", *words, "-o", str(out)]) == 1
    assert "the weights [1.0, -1.0] sum to zero and can't be normalised" in capsys.readouterr().err
    assert not out.exists()


def test_one_alone_with_a_weight(tmp_path):
    one = lora(1, 4, 4.0)
    made = add_up(tmp_path, one, weights=[1.0])
    assert_same_bytes(made, {name: tensor for name, tensor in one.items() if "alpha" not in name})
    assert torch.allclose(product(add_up(tmp_path, one, weights=[-0.25])), -0.25 * product(one), atol=1e-6)


def test_what_only_one_of_them_changes_is_in_the_sum(tmp_path):
    one, two = lora(1, 4, 2.0), lora(2, 3, module="lora_te_text_model_y")
    made = add_up(tmp_path, one, two, weights=[0.5, 1])
    assert torch.allclose(product(made), 0.5 * product(one), atol=1e-6)
    assert torch.allclose(product(made, "lora_te_text_model_y"), product(two, "lora_te_text_model_y"), atol=1e-6)


@pytest.mark.parametrize("words", [[], ["--rank", "2"]])
def test_adapters_that_have_nothing_in_common_are_told(tmp_path, capsys, words):
    """They may be of different models, which nobody can tell for sure."""
    many = (lora(1, 4), lora(2, 3), lora(3, 3, module="lora_unet_down_blocks_0_y"))
    paths = [str(save_model(tmp_path / f"{n}.safetensors", each)) for n, each in enumerate(many)]
    told = "2 has no module that another has too: are all of them adapters of one model?"
    for given, is_told in ((paths, True), (paths[:2], False), (paths[2:], False)):
        assert main([*given, *words, "-o", str(tmp_path / "sum.safetensors"), "--force"]) == 0
        assert (told in capsys.readouterr().err) is is_told


def test_what_has_no_weight_is_left_out(tmp_path):
    bad = {name: torch.full_like(tensor, torch.nan) for name, tensor in lora(2, 3).items()}
    made = add_up(tmp_path, lora(1, 4), bad, weights=[1, 0], on_nonfinite="error")
    assert made[f"{MODULE}.lora_down.weight"].shape[0] == 4
    with pytest.raises(PlanError, match="nothing is left of the adapters"):
        add_up(tmp_path, lora(1, 4), lora(2, 4), weights=[0, 0])


@pytest.mark.parametrize("is_first", [True, False])
def test_a_module_that_does_not_add_up_is_told_once(tmp_path, is_first):
    adapters = [lora(1, 4, dora_scale=torch.ones(OUT, 1)), lora(2, 4), lora(3, 4)][:: 1 if is_first else -1]
    with pytest.raises(PlanError, match=r"^1 module of the adapters can.t be added up") as caught:
        add_up(tmp_path, *adapters, weights=[1, 1, 1])
    assert len(caught.value.found) == 1
    assert "streammerge extract TUNED MODEL --rank R" in caught.value.advice


def test_plain_differences_are_added(tmp_path):
    one, two = (parts(MODULE, diff=numbers(OUT, IN, seed=n), diff_b=numbers(OUT, seed=n + 1)) for n in (1, 5))
    made = add_up(tmp_path, one, two, weights=[0.5, -1])
    for name in one:
        assert torch.allclose(made[name], 0.5 * one[name] - two[name], atol=1e-6)


def test_a_core_becomes_part_of_a_factor(tmp_path):
    core = {"lora_mid__weight": numbers(4, 4, 3, 3, seed=8)}
    up, down = numbers(OUT, 4, 1, 1, seed=1), numbers(4, IN, 1, 1, seed=2)
    one = parts(MODULE, lora_up__weight=up, lora_down__weight=down, **core)
    made = add_up(tmp_path, one, lora(3, 2, kernel=3), weights=[1, 0.5])
    exact = (
        torch.einsum("nmkl,on,mi->oikl", core["lora_mid__weight"], up.flatten(1), down.flatten(1)).flatten(1).double()
    )
    assert torch.allclose(product(made), exact + 0.5 * product(lora(3, 2, kernel=3)), atol=1e-6)


def test_the_sum_baked_is_both_baked(tmp_path):
    model = {"mid.block.x.weight": numbers(OUT, IN, seed=9)}
    one, two = lora(1, 4, 2.0), lora(2, 3)
    both = bake(tmp_path / "both", model, one, two, weights=[0.8, -0.5])
    once = bake(tmp_path / "once", model, add_up(tmp_path, one, two, weights=[0.8, -0.5]))
    assert torch.allclose(once["mid.block.x.weight"], both["mid.block.x.weight"], atol=1e-6)
    assert WEIGHT not in once


KRONECKERS: dict[str, tuple[Tensors, int]] = {
    "factored": ({"lokr_w1_a": numbers(3, 1, seed=4), "lokr_w1_b": numbers(1, 2, seed=5)}, 2),
    "high": ({"lokr_w1": numbers(3, 2, seed=4)}, 4),
    "wide": ({"lokr_w1": numbers(3, 5, seed=4)}, 6),
}


@pytest.mark.parametrize("kind", KRONECKERS)
def test_lokr_of_small_factors_is_a_lora_too(tmp_path, kind):
    first, rank = KRONECKERS[kind]
    width = IN // (5 if kind == "wide" else 2)
    lokr = parts(MODULE, **first, lokr_w2_a=numbers(4, 2, seed=6), lokr_w2_b=numbers(2, width, seed=7), alpha=3.0)
    made = add_up(tmp_path, lora(1, 3, 2.0), lokr, weights=[0.5, -2])
    small = first.get("lokr_w1", first.get("lokr_w1_a", None))
    assert small is not None
    small = small if "lokr_w1" in first else small @ first["lokr_w1_b"]
    large = lokr[f"{MODULE}.lokr_w2_a"].double() @ lokr[f"{MODULE}.lokr_w2_b"].double()
    exact = 0.5 * product(lora(1, 3, 2.0)) - 2 * 1.5 * torch.kron(small.double(), large)
    assert torch.allclose(product(made), exact, atol=1e-6)
    assert made[f"{MODULE}.lora_down.weight"].shape == (3 + rank, IN)


CORED = {f"hada_t{n}": numbers(2, 2, 3, 3) for n in (1, 2)} | {
    f"hada_w{n}_{part}": numbers(2, OUT if part == "a" else IN) for n in (1, 2) for part in "ab"
}
HADA = {f"hada_w{n}_{part}": (OUT, 2) if part == "a" else (2, IN) for n in (1, 2) for part in "ab"}
KOHYA_IN, KOHYA_DOWN = "lora_unet_input_blocks_4_1_x", "lora_unet_down_blocks_1_x"
REFUSED: dict[str, tuple[Tensors, Tensors, str]] = {
    "LoHa with cores": (lora(1, 4), parts(MODULE, **CORED), "is LoHa: with cores"),
    "LoKr": (lora(1, 4), parts(MODULE, lokr_w1=numbers(3, 5), lokr_w2=numbers(4, 2)), "is LoKr: it is no product"),
    "LoKr of as many directions": (
        lora(1, 4),
        parts(MODULE, lokr_w1=numbers(6, 5), lokr_w2_a=numbers(2, 2), lokr_w2_b=numbers(2, 2), alpha=1.0),
        "is LoKr: it is no product",
    ),
    "LoKr of kernels": (
        lora(1, 4, kernel=3),
        parts(MODULE, lokr_w1=numbers(3, 2), lokr_w2_a=numbers(4, 1), lokr_w2_b=numbers(1, 5, 3, 3), alpha=1.0),
        "is LoKr: it is no product",
    ),
    "LoHa with lengths": (
        lora(1, 4),
        parts(MODULE, **{name: numbers(*shape) for name, shape in HADA.items()}, dora_scale=torch.ones(OUT, 1)),
        "is DoRA: it goes by the lengths",
    ),
    "OFT": (lora(1, 4), parts(MODULE, oft_blocks=numbers(2, 6, 6)), "is OFT: it turns weights"),
    "a tensor's replacement": (
        lora(1, 4),
        {**lora(2, 4, module="lora_unet_y"), **parts(MODULE, set_weight=numbers(OUT, IN))},
        "of lora1 is difference: it stands in a tensor's place",
    ),
    "DoRA": (lora(1, 4), lora(2, 4, dora_scale=torch.ones(OUT, 1)), "is DoRA: it goes by the lengths"),
    "LoRA and a difference": (lora(1, 4), parts(MODULE, diff=numbers(OUT, IN)), r"LoRA \[12, 10\] and difference"),
    "other shapes": (lora(1, 4), lora(1, 4, kernel=3), r"LoRA \[12, 10\] and LoRA \[12, 10, 3, 3\]"),
    "two namings of blocks": (lora(1, 4, module=KOHYA_IN), lora(2, 4, module=KOHYA_DOWN), "named in several ways"),
    "PEFT's names of no component": (
        lora(1, 4, module="lora_unet_down_blocks_1_x"),
        lora(1, 4, 1.0, module="base_model.model.y"),
        "named in several ways",
    ),
    "half is missing": (lora(1, 4), parts(MODULE, lora_up__weight=numbers(OUT, 4)), "lora1   .*lora_up.weight"),
    "halves alone": (
        parts(MODULE, lora_up__weight=numbers(OUT, 4)),
        parts(MODULE, lora_up__weight=numbers(OUT, 4, seed=3)),
        "2 models have factors of an adapter that make no products",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_sum_is_refused(tmp_path, case):
    one, two, told = REFUSED[case]
    with pytest.raises(MergeError, match=told):
        add_up(tmp_path, one, two, weights=[0.5, 0.5])
    assert not (tmp_path / "sum.safetensors").exists()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    metadata = {"ss_network_dim": "4", "ss_network_alpha": "2.0", "ss_network_module": "networks.lora"}
    save_model(tmp_path / "a.safetensors", lora(1, 4, 2.0), metadata)
    save_model(tmp_path / "b.safetensors", lora(2, 3), metadata)
    save_model(tmp_path / "m.safetensors", {"x": numbers(3)})
    monkeypatch.chdir(tmp_path)
    return Path(tmp_path)


def test_the_command(folder, capsys):
    assert main(["a.safetensors:0.5", "b.safetensors", "-o", "sum.safetensors", "--dtype", "fp16"]) == 0
    assert "note: 2 adapters are added up, their factors side by side; the rank is 7" in capsys.readouterr().err
    made = load_model(folder / "sum.safetensors")
    assert {tensor.dtype for tensor in made.values()} == {torch.float16}
    with safe_open(folder / "sum.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("7", "7")
    assert metadata["ss_network_module"] == "networks.lora"
    assert main(["verify", "sum.safetensors", "--recipe-from-metadata"]) == 0


def test_one_adapter_is_written_anew(folder, capsys):
    assert main(["a.safetensors:-0.5", "-o", "other.safetensors"]) == 0
    assert "note: 1 adapter is written anew; the rank is 4" in capsys.readouterr().err
    made = product(load_model(folder / "other.safetensors"))
    assert torch.allclose(made, -0.5 * product(lora(1, 4, 2.0)), atol=1e-6)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["a.safetensors", "b.safetensors", "-m", "slerp"], "2 models are adapters"),
        (["a.safetensors", "m.safetensors"], "1 model is an adapter"),
        (["a.safetensors", "b.safetensors", "--drop", "*"], "where rules or a conversion has no meaning"),
        (["a.safetensors", "b.safetensors", "--layout", "b.safetensors"], "where a layout has no meaning"),
        (["a.safetensors", "b.safetensors", "--base", "a.safetensors", "-m", "task_arithmetic"], "are adapters"),
    ],
)
def test_what_has_no_meaning_among_adapters(folder, capsys, words, told):
    assert main([*words, "-o", "out.safetensors"]) == 1
    assert told in capsys.readouterr().err
    assert not (folder / "out.safetensors").exists()
