"""Copy the state dict of a checkpoint, without some of its tensors: `python state_dict.py IN OUT NAME...`."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main() -> None:
    """Write .safetensors or .ckpt, as the name says; in a .ckpt the tensors stand at the top."""
    source, target, *unwanted = sys.argv[1:]
    if Path(source).suffix == ".safetensors":
        kept = {name: values for name, values in load_file(source).items() if name not in unwanted}
        save_file(kept, target, metadata={"format": "pt"})
    else:
        state = torch.load(source, map_location="cpu", mmap=True)["state_dict"]
        torch.save({name: values for name, values in state.items() if name not in unwanted}, target)


if __name__ == "__main__":
    main()
