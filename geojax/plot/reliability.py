"""Reliability diagrams."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from geojax.plot._style import COLORS, DASHES, STYLE, matplotlib_and_figure

__all__ = ["reliability"]


def reliability(
    calibration: Any,
    *,
    title: str | None = None,
    size: tuple[float, float] = (3.4, 3.8),
) -> Any:
    """Reliability diagrams: accuracy against confidence, and how many examples are in each bin.

    Bars are Wilson's 95 % intervals of the accuracy, wide where a bin holds few examples. The bins
    of 'classwise' are pooled over the classes.

    Args:
        calibration: An `ensemble.Calibration`, or a dict from label to such.
        title: Above the figure.
        size: Width and height in inches.

    Returns:
        A `matplotlib.figure.Figure`; write it with `png` or its own `savefig`.

    Raises:
        ImportError: Without matplotlib.
    """
    matplotlib, Figure = matplotlib_and_figure()  # noqa: N806
    from matplotlib.ticker import PercentFormatter

    given = calibration if isinstance(calibration, Mapping) else {"": calibration}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        above.plot([0, 1], [0, 1], color="#888888", lw=1.0, zorder=1)
        low = 1.0
        for j, (label, found) in enumerate(given.items()):
            color = COLORS[j % len(COLORS)]
            counts, confidence, accuracy = _pooled(found.bins)
            known = counts > 0
            ece = f"ECE {100 * found.ece.value:.1f} ± {100 * found.ece.standard_error:.1f} %"
            above.errorbar(
                confidence[known], accuracy[known], _wilson(accuracy[known], counts[known]),
                color=color, linestyle=DASHES[j % len(DASHES)], marker="o", ms=3.5,
                elinewidth=1.0, label=f"{label}: {ece}" if label else ece, zorder=3 + j,
            )  # fmt: skip
            below.stairs(
                counts / counts.sum(), found.bins.edges, color=color, lw=1.3, fill=len(given) == 1,
                linestyle=DASHES[j % len(DASHES)],
            )  # fmt: skip
            low = min(low, found.bins.edges[:-1][known].min())
        above.set_xlim(low - 0.015 * (1 - low), 1 + 0.015 * (1 - low))
        above.set_ylim(-0.02, 1.02)
        above.set_ylabel("accuracy")
        # Above the diagram: within it there is no corner that every curve avoids.
        above.legend(loc="lower left", bbox_to_anchor=(0, 1), borderpad=0, handlelength=2.2)
        below.set_ylabel("examples")
        below.set_xlabel("confidence")
        below.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, symbol=" %", decimals=0))
        if title:
            figure.suptitle(title, x=0.02, ha="left", fontsize=10)
        figure.align_ylabels([above, below])
        return figure


def _pooled(bins: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts, confidence and accuracy of each bin, over all classes."""
    if bins.counts.ndim == 1:
        return bins.counts, bins.confidence, bins.accuracy
    counts = bins.counts.sum(0)
    with np.errstate(invalid="ignore"):
        confidence, accuracy = (
            np.nansum(bins.counts * part, axis=0) / counts
            for part in (bins.confidence, bins.accuracy)
        )
    return counts, confidence, accuracy


def _wilson(share: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """How far the 95 % interval of a share reaches below and above it, `(2, n)`."""
    z = 1.96**2 / counts
    center = (share + z / 2) / (1 + z)
    half = np.sqrt(z * share * (1 - share) + z * z / 4) / (1 + z)
    return np.maximum(np.stack([share - center + half, center + half - share]), 0)
