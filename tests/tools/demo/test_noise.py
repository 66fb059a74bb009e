"""The example's values don't depend on how they are asked for, and are like real ones."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.tools.demo.files import CHUNK
from streammerge.tools.demo.layouts import MINIATURE, checkpoint
from streammerge.tools.demo.noise import BLOCK, SMALLEST, FineTune, Noise
from tests.tools.demo.miniatures import FIRST_CONVOLUTION, ODD, ODD_NOISE, info, miniature_depth, read


@st.composite
def cuts(draw: st.DrawFn, elements: int) -> list[int]:
    inner = draw(st.lists(st.integers(0, elements), max_size=6))
    return sorted({0, elements, *inner})


@settings(max_examples=25, deadline=None)
@given(at=cuts(3 * (CHUNK - 5)), tuned=st.booleans())
def test_values_do_not_depend_on_the_cuts(at, tuned):
    model = FineTune("task", ODD, ODD_NOISE) if tuned else ODD_NOISE
    whole = model.values("several.chunks", at[0], at[-1])
    pieces = [model.values("several.chunks", start, stop) for start, stop in itertools.pairwise(at)]
    assert torch.equal(torch.cat(pieces), whole)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_widened_convolution_does_not_depend_on_the_cuts(data):
    model, tensors = miniature_depth()
    elements = tensors[FIRST_CONVOLUTION].elements
    at = data.draw(cuts(elements))
    pieces = [model.values(FIRST_CONVOLUTION, start, stop) for start, stop in itertools.pairwise(at)]
    assert torch.equal(torch.cat(pieces), model.values(FIRST_CONVOLUTION, 0, elements))


def test_values_follow_from_the_seed():
    assert torch.equal(read(Noise(ODD, 7), "first.weight"), read(ODD_NOISE, "first.weight"))
    assert not torch.equal(read(Noise(ODD, 8), "first.weight"), read(ODD_NOISE, "first.weight"))


@pytest.mark.parametrize("layout", ["sd2-depth", "sd1"])
def test_values_are_as_large_as_real_ones(layout):
    tensors = checkpoint(layout, scale=MINIATURE)
    noise = Noise(tensors)
    for name, described in tensors.items():
        values = read(noise, name)
        if name.endswith("position_ids"):
            assert values.tolist() == list(range(77))
        elif name.endswith("bias"):
            assert values.abs().max() < 0.05, name
        elif len(described.shape) == 1:
            assert (values - 1).abs().max() < 0.5, name
        elif described.elements > 1000:
            assert 0.015 < values.std() < 0.025, name
            assert values.mean().abs() < 0.005, name


def test_no_two_tensors_are_alike_and_no_weight_is_zero():
    tensors = checkpoint("sd2-depth", scale=MINIATURE)
    noise = Noise(tensors)
    contents = {name: read(noise, name).half() for name in tensors}
    assert len({values.numpy().tobytes() for values in contents.values()}) == len(tensors)
    assert all(values.count_nonzero() == values.numel() for values in contents.values())


def test_blocks_of_a_tensor_differ():
    tensors = {"w": info("F32", 4, BLOCK)}
    blocks = read(Noise(tensors), "w").view(4, BLOCK)
    correlation = torch.corrcoef(blocks) - torch.eye(4)
    assert correlation.abs().max() < 0.02
    assert blocks.abs().min() > SMALLEST * 0.01


def test_a_fine_tune_is_its_base_and_a_small_task_vector():
    base, tuned = checkpoint("sd2-base", scale=MINIATURE), checkpoint("sd2-waifu", scale=MINIATURE)
    noise = Noise(base)
    waifu, other = FineTune("waifu", tuned, noise), FineTune("other", tuned, noise)
    for name, described in tuned.items():
        task, another = (read(model, name) - read(noise, name) for model in (waifu, other))
        assert task.count_nonzero() > 0.9 * task.numel(), name
        assert not torch.equal(task, another), name
        if len(described.shape) > 1 and described.elements > 1000:
            assert 5e-4 < task.std() < 1.5e-2, name


def test_a_fine_tune_of_more_channels_starts_with_zeros_there():
    model, tensors = miniature_depth()
    base = checkpoint("sd2-base", scale=MINIATURE)
    wide = read(model, FIRST_CONVOLUTION).view(tensors[FIRST_CONVOLUTION].shape)
    narrow = read(Noise(base), FIRST_CONVOLUTION).view(base[FIRST_CONVOLUTION].shape)
    assert wide.shape == (10, 5, 3, 3)
    assert 0 < (wide[:, :4] - narrow).std() < 1.5e-2
    assert 0 < wide[:, 4].std() < 1.5e-2


def test_a_fine_tune_leaves_positions_alone():
    tuned = FineTune("task", ODD, ODD_NOISE)
    assert read(tuned, "embeddings.position_ids").tolist() == list(range(77))
