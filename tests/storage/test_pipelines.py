"""A pipeline's folder as an output: written, replaced, resumed and checked as one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import streammerge
from streammerge.cli.main import main
from streammerge.errors import CheckpointError, OutputError, PlanError
from streammerge.recipe.card import CARD
from streammerge.storage.placing import Placing, Step, put_in_place, state_of, tidy_up
from tests.make.models import assert_same_bytes, load_model, make_tensors, save_model
from tests.make.pipelines import PARTS, SHAPES, as_checkpoint, component, save_pipeline
from tests.storage.outputs import digests
from tests.storage.renaming import Killed, failing, killed
from tests.storage.stopped_merges import stop

WEIGHTS = {f"{name}/{stem}.safetensors" for name, stem in PARTS.items()}
COPIED = {
    "model_index.json",
    "LICENSE.md",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
}


@pytest.fixture
def pipelines(tmp_path, monkeypatch):
    """Two pipelines, A and B."""
    monkeypatch.chdir(tmp_path)
    return [save_pipeline(Path("A"), 1), save_pipeline(Path("B"), 2)]


def merge(models, output="OUT", **options):
    keys = options.pop("keys", {})
    recipe = {"merge_method": "linear", "models": [str(model) for model in models], **keys}
    return streammerge.merge(recipe, output=output, **{"sync": False, **options})


def mean(name: str, dtype: torch.dtype = torch.float32):
    """What a component of the mean of both has to be."""
    a, b = (component(name, seed) for seed in (1, 2))
    means = {key: ((a[key].double() + b[key].double()) / 2).to(dtype) for key in a}
    return {key: tensor if a[key].is_floating_point() else a[key] for key, tensor in means.items()}


def test_a_pipeline_in_is_a_pipeline_out(pipelines):
    report = merge(pipelines)
    assert digests(Path("OUT")).keys() == {*WEIGHTS, *COPIED, CARD}
    for name, stem in PARTS.items():
        assert_same_bytes(load_model(Path("OUT", name, f"{stem}.safetensors")), mean(name))
    for name in COPIED:
        assert Path("OUT", name).read_bytes() == Path("A", name).read_bytes()
    assert sorted(Path(path).relative_to("OUT").as_posix() for path in report.output) == sorted(WEIGHTS)
    with streammerge.open_model("OUT") as made, streammerge.open_model("A") as a:
        assert made.tensors == a.tensors
    assert "library_name: diffusers" in Path("OUT", CARD).read_text()


def test_configs_say_what_was_written(pipelines):
    merge(pipelines, dtype="fp16")
    before, after = (json.loads(Path(folder, "text_encoder/config.json").read_text()) for folder in ("A", "OUT"))
    assert after == {**before, "torch_dtype": "float16"}
    assert Path("OUT/unet/config.json").read_bytes() == Path("A/unet/config.json").read_bytes()
    assert_same_bytes(load_model(Path("OUT/vae/diffusion_pytorch_model.safetensors")), mean("vae", torch.float16))


@pytest.mark.parametrize("method", ["linear", "slerp", "ties"])
def test_the_values_are_those_of_a_file(pipelines, method):
    keys = {"merge_method": method, "parameters": {"t": 0.3} if method == "slerp" else {}}
    keys |= {"base_model": "A"} if method == "ties" else {}
    merge(pipelines, keys=keys)
    merge(pipelines, "out.safetensors", keys=keys)
    with streammerge.open_model("OUT") as folder, streammerge.open_model("out.safetensors") as file:
        for name, info in file.tensors.items():
            found, expected = (model.read(name, 0, info.elements) for model in (folder, file))
            assert torch.equal(found, expected), name


@pytest.mark.parametrize("words", [["--shard-size", "60kB"], []])
def test_shards_and_an_index_for_each_component(pipelines, words):
    a = pipelines[0] if words else save_pipeline(Path("S"), 1, shards=3)
    assert main([str(a), "B", "-o", "OUT", "-q", *words]) == 0
    folder = Path("OUT/unet")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    of = len(shards)
    assert shards == [f"diffusion_pytorch_model-{n:05}-of-{of:05}.safetensors" for n in range(1, of + 1)]
    assert of > 1
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert set(index["weight_map"]) == set(SHAPES["unet"])
    with streammerge.open_model(folder) as made:
        for name, tensor in mean("unet").items():
            assert torch.equal(made.read(name, 0, tensor.numel()), tensor.reshape(-1))
    assert main(["verify", "OUT", f"A={a}", "B=B", "--all"] if words else ["verify", "OUT", f"S={a}", "B=B"]) == 0


def test_variants_are_read_and_written_under_the_usual_names(pipelines, capsys):
    a = save_pipeline(Path("F"), 1, variant="fp16")
    assert main([str(a), "B", "-o", "OUT"]) == 0
    told = capsys.readouterr().err
    assert "of unet, vae, text_encoder a variant is read (diffusion_pytorch_model.fp16.safetensors)" in told
    assert digests(Path("OUT")).keys() >= WEIGHTS


def test_the_safety_checker_is_copied(pipelines):
    for folder in pipelines:
        save_pipeline(folder, int(folder.name == "B") + 1, safety=True)
    one = save_model(Path("one.safetensors"), as_checkpoint(2))
    for output, other in (("OUT", "B"), ("WITH", one)):
        merge(["A", other], output, keys={"on_missing": "error"})
        file = Path("safety_checker/model.safetensors")
        assert_same_bytes(load_model(output / file), load_model("A" / file))
        assert Path(output, "safety_checker/config.json").is_file()
    merge([save_pipeline(Path("N"), 1), "B"], "NONE")
    assert not Path("NONE/safety_checker").exists()


def test_with_a_checkpoint_in_original_names(pipelines):
    one = save_model(Path("one.safetensors"), as_checkpoint(2))
    merge(["A", one])
    merge(pipelines, "SAME")
    for name in COPIED:
        assert Path("OUT", name).read_bytes() == Path("SAME", name).read_bytes()
    for name in WEIGHTS:
        assert_same_bytes(load_model(Path("OUT", name)), load_model(Path("SAME", name)))
    merge([one, "A"], "LAID", keys={"layout": "A"})
    assert_same_bytes(load_model(Path("LAID/unet/diffusion_pytorch_model.safetensors")), mean("unet"))


def test_a_checkpoint_gets_the_configs_of_a_pipeline_of_weight_0(pipelines):
    one = save_model(Path("one.safetensors"), as_checkpoint(7))
    assert main(["A:0", str(one), "-o", "OUT", "-q"]) == 0
    for name, stem in PARTS.items():
        assert_same_bytes(load_model(Path("OUT", name, f"{stem}.safetensors")), component(name, 7))


def test_a_component_that_is_left_out_is_none_in_the_index(pipelines):
    assert main(["convert", "A", "--drop", "text_encoder.*", "-o", "OUT", "-q"]) == 0
    index = json.loads(Path("OUT/model_index.json").read_text())
    assert index["text_encoder"] == [None, None]
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert not Path("OUT/text_encoder").exists()
    with streammerge.open_model("OUT") as made:
        assert list(made.components) == ["unet", "vae"]


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


def refused(words, capsys, code=1) -> str:
    assert main([*words, "-o", "OUT", "-q"]) == code
    assert not Path("OUT").exists()
    return str(capsys.readouterr().err)


def test_folders_that_would_be_no_pipelines(pipelines, capsys):
    one = str(save_model(Path("one.safetensors"), as_checkpoint(2)))
    assert "streammerge PIPELINE:0 MODEL -o OUT" in refused(["convert", one, "--names", "diffusers"], capsys)
    assert "a component alone is no pipeline" in refused(["A", "B", "--only", "unet"], capsys)
    assert "weights alone are none" in refused(["A", "B", "--no-companions"], capsys)
    save_model(Path("vae.safetensors"), component("vae", 5))
    shutil.rmtree("A/vae")
    index = json.loads(Path("A/model_index.json").read_text())
    Path("A/model_index.json").write_text(json.dumps({**index, "vae": [None, None]}))
    told = refused(["convert", "A", "--vae", "vae.safetensors"], capsys)
    assert "of no component that the layout's model_index.json names" in told
    Path("A/model_index.json").unlink()
    assert "no model_index.json, without which nothing loads a pipeline" in refused(["A", "A"], capsys)


@pytest.mark.parametrize("what", ["absent", "broken", "a link", "a linked folder"])
def test_a_config_that_cannot_be_copied(pipelines, what, tmp_path):
    config = Path("A/vae/config.json")
    if what == "absent":
        config.unlink()
    elif what == "broken":
        config.write_text("{")
    elif what == "a link":
        config.rename("config.json")
        config.symlink_to(tmp_path / "config.json")
    else:
        Path("A/vae").rename("vae")
        Path("A/vae").symlink_to(tmp_path / "vae")
    with pytest.raises(CheckpointError, match=r"A/vae"):
        merge(pipelines)
    assert not Path("OUT").exists()
    merge(pipelines, "out.safetensors")


@pytest.mark.parametrize("name", ["../x", "a.b", "ü", "-x", "Unet"])
def test_components_of_odd_names(pipelines, name):
    index = json.loads(Path("A/model_index.json").read_text())
    Path("A/model_index.json").write_text(json.dumps({**index, name: ["diffusers", "X"]}))
    if name != "../x":
        shutil.copytree("A/unet", Path("A") / name)
    if name == "../x":
        shutil.copytree("A/unet", "x")
        merge(pipelines)
        assert not Path("OUT/../x/README.md").exists()
        return
    with pytest.raises((OutputError, PlanError)):
        merge(["A", "A"])
    assert not Path("OUT").exists()


def test_predictions_are_not_mixed(pipelines, capsys):
    save_pipeline(Path("B"), 2, prediction="v_prediction")
    told = refused(["A", "B"], capsys)
    assert "B   v (it has prediction_type: v_prediction in its scheduler_config.json)" in told
    one = str(save_model(Path("one.safetensors"), as_checkpoint(2), {"modelspec.prediction_type": "epsilon"}))
    assert "one   epsilon" in refused(["B", one], capsys)
    assert main(["B", "A", "-o", "OUT", "-q", "--on-prediction-mismatch", "merge"]) == 0
    stated = json.loads(Path("OUT/scheduler/scheduler_config.json").read_text())
    assert stated["prediction_type"] == "v_prediction"
    assert main(["inspect", "OUT"]) == 0
    assert "predicts v" in capsys.readouterr().out


# ── what is there already, and what stops ────────────────────────────────────────────────────────────────────────────


def test_an_older_output_is_replaced_when_that_is_wanted(pipelines):
    merge(pipelines, shard_size="60kB")
    older = digests(Path("OUT"))
    with pytest.raises(OutputError, match="exists"):
        merge(pipelines, dtype="fp16")
    assert digests(Path("OUT")) == older
    merge(pipelines, dtype="fp16", force=True)
    merge(pipelines, "RIGHT", dtype="fp16")
    assert digests(Path("OUT")) == digests(Path("RIGHT"))
    merge(pipelines, shard_size="60kB", force=True)
    assert digests(Path("OUT")) == older


def test_a_model_in_its_place_is_replaced_too(pipelines):
    save_model(Path("OUT/model.safetensors"), make_tensors(1))
    save_model(Path("OUT/unet/model.safetensors"), make_tensors(1))
    with pytest.raises(OutputError, match="exists"):
        merge(pipelines)
    merge(pipelines, force=True)
    merge(pipelines, "RIGHT")
    assert digests(Path("OUT")) == digests(Path("RIGHT"))


def test_inputs_are_not_replaced(pipelines):
    before = digests(Path())
    for output in ("A", "B", "A/../B"):
        with pytest.raises(OutputError, match="same file"):
            merge(pipelines, output, force=True)
    assert digests(Path()) == before


@pytest.mark.parametrize("name", ["unet", "scheduler"])
def test_a_link_in_the_place_of_a_folder_is_not_followed(pipelines, name, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Path("OUT").mkdir()
    Path("OUT", name).symlink_to(elsewhere)
    with pytest.raises(OutputError, match="no folder that could be written to"):
        merge(pipelines, force=True)
    assert not [*elsewhere.iterdir()]


@pytest.mark.parametrize("older", ["", "2"])
@pytest.mark.parametrize("shard_size", [None, "60kB"])
def test_stopped_it_is_resumed_to_the_same_bytes(pipelines, monkeypatch, shard_size, older):
    raw = {"merge_method": "linear", "models": ["A", "B"]}
    merge(pipelines, "RIGHT", shard_size=shard_size)
    if older:
        merge(["B", "A"], dtype="bf16")
    before = digests(Path("OUT"))
    stop(monkeypatch, raw, Path("OUT"), after=3, shard_size=60_000 if shard_size else None, force=bool(older))
    left = digests(Path("OUT"))
    assert {name: left[name] for name in before} == before
    assert any(name.endswith(".partial") for name in left)
    merge(pipelines, resume=True, shard_size=shard_size, sync=True, force=bool(older))
    assert digests(Path("OUT")) == digests(Path("RIGHT"))


def loaded(folder: str) -> dict[str, torch.Tensor] | None:
    """What is loaded of a pipeline by its index; None if nothing is."""
    if not Path(folder, "model_index.json").is_file():
        return None
    with streammerge.open_model(folder) as model:
        return {name: model.read(name, 0, info.elements) for name, info in model.tensors.items()}


@pytest.mark.parametrize(("older", "every"), [("90kB", 3), ("", 5), (None, 5)])
def test_killed_at_any_step_nothing_mixed_is_loaded(pipelines, monkeypatch, older, every):
    merge(pipelines, "RIGHT", dtype="fp16", shard_size="60kB")
    right = loaded("RIGHT")
    if older is not None:
        merge(["B", "B"], "OLD", shard_size=older or None)
    old = loaded("OLD") if older is not None else None
    for at in range(1, 200, every):
        shutil.rmtree("OUT", ignore_errors=True)
        if older is not None:
            shutil.copytree("OLD", "OUT")
        with killed(monkeypatch, at, "streammerge.storage.placing.tidy_up"):
            try:
                merge(pipelines, dtype="fp16", shard_size="60kB", force=older is not None)
            except Killed:
                pass
            else:
                break
        found = loaded("OUT")
        if found is not None:
            expected = right if old is None or found["unet.conv_in.weight"].dtype == torch.float16 else old
            assert expected is not None
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        if at % 8 < 4:
            merge(pipelines, dtype="fp16", shard_size="60kB", resume=True, force=older is not None)
        else:
            assert main(["clean", "OUT"]) == 0
        assert digests(Path("OUT")) == digests(Path("RIGHT"))
    assert at > len(COPIED)


def test_renaming_fails_at_any_step(pipelines, monkeypatch):
    merge(["B", "B"], shard_size="90kB")
    before = digests(Path("OUT"))
    for at in range(1, 200, 2):
        with failing(monkeypatch, at):
            try:
                merge(pipelines, force=True)
            except OutputError:
                assert digests(Path("OUT")) == before
            else:
                assert at > len(COPIED)
                break


def test_hashes_and_values_are_verified(pipelines, capsys):
    assert main(["A", "B", "-o", "OUT", "-q", "--hash", "--shard-size", "60kB"]) == 0
    words = ["verify", "OUT", "A=A", "B=B", "--all"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "index of unet: right for" in told
    assert "hashes: the sha256 of every file is as in model_index.json.sha256" in told
    assert main(["verify", "OUT/model_index.json", "A=A", "B=B"]) == 0
    config = Path("OUT/scheduler/scheduler_config.json")
    text = config.read_text()
    config.write_text(text + " ")
    assert main(words) == 1
    assert "scheduler/scheduler_config.json" in capsys.readouterr().err
    config.write_text(text)
    shard = next(Path("OUT/unet").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    assert main(words) == 1
    assert f"unet/{shard.name}: " in capsys.readouterr().err
    Path("OUT/model_index.json.sha256").unlink()
    assert main(words) == 1
    assert "not what the recipe gives" in capsys.readouterr().err


def test_a_finished_output_is_known(pipelines, capsys):
    assert main(["A", "B", "-o", "OUT", "-q"]) == 0
    before = digests(Path("OUT"))
    assert main(["A", "B", "-o", "OUT", "--resume"]) == 0
    assert "nothing to do: the output is there already" in capsys.readouterr().err
    assert digests(Path("OUT")) == before


def test_what_an_older_output_left_is_told(pipelines, capsys):
    merge(pipelines)
    Path("OUT/tokenizer/added_tokens.json").write_text("{}")
    save_model(Path("OUT/unet/diffusion_pytorch_model.fp16.safetensors"), make_tensors(1))
    assert main(["A", "B", "-o", "OUT", "--force"]) == 0
    told = capsys.readouterr().err
    assert "OUT has tokenizer/added_tokens.json, unet/diffusion_pytorch_model.fp16.safetensors, which are not" in told


def test_a_journal_does_not_reach_through_links(tmp_path):
    elsewhere = save_model(tmp_path / "elsewhere/model.safetensors", make_tensors(1))
    folder = tmp_path / "OUT"
    folder.mkdir()
    (folder / "unet").symlink_to(elsewhere.parent)
    hidden = ".{}.0123456789abcdef.{}"
    new = hidden.format("model_index.json", "partial")
    (folder / new).write_text("{}")
    room = Step("unet/model.safetensors", hidden.format("model.safetensors", "retired"), retire=True)
    placing = Placing((room, Step(new, "model_index.json")))
    with pytest.raises(NotADirectoryError):
        put_in_place(placing, folder, sync=False)
    states = {"unet/model.safetensors": state_of(elsewhere)}
    tidy_up(Placing((Step(new, "model_index.json"),), ("unet/model.safetensors",), states), folder, sync=False)
    assert elsewhere.is_file()


def test_a_component_in_original_names_has_no_config_of_diffusers(pipelines):
    assert main(["convert", "A/unet", "--names", "original", "-o", "OUT", "-q"]) == 0
    assert digests(Path("OUT")).keys() == {"model.safetensors"}


@pytest.mark.parametrize(("part", "stem"), [("unet", PARTS["unet"]), ("text_encoder", PARTS["text_encoder"])])
def test_a_component_in_diffusers_names_is_called_as_its_library_looks_for_it(pipelines, capsys, part, stem):
    one = str(save_model(Path("one.safetensors"), as_checkpoint(2)))
    assert main(["convert", one, "--only", part, "--names", "diffusers", "-o", "OUT"]) == 0
    assert digests(Path("OUT")).keys() == {f"{stem}.safetensors"}
    assert ("diffusers needs the component's config.json" in capsys.readouterr().err) == (part == "unet")


def test_a_model_of_python(pipelines):
    with streammerge.open_model("A") as model:
        streammerge.merge(model, output="OUT", sync=False)
    assert digests(Path("OUT")).keys() == {*WEIGHTS, *COPIED}


def test_shards_of_a_file_in_diffusers_names_are_verified(pipelines, capsys):
    words = ["A", "B", "--names", "diffusers", "-o", "out.safetensors", "--shard-size", "60kB", "-q", "--no-sync"]
    save_model(Path("a.safetensors"), as_checkpoint(1))
    assert main(["a.safetensors", *words[1:]]) == 0
    for name in ("out.safetensors", "out.safetensors.index.json"):
        assert main(["verify", name, "--all"]) == 0, capsys.readouterr().err
        assert capsys.readouterr().out.endswith("Every byte is what the recipe gives.\n")
