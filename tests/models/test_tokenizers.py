"""Tokenizers with other tokens than they had: the kinds that there are, trained on real text, read by the library."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import streammerge
from streammerge.cli.main import main
from streammerge.errors import PlanError
from tests.make.folders import llama_config, llama_tensors, save_folder
from tests.make.vocabularies import EMBEDDING, HEAD, listed_token, save_with_tokens, written_tokens
from tests.references.vocabularies import rows_by_token

tokenizers = pytest.importorskip("tokenizers")

COMMON = "the cat and the dog sat on the mat at noon; is it the log? no, this is a hat, and that is the end of it. "
TEXTS = {
    "A": COMMON * 4 + "the cat ran to the hat shop in july, quick as a fox; big dogs jump over lazy cats. " * 2,
    "B": COMMON * 4 + "the rain in spain stays mainly on the plain; the train came again, quickly, by five ways. " * 2,
    "C": COMMON * 4 + "der hund und die katze sitzen auf der matte, und der zug kam wieder; quick jumps by foxes. " * 2,
}
KINDS = ["byte-level BPE", "SentencePiece BPE", "Unigram", "WordPiece", "WordLevel"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def trained(kind: str, text: str, size: int, special: list[str]) -> Any:
    """A tokenizer of this kind with the merges, pieces or words of a text."""
    models, trainers, normalizers = tokenizers.models, tokenizers.trainers, tokenizers.normalizers
    before, decoders = tokenizers.pre_tokenizers, tokenizers.decoders
    if kind == "byte-level BPE":
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = before.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size + 256,
            special_tokens=special,
            initial_alphabet=before.ByteLevel.alphabet(),
            show_progress=False,
        )
    elif kind == "SentencePiece BPE":
        made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>", *special], show_progress=False)
    elif kind == "Unigram":
        made = tokenizers.Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = before.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=size, special_tokens=["<unk>", *special], unk_token="<unk>", show_progress=False
        )
    elif kind == "WordPiece":
        made = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.pre_tokenizer, made.decoder = before.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=["<unk>", *special], show_progress=False)
    else:
        made = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
        made.pre_tokenizer = before.Whitespace()
        trainer = trainers.WordLevelTrainer(vocab_size=size, special_tokens=["<unk>", *special], show_progress=False)
    made.train_from_iterator([text], trainer)
    return made


def save(name: str, kind: str, special: Any = None, late: Any = None, rows: Any = 0, **more: Any) -> Any:
    """A model whose tokenizer is trained on its text, some tokens added behind."""
    made = trained(kind, TEXTS[name], 60, special or [])
    made.add_tokens(late or [])
    values = json.loads(made.to_str())
    count = rows or max(made.get_vocab().values()) + 1
    tensors = llama_tensors(ord(name), vocab=count)
    files = {"tokenizer.json": json.dumps(values, indent=2, ensure_ascii=False), "tokenizer_config.json": "{}", **more}
    save_folder(Path(name), tensors, llama_config(vocab=count), files)
    return made, tensors


def merge(*names: str, output: str = "OUT", **keys: Any) -> dict[str, torch.Tensor]:
    streammerge.merge({"merge_method": "linear", "models": list(names), **keys}, output=output, force=True)
    return load_file(f"{output}/model.safetensors")


def loaded(folder: str = "OUT") -> Any:
    return tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")


def encoded(tokenizer: Any, text: str) -> tuple[str, ...]:
    """The tokens of a text by their numbers: what is unknown is told as it is written."""
    return tuple(map(tokenizer.id_to_token, tokenizer.encode(text).ids))


UNION = {"tokenizer_source": "union"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_union_has_all_tokens_and_their_rows(kind):
    (a, first), (b, second) = save("A", kind, ["<s>"], ["<tool>"]), save("B", kind, ["<s>"], ["<call>", "<tool>"])
    made = merge("A", "B", **UNION)
    found = loaded().get_vocab()
    assert found.keys() == a.get_vocab().keys() | b.get_vocab().keys()
    assert all(found[token] == number for token, number in a.get_vocab().items())
    assert sorted(found.values()) == list(range(len(found)))
    assert written_tokens(Path("OUT")) == found
    for name in (EMBEDDING, HEAD):
        rows = rows_by_token([first[name], second[name]], [a.get_vocab(), b.get_vocab()], found)
        torch.testing.assert_close(made[name].double(), (rows[0] + rows[1]) / 2, rtol=1e-6, atol=1e-7)
    assert json.loads(Path("OUT/config.json").read_text())["vocab_size"] == len(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["AB", "BA", "ACB", "CAB"])
def test_what_all_encode_alike_is_encoded_so(kind, order):
    """Every word, and every text of such words, that the models encode to the same tokens."""
    own = {name: save(name, kind, ["<s>"], ["<tool>"])[0] for name in order}
    merge(*order, **UNION)
    union = loaded()
    words = sorted({word.strip(";,") for name in order for word in TEXTS[name].split()})
    texts = [
        *words,
        *(f"{one} {other}" for one, other in itertools.pairwise(words)),
        "<tool>the cat",
        "on<s>",
    ]
    alike = 0
    for text in texts:
        expected = {encoded(each, text) for each in own.values()}
        if len(expected) == 1 and not any("<unk>" in tokens for tokens in expected):
            alike += 1
            assert encoded(union, text) in expected, text
            assert union.decode(union.encode(text).ids) == own[order[0]].decode(own[order[0]].encode(text).ids)
    assert alike > 3


@pytest.mark.parametrize("kind", ["byte-level BPE", "SentencePiece BPE", "WordPiece", "WordLevel"])
def test_texts_are_encoded_to_the_others_tokens_too(kind):
    """As with mergekit they are not: it adds them as they are written, `Ġrain`, which stands in no text."""
    (a, _), (b, _) = save("A", kind), save("B", kind)
    merge("A", "B", **UNION)
    found = set(loaded().encode(TEXTS["B"]).tokens)
    assert len(found & b.get_vocab().keys() - a.get_vocab().keys()) > 2
    assert loaded().decode(loaded().encode("the rain").ids) == b.decode(b.encode("the rain").ids)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_same_each_time_and_verified(kind, capsys):
    save("A", kind, ["<s>"], ["<tool>"]), save("B", kind, ["<s>"], ["<call>"])
    merge("A", "B", **UNION)
    merge("A", "B", **UNION, output="AGAIN")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"):
        assert Path("OUT", name).read_bytes() == Path("AGAIN", name).read_bytes()
    assert main(["verify", "OUT", "A=A", "B=B"]) == 0
    Path("OUT/tokenizer.json").write_text("{}")
    assert main(["verify", "OUT", "A=A", "B=B"]) == 1
    assert "tokenizer.json: another" in capsys.readouterr().err


def test_added_tokens_keep_what_they_are():
    flags = {"single_word": True, "lstrip": True, "normalized": False, "special": True}
    save("A", "byte-level BPE", ["<s>"])
    save(
        "B",
        "byte-level BPE",
        ["<s>"],
        [tokenizers.AddedToken("<tool>", single_word=True, lstrip=True, normalized=False, special=True), "<x>"],
    )
    config = {"added_tokens_decoder": {"0": {"content": "<s>", "special": True}}}
    Path("A/tokenizer_config.json").write_text(json.dumps(config))
    Path("A/added_tokens.json").write_text("{}")
    merge("A", "B", **UNION)
    tokens = written_tokens(Path("OUT"))
    number = tokens["<tool>"]
    values = json.loads(Path("OUT/tokenizer.json").read_text())
    entry = next(each for each in values["added_tokens"] if each["content"] == "<tool>")
    assert entry == {**listed_token("<tool>", number), **flags}
    decoder = json.loads(Path("OUT/tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert decoder[str(number)]["content"] == "<tool>"
    assert decoder["0"] == {"content": "<s>", "special": True}
    assert json.loads(Path("OUT/added_tokens.json").read_text()) == {"<tool>": number, "<x>": tokens["<x>"]}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_without_a_row_are_no_tokens(kind):
    a, _ = save("A", kind, ["<s>"])
    rows = len(a.get_vocab())
    more = tokenizers.Tokenizer.from_str(a.to_str())
    more.add_tokens([f"<unused{number}>" for number in range(4)])
    more.save("A/tokenizer.json")
    b, _ = save("B", kind, ["<s>"])
    merge("A", "B", **UNION)
    assert loaded().get_vocab().keys() == a.get_vocab().keys() | b.get_vocab().keys()
    made = merge("A", "B", tokenizer_source="base")
    assert loaded().get_vocab() == a.get_vocab()
    assert len(made[HEAD]) == rows


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_nobody_has_are_added(kind):
    a, tensors = save("A", kind, ["<s>"])
    tokens = {
        "<new>": {"source": {"kind": "model_token", "model": "A", "token": "<s>"}},
        "ⓝ e w": {"source": {"kind": "zero"}},
        "<same>": {},
    }
    made = merge("A", tokenizer={"source": "base", "tokens": tokens})
    found, size = loaded().get_vocab(), len(a.get_vocab())
    assert [found[token] for token in tokens] == [size, size + 1, size + 2]
    assert loaded().encode("the<new>cat ⓝ e w").tokens.count("<new>") == 1
    assert torch.equal(made[HEAD][size], tensors[HEAD][a.get_vocab()["<s>"]])
    assert torch.equal(made[HEAD][size + 1 :], torch.zeros(2, 8))
    assert torch.equal(made[HEAD][:size], tensors[HEAD])


def test_older_files_are_written_too():
    older = {"vocab.json": "{}", "merges.txt": "", "tokenizer.model": b"x", "special_tokens_map.json": "{}"}
    save("A", "byte-level BPE", **older), save("B", "byte-level BPE")
    merge("A", "B", **UNION)
    model = json.loads(Path("OUT/tokenizer.json").read_text())["model"]
    assert json.loads(Path("OUT/vocab.json").read_text()) == model["vocab"]
    lines = Path("OUT/merges.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split(" ") for line in lines[1:]] == model["merges"]
    assert not Path("OUT/tokenizer.model").exists()
    again = tokenizers.models.BPE.from_file("OUT/vocab.json", "OUT/merges.txt")
    assert tokenizers.Tokenizer(again).get_vocab_size() == len(model["vocab"])


def test_a_nested_union_is_a_vocabulary_like_any():
    kinds = {name: save(name, "byte-level BPE", ["<s>"], [f"<{name}>"]) for name in "ABC"}
    inner = {"merge_method": "linear", "models": ["A", "B"], **UNION}
    streammerge.merge(inner, output="AB")
    expected = merge("AB", "C", **UNION, output="TWO")
    made = merge(*["C"], output="OUT2")
    streammerge.merge({"merge_method": "linear", "models": [inner, "C"], **UNION}, output="ONE")
    assert Path("ONE/tokenizer.json").read_bytes() == Path("TWO/tokenizer.json").read_bytes()
    made = load_file("ONE/model.safetensors")
    for name, values in expected.items():
        torch.testing.assert_close(made[name], values, rtol=1e-5, atol=1e-6)
    assert kinds["A"][0].get_vocab().items() <= written_tokens(Path("ONE")).items()


def test_a_union_of_one_s_tokens_is_copied():
    a, _ = save("A", "Unigram")
    tensors = llama_tensors(3, vocab=len(a.get_vocab()))
    save_folder(
        Path("B"),
        tensors,
        llama_config(vocab=len(a.get_vocab())),
        {"tokenizer.json": Path("A/tokenizer.json").read_bytes()},
    )
    merge("A", "B", **UNION)
    assert Path("OUT/tokenizer.json").read_bytes() == Path("A/tokenizer.json").read_bytes()


def test_without_the_library_it_is_said_what_to_install(monkeypatch):
    save("A", "byte-level BPE", ["<s>"]), save("B", "byte-level BPE", ["<t>"])
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        PlanError, match=r"tokenizers library, which is not installed\n.*pip install 'streammerge\[llm\]'"
    ):
        merge("A", "B", **UNION)
    assert not Path("OUT").exists()
    merge("A", "B", tokenizer_source="base")


def test_what_the_library_refuses_is_no_output():
    values = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "c"]]},
    }
    save_with_tokens(Path("A"), 1, ["a", "b"], files={"tokenizer.json": json.dumps(values)})
    save_with_tokens(Path("B"), 2, ["a", "c"])
    with pytest.raises(PlanError, match=r"(?s)refused by the tokenizers library|has other numbers"):
        merge("A", "B", tokenizer={"source": "base", "tokens": {"z": {}}})
    assert not Path("OUT").exists()


def test_words_of_another_kind_are_rows_and_no_more():
    (a, _), (b, _) = save("A", "byte-level BPE"), save("B", "WordPiece")
    merge("A", "B", **UNION)
    assert loaded().get_vocab().keys() == a.get_vocab().keys() | b.get_vocab().keys()
    for word in TEXTS["A"].split():
        assert loaded().encode(word).tokens == a.encode(word).tokens
