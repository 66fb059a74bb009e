"""mergekit's keys on tokenizers and templates: done where nothing has to be merged, refused where something has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import streammerge
from streammerge.cli.main import main
from streammerge.errors import MergeError, PlanError, RecipeError
from streammerge.models.vocabularies import vocabulary_digest
from streammerge.recipe.templates import TEMPLATES
from tests.make.folders import TOKENIZER, save_llama

FAST: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "added_tokens": [{"id": 2, "content": "<s>"}],
    "normalizer": None,
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]},
}
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def fast(**changes) -> str:
    return json.dumps({**FAST, **changes}, indent=2)


CONTRARY = {"another token", "another added one"}
"""Where one number is of two tokens, or of one and of none."""

MATCHED = {"another token", "another added one", "in one line"}
"""Where all models list their tokens in a tokenizer.json."""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def merge(a, b, **keys):
    for seed, (name, files) in enumerate((("A", a), ("B", b))):
        save_llama(Path(name), seed, files)
    recipe = {"merge_method": "linear", "models": ["A", "B"], **keys}
    return streammerge.merge(recipe, output="OUT", force=True)


SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the same file": ({"tokenizer.json": fast()}, {"tokenizer.json": fast()}),
    "another truncation": ({"tokenizer.json": fast()}, {"tokenizer.json": fast(truncation={"max_length": 8})}),
    "beside older files": ({"tokenizer.json": fast(), "vocab.txt": "x"}, {"tokenizer.json": fast()}),
    "SentencePiece": ({"tokenizer.model": b"\0\1"}, {"tokenizer.model": b"\0\1"}),
    "of parts": ({"vocab.json": "{}", "merges.txt": "x"}, {"vocab.json": "{}", "merges.txt": "x"}),
    "in one line": ({"tokenizer.json": json.dumps(FAST)}, {"tokenizer.json": json.dumps(FAST)}),
}
OTHER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "another token": (
        {"tokenizer.json": fast()},
        {"tokenizer.json": fast(model={**FAST["model"], "vocab": {"a": 1, "b": 0}})},
    ),
    "another added one": ({"tokenizer.json": fast()}, {"tokenizer.json": fast(added_tokens=[])}),
    "one added in a file": ({"tokenizer.model": b"x"}, {"tokenizer.model": b"x", "added_tokens.json": "{}"}),
    "one added in the config": (
        {"tokenizer.model": b"x", "tokenizer_config.json": "{}"},
        {"tokenizer.model": b"x", "tokenizer_config.json": '{"added_tokens_decoder": {"5": {}}}'},
    ),
    "another part": ({"vocab.json": "{}", "merges.txt": "x"}, {"vocab.json": "{}", "merges.txt": "y"}),
    "none": ({"tokenizer.json": fast()}, {}),
    "of another kind": ({"tokenizer.json": fast()}, {"vocab.txt": "x"}),
    "in one line": ({"tokenizer.json": json.dumps(FAST)}, {"tokenizer.json": json.dumps({**FAST, "padding": 1})}),
}


@pytest.mark.parametrize(
    "keys", [{"tokenizer_source": "base"}, {"tokenizer_source": "union"}, {"tokenizer": {"source": "A"}}]
)
@pytest.mark.parametrize("case", SAME)
def test_one_vocabulary_needs_nothing(case, keys):
    merge(*SAME[case], **keys)
    copied = next(iter(SAME[case][0]))
    assert Path("OUT", copied).read_bytes() == Path("A", copied).read_bytes()


@pytest.mark.parametrize("case", OTHER)
def test_several_are_matched_or_refused(case, capsys):
    """By token where a tokenizer.json lists them, and with words where they can't be."""
    if case in CONTRARY:
        with pytest.raises(PlanError, match="the models' vocabularies differ"):
            merge(*OTHER[case])
    else:
        merge(*OTHER[case])
    if case in MATCHED:
        merge(*OTHER[case], tokenizer_source="base")
        assert json.loads(Path("OUT/config.json").read_text())["vocab_size"] == 3
        return
    with pytest.raises(MergeError, match=r"tokens, by which|has no tokenizer\.json"):
        merge(*OTHER[case], tokenizer_source="base")


def test_nested_models_count():
    swapped = fast(model={**FAST["model"], "vocab": {"a": 1, "b": 0}})
    merge({"tokenizer.json": fast()}, {"tokenizer.json": swapped}, tokenizer_source="base")
    nested = {"merge_method": "linear", "models": ["B", "B"]}
    with pytest.raises(PlanError, match="vocabularies differ"):
        streammerge.merge({"merge_method": "linear", "models": ["A", nested]}, output="X")
    streammerge.merge({"merge_method": "linear", "models": ["A", nested], "tokenizer_source": "base"}, output="X")


def test_a_vocabulary_is_read_piece_by_piece(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b'  "added_tokens": [' + b"x" * 3_000_000)
    first = vocabulary_digest(path)
    path.write_bytes(b'  "added_tokens": [' + b"x" * 2_999_999 + b"y")
    assert vocabulary_digest(path) != first


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"tokenizer": {"source": "A", "token": {}}}, "(?s)tokenizer: unknown key 'token'.*tokens"),
        ({"tokenizer": {"source": "A", "pad_to_multiple_of": 0}}, "a whole number from 1 to 1,048,576, found 0"),
        ({"tokenizer": {"source": "A", "pad_to_multiple_of": True}}, "a whole number from 1"),
        ({"tokenizer": {"source": "A", "pad_to_multiple_of": "8"}}, "a whole number from 1"),
        ({"tokenizer": {"tokens": ["a"]}}, "tokens must be a map"),
        ({"tokenizer": {"tokens": {1: {}}}}, "a token is text"),
        ({"tokenizer": {"tokens": {"": {}}}}, "a token is text"),
        ({"tokenizer": {"tokens": {"a": "B"}}}, "expected a map with source and force"),
        ({"tokenizer": {"tokens": {"a": {"force": True}}}}, "force without a source"),
        ({"tokenizer": {"tokens": {"a": {"source": "B", "force": "yes"}}}}, "force must be true or false"),
        ({"tokenizer": {"tokens": {"a": {"source": "C"}}}}, "'C' is none of the models"),
        ({"tokenizer": {"tokens": {"a": {"source": {"kind": "mean"}}}}}, "kind must be zero or model_token"),
        ({"tokenizer": {"tokens": {"a": {"source": {"kind": "model_token", "model": "A"}}}}}, "expected one of token"),
        (
            {"tokenizer": {"tokens": {"a": {"source": {"kind": "model_token", "model": "A", "token_id": -1}}}}},
            "token_id must be a whole number",
        ),
        ({"tokenizer": {"source": "numbers", "pad_to_multiple_of": 8}}, "source numbers matches no tokens"),
        ({"tokenizer_source": "C"}, "'C' is none of the models"),
        ({"tokenizer_source": 7}, "expected a path"),
        ({"tokenizer_source": {"model": {"path": "C"}}}, "is none of the models"),
        ({"tokenizer": "A"}, "tokenizer must be a map"),
        ({"tokenizer": {"source": "A"}, "tokenizer_source": "A"}, "can't be combined"),
        ({"chat_template": "chat-ml"}, "chat_template must be a name, or the text of a template in Jinja, found 'chat"),
        ({"chat_template": 7}, "chat_template must be a name"),
    ],
)
def test_what_would_need_more_is_refused(keys, said):
    with pytest.raises(RecipeError, match=said):
        merge(TOKENIZER, TOKENIZER, **keys)


def test_a_template_of_the_recipe_s_own(capsys):
    merge(TOKENIZER, TOKENIZER, chat_template=TEMPLATE, tokenizer_source="base")
    assert Path("OUT/chat_template.jinja").read_text() == TEMPLATE
    assert main(["verify", "OUT", "A=A", "B=B"]) == 0
    Path("OUT/chat_template.jinja").write_text("other")
    assert main(["verify", "OUT", "A=A", "B=B"]) == 1
    assert "chat_template.jinja: another" in capsys.readouterr().err


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_have_names(name):
    told = json.dumps({"tokenizer_class": "X", "chat_template": "old"})
    merge({**TOKENIZER, "tokenizer_config.json": told}, TOKENIZER, chat_template=name)
    assert Path("OUT/chat_template.jinja").read_text() == TEMPLATES[name]
    stated = json.loads(Path("OUT/tokenizer_config.json").read_text())
    assert stated == {"tokenizer_class": "X", "chat_template": TEMPLATES[name]}


def test_the_template_that_most_models_have():
    several = json.dumps(
        {"chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": TEMPLATE}]}
    )
    for name, files in {
        "A": {"chat_template.jinja": "one of its own"},
        "B": {"chat_template.jinja": f"{TEMPLATE}\n"},
        "C": {"tokenizer_config.json": several},
        "D": {"tokenizer_config.json": "no JSON"},
    }.items():
        save_llama(Path(name), files=files)
    recipe = {"merge_method": "linear", "models": ["A", "B", "C", "D"], "chat_template": "auto"}
    streammerge.merge(recipe, output="OUT")
    assert Path("OUT/chat_template.jinja").read_text() == TEMPLATE


def test_where_no_model_has_a_template_none_is_written():
    for name in "AB":
        save_llama(Path(name), files={})
    recipe = {"merge_method": "linear", "models": ["A", "B"], "chat_template": "auto"}
    assert any("no model has a chat template" in note for note in streammerge.make_plan(recipe, output="OUT").notes())
    streammerge.merge(recipe, output="OUT")
    assert not Path("OUT/chat_template.jinja").exists()
    assert any("is not written" in note for note in streammerge.make_plan(recipe, output="X.safetensors").notes())


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_say_what_is_said(name):
    jinja = pytest.importorskip("jinja2")
    talk = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    template = jinja.Environment(trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATES[name])
    found = template.render(messages=talk, add_generation_prompt=True, bos_token="<s>", eos_token="</s>")
    assert (
        found
        == {
            "alpaca": "be kind\n\n### Instruction:\nhi\n\n### Response:\n",
            "chatml": "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
            "exaone": "[|system|]be kind[|endofturn|]\n[|user|]hi\n[|assistant|]",
            "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nbe kind<|eot_id|><|start_header_id|>user"
            "<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "mistral": "<s> [INST] be kind\n\nhi [/INST]",
        }[name]
    )


def test_a_tag_for_anchors_is_nobody_s():
    merge(TOKENIZER, TOKENIZER)
    Path("r.yaml").write_text("const_tag: &M A\nmerge_method: linear\nmodels: [{model: *M}, {model: B}]\n")
    assert main(["r.yaml", "-o", "X", "-q"]) == 0
