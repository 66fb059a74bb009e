"""Makes the README's tables from the registry, the parser and the measurements: `python -m tests.readme [--check]`."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from streammerge.arguments import add_merge_arguments
from streammerge.methods import METHODS
from streammerge.methods.contract import Parameter

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "article.json"


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
    """The article's job against copying the same bytes and the usual script."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    median, machine = found["median"], found["machine"]
    baseline = found["import_torch_rss"]
    above = (median["peak_rss"] - baseline) / 2**20
    peak = f"{median['peak_rss'] / 1e6:.0f} MB, {above:.0f} MiB above `import torch` ({baseline / 1e6:.0f} MB)"
    rows = [
        "| three SD 2 checkpoints, float16, 8.0 GB | whole process | merging alone | peak RAM |",
        "|---|---|---|---|",
        f"| streammerge | {median['process']:.1f} s | {median['loop']:.1f} s | {peak} |",
        f"| `load_file`, arithmetic, `save_file` | {median['script']:.1f} s | | {median['script_rss'] / 1e9:.1f} GB |",
        f"| `cat` of the inputs and `cp` of one output | {median['floor']:.1f} s | {median['floor']:.1f} s | |",
    ]
    note = (
        f"Medians of {len(found['runs'])} runs, page cache warm, without the final sync, on {machine['cores']} cores "
        f"of a shared virtual machine; torch {machine['torch']}, safetensors {machine['safetensors']}, Python "
        f"{machine['python']}; {found['date']}. It also runs in a memory cgroup of {found['cgroup']['megabytes']} MB."
    )
    return "\n".join([*rows, "", note])


if __name__ == "__main__":
    sys.exit(main())
