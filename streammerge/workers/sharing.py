"""Tensors that are parts of one whole, which is computed once for all of them: the two factors of a matrix."""

from __future__ import annotations

from collections.abc import Sequence

from streammerge.compute.expressions import ModelStatistics
from streammerge.compute.job import Job
from streammerge.compute.makers import Maker
from streammerge.compute.sharing import whole_of
from streammerge.storage.ledger import Ledger, Sink
from streammerge.workers.windows import MergeWork, Window


class SharedWork(MergeWork):
    """Parts of one whole: made by one survey, written one after the other, and told of in the ledger."""

    def __init__(
        self, jobs: Sequence[Job], sink: Sink, ledger: Ledger, measured: ModelStatistics | None = None
    ) -> None:
        super().__init__(jobs[0], sink, ledger, measured)
        # not itself too: what holds itself stays, with the whole, until somebody looks for garbage
        self.others = [_Part(job, self) for job in jobs[1:]]
        self.whole = whole_of(self.node)

    def begin_pass(self) -> list[Window]:
        """The windows of the survey; then one, in which all parts are written."""
        windows = super().begin_pass()
        if windows and windows[0].surveying:
            return windows
        self._open_windows = 1
        return [Window(self, 0, 1, surveying=False)]

    def write(self, window: Window, maker: Maker) -> None:
        """Write what is due of every part, and tell what the whole comes to."""
        for part in (self, *self.others):
            for due in MergeWork.begin_pass(part):
                MergeWork.write(part, due, maker)
        self._open_windows = 1
        from streammerge.methods.factoring import TOLD  # late: few merges have factors

        if self.whole is not None:
            norm, missed = self.survey.known[id(self.whole)][-TOLD:].tolist()
            self.ledger.tell(self.whole.name, norm, missed)


class _Part(MergeWork):
    """A part of what another work surveys."""

    def __init__(self, job: Job, shared: SharedWork) -> None:
        super().__init__(job, shared.sink, shared.ledger)
        self.survey = shared.survey
