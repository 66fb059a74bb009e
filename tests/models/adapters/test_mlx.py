"""MLX's adapters are put into models as MLX does it: W + s (A B)ᵀ, by the scale of its config, and of no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.cli.main import main
from streammerge.errors import MergeError
from tests.make.models import Tensors, merge_to, save_model
from tests.models.adapters.baking import bake, numbers

OUT, IN, RANK, SCALE, ROWS = 6, 4, 3, 20.0, 9
LINEAR, EMBEDDING = "model.layers.0.self_attn.q_proj", "model.embed_tokens"
MODEL: Tensors = {
    f"{LINEAR}.weight": numbers(OUT, IN, seed=1),
    f"{EMBEDDING}.weight": numbers(ROWS, IN, seed=2),
    "model.layers.0.self_attn.square.weight": numbers(IN, IN, seed=3),
}
FACTORS: Tensors = {f"{LINEAR}.lora_a": numbers(IN, RANK, seed=4), f"{LINEAR}.lora_b": numbers(RANK, OUT, seed=5)}


def folder(path: Path, tensors: Tensors, file: str = "adapters.safetensors", **more: Any) -> Path:
    """As mlx-lm writes it."""
    path.mkdir(exist_ok=True)
    save_model(path / file, tensors)
    said = {
        "fine_tune_type": "lora",
        "num_layers": 16,
        "lora_parameters": {"rank": RANK, "dropout": 0.0, "scale": SCALE},
    }
    (path / "adapter_config.json").write_text(json.dumps(said | more))
    return path


def product(module: str, tensors: Tensors) -> torch.Tensor:
    return SCALE * tensors[f"{module}.lora_a"].double() @ tensors[f"{module}.lora_b"].double()


@pytest.mark.parametrize("weight", [1.0, -0.3])
@pytest.mark.parametrize("file", ["adapters.safetensors", "0000100_adapters.safetensors"])
def test_factors_lie_as_inputs_meet_them(tmp_path, file, weight):
    path = folder(tmp_path / "a", FACTORS, file)
    made = bake(tmp_path, MODEL, path / file if file[0] == "0" else path, weights=weight)
    expected = MODEL[f"{LINEAR}.weight"].double() + weight * product(LINEAR, FACTORS).T
    assert torch.allclose(made[f"{LINEAR}.weight"].double(), expected, atol=1e-5)


def test_of_a_square_matrix_they_lie_so_too(tmp_path):
    square = "model.layers.0.self_attn.square"
    tensors = {f"{square}.lora_a": numbers(IN, RANK, seed=7), f"{square}.lora_b": numbers(RANK, IN, seed=8)}
    made = bake(tmp_path, MODEL, folder(tmp_path / "a", tensors))
    expected = MODEL[f"{square}.weight"].double() + product(square, tensors).T
    assert torch.allclose(made[f"{square}.weight"].double(), expected, atol=1e-5)


def test_embeddings_lie_the_other_way(tmp_path):
    tensors = {f"{EMBEDDING}.lora_a": numbers(ROWS, RANK, seed=7), f"{EMBEDDING}.lora_b": numbers(RANK, IN, seed=8)}
    made = bake(tmp_path, MODEL, folder(tmp_path / "a", tensors))
    expected = MODEL[f"{EMBEDDING}.weight"].double() + product(EMBEDDING, tensors)
    assert torch.allclose(made[f"{EMBEDDING}.weight"].double(), expected, atol=1e-5)


def test_lengths_are_of_outputs(tmp_path):
    lengths = numbers(OUT, seed=6).abs()
    path = folder(tmp_path / "a", {**FACTORS, f"{LINEAR}.m": lengths}, fine_tune_type="dora")
    made = bake(tmp_path, MODEL, path)
    longer = MODEL[f"{LINEAR}.weight"].double() + product(LINEAR, FACTORS).T
    expected = lengths.double()[:, None] * longer / longer.norm(dim=1, keepdim=True)
    assert torch.allclose(made[f"{LINEAR}.weight"].double(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "more", "said"),
    [
        (FACTORS, {"lora_parameters": {"rank": RANK}}, "scale must be a number"),
        (FACTORS, {"lora_parameters": {"rank": 8, "scale": 1.0}}, "is of rank 3, and .* says 8"),
        (FACTORS, {"lora_parameters": None, "fine_tune_type": "full"}, "of the fine_tune_type 'full'"),
        (FACTORS, {"fine_tune_type": "dora"}, "has no m, and"),
        ({f"{LINEAR}.lora_a": FACTORS[f"{LINEAR}.lora_a"]}, {}, "and no lora_b"),
        ({**FACTORS, f"{LINEAR}.lora_b": numbers(2, OUT)}, {}, "have no rank in common"),
        ({**FACTORS, f"{LINEAR}.m": numbers(IN)}, {}, "outputs are 6"),
        ({**FACTORS, f"{LINEAR}.alpha": torch.tensor(2.0)}, {}, "has no meaning beside"),
        (
            {f"{LINEAR}.lora_a": numbers(2, RANK, IN), f"{LINEAR}.lora_b": numbers(2, OUT, RANK)},
            {},
            "of experts",
        ),
        (
            {f"{LINEAR}.lora_A.weight": numbers(RANK, IN), f"{LINEAR}.lora_B.weight": numbers(OUT, RANK)},
            {},
            "no LoRA of MLX",
        ),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path, tensors, more, said):
    with pytest.raises(MergeError, match=said):
        bake(tmp_path, MODEL, folder(tmp_path / "a", tensors, **more))


def test_the_scale_is_never_guessed(tmp_path):
    with pytest.raises(MergeError, match=r"is MLX's, and its adapter_config\.json"):
        bake(tmp_path, MODEL, save_model(tmp_path / "alone.safetensors", FACTORS))


def test_they_are_not_added_up(tmp_path):
    models = [{"model": str(folder(tmp_path / name, FACTORS))} for name in "ab"]
    with pytest.raises(MergeError, match="MLX's, whose adapters are put into models"):
        merge_to(tmp_path / "out.safetensors", {"merge_method": "linear", "models": models})


def test_inspect_tells_its_rank(tmp_path, capsys):
    assert main(["inspect", str(folder(tmp_path / "a", FACTORS))]) == 0
    assert "rank 3" in capsys.readouterr().out
