"""What the program tells of a method is true of it."""

from __future__ import annotations

import pytest

from streammerge.cli.manual import describe_method, example, memory, method_rows, parameter_text, passes
from streammerge.methods import METHODS, find_method


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("linear", "1"),
        ("nearswap", "1"),
        ("truncate_rank", "1"),
        ("slerp", "2: one for inner products, one that writes"),
        ("arcee_fusion", "up to 4: 3 for statistics, one that writes"),
        ("emr", "up to 2: 1 for statistics over the whole model, one that writes"),
        ("ties", "up to 3: 2 for statistics over the whole model with scope=model, one that writes"),
    ],
)
def test_passes(name, text):
    assert passes(find_method(name)) == text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("linear", "per worker two blocks of 1 MB, however many models"),
        ("slerp", "per worker a block of 1 MB of every input"),
        ("ties", "per worker a block of 1 MB of every input, 1 more per input, 14 beside"),
        ("della", "or a row where one is longer, of every input"),
        ("truncate_rank", "every input's whole tensor, and 1 of its size beside them and matrices of its shorter side"),
    ],
)
def test_memory(name, text):
    assert text in memory(find_method(name))


@pytest.mark.parametrize(
    ("name", "parameter", "text"),
    [
        ("ties", "density", "a number between 0 and 1, one per model; default 1.0"),
        ("ties", "scope", 'one of tensor, model; default "tensor"'),
        ("dare_ties", "rescale", "true or false; default true"),
        ("truncate_rank", "rank", "a whole number at least 0; default 8"),
        ("slerp", "t", "; required"),
    ],
)
def test_parameters(name, parameter, text):
    found = find_method(name).parameter(parameter)
    assert found is not None
    assert text in parameter_text(found)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_described(name):
    method = METHODS[name]
    described = describe_method(method)
    assert described["example"] == example(method)
    rows = dict(method_rows(method))
    assert rows["passes"] == described["passes"]
    assert rows["RAM"] == described["memory"] != "unknown"
    assert [f"-p {parameter['name']}" for parameter in described["parameters"]] == [
        row for row in rows if row[0] == "-"
    ]
    assert method.formula
    assert "\n\n" in method.doc, "a source follows the formula"


def test_examples_name_what_is_needed():
    assert (
        example(find_method("slerp"))
        == "streammerge a.safetensors b.safetensors -m slerp -p t=0.5 -o merged.safetensors"
    )
    nearswap = "streammerge a.safetensors -m nearswap --base base.safetensors -p t=0.5 -o merged.safetensors"
    assert example(find_method("nearswap")) == nearswap
