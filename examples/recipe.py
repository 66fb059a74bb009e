"""Run the recipe beside this file: first show what it would do, then do it, and check the result.

    python examples/recipe.py BASE MODEL STYLE OUT.safetensors

The same by hand: `streammerge examples/recipe.yaml base=BASE model=MODEL style=STYLE -o OUT.safetensors`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

RECIPE = Path(__file__).with_name("recipe.yaml")


def streammerge(*words: str) -> None:
    """Run the program, and stop here if it stops."""
    print("$ streammerge", *words, flush=True)
    subprocess.run([sys.executable, "-m", "streammerge", *words], check=True)


def main(base: str, model: str, style: str, output: str) -> None:
    """Plan, merge, verify."""
    merge = [str(RECIPE), f"base={base}", f"model={model}", f"style={style}"]
    streammerge("plan", *merge)
    streammerge(*merge, "-o", output)
    streammerge("verify", output, f"base={base}", f"model={model}", f"style={style}")


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(str(__doc__))
    main(*sys.argv[1:])
