"""`streammerge bench` times a user's merge, says what it found, and leaves nothing behind."""

import json
from pathlib import Path

import pytest

from streammerge.cli.main import main
from streammerge.tools.bench import benchmark
from streammerge.tools.bench.benchmark import Round, Spread
from streammerge.tools.bench.floor import Floor
from streammerge.tools.bench.measuring import Measured
from streammerge.tools.demo.files import DemoModels, make_models


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> DemoModels:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(tmp_path)


def words(models: DemoModels, *more: str) -> list[str]:
    bound = [f"depth={models.depth}", f"base={models.base}", f"waifu={models.waifu}:0.4"]
    return ["bench", "--recipe", "sd2-depth", *bound, "--runs", "1", *more]


def test_the_table_tells_floor_loop_and_memory(models, folder, capsys):
    assert main(words(models)) == 0
    out = capsys.readouterr().out
    for label in ("floor", "merge loop", "loop / floor", "process", "peak RAM", "disk", "rounds"):
        assert any(line.startswith(label) for line in out.splitlines()), out
    assert list(folder.iterdir()) == []


def test_every_figure_is_in_the_report(models, folder, capsys):
    assert main(words(models, "--report", "bench.json", "--cold", "--sync", "-q", "--threads", "1")) == 0
    assert capsys.readouterr().err == ""
    assert [path.name for path in folder.iterdir()] == ["bench.json"]
    found = json.loads(Path("bench.json").read_text())
    (one,) = found["rounds"]
    assert one["floor"]["read"] > 0
    assert one["process"]["peak_rss"] > 10_000_000
    assert found["import_torch_rss"] > 100_000_000
    assert 0 < one["loop"] < one["process"]["wall"]
    assert one["bytes_read"] > 0
    assert found["synced"] is True
    assert len(found["cold"]) == 1
    assert found["cold"][0]["rate"] > 0
    assert found["machine"]["torch"]


def test_json_is_printed_on_request(models, folder, capsys):
    assert main(["bench", f"{models.base}:0.5", f"{models.base}:0.5", "--json", "--runs", "1", "-q"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rounds"]) == 1


def test_it_is_timed_where_the_output_would_be(models, folder, monkeypatch, capsys):
    seen = []
    real = benchmark.scratch_folder

    def watched(parent):
        seen.append(parent)
        return real(parent)

    monkeypatch.setattr(benchmark, "scratch_folder", watched)
    (folder / "disk").mkdir()
    (folder / "disk/out.safetensors").write_text("mine")
    assert main(words(models, "-o", "disk/out.safetensors", "-q")) == 0
    assert seen == [folder / "disk"]
    assert [path.read_text() for path in (folder / "disk").iterdir()] == ["mine"], "an output that is there stays"


@pytest.mark.parametrize("more", [["--layout", "nobody"], ["-p", "tempo=1"], ["-m", "slurp"]])
def test_mistakes_are_found_before_anything_runs(models, folder, capsys, monkeypatch, more):
    monkeypatch.setattr(benchmark, "measure", lambda *_: pytest.fail("a merge was started"))
    assert main(words(models, *more)) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert list(folder.iterdir()) == []


def test_a_merge_that_fails_is_an_error_with_its_words(models, folder, capsys):
    assert main(words(models, "--max-ram", "10MB", "-q")) == 1
    assert "too small" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def test_too_small_a_disk_is_said(models, folder, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    assert main(words(models, "-q")) == 1
    assert "not enough disk" in capsys.readouterr().err


def test_cold_runs_need_a_cache_that_can_be_dropped(models, folder, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "chill", lambda _: False)
    assert main(words(models, "--cold", "-q")) == 1
    assert "page cache can't be dropped" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("more", [["--dry-run"], ["--runs", "0"], ["--no-such-option"]])
def test_usage(models, folder, more):
    with pytest.raises(SystemExit) as stop:
        main([*words(models), *more])
    assert stop.value.code == 2


def test_spread():
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert str(Spread.of([1.0])) == "1.00 (1.00 to 1.00)"


def test_ratios_of_a_round():
    one = Round(Floor(1.0, 1.0), Measured("done", 0, 5.0, 4.0, 0, 0), 3.0, 0.0, 600, 400.0)
    assert one.over_floor == 1.5
    assert one.of_disk == pytest.approx(0.5)
    assert Round(Floor(1.0, 1.0), one.process, 3.0, 0.0, 600).of_disk == 0.0
