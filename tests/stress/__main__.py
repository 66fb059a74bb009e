"""`python -m tests.stress [NAME ...]`: run campaigns and write what came of them into tests/RELIABILITY.md."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from streammerge import __version__
from tests.stress.campaign import Campaign, Effort, Figure
from tests.stress.campaigns import CAMPAIGNS

RESULTS = Path(__file__).parent / "results"
REPORT = Path(__file__).parent.parent / "RELIABILITY.md"


def main() -> int:
    """Run the campaigns that are named, or all; the exit code is 1 if any trial failed."""
    by_name = {campaign.name: campaign for campaign in CAMPAIGNS}
    parser = argparse.ArgumentParser(prog="python -m tests.stress", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(by_name)}; default: all")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full number of trials")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in by_name]:
        parser.error(f"there is no campaign {', '.join(unknown)}; there are {', '.join(by_name)}")
    failures = 0
    for name in arguments.names or by_name:
        figures = run_campaign(by_name[name], arguments.scale, arguments.seed)
        failures += sum(figure.failures for figure in figures)
    if arguments.scale >= 1:
        REPORT.write_text(report(), encoding="utf-8")
    return 1 if failures else 0


def run_campaign(campaign: Campaign, scale: float, seed: int) -> list[Figure]:
    """Run one campaign in a folder of its own, show its figures, and keep those of a full one."""
    print(f"{campaign.title} ...", flush=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="streammerge-stress-") as folder:
        figures = campaign.run(Effort(scale, seed, Path(folder)))
    seconds = time.perf_counter() - started
    for figure in figures:
        print(f"  {figure.what}: {figure.trials:,} tried, {figure.failures:,} failed; {figure.outcome}", flush=True)
    if scale >= 1:
        RESULTS.mkdir(exist_ok=True)
        kept = {
            "title": campaign.title,
            "seconds": round(seconds),
            "seed": seed,
            "date": datetime.date.today().isoformat(),
            "version": __version__,
            "platform": f"Python {platform.python_version()}, {platform.system()}",
            "figures": [asdict(figure) for figure in figures],
        }
        (RESULTS / f"{campaign.name}.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return figures


def report() -> str:
    """The report in Markdown, from the results that are kept."""
    lines = [
        "# What was done to streammerge, and what came of it",
        "",
        "Made by `make stress` (`python -m tests.stress`). A hundredth of each campaign runs with the tests.",
    ]
    for campaign in CAMPAIGNS:
        path = RESULTS / f"{campaign.name}.json"
        if not path.exists():
            continue
        kept = json.loads(path.read_text(encoding="utf-8"))
        lines += ["", f"## {kept['title']}", "", "| what | tried | failed | outcome |", "| --- | ---: | ---: | --- |"]
        for figure in kept["figures"]:
            lines.append(f"| {figure['what']} | {figure['trials']:,} | {figure['failures']:,} | {figure['outcome']} |")
        made = f"{kept['seconds']:,} s, {kept['date']}, streammerge {kept['version']}, {kept['platform']}"
        lines += ["", f"`python -m tests.stress {campaign.name} --seed {kept['seed']}`: {made}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
