"""Rows of embeddings matched by token: as a recipe asks for it, and what becomes of other vocabularies if none does."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import streammerge
from streammerge.cli.main import main
from streammerge.errors import CheckpointError, MergeError, PlanError
from tests.make.folders import save_llama
from tests.make.vocabularies import EMBEDDING, HEAD, save_with_tokens, tokenizer_files, written_tokens
from tests.references.vocabularies import rows_by_token

WORDS = [f"w{number}" for number in range(20)]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def shuffled(words: list[str], seed: int) -> list[str]:
    words = list(words)
    random.Random(seed).shuffle(words)
    return words


def ids(words: list[str]) -> dict[str, int]:
    return {word: number for number, word in enumerate(words)}


def merged(recipe: dict[str, Any], **options: Any) -> dict[str, torch.Tensor]:
    streammerge.merge(recipe, output="OUT", force=True, **options)
    return load_file("OUT/model.safetensors")


def two(keys: dict[str, Any], method: str = "linear", **parameters: Any) -> dict[str, Any]:
    return {"merge_method": method, "models": ["A", "B"], "parameters": parameters, **keys}


BASE = {"tokenizer_source": "base"}


# ── in another order ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_rows_in_another_order_are_aligned():
    """What one that averages by number gets wrong."""
    words = shuffled(WORDS, 3)
    a, b = save_with_tokens(Path("A"), 1, WORDS), save_with_tokens(Path("B"), 2, words)
    made = merged(two(BASE))
    for name in (EMBEDDING, HEAD):
        rows = rows_by_token([a[name], b[name]], [ids(WORDS), ids(words)], ids(WORDS))
        torch.testing.assert_close(made[name].double(), (rows[0] + rows[1]) / 2, rtol=1e-6, atol=1e-7)
        assert not torch.allclose(made[name], (a[name] + b[name]) / 2)
    norm = "model.norm.weight"
    torch.testing.assert_close(made[norm], (a[norm] + b[norm]) / 2)
    assert Path("OUT/tokenizer.json").read_bytes() == Path("A/tokenizer.json").read_bytes()


def test_a_copy_with_its_rows_in_another_order_merges_to_the_model():
    words = shuffled(WORDS, 5)
    a = save_with_tokens(Path("A"), 1, WORDS)
    order = torch.tensor([ids(WORDS)[word] for word in words])
    moved = {name: values[order] if name in (EMBEDDING, HEAD) else values for name, values in a.items()}
    save_with_tokens(Path("B"), 1, words)
    from safetensors.torch import save_file

    save_file(moved, "B/model.safetensors")
    for method, more in (("slerp", {"t": 0.4}), ("karcher", {}), ("ties", {"weight": 1, "density": 0.5})):
        base = {"base_model": "A"} if method in ("slerp", "ties") else {}
        made = merged(two({**BASE, **base}, method, **more))
        for name, values in a.items():
            torch.testing.assert_close(made[name], values, rtol=1e-5, atol=1e-6, msg=f"{method} {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_model_with_another_one_s_tokens_is_moved_bit_for_bit(dtype):
    words = shuffled(WORDS, 7)
    a = save_with_tokens(Path("A"), 1, WORDS, dtype=dtype)
    save_with_tokens(Path("B"), 2, words)
    save_with_tokens(Path("C"), 3, words)
    made = merged(
        {
            "merge_method": "task_arithmetic",
            "models": [{"model": "B", "parameters": {"weight": 0}}],
            "base_model": "A",
            "layout": "A",
            "tokenizer_source": "B",
        }
    )
    order = torch.tensor([ids(WORDS)[word] for word in words])
    for name in (EMBEDDING, HEAD):
        assert torch.equal(made[name], a[name][order])
    assert Path("OUT/tokenizer.json").read_bytes() == Path("B/tokenizer.json").read_bytes()


# ── tokens that not all have ─────────────────────────────────────────────────────────────────────────────────────────


def three(source: Any, **more: Any) -> tuple[dict[str, Any], list[dict[str, torch.Tensor]], list[dict[str, int]]]:
    """Three models that share some tokens, each with some of its own."""
    lists = [WORDS[:14], shuffled(WORDS[4:18], 1), shuffled(WORDS[2:10] + WORDS[16:], 2)]
    tensors = [
        save_with_tokens(Path(name), seed, words) for seed, (name, words) in enumerate(zip("ABC", lists, strict=True))
    ]
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": name, "parameters": {"weight": weight}}
            for name, weight in zip("ABC", (0.5, 0.3, 0.2), strict=True)
        ],
        **more,
    }
    recipe |= {"tokenizer_source": source} if not isinstance(source, dict) else {"tokenizer": source}
    return recipe, tensors, [ids(words) for words in lists]


def check(
    made: dict[str, torch.Tensor], tensors: list[Any], own: list[dict[str, int]], out: dict[str, int], **more: Any
) -> None:
    for name in (EMBEDDING, HEAD):
        rows = rows_by_token([each[name] for each in tensors], own, out, **more)
        expected = torch.stack([weight * each for weight, each in zip((0.5, 0.3, 0.2), rows, strict=True)]).sum(0)
        torch.testing.assert_close(made[name].double(), expected, rtol=1e-6, atol=1e-6)
        assert len(made[name]) == len(expected)


@pytest.mark.parametrize("source", ["base", "A", "B", "C"])
@pytest.mark.parametrize("base", [None, "B"])
def test_a_model_s_tokens_and_what_others_lack_of_them(source, base):
    recipe, tensors, own = three(source, **({"base_model": base} if base else {}))
    chosen = {"base": base or "A"}.get(source, source)
    check(merged(recipe), tensors, own, own["ABC".index(chosen)], base="ABC".index(base) if base else None)
    assert Path("OUT/tokenizer.json").read_bytes() == Path(chosen, "tokenizer.json").read_bytes()
    size = json.loads(Path("OUT/config.json").read_text())["vocab_size"]
    assert size == len(own["ABC".index(chosen)])


def test_vocabularies_of_other_sizes_need_no_policy():
    a, b = save_with_tokens(Path("A"), 1, WORDS[:10]), save_with_tokens(Path("B"), 2, WORDS)
    made = merged(two(BASE))
    torch.testing.assert_close(made[EMBEDDING], (a[EMBEDDING] + b[EMBEDDING][:10]) / 2)
    made = merged(two({"tokenizer_source": "B"}))
    torch.testing.assert_close(made[EMBEDDING][10:], b[EMBEDDING][10:])
    assert json.loads(Path("OUT/config.json").read_text())["vocab_size"] == 20


def test_rows_beyond_the_tokens_are_left_out():
    """Qwen's sizes are padded to other numbers: rows nobody means."""
    a, b = save_with_tokens(Path("A"), 1, WORDS, rows=24), save_with_tokens(Path("B"), 2, WORDS, rows=32)
    made = merged(two(BASE))
    torch.testing.assert_close(made[HEAD], (a[HEAD][:20] + b[HEAD][:20]) / 2)
    assert Path("OUT/tokenizer.json").read_bytes() == Path("A/tokenizer.json").read_bytes()


def test_equal_vocabularies_keep_their_padding(capsys):
    a, b = save_with_tokens(Path("A"), 1, WORDS, rows=24), save_with_tokens(Path("B"), 2, WORDS, rows=24)
    torch.testing.assert_close(merged(two(BASE))[HEAD], (a[HEAD] + b[HEAD]) / 2)


def test_tied_and_untied_models_are_matched_too():
    words = shuffled(WORDS, 11)
    a, b = save_with_tokens(Path("A"), 1, WORDS, tie=True), save_with_tokens(Path("B"), 2, words)
    made = merged(two(BASE))
    rows = rows_by_token([a[EMBEDDING], b[HEAD]], [ids(WORDS), ids(words)], ids(WORDS))
    torch.testing.assert_close(made[HEAD].double(), (rows[0] + rows[1]) / 2, rtol=1e-6, atol=1e-7)
    save_with_tokens(Path("B"), 2, words, tie=True)
    made = merged(two(BASE))
    assert HEAD not in made
    rows = rows_by_token([a[EMBEDDING], b[EMBEDDING]], [ids(WORDS), ids(words)], ids(WORDS))
    torch.testing.assert_close(made[EMBEDDING].double(), (rows[0] + rows[1]) / 2, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("slerp", {"t": 0.3}),
        ("ties", {"weight": 0.7, "density": 0.4}),
        ("dare_ties", {"weight": 0.7, "density": 0.4}),
        ("della", {"weight": 0.7, "density": 0.4}),
        ("model_stock", {}),
        ("sce", {}),
        ("breadcrumbs", {"weight": 1, "density": 0.5}),
    ],
)
def test_any_method_goes_on_top(method, more):
    """The same as of models whose rows were put in order before."""
    words = [shuffled(WORDS, seed) for seed in (1, 2, 3)]
    tensors = [
        save_with_tokens(Path(name), seed, own) for seed, (name, own) in enumerate(zip("ABC", words, strict=True))
    ]
    models = ["B"] if method == "slerp" else ["B", "C"]
    keys: dict[str, Any] = {"merge_method": method, "base_model": "A", "layout": "A", "parameters": more, "seed": 4}
    keys["models"] = (["A"] if method == "slerp" else []) + models
    made = merged({**keys, **BASE})
    from safetensors.torch import save_file

    for name, own, theirs in zip("ABC", words, tensors, strict=True):
        order = torch.tensor([ids(own)[word] for word in words[0]])
        moved = {each: v[order] if each in (EMBEDDING, HEAD) else v for each, v in theirs.items()}
        save_with_tokens(Path(name), 0, words[0])
        save_file(moved, f"{name}/model.safetensors")
    expected = merged(keys)
    for name, values in expected.items():
        torch.testing.assert_close(made[name], values, rtol=1e-5, atol=1e-6, msg=name)


def test_a_stack_takes_rows_by_token():
    words = shuffled(WORDS, 4)
    a, b = save_with_tokens(Path("A"), 1, WORDS), save_with_tokens(Path("B"), 2, words)
    slices = [
        {"sources": [{"model": "A", "layer_range": [0, 2]}]},
        {"sources": [{"model": "B", "layer_range": [1, 2]}]},
    ]
    made = merged({"merge_method": "passthrough", "slices": slices, "tokenizer_source": "B"})
    order = torch.tensor([ids(WORDS)[word] for word in words])
    assert torch.equal(made[EMBEDDING], a[EMBEDDING][order])
    assert torch.equal(made[HEAD], b[HEAD])
    assert Path("OUT/tokenizer.json").read_bytes() == Path("B/tokenizer.json").read_bytes()


def test_a_nested_merge_has_the_tokens_that_it_gets():
    words = shuffled(WORDS, 4)
    a, b = save_with_tokens(Path("A"), 1, WORDS), save_with_tokens(Path("B"), 2, words)
    c = save_with_tokens(Path("C"), 3, WORDS)
    inner = two({"tokenizer_source": "B"})
    made = merged({"merge_method": "linear", "models": ["C", inner], "tokenizer_source": "base"})
    rows = rows_by_token([a[HEAD], b[HEAD], c[HEAD]], [ids(WORDS), ids(words), ids(WORDS)], ids(WORDS))
    torch.testing.assert_close(made[HEAD].double(), rows[0] / 4 + rows[1] / 4 + rows[2] / 2, rtol=1e-6, atol=1e-6)
    with pytest.raises(PlanError, match="vocabularies differ"):
        merged({"merge_method": "linear", "models": ["C", inner]})


# ── what is chosen for single tokens ─────────────────────────────────────────────────────────────────────────────────


def test_rows_are_chosen_and_forced():
    tokens = {
        "w0": {"source": {"kind": "zero"}, "force": True},
        "w1": {"source": "B", "force": False},
        "w5": {"source": "C", "force": True},
        "w6": {"source": {"kind": "model_token", "model": "B", "token": "w12"}, "force": True},
        "w7": {"source": {"kind": "model_token", "model": "A", "token_id": 3}, "force": True},
        "w2": {"source": {"kind": "zero"}},
    }
    tokens["w1"] = {"source": {"kind": "model_token", "model": "B", "token_id": 0}}
    recipe, tensors, own = three({"source": "base", "tokens": tokens})
    made = merged(recipe)
    for name in (EMBEDDING, HEAD):
        a, b, c = (each[name] for each in tensors)
        chosen = {
            "w0": torch.zeros(8),
            "w1": b[0],
            "w5": c[own[2]["w5"]],
            "w6": b[own[1]["w12"]],
            "w7": a[3],
            "w2": torch.zeros(8),
        }
        rows = rows_by_token([a, b, c], own, own[0], chosen=chosen, forced=["w0", "w5", "w6", "w7"])
        expected = 0.5 * rows[0] + 0.3 * rows[1] + 0.2 * rows[2]
        torch.testing.assert_close(made[name].double(), expected, rtol=1e-6, atol=1e-6)
    assert Path("OUT/tokenizer.json").read_bytes() == Path("A/tokenizer.json").read_bytes()


@pytest.mark.parametrize("multiple", [1, 7, 8, 64, 1000])
def test_rows_are_padded_with_their_mean(multiple):
    recipe, tensors, own = three({"source": "base", "pad_to_multiple_of": multiple})
    count = -(-len(own[0]) // multiple) * multiple
    check(merged(recipe), tensors, own, own[0], count=count)
    assert json.loads(Path("OUT/config.json").read_text())["vocab_size"] == count


def test_one_model_is_padded():
    a = save_with_tokens(Path("A"), 1, WORDS, dtype=torch.bfloat16)
    made = merged(
        {"merge_method": "linear", "models": ["A"], "tokenizer": {"source": "base", "pad_to_multiple_of": 32}}
    )
    assert torch.equal(made[HEAD][:20], a[HEAD])
    mean = a[HEAD].double().mean(0)
    torch.testing.assert_close(made[HEAD][20:].double(), mean.expand(12, -1), rtol=2**-8, atol=1e-4)


def test_what_a_recipe_says_of_tokens_is_kept(capsys):
    tokens = {"w0": {"source": {"kind": "zero"}, "force": True}, "w1": {"source": "B", "force": True}}
    tokens["w2"] = {"source": {"kind": "model_token", "model": "C", "token": "w3"}, "force": True}
    tokens["w3"] = {"source": {"kind": "model_token", "model": "C", "token_id": 3}, "force": True}
    tokens["w1"] = {"source": "A", "force": True}
    recipe, *_ = three({"source": "base", "tokens": tokens, "pad_to_multiple_of": 16})
    merged(recipe)
    assert main(["verify", "OUT", "A=A", "B=B", "C=C"]) == 0
    before = Path("OUT/model.safetensors").read_bytes()
    streammerge.merge(recipe, output="AGAIN", threads=1)
    assert Path("AGAIN/model.safetensors").read_bytes() == before
    said = main(["plan", "--recipe-from-metadata", "OUT", "A=A", "B=B", "C=C", "-o", "X"])
    assert said == 0, capsys.readouterr().err


# ── where nothing is asked for ───────────────────────────────────────────────────────────────────────────────────────


def test_other_tokens_are_refused_unless_they_are_to_be_matched():
    a, b = save_with_tokens(Path("A"), 1, WORDS), save_with_tokens(Path("B"), 2, shuffled(WORDS, 3))
    with pytest.raises(
        PlanError, match=r"(?s)vocabularies differ: rows of one number are of different tokens.*numbers"
    ):
        merged(two({}))
    assert not Path("OUT").exists()
    made = merged(two({"tokenizer_source": "numbers"}))
    torch.testing.assert_close(made[HEAD], (a[HEAD] + b[HEAD]) / 2)


def test_a_token_in_a_padding_row_is_no_padding():
    save_with_tokens(Path("A"), 1, WORDS, rows=24)
    save_with_tokens(Path("B"), 2, WORDS[:18], rows=24)
    with pytest.raises(PlanError, match=r"(?s)B: 2 rows, such as 18, which is 'w18' in A alone"):
        merged(two({}))


def test_tokens_that_only_others_have_are_told(capsys):
    a, b = save_with_tokens(Path("A"), 1, WORDS[:18], rows=24), save_with_tokens(Path("B"), 2, WORDS, rows=24)
    assert main(["A", "B", "-o", "OUT"]) == 0
    assert "B has 2 tokens that the layout has not" in capsys.readouterr().err
    torch.testing.assert_close(load_file("OUT/model.safetensors")[HEAD], (a[HEAD] + b[HEAD]) / 2)


def test_more_rows_than_the_layout_has_are_cut_and_told(capsys):
    a, b = save_with_tokens(Path("A"), 1, WORDS[:18]), save_with_tokens(Path("B"), 2, WORDS)
    assert main(["A", "B", "-o", "OUT"]) == 0
    assert "2 tokens" in capsys.readouterr().err
    torch.testing.assert_close(load_file("OUT/model.safetensors")[HEAD], (a[HEAD] + b[HEAD][:18]) / 2)
    with pytest.raises(MergeError, match="shape"):
        merged({"merge_method": "linear", "models": ["B", "A"]})
    made = merged({"merge_method": "linear", "models": ["B", "A"], "on_shape_mismatch": "overlap"})
    torch.testing.assert_close(made[HEAD][18:], b[HEAD][18:])


def test_a_model_without_a_tokenizer_is_taken_as_it_is(capsys):
    a = save_with_tokens(Path("A"), 1, WORDS)
    save_llama(Path("B"), 2, {}, vocab=20)
    b = load_file("B/model.safetensors")
    torch.testing.assert_close(merged(two({}))[HEAD], (a[HEAD] + b[HEAD]) / 2)
    with pytest.raises(PlanError, match="B: nobody knows its tokens"):
        merged(two(BASE))


def test_files_that_cannot_be_read_are_told_of(capsys):
    for seed, (name, text) in enumerate((("A", b"one"), ("B", b"other"))):
        save_llama(Path(name), seed, {"tokenizer.model": text})
    assert main(["A", "B", "-o", "OUT"]) == 0
    assert "nobody can tell whether" in capsys.readouterr().err
    with pytest.raises(
        CheckpointError, match=r"(?s)A: .*has no tokenizer.json.*it has tokenizer.model.*save_pretrained"
    ):
        merged(two(BASE))


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ({"w0": {"source": {"kind": "model_token", "model": "B", "token": "nope"}}}, "B has not the token 'nope'"),
        ({"w0": {"source": {"kind": "model_token", "model": "B", "token_id": 20}}}, "B has not row 20"),
        ({"nope": {"source": "B"}}, "B has not the token 'nope'"),
    ],
)
def test_rows_that_are_not_there(tokens, said):
    save_with_tokens(Path("A"), 1, WORDS), save_with_tokens(Path("B"), 2, WORDS)
    with pytest.raises(PlanError, match=said):
        merged(two({"tokenizer": {"source": "base", "tokens": tokens}}))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "can't be read as a tokenizer"),
        ("[]", "can't be read as a tokenizer"),
        ("{}", "it has no 'model'"),
        ('{"model": {"type": "BPE"}}', "its lists of tokens are none"),
        ('{"model": {"type": "CharBPE", "vocab": {}}}', "its model is of the type 'CharBPE'"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}}}', "two tokens have the number 0"),
        ('{"model": {"type": "BPE", "vocab": {"a": -1}}}', "has the number -1"),
        ('{"model": {"type": "BPE", "vocab": {"a": true}}}', "has the number True"),
        ('{"model": {"type": "BPE", "vocab": {"a": 1e400}}}', "has the number inf"),
        ('{"model": {"type": "BPE", "vocab": {"a": 99999999999}}}', "has the number 99999999999"),
        ('{"model": {"type": "BPE", "vocab": "abc"}}', "its lists of tokens are none"),
        ('{"model": {"type": "Unigram", "vocab": [["a"], 3]}}', "its lists of tokens are none"),
        ('{"added_tokens": 7, "model": {"type": "BPE", "vocab": {}}}', "its lists of tokens are none"),
        ('{"added_tokens": [{"id": 3}], "model": {"type": "BPE", "vocab": {}}}', "its lists of tokens are none"),
        ("[" * 100_000, "can't be read as a tokenizer"),
        ('{"model": "\ud800"}'.encode("utf-8", "surrogatepass"), "can't be read as a tokenizer"),
    ],
)
def test_files_that_lie(text, said):
    save_with_tokens(Path("A"), 1, WORDS)
    save_with_tokens(Path("B"), 2, WORDS, files={"tokenizer.json": text})
    with pytest.raises(CheckpointError, match=said):
        merged(two(BASE))
    assert not Path("OUT").exists()


def test_rows_of_other_lengths_are_refused():
    save_with_tokens(Path("A"), 1, WORDS)
    b = save_with_tokens(Path("B"), 2, WORDS[:10])
    from safetensors.torch import save_file

    save_file({**b, EMBEDDING: torch.ones(10, 4)}, "B/model.safetensors")
    with pytest.raises(MergeError, match=r"its rows are of other lengths"):
        merged(two(BASE))


def test_a_tensor_as_large_as_the_vocabulary_is_not_left_as_it_is():
    many = [f"w{number}" for number in range(1200)]
    for seed, (name, words) in enumerate((("A", many), ("B", many[::-1]))):
        tensors = save_with_tokens(Path(name), seed, words)
        from safetensors.torch import save_file

        save_file({**tensors, "model.biases_of_tokens": torch.ones(1200)}, f"{name}/model.safetensors")
    with pytest.raises(PlanError, match=r"model\.biases_of_tokens: as large as its vocabulary"):
        merged(two(BASE))


def test_other_names_of_heads_are_matched():
    words = shuffled(WORDS, 3)
    extra = {"lm_head.bias": (20,), "cls.predictions.bias": (20,), "transformer.wte.weight": (20, 8)}
    kept = []
    for seed, (name, own) in enumerate((("A", WORDS), ("B", words))):
        tensors = save_with_tokens(Path(name), seed, own)
        from safetensors.torch import save_file

        made = torch.Generator().manual_seed(seed)
        tensors |= {each: torch.randn(shape, generator=made) for each, shape in extra.items()}
        save_file(tensors, f"{name}/model.safetensors")
        kept.append(tensors)
    found = merged(two(BASE))
    for name in extra:
        rows = rows_by_token([each[name] for each in kept], [ids(WORDS), ids(words)], ids(WORDS))
        torch.testing.assert_close(found[name].double(), (rows[0] + rows[1]) / 2, rtol=1e-6, atol=1e-7)


def test_numbers_of_tokens_in_configs_are_the_output_s():
    words = shuffled(WORDS, 9)
    save_with_tokens(Path("A"), 1, WORDS)
    save_with_tokens(Path("B"), 2, words)
    config = json.loads(Path("A/config.json").read_text()) | {
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "pad_token_id": None,
    }
    Path("A/config.json").write_text(json.dumps(config))
    Path("A/generation_config.json").write_text(json.dumps({"eos_token_id": 2, "temperature": 0.7}))
    merged(two({"tokenizer_source": "B"}))
    found = json.loads(Path("OUT/config.json").read_text())
    place = ids(words)
    assert found["bos_token_id"] == place["w1"]
    assert found["eos_token_id"] == [place["w2"], place["w3"]]
    assert found["pad_token_id"] is None
    assert json.loads(Path("OUT/generation_config.json").read_text()) == {
        "eos_token_id": place["w2"],
        "temperature": 0.7,
    }


def test_equal_tokens_are_told_by_the_tokens_and_not_by_the_text():
    files = tokenizer_files(WORDS)
    a = save_with_tokens(Path("A"), 1, WORDS)
    b = save_with_tokens(
        Path("B"), 2, WORDS, files={**files, "tokenizer.json": json.dumps(json.loads(files["tokenizer.json"]))}
    )
    torch.testing.assert_close(merged(two({}))[HEAD], (a[HEAD] + b[HEAD]) / 2)
    assert written_tokens(Path("OUT")) == ids(WORDS)


def test_a_tokenizer_that_is_written_nowhere_is_told(capsys):
    save_with_tokens(Path("A"), 1, WORDS[:18])
    save_with_tokens(Path("B"), 2, WORDS)
    lost = "the tokenizer of the tokens that come out, whose rows the weights have, is not written"
    words = ["--tokenizer-source", "B"]
    assert main(["A", "B", "-o", "out.safetensors", *words]) == 0
    assert f"out.safetensors is a file: {lost}" in capsys.readouterr().err
    assert main(["A/model.safetensors", "B", "-o", "out", *words]) == 0
    assert f"the layout is a file: {lost}" in capsys.readouterr().err
    assert main(["A", "B", "-o", "whole", *words]) == 0
    assert lost not in capsys.readouterr().err
