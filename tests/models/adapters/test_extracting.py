"""The difference of two models as an adapter: baked into the base it is the tuned model, at a rank the nearest one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import streammerge
from streammerge.cli.main import main
from streammerge.compute.machine import MIB
from streammerge.errors import MergeError, PlanError
from streammerge.models.adapters.dialects import DIALECTS
from streammerge.tools.demo.files import make_models
from tests.make.models import Shapes, Tensors, assert_same_bytes, load_model, make_tensors, near, normal, save_model
from tests.models.adapters.baking import numbers

SHAPES = {
    "blocks.0.attn.weight": (24, 16),
    "blocks.0.attn.bias": (24,),
    "blocks.0.conv.weight": (8, 6, 3, 3),
    "blocks.0.point.weight": (8, 6, 1, 1),
    "blocks.1.wide.weight": (5, 40),
    "blocks.1.norm.weight": (16,),
}


def models(
    folder: Path, dtype: torch.dtype = torch.float32, shapes: Shapes = SHAPES, noise: float = 0.1
) -> tuple[Tensors, Tensors]:
    """A base and what was trained of it, each saved by its name."""
    base = make_tensors(0, dtype, shapes)
    tuned = near(base, 5, noise)
    save_model(folder / "base.safetensors", base)
    save_model(folder / "tuned.safetensors", tuned)
    return base, tuned


def extract(folder: Path, *words: str, out: str = "adapter.safetensors") -> Path:
    given = [str(folder / "tuned.safetensors"), str(folder / "base.safetensors")]
    assert main(["extract", *given, "-o", str(folder / out), "--force", "-q", *words]) == 0
    return folder / out


def baked(folder: Path, adapter: Path, base: str = "base.safetensors") -> Tensors:
    out = folder / "baked.safetensors"
    assert main(["bake", str(folder / base), str(adapter), "-o", str(out), "--force", "-q"]) == 0
    return load_model(out)


def nearest(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    left, values, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    return torch.from_numpy(left[:, :rank] * values[:rank] @ right[:rank])


@pytest.mark.parametrize("names", ["kohya", "comfy"])
def test_at_full_rank_it_is_the_tuned_model(tmp_path, names):
    _, tuned = models(tmp_path)
    made = baked(tmp_path, extract(tmp_path, "--rank", "1000", "--biases", "--names", names))
    for name, tensor in tuned.items():
        assert torch.allclose(made[name], tensor, atol=1e-6), name


@pytest.mark.parametrize("rank", [1, 4])
def test_at_a_rank_the_error_is_that_of_the_svd(tmp_path, rank):
    base, tuned = models(tmp_path)
    made = baked(tmp_path, extract(tmp_path, "--rank", str(rank)))
    for name, tensor in tuned.items():
        if tensor.ndim > 1:
            difference = (tensor.double() - base[name].double()).flatten(1)
            expected = base[name].double().flatten(1) + nearest(difference, rank)
            assert torch.allclose(made[name].double().flatten(1), expected, atol=2e-6), name
        else:
            assert torch.equal(made[name], base[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_too(tmp_path, dtype):
    _, tuned = models(tmp_path, dtype)
    made = baked(tmp_path, extract(tmp_path, "--rank", "1000", "--biases", "--dtype", "fp32"))
    assert_same_bytes(made, tuned)


def test_kernels_have_a_rank_of_their_own_or_are_left_out(tmp_path):
    models(tmp_path)
    found = load_model(extract(tmp_path, "--rank", "4", "--conv-rank", "2", "--names", "comfy"))
    ranks = {name.split(".lora")[0]: tensor.shape[0] for name, tensor in found.items() if "lora_down" in name}
    assert ranks["diffusion_model.blocks.0.conv"] == 2
    assert ranks["diffusion_model.blocks.0.point"] == ranks["diffusion_model.blocks.0.attn"] == 4
    left = load_model(extract(tmp_path, "--rank", "4", "--conv-rank", "0", "--names", "comfy"))
    assert not any("conv" in name for name in left)


def test_what_does_not_differ_is_left_out(tmp_path, capsys):
    base, tuned = models(tmp_path)
    name = "blocks.1.wide.weight"
    tuned[name] = base[name] + 0.001
    save_model(tmp_path / "tuned.safetensors", {**tuned, "blocks.0.attn.weight": base["blocks.0.attn.weight"]})
    found = load_model(extract(tmp_path, "--rank", "4", "--names", "comfy"))
    assert not any("attn" in name for name in found)
    assert any("wide" in name for name in found)
    found = load_model(extract(tmp_path, "--rank", "4", "--names", "comfy", "--min-diff", "0.01"))
    assert not any("wide" in name for name in found)
    given = [str(tmp_path / "tuned.safetensors"), str(tmp_path / "base.safetensors"), "--rank", "4"]
    assert main(["extract", *given, "-o", str(tmp_path / "new.safetensors")]) == 0
    told = capsys.readouterr().err
    assert "1 tensor does not differ, and is left out: diffusion_model.blocks.0.attn.weight" in told
    assert "2 tensors differ, and are not in the adapter (biases, norms and other vectors: --biases)" in told


def test_names_with_blanks_scalars_and_empty_tensors(tmp_path):
    shapes = {"a b.weight": (20, 12), "none.weight": (0, 5), "scale.weight": (), "c.weight": (6, 4, 3), "bare": (5, 5)}
    _, tuned = models(tmp_path, shapes=shapes)
    adapter = extract(tmp_path, "--rank", "1000", "--biases", "--names", "comfy")
    assert load_model(adapter)["diffusion_model.c.lora_up.weight"].shape == (6, 6, 1)
    made = baked(tmp_path, adapter)
    assert all(torch.allclose(made[name], tensor, atol=1e-6) for name, tensor in tuned.items() if name != "bare")


def test_codes_are_decoded(tmp_path):
    """Weights of 8 bits, whose factors are float16."""
    base, tuned = models(tmp_path, shapes={"w.weight": (20, 12)}, noise=1.0)
    for name, tensors in (("base", base), ("tuned", tuned)):
        save_model(tmp_path / f"{name}.safetensors", {"w.weight": tensors["w.weight"].to(torch.float8_e4m3fn)})
    found = load_model(extract(tmp_path, "--rank", "12", "--names", "comfy"))
    up, down = (found[f"diffusion_model.w.lora_{part}.weight"] for part in ("up", "down"))
    assert up.dtype == torch.float16
    right = [tensors["w.weight"].to(torch.float8_e4m3fn).double() for tensors in (tuned, base)]
    assert torch.allclose(up.double() @ down.double(), right[0] - right[1], atol=1e-2)


def test_shards_hold_factors_apart(tmp_path):
    _, tuned = models(tmp_path)
    adapter = extract(tmp_path, "--rank", "1000", "--names", "comfy", "--shard-size", "300", out="shards")
    assert len(list(adapter.glob("*.safetensors"))) > 3
    whole = load_model(extract(tmp_path, "--rank", "1000", "--names", "comfy"))
    assert_same_bytes(load_model(adapter), whole)
    assert set(tuned) > {"blocks.0.attn.weight"}


def test_identical_models_have_no_difference(tmp_path, capsys):
    base, _ = models(tmp_path)
    save_model(tmp_path / "tuned.safetensors", base)
    words = [str(tmp_path / "tuned.safetensors"), str(tmp_path / "base.safetensors"), "--rank", "4"]
    assert main(["extract", *words, "-o", str(tmp_path / "out.safetensors")]) == 1
    assert "nothing is left to be written" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_what_the_report_says_is_true(tmp_path):
    base, tuned = models(tmp_path)
    extract(tmp_path, "--energy", "0.7", "--names", "comfy", "--dtype", "fp32", "--report", str(tmp_path / "r.json"))
    told = json.loads((tmp_path / "r.json").read_text())["factored"]
    assert len(told["modules"]) == 4
    for each in told["modules"]:
        name = each["module"].removeprefix("diffusion_model.")
        values = np.linalg.svd((tuned[name].double() - base[name].double()).flatten(1).numpy(), compute_uv=False)
        shares = np.cumsum(values**2) / (values**2).sum()
        assert each["energy"] == pytest.approx(shares[each["rank"] - 1], rel=1e-5)
        assert each["energy"] >= 0.7
        assert each["rank"] == 1 or shares[each["rank"] - 2] < 0.7


@pytest.mark.parametrize("scale", [3e-8, 1e5])
def test_float16_holds_factors_of_small_and_of_large_differences(tmp_path, scale):
    """U S of the one would be lost below float16's least number, of the other beyond its greatest."""
    base = {"w.weight": torch.zeros(60, 40)}
    tuned = {"w.weight": numbers(60, 4, seed=1) @ numbers(4, 40, seed=2) * scale}
    save_model(tmp_path / "base.safetensors", base)
    save_model(tmp_path / "tuned.safetensors", tuned)
    found = load_model(extract(tmp_path, "--rank", "4", "--dtype", "fp16", "--names", "comfy"))
    up, down = (found[f"diffusion_model.w.lora_{part}.weight"] for part in ("up", "down"))
    error = up.double() @ down.double() - tuned["w.weight"].double()
    assert float(error.norm() / tuned["w.weight"].double().norm()) < 1e-3
    sides = up.double().norm(dim=0) / down.double().norm(dim=1)
    assert all(0.5 <= float(each) < 2 for each in sides)


@pytest.mark.parametrize("quantile", ["0.95", "0.8"])
@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
def test_what_is_clamped_counts_in_the_report(tmp_path, quantile, shape):
    base, tuned = models(tmp_path, shapes={"w.weight": shape})
    report = tmp_path / "r.json"
    words = ["--rank", "5", "--clamp-quantile", quantile, "--names", "comfy", "--report", str(report)]
    found = load_model(extract(tmp_path, *words))
    up, down = (found[f"diffusion_model.w.lora_{part}.weight"].double() for part in ("up", "down"))
    right = tuned["w.weight"].double() - base["w.weight"].double()
    error = float((up @ down - right).norm() / right.norm())
    [told] = json.loads(report.read_text())["factored"]["modules"]
    assert told["error"] == pytest.approx(error, rel=1e-4)
    assert told["energy"] == pytest.approx(1 - error**2, rel=1e-3)
    assert told["norm"] == pytest.approx(float(right.norm()), rel=1e-5)


@pytest.mark.parametrize(("share", "is_written"), [(1.01, False), (0.99, True)])
def test_the_least_difference_is_that_of_elements_of_adapters_too(tmp_path, share, is_written):
    """What a LoRA in a model adds is never made where it is decomposed; its greatest element is."""
    save_model(tmp_path / "base.safetensors", {"blocks.0.w.weight": numbers(600, 1200)})
    up, down = numbers(600, 2, seed=1), numbers(2, 1200, seed=2)
    lora = {f"lora_unet_blocks_0_w.lora_{part}.weight": tensor for part, tensor in (("up", up), ("down", down))}
    save_model(tmp_path / "lora.safetensors", lora)
    base = str(tmp_path / "base.safetensors")
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "models": [{"model": base, "name": "tuned", "adapters": [{"adapter": str(tmp_path / "lora.safetensors")}]}],
        "low_rank": {"rank": 4, "min_diff": float((up @ down).abs().max()) * share},
    }
    out = tmp_path / "out.safetensors"
    if is_written:
        streammerge.merge(recipe, output=out, sync=False)
        assert out.exists()
    else:
        with pytest.raises(PlanError, match="no difference is larger than"):
            streammerge.merge(recipe, output=out, sync=False)


def test_a_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    models(tmp_path)
    extract(tmp_path, "--rank", "3", "--plot", str(tmp_path / "kept.png"))
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_stable_diffusion_has_kohyas_names(tmp_path):
    """Of the demo's Stable Diffusion 2, whose text encoder has queries, keys and values in one tensor."""
    base = load_model(make_models(tmp_path).base)
    tuned = {
        name: tensor if name.startswith("first_stage") else near({name: tensor}, number, 0.05)[name]
        for number, (name, tensor) in enumerate(base.items())
    }
    save_model(tmp_path / "base.safetensors", base)
    save_model(tmp_path / "tuned.safetensors", tuned)
    adapter = extract(tmp_path, "--rank", "1000", "--biases", "--dtype", "fp32")
    found = load_model(adapter)
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight" in found
    assert "lora_te_text_model_encoder_layers_0_self_attn_k_proj.lora_down.weight" in found
    assert not any("vae" in name or "first_stage" in name for name in found)
    made = baked(tmp_path, adapter)
    left = [name for name, tensor in tuned.items() if not torch.equal(made[name], tensor)]
    assert all(name.startswith("cond_stage_model") and re.search("embedding|logit_scale", name) for name in left)
    assert len(left) == 3


@pytest.mark.parametrize(
    ("names", "ranks"),
    [
        ("kohya", {"ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "2"}),
        ("comfy", {}),
    ],
)
def test_metadata_say_what_it_is_and_for_what(tmp_path, names, ranks):
    base, said = make_tensors(0, torch.float32, SHAPES), {"modelspec.architecture": "stable-diffusion-v1"}
    save_model(tmp_path / "base.safetensors", base, said)
    save_model(tmp_path / "tuned.safetensors", near(base, 1, 0.1), said)
    with safe_open(extract(tmp_path, "--rank", "2", "--names", names), "pt") as file:
        found = file.metadata()
    assert found["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert {key: text for key, text in found.items() if key.startswith("ss_")} == ranks


def test_stable_diffusion_xl_and_flux_have_the_originals_names(tmp_path):
    flux = {
        "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (48, 16),
        "model.diffusion_model.single_blocks.0.linear1.weight": (112, 16),
        "model.diffusion_model.img_in.weight": (16, 64),
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (32, 16),
    }
    _, tuned = models(tmp_path, shapes=flux)
    found = load_model(extract(tmp_path, "--rank", "1000", "--names", "comfy"))
    stems = {name.split(".lora")[0] for name in found if ".lora" in name}
    assert stems == {name.removeprefix("model.").removesuffix(".weight") for name in flux}
    kohya = extract(tmp_path, "--rank", "1000", "--names", "kohya")
    assert any(name.startswith("lora_unet_double_blocks_0_img_attn_qkv.") for name in load_model(kohya))
    made = baked(tmp_path, kohya)
    assert all(torch.allclose(made[name], tensor, atol=2e-6) for name, tensor in tuned.items())
    for names in ("comfy", "diffusers"):
        made = baked(tmp_path, extract(tmp_path, "--rank", "1000", "--names", names))
        assert all(torch.allclose(made[name], tensor, atol=2e-6) for name, tensor in tuned.items())


LLAMA = {
    "model.embed_tokens.weight": (40, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.mlp.down_proj.weight": (16, 32),
    "model.layers.0.input_layernorm.weight": (16,),
}


def folder_of(path: Path, tensors: Tensors, **config: Any) -> Path:
    save_model(path / "model.safetensors", tensors)
    known = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **config}
    (path / "config.json").write_text(json.dumps(known))
    return path


def test_language_models_have_folders_of_pefts(tmp_path):
    base = make_tensors(0, torch.float32, {**LLAMA, "lm_head.weight": (40, 16)})
    tuned = near(base, 5, 0.1)
    one, other = folder_of(tmp_path / "tuned", tuned), folder_of(tmp_path / "base", base)
    assert main(["extract", str(one), str(other), "-o", str(tmp_path / "adapter"), "--rank", "1000", "-q"]) == 0
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md"),
    }
    card = (tmp_path / "adapter/README.md").read_text()
    assert "base_model:\n- base\nbase_model_relation: adapter\nlibrary_name: peft\n" in card
    assert "# A LoRA of tuned and base\n" in card
    found = load_model(tmp_path / "adapter")
    assert found["base_model.model.model.embed_tokens.lora_embedding_A"].shape == (16, 40)
    assert main(["bake", str(other), str(tmp_path / "adapter"), "-o", str(tmp_path / "baked"), "-q"]) == 0
    made = load_model(tmp_path / "baked")
    for name, tensor in tuned.items():
        assert torch.allclose(made[name], tensor if tensor.ndim > 1 else base[name], atol=1e-6)


@pytest.mark.parametrize(
    ("where", "config", "said"),
    [
        ("base", {}, (None, None, "CAUSAL_LM")),
        ("models--me--llama/snapshots/abc", {}, ("me/llama", "abc", "CAUSAL_LM")),
        (
            "base",
            {"_name_or_path": "me/llama", "architectures": ["LlamaForTokenClassification"]},
            ("me/llama", None, "TOKEN_CLS"),
        ),
        ("base", {"_name_or_path": "/home/me/llama", "architectures": ["LlamaModel"]}, (None, None, None)),
        (
            "base",
            {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
            (None, None, "SEQ_2_SEQ_LM"),
        ),
    ],
)
def test_pefts_config_says_what_is_known_of_the_base(tmp_path, where, config, said):
    """A path is not: it is of this machine."""
    base = make_tensors(0, torch.float32, {**LLAMA, "lm_head.weight": (40, 16)})
    tuned, other = folder_of(tmp_path / "tuned", near(base, 5, 0.1)), folder_of(tmp_path / where, base, **config)
    words = ["extract", str(tuned), str(other), "-o", str(tmp_path / "adapter"), "--rank", "2", "--names", "peft", "-q"]
    assert main(words) == 0
    found = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    keys = ("base_model_name_or_path", "revision", "task_type")
    assert tuple(found.get(key) for key in keys) == said


def test_a_head_that_is_tied_is_the_embedding(tmp_path, capsys):
    base = make_tensors(0, torch.float32, LLAMA)
    tuned = near(base, 5, 0.1)
    one = folder_of(tmp_path / "tuned", tuned, tie_word_embeddings=True)
    other = folder_of(tmp_path / "base", base, tie_word_embeddings=True)
    assert main(["extract", str(one), str(other), "-o", str(tmp_path / "adapter"), "--rank", "8", "-q"]) == 0
    assert not any("lm_head" in name for name in load_model(tmp_path / "adapter"))
    untied = folder_of(tmp_path / "untied", {**tuned, "lm_head.weight": normal((40, 16), 3)})
    assert main(["extract", str(untied), str(other), "-o", str(tmp_path / "other"), "--rank", "8"]) == 0
    assert any("lm_head" in name for name in load_model(tmp_path / "other"))
    assert "ties its output to its input" in capsys.readouterr().err


@pytest.mark.parametrize("names", DIALECTS)
def test_patches_are_made_by_a_convolution_whatever_it_is_called(tmp_path, names):
    shapes = {"patch_embedding.weight": (8, 4, 1, 2, 2), "blocks.0.self_attn.q.weight": (8, 8)}
    shapes |= {"blocks.0.cross_attn.q.weight": (8, 8), "head.modulation": (1, 2, 8), "head.head.weight": (8, 8)}
    _, tuned = models(tmp_path, shapes=shapes)
    out = "adapter" if names == "peft" else "adapter.safetensors"
    made = baked(tmp_path, extract(tmp_path, "--rank", "1000", "--names", names, out=out))
    assert torch.allclose(made["patch_embedding.weight"], tuned["patch_embedding.weight"], atol=1e-6)


def test_gpt2s_weights_lie_transposed(tmp_path):
    shapes = {"wte.weight": (40, 16), "h.0.attn.c_attn.weight": (16, 48), "h.0.attn.c_proj.weight": (16, 16)}
    base = make_tensors(0, torch.float32, shapes)
    tuned = near(base, 5, 0.1)
    save_model(tmp_path / "base.safetensors", base)
    save_model(tmp_path / "tuned.safetensors", tuned)
    adapter = extract(tmp_path, "--rank", "1000", "--names", "peft", out="adapter")
    assert json.loads((adapter / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    assert load_model(adapter)["base_model.model.h.0.attn.c_attn.lora_A.weight"].shape == (16, 16)
    made = baked(tmp_path, adapter)
    assert all(torch.allclose(made[name], tensor, atol=1e-6) for name, tensor in tuned.items())


# ── what else may be met ─────────────────────────────────────────────────────────────────────────────────────────────


def test_other_shapes_missing_tensors_and_integers(tmp_path, capsys):
    base, tuned = models(tmp_path)
    save_model(tmp_path / "tuned.safetensors", {**tuned, "blocks.1.wide.weight": numbers(6, 40)})
    words = [str(tmp_path / "tuned.safetensors"), str(tmp_path / "base.safetensors"), "--rank", "4", "-q"]
    out = ["-o", str(tmp_path / "out.safetensors")]
    assert main(["extract", *words, *out]) == 1
    assert "blocks.1.wide.weight" in capsys.readouterr().err
    assert main(["extract", *words, *out, "--on-shape-mismatch", "keep"]) == 0
    assert not any("wide" in name for name in load_model(tmp_path / "out.safetensors"))
    positions = {"positions": torch.arange(77)}
    save_model(tmp_path / "base.safetensors", {**base, **positions})
    save_model(tmp_path / "tuned.safetensors", {**tuned, "positions": positions["positions"] + 1})
    assert main(["extract", *words[:-1], *out, "--force"]) == 0
    assert "1 tensor is not looked at, and not in the adapter (copied: from base: I64" in capsys.readouterr().err
    del tuned["blocks.1.wide.weight"]
    save_model(tmp_path / "tuned.safetensors", tuned)
    assert main(["extract", *words, *out, "--force"]) == 1
    assert "blocks.1.wide.weight" in capsys.readouterr().err


@pytest.mark.parametrize("words", [(), ("--names", "peft"), ("--energy", "0.9", "--biases", "--names", "comfy")])
def test_a_recorded_extraction_is_verified_and_made_again(tmp_path, capsys, words):
    models(tmp_path)
    end = "" if "peft" in words else ".safetensors"
    adapter = extract(tmp_path, "--rank", "3", *words, out=f"adapter{end}")
    assert main(["verify", str(adapter), "--all"]) == 0
    assert "Every byte is what the recipe gives" in capsys.readouterr().out
    again = tmp_path / f"again{end}"
    assert main([str(adapter), "--recipe-from-metadata", "-o", str(again), "-q"]) == 0
    assert_same_bytes(load_model(again), load_model(adapter))


def test_what_is_no_number_is_named_before_anything_is_written(tmp_path, capsys):
    _, tuned = models(tmp_path)
    tuned["blocks.0.attn.weight"][3, 2] = float("nan")
    save_model(tmp_path / "tuned.safetensors", tuned)
    words = [str(tmp_path / "tuned.safetensors"), str(tmp_path / "base.safetensors"), "--rank", "4", "-q"]
    assert main(["extract", *words, "-o", str(tmp_path / "out.safetensors")]) == 1
    said = capsys.readouterr().err
    assert "infinite values or NaNs" in said
    assert "blocks_0_attn" in said or "blocks.0.attn" in said
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["one"], "takes a model and its base"),
        (["base.safetensors", "base.safetensors", "--rank", "4"], "does not differ from itself"),
        (["base.safetensors", "link.safetensors", "--rank", "4"], "does not differ from itself"),
        (["tuned.safetensors", "base.safetensors", "--rank", "4", "--dtype", "fp8_e4m3"], "not stored as float8"),
        (["tuned.safetensors", "base.safetensors", "--rank", "4", "--drop", "*"], "nothing of which an adapter"),
        (["tuned.safetensors:0.5", "base.safetensors", "--rank", "4"], "have no weights"),
        (["tuned.safetensors", "base.safetensors"], "says no rank"),
        (["tuned.safetensors", "base.safetensors", "--rank", "4", "--names", "peft"], "folders"),
    ],
)
def test_what_is_asked_wrongly_is_told(tmp_path, monkeypatch, capsys, words, said):
    models(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("link.safetensors").symlink_to("base.safetensors")
    assert main(["extract", *words, "-o", "out.safetensors"]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_large_matrices_are_decomposed_at_random_unless_asked_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr("streammerge.methods.factoring.EXACT_SIDE", 8)
    base, tuned = models(tmp_path, shapes={"w.weight": (40, 30)})
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base.safetensors"),
        "models": [str(tmp_path / "tuned.safetensors")],
    }
    out = tmp_path / "out.safetensors"
    report = streammerge.merge({**recipe, "low_rank": {"rank": 4}}, output=out, sync=False)
    assert any("at random" in note for note in report.notes)
    exact = streammerge.merge({**recipe, "low_rank": {"rank": 4, "svd": "exact"}}, output=out, sync=False, force=True)
    assert not any("at random" in note for note in exact.notes)
    assert exact.factored["error"] <= report.factored["error"] < 1.2 * exact.factored["error"]
    with pytest.raises(PlanError, match="wants all singular values"):
        streammerge.merge({**recipe, "low_rank": {"energy": 0.9}}, output=out, sync=False, force=True)
    assert (
        streammerge.merge(
            {**recipe, "low_rank": {"energy": 0.9, "rank": 6}}, output=out, sync=False, force=True
        ).factored["modules"][0]["rank"]
        == 6
    )
    values = np.linalg.svd((tuned["w.weight"].double() - base["w.weight"].double()).numpy(), compute_uv=False)
    assert exact.factored["error"] == pytest.approx(np.linalg.norm(values[4:]) / np.linalg.norm(values), rel=1e-5)


def test_a_dry_run_says_the_most_and_reads_headers_alone(tmp_path, capsys):
    models(tmp_path)
    words = [str(tmp_path / "tuned.safetensors"), str(tmp_path / "base.safetensors"), "--energy", "0.5"]
    assert main(["extract", *words, "-o", str(tmp_path / "out.safetensors"), "--dry-run"]) == 0
    assert "4 modules of rank at most 5 to 16" in capsys.readouterr().out


def test_a_merge_may_be_extracted(tmp_path):
    """The adapter of any merge beyond its base: TIES of two models here."""
    base, _ = models(tmp_path)
    other = near(base, 9, 0.1)
    save_model(tmp_path / "other.safetensors", other)
    recipe = {
        "merge_method": "ties",
        "base_model": str(tmp_path / "base.safetensors"),
        "models": [str(tmp_path / "tuned.safetensors"), str(tmp_path / "other.safetensors")],
        "parameters": {"density": 0.5},
    }
    streammerge.merge(recipe, output=tmp_path / "whole.safetensors", sync=False)
    asked = {"rank": 1000, "biases": True, "names": "comfy"}
    streammerge.merge({**recipe, "low_rank": asked}, output=tmp_path / "adapter.safetensors", sync=False)
    made, right = baked(tmp_path, tmp_path / "adapter.safetensors"), load_model(tmp_path / "whole.safetensors")
    assert all(torch.allclose(made[name], tensor, atol=2e-6) for name, tensor in right.items())
    streammerge.merge(
        {**recipe, "low_rank": {"rank": 2}}, output=tmp_path / "kohya.safetensors", sync=False, names="kohya"
    )
    assert all(name.startswith("lora_unet_") for name in load_model(tmp_path / "kohya.safetensors"))
    plain = {"merge_method": "linear", "models": recipe["models"], "low_rank": {"rank": 2}}
    with pytest.raises(PlanError, match="no base is named"):
        streammerge.merge(plain, output=tmp_path / "no.safetensors", sync=False)


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_memory_is_what_the_plan_says(tmp_path, svd):
    """And no more than 64 MiB above `import torch` for factors alone."""
    size = 720 if svd == "exact" else 2500
    models(tmp_path, torch.float16, {f"layers.{n}.w.weight": (size, size + 100) for n in range(3)})
    words = ["extract", "tuned.safetensors", "base.safetensors", "-o", "out.safetensors", "--rank", "16", "--svd", svd]
    command = [sys.executable, "-m", "streammerge", *words]
    plan = subprocess.run([*command, "--dry-run"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    found = re.search(r"peak RAM +([\d.]+) MB above", plan)
    assert found is not None
    subprocess.run([*command, "--threads", "1", "-q", "--report", "r.json"], cwd=tmp_path, check=True)
    report = json.loads((tmp_path / "r.json").read_text())
    taken = report["peak_rss_bytes"] - report["baseline_rss_bytes"]
    assert taken < 1.1e6 * float(found[1])
    assert taken < 64 * MIB
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base.safetensors"),
        "models": [str(tmp_path / "tuned.safetensors")],
        "low_rank": {"rank": 16, "svd": svd},
    }
    with pytest.raises(MergeError, match="too small"):
        streammerge.merge(recipe, output=tmp_path / "no.safetensors", max_ram="200MB")


@pytest.mark.parametrize("there", ["out.safetensors", "out.safetensors.sha256"])
def test_an_output_that_is_there_is_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys, there):
    """Spectra of a large model take minutes, for which nobody should wait in vain."""
    models(tmp_path)
    (tmp_path / there).write_text("mine")
    monkeypatch.setattr("streammerge.workers.measuring.measured", lambda *_: pytest.fail("it was measured"))
    words = [str(tmp_path / "tuned.safetensors"), str(tmp_path / "base.safetensors"), "--energy", "0.5", "--hash"]
    assert main(["extract", *words, "-o", str(tmp_path / "out.safetensors")]) == 1
    assert "exists" in capsys.readouterr().err
    assert (tmp_path / there).read_text() == "mine"
