"""RAM and time of streammerge and of the tools that people would otherwise use, measured side by side.

python -m benchmarks run                 every case, every tool; resumes where it was stopped
python -m benchmarks run --cases ties --tools streammerge mergekit-pytorch --again
python -m benchmarks cuda                all that a machine with a card is to tell, in eight minutes at most
python -m benchmarks report              the report and the plots, from all results that there are
python -m benchmarks list                cases and tools
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import environments, inputs, report, results
from benchmarks.card_merges import FEW, MERGES
from benchmarks.cases import CASES, Case
from benchmarks.cuda import BUDGET, CudaSettings, measure_card
from benchmarks.peers import PEERS
from benchmarks.running import CaseRunner, Settings, all_tools, quickly
from streammerge.cli.main import INTERRUPTED, stopping_on_signals


def main(words: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 1 if a case broke down."""
    arguments = parser().parse_args(words)
    if arguments.command == "list":
        list_all()
        return 0
    if arguments.command == "report":
        print(f"written: {report.write(arguments.results)}")
        return 0
    with stopping_on_signals():
        return measure_card(cuda_settings(arguments), say) if arguments.command == "cuda" else run(arguments)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = made.add_subparsers(dest="command", required=True, metavar="run | cuda | report | list")
    runner = commands.add_parser("run", help="measure", description="Measure cases, one after the other.")
    runner.add_argument("--cases", nargs="+", metavar="CASE", choices=[*CASES], help="only these (see: list)")
    runner.add_argument("--tools", nargs="+", metavar="TOOL", default=[], help="only these (see: list)")
    runner.add_argument("--runs", type=int, default=5, metavar="N", help="rounds of a case, fewer of some (default: 5)")
    runner.add_argument("--folder", type=Path, default=Path("bench"), metavar="DIR", help="a place with 60 GB of room")
    runner.add_argument(
        "--budget",
        type=float,
        default=90.0,
        metavar="SECONDS",
        help="for the warm runs of one tool in one case; half of it for cold ones (default: 90)",
    )
    runner.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="for one run (default: 600)")
    runner.add_argument("--quick", action="store_true", help="miniatures: to see that everything works")
    runner.add_argument("--again", action="store_true", help="measure cases again that have results")
    runner.add_argument("--newer", metavar="DATE", default="", help="measure again what is older than this, 2026-11-30")
    runner.add_argument("--keep", action="store_true", help="keep the inputs")
    runner.add_argument("--remark", default="", metavar="TEXT", help="what the report is to say of the conditions")
    runner.add_argument("--no-cold", action="store_true", help="leave out the cold runs")
    runner.add_argument("--no-limits", action="store_true", help="leave out the search of the smallest memory")
    runner.add_argument("--no-install", action="store_true", help="skip peers whose environment is not there")
    runner.add_argument("--reinstall", action="store_true", help="try environments again that could not be made")
    on_card = commands.add_parser("cuda", help="measure a card", description="Measure card and CPU side by side.")
    on_card.add_argument("--folder", type=Path, default=Path("bench"), metavar="DIR", help="a place with 25 GB of room")
    on_card.add_argument(
        "--budget", type=float, default=BUDGET, metavar="SECONDS", help="after which no part begins (default: 430)"
    )
    on_card.add_argument("--quick", action="store_true", help="miniatures, on the CPU: to see that everything works")
    on_card.add_argument("--dry", action="store_true", help="miniatures, by a card's words, on a stand-in")
    on_card.add_argument("--keep", action="store_true", help="keep the models, 16 GB, to measure again sooner")
    on_card.add_argument("--commit", metavar="TEXT", default="", help="what is measured, where git can't tell")
    commands.add_parser("list", help="show cases and tools")
    reporter = commands.add_parser("report", help="make the report and the plots", description="Make the report.")
    for one in (runner, on_card, reporter):
        one.add_argument("--results", type=Path, metavar="DIR", help="where results are (default: benchmarks/results)")
    reporter.set_defaults(results=results.FOLDER)
    return made


def run(arguments: argparse.Namespace) -> int:
    """Measure the cases that are asked for and have no results yet, then make the report."""
    settings = settings_from(arguments)
    if arguments.reinstall:
        environments.forget_failures(settings.folder)
    chosen = [CASES[name] for name in arguments.cases or CASES]
    waiting = [case for case in chosen if arguments.again or not is_done(case, settings, arguments.newer)]
    say(f"{len(waiting)} of {len(chosen)} cases to measure, about {minutes(sum(map(guess, waiting)))}")
    broken = 0
    started, guessed = time.monotonic(), 0.0
    for number, case in enumerate(waiting, 1):
        elapsed = time.monotonic() - started
        left = sum(map(guess, waiting[number - 1 :])) * (elapsed / guessed if guessed else 1.0)
        say(f"── {case.name} ({number} of {len(waiting)}; {minutes(elapsed)} so far, about {minutes(left)} left)")
        broken += not measure_case(case, settings, arguments.tools)
        guessed += guess(case)
        if not arguments.keep and not any(later.input_set == case.input_set for later in waiting[number:]):
            shutil.rmtree(inputs.set_folder(case, settings.folder, quick=settings.quick), ignore_errors=True)
    say(f"written: {report.write(settings.results)}")
    return 1 if broken else 0


def cuda_settings(arguments: argparse.Namespace) -> CudaSettings:
    """How to measure a card; of miniatures nothing is repeated."""
    folder: Path = arguments.folder.absolute()
    quick: bool = arguments.quick or arguments.dry
    place = arguments.results or (folder / "results-quick" if quick else results.FOLDER)
    settings = CudaSettings(folder, place, arguments.budget, quick, arguments.keep, arguments.commit)
    few = replace(settings, merges=FEW, swept=FEW[:1], threads=(2,), rounds=1)
    return replace(few, merges=MERGES, stands_in=True) if arguments.dry else few if quick else settings


def settings_from(arguments: argparse.Namespace) -> Settings:
    """How to measure; results of miniatures never go to where those of full size are."""
    folder: Path = arguments.folder.absolute()
    place = arguments.results or (folder / "results-quick" if arguments.quick else results.FOLDER)
    settings = Settings(
        folder=folder,
        runs=arguments.runs,
        budget=arguments.budget,
        timeout=arguments.timeout,
        cold=not arguments.no_cold,
        limits=not arguments.no_limits,
        install=not arguments.no_install,
        keep=arguments.keep,
        remark=arguments.remark,
        results=place,
    )
    return quickly(settings) if arguments.quick else settings


def measure_case(case: Case, settings: Settings, wanted: Sequence[str]) -> bool:
    """Measure one case; False, with the traceback shown, if that broke down."""
    started = time.monotonic()

    def tell(text: str) -> None:
        say(f"{time.monotonic() - started:6.0f} s  {text}")

    try:
        result = CaseRunner(case, all_tools(case, PEERS, wanted), settings, tell).run()
    except Exception:  # noqa: BLE001, RUF100  (whatever happens in one case, the others are measured)
        traceback.print_exc()
        return False
    if result.skipped:
        tell(f"skipped: {result.skipped}")
    return True


def is_done(case: Case, settings: Settings, newer: str) -> bool:
    """Whether there are whole results of a case, and none older than asked for."""
    path = settings.results / f"{case.name}.json"
    if not path.exists():
        return False
    found = results.load(path)
    return found.complete and found.date >= newer and found.quick == settings.quick


def guess(case: Case) -> float:
    """Seconds that a case takes, roughly: as long as last time, or by its size."""
    path = results.FOLDER / f"{case.name}.json"
    if path.exists() and (took := results.load(path).took):
        return took
    gigabytes = inputs.SETS[case.input_set].nbytes(quick=False) / 1e9
    tools = len(all_tools(case, PEERS))
    return 20 + gigabytes * (8 + 3 * tools) + 60 * case.thorough * tools


def minutes(seconds: float) -> str:
    """`12 min`"""
    return f"{seconds / 60:.0f} min"


def list_all() -> None:
    """Print the cases with their tools."""
    for case in CASES.values():
        gigabytes = inputs.SETS[case.input_set].nbytes(quick=False) / 1e9
        print(f"{case.name:<18} {gigabytes:5.1f} GB  {case.title}")
    tools = {tool.name: tool.title for case in CASES.values() for tool in all_tools(case, PEERS)}
    print()
    for name, title in tools.items():
        if ":" not in name:
            print(f"{name:<18} {title}")


def say(text: str) -> None:
    """Print at once, for whoever watches."""
    print(text, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("stopped; what was measured is kept, and the same command goes on from there")
        sys.exit(INTERRUPTED)
