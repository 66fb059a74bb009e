"""How a merge begins where others may have been: running, interrupted, or finished but for the names."""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from streammerge.errors import OutputError, format_size, output_errors
from streammerge.formats.descriptors import sync_folder
from streammerge.plan.plan import Plan
from streammerge.report import Progress, Watch
from streammerge.storage.fingerprint import Fingerprint, can_be_told, differences, fingerprint_of, request_of
from streammerge.storage.finished import is_finished
from streammerge.storage.journal import Journal, journal_path, lock_journal
from streammerge.storage.ledger import Ledger
from streammerge.storage.placing import put_in_place, tidy_up
from streammerge.storage.records import JOURNAL_SUFFIX
from streammerge.storage.target import files_in, find_older
from streammerge.storage.writer import OutputWriter

Tell = Callable[[str], None]
"""Takes a line for the user."""


@dataclass
class Beginning:
    """A merge that has its output to itself.

    `journal` holds what an earlier run left, if the merge goes on with it.
    """

    plan: Plan
    journal: Journal
    is_there: bool = False
    """Whether the output is in place already, as far as its headers tell."""
    _identity: Fingerprint | None = None

    def identity(self) -> Fingerprint:
        """The plan's fingerprint."""
        if self._identity is None:
            self._identity = fingerprint_of(self.plan)
        return self._identity

    def request(self) -> Fingerprint:
        """As much of it as costs nothing."""
        return request_of(self.plan)

    @property
    def can_be_resumed(self) -> bool:
        """Whether it is worth writing down what is on the disk."""
        return self.plan.options.sync and can_be_told(self.plan)

    @property
    def present_bytes(self) -> int:
        """What the files that are gone on with take on the disk."""
        if not self.journal.contents.can_resume(self.journal.folder):
            return 0
        found = [self.journal.folder / name for name in self.journal.contents.temporaries]
        return sum(allocated_bytes(path) for path in found if path.exists())

    @property
    def is_complete(self) -> bool:
        """Whether an earlier run wrote everything, and was stopped while files got their names."""
        return self.journal.contents.placing is not None

    def finish(self) -> None:
        """Give the files their names."""
        placing = self.journal.contents.placing
        assert placing is not None
        check_expected(self.journal)
        with output_errors(self.plan.output.path):
            put_in_place(placing, self.journal.folder, sync=self.plan.options.sync)


@contextmanager
def beginning(plan: Plan, tell: Tell) -> Iterator[Beginning]:
    """Take the output for this run, and look for what is left of earlier ones.

    OutputError if another run has it, or if what is left was made of something else. In the end the journal stays if
    the temporary files do: who writes them says so by leaving them there.
    """
    path = journal_path(plan.output)
    with output_errors(plan.output.path):
        made = make_folders(path.parent)
    with ExitStack() as undoing:
        undoing.callback(remove_folders, made)
        begun = Beginning(plan, take(path, plan))
        undoing.callback(lambda: leave(begun.journal))
        if begun.journal.contents.problem:
            tell(f"note: {path.name}: {begun.journal.contents.problem}, and what follows is ignored")
        if plan.options.resume:
            _resume(begun, tell)
        else:
            _start_anew(begun, tell)
        yield begun


def take(path: Path, plan: Plan) -> Journal:
    """The journal of this output, which is its lock too; OutputError if another run has it."""
    with output_errors(plan.output.path):
        journal = lock_journal(path, create=True)
    if journal is None:
        raise OutputError(
            f"{plan.output.path}: another run of streammerge is writing this output",
            advice="Wait until it is done, or choose another name for the output.",
        )
    return journal


def leave(journal: Journal) -> None:
    """Remove the journal, unless there are files that it tells of."""
    contents = journal.contents
    names = [*contents.temporaries, *(contents.placing.retired if contents.placing else ())]
    try:
        if not any((journal.folder / name).exists() for name in names):
            journal.remove()
    except OSError:
        pass  # it stays, and is known for what it is
    finally:
        journal.close()


def _resume(begun: Beginning, tell: Tell) -> None:
    """Go on with the run that was interrupted, if there is one; OutputError if all there are made something else."""
    if not can_be_told(begun.plan):
        raise OutputError(
            f"{begun.plan.output.path}: a merge of models that are Python objects can't be resumed",
            advice="Nobody can tell whether such a model is the same as before. Leave out resume.",
        )
    begun.is_there = _is_there(begun.plan)
    if begun.is_there and begun.journal.contents.placing is None:
        return  # what an earlier run left of the same merge is of no use any more
    changes: list[str] = []
    for number, path in enumerate([begun.journal.path, *set_aside(begun.journal.path)]):
        journal = begun.journal if not number else lock_journal(path, create=False)
        if journal is None:
            continue
        contents = journal.contents
        if contents.fingerprint is not None and (contents.placing or contents.can_resume(journal.folder)):
            found = differences(contents.fingerprint, begun.identity())
            if not found:
                done, total = contents.spans.nbytes, begun.plan.output.nbytes
                tell(f"resumed: {format_size(done)} of {format_size(total)} are on the disk")
                _go_on_with(begun, journal)
                return
            changes = changes or found
        if number:
            journal.close()
    if begun.is_there:
        return
    if changes:
        refusal = OutputError(
            f"{begun.plan.output.path}: can't be resumed: what is merged has changed",
            found=changes,
            advice=f"Undo the change, or {_anew(begun.plan)} to merge from the beginning.",
        )
        refusal.state = "What is there of it is left as it is."
        raise refusal
    if begun.journal.contents.placing is not None:
        finish_or_refuse(begun)
    tell("nothing to resume: merging from the beginning")
    discard(begun.journal)


def _is_there(plan: Plan) -> bool:
    """Whether the whole output is in place, with nothing of an older one, and is not to be replaced."""
    return not plan.options.force and is_finished(plan.output) and not find_older(plan.output).superseded


def _anew(plan: Plan) -> str:
    """How to have the merge made from its beginning, whether or not there is an older output in its place."""
    is_in_the_way = any(path.exists() for path in plan.output.paths) or find_older(plan.output).superseded
    return "use --force instead of --resume" if is_in_the_way and not plan.options.force else "leave out --resume"


def _go_on_with(begun: Beginning, journal: Journal) -> None:
    """Make the journal the output's own."""
    if journal is begun.journal:
        return
    path = begun.journal.path
    if begun.journal.contents.can_resume(begun.journal.folder):
        begun.journal.move(aside(path))
    else:
        discard(begun.journal)
        begun.journal.remove()
    journal.move(path)
    begun.journal = take(path, begun.plan)


def _start_anew(begun: Beginning, tell: Tell) -> None:
    """Leave what can be resumed for later, under another name, and say so; remove what can't."""
    path, contents = begun.journal.path, begun.journal.contents
    if contents.placing is not None:
        finish_or_refuse(begun)
    elif contents.can_resume(begun.journal.folder):
        begun.journal.move(aside(path))
        begun.journal = take(path, begun.plan)
    discard(begun.journal)
    for left in set_aside(path):
        tell(
            f"note: {left.name} is of an unfinished merge to this output: --resume goes on with it, "
            f"`streammerge clean {path.parent}` removes it"
        )


def finish_or_refuse(begun: Beginning) -> None:
    """An earlier merge is complete but for names: only tidying up may be left of it, else it has to be finished."""
    placing = begun.journal.contents.placing
    assert placing is not None
    check_expected(begun.journal)
    if any(placing.is_due(step, begun.journal.folder) for step in placing.steps):
        raise OutputError(
            f"{begun.plan.output.path}: an earlier merge to this output is complete and was stopped while it was put "
            "in place",
            advice=f"`streammerge clean {begun.journal.folder}` puts it in place; so does --resume with its recipe.",
        )
    with output_errors(begun.plan.output.path):
        tidy_up(placing, begun.journal.folder, sync=begun.plan.options.sync)


def check_expected(journal: Journal) -> None:
    """OutputError if files that the journal would rename or replace are others than when it was written."""
    placing = journal.contents.placing
    with output_errors(journal.path):
        others = placing.unexpected(journal.folder) if placing is not None else []
    if others:
        raise OutputError(
            f"{journal.path}: can't be acted on: it tells of a merge that was stopped while its output was put in "
            "place, and files that it names are others now",
            found=others,
            advice=_way_out(journal, others),
        )


def _way_out(journal: Journal, others: list[str]) -> str:
    """How to go on where a journal can't be acted on: with the merge, or without it."""
    placing = journal.contents.placing
    assert placing is not None
    in_the_way = [
        name for name in others if name in journal.contents.files.values() and (journal.folder / name).exists()
    ]
    move = f"Move {', '.join(in_the_way)} elsewhere and run this again. Or, to" if in_the_way == others else "To"
    rooms = [step for step in placing.steps if step.retire and (journal.folder / step.target).exists()]
    back = "".join(f"rename {step.target} to {step.source}, " for step in rooms)
    return f"{move} give that merge up: {back}remove {journal.path}."


def discard(journal: Journal) -> None:
    """Remove the files that the journal names, and what it says."""
    with output_errors(journal.path):
        for name in journal.contents.temporaries:
            (journal.folder / name).unlink(missing_ok=True)
        journal.empty()


def aside(path: Path) -> Path:
    """A name for a journal that makes room for a new run's."""
    return path.with_name(f"{path.name.removesuffix(JOURNAL_SUFFIX)}.{secrets.token_hex(8)}{JOURNAL_SUFFIX}")


def set_aside(path: Path) -> list[Path]:
    """The journals that made room for this one, the latest first."""
    stem = re.escape(path.name.removesuffix(JOURNAL_SUFFIX))
    name = re.compile(rf"{stem}\.[0-9a-f]{{16}}{re.escape(JOURNAL_SUFFIX)}")
    found = [entry for entry in files_in(path.parent) if name.fullmatch(entry.name)]
    return sorted(found, key=lambda entry: entry.stat().st_mtime_ns, reverse=True)


def make_folders(folder: Path) -> list[Path]:
    """Make the folder and those above that are missing; those that were made, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def remove_folders(made: list[Path]) -> None:
    """Remove the folders again that are empty."""
    for folder in made:
        with suppress(OSError):
            folder.rmdir()


def allocated_bytes(path: Path) -> int:
    """What the file takes on the disk, which is less than its size if it has holes."""
    status = path.stat()
    return int(getattr(status, "st_blocks", 0)) * 512 or status.st_size


class Bookkeeper:
    """Writes down what of the ledger is on the disk."""

    def __init__(self, begun: Beginning, writer: OutputWriter, ledger: Ledger) -> None:
        self.begun = begun
        self.writer = writer
        self.ledger = ledger
        self.error: BaseException | None = None
        self._stopped = threading.Event()

    @contextmanager
    def every(self, seconds: float) -> Iterator[None]:
        """Write it down every so many seconds for as long as the `with` statement lasts; 0: never."""
        thread = threading.Thread(target=self._keep, args=(seconds,), daemon=True)
        if seconds:
            thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            if seconds:
                thread.join()
        self.check()

    def check(self) -> None:
        """Raise what went wrong in the thread: a disk that can't be synced, first of all."""
        if self.error is not None:
            raise self.error

    def watching(self, watch: Watch | None) -> Watch:
        """A watch that raises it too."""

        def look(progress: Progress) -> None:
            self.check()
            if watch:
                watch(progress)

        return look

    def record(self) -> None:
        """Sync what is finished and write it down. What is finished while this runs, is not part of it."""
        entry = self.ledger.take()
        if not entry.spans:
            return
        self.writer.sync_data()
        journal = self.begun.journal
        with output_errors(journal.path):
            if not self.writer.keep:
                sync_folder(journal.folder)
            journal.identify(self.begun.identity())
            journal.add(entry)
        self.writer.keep = True

    def _keep(self, seconds: float) -> None:
        wait = seconds
        try:
            while not self._stopped.wait(wait):
                started = time.monotonic()
                self.record()
                wait = max(seconds, time.monotonic() - started)
        except BaseException as error:
            self.error = error
