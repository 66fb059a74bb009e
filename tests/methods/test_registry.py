"""The numbers: every method against its float64 reference, identities, and what methods refuse."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

import streammerge
from streammerge.errors import MethodError, RecipeError
from streammerge.methods import METHODS, find_method
from streammerge.methods.registry import LinearMethod, method, net
from streammerge.methods.statistics.brackets import Gathering, Sample
from streammerge.methods.statistics.gram import GramPass
from streammerge.methods.statistics.histograms import Equals, LowerBits, UpperBits
from streammerge.methods.statistics.passes import Pass
from streammerge.methods.statistics.ranks import Cut, Ranking
from tests.make.models import (
    DTYPE_NAMES,
    SHAPES,
    SMALL,
    MemoryModel,
    Tensors,
    assert_same_bytes,
    make_tensors,
    merge_to,
    near,
    normal,
    save_model,
    with_integers,
)
from tests.references.linear import CASES, ONE_CASE_EACH, REFERENCES, Array, Case, mostly, relative_error, ulps_apart

LINEAR_CASES = [case for case in CASES if isinstance(find_method(case.method), LinearMethod)]

FAMILY_SHAPES = {name: shape for name, shape in SHAPES.items() if name != "layers.1.block"}


@dataclass(frozen=True)
class Family:
    """A base and three models, as tensors and as files, and what the references make of them."""

    tensors: list[Tensors]
    paths: list[Path]
    references: dict[str, dict[str, Array]] = field(default_factory=dict)

    def expected(self, case: Case) -> dict[str, Array]:
        """The reference's results, worked out once."""
        if str(case) not in self.references:
            self.references[str(case)] = case.expected(self.tensors)
        return self.references[str(case)]


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Models of every dtype, near to each other and far from each other; made when they are first asked for."""
    made: dict[tuple[str, str], Family] = {}

    def family(dtype: str, distance: str) -> Family:
        key = dtype, distance
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{dtype}-{distance}")
            base = with_integers(make_tensors(0, DTYPE_NAMES[dtype], FAMILY_SHAPES))
            relatives = [
                near(base, seed)
                if distance == "near"
                else with_integers(make_tensors(seed, DTYPE_NAMES[dtype], FAMILY_SHAPES), seed)
                for seed in (1, 2, 3)
            ]
            tensors = [base, *relatives]
            paths = [save_model(folder / f"{number}.safetensors", model) for number, model in enumerate(tensors)]
            made[key] = Family(tensors, paths)
        return made[key]

    return family


def tolerance(case: Case, dtype: torch.dtype) -> float:
    """How far from the reference a whole tensor may be, relative to its norm."""
    if dtype == torch.float64 and case.method == "geometric_median":
        return 1e-7  # stops when the distances no longer change, near whose least place they hardly do
    if dtype == torch.float64:
        return 1e-8 if case.parameters.get("rescale") else 1e-12  # ties sums magnitudes that are known in float32
    return 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 + 2e-6


def test_every_method_has_a_reference_and_a_case():
    assert METHODS.keys() == REFERENCES.keys()
    assert METHODS.keys() == {case.method for case in CASES}
    assert [case.method for case in ONE_CASE_EACH] == list(dict.fromkeys(case.method for case in CASES))


@pytest.mark.parametrize("distance", ["near", "far"])
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, marks=[] if dtype == "F32" or case in ONE_CASE_EACH else pytest.mark.slow)
        for case in CASES
        for dtype in DTYPE_NAMES
    ],
    ids=str,
)
def test_a_method_gives_what_its_formula_says(families, tmp_path, case, dtype, distance):
    family = families(dtype, distance)
    merged = merge_to(tmp_path / "out.safetensors", case.merge(family.paths))
    assert merged.keys() == family.tensors[1].keys()
    for name, expected in family.expected(case).items():
        assert merged[name].dtype == DTYPE_NAMES[dtype]
        assert merged[name].shape == expected.shape
        assert relative_error(merged[name], expected) <= tolerance(case, DTYPE_NAMES[dtype]), name
    for name in ("positions", "mask"):
        assert torch.equal(merged[name], family.tensors[1][name])


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("case", mostly(ONE_CASE_EACH, CASES), ids=str)
def test_half_precision_is_no_excuse_for_half_precision_arithmetic(families, tmp_path, case, dtype):
    family = families(dtype, "near")
    merged = merge_to(tmp_path / "out.safetensors", case.merge(family.paths, dtype="fp32"))
    for name, expected in family.expected(case).items():
        assert merged[name].dtype == torch.float32
        assert relative_error(merged[name], expected) <= 2e-6, name


# ── linear methods: every single element ─────────────────────────────────────────────────────────────────────────────

HARD_WEIGHTS = (
    [0.1, 0.2, 0.7],
    [1.25, -1.2, 0.9],
    [1.001, -1.0, 0.001],
    [-3.0, 2.5, 0.4],
    [1e-4, 1.0, 1e4],
    [1 / 3, 1 / 3, 1 / 3],
)


def summed_magnitudes(case: Case, tensors: list[Tensors]) -> dict[str, Array]:
    """Σ |cᵢ xᵢ|, by asking the reference for each input's share alone."""
    totals: dict[str, Array] = {}
    for share in range(len(tensors)):
        alone = [
            {n: v if number == share else torch.zeros_like(v) for n, v in model.items()}
            for number, model in enumerate(tensors)
        ]
        for name, values in case.expected(alone).items():
            totals[name] = totals.get(name, np.zeros(values.shape)) + np.abs(values)
    return totals


def assert_rounded_once(case: Case, merged: Tensors, family: Family, unit: float) -> None:
    """Within 1 ulp of the float64 result; where summands cancel, within a few roundings of the summands."""
    magnitudes = summed_magnitudes(case, family.tensors)
    for name, expected in family.expected(case).items():
        if expected.size:
            off = np.abs(merged[name].double().numpy() - expected) > 4 * unit * magnitudes[name]
            apart = ulps_apart(merged[name], expected).numpy()
            assert apart[off].max(initial=0) <= 1, name


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("distance", ["near", "far"])
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_a_linear_method_is_right_in_every_element(families, tmp_path, case, dtype, distance):
    family = families(dtype, distance)
    merged = merge_to(tmp_path / "out.safetensors", case.merge(family.paths))
    assert_rounded_once(case, merged, family, 2.0**-53 if dtype == "F32" else 2.0**-24)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("weight", HARD_WEIGHTS, ids=str)
def test_hard_weights_are_right_in_every_element(families, tmp_path, weight, dtype):
    family = families(dtype, "near")
    case = Case("linear", 3, parameters={"weight": weight, "normalize": False})
    merged = merge_to(tmp_path / "out.safetensors", case.merge(family.paths))
    assert_rounded_once(case, merged, family, 2.0**-53 if dtype == "F32" else 2.0**-24)


@pytest.mark.parametrize("weight", HARD_WEIGHTS, ids=str)
def test_float32_results_are_within_an_ulp_even_where_near_models_cancel(families, tmp_path, weight):
    family = families("F32", "near")
    case = Case("linear", 3, parameters={"weight": weight, "normalize": False})
    merged = merge_to(tmp_path / "out.safetensors", case.merge(family.paths))
    for name, expected in family.expected(case).items():
        if expected.size:
            apart = ulps_apart(merged[name], expected).double()
            # what cancels to a millionth of its summands is noise in the float64 reference as well
            telling = torch.from_numpy(np.asarray(np.abs(expected) > 1e-6 * np.abs(expected).max()))
            assert apart[telling].max() <= 4, name


def test_an_exact_sum_in_float16_is_exact(tmp_path):
    # 1024 + 1/1024 needs 21 bits: more than float16 has, fewer than float32
    a, b = MemoryModel({"w": torch.full((5,), 1024.0).half()}), MemoryModel({"w": torch.full((5,), 2**-10).half()})
    merged = streammerge.linear(a, b, weight=[1.0, 1.0], normalize=False, dtype="fp32")
    assert merged.read("w", 0, 5).tolist() == [1024 + 2**-10] * 5


# ── identities ───────────────────────────────────────────────────────────────────────────────────────────────────────

IDENTITIES = {
    "linear of one": lambda base, a, b: (streammerge.linear(a), 1),
    "linear with all weight on one": lambda base, a, b: (streammerge.linear(a, b, weight=[0.0, 2.0], layout=0), 2),
    "weighted_sum alpha 0": lambda base, a, b: (streammerge.weighted_sum(a, b, alpha=0.0), 1),
    "weighted_sum alpha 1": lambda base, a, b: (streammerge.weighted_sum(a, b, alpha=1.0), 2),
    "add_difference alpha 0": lambda base, a, b: (streammerge.add_difference(a, b, base=base, alpha=0.0), 1),
    "add_difference of the base": lambda base, a, b: (streammerge.add_difference(base, a, base=base), 1),
    "task arithmetic weight 0": lambda base, a, b: (streammerge.task_arithmetic(a, b, base=base, weight=0.0), 0),
    "task arithmetic lambda 0": lambda base, a, b: (
        streammerge.task_arithmetic(a, b, base=base, **{"lambda": 0.0}),
        0,
    ),
    "task arithmetic weight 1": lambda base, a, b: (streammerge.task_arithmetic(b, base=base), 2),
    "passthrough": lambda base, a, b: (streammerge.passthrough(b), 2),
    "scale 1": lambda base, a, b: (streammerge.scale(b, alpha=1.0), 2),
    "n_average of one": lambda base, a, b: (streammerge.n_average(b), 2),
    "n_average of twins": lambda base, a, b: (streammerge.n_average(a, a, a, a), 1),
    "sum_twice with nothing": lambda base, a, b: (streammerge.sum_twice(a, b, base, alpha=0.0, beta=0.0), 1),
    "sum_twice with the third": lambda base, a, b: (streammerge.sum_twice(a, b, base, alpha=0.3, beta=1.0), 0),
    "triple_sum with nothing": lambda base, a, b: (streammerge.triple_sum(a, b, base, alpha=0.0, beta=0.0), 1),
    "triple_sum without the first": lambda base, a, b: (streammerge.triple_sum(a, b, base, alpha=1.0, beta=0.0), 2),
    "expo alpha 0": lambda base, a, b: (streammerge.expo(a, base=base, alpha=0.0), 1),
    "expo of the base": lambda base, a, b: (streammerge.expo(base, base=base, alpha=3.0), 0),
    "weighted_subtraction alpha 0": lambda base, a, b: (streammerge.weighted_subtraction(a, b, alpha=0.0), 1),
    "add scale 0": lambda base, a, b: (streammerge.add(a, b, scale=0.0), 1),
    "slerp t 0": lambda base, a, b: (streammerge.slerp(a, b, t=0.0), 1),
    "slerp t 1": lambda base, a, b: (streammerge.slerp(a, b, t=1.0), 2),
    "slerp of twins": lambda base, a, b: (streammerge.slerp(a, a, t=0.3), 1),
    "ties lambda 0": lambda base, a, b: (streammerge.ties(a, b, base=base, density=0.5, **{"lambda": 0.0}), 0),
    "ties density 0": lambda base, a, b: (streammerge.ties(a, b, base=base, density=0.0), 0),
    "ties of base and base": lambda base, a, b: (streammerge.ties(base, base, base=base, density=0.5), 0),
}


@pytest.mark.parametrize("dtype", ["F16", "F32"])
@pytest.mark.parametrize("distance", ["near", "far"])
@pytest.mark.parametrize("identity", IDENTITIES)
def test_identities_hold_to_the_value(families, tmp_path, identity, dtype, distance):
    family = families(dtype, distance)
    merge, number = IDENTITIES[identity](*family.paths[:3])
    merged = merge_to(tmp_path / "out.safetensors", merge)
    for name, expected in family.tensors[number].items():
        if expected.is_floating_point():
            torch.testing.assert_close(
                merged[name], expected, rtol=2**-23 if identity == "slerp of twins" else 0, atol=0
            )


@pytest.mark.parametrize("distance", ["near", "far"])
def test_ties_of_one_model_at_density_one_is_that_model(families, tmp_path, distance):
    family = families("F16", distance)
    merged = merge_to(
        tmp_path / "out.safetensors", streammerge.ties(family.paths[1], base=family.paths[0], dtype="fp32")
    )
    for name, expected in family.tensors[1].items():
        if expected.is_floating_point():
            torch.testing.assert_close(merged[name], expected.float(), rtol=3e-7, atol=3e-7)


def test_passthrough_of_everything_is_the_file_itself(families, tmp_path):
    family = families("BF16", "far")
    assert_same_bytes(
        merge_to(tmp_path / "out.safetensors", streammerge.passthrough(family.paths[2])), family.tensors[2]
    )


def test_the_order_of_models_does_not_matter_where_the_formula_says_so(families, tmp_path):
    a, b = families("F32", "near").paths[1:3]
    for one, other in (
        (streammerge.linear(a, b, weight=[0.3, 0.7]), streammerge.linear(b, a, weight=[0.7, 0.3])),
        (streammerge.slerp(a, b, t=0.3), streammerge.slerp(b, a, t=0.7)),
    ):
        first, second = merge_to(tmp_path / "1.safetensors", one), merge_to(tmp_path / "2.safetensors", other)
        for name, values in first.items():
            torch.testing.assert_close(values, second[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("alpha", [-900.0, -1.5, 0.0, 0.7, 900.0])
def test_sigmoid_has_a_value_for_every_alpha(alpha):
    first, second = (MemoryModel({"w": torch.tensor([value], dtype=torch.float64)}) for value in (3.0, 5.0))

    def logistic(x: float) -> float:
        return 0.5 * (1 + math.tanh(x / 2))

    found = streammerge.sigmoid(first, second, alpha=alpha).read("w", 0, 1).item()
    assert found == pytest.approx(8 * logistic(4 * alpha) - 3 * logistic(alpha), abs=1e-12)


# ── slerp ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def at_angle(cosine: float, length: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two float64 vectors of 500 elements with this cosine; the second has this length, the first the length 1."""
    first, other = normal((500,), 1, torch.float64), normal((500,), 2, torch.float64)
    first /= first.norm()
    other -= first.dot(other) * first
    other /= other.norm()
    return first, length * (cosine * first + (1 - cosine**2) ** 0.5 * other)


@pytest.mark.parametrize("cosine", [-0.999, -0.5, 0.0, 0.3, 0.99, 0.9994])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.75])
def test_slerp_keeps_the_length_and_divides_the_angle(cosine, t):
    first, second = at_angle(cosine)
    between = streammerge.slerp(MemoryModel({"w": first}), MemoryModel({"w": second}), t=t).read("w", 0, 500)
    assert float(between.norm()) == pytest.approx(1.0, rel=1e-9)
    whole = torch.acos(first.dot(second))
    assert float(torch.acos(first.dot(between).clamp(-1, 1))) == pytest.approx(float(t * whole), rel=1e-6)


@pytest.mark.parametrize("cosine", [0.9996, 1.0, -0.9996, -1.0])
def test_slerp_of_nearly_parallel_tensors_is_the_straight_line(cosine):
    first, second = at_angle(cosine, length=3.0)
    between = streammerge.slerp(MemoryModel({"w": first}), MemoryModel({"w": second}), t=0.25).read("w", 0, 500)
    torch.testing.assert_close(between, 0.75 * first + 0.25 * second, rtol=1e-12, atol=1e-15)


def test_slerp_with_zero_is_the_straight_line():
    values = normal((10,), 1)
    between = streammerge.slerp(MemoryModel({"w": values}), MemoryModel({"w": values * 0}), t=0.25).read("w", 0, 10)
    torch.testing.assert_close(between, 0.75 * values)


# ── ties, where an example says more than a formula ──────────────────────────────────────────────────────────────────


def ties_of(*deltas: list[float], **parameters) -> list[float]:
    models = [MemoryModel({"w": torch.tensor(delta)}) for delta in deltas]
    base = MemoryModel({"w": torch.zeros(len(deltas[0]))})
    result: list[float] = streammerge.ties(*models, base=base, **parameters).read("w", 0, len(deltas[0])).tolist()
    return result


def test_ties_elects_the_sign_of_the_weighted_sum_and_averages_what_agrees():
    assert ties_of([3.0, -1.0, 2.0], [1.0, 3.0, -2.0], [-1.0, 1.0, -2.0]) == [2.0, 2.0, -2.0]
    assert ties_of([4.0, -1.0], [2.0, 2.0], weight=[1.0, 3.0]) == [(4 + 6) / 4, 2.0]


def test_ties_elects_plus_where_the_sum_is_zero():
    assert ties_of([2.0], [-2.0]) == [2.0]


def test_ties_sums_what_agrees_unless_it_normalizes():
    assert ties_of([3.0, -1.0], [1.0, 3.0], normalize=False) == [4.0, 3.0]
    assert ties_of([3.0, -1.0], [1.0, 3.0], normalize=False, weight=[0.5, 1.0], **{"lambda": 2.0}) == [5.0, 6.0]


def test_ties_trims_each_model_to_its_own_density():
    assert ties_of([4.0, -3.0, 2.0, 1.0], density=0.5) == [4.0, -3.0, 0.0, 0.0]
    assert ties_of([4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0], density=[0.25, 0.5], normalize=False) == [4, 0, 3, 4]


def test_ties_keeps_one_element_at_least():
    assert ties_of([1.0, -5.0, 2.0], density=0.01) == [0.0, -5.0, 0.0]


def test_ties_rescales_to_the_whole_task_vectors_sum():
    assert ties_of([4.0, -3.0, 2.0, 1.0], density=0.5, rescale=True) == pytest.approx([40 / 7, -30 / 7, 0, 0])


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def trio():
    tensors = make_tensors(0, shapes=SMALL)
    return [MemoryModel(tensors), MemoryModel(near(tensors, 1)), MemoryModel(near(tensors, 2))]


REFUSED = {
    "zero sum": (lambda x, a, b: streammerge.linear(a, b, weight=[1.0, -1.0]), MethodError, "sum to zero"),
    "decimal zero sum": (
        lambda x, a, b: streammerge.linear(x, a, b, weight=[0.1, 0.2, -0.3]),
        MethodError,
        "sum to zero and can't be normalised",
    ),
    "zero task weights": (
        lambda x, a, b: streammerge.task_arithmetic(a, b, base=x, weight=[1.0, -1.0], normalize=True),
        MethodError,
        "sum to zero",
    ),
    "zero weights to average": (
        lambda x, a, b: streammerge.n_average(a, b, weight=0.0),
        MethodError,
        "sum to zero",
    ),
    "zero weights to extrapolate": (
        lambda x, a, b: streammerge.expo(a, b, base=x, weight=[1.0, -1.0]),
        MethodError,
        "sum to zero",
    ),
    "everything taken out": (
        lambda x, a, b: streammerge.weighted_subtraction(a, b, alpha=0.5, beta=2.0),
        MethodError,
        r"zero for alpha 0\.5 and beta 2",
    ),
    "two for a triple": (lambda x, a, b: streammerge.triple_sum(a, b), RecipeError, "takes 3 models, found 2"),
    "overflowing product": (
        lambda x, a, b: streammerge.task_arithmetic(a, base=x, weight=1e200, **{"lambda": 1e200}),
        MethodError,
        "'task_arithmetic' comes to coefficients that are no finite numbers",
    ),
    "overflowing sum": (
        lambda x, a, b: streammerge.linear(a, b, weight=[1e308, 1.1e308]),
        MethodError,
        "no finite numbers",
    ),
    "no t": (lambda x, a, b: streammerge.slerp(a, b), RecipeError, "'slerp' needs the parameter 't'"),
    "no alpha": (lambda x, a, b: streammerge.scale(a), RecipeError, "'scale' needs the parameter 'alpha'"),
    "unknown parameter": (
        lambda x, a, b: streammerge.linear(a, b, wieght=0.5),
        RecipeError,
        r"no parameter 'wieght'\n.*Did you mean 'weight'\?",
    ),
    "unknown parameter per model": (
        lambda x, a, b: streammerge.linear(a, b, density=[0.5, 0.5]),
        RecipeError,
        "'linear' has no parameter 'density'",
    ),
    "nan": (
        lambda x, a, b: streammerge.slerp(a, b, t=float("nan")),
        RecipeError,
        "expected a finite number, found nan",
    ),
    "infinite": (
        lambda x, a, b: streammerge.linear(a, b, weight=[1.0, float("inf")]),
        RecipeError,
        "expected a finite number, found inf",
    ),
    "text": (lambda x, a, b: streammerge.slerp(a, b, t="half"), RecipeError, "expected a finite number, found 'half'"),
    "too few values": (
        lambda x, a, b: streammerge.linear(x, a, b, weight=[1.0, 2.0]),
        RecipeError,
        "'weight' has 2 values for 3 models",
    ),
    "one model": (lambda x, a, b: streammerge.slerp(a, t=0.5), RecipeError, "'slerp' takes 2 models, found 1"),
    "three models": (lambda x, a, b: streammerge.slerp(x, a, b, t=0.5), RecipeError, "takes 2 models, found 3"),
    "no models": (lambda x, a, b: streammerge.linear(), RecipeError, "takes at least 1 model, found 0"),
    "two to pass through": (lambda x, a, b: streammerge.passthrough(a, b), RecipeError, "takes 1 model, found 2"),
    "models beside the base": (
        lambda x, a, b: streammerge.add_difference(a, base=x),
        RecipeError,
        "takes 2 models beside the base, found 1",
    ),
    "no base": (lambda x, a, b: streammerge.ties(a, b), RecipeError, "'ties' needs a base model"),
    "base too many": (lambda x, a, b: streammerge.linear(a, b, base=x), RecipeError, "'linear' has no base model"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_mistakes_are_refused_before_anything_is_read(trio, mistake):
    call, kind, message = REFUSED[mistake]
    with pytest.raises(kind, match=message):
        call(*trio)
    assert not any(model.ranges for model in trio)


WEIGHTED = {
    name: next((flag for flag in ("normalize", "normalize_weights") if flag in found.parameter_names), "")
    for name, found in METHODS.items()
    if "weight" in found.parameter_names
}
NOT_DIVIDED = ("iso_c", "iso_cts", "svc", "tsv_m")
"""Methods that sum weighted task vectors and divide by nothing."""


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("weight", [[1.0, -1.0], [0.0, 0.0], [0.3, -0.3]])
def test_weights_that_sum_to_zero_are_refused_by_every_method_that_divides_by_their_sum(trio, name, weight):
    base, a, b = trio
    keywords = {"weight": weight, **({"base": base} if METHODS[name].base == "required" else {})}
    call, flag = getattr(streammerge, name), WEIGHTED[name]
    if name in NOT_DIVIDED:
        assert call(a, b, **keywords).tensors
        return
    with pytest.raises(MethodError, match="sum to zero and can't be normalised") as error:
        call(a, b, **keywords, **({flag: True} if flag else {}))
    assert error.value.advice == "Choose weights whose sum is not zero."
    if flag:
        assert call(a, b, **keywords, **{flag: False}).tensors


def test_an_unknown_method_is_no_attribute():
    with pytest.raises(AttributeError, match="'slurp'"):
        _ = streammerge.slurp
    with pytest.raises(RecipeError, match=r"unknown merge method 'slurp'\n.*Did you mean 'slerp'\?"):
        find_method("slurp")


# ── the registry ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_it_does_and_where_it_comes_from(name):
    found = METHODS[name]
    assert found.name == name
    assert found.kind in ("linear", "gram", "block", "whole")
    assert found.formula.startswith("θ = ")
    assert len(found.doc.splitlines()) >= 3
    numbers = [parameter.default for parameter in found.parameters if isinstance(parameter.default, int | float)]
    assert np.isfinite(numbers).all()
    for parameter in found.parameters:
        if parameter.default is not None:
            assert parameter.check(parameter.default, "the default") == parameter.default
    assert streammerge.__getattr__(name).__doc__ == found.doc


def test_a_name_can_be_registered_once():
    def linear(*, weight: float = 1.0) -> list[float]:
        """Another one."""
        return [weight]

    with pytest.raises(ValueError, match="two merge methods are called 'linear'"):
        method(LinearMethod)(linear)
    assert METHODS["linear"].doc.startswith("θ = Σ")


@pytest.mark.parametrize(
    ("contributions", "total"),
    [
        ((1.0, -0.1, -0.2, -0.7), 0.0),
        ((1.0, -1 / 3, -1 / 3, -1 / 3), 0.0),
        ((0.1, 0.2), 0.30000000000000004),
        ((1.0, -1.0 + 1e-12), 1e-12),
        ((1e-300, 1e-300), 2e-300),
        ((), 0.0),
    ],
)
def test_decimal_fractions_that_cancel_are_exactly_nothing(contributions, total):
    assert net(*contributions) == pytest.approx(total, rel=1e-4, abs=0)


def test_passes_are_passes_and_results_are_not():
    ranking = Ranking(2, [[1]])
    ranking.look_for([[1]])
    steps = (GramPass(2), UpperBits(ranking, 1), LowerBits(ranking), Equals(ranking), Sample(ranking))
    assert all(isinstance(step, Pass) for step in (*steps, Gathering(ranking, {})))
    assert not isinstance(GramPass(2).finish(), Pass)
    assert not isinstance((Cut(1),), Pass)


def test_shapes_are_telling():
    sizes = [int(np.prod(shape)) for shape in SHAPES.values()]
    assert {0, 1, 63} < set(sizes)
    assert max(sizes) > 2**18 > sorted(sizes)[-3]
