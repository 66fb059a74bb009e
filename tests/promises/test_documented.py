"""What the README and the pages show is what happens: every block of console, Python and YAML runs, in miniature.

The blocks of a page run in their order in a folder that holds the files they name. One that begins with `# name.yaml`
is that file. Shown output is compared but for its numbers; `…` on a line of its own stands for any lines.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from docs import make
from streammerge.cli import main as cli
from streammerge.methods import METHODS
from streammerge.tools.demo.files import make_models
from tests.make.models import Tensors, load_model, make_tensors, near
from tests.make.vocabularies import tokenizer_values
from tests.promises.pages import PAGES, blocks

EXAMPLES = make.ROOT / "examples"
RUN = ("console", "python", "yaml")
LIMIT = re.compile(r'(?<=--max-ram )\w+|(?<=max_ram=")\w+')
"""A bound of memory, which the tests' own process is above."""

LLAMA = {
    "model.embed_tokens.weight": (64, 16),
    **{f"model.layers.{layer}.self_attn.q_proj.weight": (16, 16) for layer in range(4)},
    **{f"model.layers.{layer}.mlp.{name}_proj.weight": (32, 16) for layer in range(4) for name in ("gate", "up")},
    **{f"model.layers.{layer}.mlp.down_proj.weight": (16, 32) for layer in range(4)},
    "lm_head.weight": (64, 16),
}
LLAVA = {
    **{name.replace("model.", "model.language_model.", 1): shape for name, shape in LLAMA.items()},
    "model.vision_tower.encoder.layers.0.mlp.fc1.weight": (16, 16),
    "model.multi_modal_projector.linear_1.weight": (16, 16),
}
ADAPTED = {f"down_blocks_{block}_attentions_0_proj_in": f"input_blocks.{3 * block + 1}.1.proj_in" for block in range(2)}
"""Modules of LoRAs, and the tensors that they change in the models here."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every file that an example names, in a folder of its own."""
    folder = tmp_path_factory.mktemp("files")
    models = make_models(folder)
    zips = make_models(folder, container="ckpt")
    for name in ("base", "depth", "waifu"):
        shutil.copy(getattr(zips, name), folder / f"{name}.ckpt")
    base = load_file(models.base)
    save_file(base, folder / "base.safetensors")
    for seed, name in enumerate("abc"):
        save_file(near(base, seed), folder / f"{name}.safetensors")
        torch.save(near(base, seed), folder / f"{name}.ckpt")
        save_shards(make_tensors(seed, torch.bfloat16, LLAMA), folder / f"llama-{name}")
        save_shards(make_tensors(seed, torch.bfloat16, LLAVA), folder / f"llava-{name}")
        save_file(lora(base, seed), folder / f"lora-{name}.safetensors")
    for step in (500, 1000, 1500):
        save_shards(make_tensors(step, torch.bfloat16, LLAMA), folder / "training" / f"checkpoint-{step}")
    ours, theirs = (make_tensors(seed, shapes={"conv_first.weight": (8, 3, 3, 3)}) for seed in range(2))
    torch.save({"params": ours, "params_ema": theirs}, folder / "esrgan.pth")
    return folder


def lora(model: Tensors, seed: int) -> Tensors:
    """A LoRA of rank 4 for two modules of the model."""
    made: Tensors = {}
    for module, tensor in ADAPTED.items():
        rows, columns, *_ = model[f"model.diffusion_model.{tensor}.weight"].shape
        shapes = {"lora_up.weight": (rows, 4), "lora_down.weight": (4, columns)}
        parts = {**make_tensors(seed, torch.float16, shapes, scale=0.1), "alpha": torch.tensor(2.0).half()}
        made |= {f"lora_unet_{module}.{part}": tensor for part, tensor in parts.items()}
    return made


def save_shards(tensors: Tensors, folder: Path) -> None:
    """Two shards and their index, a config, a tokenizer."""
    folder.mkdir(parents=True)
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    tokens = ["<s>", *(f"w{number}" for number in range(1, 64))]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_values(tokens)))
    (folder / "config.json").write_text('{"model_type": "llama", "torch_dtype": "bfloat16", "num_hidden_layers": 4}')
    save_file(tensors, folder / "all.safetensors")
    words = [str(folder / "all.safetensors"), "-o", str(folder), "--shard-size", "4kB", "--no-metadata", "-q"]
    assert cli.main(words) == 0
    (folder / "all.safetensors").unlink()


@pytest.fixture
def folder(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(files, tmp_path, dirs_exist_ok=True, copy_function=os.link)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def no_more_methods() -> Iterator[None]:
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@dataclass(frozen=True)
class Command:
    """A command of a console block, and the output that is shown of it."""

    words: list[str]
    shown: str

    @classmethod
    def all_of(cls, text: str) -> list[Command]:
        found = []
        for part in re.split(r"^\$ ", text.replace("\\\n", " "), flags=re.MULTILINE)[1:]:
            typed, _, shown = part.partition("\n")
            words = shlex.split(LIMIT.sub("8GB", typed))
            assert words[0] == "streammerge", f"only streammerge is run, not {words[0]}"
            found.append(cls(words[1:], shown.strip("\n")))
        return found

    def run(self) -> None:
        """Run it, and compare what it says with what is shown."""
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
            code = cli.main(self.words)
        found = errors.getvalue() if code else out.getvalue()
        assert code == self.shown.startswith("error: "), found
        if self.shown:
            assert is_shown(self.shown, found), f"{self.words} says:\n{found}"


def is_shown(shown: str, found: str) -> bool:
    """Whether this is what was found, numbers aside; `…` on a line of its own stands for any lines."""
    parts = [re.escape(without_numbers(part)) for part in re.split(r"^…$\n?", shown + "\n", flags=re.MULTILINE)]
    return re.fullmatch(r"(?:.*\n)*".join(parts), without_numbers(found)) is not None


MEMORY = re.compile(
    r"0(, 0)? above import torch( \(about 0\))?|0 in all, without torch|0, all of it: torch was not imported"
)
LOOPS = re.compile(r"compiled loops( and torch)?")
"""What differs where there is no compiler, or where torch had been imported before."""


def without_numbers(text: str) -> str:
    """The text with every number the same, in the same unit, without blanks that only align, whatever computed it."""
    text = re.sub(r"\b\d[\d.,]*( ?([kMGT]?B|[kMGT])\b)?", "0", text)
    text = MEMORY.sub("0 of memory", LOOPS.sub("torch", text))
    text = re.sub(r"\b(mmap|pread)\b", "mmap", re.sub(r"[▏▎▍▌▋▊▉█]+", "█", text))
    return re.sub(r"[ \t]+", " ", "".join(line.strip() + "\n" for line in text.strip("\n").splitlines()))


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.language in RUN for b in blocks(page))], ids=lambda page: page.name
)
def test_a_page_is_true(page: Path, folder: Path) -> None:
    for block in blocks(page):
        if block.name:
            (folder / block.name).write_text(block.text, encoding="utf-8")
        match block.language:
            case "console":
                for command in Command.all_of(block.text):
                    command.run()
            case "yaml":
                inputs = next(yaml.safe_load_all(block.text)).get("inputs", {})
                bound = [f"{name}={name}.safetensors" for name in inputs]
                assert cli.main(["plan", block.name, *bound, "-q"]) == 0, block.text
            case "python" if not block.name and "import streammerge\n" in block.text:
                exec(compile(LIMIT.sub("8GB", block.text), str(page), "exec"), {})


def test_commands_are_found() -> None:
    (readme,) = (page for page in PAGES if page == make.README)
    commands = [command for block in blocks(readme) for command in Command.all_of(block.text)]
    assert len(commands) >= 4
    assert sum(bool(command.shown) for command in commands) >= 1


def test_recipes_have_names() -> None:
    recipes = [block for page in PAGES for block in blocks(page) if block.language == "yaml"]
    assert len(recipes) >= 5
    assert all(block.name for block in recipes)


@pytest.mark.parametrize(
    ("shown", "found", "same"),
    [
        ("peak RAM  250 MB, 15.1 MB above", "peak RAM  3 kB, 0 B above\n", True),
        ("peak RAM  250 MB", "peak VRAM  250 MB\n", False),
        ("a\n…\nd", "a\nb\nc\nd\n", True),
        ("…\nd", "d\n", True),
        ("a\n…", "a\nb\n", True),
        ("a\n…\nd", "a\nb\n", False),
        ("a", "a\nb\n", False),
        ("run on  cpu, 2 threads, pread", "run on cpu, 1 threads, mmap\n", True),
        ("run on  cpu, 2 threads, pread, compiled loops", "run on cpu, 1 threads, mmap, torch\n", True),
        ("peak RAM  40 MB in all, without torch", "peak RAM  3 kB above import torch (about 220 MB)\n", True),
    ],
)
def test_shown_output_is_compared(shown: str, found: str, same: bool) -> None:
    assert is_shown(shown, found) == same


# ── examples/ ────────────────────────────────────────────────────────────────────────────────────────────────────────


def run_example(name: str, *words: str) -> str:
    done = subprocess.run([sys.executable, str(EXAMPLES / name), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_of_a_recipe(folder: Path) -> None:
    said = run_example("recipe.py", "base.safetensors", "a.safetensors", "b.safetensors", "out.safetensors")
    assert "are what the recipe gives" in said
    merged, model = load_model(folder / "out.safetensors"), load_model(folder / "a.safetensors")
    vae = [name for name in merged if name.startswith("first_stage_model.")]
    assert vae
    assert all(torch.equal(merged[name], model[name]) for name in vae)


def test_the_example_in_python(folder: Path) -> None:
    said = run_example("from_python.py", "a.safetensors", "b.ckpt", "out.safetensors")
    assert "1228 tensors merged, 0 copied" in said
    merged, a, b = (load_model(folder / f"{name}.safetensors") for name in ("out", "a", "b"))
    name = "model.diffusion_model.input_blocks.0.0.weight"
    expected = 0.9 * a[name].double() + 0.1 * b[name].double()  # near models: the sphere is nearly flat
    assert torch.allclose(merged[name].double(), expected, atol=2e-3)


def test_the_example_of_a_method_of_ones_own(folder: Path) -> None:
    names = ("base.safetensors", "a.safetensors", "b.safetensors")
    assert "1228 tensors merged" in run_example("own_method.py", *names, "out.safetensors")
    base, a, b, merged = (load_model(folder / f"{name}.safetensors") for name in ("base", "a", "b", "out"))
    name = "model.diffusion_model.input_blocks.0.0.weight"
    start, *ends = (each[name].double() for each in (base, a, b))
    change = sum(share * (end - start) for share, end in zip((0.7, 0.3), ends, strict=True))
    expected = start + torch.as_tensor(change).clamp(-0.02, 0.02)
    assert torch.equal(merged[name], expected.to(merged[name].dtype))
    words = ["--base", names[0], *names[1:], "-m", "capped", "--methods", str(EXAMPLES / "own_method.py"), "-q"]
    assert cli.main([*words, "-o", "typed.safetensors"]) == 0


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_without_words_says_how_it_is_run(path: Path) -> None:
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"python examples/{path.name} " in done.stderr
