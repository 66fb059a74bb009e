"""What people write who use no tool: everything in memory, a loop over the tensors."""

from __future__ import annotations

from typing import Final

from benchmarks.peers.description import script_command
from benchmarks.tools import CannotRun, Command, Job, Tool


def plain_command(job: Job) -> Command:
    """`load_file`, arithmetic in float32, `save_file`."""
    if job.case.container == "ckpt":
        raise CannotRun("load_file reads safetensors only; the article's script runs this case")
    if job.case.merge.method == "ties":
        raise CannotRun("TIES is no loop of a few lines; people take a tool for it")
    return script_command(job, "plain.py")


def article_command(job: Job) -> Command:
    """`torch.load`, `deepcopy`, `torch.save`."""
    if job.case.container != "ckpt":
        raise CannotRun("torch.load reads no safetensors; the plain script runs this case")
    if job.case.merge.method != "task_arithmetic":
        raise CannotRun("the article's script knows task arithmetic only")
    return script_command(job, "article.py", output="merged.ckpt")


PLAIN: Final = Tool("script", "plain script: load_file, float32, save_file", plain_command)
ARTICLE: Final = Tool("article-script", "the article's script: torch.load, deepcopy, torch.save", article_command)
