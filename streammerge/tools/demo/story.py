"""The founding job from beginning to end, with models of true names and random values."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from streammerge.errors import MergeError, format_size
from streammerge.tools.demo.files import Container, DemoModels, make_models
from streammerge.tools.demo.reference import check_article

Say = Callable[[str], None]

UNET = "model.diffusion_model.*"


def tell(
    folder: Path,
    *,
    full: bool,
    dtype: Literal["F16", "F32"],
    container: Container,
    seed: int,
    models_only: bool,
    force: bool,
    say: Say,
) -> None:
    """Make the three models, compare, plan, merge and check, each step with the command that a user would type.

    `say` shows a line.
    """
    started = time.perf_counter()
    models = make_models(folder, full=full, dtype=dtype, container=container, seed=seed, force=force)
    paths = (models.base, models.depth, models.waifu)
    say(f"Made in {time.perf_counter() - started:.1f} s, with random values:")
    for path in paths:
        say(f"  {path}  {format_size(path.stat().st_size)}")
    if models_only:
        return
    output = folder / "waifu-depth.safetensors"
    run = functools.partial(_run, say)
    run("compare", models.depth, models.waifu, "--match", UNET, "--least", "5")
    run("plan", *_job(models, output, force=force))
    run(*_job(models, output, force=force))
    run("inspect", output)
    say("\nEvery element against base + 0.5 (depth - base) + 0.5 (waifu - base) in float64:")
    say(check_article(models, output))


def _job(models: DemoModels, output: Path, *, force: bool) -> list[object]:
    inputs = [f"depth={models.depth}", f"base={models.base}", f"waifu={models.waifu}"]
    return ["--recipe", "sd2-depth", *inputs, "-o", output, *(["--force"] if force else [])]


def _run(say: Say, *words: object) -> None:
    """Show and run a command, in a process of its own so that the RAM it reports is its own."""
    typed = " ".join(f"'{word}'" if "*" in str(word) else str(word) for word in words)
    say(f"\n$ streammerge {typed}")
    sys.stdout.flush()
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:replace"}
    done = subprocess.run([sys.executable, "-m", "streammerge", *map(str, words)], check=False, env=environment)
    if done.returncode:
        raise MergeError(f"the demo's step failed with exit code {done.returncode}")
