"""A model with adapters in it as a merge like any other: weights, order, accounts, metadata, and what never changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import streammerge
from streammerge.cli.main import main
from streammerge.errors import MergeError, RecipeError
from tests.make.models import Tensors, assert_same_bytes, load_model, merge_to, normal, save_model
from tests.models.adapters.baking import bake, numbers, parts, peft_folder

OUT, IN, RANK = 12, 10, 3
NAMES = [f"layers.{n}.{part}.weight" for n in range(4) for part in ("a", "b")]
MODEL: Tensors = {
    **{name: numbers(OUT, IN, seed=n, dtype=torch.float16) for n, name in enumerate(NAMES)},
    "positions": torch.arange(7),
    "norm.weight": numbers(IN, seed=90, dtype=torch.float16),
}


def lora(seed: int, modules: list[str] | None = None, rank: int = RANK, alpha: float | None = None) -> Tensors:
    """An adapter of these modules, or of all."""
    made: Tensors = {}
    for n, module in enumerate(modules or [f"layers_{n}_{part}" for n in range(4) for part in "ab"]):
        up, down = numbers(OUT, rank, seed=seed + n), numbers(rank, IN, seed=seed + n + 50)
        more = {} if alpha is None else {"alpha": alpha}
        made |= parts(f"lora_unet_{module}", lora_up__weight=up, lora_down__weight=down, **more)
    return made


def difference(adapter: Tensors, name: str, alpha: float | None = None) -> torch.Tensor:
    module = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
    up, down = (adapter[f"{module}.lora_{part}.weight"].double() for part in ("up", "down"))
    return up @ down * (1.0 if alpha is None else alpha / down.shape[0])


def assert_near(made: torch.Tensor, exact: torch.Tensor) -> None:
    assert torch.allclose(made.double(), exact, rtol=1e-3, atol=1e-3)


def test_adapters_add_up(tmp_path):
    one, two = lora(100, alpha=1.5), lora(200, rank=5)
    made = bake(tmp_path, MODEL, one, two, weights=[0.8, -0.3])
    for name in NAMES:
        exact = MODEL[name].double() + 0.8 * difference(one, name, 1.5) - 0.3 * difference(two, name)
        assert_near(made[name], exact)
    for name in ("positions", "norm.weight"):
        assert torch.equal(made[name], MODEL[name])


def test_what_goes_by_the_weights_finds_those_before_it(tmp_path):
    modules = ["layers_0_a"]
    one = lora(100, modules)
    two = {**lora(200, modules), **parts("lora_unet_layers_0_a", dora_scale=torch.ones(OUT, 1))}
    weight = MODEL["layers.0.a.weight"].double()

    def dora(weight: torch.Tensor) -> torch.Tensor:
        longer = weight + difference(two, "layers.0.a.weight")
        return longer / longer.square().sum(1, keepdim=True).sqrt()

    first = bake(tmp_path, MODEL, one, two)["layers.0.a.weight"]
    assert_near(first, dora(weight + difference(one, "layers.0.a.weight")))
    second = bake(tmp_path, MODEL, two, one)["layers.0.a.weight"]
    assert_near(second, dora(weight) + difference(one, "layers.0.a.weight"))


def test_weights_by_layer_and_by_name(tmp_path):
    adapter = lora(100)
    made = bake(tmp_path, MODEL, adapter, weights=[[0.0, 1.0]])
    for n in range(4):
        assert_near(
            made[f"layers.{n}.a.weight"],
            MODEL[f"layers.{n}.a.weight"].double() + n / 3 * difference(adapter, f"layers.{n}.a.weight"),
        )
    by_name = [[{"filter": ".a.", "value": 0.5}, {"value": 0}]]
    made = bake(tmp_path, MODEL, adapter, weights=by_name)
    assert torch.equal(made["layers.1.b.weight"], MODEL["layers.1.b.weight"])
    exact = MODEL["layers.1.a.weight"].double() + 0.5 * difference(adapter, "layers.1.a.weight")
    assert_near(made["layers.1.a.weight"], exact)


def test_an_adapter_without_weight_is_not_read(tmp_path):
    """Its factors are no numbers: whoever read them would tell."""
    adapter = {name: torch.full_like(tensor, torch.nan) for name, tensor in lora(100).items()}
    assert_same_bytes(bake(tmp_path, MODEL, adapter, weights=0, on_nonfinite="error"), MODEL)
    with pytest.raises(MergeError, match=r"adapter0.safetensors"):
        bake(tmp_path, MODEL, adapter, weights=0.5, on_nonfinite="error")


def test_the_bytes_are_the_same_however_it_is_done(tmp_path):
    shapes = {"big": (700, 900), "wide": (3, 200_000), "kernels": (64, 32, 3, 3)}
    model = {f"{name}.weight": normal(shape, n, torch.float16) for n, (name, shape) in enumerate(shapes.items())}
    adapter: Tensors = {}
    for n, (name, (rows, *rest)) in enumerate(shapes.items()):
        up, down = numbers(rows, 4, *[1] * (len(rest) - 1), seed=n), numbers(4, *rest, seed=n + 10)
        scale = {"dora_scale": torch.ones(1, rest[0], *[1] * (len(rest) - 1))} if name == "kernels" else {}
        adapter |= parts(f"lora_unet_{name}", lora_up__weight=up, lora_down__weight=down, **scale)
    first = bake(tmp_path, model, adapter, threads=1, io="pread")
    for options in ({"threads": 3, "io": "mmap"}, {"threads": 2, "io": "pread"}, {"threads": 1, "max_ram": "16GB"}):
        assert_same_bytes(bake(tmp_path, model, adapter, **options), first)


def test_ranges_of_a_merge_of_adapted_models(tmp_path):
    """One that is baked is an input like any other, and its adapter is folded into the merge."""
    one = lora(100)
    save_model(tmp_path / "lora.safetensors", one)
    save_model(tmp_path / "base.safetensors", MODEL)
    other = {name: (t.double() + 0.1).half() if t.is_floating_point() else t for name, t in MODEL.items()}
    save_model(tmp_path / "other.safetensors", other)
    adapted = {"model": str(tmp_path / "base.safetensors"), "adapters": [str(tmp_path / "lora.safetensors")]}
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base.safetensors"),
        "models": [
            {**adapted, "name": "styled", "parameters": {"weight": 0.5}},
            {"model": str(tmp_path / "other.safetensors"), "parameters": {"weight": 0.25}},
        ],
    }
    made = merge_to(tmp_path / "out.safetensors", recipe)
    for name in NAMES:
        base = MODEL[name].double()
        assert_near(made[name], base + 0.5 * difference(one, name) + 0.25 * (other[name].double() - base))
    nested = {"merge_method": "linear", "models": [{"model": recipe, "adapters": adapted["adapters"]}]}
    again = merge_to(tmp_path / "nested.safetensors", nested)
    name = NAMES[0]
    assert_near(again[name], made[name].double() + difference(one, name))


def test_nonlinear_methods_take_adapted_models(tmp_path):
    one = lora(100)
    paths = {"lora": save_model(tmp_path / "lora.safetensors", one), "m": save_model(tmp_path / "m.safetensors", MODEL)}
    recipe = {
        "merge_method": "slerp",
        "base_model": str(paths["m"]),
        "models": [{"model": str(paths["m"]), "adapters": [str(paths["lora"])], "name": "styled"}],
        "parameters": {"t": 1.0},
    }
    made = merge_to(tmp_path / "out.safetensors", recipe)
    assert_near(made[NAMES[1]], MODEL[NAMES[1]].double() + difference(one, NAMES[1]))


def test_scaled_weights_are_decoded(tmp_path):
    codes = numbers(OUT, IN, seed=1).to(torch.float8_e4m3fn)
    model = {"x.weight": codes, "x.weight_scale": torch.tensor(0.5), "y.weight": numbers(OUT, IN, seed=2)}
    up, down = numbers(OUT, RANK, seed=3), numbers(RANK, IN, seed=4)
    made = bake(tmp_path, model, parts("lora_unet_x", lora_up__weight=up, lora_down__weight=down))
    assert made.keys() == {"x.weight", "y.weight"}
    assert made["x.weight"].dtype == torch.bfloat16
    assert torch.allclose(made["x.weight"].double(), codes.double() * 0.5 + up.double() @ down.double(), atol=2e-2)


# ── what users type ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    save_model(tmp_path / "model.safetensors", MODEL)
    save_model(tmp_path / "style.safetensors", lora(100, alpha=1.5))
    monkeypatch.chdir(tmp_path)
    return Path(tmp_path)


def test_the_command(folder, capsys):
    words = ["bake", "model.safetensors", "style.safetensors:0.8", "-o", "out.safetensors", "--report", "r.json"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "note: style in model: 8 of 8 modules applied, to 8 tensors: LoRA, rank 3, scale 0.5" in said.err
    assert "8 merged, 2 copied, 0 dropped" in said.out
    assert "adapter style  8 of 8 modules applied to model" in said.out
    (account,) = json.loads((folder / "r.json").read_text())["adapters"]
    assert (account["modules"], account["applied"], len(account["rows"])) == (8, 8, 8)
    assert account["rows"][0] == {
        "module": "lora_unet_layers_0_a",
        "tensors": ["layers.0.a.weight"],
        "kind": "LoRA",
        "rank": 3,
        "scale": 0.5,
        "weight": 0.8,
    }
    exact = MODEL[NAMES[0]].double() + 0.8 * difference(lora(100), NAMES[0], 1.5)
    assert_near(load_model(folder / "out.safetensors")[NAMES[0]], exact)


def test_the_plan_tells_every_module(folder, capsys):
    assert main(["bake", "model.safetensors", "style.safetensors", "-o", "out.safetensors", "--dry-run", "-v"]) == 0
    said = capsys.readouterr().out
    assert "adapted  lora_unet_layers_3_b → layers.3.b.weight: LoRA, rank 3, scale 0.5 × 1" in said
    assert "copied   F16 [10]                     norm.weight   from model: no adapter changes it" in said
    assert not (folder / "out.safetensors").exists()


def test_an_output_tells_how_it_was_made(folder, capsys):
    assert main(["bake", "model.safetensors", "style.safetensors:0.8", "-o", "out.safetensors", "-q"]) == 0
    with safe_open(folder / "out.safetensors", "pt") as opened:
        recipe = json.loads(opened.metadata()["streammerge.recipe"])
    assert recipe["models"][0]["adapters"] == [
        {"adapter": "style.safetensors", "name": "style", "parameters": {"weight": 0.8}}
    ]
    again = ["out.safetensors", "--recipe-from-metadata", "-o", "again.safetensors", "-q"]
    assert main(again) == 0
    assert (folder / "again.safetensors").read_bytes() == (folder / "out.safetensors").read_bytes()
    assert main(["verify", "out.safetensors", "--recipe-from-metadata"]) == 0
    (folder / "style.safetensors").rename(folder / "moved.safetensors")
    assert main([*again[:2], "-o", "third.safetensors", "-q"]) == 1
    assert "style=PATH" in capsys.readouterr().err
    assert main([*again[:2], "style=moved.safetensors", "-o", "third.safetensors", "-q"]) == 0
    assert_same_bytes(load_model(folder / "third.safetensors"), load_model(folder / "out.safetensors"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["model.safetensors"], "one adapter or more"),
        (["model.safetensors:0.5", "style.safetensors"], "has no weight"),
        (["model.safetensors", "style.safetensors", "-m", "slerp"], "-m has no meaning for bake"),
        (["model.safetensors", "style.safetensors", "-p", "weight=1"], "-p has no meaning for bake"),
        (["model.safetensors", "nothing.safetensors"], "nothing.safetensors: can't be read"),
        (["style.safetensors", "style.safetensors"], "is an adapter"),
        (["model.safetensors", "model.safetensors"], "is no adapter"),
        (["model.safetensors", "style.safetensors:nan"], "nan"),
    ],
)
def test_what_bake_does_not_take(folder, capsys, words, told):
    assert main(["bake", *words, "-o", "out.safetensors"]) == 1
    assert told in capsys.readouterr().err
    assert not (folder / "out.safetensors").exists()


def test_what_is_kept_is_not_changed(folder, capsys):
    """Kept as the model has it, or as the adapters make it? Nobody can tell, so it is refused."""
    words = ["bake", "model.safetensors", "style.safetensors", "-o", "out.safetensors", "-q"]
    assert main([*words, "--keep", "norm.weight"]) == 0
    assert main([*words, "--keep", "layers.1.*", "--force"]) == 1
    told = capsys.readouterr().err
    assert "2 tensors of model are to be kept, and are changed by an adapter" in told
    assert "layers.1.a.weight   rule layers.1.*, and style" in told


def test_an_adapter_in_one_of_several_dicts(folder):
    """`--entry` chooses it as it does models."""
    style = load_model(folder / "style.safetensors")
    torch.save({"params": style, "params_ema": {name: tensor * 2 for name, tensor in style.items()}}, "styles.pt")
    words = ["bake", "model.safetensors", "styles.pt", "-o", "chosen.safetensors", "--force", "-q"]
    assert main(words) == 1
    assert main(["bake", "model.safetensors", "style.safetensors", "-o", "out.safetensors", "-q"]) == 0
    for chosen in ("params", "styles=params"):
        assert main([*words, "--entry", chosen]) == 0
        assert_same_bytes(load_model(folder / "chosen.safetensors"), load_model(folder / "out.safetensors"))
    assert main(["verify", "chosen.safetensors", "--all", "-q"]) == 0


def test_the_adapter_is_never_the_output(folder, capsys):
    before = (folder / "style.safetensors").read_bytes()
    assert main(["bake", "model.safetensors", "style.safetensors", "-o", "style.safetensors", "--force"]) == 1
    assert "style.safetensors" in capsys.readouterr().err
    assert (folder / "style.safetensors").read_bytes() == before


def test_stored_otherwise(folder):
    assert (
        main(["bake", "model.safetensors", "style.safetensors", "-o", "out.safetensors", "--dtype", "fp32", "-q"]) == 0
    )
    made = load_model(folder / "out.safetensors")
    assert made["norm.weight"].dtype == made[NAMES[0]].dtype == torch.float32
    exact = MODEL[NAMES[0]].double() + difference(lora(100), NAMES[0], 1.5)
    assert torch.allclose(made[NAMES[0]].double(), exact, atol=1e-6)


@pytest.mark.parametrize(
    "entry",
    [
        {"model": "model.safetensors+style.safetensors"},
        {"model": {"model": {"path": "model.safetensors"}, "lora": {"path": "style.safetensors"}}},
        {"model": "model.safetensors", "adapters": ["style.safetensors"]},
        {"model": "model.safetensors", "adapters": [{"adapter": "style.safetensors", "parameters": {"weight": 1}}]},
    ],
)
def test_mergekits_ways_to_name_a_lora(folder, entry):
    made = merge_to(folder / "out.safetensors", {"merge_method": "linear", "models": [entry]})
    assert_near(made[NAMES[0]], MODEL[NAMES[0]].double() + difference(lora(100), NAMES[0], 1.5))


@pytest.mark.parametrize(
    ("models", "base"),
    [
        ([{"model": "llama+one"}, {"model": "llama+two"}], "llama"),
        ([{"model": "llama+one"}, "llama", {"model": "llama+two"}], "llama"),
        ([{"model": "llama+one", "name": "a"}, {"model": "llama+two", "name": "b"}], "llama"),
        ([{"model": "llama+one"}, {"model": "llama+two"}], "./llama"),
    ],
)
def test_a_base_by_its_path_is_without_what_the_models_have_in_it(folder, models, base):
    """As in mergekit. The first model's name is that path, too."""
    (folder / "llama").mkdir()
    save_model(folder / "llama" / "model.safetensors", MODEL)
    for name, seed in (("one", 100), ("two", 200)):
        save_model(folder / name, lora(seed))
    recipe = {"merge_method": "task_arithmetic", "base_model": base, "models": models, "parameters": {"weight": 0.5}}
    made = merge_to(folder / "out.safetensors", recipe)
    exact = MODEL[NAMES[0]].double()
    for seed in (100, 200):
        exact = exact + 0.5 * difference(lora(seed), NAMES[0])
    assert_near(made[NAMES[0]], exact)


def test_a_base_by_the_name_that_a_model_is_given_is_that_model(folder):
    (folder / "llama").mkdir()
    save_model(folder / "llama" / "model.safetensors", MODEL)
    save_model(folder / "one", lora(100))
    models = [{"model": "llama+one", "name": "llama"}, "model.safetensors"]
    recipe = {"merge_method": "task_arithmetic", "base_model": "llama", "models": models, "parameters": {"weight": 0.5}}
    made = merge_to(folder / "out.safetensors", recipe)
    assert_near(made[NAMES[0]], MODEL[NAMES[0]].double() + 0.5 * difference(lora(100), NAMES[0]))


def test_a_file_with_a_plus_in_its_name_is_a_file(folder):
    save_model(folder / "a+b.safetensors", MODEL)
    made = merge_to(folder / "out.safetensors", {"merge_method": "linear", "models": ["a+b.safetensors"]})
    assert_same_bytes(made, MODEL)


@pytest.mark.parametrize("adapters", ["one", {"adapter": "one", "weight": 1}])
def test_one_adapter_needs_no_list(folder, adapters):
    save_model(folder / "one", lora(100))
    save_model(folder / "plain.safetensors", MODEL)
    recipe = {"merge_method": "linear", "models": [{"model": "plain.safetensors", "adapters": adapters}]}
    made = merge_to(folder / "out.safetensors", recipe)
    assert_near(made[NAMES[0]], MODEL[NAMES[0]].double() + difference(lora(100), NAMES[0]))


@pytest.mark.parametrize(
    ("adapters", "told"),
    [
        (7, "adapters must be a list"),
        ([1], "expected the path of an adapter"),
        ([{"adapter": "style.safetensors", "wieght": 1}], "Did you mean 'weight'"),
        ([{"adapter": "style.safetensors", "weight": "much"}], "weight must be a number"),
        ([{"adapter": "style.safetensors", "weight": True}], "weight must be a number"),
        ([{"adapter": "style.safetensors", "weight": 1, "parameters": {"weight": 1}}], "has it once"),
        ([{"adapter": "style.safetensors", "parameters": {"density": 1}}], "has one parameter, weight"),
        ([{"adapter": {"merge_method": "linear", "models": []}}], "expected the path of an adapter"),
    ],
)
def test_recipes_that_are_none(folder, adapters, told):
    recipe = {"merge_method": "linear", "models": [{"model": "model.safetensors", "adapters": adapters}]}
    with pytest.raises(RecipeError, match=told):
        streammerge.make_plan(recipe, output="out.safetensors")


def test_two_adapters_of_one_name_are_told_apart(folder):
    save_model(folder / "other" / "style.safetensors", lora(200))
    adapters = ["style.safetensors", "other/style.safetensors", "style.safetensors"]
    recipe = {"merge_method": "linear", "models": [{"model": "model.safetensors", "adapters": adapters}]}
    plan = streammerge.make_plan(recipe, output="out.safetensors")
    assert [account.adapter for account in plan.merged.accounts] == ["style", "style#2", "style#3"]


def test_folders_of_peft(folder):
    tensors = {"layers.0.a.lora_B.weight": numbers(OUT, RANK), "layers.0.a.lora_A.weight": numbers(RANK, IN, seed=1)}
    peft_folder(folder / "peft", tensors, r=RANK, lora_alpha=6)
    assert main(["bake", "model.safetensors", "peft:0.5", "-o", "out.safetensors", "-q"]) == 0
    exact = MODEL["layers.0.a.weight"].double() + numbers(OUT, RANK).double() @ numbers(RANK, IN, seed=1).double()
    assert_near(load_model(folder / "out.safetensors")["layers.0.a.weight"], exact)
