"""streammerge itself as one of the tools."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import yaml

from benchmarks.cases import Case, Merge
from benchmarks.tools import CannotRun, Command, Job, Tool

NAME: Final = "streammerge"


def recipe(merge: Merge, layout: str) -> dict[str, Any]:
    """The merge as streammerge's recipe, whose inputs the command line binds."""
    weights = dict(zip(merge.models, merge.weights, strict=False))
    written: dict[str, Any] = {
        "inputs": {role: f"the case's {role}" for role in merge.roles},
        "merge_method": merge.method,
        "models": [
            {"model": role, "parameters": {"weight": weights[role]}} if role in weights else {"model": role}
            for role in merge.models
        ],
        "parameters": {**own_parameters(merge), **merge.parameters},
        "layout": layout,
    }
    if merge.base:
        written["base_model"] = merge.base
    if merge.takes:
        written["rules"] = [{"match": take.match, "take": take.model} for take in merge.takes]
    return written


def own_parameters(merge: Merge) -> dict[str, float]:
    """What the compared methods are told beside their weights."""
    if merge.parameters:
        return {}
    return {"slerp": {"t": merge.t}, "ties": {"density": merge.density}}.get(merge.method, {})


def command(job: Job, merge: Merge, layout: str, *options: str) -> Command:
    """The merge as a user types it."""
    output = ["-o", str(job.output / "merged.safetensors"), "--report", str(job.timing), "-q"]
    if merge.method == "bake":
        model, *adapters = merge.models
        given = [f"{job.models[role]}:{weight:g}" for role, weight in zip(adapters, merge.weights[1:], strict=True)]
        words = ("bake", str(job.models[model]), *given, *output, *options)
        return Command((str(job.python), "-m", "streammerge", *words))
    path = job.scratch / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(merge, layout)), encoding="utf-8")
    bound = [f"{role}={job.models[role]}" for role in merge.roles]
    return Command((str(job.python), "-m", "streammerge", str(path), *bound, *output, *options))


def as_is(*options: str) -> Callable[[Job], Command]:
    """The case's own merge, with these options."""
    return lambda job: command(job, job.case.merge, job.case.layout, *options)


def on_cuda(job: Job) -> Command:
    """The case's own merge on the GPU."""
    if not has_cuda():
        raise CannotRun("there is no CUDA device here")
    return command(job, job.case.merge, job.case.layout, "--no-sync", "--device", "cuda")


@functools.cache
def has_cuda() -> bool:
    """Whether torch finds a CUDA device."""
    import torch

    return torch.cuda.is_available()


STREAMMERGE: Final = Tool(NAME, "streammerge", as_is("--no-sync"))
SYNCED: Final = Tool(f"{NAME}-sync", "streammerge, with the final sync", as_is())
CUDA: Final = Tool(f"{NAME}-cuda", "streammerge --device cuda", on_cuda)


def variant(name: str, merge: Merge) -> Tool:
    """Another merge of a case's inputs, as a tool of its own."""

    def run(job: Job) -> Command:
        layout = job.case.layout if job.case.layout in merge.roles else merge.roles[0]
        return command(job, merge, layout, "--no-sync")

    return Tool(variant_name(name), f"streammerge: {name}", run)


def variant_name(name: str) -> str:
    """What the tool of a variant is called."""
    return f"{NAME}:{name}"


def own_tools(case: Case) -> list[Tool]:
    """streammerge without and with the final sync, on a GPU if there is one, and its variants of the case."""
    variants = [variant(name, merge) for name, merge in case.variants.items()]
    return [STREAMMERGE, *([SYNCED, CUDA] if case.peers else []), *variants]
