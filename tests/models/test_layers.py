"""How many layers a gradient goes over: by names, by the layers of multi-token prediction, by a config.json."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import streammerge
from streammerge.errors import CheckpointError
from streammerge.models.layers import MAX_CONFIG, Layers
from tests.make.models import merge_to, save_model


def names(layers: int, stack: str = "model.layers", extra: tuple[str, ...] = ()) -> list[str]:
    return ["lm_head.weight", *(f"{stack}.{n}.mlp.weight" for n in range(layers)), *extra]


@given(st.integers(1, 40), st.integers(1, 4), st.sampled_from(["eh_proj", "enorm", "hnorm", "shared_head.norm"]))
def test_layers_of_multi_token_prediction_lie_beyond_the_last(layers, more, part):
    extra = tuple(f"model.layers.{layers + n}.{which}.weight" for n in range(more) for which in (part, "mlp"))
    found = Layers.of(names(layers, extra=extra))
    assert found == Layers.of(names(layers))
    assert found.position(f"model.layers.{layers}.mlp.weight") == 1.0


@given(st.integers(1, 40), st.integers(0, 8))
def test_the_config_counts(layers, more):
    found = Layers.of(names(layers + more), {"num_hidden_layers": layers})
    last = 1.0 if layers == 1 else 0.0
    assert found.position("model.layers.0.x") == last
    for n in range(layers + more):
        expected = min(n / (layers - 1), 1.0) if layers > 1 else 1.0
        assert found.position(f"model.layers.{n}.x") == expected


def test_a_part_of_the_layers_is_a_part_of_the_gradient():
    assert Layers.of(names(3), {"num_hidden_layers": 5}).position("model.layers.2.x") == 0.5


VISION = names(6, "model.visual.blocks")


@pytest.mark.parametrize(
    ("config", "text", "vision"),
    [
        ({"num_hidden_layers": 4}, 4, 6),
        ({"text_config": {"num_hidden_layers": 4}, "vision_config": {"num_hidden_layers": 5}}, 4, 5),
        ({"num_hidden_layers": 3, "text_config": {"num_hidden_layers": 4}}, 4, 6),
        ({"thinker_config": {"text_config": {"num_hidden_layers": 4}}}, 4, 6),
        ({"n_layer": 4, "num_hidden_layers": None}, 4, 6),
        ({"a_config": {"num_hidden_layers": 4}, "b_config": {"num_hidden_layers": 3}}, 5, 6),  # whose is it?
        ({"num_hidden_layers": 4, "is_encoder_decoder": True}, 5, 6),
        ({"num_hidden_layers": 4, "_diffusers_version": "0.30"}, 5, 6),
        ({}, 5, 6),
    ],
)
def test_each_tower_has_its_own_number(config, text, vision):
    found = Layers.of([*names(5, "model.language_model.layers"), *VISION, "mtp.layers.0.x"], config)
    assert found == Layers({"model.language_model.layers": text, "model.visual.blocks": vision, "mtp.layers": 1})


def gradient(tmp_path, config: str | bytes | None, layers: int = 5, file: str = "model.safetensors"):
    """The share of the second model in every layer, where a gradient goes from 0 to 1."""
    for folder, value in (("a", 0.0), ("b", 1.0)):
        tensors = {name: torch.full((2,), value) for name in names(layers)}
        save_model(tmp_path / folder / file, tensors)
    if config is not None:
        encoded = config.encode() if isinstance(config, str) else config
        (tmp_path / "a" / "config.json").write_bytes(encoded)
    recipe = {
        "merge_method": "weighted_sum",
        "models": [str(tmp_path / "a"), str(tmp_path / "b")],
        "parameters": {"alpha": [0, 1]},
    }
    made = merge_to(tmp_path / "out.safetensors", recipe)
    return [float(made[f"model.layers.{n}.mlp.weight"][0]) for n in range(layers)]


def test_a_merge_asks_the_config_beside_the_layout(tmp_path):
    assert gradient(tmp_path, None) == [0, 0.25, 0.5, 0.75, 1]
    assert gradient(tmp_path, json.dumps({"num_hidden_layers": 3})) == [0, 0.5, 1, 1, 1]
    assert gradient(tmp_path, json.dumps({"num_hidden_layers": 3}), file="model-00001-of-00001.safetensors") == [
        *(0, 0.5, 1, 1, 1)
    ]


def test_a_nested_merge_has_the_layers_of_its_layout(tmp_path):
    gradient(tmp_path, json.dumps({"num_hidden_layers": 3}))
    recipe = {
        "merge_method": "weighted_sum",
        "models": [{"merge_method": "passthrough", "models": [str(tmp_path / "a")]}, str(tmp_path / "b")],
        "parameters": {"alpha": [0, 1]},
    }
    made = merge_to(tmp_path / "out.safetensors", recipe)
    assert [float(made[f"model.layers.{n}.mlp.weight"][0]) for n in range(5)] == [0, 0.5, 1, 1, 1]


@pytest.mark.parametrize(
    "config",
    [
        *("", "[", "[1]", "null", '"x"', '{"num_hidden_layers": "4"}', '{"num_hidden_layers": 0}', "[" * 100_000),
        *('{"num_hidden_layers": 4.0}', '{"num_hidden_layers": true}', '{"num_hidden_layers": 1e9}'),
        *('{"num_hidden_layers": -1}', '{"num_hidden_layers": 10001}', '{"num_hidden_layers": [4]}'),
        *('{"num_hidden_layers": 3, "num_hidden_layers": 4}', b"\xff\xfe{}", " " * (MAX_CONFIG + 1)),
        *('{"text_config": {"num_hidden_layers": {}}}', '{"n_layer": ' + "9" * 5000 + "}"),
    ],
    ids=range(19),
)
def test_a_config_that_can_not_be_trusted_is_refused_where_it_counts(tmp_path, config):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        gradient(tmp_path, config)
    folders = [tmp_path / "a", tmp_path / "b"]
    assert merge_to(tmp_path / "out.safetensors", streammerge.weighted_sum(*folders, alpha=0.5))


def test_a_config_in_a_folder_of_many_models_is_nobodys(tmp_path):
    tensors = {name: torch.zeros(1) for name in names(5)}
    for name in ("a", "b"):
        save_model(tmp_path / f"{name}.safetensors", tensors)
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 3}')
    merged = streammerge.weighted_sum(tmp_path / "a.safetensors", tmp_path / "b.safetensors", alpha=[0, 1])
    assert merged.layers == Layers({"model.layers": 5})
