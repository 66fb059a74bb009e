"""Companions beside weights: written, replaced, resumed and checked as the weights are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import streammerge
from streammerge.cli.main import main
from streammerge.errors import CheckpointError, OutputError
from streammerge.models.config_meaning import Contradiction, contradictions
from streammerge.recipe.card import CARD
from streammerge.storage.placing import state_of
from streammerge.storage.records import VERSION, encode
from tests.make.folders import TOKENIZER, llama_config, llama_tensors, save_folder, save_llama
from tests.storage.outputs import digests
from tests.storage.renaming import Killed, failing, killed

COPIED = {**TOKENIZER, "modeling_x.py": "raise SystemExit(7)", "1_Pooling/config.json": "{}"}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a = save_llama(tmp_path / "A", 1, {**COPIED, "optimizer.pt": b"x"})
    return [str(a), str(save_llama(tmp_path / "B", 2, {}, shards=2))]


def merge(folders, output="OUT", **options):
    recipe = {"merge_method": "linear", "models": folders, **options.pop("keys", {})}
    return streammerge.merge(recipe, output=output, **{"sync": False, **options})


def files(folder="OUT"):
    return sorted(digests(Path(folder)))


@pytest.mark.parametrize("shard_size", [None, "2kB"])
def test_a_folder_gets_what_its_layout_has(folders, shard_size):
    report = merge(folders, dtype="fp16", shard_size=shard_size)
    weights = [Path(path).name for path in report.output]
    assert files() == sorted([*weights, "config.json", CARD, *COPIED])
    for name, content in COPIED.items():
        assert Path("OUT", name).read_text() == content
    config = json.loads(Path("A/config.json").read_text())
    assert json.loads(Path("OUT/config.json").read_text()) == {**config, "torch_dtype": "float16"}
    assert [Path(path).relative_to("OUT").as_posix() for path in report.companions] == [
        *sorted(COPIED.keys() | {"config.json"}, key=lambda name: (name != name.lower(), name)), CARD
    ]  # fmt: skip


def test_a_config_that_is_right_is_copied_byte_for_byte(folders):
    merge(folders)
    assert Path("OUT/config.json").read_bytes() == Path("A/config.json").read_bytes()


def test_what_writes_weights_alone(folders):
    merge(folders, "alone", companions=False)
    merge(folders, "file.safetensors")
    assert files("alone") == ["model.safetensors"]
    assert not Path("config.json").exists()
    merge(folders, "private", metadata=False)
    assert CARD not in files("private")
    assert "config.json" in files("private")
    merge([f"{folders[0]}/model.safetensors", folders[1]], "of a file")
    assert files("of a file") == ["model.safetensors"]


def test_libraries_find_weights_under_their_own_names(folders, tmp_path):
    for stem, config in (("diffusion_pytorch_model", {"_class_name": "X"}), ("adapter_model", None)):
        files = {"adapter_config.json": "{}"} if config is None else {}
        folder = save_folder(tmp_path / stem, llama_tensors(3), config, files, stem=stem)
        report = merge([str(folder), folders[1]], f"{stem} out", shard_size="2kB")
        assert Path(report.output[0]).name == f"{stem}-00001-of-{len(report.output) - 1:05}.safetensors"
        assert Path(report.output[-1]).name == f"{stem}.safetensors.index.json"
        with streammerge.open_model(f"{stem} out") as found:
            assert len(found.tensors) == len(llama_tensors(3))


def test_a_file_of_the_user_s_is_not_replaced_unasked(folders):
    Path("OUT").mkdir()
    Path("OUT/config.json").write_text("mine")
    with pytest.raises(OutputError, match=r"(?s)OUT/config.json: a file that belongs.* exists.*--no-companions"):
        merge(folders)
    assert files() == ["config.json"]
    merge(folders, companions=False)
    assert Path("OUT/config.json").read_text() == "mine"
    merge(folders, force=True)
    assert Path("OUT/config.json").read_bytes() == Path("A/config.json").read_bytes()


def test_what_is_there_already_is_in_nobody_s_way(folders):
    Path("OUT").mkdir()
    shutil.copy("A/config.json", "OUT/config.json")
    merge(folders)
    assert "model.safetensors" in files()


def test_a_card_that_somebody_wrote_on_stays(folders, capsys):
    Path("OUT").mkdir()
    Path("OUT/README.md").write_text("my notes")
    assert main([*folders, "-o", "OUT", "-q"]) == 0
    assert main([*folders, "-o", "OUT", "--force"]) == 0
    assert Path("OUT/README.md").read_text() == "my notes"
    assert "README.md is not streammerge's, or was written on, and stays as it is" in capsys.readouterr().err
    Path("OUT/README.md").unlink()
    merge(folders, force=True)
    first = Path("OUT/README.md").read_text()
    merge(folders, force=True, dtype="fp16")
    assert Path("OUT/README.md").read_text() != first


def test_what_an_older_model_left_is_told(folders, capsys):
    merge(folders, force=True)
    Path("OUT/tokenizer.model").write_text("of another")
    Path("OUT/tokenizer.json").write_text("of another")
    assert main([*folders, "-o", "OUT", "--force"]) == 0
    told = capsys.readouterr().err
    assert "OUT has tokenizer.model, which" in told
    assert "tokenizer.json of OUT is replaced" in told


def test_a_companion_of_an_input_is_not_replaced(folders, tmp_path):
    shutil.copytree("B", "C")
    before = digests(tmp_path)
    with pytest.raises(OutputError, match="the same file"):
        merge(folders, "B", force=True)
    with pytest.raises(OutputError, match="the same file as"):
        merge([folders[0], "C/model.safetensors.index.json"], "C", force=True)
    assert digests(tmp_path) == before


def test_a_report_is_none_of_the_companions(folders):
    assert main([*folders, "-o", "OUT", "-q", "--report", "OUT/config.json"]) == 1
    assert not Path("OUT/model.safetensors").exists()


def test_nothing_replaces_what_is_copied(folders, capsys):
    Path("A/normalizer.json").write_text("{}")
    assert main([*folders, "-o", "OUT", "-q", "--report", "A/normalizer.json"]) == 1
    assert "the report is the same file as a part of the input: " in capsys.readouterr().err
    assert Path("A/normalizer.json").read_text() == "{}"


def test_a_config_that_is_a_link_out_is_told(folders, tmp_path, capsys):
    Path("A/config.json").rename(tmp_path / "config.json")
    Path("A/config.json").symlink_to(tmp_path / "config.json")
    assert main(["plan", *folders, "-o", "OUT"]) == 0
    told = capsys.readouterr().out
    assert "not copied: config.json: a link out of the folder" in told
    assert "nothing is written beside the weights" in told
    merge(folders)
    assert files() == ["model.safetensors"]


@pytest.mark.parametrize("shard_size", [None, "2kB"])
@pytest.mark.parametrize("older", [False, True])
def test_renaming_fails_at_any_step(folders, monkeypatch, shard_size, older, tmp_path):
    if older:
        merge(folders, dtype="bf16", shard_size=shard_size)
    before = digests(tmp_path)
    for at in range(1, 40):
        with failing(monkeypatch, at):
            try:
                merge(folders, dtype="fp16", shard_size=shard_size, force=older)
            except OutputError:
                assert digests(tmp_path) == before
            else:
                assert at > len(COPIED)
                break


@pytest.mark.parametrize("older", [False, True])
def test_killed_at_any_step_it_is_finished_by_resuming(folders, monkeypatch, older, tmp_path):
    merge(folders, "right", dtype="fp16")
    for at in range(1, 30):
        shutil.rmtree("OUT", ignore_errors=True)
        if older:
            merge(folders, dtype="bf16")
        with killed(monkeypatch, at):
            try:
                merge(folders, dtype="fp16", force=older)
            except Killed:
                pass
            else:
                break
        assert not Path("OUT/model.safetensors").exists() or (older and at == 1)
        if at % 2:
            merge(folders, dtype="fp16", resume=True, force=older)
        else:
            assert main(["clean", "OUT"]) == 0
        assert digests(Path("OUT")) == digests(Path("right"))
    assert at > len(COPIED)


def test_a_companion_that_changes_meanwhile_is_an_error(folders, monkeypatch):
    from streammerge.storage.writer import OutputWriter

    whole = OutputWriter.write

    def changing(writer, job, position, data):
        Path("A/tokenizer.json").write_text("other")
        whole(writer, job, position, data)

    monkeypatch.setattr(OutputWriter, "write", changing)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: the file changed while it was being merged"):
        merge(folders)
    assert not Path("OUT").exists()


def test_a_finished_output_is_known_with_all_that_belongs_to_it(folders, capsys):
    words = [*folders, "-o", "OUT"]
    assert main([*words, "-q"]) == 0
    assert main([*words, "--resume"]) == 0
    assert "nothing to do: the output is there already" in capsys.readouterr().err
    Path("OUT/README.md").write_text("mine")
    assert main([*words, "--resume", "-q"]) == 0
    Path("OUT/tokenizer.json").write_text("other")
    assert main([*words, "--resume", "-q"]) == 1
    assert "OUT/model.safetensors: the output exists, and is not this merge's" in capsys.readouterr().err


def test_verify_looks_at_companions(folders, capsys):
    assert main([*folders, "-o", "OUT", "-q", "--hash"]) == 0
    bound = [f"{Path(folder).name}={folder}" for folder in folders]
    assert main(["verify", "OUT", *folders]) == 0
    assert main(["verify", "OUT", *bound]) == 0
    Path("OUT/tokenizer.json").write_text("other")
    capsys.readouterr()
    assert main(["verify", "OUT"]) == 1
    assert "tokenizer.json: " in capsys.readouterr().err  # by its hash
    Path("OUT/model.safetensors.sha256").unlink()
    assert main(["verify", "OUT", *bound]) == 1
    assert "the tensors are what the recipe gives, 1 file beside them not\n  tokenizer.json: another" in (
        capsys.readouterr().err
    )
    assert main(["verify", "OUT", *bound, "--no-companions"]) == 0
    shutil.copy("A/tokenizer.json", "OUT/tokenizer.json")
    Path("OUT/README.md").unlink()
    assert main(["verify", "OUT", *bound]) == 0
    assert "README.md is not there" in capsys.readouterr().out


def test_hashes_are_of_all_files(folders):
    merge(folders, hash=True)
    listed = Path("OUT/model.safetensors.sha256").read_text()
    assert all(f"  {name}\n" in listed for name in files() if name != "model.safetensors.sha256")


def test_the_plan_says_what_is_copied_and_what_is_not(folders, capsys):
    assert main(["plan", *folders, "-o", "OUT", "--dtype", "bf16"]) == 0
    told = capsys.readouterr().out
    assert "copied: chat_template.jinja, " in told
    assert "code, which is copied as data and not run: modeling_x.py" in told
    assert "config.json (torch_dtype: float32 → bfloat16)" in told
    assert "not copied: optimizer.pt: weights" in told
    assert main(["plan", *folders, "-o", "OUT.safetensors"]) == 0
    assert "OUT.safetensors is a file: config.json and all else beside the weights stay in" in capsys.readouterr().out
    assert main(["plan", f"{folders[0]}/model.safetensors", folders[1], "-o", "OUT"]) == 0
    assert "the layout is a file: what loads the output as a folder needs config.json" in capsys.readouterr().out
    assert main(["plan", *folders, "-o", "OUT", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {each["name"] for each in found["companions"]} == {"config.json", CARD, *COPIED}
    assert found["not_copied"] == [{"name": "optimizer.pt", "why": "weights"}]


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_within_that_is_a_link_is_not_written_to(folders, tmp_path, force):
    Path("OUT").mkdir()
    Path("elsewhere").mkdir()
    Path("OUT/1_Pooling").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match=r"1_Pooling: is no folder that could be written to"):
        merge(folders, force=force)
    assert not list(Path("elsewhere").iterdir())


def test_a_journal_does_not_lead_through_links(tmp_path, capsys):
    folder, elsewhere = tmp_path / "download", tmp_path / "home"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "x").symlink_to(elsewhere)
    names = {"model.safetensors": 0, "x/startup.py": 1}
    temporary = {name: f".{Path(name).name}.{'0' * 15}{digit}.partial" for name, digit in names.items()}
    for name in temporary.values():
        (folder / name).write_text("evil")
    steps = [[temporary[name], name, False] for name in reversed(names)]
    records: list[dict[str, Any]] = [
        {"begin": VERSION, "output": "model.safetensors", "files": [[temporary[name], name] for name in names]},
        {"placing": steps, "superseded": [], "states": {name: state_of(folder / name) for name in temporary.values()}},
    ]
    (folder / ".model.safetensors.streammerge-journal").write_bytes(b"".join(map(encode, records)))
    assert main(["clean", str(folder)]) == 1
    assert "a link is no folder to write to" in capsys.readouterr().err
    assert not list(elsewhere.iterdir())


def test_models_in_python_have_companions_too(folders):
    with streammerge.open_model(folders[0]) as a, streammerge.open_model(folders[1]) as b:
        streammerge.merge(streammerge.linear(a, b), output="OUT")
        streammerge.merge(streammerge.Cast(a, "fp16"), output="CAST")
    assert files() == sorted(["model.safetensors", "config.json", *COPIED])  # no recipe, no card
    assert json.loads(Path("CAST/config.json").read_text())["torch_dtype"] == "float16"


def test_configs_that_contradict_each_other_are_told(tmp_path):
    for name, changes in {
        "a": {"rope_theta": 1e4, "text_config": {"head_dim": 4}, "num_key_value_heads": 2, "hidden_act": "silu"},
        "b": {
            "rope_theta": 1e6,
            "text_config": {"head_dim": 8},
            "num_key_value_heads": 2,
            "rope_scaling": {"factor": 2},
        },
        "c": {"rope_theta": 1e6, "text_config": {}, "hidden_act": None, "transformers_version": "x"},
    }.items():
        save_folder(tmp_path / name, llama_tensors(1), {**llama_config(), **changes})
    recipe = {"merge_method": "linear", "models": [str(tmp_path / name) for name in "abc"]}
    notes = [note for note in streammerge.make_plan(recipe, output="OUT").notes() if "see whether they fit" in note]
    assert notes == [
        "config.json: rope_theta is 10000.0, as in the layout, while it is 1000000.0 in b, c: see whether they fit",
        "config.json: text_config.head_dim is 4, as in the layout, while it is 8 in b: see whether they fit",
    ]
    given = {"model_type": "llava", "head_dim": 7, "text_config": {**llama_config(), "rope_theta": 1e4}}
    text = {**llama_config(), "rope_theta": 1e6, "head_dim": 8}
    assert list(contradictions(given, text)) == [Contradiction("text_config.rope_theta", 1e4, 1e6)]
    null = {"rope_scaling": None, "head_dim": None}
    assert list(contradictions(null, {"rope_scaling": 2, "head_dim": 8})) == [Contradiction("rope_scaling", None, 2)]
    assert not list(contradictions({"head_dim": 8}, null))
    other = {**text, "model_type": "mistral"}
    assert [each.key for each in contradictions(given, other)] == ["model_type", "head_dim"]
