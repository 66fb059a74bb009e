"""What other runs left unfinished is kept, resumed or removed."""

from __future__ import annotations

from pathlib import Path

import pytest

from streammerge.engine import run_merge
from streammerge.errors import OutputError
from streammerge.recipe.options import Options
from streammerge.recipe.parse import parse_recipe
from streammerge.storage.journal import lock_journal
from streammerge.storage.records import JOURNAL_SUFFIX
from tests.make.models import make_tensors, near, save_models, with_integers
from tests.storage.outputs import digests
from tests.storage.stopped_merges import SHAPES, recipe_of, run, stop, whole


@pytest.fixture
def paths(tmp_path):
    base = with_integers(make_tensors(1, shapes=SHAPES))
    return save_models(tmp_path / "models", a=near(base, 2), b=near(base, 3), base=base)


def test_two_runs_on_one_output(tmp_path, paths):
    output = tmp_path / "new" / "out.safetensors"
    second: list[BaseException] = []

    def look(progress):
        if not second:
            with pytest.raises(OutputError) as error:
                run(recipe_of(paths), output, shard_size=2_000_000)
            second.append(error.value)

    run_merge(parse_recipe(recipe_of(paths), Path()), output, Options(), look)
    assert "another run of streammerge is writing this output" in str(second[0])
    assert str(second[0]).endswith("Nothing was written.")
    assert list(digests(tmp_path / "new")) == ["out.safetensors"]


def test_a_new_merge_keeps_what_can_be_resumed_and_says_so(tmp_path, paths, monkeypatch):
    raw, output = recipe_of(paths), tmp_path / "new" / "out.safetensors"
    right = whole(raw, tmp_path / "right")
    stop(monkeypatch, raw, output)
    told: list[str] = []
    run(recipe_of(paths, dtype="fp16"), output, told.append)
    assert len(told) == 1
    assert "--resume goes on with it, `streammerge clean" in told[0]
    assert len(digests(tmp_path / "new")) == 3
    report = run(raw, output, resume=True, force=True)
    assert report.resumed_bytes
    assert digests(tmp_path / "new") == right


def test_the_one_that_matches_is_resumed(tmp_path, paths, monkeypatch):
    output = tmp_path / "new" / "out.safetensors"
    raws = [recipe_of(paths, dtype=dtype) for dtype in ("fp16", "bf16", "fp32")]
    for raw in raws:
        stop(monkeypatch, raw, output)
    for raw in raws:
        assert run(raw, output, resume=True, force=True).resumed_bytes
    assert list(digests(tmp_path / "new")) == ["out.safetensors"]


def test_unfinished_files_that_can_not_be_resumed_are_removed(tmp_path, paths):
    folder = tmp_path / "new"
    folder.mkdir()
    journal = lock_journal(folder / f".out.safetensors{JOURNAL_SUFFIX}", create=True)
    assert journal is not None
    left = folder / f".out.safetensors.{'0' * 16}.partial"
    journal.begin("out.safetensors", {left.name: "out.safetensors"})
    left.write_text("unfinished")
    journal.close()
    run(recipe_of(paths), folder / "out.safetensors")
    assert list(digests(folder)) == ["out.safetensors"]


def test_a_finished_merge_leaves_no_journal_whatever_it_finds(tmp_path, paths):
    (tmp_path / f".out.safetensors{JOURNAL_SUFFIX}").write_bytes(b"\xff" * 100)
    run(recipe_of(paths), tmp_path / "out.safetensors", resume=True)
    assert not list(tmp_path.glob(f"*{JOURNAL_SUFFIX}"))


def test_what_is_unfinished_is_no_matter_where_the_output_is_complete(tmp_path, paths, monkeypatch):
    raw, output = recipe_of(paths), tmp_path / "new" / "out.safetensors"
    stop(monkeypatch, raw, output)
    run(raw, output)  # from its beginning
    told: list[str] = []
    before = output.read_bytes()
    assert not run(raw, output, told.append, resume=True).threads
    assert [line for line in told if line.startswith("nothing to do: the output is there already")]
    assert output.read_bytes() == before
