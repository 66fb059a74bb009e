"""Models of 671 billion parameters in hundreds of files: planned whole, and merged at one layer's depth."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import streammerge
from streammerge.errors import OutputError
from tests.make.deepseek import save_deepseek

MIB = 2**20

CHILD = """
import json, resource, sys
import streammerge
{limits}
{code}
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([found, int(peak.split()[1]) * 1024]))
"""


def in_a_process(code: str, limits: str = "") -> Any:
    """What the code finds, and the most that its process held in memory."""
    words = [sys.executable, "-c", CHILD.format(code=code, limits=limits)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="files with holes, and the memory of a process, as Linux has them")
def test_671_billion_parameters_are_planned_in_little_memory(tmp_path):
    counts = {save_deepseek(tmp_path / name) for name in "ab"}
    recipe = f"{{'merge_method': 'linear', 'models': [{str(tmp_path / 'a')!r}, {str(tmp_path / 'b')!r}]}}"
    code = f"plan = streammerge.make_plan({recipe}, output={str(tmp_path / 'out')!r})\n"
    code += "found = [len(plan.merged.tensors), len(plan.output.files), max(f.nbytes for f in plan.output.files)]"
    (count, shards, largest), peak = in_a_process(code)
    assert {count} == counts == {45_395}
    assert shards > 200
    assert largest < 5.1e9
    assert peak < 72 * MIB, "64 MiB, and 8 for where modules have to be compiled first"


@pytest.mark.skipif(sys.platform != "linux", reason="limits on open files, and the memory of a process, as Linux has")
def test_one_layer_of_it_is_merged_with_few_files_open(tmp_path):
    for name in "ab":
        save_deepseek(tmp_path / name, layers=4, shards=300, narrow=32)
    recipe = f"{{'merge_method': 'linear', 'models': [{str(tmp_path / 'a')!r}, {str(tmp_path / 'b')!r}]}}"
    code = f"report = streammerge.merge({recipe}, output={str(tmp_path / 'out')!r}, shard_size='1MB', sync=False)\n"
    code += "found = [report.merged, report.peak_rss_bytes - report.baseline_rss_bytes]"
    limits = "resource.setrlimit(resource.RLIMIT_NOFILE, (128, 2048))"
    (merged, grown), _ = in_a_process(code, limits)
    with streammerge.open_model(tmp_path / "out") as made, streammerge.open_model(tmp_path / "a") as source:
        assert merged == len(source.tensors) == len(made.tensors)
        assert made.tensors.keys() == source.tensors.keys()
    assert grown < 64 * MIB
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 20


@pytest.mark.skipif(sys.platform != "linux", reason="limits on open files")
def test_more_files_than_the_system_allows_are_refused(tmp_path):
    save_deepseek(tmp_path / "a", layers=4, shards=100, narrow=64)
    recipe = f"{{'merge_method': 'passthrough', 'models': [{str(tmp_path / 'a')!r}]}}"
    code = f"try: streammerge.merge({recipe}, output={str(tmp_path / 'out')!r})\n"
    code += "except streammerge.MergeError as error: found = str(error)"
    said, _ = in_a_process(code, "resource.setrlimit(resource.RLIMIT_NOFILE, (90, 90))")
    assert said.startswith("the merge opens 101 files, and the system allows a process 90")
    assert "Nothing was written" in said
    assert not (tmp_path / "out").exists()


def plan(tmp_path: Path, output: str, **options: Any) -> list[str]:
    recipe = {"merge_method": "passthrough", "models": [str(tmp_path / "a")]}
    try:
        made = streammerge.make_plan(recipe, output=tmp_path / output, **options)
    except OutputError as error:
        return [str(error)]
    return [path.name for path in made.output.weights]


@pytest.mark.skipif(sys.platform != "linux", reason="files with holes")
def test_folders_of_more_than_ten_gigabytes_get_shards(tmp_path):
    save_deepseek(tmp_path / "a", layers=4, shards=8)
    assert len(plan(tmp_path, "out")) > 5
    assert len(plan(tmp_path, "out", shard_size="1TB")) == 1
    assert plan(tmp_path, "out.safetensors") == ["out.safetensors"]
    assert len(plan(tmp_path, "out", dtype="fp8_e4m3")) > 3
    save_deepseek(tmp_path / "small", layers=3, shards=8)
    (tmp_path / "a").rename(tmp_path / "large")
    (tmp_path / "small").rename(tmp_path / "a")
    assert plan(tmp_path, "out") == ["model.safetensors"]
