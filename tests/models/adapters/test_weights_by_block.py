"""Weights of adapters that are merged alone, by block, layer and name: each module has its tensor's."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

import streammerge
from streammerge.cli.main import main
from streammerge.errors import MergeError, RecipeError
from streammerge.models.adapters.addresses import Addresses
from streammerge.models.adapters.files import Adapter
from streammerge.models.adapters.targets import Targets
from streammerge.models.adapters.together import Together
from streammerge.models.blocks import Blocks
from tests.make.models import Tensors, assert_same_bytes, load_model, save_model
from tests.models.adapters.baking import bake, numbers
from tests.models.adapters.test_layouts import LAYOUTS, spelled

OUT, IN = 6, 5

SD1 = {
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": "BASE",
    "lora_te_text_model_encoder_layers_11_mlp_fc1": "BASE",
    "lora_unet_down_blocks_0_attentions_0_proj_in": "IN01",
    "lora_unet_down_blocks_1_attentions_1_transformer_blocks_0_attn2_to_k": "IN05",
    "lora_unet_down_blocks_2_attentions_1_proj_in": "IN08",
    "lora_unet_mid_block_attentions_0_proj_in": "M00",
    "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": "OUT03",
    "lora_unet_up_blocks_3_attentions_2_proj_out": "OUT11",
}
SD1_CONVS = {
    "lora_unet_down_blocks_0_resnets_0_conv1": "IN01",
    "lora_unet_down_blocks_0_downsamplers_0_conv": "IN03",
    "lora_unet_down_blocks_3_resnets_1_conv1": "IN11",
    "lora_unet_up_blocks_0_resnets_2_conv2": "OUT02",
    "lora_unet_conv_out": "OUT11",
}
SDXL = {
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": "BASE",
    "lora_te2_text_model_encoder_layers_31_self_attn_q_proj": "BASE",
    "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q": "IN04",
    "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_v": "IN08",
    "lora_unet_middle_block_1_proj_in": "M00",
    "lora_unet_output_blocks_0_1_transformer_blocks_0_attn1_to_q": "OUT00",
    "lora_unet_output_blocks_5_1_proj_in": "OUT05",
}
XL_IN_DIFFUSERS = {
    "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q": "unet.down_blocks.1.attentions.0.transformer_blocks"
    ".1.attn1.to_q",
    "lora_unet_output_blocks_5_1_proj_in": "unet.up_blocks.1.attentions.2.proj_in",
    "lora_unet_middle_block_1_proj_in": "unet.mid_block.attentions.0.proj_in",
}
UNETS = [f"{side}{number:02}" for side in ("IN", "OUT") for number in range(12)]
ORDER = ["BASE", *UNETS[:12], "M00", *UNETS[12:]]
ORDER_XL = ["BASE", *UNETS[:9], "M00", *UNETS[12:21]]
SHORT = ["BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00", *(f"OUT{n:02}" for n in range(3, 12))]
SHORT_XL = ["BASE", "IN04", "IN05", "IN07", "IN08", "M00", *(f"OUT{n:02}" for n in range(6))]


def lora(seed: int, rank: int, modules: Mapping[str, object] | Sequence[str], *, peft: bool = False) -> Tensors:
    roles = ("lora_B", "lora_A") if peft else ("lora_up", "lora_down")
    made: Tensors = {}
    for number, module in enumerate(modules):
        up, down = numbers(OUT, rank, seed=seed + number), numbers(rank, IN, seed=seed + number + 500)
        made |= {f"{module}.{role}.weight": value for role, value in zip(roles, (up, down), strict=True)}
        made |= {} if peft else {f"{module}.alpha": torch.tensor(rank / 2)}
    return made


def product(adapter: Tensors, module: str) -> torch.Tensor:
    """Of a module, in float64; 0 where the adapter has none."""
    for up, down in itertools.product(("lora_up", "lora_B"), ("lora_down", "lora_A")):
        if f"{module}.{up}.weight" in adapter and f"{module}.{down}.weight" in adapter:
            factors = [adapter[f"{module}.{role}.weight"].double() for role in (up, down)]
            alpha = adapter.get(f"{module}.alpha", torch.tensor(float(factors[1].shape[0])))
            return float(alpha) / factors[1].shape[0] * factors[0] @ factors[1]
    return torch.zeros(OUT, IN, dtype=torch.float64)


def merge(folder: Path, adapters: Mapping[str, Tensors], weights: Mapping[str, Any], **recipe: Any) -> Tensors:
    entries = [
        {"model": str(save_model(folder / f"{name}.safetensors", own)), "parameters": {"weight": weights[name]}}
        for name, own in adapters.items()
    ]
    output = folder / "sum.safetensors"
    streammerge.merge({"merge_method": "linear", "models": entries, **recipe}, output=output, force=True)
    return load_model(output)


def check(made: Tensors, adapters: Mapping[str, Tensors], shares: Mapping[str, Mapping[str, float]]) -> None:
    """`shares` has of each module how much of each adapter is in it."""
    assert {name.partition(".lora_")[0] for name in made if ".lora_" in name} == set(shares)
    for module, own in shares.items():
        wanted = torch.stack([share * product(adapters[name], module) for name, share in own.items()]).sum(0)
        assert torch.allclose(product(made, module), wanted, atol=1e-6), module


@pytest.mark.parametrize(
    ("modules", "order"),
    [
        *((SD1, ORDER), (SD1, ORDER[1:]), (SD1, SHORT), ({**SD1, **SD1_CONVS}, ORDER)),
        *((SDXL, ORDER_XL), (SDXL, ORDER_XL[1:]), (SDXL, SHORT_XL), (SDXL, ORDER)),
    ],
)
def test_lists_of_values_are_of_blocks(tmp_path, modules, order):
    adapters = {"a": lora(1, 2, modules), "b": lora(40, 3, modules)}
    values = [0.1 * number - 0.7 for number in range(1, len(order) + 1)]
    found = merge(tmp_path, adapters, {"a": {"blocks": values}, "b": 0.5})
    by_block = {"BASE": 1.0} | dict(zip(order, values, strict=True))
    check(found, adapters, {module: {"a": by_block[block], "b": 0.5} for module, block in modules.items()})


def test_values_have_blocks_names_components_and_elements(tmp_path):
    adapters = {"a": lora(1, 2, SDXL), "b": lora(40, 3, SDXL)}
    setting = {"blocks": {"CLIPL": 0, "CLIPG": 2, "IN00-IN05": 0.25, "default": 1}, "elements": "OUT00:attn1:-1"}
    found = merge(tmp_path, adapters, {"a": setting, "b": 0.5})
    shares = dict(zip(SDXL, (0, 2, 0.25, 1, 1, -1, 1), strict=True))
    check(found, adapters, {module: {"a": share, "b": 0.5} for module, share in shares.items()})
    assert found[f"{next(iter(SDXL))}.lora_down.weight"].shape[0] == 3  # of what has no weight nothing is written


def test_sd1_has_one_text_encoder(tmp_path):
    adapters = {"a": lora(1, 2, SD1)}
    found = merge(tmp_path, adapters, {"a": {"blocks": {"CLIP": 0.5, "default": 2}}})
    check(found, adapters, {module: {"a": 0.5 if "_te_" in module else 2} for module in SD1})


def test_presets_are_of_blocks(tmp_path):
    adapters = {"a": lora(1, 2, SD1)}
    found = merge(tmp_path, adapters, {"a": {"blocks": "GRAD_V"}}, parameters={"weight": 1})
    grad = {block: abs(1 - number / 12) for number, block in enumerate(ORDER[1:])}
    shares = {module: {"a": grad[block]} for module, block in SD1.items() if grad.get(block)}
    check(found, adapters, shares)


@pytest.mark.parametrize("is_first", [True, False])
def test_dialects_may_differ(tmp_path, is_first):
    """A value goes by what a module means, and a filter by any of its names, whichever adapter comes first."""
    one, other = lora(1, 2, SDXL), lora(40, 3, tuple(XL_IN_DIFFUSERS.values()), peft=True)
    other = {
        name.replace(".lora_A", ".lora.down").replace(".lora_B", ".lora.up"): value for name, value in other.items()
    }
    adapters = {"a": one, "b": other}
    adapters = adapters if is_first else dict(reversed(adapters.items()))
    by_block = {"blocks": dict(zip(ORDER_XL, range(1, 21), strict=True))}
    for filters in (
        ("down_blocks.1", "up_blocks"),
        ("input_blocks_4_", "output_blocks.5."),
        ("input_blocks.4.", "_5_1"),
    ):
        by_name = [{"filter": filters[0], "value": 3}, {"filter": filters[1], "value": 0}, {"value": 7}]
        made = merge(tmp_path, adapters, {"a": by_block, "b": by_name}, low_rank={"rank": 5, "names": "kohya"})
        for number, (module, theirs) in enumerate(XL_IN_DIFFUSERS.items()):
            up, down = (other[f"{theirs}.lora.{role}.weight"].double() for role in ("up", "down"))
            wanted = (ORDER_XL.index(SDXL[module]) + 1) * product(one, module) + (3, 0, 7)[number] * up @ down
            assert torch.allclose(product(made, module), wanted, atol=1e-5), module


@pytest.mark.parametrize("way", [{"rank": 5}, {"energy": 1.0}, {"rank": 1}])
def test_sums_to_a_rank_have_the_same_weights(tmp_path, way):
    adapters = {"a": lora(1, 2, SD1), "b": lora(40, 3, SD1)}
    values = {"blocks": [0.1 * number for number in range(1, 27)]}
    made = merge(tmp_path, adapters, {"a": values, "b": 0.5}, low_rank=way)
    for module, block in SD1.items():
        share = values["blocks"][ORDER.index(block)]
        wanted = share * product(adapters["a"], module) + 0.5 * product(adapters["b"], module)
        if way == {"rank": 1}:
            u, s, v = torch.linalg.svd(wanted)
            wanted = s[0] * u[:, :1] @ v[:1]
        assert torch.allclose(product(made, module), wanted, atol=1e-5), module


def test_other_methods_have_parameters_by_block(tmp_path):
    adapters = {"a": lora(1, 2, SD1), "b": lora(40, 3, SD1)}
    density = {"blocks": {"BASE": 1, "IN00-IN11": 0.4, "default": 0.7}}
    made, alone = {}, {}
    for name, value in (("made", density), ("1", 1), ("0.4", 0.4), ("0.7", 0.7)):
        (tmp_path / name).mkdir()
        settings = {"merge_method": "ties", "parameters": {"density": value}, "low_rank": {"rank": 5}}
        alone[name] = merge(tmp_path / name, adapters, {"a": 1, "b": 1}, **settings)
    made = alone.pop("made")
    for module, block in SD1.items():
        wanted = alone["1" if block == "BASE" else "0.4" if block.startswith("IN") else "0.7"]
        assert torch.equal(product(made, module), product(wanted, module))
    assert not torch.equal(product(alone["1"], module), product(alone["0.7"], module))


@pytest.mark.parametrize("names", ["kohya", "peft"])
def test_gradients_go_over_layers(tmp_path, names, capsys):
    form = {
        "kohya": "lora_te_text_model_encoder_layers_{}_mlp_fc1",
        "peft": "base_model.model.model.layers.{}.mlp.up_proj",
    }
    modules = [form[names].format(number) for number in (0, 1, 2, 4)]
    paths = []
    for name, seed, rank in (("a", 1, 2), ("b", 40, 3)):
        (tmp_path / name).mkdir()
        save_model(tmp_path / name / "adapter_model.safetensors", lora(seed, rank, modules, peft=names == "peft"))
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
        if names == "peft":
            (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
        paths.append(str(tmp_path / name / ("adapter_model.safetensors" * (names == "kohya"))))
    models = [
        {"model": path, "parameters": {"weight": weight}} for path, weight in zip(paths, ([0, 1], 2), strict=True)
    ]
    report = streammerge.merge({"merge_method": "linear", "models": models}, output=tmp_path / "sum")
    made = load_file(next((tmp_path / "sum").glob("*.safetensors")))
    own = [load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab"]
    for module, share in zip(modules, (0, 0.25, 0.5, 1), strict=True):
        wanted = share * product(own[0], module) + 2 * product(own[1], module)
        assert torch.allclose(product(made, module), wanted, atol=1e-6)
    assert any(
        "stretched over the layers that the adapters have, which may not be all: 5 of " in n for n in report.notes
    )


def test_what_is_baked_is_as_if_each_had_been(tmp_path):
    """The sum by block, baked into a model, is what both are there with the same weights."""
    attentions = "input_blocks.4.1.transformer_blocks.1.attn1.to_q", "input_blocks.8.1.transformer_blocks.9.attn2.to_v"
    dotted = (*attentions, "middle_block.1.proj_in", "output_blocks.5.1.proj_in")
    names = {f"lora_unet_{name.replace('.', '_')}": name for name in dotted}
    own = {f"model.diffusion_model.{name}.weight": numbers(OUT, IN, seed=n) for n, name in enumerate(names.values())}
    own["model.diffusion_model.output_blocks.8.0.x.weight"] = numbers(3)
    adapters = [lora(1, 2, names), lora(40, 3, names)]
    weights = [{"blocks": [0.1 * number for number in range(20)]}, [{"filter": "attn", "value": 2}, {"value": -1}]]
    both = bake(tmp_path, own, *adapters, weights=weights)
    (tmp_path / "sum").mkdir()
    made = merge(tmp_path / "sum", dict(zip("ab", adapters, strict=True)), dict(zip("ab", weights, strict=True)))
    once = bake(tmp_path, own, made)
    for name in own:
        assert torch.allclose(both[name], once[name], atol=1e-5), name


FLUX = [
    *(f"diffusion_model.double_blocks.{number}.img_attn.proj" for number in range(19)),
    *(f"diffusion_model.single_blocks.{number}.linear2" for number in range(38)),
]


def test_blocks_of_flux_are_all_there_or_named(tmp_path):
    whole = {"a": lora(1, 1, FLUX)}
    values = [0.1 * number for number in range(1, 58)]
    found = merge(tmp_path, whole, {"a": {"blocks": values}})
    check(found, whole, {module: {"a": value} for module, value in zip(FLUX, values, strict=True)})
    part = {"a": lora(1, 1, FLUX[:-3])}
    with pytest.raises(RecipeError, match="adapters alone don't tell how many blocks a Flux has"):
        merge(tmp_path, part, {"a": {"blocks": values[:-3]}})
    found = merge(tmp_path, part, {"a": {"blocks": {"D00-D18": 2, "default": -1}}})
    check(found, part, {module: {"a": 2 if "double" in module else -1} for module in FLUX[:-3]})


@pytest.mark.parametrize(
    ("modules", "weight", "words"),
    [
        (
            ["lora_unet_mid_block_attentions_0_proj_in"],
            {"blocks": {"M00": 1, "default": 0}},
            "Stable Diffusion 1, 2 or XL",
        ),
        ({**SD1, **SD1_CONVS}, {"blocks": [1] * 17}, "17 values by block, and a UNet has 26 blocks"),
        (SD1, {"blocks": [1] * 20}, "20 values by block"),
        (SD1, {"blocks": {"OUT12": 1}}, "a UNet has no block 'OUT12'"),
        (SD1, {"blocks": {"IN00": 1}, "elements": "OUT03:nothing:1"}, "fits no tensor"),
        (["lora_unet_strange_3_thing_x"], [0, 1], "nobody can tell from strange_3_thing_x"),
        (["lora_unet_strange_3_thing_x"], {"blocks": {"IN03": 1}}, "values by block need blocks that have names"),
        (SD1, [{"filter": "nowhere", "value": 1}], "no condition of .*'s weight fits the tensor"),
        (["diffusion_model.blocks.3.self_attn.q"], {"blocks": [1, 2, 3, 4]}, "don't tell how many blocks"),
    ],
)
def test_what_nobody_can_tell_is_refused(tmp_path, modules, weight, words):
    for rank in ({}, {"low_rank": {"rank": 2}}):
        with pytest.raises(MergeError, match=words):
            merge(tmp_path, {"a": lora(1, 2, modules)}, {"a": weight}, **rank)
    assert not (tmp_path / "sum.safetensors").exists()


def test_the_program_takes_them_and_verifies(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    adapters = {name: lora(seed, 2, SD1) for name, seed in (("a", 1), ("b", 40))}
    for name, own in adapters.items():
        save_model(Path(f"{name}.safetensors"), own)
    words = ["a.safetensors", "b.safetensors", "-p", "weight=blocks:IN00-IN11=0.5,default=2", "-o", "sum.safetensors"]
    assert main([*words, "-v"]) == 0
    shares = {module: 0.5 if block.startswith("IN") else 2 for module, block in SD1.items()}
    check(load_model(Path("sum.safetensors")), adapters, {m: dict.fromkeys("ab", s) for m, s in shares.items()})
    assert main(["verify", "sum.safetensors", "--all", "-q", "a=a.safetensors", "b=b.safetensors"]) == 0
    first = load_model(Path("sum.safetensors"))
    for more in (["--threads", "1"], ["--resume"], ["--verify"]):
        assert main([*words, "--force", *more, "-q"]) == 0
        assert_same_bytes(load_model(Path("sum.safetensors")), first)


def test_modules_of_real_adapters_are_in_the_blocks_of_their_tensors():
    compared = 0
    for layout in LAYOUTS.values():
        model = layout.model()
        blocks, targets = Blocks.of(model), Targets(model)
        modules = [module for line in layout.modules for module in spelled(line)]
        addresses = Addresses(adapters_of(modules))
        try:
            seen = addresses.blocks.places
        except RecipeError:
            continue
        compared += 1
        for module in modules:
            found = targets.find(module, "weight")
            assert found is not None
            assert seen[addresses.of(module)] == blocks.places[found.tensors[0]]
    assert compared >= 19


def adapters_of(modules: Sequence[str]) -> Together:
    """An adapter that has these modules, of which nothing is asked but their names."""
    file = SimpleNamespace(roles={module: {} for module in modules}, configs={}, parameters={})
    return Together({"a": cast(Adapter, file)})
