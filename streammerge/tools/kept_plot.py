"""How much of each matrix an adapter of some rank holds, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge.errors import count
from streammerge.storage.side_files import written_whole
from streammerge.tools.plotting import kind_of_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_kept(factored: Mapping[str, Any], path: Path) -> None:
    """Draw what a report says of factors: the energy and the rank of every module, in their order.

    `factored` is the report's entry of that name. The kind of picture is what the file's ending says.
    """
    kind = kind_of_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    known = [each for each in factored.get("modules", ()) if each["energy"] is not None]
    axes = figure.add_subplot()
    error = factored.get("error")
    told = "" if error is None else f", relative error {error:.3g}"
    axes.set_title(f"{count(known, 'module')}{told}", fontsize=10, parse_math=False)
    _draw(known, axes)
    with written_whole(path) as target:
        figure.savefig(target, format=kind)


def _draw(known: Sequence[Mapping[str, Any]], axes: Axes) -> None:
    places = range(len(known))
    axes.bar(places, [each["energy"] for each in known], 1.0, color="#3465a4", linewidth=0)
    axes.set_ylim(0, 1)
    axes.set_ylabel("energy kept: share of the squares of the singular values")
    axes.set_xlabel("modules, in the file's order")
    axes.spines[["top", "right"]].set_visible(False)
    ranks = axes.twinx()
    ranks.step(places, [each["rank"] for each in known], where="mid", color="#ce5c00", linewidth=0.8)
    ranks.set_ylim(0)
    ranks.set_ylabel("rank", color="#ce5c00")
    ranks.locator_params(axis="y", integer=True)
    ranks.spines[["top"]].set_visible(False)
