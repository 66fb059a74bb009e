"""Progress grows to the whole, as the plan foretells."""

from __future__ import annotations

import pytest
import torch

import streammerge
from streammerge.compute.lanes import Lane
from streammerge.compute.tensor_maker import TensorMaker
from streammerge.formats.readers import MappedReader
from streammerge.storage.ledger import Ledger
from streammerge.workers.schedule import run
from streammerge.workers.windows import MergeWork
from tests.make.models import make_tensors, near, save_models
from tests.workers.jobs import MemorySink, job_of


def test_progress_grows_to_the_whole(tmp_path):
    base = make_tensors(0, torch.float16)
    paths = save_models(tmp_path, base=base, a=near(base, 1), b=near(base, 2))
    with (
        streammerge.open_model(paths["base"]) as base_model,
        streammerge.open_model(paths["a"]) as a,
        streammerge.open_model(paths["b"]) as b,
    ):
        merge = streammerge.ties(a, b, base=base_model, density=0.5)
        jobs = [job_of(name, node, "F16") for name, node in merge.nodes.items()]
        total = sum(job.info.nbytes for job in jobs)
        ledger, sink, seen = Ledger(total), MemorySink(), []
        lanes = [TensorMaker(Lane(MappedReader())) for _ in range(2)]
        works = [MergeWork(job, sink, ledger) for job in jobs]
        run(works, lanes, lambda: seen.append(ledger.done_bytes))
    assert seen == sorted(seen)
    assert ledger.done_bytes == total
    # a sample, the search and the writing
    elements = sum(model.numel() for model in base.values())
    assert 2 * 3 * 2 * elements - 20 <= ledger.bytes_read <= 2.2 * 3 * 2 * elements


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_the_plan_foretells_what_is_read(tmp_path, method):
    base = make_tensors(0, torch.float16)
    paths = save_models(tmp_path, a=base, b=near(base, 2))
    parameters = {"t": 0.5} if method == "slerp" else {}
    merge = getattr(streammerge, method)(paths["a"], paths["b"], **parameters)
    plan = streammerge.make_plan(merge, output=tmp_path / "out.safetensors")
    report = streammerge.merge(merge, output=tmp_path / "out.safetensors", sync=False)
    assert report.bytes_read == plan.bytes_to_read
    assert report.bytes_written == (tmp_path / "out.safetensors").stat().st_size
