"""What an adapter's file may hold and may not: nothing in it is passed over, and what is wrong is named."""

from __future__ import annotations

import json

import pytest
import torch

from streammerge.cli.main import main
from streammerge.errors import CheckpointError, PlanError
from tests.make.models import load_model, save_model
from tests.models.adapters.baking import BIAS, MODULE, WEIGHT, bake, numbers, parts, peft_folder

OUT, IN, RANK = 12, 10, 3
UP, DOWN = numbers(OUT, RANK, seed=1), numbers(RANK, IN, seed=2)
MODEL = {WEIGHT: numbers(OUT, IN, seed=9), BIAS: numbers(OUT, seed=8)}
PRODUCT = UP.double() @ DOWN.double()


def whole(**more: torch.Tensor | float) -> dict[str, torch.Tensor]:
    return parts(lora_up__weight=UP.clone(), lora_down__weight=DOWN.clone(), **more)


OFT = {"oft_blocks": numbers(2, 6, 6), "alpha": torch.tensor(0.0)}
MALFORMED = {
    "half is missing": (parts(lora_up__weight=UP), "lora_down"),
    "the other half is missing": (parts(lora_down__weight=DOWN), "lora_up"),
    "alpha alone": (parts(alpha=1.0), "stands alone"),
    "dora_scale alone": (parts(dora_scale=torch.ones(OUT, 1)), "dora_scale   has no meaning"),
    "no rank in common": (parts(lora_up__weight=UP, lora_down__weight=numbers(4, IN)), "no rank in common"),
    "a vector": (parts(lora_up__weight=numbers(OUT), lora_down__weight=DOWN), "of the shape [12]"),
    "nothing": (parts(lora_up__weight=numbers(OUT, 0), lora_down__weight=numbers(0, IN)), "of the shape [12, 0]"),
    "integers": (parts(lora_up__weight=UP.int(), lora_down__weight=DOWN), "is I32"),
    "alpha of two": (whole(alpha=torch.ones(2)), "should be one number"),
    "alpha of none": (whole(alpha=float("nan")), "is nan"),
    "alpha of another kind": (whole(alpha=torch.tensor(1.0).to(torch.complex64)), "alpha   is C64"),
    "alpha that is true": (whole(alpha=torch.tensor(True)), "alpha   is BOOL"),
    "an unknown part": (whole(lora_sideways__weight=UP.clone()), "lora_sideways.weight   is no known part"),
    "another module's part": ({**whole(), "something": UP.clone()}, "something   is no known part"),
    "two kinds at once": (whole(hada_w1_a=UP.clone()), "of several kinds at once"),
    "half of LoHa": (parts(hada_w1_a=UP, hada_w1_b=DOWN), "hada_w2_a"),
    "half of LoKr": (parts(lokr_w1=numbers(3, 5)), "lokr_w2"),
    "a whole and factors": (
        parts(lokr_w1=numbers(3, 5), lokr_w2=numbers(4, 2), lokr_w2_a=numbers(4, RANK), lokr_w2_b=numbers(RANK, 2)),
        "whole, and of factors too",
    ),
    "magnitudes of another size": (whole(dora_scale=torch.ones(7, 1)), "should be 12 × 1"),
    "magnitudes of no axis": (whole(dora_scale=torch.ones(OUT)), "should be 12 × 1"),
    "a weight changed twice": (whole(diff=numbers(OUT, IN)), "in two ways"),
    "a weight replaced and changed": (parts(diff=numbers(OUT, IN), set_weight=numbers(OUT, IN, seed=3)), "in two ways"),
    "trained tokens without a config": (parts(trainable_tokens_delta=numbers(2, IN)), "which would tell which"),
    "a kernel in the wrong half": (
        parts(lora_up__weight=numbers(OUT, RANK, 3, 3), lora_down__weight=numbers(RANK, IN, 1, 1)),
        "its kernel should be 1",
    ),
    "OFT of no squares": (parts(oft_blocks=numbers(2, 6, 5)), "which is no OFT's"),
    "OFT that may not turn": ({f"oft_unet_x.{n}": v for n, v in OFT.items()}, "nothing may turn"),
    "OFT of a negative alpha": (parts(oft_blocks=numbers(2, 6, 6), alpha=-1.0), "nothing may turn"),
    "OFT with lengths of another size": (parts(oft_blocks=numbers(2, 6, 6), rescale=torch.ones(6, 1)), "be 12 × 1"),
    "OFT of an older form": (parts(oft_diag=numbers(2, 6, 6)), "of OFT of an older form"),
    "BOFT of an odd size": (parts(oft_blocks=numbers(2, 4, 3, 3)), "which is no OFT's"),
    "BOFT of several factors": (parts(boft_R=numbers(2, 2, 6, 6), boft_s=torch.ones(OUT, 1)), "one butterfly factor"),
    "BOFT without lengths": (parts(boft_R=numbers(1, 2, 5, 5)), "no boft_s"),
    "PEFT's OFT without a config": (parts("base_model.model.x", oft_R__weight=numbers(2, 10)), "would tell of it"),
    "AdaLoRA without a config": (whole(lora_E=numbers(RANK, 1)), "adapter_config.json"),
    "PEFT's GLoRA": (parts(glora_A__Xd=numbers(OUT, 2)), "of PEFT's GLoRA"),
    "alpha of zero": (whole(alpha=0.0), "alpha   is 0: some programs"),
    "LoHa of ranks that don't fit": (
        parts(hada_w1_a=UP, hada_w1_b=DOWN, hada_w2_a=numbers(OUT, 4), hada_w2_b=DOWN.clone()),
        "hada_w2_a [12, 4]   and lora_unet_mid_x.hada_w2_b [3, 10]   have no rank in common",
    ),
    "LoHa of shapes that don't fit": (
        parts(hada_w1_a=UP, hada_w1_b=DOWN, hada_w2_a=UP.clone(), hada_w2_b=numbers(RANK, 9)),
        "don't fit",
    ),
    "a control LoRA": ({"lora_controlnet": torch.zeros(0), "x.up": UP, "x.down": DOWN}, "a control LoRA"),
    "an embedding of SD": ({"emb_params": numbers(2, 4)}, "a textual inversion"),
    "an embedding of SDXL": ({"clip_l": numbers(2, 4), "clip_g": numbers(2, 6)}, "a textual inversion"),
    "an empty file": ({}, "is empty, and no adapter"),
    "sparse biases": (whole(bias_values=numbers(3)), "sparse biases"),
    "larger weights": (whole(reshape_weight=torch.tensor([1, 2])), "enlarges its weights"),
    "embeddings": ({**whole(), "bundle_emb.x.string_to_param.*": numbers(2, 4)}, "a textual inversion"),
    "MLX": ({"a.lora_a": DOWN.clone(), "a.lora_b": UP.clone()}, "which would tell the scale, is not there"),
    "GLoRA of no rank": (
        parts(a1__weight=numbers(5, 5), a2__weight=numbers(5, 5), b1__weight=numbers(5, 5), b2__weight=numbers(5, 5)),
        "can not be told",
    ),
    "(IA)³ of a matrix": (parts(ia3_l=numbers(OUT, IN)), "those read are"),
    "a plain tensor": ({**whole(), "mid.y.weight": UP.clone()}, "mid.y.weight"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_what_is_no_adapter_is_named(tmp_path, case):
    tensors, told = MALFORMED[case]
    with pytest.raises(CheckpointError) as caught:
        bake(tmp_path, MODEL, tensors)
    assert told in str(caught.value)
    assert "Nothing was written." in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    tensors = {f"lora_unet_x{n}.lora_up.weight": UP.clone() for n in range(3)}
    with pytest.raises(CheckpointError, match="3 things in it") as caught:
        bake(tmp_path, MODEL, tensors)
    assert len(caught.value.found) == 3


def test_what_is_loaded_beside_a_model_is_told_apart(tmp_path):
    with pytest.raises(CheckpointError, match="loaded beside it"):
        bake(tmp_path, MODEL, {"emb_params": numbers(2, 4)})


def test_a_whole_model_is_no_adapter(tmp_path):
    with pytest.raises(CheckpointError, match="is no adapter: none of its 2 tensors"):
        bake(tmp_path, MODEL, {name: tensor.clone() for name, tensor in MODEL.items()})


def test_a_whole_model_beside_an_adapter_is_none_either(tmp_path):
    """A folder of both is that model, as anywhere; the config of PEFT's is not of its weights."""
    folder = peft_folder(tmp_path / "both", pair(), r=RANK, lora_alpha=RANK)
    save_model(folder / "model.safetensors", {name: tensor * 2 for name, tensor in MODEL.items()})
    with pytest.raises(CheckpointError, match="is no adapter: none of its 2 tensors") as caught:
        bake(tmp_path, MODEL, folder)
    assert "adapter_model.safetensors" in caught.value.advice
    made = bake(tmp_path, MODEL, folder / "adapter_model.safetensors")
    assert torch.allclose(made[WEIGHT].double(), MODEL[WEIGHT].double() + PRODUCT, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({WEIGHT: numbers(OUT, IN + 1)}, r"changes \[12, 10\], and mid.x.weight is \[12, 11\]"),
        ({WEIGHT: numbers(OUT, IN, 3, 3)}, r"mid.x.weight is \[12, 10, 3, 3\]"),
        ({WEIGHT: torch.ones(OUT, IN, dtype=torch.int32)}, "is quantised in a way that"),
        ({"mid.y.weight": numbers(OUT, IN)}, r"none of its modules \(1\) is in model"),
    ],
)
def test_a_module_has_to_fit(tmp_path, model, told):
    with pytest.raises(PlanError, match=told):
        bake(tmp_path, model, whole())


def test_two_modules_of_one_tensor_are_no_adapter(tmp_path):
    """Programs take one of them, and say nothing of the other."""
    again = {name.replace(MODULE, "diffusion_model.mid.x"): tensor.clone() for name, tensor in whole().items()}
    with pytest.raises(PlanError, match=r"lora_unet_mid_x changes mid.x.weight too|mid.x changes mid.x.weight too"):
        bake(tmp_path, MODEL, {**whole(), **again})


def test_what_is_not_there_may_be_left_out(tmp_path):
    adapter = {**whole(), **parts("lora_te_nowhere", lora_up__weight=UP.clone(), lora_down__weight=DOWN.clone())}
    with pytest.raises(PlanError, match=r"adapter0: 1 module of 2 is not in model(.|\n)*--on-missing drop"):
        bake(tmp_path, MODEL, adapter)
    made = bake(tmp_path, MODEL, adapter, on_missing="drop")
    assert torch.allclose(made[WEIGHT].double(), MODEL[WEIGHT].double() + PRODUCT, atol=1e-6)


def test_what_does_not_fit_is_never_left_out(tmp_path):
    with pytest.raises(PlanError, match="does not fit"):
        bake(tmp_path, {WEIGHT: numbers(OUT, IN + 1)}, whole(), on_missing="drop")


# ── PEFT ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def pair(module: str = "mid.x") -> dict[str, torch.Tensor]:
    return {f"{module}.lora_B.weight": UP.clone(), f"{module}.lora_A.weight": DOWN.clone()}


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"r": RANK, "lora_alpha": 6}, 2.0),
        ({"r": RANK, "lora_alpha": 6, "use_rslora": True}, 6 / RANK**0.5),
        ({"r": 8, "lora_alpha": 16, "rank_pattern": {"x": RANK}, "alpha_pattern": {"x": 6}}, 2.0),
        ({"r": RANK, "lora_alpha": 9, "alpha_pattern": {"^mid.x": 6, "mid.y": 1}}, 2.0),
        ({"r": RANK, "lora_alpha": 6, "alpha_pattern": {"id.x": 1, "y": 1}}, 2.0),
    ],
)
def test_a_config_tells_the_scale(tmp_path, config, scale):
    folder = peft_folder(tmp_path / "adapter", pair(), **config)
    for path in (folder, folder / "adapter_model.safetensors"):
        made = bake(tmp_path, MODEL, path, weights=0.5)
        assert torch.allclose(made[WEIGHT].double(), MODEL[WEIGHT].double() + 0.5 * scale * PRODUCT, atol=1e-6)


@pytest.mark.parametrize(
    ("targets", "told"),
    [(["x", "other"], "other"), (["mid.x", "mid.other"], "mid.other"), (["x", "absent"], ""), (["x"], ""), ("x", "")],
)
def test_what_the_config_names_and_the_file_lacks_is_told(tmp_path, capsys, targets, told):
    """Where the model has such a module: configs name what other models have, too."""
    folder = peft_folder(tmp_path / "adapter", pair(), r=RANK, lora_alpha=RANK, target_modules=targets)
    save_model(tmp_path / "model.safetensors", {**MODEL, "mid.other.weight": numbers(OUT, IN)})
    assert main(["bake", str(tmp_path / "model.safetensors"), str(folder), "-o", str(tmp_path / "o.safetensors")]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert (f"names {told} in target_modules, of which the adapter has no weights" in said) == bool(told)
    assert ("target_modules" in said) == bool(told)


def test_weights_that_lie_transposed(tmp_path):
    folder = peft_folder(tmp_path / "adapter", pair(), r=RANK, lora_alpha=RANK, fan_in_fan_out=True)
    model = {WEIGHT: numbers(IN, OUT, seed=9)}
    made = bake(tmp_path, model, folder)
    assert torch.allclose(made[WEIGHT].double(), model[WEIGHT].double() + PRODUCT.T, atol=1e-6)


def test_embeddings(tmp_path):
    down, up = numbers(RANK, OUT, seed=1), numbers(IN, RANK, seed=2)
    tensors = {"mid.x.lora_embedding_A": down, "mid.x.lora_embedding_B": up}
    made = bake(tmp_path, MODEL, peft_folder(tmp_path / "adapter", tensors, r=RANK, lora_alpha=6))
    product = (up.double() @ down.double()).T
    assert torch.allclose(made[WEIGHT].double(), MODEL[WEIGHT].double() + 2 * product, atol=1e-6)


def test_magnitudes(tmp_path):
    lengths = numbers(OUT, seed=5).abs()
    tensors = {**pair(), "mid.x.lora_magnitude_vector": lengths}
    made = bake(tmp_path, MODEL, peft_folder(tmp_path / "adapter", tensors, r=RANK, lora_alpha=RANK, use_dora=True))
    longer = MODEL[WEIGHT].double() + PRODUCT
    expected = longer / longer.norm(dim=1, keepdim=True) * lengths.double()[:, None]
    assert torch.allclose(made[WEIGHT].double(), expected, atol=1e-6)


def test_ia3_multiplies_outputs_and_their_biases_or_inputs(tmp_path):
    for shape in ((OUT, 1), (1, IN)):
        vector = numbers(*shape, seed=4)
        folder = peft_folder(tmp_path / "adapter", {"mid.x.ia3_l": vector}, peft_type="IA3")
        made = bake(tmp_path, MODEL, folder)
        assert torch.allclose(made[WEIGHT], MODEL[WEIGHT] * vector, atol=1e-6)
        bias = MODEL[BIAS] * vector.flatten() if shape[0] > 1 else MODEL[BIAS]
        assert torch.allclose(made[BIAS], bias, atol=1e-6)
        assert bake(tmp_path, {WEIGHT: MODEL[WEIGHT]}, folder).keys() == {WEIGHT}


def test_vera(tmp_path):
    b, d = numbers(OUT, seed=3), numbers(RANK, seed=4)
    left, right = numbers(OUT + 2, RANK, seed=5), numbers(RANK, IN, seed=6)
    tensors = {
        "mid.x.vera_lambda_b": b,
        "mid.x.vera_lambda_d": d,
        "base_model.vera_A": right,
        "base_model.vera_B": left,
    }
    made = bake(tmp_path, MODEL, peft_folder(tmp_path / "adapter", tensors, peft_type="VERA"))
    product = (b[:, None] * left[:OUT]).double() @ (d[:, None] * right).double()
    assert torch.allclose(made[WEIGHT].double(), MODEL[WEIGHT].double() + product, atol=1e-6)


def test_modules_that_were_trained_whole(tmp_path):
    saved = {"mid.x.modules_to_save.weight": numbers(OUT, IN, seed=5), "mid.x.bias": numbers(OUT, seed=6)}
    folder = peft_folder(tmp_path / "adapter", saved, r=RANK, lora_alpha=RANK)
    made = bake(tmp_path, MODEL, folder)
    assert torch.equal(made[WEIGHT], saved["mid.x.modules_to_save.weight"])
    assert torch.equal(made[BIAS], saved["mid.x.bias"])
    with pytest.raises(PlanError, match=r"changes \[12, 10\], and mid.x.weight is \[14, 10\]"):
        bake(tmp_path, {WEIGHT: numbers(14, IN), BIAS: MODEL[BIAS]}, folder)


def test_factors_upon_a_weight_that_is_saved_with_them(tmp_path):
    """So PEFT saves embeddings that it changes: the model's own weight, or one with more rows."""
    saved = numbers(OUT, IN, seed=5)
    tensors = {**pair(), "mid.x.base_layer.weight": saved}
    folder = peft_folder(tmp_path / "adapter", tensors, r=RANK, lora_alpha=6)
    changed = saved.double() + 2 * PRODUCT
    assert torch.allclose(bake(tmp_path, MODEL, folder)[WEIGHT].double(), changed, atol=1e-6)
    half = (MODEL[WEIGHT].double() + changed) / 2
    assert torch.allclose(bake(tmp_path, MODEL, folder, weights=0.5)[WEIGHT].double(), half, atol=1e-6)
    other = {**pair(), "mid.x.base_layer.weight": numbers(OUT + 1, IN)}
    with pytest.raises(CheckpointError, match=r"base_layer.weight   is \[13, 10\], and \[12, 10\] of it are changed"):
        bake(tmp_path, MODEL, peft_folder(tmp_path / "other", other, r=RANK, lora_alpha=6))


@pytest.mark.parametrize(
    ("config", "places"),
    [
        ({"trainable_token_indices": [7, 2, 3]}, [7, 2, 3]),
        ({"trainable_token_indices": {"y": [1], "x": [0, 11, 10]}}, [0, 11, 10]),
        ({"peft_type": "TRAINABLE_TOKENS", "token_indices": [0, 1, 2]}, [0, 1, 2]),
    ],
)
def test_tokens_that_were_trained_alone(tmp_path, config, places):
    trained = numbers(3, IN, seed=5)
    folder = peft_folder(tmp_path / "adapter", {"mid.x.token_adapter.trainable_tokens_delta": trained}, r=4, **config)
    for weight in (1.0, 0.25):
        expected = MODEL[WEIGHT].double().clone()
        expected[places] += weight * (trained.double() - expected[places])
        assert torch.allclose(bake(tmp_path, MODEL, folder, weights=weight)[WEIGHT].double(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "error", "told"),
    [
        ([1, 2], CheckpointError, r"of the shape \[3, 10\], and .*adapter_config.json names 2 trained tokens"),
        ([1, 2, 1], CheckpointError, "must be a list of different numbers"),
        ([1, 2, -1], CheckpointError, "must be a list of different numbers"),
        ({"x": "all"}, CheckpointError, "must be a list of different numbers"),
        ({"mid": [1, 2, 3]}, CheckpointError, "names 0 trained tokens"),
        ([1, 2, 12], PlanError, r"changes \[13, 10\], and mid.x.weight is \[12, 10\]"),
    ],
)
def test_tokens_that_are_not_there(tmp_path, tokens, error, told):
    tensors = {"mid.x.token_adapter.trainable_tokens_delta": numbers(3, IN)}
    with pytest.raises(error, match=told):
        bake(tmp_path, MODEL, peft_folder(tmp_path / "adapter", tensors, r=4, trainable_token_indices=tokens))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"peft_type": "POLY"}, "POLY adapters are not read"),
        ({"peft_type": "OFT"}, "OFT of an older form"),
        ({"peft_type": "OFT", "use_cayley_neumann": True, "num_cayley_neumann_terms": 0}, "should be 1 to 1000"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the model's own weights"),
        ({"init_lora_weights": "olora"}, "changes the model's own weights"),
        ({"layer_replication": [[0, 4]]}, "stacks layers"),
        ({"alora_invocation_tokens": [1, 2]}, "changes nothing before certain tokens"),
        ({"arrow_config": {"top_k": 3}}, "a router among several adapters"),
        ({"lora_alpha": "much"}, "lora_alpha must be a number"),
        ({"lora_alpha": True}, "lora_alpha must be a number"),
        ({"lora_alpha": 0}, "has the alpha 0 by .*adapter_config.json"),
        ({"alpha_pattern": {"x": 0}}, "has the alpha 0 by .*adapter_config.json"),
        ({"use_dora": True}, "has no lora_magnitude_vector, and .*adapter_config.json says use_dora"),
        ({"alpha_pattern": [1]}, "alpha_pattern is no map"),
        ({"alpha_pattern": {"(a+)+b": 1}}, "none of plain names"),
    ],
)
def test_configs_that_ask_for_what_is_not_done(tmp_path, config, told):
    folder = peft_folder(tmp_path / "adapter", pair(), **{"r": RANK, "lora_alpha": RANK, **config})
    with pytest.raises(CheckpointError, match=told):
        bake(tmp_path, MODEL, folder)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"r": 1, "r": 2}', "[" * 100_000])
def test_configs_that_are_none(tmp_path, text):
    folder = peft_folder(tmp_path / "adapter", pair())
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"adapter_config.json: can't be read"):
        bake(tmp_path, MODEL, folder)


def test_the_scale_of_peft_is_never_guessed(tmp_path):
    folder = peft_folder(tmp_path / "adapter", pair())
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config.json, which would tell it, is not there"):
        bake(tmp_path, MODEL, folder)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"r": RANK}, "has no alpha, and .*adapter_config.json doesn't say lora_alpha"),
        ({}, "has no alpha, and .*adapter_config.json doesn't say lora_alpha"),
        (
            {"r": RANK, "lora_alpha": 6, "peft_type": "LOHA"},
            "has no alpha, and .*adapter_config.json doesn't say alpha",
        ),
        ({"r": RANK, "alpha_pattern": {"mid.y": 6}}, "doesn't say lora_alpha"),
    ],
)
def test_a_strength_that_the_config_leaves_out_is_not_taken_for_1(tmp_path, config, told):
    with pytest.raises(CheckpointError, match=told):
        bake(tmp_path, MODEL, peft_folder(tmp_path / "adapter", pair(), **config))


def test_a_pattern_tells_the_strength_of_its_modules_alone(tmp_path):
    made = bake(tmp_path, MODEL, peft_folder(tmp_path / "adapter", pair(), r=RANK, alpha_pattern={"mid.x": 6}))
    assert torch.allclose(made[WEIGHT].double(), MODEL[WEIGHT].double() + 2 * PRODUCT, atol=1e-6)


def test_squares_lie_transposed_in_layers_of_gpt2_and_nobody_knows_in_others(tmp_path):
    down, up = numbers(RANK, OUT, seed=2), numbers(OUT, RANK, seed=1)
    config = {"r": RANK, "lora_alpha": RANK, "fan_in_fan_out": True}
    for name, is_known in (("h.0.attn.c_proj", True), ("h.0.attn.q_proj", False)):
        model = {f"{name}.weight": numbers(OUT, OUT, seed=9)}
        tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        folder = peft_folder(tmp_path / name, tensors, **config)
        if is_known:
            made = bake(tmp_path, model, folder)
            exact = model[f"{name}.weight"].double() + (up.double() @ down.double()).T
            assert torch.allclose(made[f"{name}.weight"].double(), exact, atol=1e-6)
        else:
            with pytest.raises(CheckpointError, match="nothing tells whether this square lies transposed"):
                bake(tmp_path, model, folder)


def test_several_adapters_of_a_model_are_not_taken_for_one(tmp_path):
    tensors = {f"mid.{module}.lora_{side}.{name}.weight": tensor for module, name in (("x", "default"), ("y", "other"))
               for side, tensor in (("A", DOWN.clone()), ("B", UP.clone()))}  # fmt: skip
    model = {**MODEL, "mid.y.weight": numbers(OUT, IN)}
    with pytest.raises(CheckpointError, match="default and other   are several adapters"):
        bake(tmp_path, model, peft_folder(tmp_path / "adapter", tensors, r=RANK, lora_alpha=RANK))


def test_embeddings_in_an_adapters_file_are_left_out_if_that_is_asked(tmp_path, capsys):
    save_model(tmp_path / "m.safetensors", MODEL)
    save_model(tmp_path / "a.safetensors", {**whole(alpha=6.0), "bundle_emb.cat.string_to_param.*": numbers(2, 4)})
    save_model(tmp_path / "e.safetensors", {"emb_params": numbers(2, 4)})
    model, adapter, alone, out = (str(tmp_path / f"{name}.safetensors") for name in "maeo")
    assert main(["bake", model, adapter, "-o", out]) == 1
    assert "leaves out with --on-missing drop" in capsys.readouterr().err
    assert main(["bake", model, alone, "-o", out, "--on-missing", "drop"]) == 1
    assert "emb_params   is of a textual inversion, which is not read" in capsys.readouterr().err
    assert main(["bake", model, adapter, "-o", out, "--on-missing", "drop"]) == 0
    told = capsys.readouterr().err
    assert "1 tensor is of a textual inversion, and is left out: bundle_emb.cat.string_to_param.*" in told
    made = load_model(tmp_path / "o.safetensors")[WEIGHT]
    assert torch.allclose(made.double(), MODEL[WEIGHT].double() + 2 * PRODUCT, atol=1e-6)


def test_a_module_in_two_namings_is_told_as_that(tmp_path):
    again = {"unet.mid.x.lora_A.weight": DOWN.clone(), "unet.mid.x.lora_B.weight": UP.clone()}
    with pytest.raises(PlanError, match="changes what another changes") as caught:
        bake(tmp_path, MODEL, {**whole(alpha=1.0), **again})
    assert "leave one of both out of the file" in str(caught.value)


def test_what_diffusers_keeps_in_metadata(tmp_path):
    config = {"transformer.r": RANK, "transformer.lora_alpha": 6, "text_encoder.lora_alpha": 1}
    path = save_model(
        tmp_path / "pytorch_lora_weights.safetensors",
        pair("transformer.mid.x"),
        {"format": "pt", "lora_adapter_metadata": json.dumps(config)},
    )
    made = bake(tmp_path, MODEL, path)
    assert torch.allclose(made[WEIGHT].double(), MODEL[WEIGHT].double() + 2 * PRODUCT, atol=1e-6)
    without = save_model(tmp_path / "plain.safetensors", pair("transformer.mid.x"))
    assert torch.allclose(bake(tmp_path, MODEL, without)[WEIGHT].double(), MODEL[WEIGHT].double() + PRODUCT, atol=1e-6)


def test_a_torch_file(tmp_path):
    torch.save(whole(alpha=6.0), tmp_path / "lora.pt")
    made = bake(tmp_path, MODEL, tmp_path / "lora.pt")
    assert torch.allclose(made[WEIGHT].double(), MODEL[WEIGHT].double() + 2 * PRODUCT, atol=1e-6)


def test_the_module_of_a_name_is_what_stands_before_its_part():
    from streammerge.models.adapters.parts import sorted_parts

    found = sorted_parts([f"{MODULE}.lora_up.weight", "unet.mid.to_q_lora.down.weight", "a.b.lora_A.default.weight"])
    assert set(found.modules) == {MODULE, "unet.mid.to_q", "a.b"}
    assert not found.problems
