"""Measurements of tools in a case, made up."""

from __future__ import annotations

from benchmarks import checking
from benchmarks.cases import CASES
from benchmarks.limits import Limit
from benchmarks.results import CaseResult, Run, ToolResult
from streammerge.compute.machine import MIB
from streammerge.tools.bench.floor import Floor
from streammerge.tools.bench.measuring import Measured, Sample

GB = 1_000_000_000


def process(wall: float, rss: int = 300 * MIB) -> Measured:
    curve = tuple(Sample(wall * place / 10, rss * place // 10, rss * place // 20) for place in range(1, 11))
    return Measured("done", 0, wall, wall * 2, rss, rss // 2, curve=curve)


def tool_result(name: str, walls: list[float], loop: float = 0.0, rss: int = 300 * MIB, **more: object) -> ToolResult:
    runs = [Run(number, process(wall, rss), loop * wall) for number, wall in enumerate(walls)]
    return ToolResult(name, name, {"torch": "2.0"}, warm=runs, check=checking.Verdict(True, "right"), **more)  # type: ignore[arg-type]


def case_result(name: str = "article-fp16", **more: object) -> CaseResult:
    machine = dict.fromkeys(("system", "processor", "cores", "python", "torch", "safetensors", "cuda"), "")
    machine["ram_bytes"] = str(24 * GB)
    values: dict[str, object] = {
        "tools": [
            tool_result("streammerge", [2.0, 4.0, 3.0], 0.5, limit=Limit(160 * MIB, 150 * MIB, 5, True)),
            tool_result("streammerge:base-read", [4.0, 8.0, 6.0], 0.5),
            tool_result("script", [20.0, 44.0], rss=9000 * MIB),
        ],
        "floors": [[Floor(0.5, 0.5), Floor(1.0, 0.0)], [Floor(1.0, 1.0)], [Floor(1.0, 1.0)]],
        "input_bytes": 8 * GB,
        "output_bytes": 3 * GB,
        "import_torch_rss": 270 * MIB,
        "complete": True,
    }
    values |= more
    return CaseResult(name, CASES[name].title, "2026-01-01", "abc", "0.1", False, machine, **values)  # type: ignore[arg-type]
