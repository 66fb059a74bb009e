"""`verify` finds every byte and tensor that is not what the recipe makes."""

from __future__ import annotations

from pathlib import Path

from tests.cli.small_models import UNET, write_recipe


def test_verify_checks_the_format_and_with_the_recipe_every_byte(folder, run):
    merge = ("a.safetensors:0.3", "b.safetensors:0.7")
    assert run(*merge, "-o", "out.safetensors", "-q").code == 0
    result = run("verify", "out.safetensors")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines() == [
        "out.safetensors: a valid model, safetensors, 3 tensors",
        "hashes: not checked: there is no out.safetensors.sha256",
        "inputs: not checked: their hashes were not recorded (--hash-inputs)",
        "values: 3 windows of 3 of 3 tensors are what the recipe gives (--all computes every byte)",
    ]
    assert run("verify", "out.safetensors", "--all").out.endswith("Every byte is what the recipe gives.\n")
    assert "recipe in its metadata" in run("verify", "a.safetensors").out
    result = run("verify", "out.safetensors", *merge)
    assert (result.code, result.err) == (0, "")
    assert result.out.endswith("Every byte is what the recipe gives.\n")
    recipe = write_recipe(parameters={"weight": [0.3]})
    assert run("verify", "out.safetensors", recipe).code == 1


def test_verify_finds_a_byte_that_is_wrong(folder, run):
    merge = ("a.safetensors", "b.safetensors")
    assert run(*merge, "-o", "out.safetensors", "-q").code == 0
    content = bytearray(Path("out.safetensors").read_bytes())
    content[-1] ^= 1
    Path("out.safetensors").write_bytes(content)
    for words in ((), ("--all",), merge):
        result = run("verify", "out.safetensors", *words)
        assert result.code == 1
        assert result.err.startswith(f"error: out.safetensors: 1 tensor is not what the recipe gives\n  {UNET}\n")
        assert "Every byte" not in result.out
    Path("a.safetensors").unlink()
    result = run("verify", "out.safetensors")
    assert result.code == 0  # its format is all right, and it says what was not checked
    assert "values: not checked: out.safetensors: the recipe in its metadata needs models that are not" in result.out
    assert run("verify", "out.safetensors", "--all").code == 1


def test_verify_finds_tensors_that_are_others(folder, run):
    assert run("a.safetensors", "b.safetensors", "-o", "out.safetensors", "-q").code == 0
    result = run("verify", "out.safetensors", "depth.safetensors", "b.safetensors", "--on-missing", "keep")
    assert result.code == 1
    assert "out.safetensors: 1 tensors are missing, superfluous, or of another dtype or shape" in result.err
    assert "  depth_model.x   planned F32 [3]   found –" in result.err
    result = run("verify", "out.safetensors", "a.safetensors", "b.safetensors", "--dtype", "fp16")
    assert result.code == 1
    assert f"{UNET}   planned F16 [4]   found F32 [4]" in result.err


def test_verify_reads_shards(folder, run):
    merge = ("a.safetensors", "b.safetensors", "--shard-size", "16")
    assert run(*merge, "-o", "out", "-q").code == 0
    result = run("verify", "out", "a.safetensors", "b.safetensors")
    assert result.code == 0
    assert "a valid model, sharded safetensors (2 files), 3 tensors" in result.out


def test_a_merge_may_verify_itself(folder, run):
    assert run("a.safetensors", "b.safetensors", "-o", "out.safetensors", "--verify", "-q").code == 0


def test_what_was_typed_for_a_file_that_came_out_in_shards_finds_them(folder, run):
    merge = ("a.safetensors", "b.safetensors", "-o", "out.safetensors", "--shard-size", "16", "-q")
    assert run(*merge).code == 0
    for name in ("out.safetensors", "out.safetensors.index.json"):
        result = run("verify", name, "--all")
        assert (result.code, result.err) == (0, "")
        assert result.out.endswith("Every byte is what the recipe gives.\n")
    assert run("out.safetensors", "a.safetensors", "-o", "more.safetensors", "-q").code == 0
    assert run("out.safetensors", "a.safetensors", "-o", "out.safetensors", "-q", "--force").code == 1


def test_models_are_looked_for_where_a_folder_lies_too(folder, run):
    assert run("a.safetensors", "b.safetensors", "-o", "out", "-q").code == 0
    assert "Every byte" in run("verify", "out", "--all").out
    Path("elsewhere").mkdir()
    Path("out").rename("elsewhere/out")
    assert "needs models that are not beside it" in run("verify", "elsewhere/out", "--all").err
