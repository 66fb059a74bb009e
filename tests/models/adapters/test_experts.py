"""PEFT's LoRA of parameters: of all experts of a layer in one tensor, in every form in which models store them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.cli.main import main
from streammerge.errors import MergeError
from streammerge.models.mixtures.layouts import blocks_of
from tests.make.models import Tensors, load_model, merge_to, save_model
from tests.models.adapters.baking import bake, numbers, peft_folder

E, H, WIDE, R = 3, 8, 5, 2  # experts, the model's width, an expert's, ranks
LAYER, GROUP = "model.layers.0.", "model.layers.0.mlp.experts"
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SCALE = {"r": R, "lora_alpha": 3.0}


def factors(module: str, out: int, width: int, seed: int, rank: int = R) -> Tensors:
    down, up = numbers(rank * E, width, seed=seed), numbers(out, rank * E, seed=seed + 1)
    return {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}


def difference(tensors: Tensors, module: str, rank: int = R) -> torch.Tensor:
    """Δ[e] of all experts, without the scale, as PEFT has it."""
    down, up = (tensors[f"{module}.lora_{part}.weight"].double() for part in "AB")
    return torch.einsum("ore,eri->eoi", up.reshape(len(up), rank, E), down.reshape(E, rank, -1))


INNER, OUTER = f"{GROUP}.base_layer", GROUP
ADAPTER = {**factors(INNER, 2 * WIDE, H, 10), **factors(OUTER, H, WIDE, 20)}


def model(form: str, block: str = "mlp") -> Tensors:
    """A layer's experts, and what else is in it."""
    gate_up, down = numbers(E, 2 * WIDE, H, seed=1), numbers(E, H, WIDE, seed=2)
    start = f"{LAYER}{block}."
    router = {f"{start}{'router' if form == 'interleaved' else 'gate'}.weight": numbers(E, H, seed=3)}
    if form == "separate":
        names = ("w1", "w3", "w2") if block == "block_sparse_moe" else ("gate_proj", "up_proj", "down_proj")
        matrices = {e: (gate_up[e, :WIDE], gate_up[e, WIDE:], down[e]) for e in range(E)}
        return router | {
            f"{start}experts.{e}.{name}.weight": matrix.clone()
            for e, own in matrices.items()
            for name, matrix in zip(names, own, strict=True)
        }
    turned = form in ("transposed", "interleaved")
    made = {"gate_up_proj": gate_up, "down_proj": down}
    suffix = ".weight" if form == "fused, called a weight" else ""
    return router | {
        f"{start}experts.{name}{suffix}": (each.transpose(1, 2) if turned else each).contiguous()
        for name, each in made.items()
    }


def parts(tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts' matrices as one tensor each, [E, 2·WIDE, H] and [E, H, WIDE], from any form."""
    ((_, block),) = blocks_of({name: info_of(tensor) for name, tensor in tensors.items()}).items()
    if block.form == "separate":
        gate, up, down = (
            torch.stack([tensors[block.separate(e, part)] for e in range(E)]) for part in ("gate", "up", "down")
        )
        return torch.cat([gate, up], 1), down
    gate_up, down = tensors[block.gate_up], tensors[block.down]
    return (gate_up, down) if block.form == "fused" else (gate_up.transpose(1, 2), down.transpose(1, 2))


def info_of(tensor: torch.Tensor) -> Any:
    from streammerge.tensors import DTYPES, TensorInfo

    return TensorInfo(DTYPES["F32"], tuple(tensor.shape))


FORMS = ["separate", "fused", "transposed", "interleaved", "fused, called a weight"]


@pytest.mark.parametrize("weight", [1.0, -0.5])
@pytest.mark.parametrize("form", [*FORMS, "separate, Mixtral's"])
def test_every_expert_gets_its_difference(tmp_path, form, weight):
    given = model("separate", "block_sparse_moe") if form == "separate, Mixtral's" else model(form)
    adapter = peft_folder(tmp_path / "lora", ADAPTER, target_parameters=BOTH, peft_version="0.21.2", **SCALE)
    made = bake(tmp_path, given, adapter, weights=weight)
    assert made.keys() == given.keys()
    for before, after, module in zip(parts(given), parts(made), (INNER, OUTER), strict=True):
        right = before.double() + weight * 1.5 * difference(ADAPTER, module)
        assert torch.allclose(after.double(), right, atol=1e-6)
    router = next(name for name in given if name.endswith(("gate.weight", "router.weight")))
    assert torch.equal(made[router], given[router])


def test_names_and_numbers_are_those_of_the_parameter(tmp_path):
    """Keys of patterns end with a parameter's name; a key without a dot may be any module's."""
    wrapper = factors(f"{GROUP}", 2 * WIDE, H, 10, rank=4)
    gate = {f"{LAYER}mlp.gate.lora_A.weight": numbers(1, H), f"{LAYER}mlp.gate.lora_B.weight": numbers(E, 1)}
    plain = {f"{LAYER}q_proj.lora_A.weight": numbers(R, H), f"{LAYER}q_proj.lora_B.weight": numbers(6, R)}
    config = {
        "target_parameters": ["gate_up_proj", "mlp.gate.weight"],
        "target_modules": ["q_proj"],
        "rank_pattern": {r".*\.gate_up_proj": 4, "gate.weight": 1},
        "alpha_pattern": {"gate_up_proj": 8.0, "mlp.gate.weight": 0.25, "gate": 100.0},
        **SCALE,
    }
    adapter = peft_folder(tmp_path / "lora", {**wrapper, **gate, **plain}, **config)
    given = {**model("fused"), f"{LAYER}q_proj.weight": numbers(6, H, seed=4)}
    made = bake(tmp_path, given, adapter)
    moved = {name.removeprefix(LAYER): (made[name] - given[name]).double() for name in given}
    assert torch.allclose(moved["mlp.experts.gate_up_proj"], 2.0 * difference(wrapper, GROUP, 4), atol=1e-6)
    right = 0.25 * gate[f"{LAYER}mlp.gate.lora_B.weight"] @ gate[f"{LAYER}mlp.gate.lora_A.weight"]
    assert torch.allclose(moved["mlp.gate.weight"], right.double(), atol=1e-6)
    right = 1.5 * plain[f"{LAYER}q_proj.lora_B.weight"] @ plain[f"{LAYER}q_proj.lora_A.weight"]
    assert torch.allclose(moved["q_proj.weight"], right.double(), atol=1e-6)
    assert not moved["mlp.experts.down_proj"].any()


def square(name: str, seed: int) -> Tensors:
    return {f"{GROUP}.{name}": numbers(E, H, H, seed=seed)}


def test_square_matrices_lie_as_the_others_of_their_layer_do(tmp_path):
    adapter = {**factors(INNER, 2 * H, H, 10), **factors(OUTER, H, H, 20)}
    folder = peft_folder(tmp_path / "lora", adapter, target_parameters=BOTH, **SCALE)
    for turned in (False, True):
        shape = (E, H, 2 * H) if turned else (E, 2 * H, H)
        given = {f"{GROUP}.gate_up_proj": numbers(*shape, seed=1), **square("down_proj", 2)}
        moved = bake(tmp_path, given, folder)[f"{GROUP}.down_proj"] - given[f"{GROUP}.down_proj"]
        right = 1.5 * difference(adapter, OUTER)
        assert torch.allclose(moved.double(), right.transpose(1, 2) if turned else right, atol=1e-6)


def refusal(folder: Path, given: Tensors, adapter: Tensors, **config: Any) -> str:
    with pytest.raises(MergeError) as refused:
        bake(folder, given, peft_folder(folder / "lora", adapter, **{**SCALE, **config}))
    return str(refused.value)


@pytest.mark.parametrize(
    ("given", "adapter", "targets", "said"),
    [
        (square("down_proj", 1), factors(GROUP, H, H, 1), BOTH[1:], "nothing tells whether they lie transposed"),
        (model("fused"), factors(GROUP, H + 1, WIDE, 1), BOTH[1:], r"changes [3, 9, 5], and"),
        (model("separate"), factors(GROUP, H, WIDE + 1, 1), BOTH[1:], r"changes [3, 8, 6], and"),
        (model("fused"), {**factors(INNER, 9, 9, 1), **factors(GROUP, H, WIDE, 1)}, BOTH[1:], "nobody can tell which"),
        (model("fused"), ADAPTER, ["mlp.experts.one", "mlp.experts.two"], "nobody can tell which are which"),
        (model("fused"), ADAPTER, ["experts.down_proj", "experts.other_proj"], "nobody can tell which are which"),
        (model("fused"), factors(GROUP, H, WIDE, 1), ["mlp.experts.one"], "none of its modules (1) is in"),
        ({"x.weight": numbers(H, WIDE)}, factors(GROUP, H, WIDE, 1), BOTH[1:], "none of its modules (1) is in model"),
        (
            model("fused"),
            {**factors(GROUP, H, WIDE, 1), f"{GROUP}.lora_magnitude_vector": numbers(H)},
            BOTH[1:],
            "beside",
        ),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path, given, adapter, targets, said):
    assert said in refusal(tmp_path, given, adapter, target_parameters=targets)


def test_ranks_that_are_no_multiple_are_refused(tmp_path):
    said = refusal(tmp_path, model("fused"), factors(GROUP, H, WIDE, 1), target_parameters=BOTH[1:], r=4)
    assert "should have as many ranks, a multiple of 4" in said
    said = refusal(tmp_path, model("fused"), factors(GROUP, H, WIDE, 1), target_parameters="down_proj")
    assert "target_parameters must be a list of names" in said


def test_lengths_of_parameters_are_refused(tmp_path):
    """PEFT has none: such an adapter was made of another, and would be baked without them."""
    said = refusal(tmp_path, model("fused"), factors(GROUP, H, WIDE, 1), target_parameters=BOTH[1:], use_dora=True)
    assert "is of a parameter, which has no lengths, and" in said
    assert "says use_dora" in said


def test_they_add_up_to_one_adapter(tmp_path):
    """Of an inner wrapper that only the first has, other ranks in the outer one, and a plain module."""
    plain = {f"{LAYER}q_proj.lora_A.weight": numbers(R, H), f"{LAYER}q_proj.lora_B.weight": numbers(6, R)}
    version = {"peft_version": "0.21.2"}
    one = peft_folder(tmp_path / "one", {**ADAPTER, **plain}, target_parameters=BOTH, **SCALE, **version)
    outer = factors(OUTER, H, WIDE, 40, rank=4)
    config = {"target_parameters": BOTH[1:], "rank_pattern": {"down_proj": 4}, **SCALE, **version}
    two = peft_folder(tmp_path / "two", outer, **config)
    models = [{"model": str(path), "parameters": {"weight": w}} for path, w in ((one, 0.8), (two, -0.5))]
    merge_to(tmp_path / "sum", {"merge_method": "linear", "models": models})
    said = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    assert said["target_parameters"] == [f"{GROUP}.down_proj", f"{GROUP}.gate_up_proj"]
    assert (said["target_modules"], said["peft_version"]) == ([f"{LAYER}q_proj"], "0.21.2")
    assert (said["r"], said["rank_pattern"]) == (R, {f"{GROUP}.down_proj".replace(".", r"\."): R + 4})
    for form in ("separate", "transposed"):
        given = {**model(form), f"{LAYER}q_proj.weight": numbers(6, H, seed=4)}
        both = bake(tmp_path / "both", given, one, two, weights=[0.8, -0.5])
        once = bake(tmp_path / "once", given, tmp_path / "sum")
        for name, tensor in both.items():
            assert torch.allclose(once[name], tensor, atol=1e-6), name
            assert torch.equal(tensor, given[name]) == name.endswith(("gate.weight", "router.weight"))


def of_one(folder: Path, name: str, adapter: Tensors, *targets: str) -> str:
    return str(peft_folder(folder / name, adapter, target_parameters=list(targets), **SCALE))


@pytest.mark.parametrize("more", [["--rank", "2"], ["-m", "ties", "--rank", "2"]])
def test_they_are_not_decomposed(tmp_path, capsys, more):
    words = [of_one(tmp_path, name, ADAPTER, *BOTH) for name in ("one", "two")]
    assert main([*words, "-o", str(tmp_path / "out"), *more]) == 1
    said = capsys.readouterr().err
    assert "are added up, not decomposed" in said
    assert "streammerge bake" in said


@pytest.mark.parametrize(
    ("other", "targets", "more", "said"),
    [
        (factors(OUTER, 2 * WIDE, H, 1), BOTH[:1], [], "is of down_proj and gate_up_proj in some of the adapters"),
        (factors(OUTER, WIDE, H, 1), BOTH[1:], [], "is LoRA of experts [3, 8, 5] and LoRA of experts [3, 5, 8]"),
        (ADAPTER, BOTH, ["--names", "comfy"], "has no name as comfy would have it"),
    ],
)
def test_what_is_no_sum_is_refused(tmp_path, capsys, other, targets, more, said):
    words = [of_one(tmp_path, "one", ADAPTER, *BOTH), of_one(tmp_path, "two", other, *targets)]
    assert main([*words, "-o", str(tmp_path / "out"), *more]) == 1
    assert said in capsys.readouterr().err


def test_the_account_names_the_tensors(tmp_path, capsys, monkeypatch):
    peft_folder(tmp_path / "lora", ADAPTER, target_parameters=BOTH, **SCALE)
    save_model(tmp_path / "model.safetensors", model("separate"))
    monkeypatch.chdir(tmp_path)
    words = ["bake", "model.safetensors", "lora", "-o", "out.safetensors"]
    assert main([*words, "--drop", "*.1.down_proj.*"]) == 0
    told = "note: lora in model: 2 of 2 modules applied, to 8 tensors: LoRA of experts, rank 2, scale 1.5"
    assert told in capsys.readouterr().err


def test_the_factors_of_many_experts_are_read_once(tmp_path, monkeypatch):
    """What is one expert's lies all over B: element by element it would take days."""
    count = 40
    down, up = numbers(R * count, WIDE, seed=1), numbers(H, R * count, seed=2)
    adapter = {f"{GROUP}.lora_A.weight": down, f"{GROUP}.lora_B.weight": up}
    peft_folder(tmp_path / "lora", adapter, target_parameters=BOTH[1:], **SCALE)
    given = {f"{GROUP}.down_proj": numbers(count, H, WIDE, seed=3)}
    save_model(tmp_path / "model.safetensors", given)
    monkeypatch.chdir(tmp_path)
    assert main(["bake", "model.safetensors", "lora", "-o", "out.safetensors", "--report", "r.json", "-q"]) == 0
    all_bytes = sum(tensor.numel() * 4 for tensor in (*given.values(), down, up))
    assert json.loads(Path("r.json").read_text())["bytes_read"] == all_bytes
    right = 1.5 * torch.einsum("ore,eri->eoi", up.reshape(H, R, count), down.reshape(count, R, WIDE))
    moved = load_model(Path("out.safetensors"))[f"{GROUP}.down_proj"] - given[f"{GROUP}.down_proj"]
    assert torch.allclose(moved, right, atol=1e-6)


def test_its_rank_is_that_of_one_expert(tmp_path, capsys):
    peft_folder(tmp_path / "lora", ADAPTER, target_parameters=BOTH, **SCALE)
    assert main(["inspect", str(tmp_path / "lora")]) == 0
    assert "PEFT's names: 2 modules, rank 2\n" in capsys.readouterr().out
