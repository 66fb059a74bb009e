"""Every tensor of a torch file is in the model, or named as left, or the file is refused."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from streammerge import open_model
from streammerge.errors import CheckpointError
from tests.make.models import assert_same_bytes


def save(folder: Path, contents: object) -> Path:
    torch.save(contents, folder / "x.pt")
    return folder / "x.pt"


def weights(*names: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(names))
    return {name: torch.randn(3, generator=generator) for name in names or ("l.weight", "l.bias")}


def check(path: Path, expected: dict[str, torch.Tensor], entry: str = "") -> tuple[int, tuple[str, ...]]:
    """The model at the path is what is expected; what is left."""
    with open_model(path, entry) as model:
        read = {name: model.read(name, 0, info.elements).reshape(info.shape) for name, info in model.tensors.items()}
        assert_same_bytes(read, expected)
        return model.left.count, model.left.first


def refused(path: Path, problem: str, entry: str = "") -> tuple[str, ...]:
    """What was found in a file that is refused."""
    with pytest.raises(CheckpointError, match=problem) as caught:
        open_model(path, entry)
    return caught.value.found


STATE = weights()
ADAM = {"state": {0: {"step": torch.ones(()), "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1, "params": [0]}]}

# ── where the model is ───────────────────────────────────────────────────────────────────────────────────────────────

FOUND: dict[str, tuple[Any, tuple[str, ...]]] = {
    "alone": (STATE, ()),
    "an ordered dict": (OrderedDict(STATE), ()),
    "Lightning": (
        {"state_dict": STATE, "optimizer_states": [ADAM], "callbacks": {"EMA": {"weights": weights("a.b")}}},
        ("optimizer_states.0.state.0.step", "optimizer_states.0.state.0.exp_avg", "callbacks.EMA.weights.a.b"),
    ),
    "a random generator's state beside": ({"model": STATE, "rng_state": torch.get_rng_state()}, ("rng_state",)),
    "a step beside, first": ({"global_step": torch.tensor(5), "model": STATE}, ("global_step",)),
    "wrapped twice": (
        {"model": {"state_dict": STATE, "model_args": {"dim": 3}}, "best": torch.ones(())},
        ("best",),
    ),
    "wrapped six times": ({"a": {"b": {"c": {"d": {"e": {"f": STATE}}}}}}, ()),
    "optimizer": ({"net": STATE, "optimizer": ADAM}, ("optimizer.state.0.step", "optimizer.state.0.exp_avg")),
    "an optimizer of another name": ({"x": STATE, "adam": ADAM}, ("adam.state.0.step", "adam.state.0.exp_avg")),
    "an optimizer in a flat dict": (
        STATE | {"optimizer": ADAM},
        ("optimizer.state.0.step", "optimizer.state.0.exp_avg"),
    ),
    "by name, of one layer": ({"module": weights("weight", "bias"), "mean": torch.ones(2)}, ("mean",)),
    "statistics beside": ({"model_state_dict": STATE, "norm": weights("mean", "std")}, ("norm.mean", "norm.std")),
    "an array beside": ({"generator": STATE, "fitness": np.ones(3)}, ("fitness",)),
    "tensors in a list beside": ({"ema": STATE, "history": [1, [torch.ones(2)]]}, ("history.1.0",)),
    "tensors in an object beside": (
        {"params_ema": STATE, "teacher": torch.nn.Linear(1, 1, bias=False)},
        ("teacher._parameters.weight",),
    ),
    "the same dict twice": ({"state_dict": STATE, "model": STATE}, ()),
    "the same tensor twice": ({"state_dict": STATE, "head": {"w": STATE["l.bias"]}}, ()),
    "a key that is no text beside": ({"params": STATE, 7: torch.ones(2), (1, 2): [torch.ones(1)]}, ("7", "tuple.0")),
    "a tensor as a key": ({"params": STATE, "seen": {torch.ones(2): 1}}, ("seen.(a key).0",)),
    "a set of tensors": ({"params": STATE, "seen": {torch.ones(2)}}, ("seen.0.0",)),
}


@pytest.mark.parametrize(("contents", "left"), FOUND.values(), ids=FOUND)
def test_the_state_dict_is_found_and_what_is_left_is_named(tmp_path, contents, left):
    expected = weights("weight", "bias") if "module" in contents else STATE
    count, first = check(save(tmp_path, contents), expected)
    assert count == len(left)
    if "seen" not in contents:
        assert set(first) == set(left)


WRAPPERS = [
    *(
        "state_dict",
        "model_state_dict",
        "model",
        "module",
        "net",
        "generator",
        "ema",
        "params_ema",
        "params",
        "weights",
    ),
    *("model_ema", "ema_state_dict", "state_dict_ema", "network", "modelStateDict", "anything", "x.y", "ünet"),
]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_usual_wrapper_is_one(tmp_path, wrapper):
    contents = {"epoch": 3, wrapper: STATE, "optimizer": ADAM, "rng_state": [1, 2], "args": {"lr": 0.1}}
    assert check(save(tmp_path, contents), STATE)[0] == 2


SEVERAL = {
    "an average": ({"params": STATE, "params_ema": STATE | {}}, ["params", "params_ema"]),
    "model and ema": ({"model": STATE, "ema": weights(), "step": 1}, ["model", "ema"]),
    "Lightning's and another": ({"state_dict": STATE, "ema": weights("a", "b")}, ["state_dict", "ema"]),
    "two networks": ({"d": weights("c.w"), "g": weights("c.w"), "d_optim": ADAM}, ["d", "g"]),
    "within one": (
        {"model": {"encoder": weights("a.b"), "decoder": weights("a.b")}},
        ["model.encoder", "model.decoder"],
    ),
    "a flat one and an average": (STATE | {"ema": weights()}, [".", "ema"]),
    "loose ones and others": ({"head": torch.ones(2), "encoder": {"w": torch.ones(3)}}, [".", "encoder"]),
    "a textual inversion": (
        {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": {"*": torch.ones(2, 3)}, "name": "x"},
        ["string_to_token", "string_to_param"],
    ),
    "two parts of a model": ({"encoder": weights("a.b", "c.d"), "head": weights("weight")}, ["encoder", "head"]),
    "a flat one and a part": ({"a.b": torch.ones(2), "c": {"d": torch.ones(1)}}, [".", "c"]),
    "Megatron's": (
        {"model": {"language_model": {"embedding": {"words": weights("weight")}, "encoder": weights("0.w", "1.w")}}},
        ["model.language_model.embedding.words", "model.language_model.encoder"],
    ),
    "many loose ones": ({**weights("a", "b", "c"), "model": weights("a", "b")}, [".", "model"]),
}


@pytest.mark.parametrize(("contents", "names"), SEVERAL.values(), ids=SEVERAL)
def test_where_several_fit_they_are_listed_and_each_can_be_chosen(tmp_path, contents, names):
    path = save(tmp_path, contents)
    found = refused(path, f"x.pt: {len(names)} dicts of tensors in it could be the model\n")
    assert [line.split("   ")[0] for line in found] == names
    total = len(list(tensors_of(contents, set())))
    for name in names:
        chosen = contents
        for key in [] if name == "." else name.split("."):
            chosen = chosen[key]
        expected = {key: value for key, value in chosen.items() if isinstance(value, torch.Tensor)}
        assert check(path, expected, name)[0] == total - len(expected)


LOST = {
    "under a number": ({1: torch.ones(2), "b": torch.ones(2)}, ("1",)),
    "under bytes": ({b"a": torch.ones(2), "b": torch.ones(2)}, ("_codecs.encode",)),
    "under a tuple": ({("a", 1): torch.ones(2), "b": torch.ones(2)}, ("tuple",)),
    "in a list of parameters": (
        {"b": torch.ones(2), "l": torch.nn.ParameterList([torch.ones(3)])},
        ("l._parameters.0",),
    ),
    "in a dict": ({"model": {"a.b": torch.ones(2), "c": {"d": torch.ones(1)}}}, ("model.c.d",)),
    "in a list": ({"a.b": torch.ones(2), "c": [1, (2, torch.ones(1))]}, ("c.1.1",)),
    "in a whole module": ({"a.b": torch.ones(2), "m": torch.nn.Linear(1, 1, bias=False)}, ("m._parameters.weight",)),
    "in a module beside a loose tensor": (
        {"rng_state": torch.ones(2), "model": torch.nn.Linear(1, 1, bias=False)},
        ("model._parameters.weight",),
    ),
    "in a wrapped dict": ({"state_dict": {"a": torch.ones(1), "l": [torch.ones(1)]}}, ("state_dict.l.0",)),
    "under a long name": ({"a" * 5000: torch.ones(1), "b": torch.ones(1)}, ("long str",)),
}


@pytest.mark.parametrize(("contents", "names"), LOST.values(), ids=LOST)
def test_tensors_within_the_state_dict_are_never_lost(tmp_path, contents, names):
    path = save(tmp_path, contents)
    assert (
        refused(path, "1 tensor lies deeper than those of the state dict, or has no name, and would be lost") == names
    )
    entry = next((key for key in ("state_dict", "model") if isinstance(contents.get(key), dict)), ".")
    chosen = contents.get(entry, contents)
    own = {name: value for name, value in chosen.items() if isinstance(value, torch.Tensor) and isinstance(name, str)}
    assert check(path, {name: value for name, value in own.items() if len(name) < 4096}, entry) == (1, names)


def test_a_small_file_of_too_many_lists_is_refused(tmp_path):
    refused(save(tmp_path, {"model": STATE, "seen": [(number,) for number in range(90_000)]}), "far more than tensors")
    check(save(tmp_path, {"model": STATE, "seen": [(number,) for number in range(20_000)]}), STATE)


def test_tensors_that_a_parameter_carries_are_not_lost(tmp_path):
    """As bitsandbytes' parameters carry the statistics of their codes."""
    parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.uint8), requires_grad=False)
    parameter.__dict__["quant_state"] = {"absmax": torch.ones(2)}
    assert refused(save(tmp_path, {"l.weight": parameter}), "1 tensor lies deeper") == (
        "l.weight.(state).0.quant_state.absmax",
    )


LAYER = torch.nn.Linear(1, 1, bias=False)


@pytest.mark.parametrize(
    ("contents", "chosen", "part"),
    [
        (
            {"token": {"*": torch.ones(1)}, "param": torch.nn.ParameterDict({"*": torch.ones(2)})},
            "token",
            "param._parameters.*",
        ),
        ({"encoder": STATE, "head": LAYER, "step": torch.ones(1)}, "encoder", "head._parameters.weight"),
        ({"encoder": STATE, "heads": [weights("w")]}, "encoder", "heads.0.w"),
        ({"model": {"state_dict": STATE, "head": LAYER}}, "model.state_dict", "model.head._parameters.weight"),
        (
            {"net": {"encoder": STATE, "layers": [{"w": torch.ones(1)}], "step": torch.ones(1)}},
            "net.encoder",
            "net.layers.0.w",
        ),
    ],
)
def test_what_may_be_another_part_of_the_model_is_not_left_without_a_choice(tmp_path, contents, chosen, part):
    found = refused(save(tmp_path, contents), "it can't be told which of its tensors are the model")
    assert [line.split("   ")[0] for line in found] == [chosen, part]


@pytest.mark.parametrize(
    "contents",
    [
        {5: torch.ones(1)},
        [STATE],
        {768: (STATE, STATE)},
        torch.nn.Linear(2, 2),
        {"model": torch.nn.Linear(2, 2), "epoch": 1},
        {"optimizer": ADAM},
        {"a": {"b": {}}},
    ],
)
def test_without_a_dict_of_named_tensors_there_is_no_model(tmp_path, contents):
    refused(save(tmp_path, contents), "it holds no dict of tensors; found at its top level:")


# ── choosing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_entry_may_have_dots_in_its_keys(tmp_path):
    contents = {"a.b": {"c": weights("x.y")}, "a": {"b": {"d.e": weights("x.z")}, "b.f": weights("x.w")}}
    path = save(tmp_path, contents)
    assert check(path, weights("x.y"), "a.b.c")[0] == 2
    assert check(path, weights("x.z"), "a.b.d.e")[0] == 2
    assert check(path, weights("x.w"), "a.b.f")[0] == 2


def test_an_entry_that_could_be_two_dicts_is_none(tmp_path):
    path = save(tmp_path, {"a.b": weights("x.y"), "a": {"b": weights("x.z")}})
    assert refused(path, "2 dicts in it are called 'a.b'", "a.b") == ("a.b   1 tensor", "a.b   1 tensor")


def test_an_entry_that_is_not_there_lists_what_is(tmp_path):
    path = save(tmp_path, {"params": STATE, "params_ema": weights("a.b"), "epoch": 1})
    for entry in ("ema", "epoch", "params.l", "params.", ".params", "params.l.weight"):
        found = refused(path, f"x.pt: there is no dict {entry!r} in it", entry)
        assert found == ("params   2 tensors", "params_ema   1 tensor")


def test_an_entry_without_tensors_is_no_model(tmp_path):
    refused(save(tmp_path, {"params": STATE, "args": {"lr": 1}}), "it holds no dict of tensors", "args")


def test_an_entry_of_safetensors_is_an_error(tmp_path):
    from safetensors.torch import save_file

    save_file(STATE, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "is safetensors, which has no dicts", "params")


# ── whatever is saved ────────────────────────────────────────────────────────────────────────────────────────────────

KEYS = ["model", "ema", "state_dict", "a.w", "w", "b", "optimizer", "state", "param_groups", "x", 0, b"k", (1,), None]


@st.composite
def values(draw: st.DrawFn, depth: int = 3) -> Any:
    kinds = ["tensor", "tensor", "plain", "array", "parameter"]
    kinds += ["dict", "dict", "dict", "ordered", "list", "tuple", "module", "shared"] if depth else []
    kind = draw(st.sampled_from(kinds))
    inner = values(depth - 1)
    match kind:
        case "tensor":
            return torch.full((draw(st.integers(0, 3)),), draw(st.integers(0, 99)))
        case "parameter":
            return torch.nn.Parameter(torch.ones(draw(st.integers(0, 2))))
        case "plain":
            return draw(st.sampled_from([None, 1, 2.5, "text", b"bytes", 2**80, frozenset(), torch.float16]))
        case "array":
            return np.ones(2)
        case "dict" | "ordered":
            keys = draw(st.lists(st.sampled_from(KEYS), unique=True, max_size=4))
            made = {key: draw(inner) for key in keys}
            return made if kind == "dict" else OrderedDict(made)
        case "module":
            return torch.nn.ParameterList([torch.ones(1)] * draw(st.integers(0, 2)))
        case "shared":
            one = draw(inner)
            return [one, {"again": one}]
        case _:
            made_list = draw(st.lists(inner, max_size=3))
            return made_list if kind == "list" else tuple(made_list)


def tensors_of(value: object, seen: set[int]) -> Iterator[torch.Tensor | np.ndarray[Any, Any]]:
    """Every tensor and array in plain values, dicts, lists and modules, each once."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor | np.ndarray):
        yield value
        return
    parts: list[object] = []
    if isinstance(value, dict):
        parts = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set):
        parts = list(value)
    elif isinstance(value, torch.nn.Module):
        parts = [value.__dict__]
    for part in parts:
        yield from tensors_of(part, seen)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values(), st.sampled_from(["", ".", "model", "state_dict", "model.ema"]))
def test_every_tensor_is_in_the_model_or_left_or_the_file_is_refused(tmp_path, contents, entry):
    path = save(tmp_path, contents)
    existing = list(tensors_of(contents, set()))
    with contextlib.suppress(CheckpointError), open_model(path, entry) as model:
        assume(model.tensors)
        assert len(model.tensors) + model.left.count == len(existing)
        assert len(model.left.first) == min(model.left.count, 5)
        held = [tensor for tensor in existing if isinstance(tensor, torch.Tensor)]
        for name, info in model.tensors.items():
            read = model.read(name, 0, info.elements).reshape(info.shape)
            assert any(tensor.dtype == read.dtype and torch.equal(tensor, read) for tensor in held)


# ── files as they are met ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_state_dict_of_any_module_is_taken_whole(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.LSTM(4, 2))
    for module in (model, torch.nn.DataParallel(model), torch.nn.Linear(2, 3)):
        assert check(save(tmp_path, module.state_dict()), dict(module.state_dict())) == (0, ())
        assert check(save(tmp_path, {"model": module.state_dict(), "epoch": 1}), dict(module.state_dict())) == (0, ())


def test_views_and_odd_dtypes_are_read_as_torch_does(tmp_path):
    whole = torch.arange(24.0)
    contents = {
        "a.tail": whole[10:].reshape(7, 2),
        "a.turned": whole.reshape(4, 6).T,
        "a.expanded": torch.ones(1).expand(3, 2),
        "a.none": torch.zeros(0, 3),
        "a.bf16": torch.ones(3, dtype=torch.bfloat16),
        "a.complex": torch.ones(3, dtype=torch.complex64),
        "a.scalar": torch.tensor(3),
    }
    path = save(tmp_path, contents)
    assert check(path, torch.load(path, weights_only=True)) == (0, ())
