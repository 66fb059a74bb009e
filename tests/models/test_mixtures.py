"""Mixtures in any two forms of storing experts merge as those in one do."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import streammerge
from streammerge.errors import PlanError
from streammerge.models.mixtures.layouts import blocks_of, experts_as

LAYERS, EXPERTS, WIDE, NARROW = 2, 3, 6, 10
Tensors = dict[str, torch.Tensor]


def dense(seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    """Experts as matrices by layer, expert and part, and what is beside them."""
    generator = torch.Generator().manual_seed(seed)
    made = {"model.embed_tokens.weight": torch.randn(16, NARROW, generator=generator)}
    for layer in range(LAYERS):
        made[f"{layer} router"] = torch.randn(EXPERTS, NARROW, generator=generator)
        made[f"model.layers.{layer}.self_attn.q_proj.weight"] = torch.randn(NARROW, NARROW, generator=generator)
        for expert in range(EXPERTS):
            for part in ("gate", "up"):
                made[f"{layer} {expert} {part}"] = torch.randn(WIDE, NARROW, generator=generator)
            made[f"{layer} {expert} down"] = torch.randn(NARROW, WIDE, generator=generator)
    return {name: tensor.to(dtype) for name, tensor in made.items()}


FORMS = {
    "mixtral": ("block_sparse_moe", "gate", {"gate": "w1", "up": "w3", "down": "w2"}),
    "separate": ("mlp", "gate", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
    "fused": ("mlp", "gate", None),
    "transposed": ("feed_forward", "router", None),
    "interleaved": ("mlp", "router", None),
    "as weights": ("mlp", "gate", None),
}


def stored(experts: Tensors, form: str) -> Tensors:
    """The same mixture in one of the forms."""
    block, router, parts = FORMS[form]
    made = {name: tensor for name, tensor in experts.items() if name.startswith("model.")}
    for layer in range(LAYERS):
        start = f"model.layers.{layer}.{block}."
        made[f"{start}{router}.weight"] = experts[f"{layer} router"]
        if parts is not None:
            for expert, (part, called) in itertools.product(range(EXPERTS), parts.items()):
                made[f"{start}experts.{expert}.{called}.weight"] = experts[f"{layer} {expert} {part}"]
            continue
        gate, up, down = (
            torch.stack([experts[f"{layer} {expert} {part}"] for expert in range(EXPERTS)])
            for part in ("gate", "up", "down")
        )
        if form in ("fused", "as weights"):
            both = torch.cat([gate, up], 1)
        elif form == "transposed":
            both, down = torch.cat([gate.mT, up.mT], 2), down.mT
        else:
            both, down = torch.stack([gate.mT, up.mT], 3).flatten(2), down.mT
        end = ".weight" if form == "as weights" else ""
        made[f"{start}experts.gate_up_proj{end}"] = both
        made[f"{start}experts.down_proj{end}"] = down
    return {name: tensor.contiguous() for name, tensor in made.items()}


PAIRS = [
    (one, other, (torch.float32, torch.bfloat16)[number % 2])
    for number, (one, other) in enumerate(itertools.permutations(FORMS, 2))
]


@pytest.mark.parametrize("form", FORMS)
def test_forms_are_told_by_names_and_shapes(tmp_path, form):
    save_file(stored(dense(0), form), tmp_path / "a.safetensors")
    with streammerge.open_model(tmp_path / "a.safetensors") as model:
        blocks = blocks_of(model.tensors)
        assert experts_as(model, model.tensors, "a") is None
    assert [block.count for block in blocks.values()] == [EXPERTS] * LAYERS
    told = {"mixtral": "separate", "as weights": "fused"}.get(form, form)
    assert {block.form for block in blocks.values()} == {told}


@pytest.mark.parametrize(("one", "other", "dtype"), PAIRS)
def test_two_mixtures_merge_whatever_their_forms(tmp_path, one, other, dtype):
    a, b = (dense(seed, dtype) for seed in range(2))
    save_file(stored(a, one), tmp_path / "a.safetensors")
    save_file(stored(b, other), tmp_path / "b.safetensors")
    paths = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    out = tmp_path / "out.safetensors"
    weights = [{"model": path, "parameters": {"weight": w}} for path, w in zip(paths, (1, 3), strict=True)]
    report = streammerge.merge({"merge_method": "linear", "models": weights}, output=out)
    mean = {name: (0.25 * a[name].double() + 0.75 * b[name].double()).to(dtype) for name in a}
    expected, found = stored(mean, one), load_file(out)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-7)
    assert any("are read in that form" in note for note in report.notes)
    streammerge.merge({"merge_method": "passthrough", "models": [paths[1]], "layout": paths[0]}, output=out, force=True)
    found = load_file(out)
    for name, tensor in stored(b, one).items():
        assert torch.equal(found[name], tensor), name


def refused(tmp_path: Path, a: Tensors, b: Tensors) -> str:
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    models = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    with pytest.raises(PlanError) as caught:
        streammerge.merge({"merge_method": "linear", "models": models}, output=tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    return str(caught.value)


def test_mixtures_of_other_numbers_of_experts_are_refused(tmp_path):
    a, b = stored(dense(0), "fused"), stored(dense(1), "mixtral")
    b = {name: tensor for name, tensor in b.items() if ".2.w" not in name}
    assert "has 2 experts, and in the layout 3" in refused(tmp_path, a, b)


def test_other_layers_with_experts_are_refused(tmp_path):
    a, b = stored(dense(0), "fused"), stored(dense(1), "mixtral")
    b = {name: tensor for name, tensor in b.items() if "layers.1.block" not in name}
    assert "other layers have experts" in refused(tmp_path, a, b)


def test_biases_of_experts_are_refused(tmp_path):
    a, b = stored(dense(0), "interleaved"), stored(dense(1), "separate")
    a["model.layers.0.mlp.experts.gate_up_proj_bias"] = torch.ones(EXPERTS, 2 * WIDE)
    assert "have biases" in refused(tmp_path, a, b)


def test_an_expert_that_is_missing_is_told(tmp_path):
    a, b = stored(dense(0), "fused"), stored(dense(1), "mixtral")
    del b["model.layers.1.block_sparse_moe.experts.1.w3.weight"]
    assert "model.layers.1.mlp.experts.gate_up_proj" in refused(tmp_path, a, b)


def test_an_expert_of_another_shape_or_dtype_is_told(tmp_path):
    a, b = stored(dense(0), "fused"), stored(dense(1), "mixtral")
    name = "model.layers.1.block_sparse_moe.experts.1.w3.weight"
    assert "can't be one tensor" in refused(tmp_path, a, {**b, name: b[name].half()})
