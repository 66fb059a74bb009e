"""A model's card: what the hub reads at its top, and whose it is."""

from __future__ import annotations

import pytest
import yaml

from streammerge.recipe.card import CardModel, is_unchanged_card, model_card, read_stated

RECIPE = {"merge_method": "slerp", "models": [{"model": "a", "name": "a"}, {"model": "b", "name": "b"}]}


def card(*models, recipe=RECIPE, library="transformers"):
    return model_card(recipe, models, library, ["slerp"]).decode()


def front(text):
    return yaml.safe_load(text.split("---\n")[1])


def named(name="a", **stated):
    return CardModel(name, stated)


def test_what_the_hub_reads():
    text = card(named("org/a", license="mit", language=["en"]), named("b", license="mit"))
    assert front(text) == {
        "base_model": ["org/a", "b"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "streammerge"],
        "license": "mit",
    }
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == RECIPE
    assert "# A merge of org/a and b\n" in text
    assert "with `slerp`" in text


@pytest.mark.parametrize(
    ("stated", "agreed"),
    [
        ([{"license": "mit"}, {}], {}),
        ([{"license": "mit"}, {"license": "apache-2.0"}], {}),
        ([{"license": 7}, {"license": 7}], {}),
        ([{"license": "x" * 300}] * 2, {}),
        ([{"license": "other", "license_name": "x"}] * 2, {"license": "other", "license_name": "x"}),
        ([{"license": "other", "license_name": "x"}, {"license": "other", "license_name": "y"}], {}),
        ([{"license": "other", "license_name": "x"}, {"license": "other"}], {}),
        ([{"license_name": "x"}] * 2, {}),
        ([{"pipeline_tag": "text-generation"}] * 2, {"pipeline_tag": "text-generation"}),
    ],
)
def test_a_licence_is_told_if_all_say_the_same(stated, agreed):
    found = front(card(*(named(**each) for each in stated)))
    assert {key: value for key, value in found.items() if key.startswith(("license", "pipeline"))} == agreed


def test_names_can_not_write_into_the_card():
    evil = "x](http://evil)\n---\nlicense: cc0 <b>"
    recipe = {**RECIPE, "models": [{"model": "```\n# x", "name": "````"}]}
    text = card(named(evil), named("org/../x"), recipe=recipe)
    assert front(text)["base_model_relation"] == "merge"
    assert "base_model" not in front(text)
    assert "\nlicense" not in text
    assert "](" not in text.replace("\\](", "")
    assert yaml.safe_load(text.split("`````yaml\n")[1].split("`````")[0]) == recipe


def test_many_models_are_counted():
    assert "# A merge of a, b, c and 2 others\n" in card(*map(named, "abcde"))
    assert "# A merge of a, b, c and 1 other\n" in card(*map(named, "abcd"))
    assert "# A merge of a\n" in card(named("a"))


def test_whose_card_it_is(tmp_path):
    path = tmp_path / "README.md"
    assert not is_unchanged_card(path)
    path.write_bytes(model_card(RECIPE, [named()], None, ["slerp"]))
    assert is_unchanged_card(path)
    for changed in (path.read_bytes().replace(b"slerp", b"SLERP"), path.read_bytes() + b"more\n", b"", b"hi\n"):
        path.write_bytes(changed)
        assert not is_unchanged_card(path)


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("---\nlicense: mit\n---\nhi", {"license": "mit"}),
        ("---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("hi", {}),
        ("", {}),
        ("---\nlicense: mit\n", {}),
        ("---\n- mit\n---\n", {}),
        ("---\na: [\n---\n", {}),
        ("---\na: !!python/object:os.system x\n---\n", {}),
        ("\xff\xfe", {}),
    ],
)
def test_what_cards_say(tmp_path, text, stated):
    (tmp_path / "README.md").write_bytes(text.encode("latin-1"))
    assert read_stated(tmp_path) == stated
    assert read_stated(tmp_path / "nowhere") == {}
