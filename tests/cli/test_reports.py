"""What a merge or a plan tells: the report, the lines on the terminal, and progress."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from streammerge import __version__
from streammerge.cli import screen
from tests.cli.small_models import UNET, VAE

# ── what is printed ──────────────────────────────────────────────────────────────────────────────────────────────────

REPORT_KEYS = [
    *("output", "companions", "method", "tensors", "left_out", "notes", "nonfinite", "nonfinite_tensors", "findings"),
    *("bytes_read", "bytes_written", "resumed_bytes", "seconds"),
    *("peak_rss_bytes", "baseline_rss_bytes", "peak_vram_bytes", "device", "dtype", "threads", "io", "loops"),
    *("inputs", "hashes", "version"),
]


def test_the_report(folder, run):
    words = ("a.safetensors", "depth.safetensors", "-o", "out.safetensors", "--drop", "steps", "-q")
    assert run(*words, "--on-missing", "keep", "--report", "report.json", "--threads", "1", "--io", "pread").code == 0
    report = json.loads(Path("report.json").read_text())
    assert list(report) == REPORT_KEYS
    assert report["output"] == "out.safetensors"
    assert report["method"] == "linear"
    assert report["tensors"] == {"merged": 2, "copied": 0, "dropped": 1, "total": 2}
    assert report["left_out"] == {"depth": 1}
    assert report["bytes_read"] == 2 * (16 + 8)
    assert report["bytes_written"] == Path("out.safetensors").stat().st_size
    assert list(report["seconds"]) == ["plan", "merge", "sync", "ahead", "total"]
    assert report["seconds"]["total"] == pytest.approx(sum(list(report["seconds"].values())[:3]), abs=1e-4)
    assert report["peak_rss_bytes"] >= report["baseline_rss_bytes"] > 10**7
    assert (report["nonfinite"], report["nonfinite_tensors"], report["peak_vram_bytes"]) == (0, {}, 0)
    assert (report["device"], report["dtype"], report["threads"], report["io"]) == ("cpu", "F32", 1, "pread")
    assert report["inputs"] == [
        {"path": f"{name}.safetensors", "bytes": Path(f"{name}.safetensors").stat().st_size} for name in ("a", "depth")
    ]
    assert report["version"] == __version__


def test_the_report_of_shards_lists_all_files(folder, run):
    words = ("a.safetensors", "b.safetensors", "-o", "out", "--shard-size", "16")
    result = run(*words, "--report", "report.json")
    report = json.loads(Path("report.json").read_text())
    assert [Path(path).name for path in report["output"]] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert "(3 files)" in result.out


def test_values_that_are_no_numbers_are_told(folder, run):
    for name, values in (("a", [1.0, 1e38, 1.0]), ("b", [1.0, 3e38, float("nan")])):
        save_file({"x": torch.tensor(values), "y\x1b[31m\n": torch.tensor([float("inf")])}, f"{name}.safetensors")
    words = ("a.safetensors", "b.safetensors", "-p", "normalize=false", "-o", "out.safetensors")
    result = run(*words, "--report", "r.json")
    assert result.code == 0
    name, reason = "y\\x1b[31m\\n", "it holds 3.40282e+38 at the most, the largest value is 4e+38"
    assert result.err.splitlines() == [
        f"warning: 3 values are infinite or not numbers: x (2), {name} (1)",
        f"warning: a.safetensors holds 1 value that is infinite or not numbers: {name} (1)",
        f"warning: b.safetensors holds 2 values that are infinite or not numbers: x (1), {name} (1)",
        f"warning: 1 value is overflow of float32 ({reason}); store them as a wider dtype: x (1)",
    ]
    report = json.loads(Path("r.json").read_text())
    assert report["nonfinite"] == 3
    assert report["findings"]["x"] == {
        "nonfinite": 2,
        "overflowed": 1,
        "saturated": 0,
        "vanished": 0,
        "elements": 0,
        "largest": pytest.approx(4e38),
        "dtype": "float32",
        "limit": pytest.approx(3.4028235e38),
        "inputs": {"b.safetensors": 1},
    }


def test_what_is_left_out_is_told_even_if_quiet(folder, run):
    result = run("a.safetensors", "depth.safetensors", "-o", "out.safetensors", "--on-missing", "keep", "-q")
    assert result.out == ""
    assert result.err == "warning: depth: 1 tensor that the layout does not have was left out: depth_model.x\n"


def test_quiet_is_silent(folder, run):
    result = run("a.safetensors", "b.safetensors", "-o", "out.safetensors", "-q")
    assert (result.code, result.out, result.err) == (0, "", "")


def test_verbose_shows_every_tensor_first(folder, run):
    result = run("a.safetensors", "b.safetensors", "-o", "out.safetensors", "-v")
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    merged = f"merged F32 [4] {UNET} linear weight 1/1, normalize true"
    assert merged in lines
    assert "copied I64 [] steps from a: I64 is never averaged" in lines
    assert lines.index(merged) < next(n for n, line in enumerate(lines) if "merging" in line)


def test_progress_is_printed_now_and_then_where_there_is_no_terminal(folder, run, monkeypatch):
    from streammerge.storage.writer import OutputWriter

    whole = OutputWriter.write

    def slow(writer, job, position, data):
        time.sleep(0.2)
        whole(writer, job, position, data)

    monkeypatch.setattr(OutputWriter, "write", slow)
    monkeypatch.setattr(screen, "PLAIN_INTERVAL", 0.0)
    result = run("a.safetensors", "b.safetensors", "-o", "out.safetensors", "--threads", "1")
    assert "merge: " in result.err
    assert all(word in result.err for word in ("%", "/s", "s left", "RAM"))
    assert run("a.safetensors", "b.safetensors", "-o", "out.safetensors", "--force", "-q").err == ""


# ── plan ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("words", [["plan"], ["--dry-run"]])
def test_a_plan_writes_nothing(folder, run, words):
    result = run(*words, "depth.safetensors", "a.safetensors", "--on-missing", "keep", "-o", "new/out.safetensors")
    assert result.code == 0
    lines = result.out.splitlines()
    assert sorted(lines[:3]) == [
        "     1  copied: from depth: I64 is never averaged",
        "     1  copied: from depth: a lacks it",
        "     2  merged: linear",
    ]
    assert lines[3].startswith("note: a lacks 1 tensor (1 depth model) of the layout's")
    assert "output     new/out.safetensors: 4 tensors" in result.out
    assert not Path("new").exists()


def test_a_plan_as_json(folder, run):
    result = run("plan", "a.safetensors", "b.safetensors", "--json", "-o", "out.safetensors")
    plan = json.loads(result.out)
    assert plan["output"] == ["out.safetensors"]
    assert {tensor["name"]: tensor["action"] for tensor in plan["tensors"]} == {
        UNET: "merged",
        VAE: "merged",
        "steps": "copied",
    }
    assert result.err == ""


def test_a_plan_needs_no_output_and_minds_the_one_it_is_given(folder, run):
    assert run("plan", "a.safetensors", "b.safetensors").code == 0
    result = run("plan", "a.safetensors", "b.safetensors", "-o", "b.safetensors")
    assert result.code == 1
    assert "the output is the same file as the input b.safetensors" in result.err
    assert run("plan", "a.safetensors", "b.safetensors", "-q").out == ""
