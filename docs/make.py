"""Makes the generated parts of the README and of these pages: `python docs/make.py`, with `--check` only looks.

A generated part stands between `<!-- NAME: made by docs/make.py -->` and `<!-- end of NAME -->`, in any page; PARTS has
every name. The picture of the rooms is a file of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from unittest import mock
from xml.sax.saxutils import escape

from streammerge.cli import main as cli
from streammerge.formats import header_entries, shards
from streammerge.formats.torchzip import directory as zip_directory
from streammerge.formats.torchzip import machine as pickle_machine
from streammerge.models import extent
from streammerge.plan import globs, tuning
from streammerge.recipe import checks
from streammerge.recipe.files import MAX_NODES, MAX_RECIPE, MAX_VALUES
from streammerge.recipe.options import RECIPE_KEYS, Options

ROOT: Final = Path(__file__).resolve().parent.parent
README: Final = ROOT / "README.md"
PICTURE: Final = ROOT / "docs" / "rooms.svg"
MEASURED: Final = ROOT / "benchmarks" / "results" / "article-fp16.json"

BLOCK: Final = re.compile(
    r"(?P<begin><!-- (?P<name>[a-z ]+): made by docs/make\.py -->\n).*?(?P<end><!-- end of (?P=name) -->)", re.DOTALL
)
LEVELS: Final = "▁▂▃▄▅▆▇█"
ROW: Final = 30


def main(words: Sequence[str]) -> int:
    """Write every file that has generated parts, or with --check name those that are not current."""
    parser = argparse.ArgumentParser(prog="docs/make.py", description="Make the generated parts of the docs.")
    parser.add_argument("--check", action="store_true", help="write nothing, and name the files that are not current")
    check = parser.parse_args(words).check
    sys.path.insert(0, str(ROOT))  # benchmarks and tests are packages of the repository, and are not installed
    stale = {path: text for path, text in current().items() if not path.exists() or read(path) != text}
    if check:
        for path in stale:
            sys.stderr.write(f"{path.relative_to(ROOT)} is not current; run `make docs`\n")
        return 1 if stale else 0
    for path, text in stale.items():
        path.write_text(text, encoding="utf-8", newline="\n")
    return 0


def pages() -> list[Path]:
    """The README and every page of the documentation."""
    return [README, *sorted((ROOT / "docs").glob("*.md"))]


def read(path: Path) -> str:
    """A page's text."""
    return path.read_text(encoding="utf-8")


def current() -> dict[Path, str]:
    """Every file that has generated parts, and what it should be."""
    return {**{path: with_parts(read(path)) for path in pages()}, PICTURE: picture(rooms())}


def with_parts(text: str) -> str:
    """A page's text with every generated part made anew; KeyError if there is no part of such a name."""
    return BLOCK.sub(lambda found: f"{found['begin']}{PARTS[found['name']]()}\n{found['end']}", text)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def measured() -> str:
    """The article's job against copying the same bytes and against other tools."""
    from benchmarks import report, results

    return report.readme_table(results.load(MEASURED))


def rooms() -> Sequence[tuple[str, str]]:
    """The package's rooms from the top to the bottom, with what each is for."""
    from tests.promises.rooms import ROOMS

    return ROOMS


def printed(*words: str) -> Any:  # noqa: ANN401
    """What a command prints as JSON."""
    with contextlib.redirect_stdout(io.StringIO()) as found:
        cli.main([*words, "--json"])
    return json.loads(found.getvalue())


def methods() -> str:
    """Every method with its formula, kind, base and parameters."""
    rows = [
        (f"`{each['name']}`", each["formula"], each["kind"], each["base"], parameters(each["parameters"]))
        for each in printed("methods")
    ]
    return table(("method", "formula", "kind", "base", "parameters (default)"), rows)


def parameters(found: Iterable[Mapping[str, Any]]) -> str:
    """`weight` (1.0, per model), …: the parameters with their defaults, and what else may be given."""
    shown = []
    for each in found:
        default = "required" if each["default"] is None else json.dumps(each["default"])
        other = other_values(each)
        shown.append(f"`{each['name']}` ({default}{f'; {other}' if other else ''}{', per model' * each['per_model']})")
    return ", ".join(shown)


def other_values(parameter: Mapping[str, Any]) -> str:
    """What else than the default may be given, where that is one of some words, or a number in a range."""
    if parameter["type"] == "choice":
        words = str(parameter["takes"]).removeprefix("one of ").split(", ")
        return ", ".join(word for word in words if word != parameter["default"])
    return (
        str(parameter["takes"]).removeprefix(f"a {parameter['type']}").strip() if "number" in parameter["type"] else ""
    )


def presets() -> str:
    """Every preset of values by block, drawn: a bar for each block."""
    tables = printed("methods", "--presets")
    names = sorted({name for values in tables.values() for name in values})
    rows = [(f"`{name}`", *(bars(values.get(name, [])) for values in tables.values())) for name in names]
    return table(("preset", *(f"{count} values" for count in tables)), rows)


def bars(values: Sequence[float]) -> str:
    """`▁▃▅█`: the lowest bar for 0, the highest for 1."""
    return f"`{''.join(LEVELS[round(value * (len(LEVELS) - 1))] for value in values)}`" if values else ""


def parser_of(*command: str) -> argparse.ArgumentParser:
    """The parser that answers `--help` to a command, or to a merge where there is none."""
    found: list[argparse.ArgumentParser] = []
    with (
        mock.patch.object(argparse.ArgumentParser, "print_help", lambda parser: found.append(parser)),
        contextlib.suppress(SystemExit),
    ):
        cli.main([*command, "--help"])
    return found[0]


def named(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Its options but --help, by their long names."""
    actions = (action for action in parser._actions if action.option_strings)
    return {action.option_strings[-1]: action for action in actions if action.dest != "help"}


def shown(action: argparse.Action) -> str:
    """`-m, --method M`: the option and what is to be written after it."""
    value = "" if action.nargs == 0 else action.metavar or "|".join(map(str, action.choices or [action.dest.upper()]))
    return f"{', '.join(action.option_strings)} {value}".strip()


def meaning(action: argparse.Action) -> str:
    """Its help, with a percent sign where argparse wants two."""
    return (action.help or "").replace("%%", "%")


def options() -> str:
    """Every option of a merge, in the groups of `--help`."""
    parser = parser_of()
    parts = []
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action in named(parser).values()]
        if actions:
            title = "" if group is parser._optionals else f"### {str(group.title).capitalize()}\n\n"
            rows = [(f"`{shown(action)}`", meaning(action)) for action in actions]
            parts.append(title + table(("option", "meaning"), rows))
    return "\n\n".join(parts)


def usage_of(command: str) -> Callable[[], str]:
    """What `streammerge COMMAND --help` says, but for the options that every merge has."""

    def part() -> str:
        parser, of_a_merge = parser_of(command), named(parser_of())
        own = named(parser)
        merges = "--resume" in own
        if merges:
            own = {name: action for name, action in own.items() if name not in of_a_merge}
        words = positionals(parser)
        usage = [parser.prog, *words, *(["[options]"] if own else []), *(["[options of a merge]"] if merges else [])]
        rows = [(f"`{word}`", meaning(action)) for word, action in words.items() if action.help]
        rows += [(f"`{shown(action)}`", meaning(action)) for action in own.values()]
        explained = [table(("word", "meaning"), rows)] if rows else []
        return "\n\n".join([f"    {parser.usage or ' '.join(usage)}", str(parser.description), *explained])

    return part


def positionals(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Its words that are no options, as its usage writes them."""
    found = {}
    for action in parser._actions:
        if not action.option_strings:
            name = str(action.metavar or action.dest.upper())
            found[{"*": f"[{name} ...]", "?": f"[{name}]"}.get(str(action.nargs), name)] = action
    return found


def keywords() -> str:
    """What `streammerge.merge` takes as keywords, and the options of the command line that are the same."""
    defaults = {**dict.fromkeys(RECIPE_KEYS), **{field.name: field.default for field in dataclasses.fields(Options)}}
    rows = [(f"`{name}`", f"`{option_of(name)}`", f"`{default!r}`") for name, default in defaults.items()]
    return table(("keyword", "the same as", "default"), rows)


def option_of(keyword: str) -> str:
    """The command line's word for a keyword; KeyError if it has none."""
    known, name = named(parser_of()), keyword.replace("_", "-")
    return f"--{name}" if f"--{name}" in known else known[f"--no-{name}"].option_strings[-1]


def limits() -> str:
    """What files may hold, and how much may be merged, at most."""
    entries, machine, members = header_entries, pickle_machine, zip_directory.MAX_MEMBERS
    header = (
        f"{entries.MAX_TENSORS:,} tensors of up to {entries.MAX_DIMENSIONS} dimensions, names of "
        f"{entries.MAX_NAME:,} characters, {mib(entries.MAX_METADATA)} of metadata, {mib(entries.MAX_TEXT)} as text"
    )
    pickle = f"a pickle of {mib(machine.MAX_PICKLE)}, {machine.MAX_STEPS:,} steps and {mib(machine.MAX_HELD)} of values"
    index = f"{mib(shards.MAX_INDEX)} (a quarter of that beyond ASCII), {shards.MAX_INDEXED:,} values"
    rows = [
        ("a safetensors header", header),
        ("a torch zip", f"{pickle}, which is about 24,000 tensors; {members:,} members"),
        ("an index of shards", index),
        ("a recipe", f"{MAX_RECIPE >> 10:,} KiB, {MAX_NODES:,} values; {MAX_VALUES:,} with those that aliases repeat"),
        ("a merge", merge_limits()),
    ]
    return table(("what", "at most"), rows)


def merge_limits() -> str:
    """How much may be planned."""
    return (
        f"{checks.MAX_INPUTS:,} inputs; merges nested {extent.MAX_DEPTH} deep; {extent.MAX_STEPS:,} steps of planning "
        f"(one for each input of a tensor, {extent.STEPS_OF_TENSOR} for itself), {globs.MAX_TRIED:,} tries of globs, "
        f"{tuning.MAX_CONDITIONS:,} of conditions"
    )


def mib(nbytes: int) -> str:
    """`24 MiB`."""
    return f"{nbytes >> 20} MiB"


def picture(found: Sequence[tuple[str, str]]) -> str:
    """The rooms as a stack, drawn as SVG: each uses only those that stand below it."""
    bottom = ROW * len(found)
    drawn = "".join(row(8 + ROW * number, name, what) for number, (name, what) in enumerate(found))
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {bottom + 16}"
  font-family="sans-serif" font-size="13">
<title>The rooms of streammerge: each imports only rooms that stand below it</title>
<path d="M14 10 V{bottom - 2} l-5 -8 m5 8 l5 -8" fill="none" stroke="#7d8590" stroke-width="1.5"/>
{drawn}</svg>
"""


def row(top: int, name: str, what: str) -> str:
    """One room of the picture."""
    return f"""<rect x="30" y="{top}" width="722" height="{ROW - 5}" rx="4" fill="#eef3f8" stroke="#9fb3c8"/>
<text x="42" y="{top + 17}" fill="#10263b" font-weight="bold">{escape(name)}</text>
<text x="150" y="{top + 17}" fill="#243b53">{escape(what)}</text>
"""


PARTS: Final[Mapping[str, Callable[[], str]]] = {
    "measured": measured,
    "methods": methods,
    "presets": presets,
    "options": options,
    "keywords": keywords,
    "limits": limits,
    **{f"help of {command}": usage_of(command) for command in cli.COMMANDS},
}
"""Every generated part by the name that pages call it."""

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
