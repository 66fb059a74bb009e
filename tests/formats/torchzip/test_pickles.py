"""Pickles are described: what torch writes, and whatever else Python pickles."""

from __future__ import annotations

import pickle
import pickletools
from collections import OrderedDict, defaultdict
from io import BytesIO

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streammerge.formats.torchzip.machine import Inert, PickledDict, kind
from streammerge.formats.torchzip.pickles import Unreadable
from streammerge.formats.torchzip.steps import _STEPS
from tests.formats.torchzip.opcodes import PROTOCOLS, describe, described, named, number, text

# --- Whatever Python pickles --------------------------------------------------------------------------------------

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.text(max_size=9)
    | st.floats()
    | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples()
        | st.tuples(inner)
        | st.tuples(inner, inner, inner, inner)
        | st.frozensets(st.integers(), max_size=3)
        | st.sets(st.text(max_size=3), max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 9) | st.tuples(st.none()), inner, max_size=4)
    ),
    max_leaves=20,
)


def check_alike(value: object, found: object) -> None:
    """A description tells of a plain value what it promises to tell."""
    if isinstance(value, dict):
        assert isinstance(found, PickledDict)
        assert len(found) == len(value)
        for (key, inner), (key_found, inner_found) in zip(value.items(), found.items(), strict=True):
            assert key == key_found if isinstance(key, str) else isinstance(key_found, Inert)
            check_alike(inner, inner_found)
    elif isinstance(value, tuple):
        assert isinstance(found, tuple)
        for inner, inner_found in zip(value, found, strict=True):
            check_alike(inner, inner_found)
    elif isinstance(value, int) and abs(value) >= 2**62:
        assert found == value or kind(found) == "int"
    elif value is None or isinstance(value, bool | int | str):
        assert found == value
        assert type(found) is type(value)
    else:
        assert isinstance(found, Inert)


@settings(max_examples=150)
@example(value=-(10**18), protocol=0)
@given(plain, st.sampled_from(PROTOCOLS))
def test_plain_values_of_every_protocol(value: object, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    check_alike(value, describe(data))
    check_alike(value, describe(pickletools.optimize(data)))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_large_plain_values(protocol: int) -> None:
    value = {
        "text": "é" * 500,
        "ascii": "a" * 4096,
        "items": {f"item {i}": (i, -i, i * 2**30, None, True) for i in range(3000)},
        "deep": (((((("bottom",),),),),),),
    }
    check_alike(value, describe(pickle.dumps(value, protocol)))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_data_among_the_values_is_passed_over(protocol: int) -> None:
    value = {"array": bytes(300_000), "list": list(range(5000)), "prose": "x" * 5000, "after": bytearray(5), "n": 1}
    found = describe(pickle.dumps(value, protocol))
    assert found["n"] == 1
    assert kind(found["prose"]) == "long str"
    assert all(isinstance(found[name], Inert) for name in ("array", "list", "after"))


class Custom(dict[str, int]):
    """A class of which the pickle knows only the name."""

    def __init__(self) -> None:
        super().__init__(a=1)
        self.state = [1, 2]


class Slotted:
    __slots__ = ("x",)

    def __init__(self) -> None:
        self.x = {1, 2}


class WithKeywords:
    def __getnewargs_ex__(self) -> tuple[tuple[int], dict[str, int]]:
        return (1,), {"a": 2}

    def __new__(cls, *arguments: int, **options: int) -> WithKeywords:
        return super().__new__(cls)


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("make", [Custom, Slotted, WithKeywords])
def test_objects_become_placeholders_that_know_their_class(make: type, protocol: int) -> None:
    found = describe(pickle.dumps({"object": make(), "n": 1}, protocol))
    assert found["n"] == 1
    assert isinstance(found["object"], Inert)
    assert not isinstance(found["object"], Unreadable)
    if make is not WithKeywords or protocol >= 4:  # else it is functools.partial that is called
        assert found["object"].name == f"{__name__}.{make.__qualname__}"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ordered_and_default_dicts_are_dicts(protocol: int) -> None:
    ordered = OrderedDict([("b", 1), ("a", 2)])
    ordered._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    found = describe(pickle.dumps((ordered, defaultdict(int, c=3)), protocol))
    assert list(found[0].items()) == [("b", 1), ("a", 2)]
    assert found[1] == {"c": 3}


def test_a_dict_made_of_a_list_is_not_mistaken_for_an_empty_one() -> None:
    found = described(named("collections.OrderedDict") + b"](" + text("k") + number(1) + b"e\x85R")
    assert isinstance(found, Inert)
    assert "dict" in found.name


def test_keys_that_are_no_strings_stay_apart() -> None:
    found = describe(pickle.dumps({0: "a", None: "b", (1, 2): "c", True: "d", 3.5: "e", "x": "f", "y" * 5000: "g"}))
    assert [kind(key) if isinstance(key, Inert) else key for key in found] == [
        "0",
        "None",
        "tuple",
        "True",
        "float",
        "x",
        "long str",
    ]
    assert list(found.values()) == list("abcdefg")


def test_a_key_given_twice_has_its_last_value_as_in_python() -> None:
    assert described(b"}(" + text("a") + number(1) + text("a") + number(2) + b"u") == {"a": 2}


@pytest.mark.parametrize("digits", ["0", "-7", "123456789012345678", "7L", "-7L"])
def test_numbers_in_digits(digits: str) -> None:
    assert described(b"L" + digits.encode() + b"\n") == int(digits.removesuffix("L"))
    assert described(b"I" + digits.encode() + b"\n") == int(digits.removesuffix("L"))


def test_every_opcode_of_every_protocol_is_known() -> None:
    documented = {opcode.code.encode("latin-1") for opcode in pickletools.opcodes}
    assert set(_STEPS) | {b"."} == documented


def test_what_follows_the_stop_is_not_read() -> None:
    assert describe(b"K\7.cos\nsystem\n") == 7


# --- What torch writes --------------------------------------------------------------------------------------------


def test_what_torch_pickles_is_described() -> None:
    """The zip around it is another test's business."""
    import zipfile

    import torch

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 2)
            self.register_buffer("steps", torch.tensor(5))

    net = Net()
    optimizer = torch.optim.Adam(net.parameters())
    net.linear(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    file = BytesIO()
    saved = {
        "net": net.state_dict(),
        "parameters": dict(net.named_parameters()),
        "optimizer": optimizer.state_dict(),
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
    }
    torch.save(saved, file)
    found = describe(zipfile.ZipFile(file).read("archive/data.pkl"))
    assert {name: tensor.shape for name, tensor in found["net"].items()} == {
        "linear.weight": (2, 3),
        "linear.bias": (2,),
        "steps": (),
    }
    assert [tensor.stride for tensor in found["parameters"].values()] == [(3, 1), (1,)]
    assert [kind(key) for key in found["optimizer"]["state"]] == ["0", "1"]
    assert found["size"] == (1, 2)
    assert kind(found["device"]) == "torch.device"
    assert kind(found["dtype"]) == "torch.float16"
