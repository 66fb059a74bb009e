"""The histogram of a comparison as a picture."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from streammerge.comparison import Comparison, Histogram, tally
from streammerge.errors import MergeError, OutputError
from streammerge.inspection import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot(comparison: Comparison, path: str | Path, *, bins: int = 60) -> None:
    """Draw the histogram of the cosines into a file, of the kind that its ending says: .png, .svg or .pdf."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MergeError("a plot needs matplotlib", advice="Run pip install 'streammerge[plot]'.") from error
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(_plot_title(comparison), fontsize=10, parse_math=False)
    _draw(comparison.histogram(bins), axes)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a name may have letters that the font lacks
            figure.savefig(path)
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} can't be written: {error}") from error


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
