"""What the tests of the command line share: a folder with models, and the program in this process."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from streammerge.cli.main import main
from tests.cli.small_models import UNET, VAE, VALUES


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with models of constant values: UNET and VAE of all, `steps` of all, and `depth`'s own."""
    monkeypatch.chdir(tmp_path)
    for name, value in VALUES.items():
        tensors = {UNET: torch.full((4,), value), VAE: torch.full((2,), value), "steps": torch.tensor(int(value))}
        if name == "depth":
            tensors["depth_model.x"] = torch.full((3,), value)
        save_file(tensors, f"{name}.safetensors", {"format": "pt"})
    return tmp_path


@pytest.fixture
def run(capsys):
    """Run the program in this process: its exit code, stdout and stderr."""

    def run(*words):
        code: object
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, out=printed.out, err=printed.err)

    return run
