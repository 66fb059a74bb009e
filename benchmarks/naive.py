"""The usual script: load three models whole, add them up, save.

Run as `python benchmarks/naive.py BASE DEPTH WAIFU OUT`.
"""

import sys

from safetensors.torch import load_file, save_file

UNET = "model.diffusion_model."


def main() -> None:
    """Merge as the article does, with everything in memory."""
    base, depth, waifu = (load_file(path) for path in sys.argv[1:4])
    merged = dict(depth)
    for name, values in depth.items():
        if name.startswith("first_stage_model."):
            merged[name] = waifu[name]
        elif name.startswith(UNET) and values.shape == base[name].shape:
            start = base[name].float()
            delta = 0.5 * (values.float() - start) + 0.5 * (waifu[name].float() - start)
            merged[name] = (start + delta).to(values.dtype)
    save_file(merged, sys.argv[4], metadata={"format": "pt"})


if __name__ == "__main__":
    main()
