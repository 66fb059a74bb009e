"""The article's job in full size: RAM, time against copying the same bytes, time against the usual script.

    python -m benchmarks.article --folder /some/disk --runs 5

Every run is measured between two copies of the same bytes (`cat` of the inputs, `cp` of one output), because machines
are shared and disks are moody: what counts is the ratio in one run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from streammerge import __version__
from streammerge.demo.files import DemoModels, make_models


@dataclass(frozen=True)
class Run:
    """One measurement: seconds of the floor before and after, of the merge loop, of the whole process; peak RAM.

    Beside it, if it was asked for, the usual script's time and RAM in the same minute.
    """

    floor: float
    loop: float
    process: float
    peak_rss: int
    script: float = 0.0
    script_rss: int = 0


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print; with --json, write the figures too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("bench"), help="where models and outputs go (11 GB)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--weights", default="0.5,0.5", help="of depth and waifu")
    parser.add_argument("--io", default="auto", choices=["auto", "mmap", "pread"])
    parser.add_argument("--sync", action="store_true", help="with the final sync, which the usual script never does")
    parser.add_argument("--naive", action="store_true", help="the usual script too (10 GB of RAM)")
    parser.add_argument(
        "--limit", type=int, metavar="MB", help="also run in a memory cgroup of this size (Linux, root)"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args(words)
    models = find_or_make(arguments.folder)
    job = command(models, arguments)
    runs = [measure(job, models, arguments.folder, naive=arguments.naive) for _ in range(arguments.runs)]
    figures: dict[str, Any] = {
        "case": "SD 2 article, three float16 files",
        "weights": arguments.weights,
        "io": arguments.io,
        "sync": arguments.sync,
        "date": date.today().isoformat(),
        "version": __version__,
        "machine": machine(),
        "import_torch_rss": import_torch_rss(),
        "runs": [asdict(run) for run in runs],
        "median": medians(runs),
    }
    if arguments.limit:
        figures["cgroup"] = {"megabytes": arguments.limit, "exit_code": limited(job, arguments.limit)}
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def find_or_make(folder: Path) -> DemoModels:
    """The three models in full size, made if they aren't there."""
    names = ("512-base-ema", "512-depth-ema", "wd-1-4-anime_e2")
    paths = [folder / f"{name}.safetensors" for name in names]
    if all(path.exists() for path in paths):
        return DemoModels(*paths)
    return make_models(folder, full=True)


def command(models: DemoModels, arguments: argparse.Namespace) -> list[str]:
    """The merge as a user types it."""
    depth, waifu = arguments.weights.split(",")
    inputs = [f"depth={models.depth}:{depth}", f"base={models.base}", f"waifu={models.waifu}:{waifu}"]
    words = ["--recipe", "sd2-depth", *inputs, "-o", str(output(arguments.folder)), "--io", arguments.io, "-q"]
    return [sys.executable, "-m", "streammerge", *words, *([] if arguments.sync else ["--no-sync"])]


def output(folder: Path) -> Path:
    """Where the merge goes."""
    return folder / "out.safetensors"


def measure(job: list[str], models: DemoModels, folder: Path, *, naive: bool) -> Run:
    """One merge between two floors; everything in the page cache, nothing left to be written back."""
    report = folder / "report.json"
    before = floor(models, folder)
    output(folder).unlink(missing_ok=True)
    os.sync()
    process = timed(lambda: subprocess.run([*job, "--report", str(report)], check=True))
    found = json.loads(report.read_text())
    output(folder).unlink()
    after = floor(models, folder)
    script, script_rss = run_script(models, folder) if naive else (0.0, 0)
    return Run(
        floor=(before + after) / 2,
        loop=found["seconds"]["merge"],
        process=process,
        peak_rss=found["peak_rss_bytes"],
        script=script,
        script_rss=script_rss,
    )


def floor(models: DemoModels, folder: Path) -> float:
    """Seconds of `cat inputs > /dev/null; cp one output`."""
    copy = folder / "copy.tmp"
    inputs = [str(path) for path in (models.base, models.depth, models.waifu)]
    with Path(os.devnull).open("wb") as nowhere:
        seconds = timed(lambda: subprocess.run(["cat", *inputs], stdout=nowhere, check=True))
    os.sync()
    seconds += timed(lambda: subprocess.run(["cp", str(models.depth), str(copy)], check=True))
    copy.unlink()
    os.sync()
    return seconds


def run_script(models: DemoModels, folder: Path) -> tuple[float, int]:
    """The usual script's seconds and peak RAM."""
    script = Path(__file__).with_name("naive.py")
    words = [sys.executable, str(script), *map(str, (models.base, models.depth, models.waifu, output(folder)))]
    process = subprocess.Popen(words)
    started = time.perf_counter()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    output(folder).unlink()
    os.sync()
    if status:
        raise RuntimeError("the usual script failed")
    return seconds, usage.ru_maxrss * 1024


def limited(job: list[str], megabytes: int) -> int:
    """The exit code of a merge in a memory cgroup of its own."""
    group = Path("/sys/fs/cgroup/memory") / f"streammerge-bench-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(megabytes * 1000 * 1000))
        enter = f'echo $$ > {group}/cgroup.procs && exec "$@"'
        return subprocess.run(["sh", "-c", enter, "sh", *job, "--force"], check=False).returncode
    finally:
        group.rmdir()


def medians(runs: list[Run]) -> dict[str, float]:
    """The figures that are compared with the targets."""
    return {
        "floor": statistics.median(run.floor for run in runs),
        "loop": statistics.median(run.loop for run in runs),
        "process": statistics.median(run.process for run in runs),
        "loop_over_floor": statistics.median(run.loop / run.floor for run in runs),
        "peak_rss": max(run.peak_rss for run in runs),
        "script": statistics.median(run.script for run in runs),
        "script_over_process": statistics.median(run.script / run.process for run in runs),
        "script_rss": max(run.script_rss for run in runs),
    }


def import_torch_rss() -> int:
    """The peak RAM of a process that imports torch and nothing else: the base line."""
    words = "import torch; print(open('/proc/self/status').read())"
    told = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True).stdout
    return next(int(line.split()[1]) * 1024 for line in told.splitlines() if line.startswith("VmHWM:"))


def machine() -> dict[str, str]:
    """What it ran on."""
    import safetensors
    import torch

    return {
        "system": platform.platform(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
    }


def timed(action: Callable[[], object]) -> float:
    """Seconds that the action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
