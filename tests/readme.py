"""Makes the README's tables from the registry, the parser and the measurements: `python -m tests.readme [--check]`."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from benchmarks import report, results
from streammerge.arguments import add_merge_arguments
from streammerge.methods import METHODS
from streammerge.methods.contract import Parameter

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "article-fp16.json"


def main() -> int:
    """Write the README with current tables, or with --check fail if they aren't."""
    found = README.read_text(encoding="utf-8")
    current = with_tables(found)
    if current == found:
        return 0
    if "--check" in sys.argv[1:]:
        sys.stderr.write("README.md: its tables are not current; run `make docs`\n")
        return 1
    README.write_text(current, encoding="utf-8")
    return 0


def with_tables(text: str) -> str:
    """The README's text with every table made anew."""
    for name, table in (("measured", measured()), ("methods", methods()), ("options", options())):
        block = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        if not block.search(text):
            raise ValueError(f"README.md has no place for the table {name!r}")
        text = block.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)  # type: ignore[misc]
    return text


def methods() -> str:
    """Every method with its formula, kind, base and parameters."""
    rows = ["| method | formula | kind | base | parameters (default) |", "|---|---|---|---|---|"]
    for name in sorted(METHODS):
        method = METHODS[name]
        parameters = ", ".join(
            f"`{p.name}` ({default(p)}{choices(p)}{', per model' * p.per_model})" for p in method.parameters
        )
        rows.append(f"| `{name}` | {method.formula} | {method.kind} | {method.base} | {parameters} |")
    return "\n".join(rows)


def default(parameter: Parameter) -> str:
    """What holds unless something is given."""
    return "required" if parameter.required else json.dumps(parameter.default)


def choices(parameter: Parameter) -> str:
    """What else than the default may be given, where that is one of some words, or a number in a range."""
    if parameter.type == "choice":
        return f"; {', '.join(word for word in parameter.choices if word != parameter.default)}"
    return f"; {parameter.range}" if parameter.range else ""


def options() -> str:
    """Every option of a merge with its help."""
    parser = argparse.ArgumentParser(add_help=False)
    add_merge_arguments(parser)
    rows = ["| option | meaning |", "|---|---|"]
    for action in parser._actions:
        if action.option_strings:
            value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else "")
            shown = f"{', '.join(action.option_strings)} {value}".strip().replace("|", "\\|")
            rows.append(f"| `{shown}` | {action.help} |")
    return "\n".join(rows)


def measured() -> str:
    """The article's job against copying the same bytes and against other tools."""
    return report.readme_table(results.load(RESULTS))


if __name__ == "__main__":
    sys.exit(main())
