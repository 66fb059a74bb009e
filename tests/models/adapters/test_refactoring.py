"""Adapters merged by any method and written as factors of a rank: against the whole products, decomposed by numpy."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import streammerge
from streammerge.cli.main import main
from streammerge.compute.survey import Survey
from streammerge.errors import MergeError, PlanError, RecipeError
from streammerge.methods import METHODS
from streammerge.methods.registry import WholeMethod
from tests.make.models import Tensors, assert_same_bytes, load_model, merge_to, save_model
from tests.models.adapters.baking import numbers, parts, peft_folder
from tests.storage.outputs import digests
from tests.storage.stopped_merges import run, stop, whole

HADA = ("w1_a", "w1_b", "w2_a", "w2_b")
PLAIN, CONV = "lora_unet_mid_block_x", "lora_unet_down_blocks_0_conv"


def lora(seed: int, rank: int, alpha: float, module: str = PLAIN, kernel: int = 0, **more: Any) -> Tensors:
    ones, behind = ((1, 1), (kernel, kernel)) if kernel else ((), ())
    up, down = numbers(14, rank, *ones, seed=seed), numbers(rank, 11, *behind, seed=seed + 50)
    return parts(module, lora_up__weight=up, lora_down__weight=down, alpha=alpha, **more)


def both(seed: int, rank: int, alpha: float) -> Tensors:
    return {**lora(seed, rank, alpha), **lora(seed + 7, rank, alpha, CONV, kernel=3)}


def product(adapter: Tensors, module: str) -> torch.Tensor:
    """Δ of a module, as a matrix with a row for each filter."""
    up, down = (adapter[f"{module}.lora_{part}.weight"].double() for part in ("up", "down"))
    scale = float(adapter[f"{module}.alpha"]) / down.shape[0] if f"{module}.alpha" in adapter else 1.0
    mid = adapter.get(f"{module}.lora_mid.weight")
    if mid is not None:
        return scale * torch.einsum("nmkl,in,mj->ijkl", mid.double(), up.flatten(1), down.flatten(1)).flatten(1)
    return scale * up.flatten(1) @ down.flatten(1)


def summed(*matrices: torch.Tensor) -> torch.Tensor:
    return torch.stack(matrices).sum(0)


def nearest(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    left, values, right = np.linalg.svd(matrix.numpy(), full_matrices=False)
    return torch.from_numpy(left[:, :rank] * values[:rank] @ right[:rank])


def merged(folder: Path, *adapters: Tensors, method: str = "linear", weights: Any = None, **keys: Any) -> Tensors:
    """The adapters merged to `out.safetensors`."""
    options = {key: keys.pop(key) for key in ("threads", "io", "verify") if key in keys}
    names = [str(save_model(folder / f"lora{n}.safetensors", each)) for n, each in enumerate(adapters)]
    models = (
        [{"model": n, "parameters": {"weight": w}} for n, w in zip(names, weights, strict=True)] if weights else names
    )
    return merge_to(folder / "out.safetensors", {"merge_method": method, "models": models, **keys}, **options)


@pytest.mark.parametrize("rank", [1, 3, 5, 100])
def test_a_sum_is_the_nearest_of_its_rank(tmp_path, rank):
    adapters, weights = [both(1, 4, 2.0), both(2, 3, 3.0)], [0.8, -0.5]
    made = merged(tmp_path, *adapters, weights=weights, low_rank={"rank": rank})
    for module in (PLAIN, CONV):
        right = summed(*(w * product(each, module) for w, each in zip(weights, adapters, strict=True)))
        assert torch.allclose(product(made, module), nearest(right, rank), atol=1e-6)
        assert float(made[f"{module}.alpha"]) == made[f"{module}.lora_down.weight"].shape[0] == min(rank, 7)
    assert made[f"{CONV}.lora_up.weight"].shape[2:] == (1, 1)
    assert made[f"{CONV}.lora_down.weight"].shape[2:] == (3, 3)


def test_one_is_resized_with_a_core_too(tmp_path):
    one = lora(1, 6, 3.0, CONV)
    core = {f"{CONV}.lora_up.weight": numbers(14, 6, 1, 1), f"{CONV}.lora_down.weight": numbers(6, 11, 1, 1, seed=3)}
    tucker = {**one, **core, f"{CONV}.lora_mid.weight": numbers(6, 6, 3, 3, seed=4)}
    made = merged(tmp_path, tucker, low_rank={"rank": 4})
    assert torch.allclose(product(made, CONV), nearest(product(tucker, CONV), 4), atol=1e-6)
    assert f"{CONV}.lora_mid.weight" not in made


def test_kernels_may_have_another_rank(tmp_path):
    made = merged(tmp_path, both(1, 6, 3.0), low_rank={"rank": 5, "conv_rank": 2})
    assert [made[f"{module}.lora_down.weight"].shape[0] for module in (PLAIN, CONV)] == [5, 2]


@pytest.mark.parametrize(
    ("criterion", "value", "holds"),
    [
        ("energy", 0.8, lambda s, r: (s[:r] ** 2).sum() >= 0.8 * (s**2).sum()),
        ("sv_fro", 0.9, lambda s, r: np.sqrt((s[:r] ** 2).sum()) >= 0.9 * np.sqrt((s**2).sum())),
        ("sv_cumulative", 0.7, lambda s, r: s[:r].sum() >= 0.7 * s.sum()),
        ("sv_ratio", 3.0, lambda s, r: r == (s > s[0] / 3).sum()),
        ("sv_epsilon", 0.6, lambda s, r: r == (s > 0.6).sum()),
    ],
)
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_criterion_finds_the_least_rank(tmp_path, criterion, value, holds, method):
    one = both(1, 8, 4.0)
    made = merged(tmp_path, one, method=method, low_rank={criterion: value})
    for module in (PLAIN, CONV):
        values = np.linalg.svd(product(one, module).numpy(), compute_uv=False)
        rank = made[f"{module}.lora_down.weight"].shape[0]
        assert holds(values, rank)
        assert criterion in ("sv_ratio", "sv_epsilon") or not holds(values, rank - 1)
    capped = merged(tmp_path, one, method=method, low_rank={criterion: value, "rank": 2})
    assert capped[f"{PLAIN}.lora_down.weight"].shape[0] == 2


def test_other_methods_are_of_the_products(tmp_path):
    """TIES of the products as whole tensors, by the program itself; then numpy's decomposition."""
    adapters = [both(1, 4, 2.0), lora(2, 3, 3.0)]
    values = {"density": 0.4, "lambda": 1.5}
    made = merged(tmp_path, *adapters, method="ties", parameters=values, weights=[1.0, 0.6], low_rank={"rank": 6})
    for module in (PLAIN, CONV):
        known = [product(each, module) if f"{module}.alpha" in each else None for each in adapters]
        shape = next(each.shape for each in known if each is not None)
        models = {"base": torch.zeros(shape)}
        models |= {str(n): torch.zeros(shape) if each is None else each.float() for n, each in enumerate(known)}
        paths = {name: save_model(tmp_path / f"m{name}.safetensors", {"w": tensor}) for name, tensor in models.items()}
        recipe = {
            "merge_method": "ties",
            "base_model": str(paths["base"]),
            "models": [{"model": str(paths[n]), "parameters": {"weight": w}} for n, w in (("0", 1.0), ("1", 0.6))],
            "parameters": values,
        }
        right = merge_to(tmp_path / "whole.safetensors", recipe)["w"].double()
        assert torch.allclose(product(made, module), nearest(right, 6), atol=1e-6)


@pytest.mark.parametrize("method", ["dare_ties", "breadcrumbs", "model_stock", "truncate_rank", "karcher", "tsv_m"])
def test_any_method_may_merge_them(tmp_path, method):
    least, most = METHODS[method].models
    count = max(least, 1 if most == 1 else 2)
    made = merged(tmp_path, *(both(n, 4, 2.0) for n in range(count)), method=method, low_rank={"rank": 3})
    assert made[f"{PLAIN}.lora_down.weight"].shape == (3, 11)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in made.values())


# ── however it is run ────────────────────────────────────────────────────────────────────────────────────────────────


RECIPES = [
    {"merge_method": "linear", "low_rank": {"rank": 5}},
    {"merge_method": "dare_ties", "parameters": {"density": 0.5}, "low_rank": {"energy": 0.9}},
    {"merge_method": "ties", "parameters": {"density": 0.5}, "low_rank": {"rank": 4, "svd": "randomized"}},
    {"merge_method": "ties", "parameters": {"scope": "model"}, "low_rank": {"rank": 4, "clamp_quantile": 0.99}},
]


def many(folder: Path) -> list[str]:
    """Two adapters of a dozen modules."""
    found = []
    for number in range(2):
        adapter: Tensors = {}
        for n in range(6):
            adapter |= lora(n + 20 * number, 4, 2.0, f"lora_unet_down_{n}")
            adapter |= lora(n + 20 * number, 4, 2.0, f"lora_unet_up_{n}", kernel=3)
        found.append(str(save_model(folder / f"{number}.safetensors", adapter)))
    return found


@pytest.mark.parametrize("keys", RECIPES, ids=lambda keys: keys["merge_method"])
def test_the_bytes_are_the_same_however_it_is_run(tmp_path, keys):
    recipe = {**keys, "models": many(tmp_path)}
    first = merge_to(tmp_path / "a.safetensors", recipe, threads=1, verify=True)
    for options in ({"threads": 3}, {"io": "pread"}, {"io": "mmap"}, {"hash": True}):
        assert_same_bytes(merge_to(tmp_path / "b.safetensors", recipe, **options), first)


@pytest.mark.parametrize("keys", RECIPES[:2], ids=lambda keys: keys["merge_method"])
def test_a_stopped_one_goes_on_to_the_same_bytes(tmp_path, monkeypatch, keys):
    raw = {**keys, "models": many(tmp_path / "models")}
    right = whole(raw, tmp_path / "right")
    output = tmp_path / "new" / "out.safetensors"
    stop(monkeypatch, raw, output, after=9)
    report = run(raw, output, resume=True)
    assert report.resumed_bytes > 0
    assert digests(tmp_path / "new") == right
    assert 0 < report.factored["known"] < len(report.factored["modules"])


def test_both_factors_are_of_one_decomposition(tmp_path, monkeypatch):
    calls, compute = [], WholeMethod.compute

    def counting(self, *arguments):
        calls.append(self.name)
        return compute(self, *arguments)

    monkeypatch.setattr(WholeMethod, "compute", counting)
    merge_to(tmp_path / "a.safetensors", {**RECIPES[0], "models": many(tmp_path)})
    assert calls == ["factors of products"] * 12


def test_a_recorded_recipe_is_verified(tmp_path, capsys):
    one = save_model(tmp_path / "one.safetensors", both(1, 6, 3.0))
    out = tmp_path / "out.safetensors"
    assert main([str(one), "--energy", "0.9", "-o", str(out), "-q"]) == 0
    with safe_open(out, "pt") as opened:
        assert json.loads(opened.metadata()["streammerge.recipe"])["low_rank"] == {"energy": 0.9}
    assert main(["verify", str(out), "--all"]) == 0
    assert "Every byte is what the recipe gives" in capsys.readouterr().out


def test_the_error_is_told(tmp_path):
    adapters = [both(1, 4, 2.0), both(2, 3, 3.0)]
    names = [str(save_model(tmp_path / f"{n}.safetensors", each)) for n, each in enumerate(adapters)]
    recipe = {"merge_method": "linear", "models": names, "low_rank": {"rank": 3}}
    report = streammerge.merge(recipe, output=tmp_path / "out.safetensors", sync=False)
    made, told = load_model(tmp_path / "out.safetensors"), report.to_json()["factored"]
    rights = {module: summed(*(product(each, module) for each in adapters)) for module in (PLAIN, CONV)}
    errors = {module: float((right - product(made, module)).norm() / right.norm()) for module, right in rights.items()}
    assert {each["module"]: each["error"] for each in told["modules"]} == pytest.approx(errors, rel=1e-5)
    squares = sum(float((right - product(made, module)).square().sum()) for module, right in rights.items())
    length = sum(float(right.square().sum()) for right in rights.values())
    assert told["error"] == pytest.approx((squares / length) ** 0.5, rel=1e-5)
    assert dict(report.rows())["factors"].startswith(f"relative error {told['error']:.3g} in 2 of 2 modules")


def test_kohyas_metadata_say_the_new_rank(tmp_path):
    one = save_model(tmp_path / "one.safetensors", both(1, 6, 3.0), {"ss_network_dim": "6", "ss_network_alpha": "3"})
    assert main([str(one), "--rank", "4", "-o", str(tmp_path / "out.safetensors"), "-q"]) == 0
    with safe_open(tmp_path / "out.safetensors", "pt") as opened:
        found = opened.metadata()
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("4", "4")


def test_what_diffusers_says_of_the_old_scale_is_gone(tmp_path):
    """Its files have α and r in their metadata, and no tensor for them."""
    module = "unet.mid.x"
    one = {f"{module}.lora_A.weight": numbers(6, 11), f"{module}.lora_B.weight": numbers(14, 6, seed=2)}
    said = {"lora_adapter_metadata": json.dumps({"unet.r": 6, "unet.lora_alpha": 12})}
    path = save_model(tmp_path / "one.safetensors", one, said)
    assert main([str(path), "--rank", "4", "-o", str(tmp_path / "out.safetensors"), "-q"]) == 0
    with safe_open(tmp_path / "out.safetensors", "pt") as opened:
        assert "lora_adapter_metadata" not in opened.metadata()
    made = load_model(tmp_path / "out.safetensors")
    assert made.keys() == one.keys()
    up, down = (made[f"{module}.lora_{part}.weight"].double() for part in "BA")
    right = 2 * one[f"{module}.lora_B.weight"].double() @ one[f"{module}.lora_A.weight"].double()
    assert torch.allclose(up @ down, nearest(right, 4), atol=1e-6)


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────

QKV, APART = "lora_unet_double_blocks_0_img_attn_qkv", "transformer.transformer_blocks.0.attn.to_"


def in_parts(rank: int = 2) -> Tensors:
    """A LoRA of Flux in diffusers' names: queries, keys and values are modules of their own."""
    found: Tensors = {}
    for number, part in enumerate("qkv"):
        found[f"{APART}{part}.lora_A.weight"] = numbers(rank, 5, seed=number)
        found[f"{APART}{part}.lora_B.weight"] = numbers(4, rank, seed=number + 9)
    return found


def below(adapter: Tensors) -> torch.Tensor:
    """Δ of queries, keys and values, one below the other."""
    up, down = ([adapter[f"{APART}{part}.lora_{side}.weight"].double() for part in "qkv"] for side in "BA")
    return torch.cat([b @ a for b, a in zip(up, down, strict=True)])


@pytest.mark.parametrize("method", ["linear", "ties", "max"])
def test_several_dialects(tmp_path, method):
    one = parts(QKV, lora_up__weight=numbers(12, 3, seed=30), lora_down__weight=numbers(3, 5, seed=31), alpha=6.0)
    two = in_parts()
    made = merged(tmp_path, one, two, method=method, low_rank={"rank": 4})
    whole = below(two)
    alike = parts(QKV, lora_up__weight=whole.float(), lora_down__weight=torch.eye(5), alpha=5.0)
    right = merged(tmp_path, one, alike, method=method, low_rank={"rank": 4})
    assert made.keys() == one.keys()
    assert torch.allclose(product(made, QKV), product(right, QKV), atol=1e-5)
    if method == "linear":
        assert torch.allclose(product(made, QKV), nearest(summed(product(one, QKV), whole), 4), atol=1e-5)


@pytest.mark.parametrize(
    ("names", "module", "factors"),
    [
        ("kohya", "lora_unet_blocks_0_self_attn_q", "lora_up lora_down"),
        ("comfy", "diffusion_model.blocks.0.self_attn.q", "lora_up lora_down"),
        ("peft", "base_model.model.blocks.0.self_attn.q", "lora_B lora_A"),
    ],
)
def test_other_names_of_a_rank(tmp_path, names, module, factors):
    one = lora(1, 6, 3.0, "lora_unet_blocks_0_self_attn_q")
    path = save_model(tmp_path / "one.safetensors", one)
    out = tmp_path / ("out" if names == "peft" else "out.safetensors")
    assert main([str(path), "--rank", "4", "--names", names, "-o", str(out), "-q"]) == 0
    made = load_model(out)
    up, down = (made[f"{module}.{each}.weight"].double() for each in factors.split())
    assert torch.allclose(up @ down, nearest(product(one, "lora_unet_blocks_0_self_attn_q"), 4), atol=1e-6)
    assert (f"{module}.alpha" in made) is (names != "peft")
    assert main(["verify", str(out), f"one={path}", "--all"]) == 0


def test_rows_of_a_module_are_of_loras(tmp_path):
    one = parts(QKV, lora_up__weight=numbers(12, 3, seed=30), lora_down__weight=numbers(3, 5, seed=31))
    two = {f"{APART}{part}.diff": numbers(4, 5) for part in "qkv"}
    with pytest.raises(PlanError, match="only LoRAs may be"):
        merged(tmp_path, one, two, low_rank={"rank": 4})
    short = {**in_parts(), f"{APART}v.lora_B.weight": numbers(3, 2)}
    with pytest.raises(PlanError, match="12 rows in one adapter"):
        merged(tmp_path, one, short, low_rank={"rank": 4})


def test_names_that_adapters_do_not_have(tmp_path):
    path = save_model(tmp_path / "a.safetensors", both(1, 4, 2.0))
    with pytest.raises(PlanError, match="adapters have no original names"):
        merge_to(
            tmp_path / "out.safetensors",
            {"merge_method": "linear", "models": [str(path)], "low_rank": {"rank": 2}},
            names="original",
        )


# ── PEFT's folders ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_of_pefts_has_a_config_of_the_new_ranks(tmp_path):
    one = {"x.lora_A.weight": numbers(4, 11), "x.lora_B.weight": numbers(14, 4), "e.lora_embedding_A": numbers(4, 20)}
    one |= {"e.lora_embedding_B": numbers(6, 4, seed=3)}
    (tmp_path / "one").mkdir()
    folder = peft_folder(tmp_path / "one", one, r=4, lora_alpha=8, target_modules=["x", "e"], task_type="CAUSAL_LM")
    recipe = {"merge_method": "linear", "models": [str(folder)], "low_rank": {"rank": 2}}
    streammerge.merge(recipe, output=tmp_path / "out", sync=False)
    made = load_model(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (2, 2, "CAUSAL_LM")
    up, down = (made[f"base_model.model.x.lora_{part}.weight"].double() for part in "BA")
    right = 2 * one["x.lora_B.weight"].double() @ one["x.lora_A.weight"].double()
    assert torch.allclose(up @ down, nearest(right, 2), atol=1e-6)
    up, down = (made[f"base_model.model.e.lora_embedding_{part}"].double() for part in "BA")
    right = 2 * one["e.lora_embedding_B"].double() @ one["e.lora_embedding_A"].double()
    assert torch.allclose(up @ down, nearest(right, 2), atol=1e-6)
    with pytest.raises(MergeError, match=r"folders"):
        streammerge.merge(recipe, output=tmp_path / "out.safetensors", sync=False)


def test_what_was_a_loha_is_a_lora_by_its_config(tmp_path):
    hada = {f"x.hada_{part}": numbers(*((8, 4) if part[-1] == "a" else (4, 6))) for part in HADA}
    (tmp_path / "one").mkdir()
    folder = peft_folder(tmp_path / "one", hada, peft_type="LOHA", r=4, alpha=8, module_dropout=0.1)
    recipe = {"merge_method": "linear", "models": [str(folder)], "low_rank": {"rank": 2}}
    streammerge.merge(recipe, output=tmp_path / "out", sync=False)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["lora_alpha"], "module_dropout" in config) == ("LORA", 2, False)
    assert load_model(tmp_path / "out").keys() == {f"base_model.model.x.lora_{part}.weight" for part in "AB"}


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("low_rank", "words"),
    [
        ({}, "says no rank"),
        ({"rank": 0}, "whole number of at least 1"),
        ({"rank": 2.5}, "whole number"),
        ({"rank": "many"}, "decimal number"),
        ({"energy": 1.5}, "above 0 and no greater than 1"),
        ({"energy": True}, "expected a number"),
        ({"energy": 0.5, "sv_fro": 0.5}, "one of energy"),
        ({"rnk": 3}, "Did you mean 'rank'"),
        ({"rank": 3, "svd": "fast"}, "one of auto, exact, randomized"),
        ([3], "expected a map"),
    ],
)
def test_a_key_that_is_not_understood_is_refused(tmp_path, low_rank, words):
    with pytest.raises(RecipeError) as caught:
        merged(tmp_path, both(1, 4, 2.0), low_rank=low_rank)
    assert words in str(caught.value)


def test_without_a_rank_other_methods_say_what_they_need(tmp_path):
    with pytest.raises(PlanError, match="factors of changes") as caught:
        merged(tmp_path, both(1, 4, 2.0), both(2, 4, 2.0), method="slerp")
    assert "--rank 32" in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (parts(PLAIN, lora_A__weight=numbers(3, 9), lora_B__weight=numbers(14, 3)), r"\[14, 11\].*\[14, 9\]"),
        (lora(2, 3, 3.0, dora_scale=torch.ones(14, 1)), "DoRA, which depends on the weight"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, second, words):
    with pytest.raises(PlanError, match=f"(?s){words}"):
        merged(tmp_path, both(1, 4, 2.0), second, low_rank={"rank": 3})


@pytest.mark.parametrize("broken", [{"lora_down": numbers(3, 9)}, {}])
def test_half_an_adapter_is_named(tmp_path, broken):
    parts_of = {"lora_up": numbers(14, 4), **broken}
    half = {f"{PLAIN}.{name}.weight": tensor for name, tensor in parts_of.items()}
    with pytest.raises(MergeError, match=PLAIN):
        merged(tmp_path, half, low_rank={"rank": 3})


@pytest.mark.parametrize("kind", ["loha", "lokr", "diff"])
def test_other_kinds_become_factors(tmp_path, kind):
    kinds = {
        "loha": {
            f"hada_{part}": numbers(*((8, 4) if part[-1] == "a" else (4, 6)), seed=n) for n, part in enumerate(HADA)
        },
        "lokr": {"lokr_w1": numbers(2, 2), "lokr_w2": numbers(4, 3, seed=2)},
        "diff": {"diff": numbers(8, 6)},
    }
    made = merged(tmp_path, {f"{PLAIN}.{name}": tensor for name, tensor in kinds[kind].items()}, low_rank={"rank": 2})
    own = kinds[kind]
    right = {
        "loha": lambda: (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"]),
        "lokr": lambda: torch.kron(own["lokr_w1"], own["lokr_w2"]),
        "diff": lambda: own["diff"],
    }[kind]()
    assert torch.allclose(product(made, PLAIN), nearest(right.double(), 2), atol=1e-6)


def test_what_is_no_number_is_refused_before_anything_is_written(tmp_path):
    bad = both(1, 4, 2.0)
    bad[f"{PLAIN}.lora_up.weight"][3, 2] = float("nan")
    for low_rank in ({"rank": 2}, {"energy": 0.5}):
        with pytest.raises(MergeError, match="infinite values or NaNs"):
            merged(tmp_path, bad, low_rank=low_rank)
        assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    "keys", [{"base_model": "lora0"}, {"only": "unet"}, {"prune": True}, {"rules": [{"match": "*", "drop": True}]}]
)
def test_what_has_no_meaning_is_refused(tmp_path, keys):
    with pytest.raises(MergeError):
        merged(tmp_path, both(1, 4, 2.0), both(2, 4, 2.0), low_rank={"rank": 2}, **keys)


def test_what_both_factors_are_parts_of_is_let_go_when_they_are_written(tmp_path, monkeypatch):
    """Not when somebody looks for garbage: till then every module's factors would be there in float64."""
    modules = [f"lora_unet_mid_block_{n}" for n in range(8)]
    adapters = [{name: value for m in modules for name, value in lora(seed, 3, 1.0, m).items()} for seed in (1, 2)]
    surveys: list[weakref.ref[Survey]] = []
    begin = Survey.__init__

    def noted(self: Survey, *given: Any, **named: Any) -> None:
        surveys.append(weakref.ref(self))
        begin(self, *given, **named)

    monkeypatch.setattr(Survey, "__init__", noted)
    gc.disable()
    try:
        merged(tmp_path, *adapters, low_rank={"rank": 2}, verify=False)
        assert len(surveys) >= len(modules)
        assert [survey for survey in surveys if survey() is not None] == []
    finally:
        gc.enable()
