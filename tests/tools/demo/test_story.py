"""The founding job in miniature, as `streammerge demo` runs it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from streammerge.cli.main import main
from streammerge.errors import MergeError
from streammerge.tools.demo.files import make_models
from streammerge.tools.demo.reference import check_article, place, ulps


@pytest.mark.parametrize(("dtype", "container"), [("fp16", "safetensors"), ("fp32", "ckpt")])
def test_demo_tells_the_whole_story(tmp_path: Path, dtype: str, container: str):
    words = ["demo", str(tmp_path), "--dtype", dtype, "--container", container]
    done = subprocess.run(
        [sys.executable, "-m", "streammerge", *words], capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    assert "685 merged, 911 copied, 0 dropped" in done.stdout
    assert "waifu lacks 382 tensors" in done.stdout
    assert "911 copied byte for byte" in done.stdout
    assert "least similar" in done.stdout


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.5, 0.4), (1.3, -0.7)])
@pytest.mark.parametrize(("dtype", "most"), [("F16", 1), ("F32", 4)])
def test_any_weights_are_right_to_the_last_place(tmp_path: Path, weights: tuple[float, float], dtype, most: int):
    models = make_models(tmp_path, dtype=dtype)
    output = tmp_path / "out.safetensors"
    depth, waifu = weights
    inputs = [f"depth={models.depth}:{depth}", f"base={models.base}", f"waifu={models.waifu}:{waifu}"]
    assert main(["--recipe", "sd2-depth", *inputs, "-o", str(output), "-q"]) == 0
    said = check_article(models, output, weights)
    assert int(said.split("at most ")[1].split()[0]) <= most


def test_check_notices_a_changed_tensor(tmp_path: Path):
    models = make_models(tmp_path)
    output = tmp_path / "out.safetensors"
    inputs = [f"depth={models.depth}", f"base={models.base}", f"waifu={models.waifu}"]
    assert main(["--recipe", "sd2-depth", *inputs, "-o", str(output), "-q"]) == 0
    tensors = load_file(output)
    name = "depth_model.model.pretrained.act_postprocess3.3.bias"
    tensors[name] = tensors[name] + 1
    save_file(tensors, output)
    with pytest.raises(MergeError, match=r"act_postprocess3\.3\.bias.*byte for byte"):
        check_article(models, output)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_ulps_counts_representable_numbers(dtype: torch.dtype):
    one = torch.tensor([1.0, -1.0, 0.0, -0.0], dtype=dtype)
    bits = torch.int16 if dtype == torch.float16 else torch.int32
    up = torch.nextafter(one.float(), torch.tensor(9.0)).to(dtype) if dtype == torch.float32 else None
    assert ulps(one, one.double()) == 0
    assert place(one.view(bits))[2] == place(one.view(bits))[3] == 0
    if up is not None:
        assert ulps(up, one.double()) == 1
    smallest = torch.tensor([1, -(2 ** (one.element_size() * 8 - 1)) + 1]).to(bits).view(dtype)
    assert ulps(smallest[:1], smallest[1:].double()) == 2
