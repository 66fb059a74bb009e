"""Decisions that are made again when they are asked for: the same each time, and counted by their kinds."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import pytest
import torch

import streammerge
from streammerge.compute.expressions import ByBlock, Combined
from streammerge.compute.identity import kind_of
from streammerge.formats.tables import Column
from streammerge.models.decisions import RECENT, Decision, Decisions
from streammerge.recipe.recipe import Rule
from streammerge.storage.fingerprint import differences, fingerprint_of
from streammerge.tensors import DTYPES, TensorInfo
from tests.make.models import make_tensors, near, save_models

KIND = TensorInfo(DTYPES["F16"], (2, 2))
OTHER = TensorInfo(DTYPES["F16"], (4,))


@pytest.fixture
def paths(tmp_path) -> Any:
    shapes = {f"layers.{n}.{part}": (3, 2 + n % 2) for n in range(40) for part in ("weight", "bias")}
    base = make_tensors(0, torch.float16, shapes)
    return save_models(tmp_path, base=base, a=near(base, 1), b=near(base, 2))


MERGES: dict[str, Any] = {
    "linear": lambda a, b, base: streammerge.linear(a, b, weight=[0.3, 0.7]),
    "gradient": lambda a, b, base: streammerge.linear(a, b, weight=[[0.0, 1.0], [1.0, 0.0]]),
    "rules": lambda a, b, base: streammerge.linear(
        a, b, rules=[Rule(("*.bias",), "take", "1"), Rule(("layers.3.*",), "drop"), Rule(("layers.4*",), "keep")]
    ),
    "rounded": lambda a, b, base: streammerge.slerp(streammerge.linear(a, b, dtype="bf16"), base, t=0.3),
    "together": lambda a, b, base: streammerge.ties(a, b, base=base, density=0.5, scope="model"),
    "random": lambda a, b, base: streammerge.dare_ties(a, b, base=base, density=0.5, seed=3),
    "twice": lambda a, b, base: (lambda x: streammerge.linear(x, x, base))(streammerge.slerp(a, b, t=0.4)),
}


def told(decision: Decision) -> tuple[Any, ...]:
    kind = None if decision.node is None else kind_of(decision.node)
    return decision.name, decision.action, decision.why, decision.info, decision.detail, decision.rounds, kind


@pytest.mark.parametrize("name", MERGES)
def test_a_decision_is_the_same_each_time(paths, name):
    made = MERGES[name](paths["a"], paths["b"], paths["base"])
    once = [told(decision) for decision in made.decisions]
    again = [told(decision) for decision in reversed(made.decisions)]
    assert once == again[::-1]
    assert len(once) == 80


@pytest.mark.parametrize("name", MERGES)
def test_fates_count_every_tensor(paths, name):
    made = MERGES[name](paths["a"], paths["b"], paths["base"])
    counted = Counter((decision.action, decision.why, decision.info) for decision in made.decisions)
    found: Counter[Any] = Counter()
    for fate in made.decisions.fates:
        found[fate.action, fate.why, fate.info] += fate.tensors
        assert fate == next(other for name, other in made.decisions.told() if name == fate.first)
    assert found == counted
    assert dict(made.tensors) == {one.name: one.info for one in made.decisions if one.node is not None}
    assert list(made.nodes) == list(made.tensors)


def test_alike_tensors_share_a_fate(paths):
    assert len(streammerge.linear(paths["a"], paths["b"]).decisions.fates) == 2  # as many as there are shapes


@pytest.mark.parametrize("dtype", ["keep", "bf16"])
def test_what_is_asked_for_twice_is_one_expression(paths, dtype):
    inner = streammerge.slerp(paths["a"], paths["b"], t=0.4, dtype=dtype)
    made = streammerge.linear(inner, inner, weight=[0.25, 0.75])
    for name in made.tensors:
        node = made.nodes[name]
        assert node is made.nodes[name]
        assert isinstance(node, Combined)
        assert [term.coefficient for term in node.terms] == [1.0]


def test_threads_have_expressions_of_their_own():
    asked: list[str] = []

    def decide(name: str) -> Decision:
        asked.append(name)
        return Decision(name, "dropped", "", KIND)

    decisions = Decisions(["a", "b"], decide)
    for _ in range(3):
        decisions.of("a")
    thread = threading.Thread(target=decisions.of, args=("a",))
    thread.start()
    thread.join()
    assert asked == ["a", "b", "a", "a"]


def test_no_more_than_some_expressions_are_kept():
    names = [str(number) for number in range(3 * RECENT)]
    decisions = Decisions(names, lambda name: Decision(name, "dropped", "", KIND))
    for name in names:
        decisions.of(name)
    assert list(decisions._recent.made) == names[-RECENT:]


def test_tensors_of_one_statistic_are_its_members_each_time(paths):
    made = MERGES["together"](paths["a"], paths["b"], paths["base"])
    first = made.nodes["layers.0.weight"]
    assert isinstance(first, ByBlock)
    assert first.together is not None
    assert len(first.together.members) == 80
    assert [made.nodes[member.name] for member in first.together.members] == first.together.members


def test_what_is_decided_later_keeps_its_place():
    asked: list[str] = []

    def decide(name: str) -> Decision:
        asked.append(name)
        return Decision(name, "dropped", "", KIND if name < "c" else OTHER)

    decisions = Decisions("dacb", decide, later="ad")
    assert asked == ["c", "b", "a", "d"]
    assert [(name, fate.info) for name, fate in decisions.told()] == [
        ("d", OTHER),
        ("a", KIND),
        ("c", OTHER),
        ("b", KIND),
    ]
    assert [decision.name for decision in decisions] == ["d", "a", "c", "b"]
    with pytest.raises(KeyError):
        decisions.of("e")
    assert isinstance(decisions.tensors(), Column)
    assert len(decisions.tensors()) == 0


def test_fingerprints_of_many_tensors_are_few_and_tell_where_a_change_is(paths, tmp_path, monkeypatch):
    def fingerprint(t: float) -> Any:
        weights = [{"filter": "layers.7.", "value": t}, {"value": 0.5}]
        recipe = {
            "merge_method": "slerp",
            "models": [str(paths["a"]), str(paths["b"])],
            "parameters": {"t": weights},
        }
        return fingerprint_of(streammerge.make_plan(recipe, output=tmp_path / "out.safetensors"))

    assert len(fingerprint(0.1)["tensor"]) == 80
    monkeypatch.setattr("streammerge.storage.fingerprint.MOST_DIGESTS", 10)
    before, now = ({"tensor": fingerprint(t)["tensor"]} for t in (0.1, 0.2))
    assert len(before["tensor"]) == 10
    assert all(name.endswith(" and 7 after it") for name in before["tensor"])
    assert 1 <= len(differences(before, now)) <= 2
    assert differences(before, before) == []
