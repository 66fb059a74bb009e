"""Adapters: known by how their tensors belong together, in every dialect, and refused as inputs of a merge."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file

import streammerge
from streammerge.cli.main import main
from streammerge.errors import PlanError
from streammerge.models.adapters.recognition import find_adapter
from streammerge.tensors import DTYPES, TensorInfo
from tests.make.headers import Header, merged
from tests.make.models import normal, save_model

Shapes = dict[str, tuple[int, ...]]

OUT, IN, RANK = 24, 16, 4


def model(shapes: Shapes, dtype: str = "F16") -> Header:
    return Header({name: TensorInfo(DTYPES[dtype], shape) for name, shape in shapes.items()})


def pair(up: str, down: str, *, alpha: str = "") -> Shapes:
    return {up: (OUT, RANK), down: (RANK, IN), **({alpha: ()} if alpha else {})}


def every(suffixes: str, stem: str = "lora_unet_x") -> Shapes:
    return {f"{stem}.{suffix}": (RANK, RANK) for suffix in suffixes.split()}


KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
PEFT = "base_model.model.model.layers.0.self_attn.q_proj"
DIALECTS: dict[str, tuple[Shapes, str]] = {
    "kohya": (pair(f"{KOHYA}.lora_up.weight", f"{KOHYA}.lora_down.weight", alpha=f"{KOHYA}.alpha"), "LoRA"),
    "kohya, convolution": (
        {
            f"{KOHYA}.lora_up.weight": (OUT, RANK, 1, 1),
            f"{KOHYA}.lora_down.weight": (RANK, IN, 1, 1),
            f"{KOHYA}.lora_mid.weight": (RANK, RANK, 3, 3),
        },
        "LoRA",
    ),
    "text encoder": (
        pair("lora_te1_text_model_mlp_fc1.lora_up.weight", "lora_te1_text_model_mlp_fc1.lora_down.weight"),
        "LoRA",
    ),
    "DoRA": (
        pair(f"{KOHYA}.lora_up.weight", f"{KOHYA}.lora_down.weight") | {f"{KOHYA}.dora_scale": (1, IN)},
        "DoRA",
    ),
    "diffusers, old": (pair("unet.mid.to_q.lora.up.weight", "unet.mid.to_q.lora.down.weight"), "LoRA"),
    "diffusers, processors": (
        pair("unet.mid.processor.to_q_lora.up.weight", "unet.mid.processor.to_q_lora.down.weight"),
        "LoRA",
    ),
    "diffusers, linear layers": (
        pair("text_encoder.q_proj.lora_linear_layer.up.weight", "text_encoder.q_proj.lora_linear_layer.down.weight"),
        "LoRA",
    ),
    "diffusers, new": (pair("unet.mid.to_q.lora_B.weight", "unet.mid.to_q.lora_A.weight"), "LoRA"),
    "XLabs": (
        pair("double_blocks.0.processor.proj_lora1.up.weight", "double_blocks.0.processor.proj_lora1.down.weight"),
        "LoRA",
    ),
    "ComfyUI": (
        pair("diffusion_model.blocks.0.ffn.0.lora_up.weight", "diffusion_model.blocks.0.ffn.0.lora_down.weight")
        | {"diffusion_model.blocks.0.norm.diff": (IN,), "diffusion_model.blocks.0.ffn.0.diff_b": (IN,)},
        "LoRA and full-difference",
    ),
    "OneTrainer": (
        pair("transformer.single.0.attn.lora_up.weight", "transformer.single.0.attn.lora_down.weight")
        | {"transformer.single.0.attn.alpha": (), "transformer.single.0.attn.dora_scale": (OUT, 1)},
        "DoRA",
    ),
    "PEFT": (pair(f"{PEFT}.lora_B.weight", f"{PEFT}.lora_A.weight"), "LoRA"),
    "PEFT, a named adapter": (pair(f"{PEFT}.lora_B.default.weight", f"{PEFT}.lora_A.default.weight"), "LoRA"),
    "PEFT, embedding": (
        {
            "base_model.model.embed_tokens.lora_embedding_A": (RANK, 99),
            "base_model.model.embed_tokens.lora_embedding_B": (OUT, RANK),
        },
        "LoRA",
    ),
    "PEFT, experts": (
        {f"{PEFT}.lora_A.weight": (8 * RANK, IN), f"{PEFT}.lora_B.weight": (OUT, 8 * RANK)},
        "LoRA",
    ),
    "PEFT, DoRA": (
        pair(f"{PEFT}.lora_B.weight", f"{PEFT}.lora_A.weight") | {f"{PEFT}.lora_magnitude_vector.weight": (OUT,)},
        "DoRA",
    ),
    "PEFT, whole modules beside": (
        pair(f"{PEFT}.lora_B.weight", f"{PEFT}.lora_A.weight")
        | {f"base_model.model.{name}.weight": (IN, IN) for name in ("lm_head", "embed_tokens", "score")},
        "LoRA",
    ),
    "loralib": (pair("layers.0.attn.lora_B", "layers.0.attn.lora_A"), "LoRA"),
    "MLX": ({"layers.0.attn.lora_a": (IN, RANK), "layers.0.attn.lora_b": (RANK, OUT)}, "LoRA"),
    "VeRA": (
        {f"{PEFT}.vera_lambda_b": (OUT,), f"{PEFT}.vera_lambda_d": (RANK,), "base_model.vera_A": (RANK, IN)},
        "VeRA",
    ),
    "(IA)³ of PEFT": ({f"{PEFT}.ia3_l": (OUT, 1)}, "(IA)³"),
    "(IA)³ of LyCORIS": ({"lora_unet_x.weight": (OUT,), "lora_unet_x.on_input": ()}, "LyCORIS (IA)³"),
    "LoHa": (every("hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2 alpha"), "LoHa"),
    "LoKr, whole": (every("lokr_w1 lokr_w2"), "LoKr"),
    "LoKr, factors": (every("lokr_w1 lokr_w2_a lokr_w2_b lokr_t2 alpha", "lycoris_x"), "LoKr"),
    "OFT": (every("oft_blocks alpha"), "OFT"),
    "OFT of PEFT": (every("oft_R.weight", PEFT), "OFT"),
    "BOFT": (every("boft_R boft_s", PEFT), "BOFT"),
    "GLoRA": (every("a1.weight a2.weight b1.weight b2.weight alpha"), "GLoRA"),
    "differences alone": (every("diff diff_b w_norm b_norm"), "full-difference"),
    "norms of LyCORIS": (every("w_norm b_norm"), "full-difference"),
    "control LoRA": (
        {"lora_controlnet": (0,), **pair("input_blocks.1.0.emb_layers.1.up", "input_blocks.1.0.emb_layers.1.down")},
        "control LoRA",
    ),
    "FourierFT": ({f"{PEFT}.fourierft_spectrum": (100,)}, "PEFT"),
    "prompt tuning": ({"prompt_embeddings": (20, OUT)}, "prompt"),
    "IP-Adapter FaceID": (
        pair("ip_adapter.1.to_q_lora.up.weight", "ip_adapter.1.to_q_lora.down.weight")
        | pair("ip_adapter.1.to_k_lora.up.weight", "ip_adapter.1.to_k_lora.down.weight")
        | {"ip_adapter.1.to_k_ip.weight": (OUT, IN), "ip_adapter.1.to_v_ip.weight": (OUT, IN)},
        "LoRA",
    ),
}
PLAIN: dict[str, Shapes] = {
    "an odd name": {"model.lora_up.weight": (8, 8), "model.other.weight": (8, 8)},
    "RWKV's small networks": {
        "model.layers.0.attn.w_lora.lora.0.weight": (4, 16),
        "model.layers.0.attn.w_lora.lora.2.weight": (16, 4),
        "model.layers.0.attn.w_lora.lora.2.bias": (16,),
    },
    "DeepSeek's attention": {
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": (6, 16),
        "model.layers.0.self_attn.kv_b_proj.weight": (16, 6),
    },
    "a feed-forward network": {"experts.up": (32, 8), "experts.down": (8, 32)},
    "a VAE": {"decoder.up.0.block.0.conv1.weight": (8, 8, 3, 3), "encoder.down.0.downsample.conv.weight": (8, 8, 3, 3)},
    "a ControlNet": {"control_model.input_hint_block.0.weight": (16, 3, 3, 3), "zero_convs.0.0.weight": (8, 8, 1, 1)},
    "a textual inversion": {"emb_params": (4, 768)},
    "the inversion of two encoders": {"clip_l": (4, 768), "clip_g": (4, 1280)},
    "differences beside weights": {"a.weight": (8, 8), "loss.diff": (8,)},
    "scales beside weights": {"a.weight": (8, 8), "a.alpha": (), "a.scale": ()},
    "an activation's exponent": {"a.alpha": (8,), "a.b1.weight": (8, 8), "a.b2.weight": (8, 8)},
}


HALVES: dict[str, Shapes] = {
    "one factor without the other": {"a.lora_A.weight": (4, 8), "b.lora_B.weight": (8, 4)},
    "two that can't be multiplied": {"a.lora_A.weight": (4, 8), "a.lora_B.weight": (5, 9)},
    "LoHa's first": {"lora_unet_a.hada_w1_a": (8, 2), "lora_unet_a.alpha": ()},
    "one half of DoRA": {"lora_unet_a.lora_down.weight": (4, 8), "lora_unet_a.dora_scale": (8, 1)},
}


@pytest.mark.parametrize("content", HALVES)
def test_factors_without_the_others_are_not_averaged(content):
    assert find_adapter(model(HALVES[content]).tensors) is None
    first = next(iter(HALVES[content]))
    with pytest.raises(PlanError, match=f"factors of an adapter that make no products(.|\n)*{first}"):
        merged({"a": model(HALVES[content]), "b": model(HALVES[content])})


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_adapter_is_known_in_every_dialect(dialect):
    shapes, kind = DIALECTS[dialect]
    adapter = find_adapter(model(shapes).tensors)
    assert adapter is not None
    assert (adapter.kind, adapter.is_inside) == (kind, False)
    whole = [name for name in shapes if re.search(r"_ip\.|head|embed_tokens\.w|score|vera_A$|controlnet$", name)]
    assert {*adapter.tensors} == {*shapes} - {*whole}


@pytest.mark.parametrize("content", PLAIN)
def test_what_has_no_factors_is_no_adapter(content):
    assert find_adapter(model(PLAIN[content]).tensors) is None
    both = model(PLAIN[content])
    assert {d.action for d in merged({"a": both, "b": both}).decisions} == {"merged"}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_adapter_is_refused_as_any_input_of_a_merge(dialect):
    adapter = model(DIALECTS[dialect][0])
    plain = model({"x.weight": (OUT, IN), "y.weight": (OUT, IN)})
    refused = pytest.raises(PlanError, match=r"adapter.*average(.|\n)*  lora   .* adapter, (.|\n)*the model that")
    with refused:
        merged({"lora": adapter, "b": adapter})
    with refused:
        merged({"b": plain, "lora": adapter}, on_missing="keep")
    with refused:
        merged({"b": plain, "lora": adapter}, "task_arithmetic", base="lora", on_missing="keep")
    with refused:
        merged({"b": plain, "c": plain, "lora": adapter}, beside="lora", layout="lora", on_missing="keep")
    with refused:
        merged({"b": plain, "c": plain, "lora": adapter}, beside="lora", rules=[{"match": "x*", "take": "lora"}])


def test_a_model_with_an_adapter_beside_its_weights_is_not_averaged_but_may_be_kept():
    shapes = {"q.base_layer.weight": (OUT, IN), "k.weight": (OUT, IN), "q.bias": (OUT,), "norm.weight": (IN,)}
    factors = {
        "q.lora_A.speech.weight": (RANK, IN),
        "q.lora_B.speech.weight": (OUT, RANK),
        "k.lora_A.vision.weight": (RANK, IN),
        "k.lora_B.vision.weight": (OUT, RANK),
    }
    both = model(shapes | factors)
    assert find_adapter(both.tensors) == find_adapter(model(factors | shapes).tensors)
    with pytest.raises(PlanError, match=r"4 tensors of a belong to an adapter beside its weights(.|\n)*lora_A\.speech"):
        merged({"a": both, "b": both})
    kept = merged({"a": both, "b": both}, rules=[{"match": "*.lora_?.*", "keep": True}])
    assert {d.name: d.action for d in kept.decisions} == {
        **dict.fromkeys(shapes, "merged"),
        **dict.fromkeys(factors, "copied"),
    }


def test_stray_factors_in_a_checkpoint_are_not_averaged():
    weights = {f"layers.{number}.weight": (OUT, IN) for number in range(9)}
    both = model(weights | DIALECTS["kohya"][0])
    with pytest.raises(PlanError, match="3 tensors of a belong to an adapter"):
        merged({"a": both, "b": both})


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def lora(tmp_path):
    tensors = {
        f"{KOHYA}.lora_up.weight": normal((OUT, RANK), 1),
        f"{KOHYA}.lora_down.weight": normal((RANK, IN), 2),
        f"{KOHYA}.alpha": torch.tensor(2.0),
    }
    torch.save(tensors, tmp_path / "lora.pt")
    torch.save(tensors, tmp_path / "lora.bin")
    return save_model(tmp_path / "lora.safetensors", tensors)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_the_program_refuses_adapters_in_every_container(lora, suffix, capsys):
    path, out = lora.with_suffix(suffix), lora.with_name("out.safetensors")
    plain = save_model(lora.with_name("plain.safetensors"), {"x.weight": normal((3, 3), 1)})
    nested = lora.with_name("nested.yaml")
    inner = f"{{merge_method: linear, models: [{path.name}, {path.name}]}}"
    nested.write_text(f"merge_method: linear\nmodels: [plain.safetensors, {inner}]")
    for words in (
        [str(path), str(path), "-m", "slerp", "-o", str(out)],
        ["plan", str(plain), str(path), "--on-missing", "keep"],
        [str(nested), "-o", str(out)],
    ):
        assert main(words) == 1
        assert "adapter" in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(PlanError, match="LoRA adapter"):
        streammerge.linear(path, plain)


def test_a_folder_of_peft_is_refused_as_an_adapter(tmp_path, capsys):
    tensors = {f"{PEFT}.lora_A.weight": normal((RANK, IN), 1), f"{PEFT}.lora_B.weight": normal((OUT, RANK), 2)}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_model(tmp_path / name / "adapter_model.safetensors", tensors)
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": RANK}))
        torch.save({}, tmp_path / name / "training_args.bin")
    for more, told in ((["-m", "slerp"], "2 models are adapters"), ([], "PEFT's adapters are folders")):
        words = [str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "out.safetensors"), *more]
        assert main(words) == 1
        assert told in capsys.readouterr().err


def test_what_peft_left_in_the_folder_of_a_whole_model_does_not_matter(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_model(tmp_path / name / "model.safetensors", {"x.weight": normal((3, 3), 1)})
        (tmp_path / name / "adapter_config.json").write_text("{}")
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "out.safetensors"), "-q"]) == 0
    assert torch.equal(load_file(tmp_path / "out.safetensors")["x.weight"], normal((3, 3), 1))


def test_adapters_are_inspected_and_compared_by_their_name(lora, capsys):
    assert main(["inspect", str(lora)]) == 0
    assert "LoRA adapter: 3 tensors" in capsys.readouterr().out
    assert main(["compare", str(lora), str(lora), "-q"]) == 0
    assert "lora.safetensors   LoRA adapter: its factors are compared" in capsys.readouterr().out
