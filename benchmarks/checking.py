"""Is an output right? Names, shapes and dtypes of every tensor, and numbers against float64.

Models are opened with `safetensors` and `torch.load`, mapped, never with streammerge's own readers. Of element-wise
methods every tensor is checked, at its start, middle and end; of others a sample of whole tensors.

It is a process of its own, since a broken file may take the reader down: `python -m benchmarks.checking REQUEST.json`.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open

from benchmarks.cases import CASES, Case, Merge, adapted

PIECE: Final = 2**13
"""Elements compared at the start, in the middle and at the end of a tensor."""

SAMPLE: Final = 32
"""Whole tensors compared, of methods that look at whole tensors."""

LARGEST: Final = 2**22
"""Elements of the largest tensor that is compared whole."""

ONCE: Final = 1.0
"""Error, in units of the last place, of a result that was rounded once (half a unit, and what is near half)."""

SINGLE: Final = 2.0**-21
"""Error of arithmetic in float32, relative to the inputs' sizes: what is left where they cancel out."""

OFTEN: Final = 16.0
"""The same, relative to the inputs' sizes, of one that was rounded at every step in the stored dtype."""

STRAYS: Final = 1e-3
"""Share of elements that may fall on the other side of a threshold: of trimming, or of a sign."""

STRAYS_IF_ROUGH: Final = 0.03
"""The same where differences were rounded to the stored dtype before they were compared."""


@dataclass(frozen=True)
class Verdict:
    """What was found. `ok` if all tensors are there and right; `text` says it in words, in a few of them."""

    ok: bool
    text: str
    missing: int = 0
    extra: int = 0
    mismatched: int = 0
    wrong: int = 0
    rough: int = 0
    checked: int = 0


class Opened:
    """A model's tensors by name, mapped."""

    def __init__(self, path: Path) -> None:
        self.closing = contextlib.ExitStack()
        self._loaders: dict[str, Any] = {}
        for file in model_files(path):
            if file.suffix == ".safetensors":
                opened = self.closing.enter_context(safe_open(file, framework="pt"))
                self._loaders |= dict.fromkeys(opened.keys(), opened)
            else:
                self._loaders |= state_dict(file)

    @property
    def names(self) -> set[str]:
        """The names of its tensors."""
        return set(self._loaders)

    def __getitem__(self, name: str) -> torch.Tensor:
        found = self._loaders[name]
        tensor: torch.Tensor = found if isinstance(found, torch.Tensor) else found.get_tensor(name)
        return tensor

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """A tensor's shape and dtype."""
        tensor = self[name]
        return tuple(tensor.shape), tensor.dtype


def model_files(path: Path) -> list[Path]:
    """The files of a model: itself, those that the index of a folder names, or all that a folder has."""
    if path.is_file():
        return [path]
    for index in path.glob("*.index.json"):
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({path / name for name in found})
    for pattern in ("*.safetensors", "*.ckpt", "*.pt", "*.bin"):
        if files := sorted(path.rglob(pattern)):
            return files
    return []


def state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a torch zip, with the classes that the demo's checkpoints mention left inert by torch."""
    found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    found = found.get("state_dict", found)
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


@contextlib.contextmanager
def opened(models: Mapping[str, Path]) -> Iterator[dict[str, Opened]]:
    """Several models, closed afterwards."""
    with contextlib.ExitStack() as stack:
        found = {role: Opened(path) for role, path in models.items()}
        for model in found.values():
            stack.enter_context(model.closing)
        yield found


def check(merge: Merge, layout: str, models: Mapping[str, Path], output: Path) -> Verdict:
    """The output against what the merge of these models has to be."""
    if not model_files(output):
        return Verdict(False, "no output")
    with opened({**models, "": output}) as found:
        out = found.pop("")
        wanted = found[layout].names
        missing, extra = len(wanted - out.names), len(out.names - wanted)
        common = sorted(wanted & out.names)
        mismatched = {name for name in common if out[name].shape != found[layout][name].shape}
        casts = sum(out[name].dtype != found[layout][name].dtype for name in common)
        comparable = [name for name in common if name not in mismatched]
        results = [compare(merge, name, found, out[name]) for name in chosen(merge, comparable, out)]
    wrong, rough = results.count("wrong"), results.count("rough")
    text = told(len(wanted), missing, extra, len(mismatched), wrong, rough, len(results), casts)
    ok = not (missing or extra or mismatched or wrong) and bool(results)
    return Verdict(ok, text, missing, extra, len(mismatched), wrong, rough, len(results))


def told(
    total: int, missing: int, extra: int, mismatched: int, wrong: int, rough: int, checked: int, casts: int
) -> str:
    """The verdict in words."""
    parts = []
    if missing:
        parts.append(f"missing {missing:,} of {total:,} tensors")
    if extra:
        parts.append(f"{extra:,} tensors too many")
    if mismatched:
        parts.append(f"{mismatched:,} tensors of another shape")
    if wrong:
        parts.append(f"wrong numbers in {wrong:,} of {checked:,} tensors")
    if rough:
        parts.append(f"rounded more than once in {rough:,} of {checked:,}")
    if casts:
        parts.append(f"{casts:,} tensors of another dtype")
    return ", ".join(parts) or "right"


def chosen(merge: Merge, names: Sequence[str], out: Opened) -> list[str]:
    """The tensors whose numbers are looked at: all, or a sample if they have to be read whole."""
    if elementwise(merge):
        return list(names)
    small = [name for name in names if out[name].numel() <= LARGEST]
    return small[:: max(1, len(small) // SAMPLE)]


def elementwise(merge: Merge) -> bool:
    """Whether a piece of the result depends on that piece of the inputs alone."""
    return merge.method in ("linear", "task_arithmetic")


def compare(merge: Merge, name: str, models: Mapping[str, Opened], out: torch.Tensor) -> str:
    """`right`, `rough` (rounded more than once) or `wrong`."""
    if merge.method == "bake":
        return baked(merge, name, models, out)
    found = out.flatten()
    taken = merge.taken_from(name)
    source = models[taken or merge.roles[0]][name].flatten()
    if taken or not source.is_floating_point():  # as the inputs have it: some tools store whole numbers as float16
        return worst(same(found[piece], source[piece]) for piece in pieces(found.numel()))
    inputs = {role: models[role][name].flatten() for role in merge.roles}
    parts = pieces(found.numel()) if elementwise(merge) else [slice(None)]
    return worst(close(merge, {role: inputs[role][part] for role in inputs}, found[part]) for part in parts)


def baked(merge: Merge, name: str, models: Mapping[str, Opened], out: torch.Tensor) -> str:
    """A tensor with the adapter in it, or as it was."""
    model, adapter = (models[role] for role in merge.models)
    up = f"{adapted(name)}.lora_up.weight"
    if up not in adapter.names:
        return same(out, model[name])
    product = adapter[up].double() @ adapter[up.replace("lora_up", "lora_down")].double()
    summed = Merge("sum", merge.models, weights=merge.weights)
    return close(summed, {"model": model[name], "lora": product.to(model[name].device)}, out)


def pieces(elements: int) -> list[slice]:
    """The start, the middle and the end."""
    starts = {0, max(0, elements // 2 - PIECE // 2), max(0, elements - PIECE)}
    return [slice(start, start + PIECE) for start in sorted(starts)]


def worst(verdicts: Iterator[str]) -> str:
    """The worst of several verdicts."""
    found = set(verdicts)
    return next((verdict for verdict in ("wrong", "rough") if verdict in found), "right")


def same(found: torch.Tensor, source: torch.Tensor) -> str:
    """Copied tensors have to be the same, but for a cast and back."""
    if torch.equal(found.double(), source.double()):
        return "right"
    unit = torch.finfo(source.dtype).eps * source.double().abs() if source.is_floating_point() else 0.0
    return "rough" if bool(((found.double() - source.double()).abs() <= unit).all()) else "wrong"


def close(merge: Merge, inputs: Mapping[str, torch.Tensor], found: torch.Tensor) -> str:
    """Whether numbers are as near as one rounding leaves them, or at least as several do."""
    exact = {role: values.double() for role, values in inputs.items()}
    wanted = reference(merge, exact)
    stored = next(iter(inputs.values())).dtype  # an output in a finer dtype is not held to its own
    unit = torch.finfo(stored).eps
    error = (found.double() - wanted).abs()
    tiny = torch.finfo(stored).smallest_normal * unit
    size = torch.stack([values.abs() for values in exact.values()]).amax(0)
    off = error > ONCE * unit * wanted.abs() + SINGLE * size + tiny
    far = error > OFTEN * unit * size + tiny
    strays, strays_if_rough = (0.0, 0.0) if merge.method != "ties" else (STRAYS, STRAYS_IF_ROUGH)
    allowed = max(strays * off.numel(), 2.0 if strays else 0.0)
    if not bool(torch.isfinite(found).all()):
        return "wrong"
    if int(off.sum()) <= allowed:
        return "right"
    return "rough" if int(far.sum()) <= max(allowed, strays_if_rough * off.numel()) else "wrong"


def reference(merge: Merge, exact: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The merge's formula on float64."""
    models = [exact[role] for role in merge.models]
    weights = merge.weights or (1.0,) * len(models)
    if merge.method == "linear":
        return weighted(models, weights) / sum(weights)
    if merge.method == "sum":
        return weighted(models, weights)
    if merge.method == "slerp":
        return slerp(models[0], models[1], merge.t)
    if merge.method not in ("ties", "task_arithmetic"):
        raise ValueError(f"there is no reference for {merge.method}")
    base = exact[merge.base]
    deltas = [model - base for model in models]
    return base + (ties(deltas, weights, merge.density) if merge.method == "ties" else weighted(deltas, weights))


def weighted(values: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Σ wᵢ xᵢ"""
    return torch.stack([weight * value for weight, value in zip(weights, values, strict=True)]).sum(0)


def slerp(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Along the arc from a to b; along the line where they are parallel."""
    lengths = a.norm() * b.norm()
    cosine = float(a @ b / lengths) if float(lengths) else 1.0
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = torch.acos(torch.tensor(cosine, dtype=torch.float64))
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def ties(deltas: Sequence[torch.Tensor], weights: Sequence[float], density: float) -> torch.Tensor:
    """Trim each to its largest, elect a sign by the weighted sum, average those who agree."""
    trimmed = []
    for delta in deltas:
        kept = int(density * delta.numel())
        mask = torch.zeros_like(delta)
        if kept:
            mask[delta.abs().topk(kept).indices] = 1.0
        trimmed.append(delta * mask)
    sign = torch.where(weighted(trimmed, weights) >= 0, 1.0, -1.0)
    agree = [(delta.sign() == sign).double() for delta in trimmed]
    total = weighted(agree, weights)
    mean = weighted([mask * delta for mask, delta in zip(agree, trimmed, strict=True)], weights)
    return mean / torch.where(total.abs() < 1e-8, torch.ones_like(total), total)


@dataclass(frozen=True)
class Request:
    """What is to be checked, in a form that another process reads."""

    case: str
    variant: str
    models: Mapping[str, str]
    output: str

    @property
    def merge(self) -> Merge:
        """The merge that is asked for."""
        case = CASES[self.case]
        return case.variants[self.variant] if self.variant else case.merge

    @property
    def layout(self) -> str:
        """Whose tensors the output has."""
        case: Case = CASES[self.case]
        return case.layout if case.layout in self.merge.roles else self.merge.roles[0]


def main(words: Sequence[str]) -> None:
    """Read a request, print the verdict as JSON."""
    torch.set_num_threads(2)
    request = Request(**json.loads(Path(words[0]).read_text(encoding="utf-8")))
    models = {role: Path(path) for role, path in request.models.items() if role in request.merge.roles}
    verdict = check(request.merge, request.layout, models, Path(request.output))
    print(json.dumps(asdict(verdict)))


if __name__ == "__main__":
    main(sys.argv[1:])
