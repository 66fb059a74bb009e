"""What the program tells of a method: its formula, its parameters, what it takes, and how it is called."""

from __future__ import annotations

import json
from typing import Any

from streammerge.methods.contract import Parameter
from streammerge.methods.registry import BlockMethod, GramMethod, LinearMethod, Method, Statistics, WholeMethod

BLOCK_BYTES = "1 MB"
"""What a block takes in float32."""


def describe_method(method: Method) -> dict[str, Any]:
    """A method for machines."""
    return {
        "name": method.name,
        "kind": method.kind,
        "formula": method.formula,
        "base": method.base,
        "models": list(method.models),
        "passes": passes(method),
        "memory": memory(method),
        "parameters": [
            {"name": p.name, "type": p.type, "takes": p.takes, "per_model": p.per_model, "default": p.default}
            for p in method.parameters
        ],
        "doc": method.doc,
        "example": example(method),
    }


def method_rows(method: Method) -> list[tuple[str, str]]:
    """What there is to know of a method beside its formula: a name and a text per row."""
    least, most = method.models
    models = f"{least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
    return [
        ("models", models + " beside the base" * (method.base == "required")),
        ("base", method.base),
        ("passes", passes(method)),
        ("RAM", memory(method)),
        *((f"-p {parameter.name}", parameter_text(parameter)) for parameter in method.parameters),
    ]


def parameter_text(parameter: Parameter) -> str:
    """`a number between 0 and 1, one per model; default 1.0`"""
    default = "required" if parameter.required else f"default {json.dumps(parameter.default)}"
    return f"{parameter.takes}{', one per model' * parameter.per_model}; {default}"


def passes(method: Method) -> str:
    """How often the inputs are read."""
    match method:
        case BlockMethod(statistics=Statistics(passes=wanted, scope=scope)) if wanted:
            of_model = {"model": " over the whole model", "tensor": ""}.get(scope, "")
            if method.parameter_names & {scope}:
                of_model = f" over the whole model with {scope}=model"
            return f"up to {1 + wanted}: {wanted} for statistics{of_model}, one that writes"
        case BlockMethod() | LinearMethod() | WholeMethod():
            return "1"
        case _:
            return "2: one for inner products, one that writes"


def memory(method: Method) -> str:
    """What a worker takes."""
    match method:
        case LinearMethod():
            return f"per worker two blocks of {BLOCK_BYTES}, however many models"
        case GramMethod():
            return f"per worker a block of {BLOCK_BYTES} of every input"
        case BlockMethod(needs=needs):
            unit = f"a block of {BLOCK_BYTES}" + ", or a row where one is longer," * (needs.rows is not None)
            more = f"{needs.temporaries_each} more per input, {needs.temporaries} beside"
            return f"per worker {unit} of every input, {more}"
        case WholeMethod():
            beside = " and matrices of its shorter side, which the plan counts" if method.held else ""
            return f"every input's whole tensor, and {method.temporaries + 1} of its size beside them{beside}"
        case _:
            return "unknown"


def example(method: Method) -> str:
    """A command that uses it."""
    needed = [f"-p {parameter.name}=0.5" for parameter in method.parameters if parameter.required]
    count = max(1 if method.models[1] == 1 else 2, method.models[0])
    models = [f"{letter}.safetensors" for letter in "abcdefgh"[:count]]
    base = ["--base base.safetensors"] * (method.base == "required")
    return " ".join(["streammerge", *models, "-m", method.name, *base, *needed, "-o merged.safetensors"])
