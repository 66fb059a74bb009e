"""What is measured: each case is a merge of certain inputs, described once for every tool.

A tool reads the description (`Case`, `Merge`) and turns it into its own words; the checker computes the same in
float64. Nothing here knows of any tool.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Final, Literal

from streammerge.methods import METHODS
from streammerge.methods.registry import Method

Family = Literal["sd1", "sd2", "sdxl", "llama", "other"]
Container = Literal["safetensors", "ckpt", "shards"]


@dataclass(frozen=True)
class Take:
    """Tensors whose name matches are copied from one of the models, unchanged."""

    match: str
    model: str


@dataclass(frozen=True)
class Merge:
    """A merge in the field's common words; models and base are roles, the names under which a case has its inputs.

    linear            Σ wᵢ θᵢ / Σ wᵢ
    task_arithmetic   θ₀ + Σ wᵢ (θᵢ − θ₀)
    slerp             between the two models, at t
    ties              trimmed to the density, sign elected by the weighted sum, weighted mean of those who agree
    bake              W + w · B A: the first model with the second, an adapter, in it

    Takes are tried in order, the first that matches holds; what matches none is merged. Other methods, with
    `parameters` of their own, are streammerge's alone and are measured against its linear merge.
    """

    method: str
    models: tuple[str, ...]
    base: str = ""
    weights: tuple[float, ...] = ()
    t: float = 0.5
    density: float = 1.0
    takes: tuple[Take, ...] = ()
    parameters: Mapping[str, float | bool] = field(default_factory=dict)

    @property
    def roles(self) -> tuple[str, ...]:
        """Every input, the base first if there is one."""
        return (self.base, *self.models) if self.base else self.models

    def taken_from(self, name: str) -> str:
        """The model that a tensor is copied from; "" if it is merged."""
        return next((take.model for take in self.takes if fnmatchcase(name, take.match)), "")


@dataclass(frozen=True)
class Case:
    """One job: its inputs by role, what they are, and the merge. The output has the tensors of `layout`'s model.

    `inputs` names the set of files, which cases may share; by default it is the case's own. `variants` are merges of
    the same files that only streammerge runs, to be compared with its own run of the case. `peers` is false where
    nothing but streammerge is measured; `thorough` is true where peers too run with a cold cache and in ever smaller
    memory, which takes long. `rounds` bounds how many there are, in cases that would take hours.
    """

    name: str
    title: str
    family: Family
    dtype: Literal["F16", "BF16", "F32"]
    container: Container
    merge: Merge
    layout: str
    variants: Mapping[str, Merge] = field(default_factory=dict)
    peers: bool = True
    thorough: bool = False
    rounds: int | None = None
    inputs: str = ""

    @property
    def input_set(self) -> str:
        """The name of its set of files."""
        return self.inputs or self.name


GIGABYTES: Final = ("0.3", "1", "3", "10", "30")
MODELS: Final = (2, 4, 8, 16, 32, 64)

UNET: Final = "model.diffusion_model."

ARTICLE_TAKES: Final = (
    Take(f"{UNET}input_blocks.0.0.weight", "depth"),  # 5 input channels, elsewhere 4
    Take("first_stage_model.*", "waifu"),
    Take("cond_stage_model.*", "depth"),
    Take("depth_model.*", "depth"),
)


def article(depth: float, waifu: float) -> Merge:
    """The article's merge: the UNet by task arithmetic, the VAE from waifu, everything else from the depth model."""
    return Merge("task_arithmetic", ("depth", "waifu"), "base", (depth, waifu), takes=ARTICLE_TAKES)


def adapted(name: str) -> str:
    """What the benchmarks' LoRA calls the module of a tensor; nothing of one that it doesn't change."""
    module = name.removeprefix(UNET).removesuffix(".weight")
    is_changed = name.startswith(UNET) and ".transformer_blocks." in name and name.endswith(".weight")
    return f"lora_unet_{module.replace('.', '_')}" if is_changed else ""


SIXTEEN: Final = tuple(f"m{number:02}" for number in range(1, 17))

SD2_LINEAR: Final = Merge("linear", ("a", "b"), weights=(0.7, 0.3))
SD2_ARITHMETIC: Final = Merge("task_arithmetic", ("a", "b"), "base", (0.5, 0.4))

COMPARED: Final = (
    Case(
        name="article-fp16",
        title="the article: three SD 2 checkpoints, float16",
        family="sd2",
        dtype="F16",
        container="safetensors",
        merge=article(0.5, 0.5),
        layout="depth",
        variants={"base-read": article(0.5, 0.4)},
        thorough=True,
    ),
    Case(
        name="article-fp32-ckpt",
        title="the article: three SD 2 checkpoints, float32 .ckpt",
        family="sd2",
        dtype="F32",
        container="ckpt",
        merge=article(0.5, 0.5),
        layout="depth",
    ),
    Case(
        name="sdxl",
        title="weighted sum of two SDXL checkpoints, float16",
        family="sdxl",
        dtype="F16",
        container="safetensors",
        merge=Merge("linear", ("a", "b"), weights=(0.6, 0.4)),
        layout="a",
    ),
    Case(
        name="bake",
        title="a LoRA of rank 128 put into SDXL, float16",
        family="sdxl",
        dtype="F16",
        container="safetensors",
        merge=Merge("bake", ("model", "lora"), weights=(1.0, 0.8)),
        layout="model",
    ),
    Case(
        name="slerp",
        title="SLERP of two SD 2 checkpoints, float16",
        family="sd2",
        dtype="F16",
        container="safetensors",
        merge=Merge("slerp", ("a", "b"), t=0.3),
        layout="a",
        variants={"linear": SD2_LINEAR},
        inputs="sd2",
    ),
    Case(
        name="ties",
        title="TIES of two SD 2 checkpoints over their base, float16",
        family="sd2",
        dtype="F16",
        container="safetensors",
        merge=Merge("ties", ("a", "b"), "base", (1.0, 1.0), density=0.3),
        layout="base",
        variants={"linear": SD2_ARITHMETIC},
        inputs="sd2",
    ),
    Case(
        name="llama",
        title="task arithmetic of three Llamas of 3 billion parameters, bfloat16 shards",
        family="llama",
        dtype="BF16",
        container="shards",
        merge=Merge("task_arithmetic", ("a", "b"), "base", (0.5, 0.4)),
        layout="base",
    ),
    Case(
        name="sixteen",
        title="weighted mean of sixteen small models, float16",
        family="sd1",
        dtype="F16",
        container="safetensors",
        merge=Merge("linear", SIXTEEN, weights=tuple(float(number) for number in range(1, 17))),
        layout="m01",
    ),
    Case(
        name="one-tensor",
        title="weighted sum of two models of one tensor of 4 GB, float16",
        family="other",
        dtype="F16",
        container="safetensors",
        merge=Merge("linear", ("a", "b"), weights=(0.6, 0.4)),
        layout="a",
    ),
)
"""The cases that tools are compared in."""


def scaling() -> Iterator[Case]:
    """Merges by streammerge alone of ever more bytes, and of ever more models."""
    for gigabytes in GIGABYTES:
        yield Case(
            name=f"scale-{gigabytes}GB",
            title=f"weighted sum of two models, {gigabytes} GB together",
            family="other",
            dtype="F16",
            container="safetensors",
            merge=Merge("linear", ("a", "b"), weights=(0.6, 0.4)),
            layout="a",
            peers=False,
        )
    for count in MODELS:
        roles = tuple(f"m{number:02}" for number in range(1, count + 1))
        yield Case(
            name=f"scale-{count}-models",
            title=f"weighted mean of {count} models of 0.1 GB",
            family="other",
            dtype="F16",
            container="safetensors",
            merge=Merge("linear", roles, weights=tuple(float(number) for number in range(1, count + 1))),
            layout="m01",
            peers=False,
            inputs="scale-models",
        )


def every_method() -> Case:
    """Every method of the registry that streams, on SD 2's UNet, with the linear merge as the case itself.

    Those of whole matrices hold what they decompose, so there is no bound to show, and take minutes to hours each.
    """
    streaming = sorted(name for name, method in METHODS.items() if method.kind != "whole")
    return Case(
        name="methods",
        title="every method that streams, on the UNet of SD 2, float16",
        family="sd2",
        dtype="F16",
        container="safetensors",
        merge=Merge("linear", ("a", "b"), weights=(0.6, 0.4)),
        layout="a",
        variants={name: any_merge(METHODS[name]) for name in streaming},
        peers=False,
        rounds=3,
        inputs="unet",
    )


def any_merge(method: Method) -> Merge:
    """A merge by this method of two models, and the base if need be; numbers it needs, and densities, are 0.5."""
    least, most = method.models
    count = min(max(least, 2), 2 if most is None else most)
    base = "base" if method.base == "required" else ""
    halved = [one.name for one in method.parameters if one.required or one.name == "density"]
    needed = dict.fromkeys(halved, 0.5)
    return Merge(method.name, ("a", "b", "base")[:count], base, parameters=needed)


CASES: Final[Mapping[str, Case]] = {case.name: case for case in (*COMPARED, every_method(), *scaling())}
"""Every case, in the order of the report."""
