"""What a merge shows while it runs, and when it is done."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from streammerge.errors import format_size, one_line

if TYPE_CHECKING:
    from streammerge.report import Progress, Report, Watch

PLAIN_INTERVAL: Final = 5.0
"""Seconds between the lines that are printed where there is no terminal."""


@contextlib.contextmanager
def watching(what: str, *, quiet: bool) -> Iterator[Watch | None]:
    """Show progress on stderr: a bar on a terminal, a line now and then elsewhere, nothing if quiet."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar(what) as watch:
            yield watch
    else:
        yield _lines(what)


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Watch]:
    """A bar in bytes, with the rate, the time left, and the memory taken."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[memory]}"),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, memory="")

        def watch(progress: Progress) -> None:
            bar.update(
                task,
                description=progress.stage or what,
                total=progress.total_bytes,
                completed=progress.done_bytes,
                memory=memory_now(),
            )

        yield watch


def _lines(what: str) -> Watch:
    last = time.monotonic()
    begun: dict[str, tuple[float, int]] = {}

    def watch(progress: Progress) -> None:
        nonlocal last
        now, doing = time.monotonic(), progress.stage or what
        # neither what went before, such as the import of torch, nor what an earlier run did says how fast it goes
        since, before = begun.setdefault(doing, (now, progress.done_bytes))
        if now - last >= PLAIN_INTERVAL:
            last = now
            share = progress.done_bytes / progress.total_bytes if progress.total_bytes else 1.0
            rate = (progress.done_bytes - before) / (now - since) if now > since else 0.0
            left = f"{(progress.total_bytes - progress.done_bytes) / rate:.0f} s left, " if rate > 0 else ""
            say_on_stderr(f"{doing}: {share:.0%}, {format_size(rate)}/s, {left}{memory_now()}")

    return watch


def memory_now() -> str:
    """The memory that the process takes at the moment, on the CUDA device too if it uses one."""
    from streammerge.compute.machine import resident_bytes

    shown = f"RAM {format_size(resident_bytes())}"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        shown += f", VRAM {format_size(torch.cuda.memory_allocated())}"
    return shown


def show_report(report: Report, *, quiet: bool) -> None:
    """The final table, and what to look at."""
    if not quiet:
        show_table(report.rows())
    for warning in report.warnings():
        say_on_stderr(one_line(f"warning: {warning}"))


def show_table(rows: Sequence[tuple[str, str]]) -> None:
    """Two columns: a rich table on a terminal, aligned text elsewhere; a row stays one, whatever files are called."""
    rows = [(label, one_line(text)) for label, text in rows]
    if not sys.stdout.isatty():
        width = max(len(label) for label, _ in rows)
        say("\n".join(f"{label:<{width}}  {text}" for label, text in rows))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    for label, text in rows:
        table.add_row(Text(label), Text(text))
    Console().print(table)


def say(text: Any = "") -> None:  # noqa: ANN401
    """Print to stdout."""
    print(text)


def say_on_stderr(text: str) -> None:
    """Print to stderr."""
    print(text, file=sys.stderr, flush=True)


def telling(*, quiet: bool) -> Callable[[str], None]:
    """Says on stderr what is being done, or nothing."""
    return (lambda _: None) if quiet else lambda line: say_on_stderr(one_line(line))
