"""Keeps the journal while a merge runs: from time to time, what is finished is synced, and then written down.

A thread does it, which waits for the disk most of its time; workers go on. They write no faster than the disk in the
end, and what is synced now needn't be at the end, so it costs next to nothing. Merges that are done before the first
time don't pay at all.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from streammerge.errors import output_errors
from streammerge.formats.locking import sync_folder
from streammerge.progress import Progress
from streammerge.storage.ledger import Ledger
from streammerge.storage.resume import Beginning
from streammerge.storage.writer import OutputWriter

Watch = Callable[[Progress], None]


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
