"""The example's models are related, follow from their seed, and replace no others."""

from __future__ import annotations

import shutil

import pytest
import torch

from streammerge.errors import MergeError, OutputError
from streammerge.tools.demo.files import make_models
from streammerge.tools.demo.layouts import MINIATURE, checkpoint
from tests.tools.demo.miniatures import load


@pytest.mark.parametrize("dtype", ["F16", "F32"])
@pytest.mark.parametrize("container", ["safetensors", "ckpt"])
def test_the_example_in_miniature(tmp_path, dtype, container):
    models = make_models(tmp_path / "new" / "folder", dtype=dtype, container=container)
    paths = [models.base, models.depth, models.waifu]
    stems = ["512-base-ema", "512-depth-ema", "wd-1-4-anime_e2"]
    assert [path.name for path in paths] == [f"{stem}.{container}" for stem in stems]
    assert sorted(models.base.parent.iterdir()) == sorted(paths)
    for path, layout in zip(paths, ["sd2-base", "sd2-depth", "sd2-waifu"], strict=True):
        loaded = load(path)
        described = checkpoint(layout, dtype=dtype, scale=MINIATURE)
        assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == {
            name: entry.shape for name, entry in described.items()
        }
        assert {tensor.dtype for tensor in loaded.values()} == {torch.float16 if dtype == "F16" else torch.float32}
        assert 1_000_000 < path.stat().st_size < 8_000_000


def test_the_example_is_the_same_in_both_containers(tmp_path):
    flat = make_models(tmp_path, container="safetensors")
    zipped = make_models(tmp_path, container="ckpt")
    for one, other in [(flat.base, zipped.base), (flat.depth, zipped.depth), (flat.waifu, zipped.waifu)]:
        left, right = load(one), load(other)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_the_example_follows_from_its_seed(tmp_path):
    first, again, other = (make_models(tmp_path / str(number), seed=seed) for number, seed in enumerate((5, 5, 6)))
    for name in ("base", "depth", "waifu"):
        contents = [getattr(models, name).read_bytes() for models in (first, again, other)]
        assert contents[0] == contents[1] != contents[2]


def test_the_examples_models_are_related(tmp_path):
    models = make_models(tmp_path)
    base, depth, waifu = (load(path) for path in (models.base, models.depth, models.waifu))
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    one, other = ((tuned[name].float() - base[name].float()).flatten() for tuned in (depth, waifu))
    assert 5e-4 < one.std() < 1.5e-2
    assert 5e-4 < other.std() < 1.5e-2
    assert torch.cosine_similarity(one, other, dim=0).abs() < 0.1


def test_files_that_may_be_the_real_ones_are_not_replaced(tmp_path):
    real = tmp_path / "512-depth-ema.safetensors"
    real.write_bytes(b"real")
    with pytest.raises(OutputError, match="512-depth-ema"):
        make_models(tmp_path)
    assert real.read_bytes() == b"real"
    assert list(tmp_path.iterdir()) == [real]
    make_models(tmp_path, force=True)
    assert len(load(real)) == 1596


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**10, 9 * 10**9, 10**9))
    folder = tmp_path / "new"
    with pytest.raises(MergeError, match=r"need 16\.08 GB, but only 1\.00 GB are free") as caught:
        make_models(folder, full=True, dtype="F32")
    assert "512-base-ema.safetensors   5.21 GB" in str(caught.value)
    assert not folder.exists()
