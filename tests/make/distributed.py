"""Distributed checkpoints as torch writes them: by four ranks of a process group, with several ways to cut tensors.

Run as a program it saves one to the folder that it is given; `tensors` are what it saves, whole.
"""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

RANKS = 4
PATIENCE = timedelta(minutes=3)

CUTS: dict[str, tuple[tuple[int, ...], str]] = {
    "rows.weight": ((9, 5), "rows"),
    "few_rows.weight": ((2, 5), "rows"),
    "vector.bias": ((7,), "rows"),
    "columns.weight": ((6, 10), "columns"),
    "grid.weight": ((7, 6), "grid"),
    "experts.gate_up_proj": ((3, 8, 5), "second"),
    "experts.down_proj": ((2, 3, 9), "third"),
    "copied.weight": ((3, 3), "whole"),
    "scalar": ((), "whole"),
    "half.weight": ((8, 4), "grid"),
    "large.weight": ((1030, 520), "grid"),
}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """The model's tensors, and a buffer of integers."""
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, (shape, _) in CUTS.items()}
    made["half.weight"] = made["half.weight"].bfloat16()
    return {**made, "count": torch.tensor([seed, 2**40])}


def save_ranks(folder: Path, seed: int = 0) -> Path:
    """Have four ranks save a model and an optimizer."""
    done = subprocess.run(
        [sys.executable, __file__, str(folder), str(seed)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def _rank(rank: int, folder: str, seed: int, meeting: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS, timeout=PATIENCE)
    line, grid = init_device_mesh("cpu", (RANKS,)), init_device_mesh("cpu", (2, 2))
    ways: dict[str, tuple[Any, Any]] = {
        "rows": (line, [Shard(0)]),
        "columns": (line, [Shard(1)]),
        "second": (line, [Shard(1)]),
        "third": (grid, [Shard(2), Shard(0)]),
        "grid": (grid, [Shard(0), Shard(1)]),
        "whole": (line, [Replicate()]),
    }
    made = tensors(seed)
    cut = {name: distribute_tensor(made[name], *ways[way]) for name, (_, way) in CUTS.items()}
    moments = {name: torch.zeros_like(tensor) for name, tensor in cut.items()}
    state = {"model": {**cut, "count": made["count"]}, "optim": {"state": moments, "lr": 0.1}, "step": 5}
    save(state, checkpoint_id=folder)
    dist.barrier()


def _leave_as_a_rank(rank: int, folder: str, seed: int, meeting: str) -> None:
    """Be one rank, and end without tearing the process group down: on a busy machine that aborts now and then."""
    try:
        _rank(rank, folder, seed, meeting)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    faulthandler.enable()
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    with tempfile.TemporaryDirectory() as place:
        rank_of: dict[int, int] = {}
        for rank in range(RANKS):
            if child := os.fork():
                rank_of[child] = rank
            else:
                _leave_as_a_rank(rank, sys.argv[1], int(sys.argv[2]), f"{place}/meeting")
        ended = {rank: os.waitpid(child, 0)[1] for child, rank in rank_of.items()}
    sys.exit(f"ranks that failed: {ended}" if any(ended.values()) else 0)
