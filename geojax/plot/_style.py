"""What all figures share: matplotlib, found late, and the looks."""

from typing import Any

__all__ = ["COLORS", "DASHES", "STYLE", "matplotlib_and_figure", "png"]

# Okabe and Ito's palette: told apart by colour-blind readers and in grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), "-.")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
}


def matplotlib_and_figure() -> tuple[Any, Any]:
    """The module and its Figure; raises where it is not installed."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'figures need matplotlib; install it with `pip install "geojax[plot]"`.'
        ) from error
    return matplotlib, Figure


def png(figure: Any) -> bytes:
    """The figure as the bytes of a PNG at 200 dots an inch, with no date in it."""
    import io

    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
