"""What networks say of their inputs: classes over a plane, and numbers along a line."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from geojax.plot._style import COLORS, DASHES, STYLE, matplotlib_and_figure

__all__ = ["bands", "boundaries"]

# Dots along each side of a panel of regions: about one for each of the picture's own.
_FINE = 400
# Log-probabilities are bounded below for the sake of those of zero.
_FLOOR = 1e-6
_MARKERS = "o^sDvP"


def boundaries(
    panels: Mapping[str, Any],
    coordinates: Any,
    *,
    inputs: Any = None,
    labels: Any = None,
    names: Sequence[str] | None = None,
    columns: int = 3,
    size: float = 2.1,
) -> Any:
    """What networks say of a plane of inputs: probabilities and decision boundaries.

    With the probability of one class of two, colours are probabilities, and the black line is where
    both classes are equally likely. With the probabilities of all classes, colours are regions of
    the likeliest class, paler where it is less likely, and black lines are their borders; of more
    than six classes the shades tell them apart, and paleness says nothing. The likeliest class
    between the inputs is that of log-probabilities (at least 1e-6) which are linear there.

    Args:
        panels: From a title to `(num_y, num_x)` probabilities of class 1 of two, or to
            `(num_y, num_x, num_classes)` probabilities, such as those of samples from a simplex and
            of their ensemble.
        coordinates: `(num_y, num_x, 2)`: the inputs, entry [i, j] is (x_j, y_i).
        inputs: `(n, 2)`: examples to mark.
        labels: `(n,)`: their classes, integers from 0.
        names: Of the classes; by default their numbers.
        columns: Panels side by side.
        size: Width and height of a panel in inches.

    Returns:
        A `matplotlib.figure.Figure`; write it with `png` or its own `savefig`.

    Raises:
        ImportError: Without matplotlib.
        ValueError: For shapes that do not fit together, values that are no probabilities, labels
            that are no classes, or no panel.
    """
    matplotlib, Figure = matplotlib_and_figure()  # noqa: N806
    places = np.asarray(coordinates, np.float64)
    if places.ndim != 3 or places.shape[-1] != 2 or not panels:
        raise ValueError(
            f"boundaries: coordinates have shape {places.shape} and there are {len(panels)} "
            "panels; expected (num_y, num_x, 2) and at least one."
        )
    given = {title: np.asarray(found, np.float64) for title, found in panels.items()}
    num = _num_classes(given, places)
    binary = next(iter(given.values())).ndim == 2
    points, classes = _examples(inputs, labels, num)
    if names is not None and len(names) != num:
        raise ValueError(f"boundaries: got {len(names)} names; expected one for each of {num}.")
    called = [f"class {c}" for c in range(num)] if names is None else list(names)
    columns = min(columns, len(given))
    rows = -(-len(given) // columns)
    colors = ["#CDBFE3", "#FFD58A"] if binary else _class_colors(num)
    style = {**STYLE, "axes.grid": False, "figure.constrained_layout.use": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(size * columns + 0.8, (size + 0.25) * rows), layout="compressed")
        all_axes = np.ravel(figure.subplots(rows, columns, squeeze=False))
        x, y = places[..., 0], places[..., 1]
        for axes, (title, found) in zip(all_axes, given.items(), strict=False):
            filled = _shades(axes, x, y, found) if binary else _regions(axes, x, y, found, colors)
            for c in range(num):
                chosen = points[classes == c]
                if len(chosen):
                    axes.plot(
                        *chosen.T, _MARKERS[c % len(_MARKERS)], color=colors[c], mec="black",
                        mew=0.5, ms=3.6,
                    )  # fmt: skip
            axes.set_aspect("equal")
            axes.set_xlim(x.min(), x.max())
            axes.set_ylim(y.min(), y.max())
            axes.set_title(title, loc="left", fontsize=9)
            axes.set_xticks([])
            axes.set_yticks([])
            if not binary:
                axes.spines[:].set_visible(False)
        for axes in all_axes[len(given) :]:
            axes.set_axis_off()
        if binary:
            bar = figure.colorbar(
                filled, ax=all_axes.tolist(), ticks=[0, 0.5, 1], aspect=14 * rows, pad=0.02  # pyright: ignore[reportPossiblyUnboundVariable]
            )  # fmt: skip
            bar.outline.set_visible(False)
            bar.set_label(f"probability of {called[1]}")
        else:
            _legend(figure, colors, called, len(points) > 0)
        return figure


def _num_classes(panels: Mapping[str, np.ndarray], places: np.ndarray) -> int:
    """How many classes the panels are of; raises where they are no probabilities of the same."""
    shape = next(iter(panels.values())).shape
    for title, found in panels.items():
        right = found.shape[:2] == places.shape[:2] and found.shape == shape
        right = right and (found.ndim == 2 or (found.ndim == 3 and found.shape[2] > 1))
        if not right or not ((found >= 0) & (found <= 1)).all():
            raise ValueError(
                f"boundaries: panel {title!r} has shape {found.shape}; expected probabilities "
                f"{places.shape[:2]} or {(*places.shape[:2], 'num_classes')}, the same for all "
                "panels, from 0 to 1."
            )
        if found.ndim == 3 and not np.allclose(found.sum(-1), 1, atol=1e-2):
            raise ValueError(
                f"boundaries: the classes of panel {title!r} sum to {found.sum(-1).min():.3g} and "
                f"up to {found.sum(-1).max():.3g}; expected probabilities, which sum to 1."
            )
    if len(shape) == 2:
        return 2
    x, y = places[..., 0], places[..., 1]
    ascending = (np.diff(x[0]) > 0).all() and (np.diff(y[:, 0]) > 0).all()
    if min(x.shape) < 2 or not ascending or (x != x[:1]).any() or (y != y[:, :1]).any():
        raise ValueError(
            "boundaries: expected coordinates whose entry [i, j] is (x_j, y_i), both ascending, as "
            "np.stack(np.meshgrid(x, y), axis=-1) makes them."
        )
    return shape[2]


def _examples(inputs: Any, labels: Any, num: int) -> tuple[np.ndarray, np.ndarray]:
    if (inputs is None) != (labels is None) or np.shape(labels) != np.shape(inputs)[:1]:
        raise ValueError("boundaries: expected inputs (n, 2) and labels (n,), or neither.")
    if inputs is None:
        return np.zeros((0, 2)), np.zeros(0, int)
    points, classes = np.asarray(inputs, np.float64), np.asarray(labels)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"boundaries: inputs have shape {points.shape}; expected (n, 2).")
    if not np.isin(classes, np.arange(num)).all():
        raise ValueError(
            f"boundaries: labels are {sorted(set(classes.tolist()))}; expected 0 to {num - 1}."
        )
    return points, classes


def _class_colors(num: int) -> list[str]:
    """A colour for each class: the palette, then darker and lighter shades of it."""
    from matplotlib.colors import to_hex, to_rgb

    laps = -(-num // 6)
    mixes = (0.0, -0.5, 0.5) if laps <= 3 else np.linspace(-0.7, 0.7, laps)
    found = []
    for c in range(num):
        mix, color = mixes[c // 6], np.array(to_rgb(COLORS[c % 6]))
        found.append(to_hex(tuple(color * (1 - abs(mix)) + max(mix, 0.0))))
    return found


def _shades(axes: Any, x: np.ndarray, y: np.ndarray, found: np.ndarray) -> Any:
    """The probability of one class of two."""
    filled = axes.contourf(x, y, found, levels=np.linspace(0, 1, 11), cmap="PuOr_r")
    if found.min() < 0.5 < found.max():
        axes.contour(x, y, found, levels=[0.5], colors="black", linewidths=1.1)
    return filled


def _regions(
    axes: Any, x: np.ndarray, y: np.ndarray, found: np.ndarray, colors: Sequence[str]
) -> None:
    """The likeliest class at each place, and the borders between them."""
    from matplotlib.colors import to_rgb

    num = found.shape[2]
    fine_x = np.linspace(x[0, 0], x[0, -1], _FINE)
    fine_y = np.linspace(y[0, 0], y[-1, 0], _FINE)

    def between(values):
        return _interpolated(_interpolated(values, y[:, 0], fine_y, 0), x[0], fine_x, 1)

    # Networks are nearly linear in these, and sure on both sides of a border.
    logs = between(np.log(np.maximum(found, _FLOOR)))
    winner = logs.argmax(-1)
    strength = np.full((_FINE, _FINE, 1), 0.75)
    if num <= 6:
        # From even odds to certainty.
        most = np.take_along_axis(between(found), winner[..., None], -1)
        strength = 0.12 + 0.5 * np.clip((most - 1 / num) / (1 - 1 / num), 0, 1)
    picture = 1 - strength * (1 - np.array([to_rgb(color) for color in colors])[winner])
    half = (fine_x[1] - fine_x[0]) / 2, (fine_y[1] - fine_y[0]) / 2
    axes.imshow(
        np.clip(picture, 0, 1), origin="lower", interpolation="nearest", aspect="auto",
        extent=(x[0, 0] - half[0], x[0, -1] + half[0], y[0, 0] - half[1], y[-1, 0] + half[1]),
    )  # fmt: skip
    # A border has a class on either side: the last one's are drawn with the others'.
    for c in np.unique(winner)[:-1]:
        lead = logs[..., c] - np.delete(logs, c, axis=-1).max(-1)
        axes.contour(fine_x, fine_y, lead, levels=[0.0], colors="black", linewidths=0.9)


def _interpolated(values: np.ndarray, at: np.ndarray, fine: np.ndarray, axis: int) -> np.ndarray:
    """Linear between the entries of one axis."""
    right = np.clip(np.searchsorted(at, fine), 1, len(at) - 1)
    share = (fine - at[right - 1]) / (at[right] - at[right - 1])
    share = share.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
    low, high = (np.take(values, i, axis=axis) for i in (right - 1, right))
    return low * (1 - share) + high * share


def bands(
    panels: Mapping[str, Any],
    x: Any,
    *,
    inputs: Any = None,
    targets: Any = None,
    truth: Any = None,
    num_members: int = 8,
    x_label: str = "input",
    y_label: str = "output",
    columns: int = 3,
    size: tuple[float, float] = (2.6, 2.2),
) -> Any:
    """What sampled networks of one input and one output say: their mean and its band of 2 sigma.

    Sigma is the standard deviation of the members' outputs, of the networks alone: the noise of the
    data is not in it.

    Args:
        panels: From a title to `(members, n)` outputs at `x`, of two members or more.
        x: `(n,)`: the inputs, ascending.
        inputs: `(m,)` or `(m, 1)`: examples to mark.
        targets: Their targets, of the same shape.
        truth: `(n,)`: the function behind the examples, where it is known.
        num_members: How many members are drawn by themselves as thin lines, evenly picked.
        x_label: Below the panels.
        y_label: Beside them.
        columns: Panels side by side, all on one scale.
        size: Width and height of a panel in inches.

    Returns:
        A `matplotlib.figure.Figure`; write it with `png` or its own `savefig`.

    Raises:
        ImportError: Without matplotlib.
        ValueError: For shapes that do not fit together, values that are not finite, or no panel.
    """
    matplotlib, Figure = matplotlib_and_figure()  # noqa: N806
    at = np.asarray(x, np.float64)
    if at.ndim != 1 or len(at) < 2 or not (np.diff(at) > 0).all() or not panels:
        raise ValueError(
            f"bands: x has shape {at.shape} and there are {len(panels)} panels; expected at least "
            "two ascending inputs (n,) and one panel."
        )
    given = {title: np.asarray(found, np.float64) for title, found in panels.items()}
    for title, found in given.items():
        if found.ndim != 2 or len(found) < 2 or found.shape[1] != len(at):
            raise ValueError(
                f"bands: panel {title!r} has shape {found.shape}; expected (members, "
                f"{len(at)}), of two members or more."
            )
        if not np.isfinite(found).all():
            raise ValueError(f"bands: panel {title!r} has values that are not finite.")
    if truth is not None and np.shape(truth) != at.shape:
        raise ValueError(f"bands: truth has shape {np.shape(truth)}; expected {at.shape}.")
    if (inputs is None) != (targets is None) or np.size(inputs) != np.size(targets):
        raise ValueError("bands: expected inputs and targets (m,), or neither.")
    columns = min(columns, len(given))
    rows = -(-len(given) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(size[0] * columns + 0.3, size[1] * rows + 0.5))
        all_axes = np.ravel(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True))
        for axes, (title, found) in zip(all_axes, given.items(), strict=False):
            mean, sigma = found.mean(0), found.std(0, ddof=1)
            look = {"color": COLORS[0], "lw": 0}
            axes.fill_between(
                at, mean - 2 * sigma, mean + 2 * sigma, alpha=0.25, label="± 2 σ", **look
            )
            shown = np.linspace(0, len(found) - 1, min(num_members, len(found))).round().astype(int)
            for i, member in enumerate(found[shown]):
                label = None if i else "single networks"
                axes.plot(at, member, color=COLORS[0], lw=0.5, alpha=0.7, label=label)
            axes.plot(at, mean, color=COLORS[0], label="mean")
            if truth is not None:
                axes.plot(at, truth, color="#444444", linestyle=DASHES[1], lw=1.1, label="truth")
            if inputs is not None:
                axes.plot(
                    np.ravel(inputs), np.ravel(targets), "o", color=COLORS[1], ms=2.2, mew=0,
                    alpha=0.7, label="data",
                )  # fmt: skip
            axes.set_xlim(at[0], at[-1])
            axes.set_title(title, loc="left", fontsize=9)
        for axes in all_axes[len(given) :]:
            axes.set_axis_off()
        handles, labels = all_axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside upper left", ncols={1: 2, 2: 3}.get(columns, 5),
            markerscale=2, handlelength=1.5,
        )  # fmt: skip
        figure.supxlabel(x_label, fontsize=9)
        figure.supylabel(y_label, fontsize=9)
        return figure


def _legend(figure: Any, colors: Sequence[str], called: Sequence[str], marked: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [], [], ls="", color=color, label=name, mec="black", mew=0.5, ms=6,
            marker=_MARKERS[c % len(_MARKERS)] if marked else "s",
        )
        for c, (color, name) in enumerate(zip(colors, called, strict=True))
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside right center", handletextpad=0.2)
