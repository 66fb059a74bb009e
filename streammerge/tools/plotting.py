"""The histogram of a comparison as a picture."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from streammerge.errors import MergeError, OutputError
from streammerge.storage.side_files import written_whole
from streammerge.tools.comparison import Comparison, Histogram, tally
from streammerge.tools.inspection import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot(comparison: Comparison, path: str | Path, *, bins: int = 60) -> None:
    """Draw the histogram of the cosines into a file, of the kind that its ending says: .png, .svg or .pdf."""
    kind = kind_of_plot(Path(path))
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(_plot_title(comparison), fontsize=10, parse_math=False)
    _draw(comparison.histogram(bins), axes)
    with written_whole(Path(path)) as target, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a name may have letters that the font lacks
        figure.savefig(target, format=kind)


def kind_of_plot(path: Path) -> str:
    """The kind of picture that a name's ending says, `png` without one; OutputError if there is no such kind."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise MergeError("a plot needs matplotlib", advice="Run pip install 'streammerge[plot]'.") from error
    kind = path.suffix[1:].lower() or "png"
    if kind not in FigureCanvasAgg.filetypes:
        raise OutputError(
            f"{path}: there is no kind of picture {kind!r}", advice=f"Known are {', '.join(FigureCanvasAgg.filetypes)}."
        )
    return kind


def _draw(histogram: Histogram, axes: Axes) -> None:
    if histogram.edges:
        left, step = histogram.edges[0], histogram.step
        axes.bar(histogram.edges[:-1], histogram.counts, step, align="edge", color="#3465a4", edgecolor="white")
        if histogram.below:
            label = f"{histogram.below:,} below {left:.{histogram.decimals}f}"
            axes.bar(left - step, histogram.below, step, align="edge", color="#ce5c00", edgecolor="white", label=label)
            axes.legend(frameon=False)
        axes.ticklabel_format(useOffset=False, style="plain")
        axes.locator_params(axis="x", nbins=6)
        axes.locator_params(axis="y", integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("cosine of the tensor in one model and in the other")
    axes.set_ylabel("number of tensors")


def _plot_title(comparison: Comparison) -> str:
    names = (shortened(Path(path).name, 40) for path in (comparison.path_a, comparison.path_b))
    return f"{' and '.join(names)}\n{tally(comparison)}"
