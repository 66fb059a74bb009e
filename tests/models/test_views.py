"""Models seen otherwise: decoded, cast, renamed, or as a class of a few lines wants it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import streammerge
from streammerge import Cast, Decoded, Renamed, View
from streammerge.compute.expressions import Combined, Node, Stored
from streammerge.errors import PlanError, RecipeError
from streammerge.formats.tables import Column
from streammerge.models.extent import extent_of
from streammerge.models.layers import layers_of
from streammerge.tensors import Model, TensorInfo
from tests.make.headers import header, merged
from tests.make.models import (
    MemoryModel,
    Tensors,
    assert_same_bytes,
    load_model,
    make_tensors,
    merge_to,
    normal,
    save_model,
)
from tests.models.scaled_weights import FP8

SHAPES = {"layers.0.weight": (6, 4), "layers.0.bias": (6,), "layers.1.weight": (3, 2)}
CODED = {
    "x.weight": (normal((6, 4), 1) * 50).to(FP8),
    "x.weight_scale": torch.tensor(0.25),
    "x.bias": normal((6,), 2, torch.float16),
    "scaled_fp8": torch.zeros(0, dtype=FP8),
}
"""A weight with a scale, and the mark of such."""

PACKED = {"y.weight": "U8 12 1", "y.weight.absmax": "F32 3", "y.weight.quant_map": "F32 16"}
"""A weight that can't be decoded."""


def plain(seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    return {**make_tensors(seed, dtype, SHAPES), "ids": torch.arange(3)}


def save(folder: Path, tensors: Mapping[str, torch.Tensor], name: str = "a") -> Path:
    return save_model(folder / f"{name}.safetensors", tensors)


def told(model: Model) -> dict[str, str]:
    return {name: str(info) for name, info in model.tensors.items()}


def written(folder: Path, model: Model) -> Tensors:
    return merge_to(folder / "out.safetensors", model)


def whole(model: Model, name: str) -> torch.Tensor:
    info = model.tensors[name]
    return model.read(name, 0, info.elements).reshape(info.shape)


# ── decoded ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_decoded_model_has_values_and_no_scales(tmp_path):
    with streammerge.open_model(save(tmp_path, CODED)) as model:
        view = Decoded(model)
        assert told(view) == {"x.weight": "BF16 [6, 4]", "x.bias": "F16 [6]"}
        values = (CODED["x.weight"].float() * 0.25).bfloat16()
        assert torch.equal(whole(view, "x.weight"), values)
        assert_same_bytes(written(tmp_path, view), {"x.weight": values, "x.bias": CODED["x.bias"]})


def test_codes_that_can_not_be_decoded_stay_with_what_belongs_to_them():
    model = header(**{name.replace(".", "__"): shape for name, shape in PACKED.items()}, scaled_fp8="F8_E4M3 0")
    view = Decoded(model)
    assert dict(view.tensors) == dict(model.tensors)
    assert view.node("y.weight") is model.node("y.weight")
    assert not view.has_values("y.weight")


def test_what_has_no_codes_is_not_copied(tmp_path):
    with streammerge.open_model(save(tmp_path, plain(1))) as model:
        assert Decoded(model).tensors is model.tensors


# ── cast ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp8_e4m3", "fp64", "keep"])
def test_a_cast_model_is_what_a_recipe_with_that_dtype_makes_of_it(tmp_path, dtype):
    for number, tensors in enumerate((plain(1), {**CODED, **plain(2)})):
        path = save(tmp_path, tensors, str(number))
        expected = merge_to(tmp_path / "cast.safetensors", streammerge.passthrough(path, dtype=dtype))
        with streammerge.open_model(path) as model:
            assert_same_bytes(written(tmp_path, Cast(model, dtype)), expected)


def test_a_merge_of_a_cast_model_is_that_of_its_file(tmp_path):
    a, b = save(tmp_path, plain(1)), save(tmp_path, plain(2), "b")
    with streammerge.open_model(a) as model:
        cast = save(tmp_path, written(tmp_path, Cast(model, "bf16")), "cast")
        made = written(tmp_path, streammerge.slerp(Cast(model, "bf16"), b, t=0.3))
        assert_same_bytes(made, written(tmp_path, streammerge.slerp(cast, b, t=0.3)))
        assert torch.equal(whole(Cast(model, "bf16"), "layers.0.bias"), load_model(cast)["layers.0.bias"])
        assert isinstance(Cast(model, "fp32").node("layers.0.bias"), Stored), "what is stored so is rounded by nobody"


@pytest.mark.parametrize("dtype", ["fp16", "fp8_e4m3"])
def test_what_is_lost_by_a_cast_is_told(tmp_path, dtype):
    tensors = {"x": torch.tensor([1e6, 1.0]), "y.weight": CODED["x.weight"], "y.weight_scale": torch.tensor(1e-3)}
    with streammerge.open_model(save(tmp_path, tensors)) as model:
        views = streammerge.passthrough(model, dtype=dtype), as_it_is(Cast(model, dtype))
        findings = [
            streammerge.merge(view, output=tmp_path / f"{number}.safetensors", sync=False).findings
            for number, view in enumerate(views)
        ]
    assert findings[0] == findings[1]
    assert findings[0]["x"].largest == 1e6


def test_codes_are_not_numbers_to_be_cast():
    model = header(**{name.replace(".", "__"): shape for name, shape in PACKED.items()}, z="F32 3")
    assert told(Cast(model, "fp16")) == {**told(model), "z": "F16 [3]"}


def test_a_model_that_is_none_of_ours_is_cast_as_it_is_read(tmp_path):
    tensors = plain(1)
    made = written(tmp_path, Cast(MemoryModel(tensors), "fp16"))
    half = {name: values.half() if values.is_floating_point() else values for name, values in tensors.items()}
    assert_same_bytes(made, half)


def test_an_unknown_dtype_is_refused_at_once():
    with pytest.raises(RecipeError, match="Cast: unknown dtype 'fp17'"):
        Cast(header(x=(1,)), "fp17")


# ── renamed ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_renamed_model_has_what_is_named_in_that_order(tmp_path):
    tensors = plain(1, torch.float16)
    with streammerge.open_model(save(tmp_path, tensors)) as model:
        view = Renamed(model, {"b": "layers.1.weight", "ids": "ids", "a": "layers.0.bias"})
        assert list(view.tensors) == ["b", "ids", "a"]
        expected = {"b": tensors["layers.1.weight"], "ids": tensors["ids"], "a": tensors["layers.0.bias"]}
        assert_same_bytes(written(tmp_path, view), expected)
        assert torch.equal(view.read("b", 2, 5), tensors["layers.1.weight"].flatten()[2:5])
        assert torch.equal(whole(view, "ids"), tensors["ids"])


def test_codes_are_renamed_as_their_values(tmp_path):
    with streammerge.open_model(save(tmp_path, CODED)) as model:
        view = Renamed(model, {f"model.{name}": name for name in model.tensors})
        assert set(view.tensors) == {"model.x.weight", "model.x.bias"}
        assert torch.equal(whole(view, "model.x.weight"), whole(Decoded(model), "x.weight"))


def as_it_is(model: Model) -> Renamed:
    return Renamed(model, {name: name for name in model.tensors})


def test_what_can_not_be_renamed_is_refused():
    model = header(**{name.replace(".", "__"): shape for name, shape in PACKED.items()}, z="F32 3")
    with pytest.raises(PlanError, match="1 tensor to be renamed is not in the model\n  x"):
        Renamed(model, {"a": "z", "b": "x"})
    with pytest.raises(PlanError, match="2 tensors to be renamed are quantised in a way that streammerge can't decode"):
        Renamed(model, {"a": "y.weight", "b": "y.weight.absmax"})


# ── one of the user's own ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Prefixed(View):
    """A model under names that begin with a prefix."""

    model: Model
    prefix: str

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {self.prefix + name: info for name, info in self.values.tensors.items()}

    def node(self, name: str) -> Node:
        return self.values.node(name.removeprefix(self.prefix))


class Reversed:
    """A model of which nothing is known but what every model has: another's tensors under reversed names."""

    def __init__(self, model: Model) -> None:
        self.model = model

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name[::-1]: info for name, info in self.model.tensors.items()}

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.model.read(name[::-1], start, stop)


OWN: dict[str, Any] = {
    "a view": (lambda model: Prefixed(model, "model."), lambda name: f"model.{name}"),
    "a model": (Reversed, lambda name: name[::-1]),
    "a view of that of a view": (
        lambda model: Prefixed(Reversed(as_it_is(model)), "x"),
        lambda name: f"x{name[::-1]}",
    ),
}


@pytest.mark.parametrize("kind", OWN)
def test_a_view_of_the_users_own_is_merged_with_a_checkpoint(tmp_path, kind):
    see, rename = OWN[kind]
    mine, other = plain(1, torch.float16), {rename(name): tensor for name, tensor in plain(2, torch.float16).items()}
    renamed = save(tmp_path, {rename(name): tensor for name, tensor in mine.items()}, "renamed")
    path = save(tmp_path, other, "other")
    with streammerge.open_model(save(tmp_path, mine)) as model:
        for method in (streammerge.linear, streammerge.slerp):
            arguments = {"t": 0.3} if method.__name__ == "slerp" else {}
            made = written(tmp_path, method(path, see(model), **arguments))
            assert_same_bytes(made, written(tmp_path, method(path, renamed, **arguments)))
        assert_same_bytes(written(tmp_path, see(model)), load_model(renamed))


def test_expressions_are_seen_through_views():
    """A tensor that is only renamed is the bytes of its file, and a model's that is none of ours is asked to read."""
    model, other = header(x=(2, 3), z=(1,)), MemoryModel({"model.x": torch.ones(2, 3), "model.z": torch.ones(1)})
    node = merged({"a": Prefixed(model, "model."), "b": other}).nodes["model.x"]
    assert isinstance(node, Combined)
    assert node.terms[0].node is model.node("x")


# ── what is beneath ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_view_of_a_merge_tells_what_the_merge_tells(tmp_path):
    a, b = save(tmp_path, {**plain(1), "own": torch.ones(2)}), save(tmp_path, plain(2), "b")
    inner = streammerge.slerp(b, a, t=0.5, on_missing="keep")
    view = Cast(Prefixed(inner, "m."), "fp16")
    assert extent_of(view) == inner.extent
    outer = streammerge.scale(view, alpha=2.0)
    assert outer.extent.depth == inner.extent.depth
    assert outer.left_out == {"0/1": ("own",)}
    report = streammerge.merge(view, output=tmp_path / "out.safetensors", sync=False)
    assert report.left_out == {"1": ("own",)}
    assert_same_bytes(
        {name.removeprefix("m."): tensor for name, tensor in load_model(tmp_path / "out.safetensors").items()},
        merge_to(tmp_path / "same.safetensors", streammerge.slerp(b, a, t=0.5, on_missing="keep", dtype="fp16")),
    )


def test_a_gradient_goes_over_the_layers_that_the_config_beneath_speaks_of(tmp_path):
    path = save(tmp_path, {f"model.layers.{number}.w": torch.ones(1) for number in range(3)})
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 5}')
    with streammerge.open_model(path) as model:
        view = Prefixed(model, "x.")
        assert layers_of(view).counts == {"x.model.layers": 5}
        assert layers_of(Prefixed(streammerge.scale(view, alpha=2.0), "y.")).counts == {"y.x.model.layers": 5}


def test_views_share_the_names_of_what_they_see(tmp_path):
    with streammerge.open_model(save(tmp_path, plain(1))) as model:
        tensors = [model.tensors, Cast(model, "fp16").tensors, as_it_is(model).tensors]
        assert all(isinstance(found, Column) for found in tensors)
        assert len({id(found.names) for found in tensors if isinstance(found, Column)}) == 1


def test_only_headers_are_needed():
    """A header's file is never opened."""
    view = Cast(Renamed(Decoded(header(x__weight="F8_E4M3 6 4", x__weight_scale="F32")), {"y": "x.weight"}), "fp16")
    assert told(view) == {"y": "F16 [6, 4]"}
    made = merged({"a": view, "b": header(y=(6, 4))}, "slerp", parameters={"t": 0.5})
    assert [decision.why for decision in made.decisions] == ["slerp"]
