"""Comparing two models on disk: inner products against float64, and what can't be compared."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import streammerge
from benchmarks.standin import Cards
from streammerge.compute import costs
from streammerge.compute import evaluate as compute
from streammerge.compute.expressions import PIECE
from streammerge.errors import DeviceError
from streammerge.tools.similarity import ComparingPass, compare_models
from tests.make.models import DTYPE_NAMES, make_tensors, near, normal, save_models, with_integers


@pytest.fixture
def opened(tmp_path):
    """Writes two models and opens them."""
    closing: list[streammerge.Checkpoint] = []

    def save(a, b):
        paths = save_models(tmp_path, a=a, b=b)
        pair = tuple(streammerge.open_model(path) for path in paths.values())
        closing.extend(pair)
        return pair

    yield save
    for model in closing:
        model.close()


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("distance", ["near", "far"])
def test_cosines_norms_and_distances_are_those_of_float64(opened, dtype, distance):
    a = make_tensors(1, DTYPE_NAMES[dtype])
    b = near(a, 2) if distance == "near" else make_tensors(2, DTYPE_NAMES[dtype])
    found = compare_models(*opened(a, b))
    assert [entry.name for entry in found.similarities] == list(streammerge.open_model(found.path_a).tensors)
    assert len(found.similarities) == len(a)
    for entry in found.similarities:
        x, y = a[entry.name].double().reshape(-1), b[entry.name].double().reshape(-1)
        assert (entry.shape, entry.elements) == (tuple(a[entry.name].shape), x.numel())
        assert entry.norm_a == pytest.approx(float(x.norm()), rel=1e-12)
        assert entry.norm_b == pytest.approx(float(y.norm()), rel=1e-12)
        assert entry.norm_difference == pytest.approx(float((y - x).norm()), rel=1e-6)
        assert entry.identical == torch.equal(x, y)
        if x.numel():
            assert entry.cosine == pytest.approx(float(x.dot(y) / (x.norm() * y.norm())), abs=1e-12)
        else:
            assert entry.cosine is None


def test_a_model_is_identical_with_itself_whatever_its_dtype(opened):
    a = make_tensors(1, torch.float16)
    found = compare_models(*opened(a, {name: tensor.float() for name, tensor in a.items()}))
    assert all(entry.identical and entry.norm_difference == 0 for entry in found.similarities)
    assert all(entry.cosine == pytest.approx(1.0, abs=1e-15) for entry in found.similarities if entry.elements)


def test_one_changed_bit_is_found(opened):
    a = make_tensors(1)
    b = {name: tensor.clone() for name, tensor in a.items()}
    flat = b["layers.2.large"].view(-1)
    flat[-1] = torch.nextafter(flat[-1], torch.tensor(math.inf))
    different = [entry for entry in compare_models(*opened(a, b)).similarities if not entry.identical]
    assert [entry.name for entry in different] == ["layers.2.large"]
    step = float(flat[-1].double() - a["layers.2.large"].view(-1)[-1].double())
    assert different[0].norm_difference == pytest.approx(step, rel=1e-12)


def test_opposite_and_perpendicular_tensors(opened):
    a = {"opposite": torch.tensor([1.0, 2.0]), "perpendicular": torch.tensor([1.0, 0.0]), "zero": torch.ones(2)}
    b = {"opposite": torch.tensor([-3.0, -6.0]), "perpendicular": torch.tensor([0.0, 5.0]), "zero": torch.zeros(2)}
    cosines = {entry.name: entry.cosine for entry in compare_models(*opened(a, b)).similarities}
    assert cosines == {"opposite": pytest.approx(-1.0, abs=1e-15), "perpendicular": 0.0, "zero": None}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_has_no_cosine(opened, bad):
    a, b = {"w": torch.tensor([1.0, bad, 2.0])}, {"w": torch.tensor([1.0, 2.0, 2.0])}
    (entry,) = compare_models(*opened(a, b)).similarities
    assert entry.cosine is None
    assert not math.isfinite(entry.norm_a)
    assert not entry.identical


def test_what_cannot_be_compared_is_listed(opened):
    a = with_integers(
        {"both": torch.ones(3), "shape": torch.ones(2, 3), "rank": torch.ones(6), "a.alone": torch.ones(1)}
    )
    b = with_integers(
        {"both": torch.ones(3), "shape": torch.ones(3, 2), "rank": torch.ones(6, 1), "b.alone": torch.ones(1)}
    )
    b["count"] = torch.ones(2)
    a["count"] = torch.ones(2, dtype=torch.int32)
    found = compare_models(*opened(a, b))
    assert [entry.name for entry in found.similarities] == ["both"]
    assert {(entry.name, entry.shape_a, entry.shape_b) for entry in found.shape_mismatches} == {
        ("shape", (2, 3), (3, 2)),
        ("rank", (6,), (6, 1)),
    }
    assert found.only_in_a == ("a.alone",)
    assert found.only_in_b == ("b.alone",)
    assert set(found.not_compared) == {"positions", "mask", "count"}


def test_only_what_matches_is_compared(opened):
    a, b = make_tensors(1), make_tensors(2)
    b["layers.0.extra"] = torch.ones(1)
    b["other"] = torch.ones(1)
    found = compare_models(*opened(a, b), match="layers.0.*")
    assert {entry.name for entry in found.similarities} == {"layers.0.bias", "layers.0.odd"}
    assert found.only_in_b == ("layers.0.extra",)
    assert compare_models(*opened(a, b), match="nothing").similarities == ()


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize("threads", [1, 3, 8])
def test_the_result_does_not_depend_on_how_it_is_run(opened, monkeypatch, threads, io):
    monkeypatch.setattr(compute, "BLOCK", 1 << 12)
    monkeypatch.setattr(costs, "WINDOW", 3)
    a, b = opened(make_tensors(1, torch.float16), make_tensors(2, torch.float16))
    assert compare_models(a, b, threads=threads, io=io) == compare_models(a, b, threads=1)


def test_a_card_finds_the_same_in_stretches(opened, monkeypatch):
    a = {"w": normal((12 * PIECE + 5,), 1), "half": normal((3 * PIECE, 2), 2, torch.float16), "one": torch.ones(1)}
    b = {**near(a, 3), "half": a["half"].clone()}
    a["w"][PIECE] = b["w"][PIECE] = torch.nan  # neither a length nor a cosine, but the same in both
    models, measure = opened(a, b), ComparingPass.measure
    alone: list[int] = []

    def noted(self, block, inputs):
        alone.append(block)
        return measure(self, block, inputs)

    monkeypatch.setattr(ComparingPass, "measure", noted)
    with Cards().there() as cards:
        found = compare_models(*models, device="cuda", threads=1)
    assert cards.lanes
    assert alone == [1]
    assert str(found) == str(compare_models(*models, threads=1))  # of which NaNs are the same too
    assert {entry.name for entry in found.similarities if entry.identical} == {"half"}


def test_progress_is_watched_to_the_end(opened):
    a, b = opened(make_tensors(1), make_tensors(2))
    seen = []
    compare_models(a, b, watch=lambda progress: seen.append((progress.done_bytes, progress.total_bytes)))
    total = sum(info.nbytes for model in (a, b) for info in model.tensors.values())
    assert all(entry[1] == total for entry in seen)
    assert seen[-1] == (total, total)


def test_other_containers_are_compared_as_well(tmp_path, opened):
    a = {"transposed": normal((40, 50), 1, torch.float16), "plain": normal((9,), 2, torch.float16)}
    torch.save({"transposed": a["transposed"].T.contiguous().T, "plain": a["plain"]}, tmp_path / "a.ckpt")
    ours, _ = opened(a, a)
    with streammerge.open_model(tmp_path / "a.ckpt") as other:
        found = compare_models(ours, other)
    assert [entry.identical for entry in found.similarities] == [True, True]


def test_a_device_that_is_not_there_is_an_error(opened):
    with pytest.raises(DeviceError, match="no device 'cuda:99'"):
        compare_models(*opened(make_tensors(1), make_tensors(2)), device="cuda:99")


def test_codes_are_compared_by_their_values_or_not_at_all(opened):
    codes = (normal((300, 40), 1) * 50).to(torch.float8_e4m3fn)
    scale = normal((300, 1), 2).abs() + 0.1
    values = codes.double() * scale.double()
    plain = normal((300, 40), 3)
    a = {"p.weight": codes, "p.weight_scale": scale, "q.weight": codes.clone(), "q.strange": torch.ones(())}
    found = compare_models(*opened(a, {"p.weight": plain, "q.weight": plain.clone()}))
    assert [entry.name for entry in found.similarities] == ["p.weight"]
    assert found.not_compared == ("q.weight",)
    x, y = values.reshape(-1), plain.double().reshape(-1)
    assert found.similarities[0].norm_a == pytest.approx(float(x.norm()), rel=1e-12)
    assert found.similarities[0].cosine == pytest.approx(float(x.dot(y) / (x.norm() * y.norm())), abs=1e-12)


SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, 6e-8)


@given(st.lists(st.tuples(st.sampled_from(SPECIAL), st.sampled_from(SPECIAL)), min_size=1, max_size=4), st.booleans())
@settings(max_examples=30, deadline=None)
def test_tensors_of_any_values_are_identical_where_every_value_is(tmp_path_factory, pairs, same):
    folder = tmp_path_factory.mktemp("special")
    a = torch.tensor([pair[0] for pair in pairs], dtype=torch.float16)
    b = a.float() if same else torch.tensor([pair[1] for pair in pairs])
    paths = save_models(folder, a={"x": a}, b={"x": b})
    with streammerge.open_model(paths["a"]) as one, streammerge.open_model(paths["b"]) as other:
        (found,) = compare_models(one, other, threads=1).similarities
    equal = all(x == y or (math.isnan(x) and math.isnan(y)) for x, y in zip(a.tolist(), b.tolist(), strict=True))
    assert found.identical == equal
    assert not equal or found.norm_difference == 0
    assert equal or not same
