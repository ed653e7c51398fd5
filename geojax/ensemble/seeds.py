"""Several seeds in one table: means with intervals, and paired differences at known budgets."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Interval", "SeedComparison", "compare_seeds", "interval"]


class Interval(NamedTuple):
    """A mean over seeds with half the width of its confidence interval.

    Attributes:
        mean: Over the seeds.
        half_width: Of Student's t-interval; NaN for one seed.
        num: How many seeds there are.
        level: The confidence.
    """

    mean: float
    half_width: float
    num: int
    level: float

    def __format__(self, spec: str) -> str:
        spec = spec or ".4g"
        return f"{self.mean:{spec}} ± {self.half_width:{spec}}"

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside: a difference that these seeds tell from none."""
        return bool(abs(self.mean) > self.half_width)


def interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> Interval:
    """The mean of one number per seed, with Student's t-interval.

    Args:
        values: One for each seed.
        level: Between 0 and 1.

    Raises:
        ValueError: If there is none, or one is not finite.

    Example:
        >>> f"{interval([1.0, 2.0, 3.0]):.2f}"
        '2.00 ± 2.48'
    """
    from scipy import stats

    values = np.asarray(values, np.float64).reshape(-1)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"values: expected finite numbers, one for each seed; got {values}.")
    if not 0 < level < 1:
        raise ValueError(f"level is {level!r}; expected between 0 and 1.")
    if len(values) == 1:
        return Interval(float(values[0]), float("nan"), 1, level)
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * error)
    return Interval(float(values.mean()), half, len(values), level)


class SeedComparison(NamedTuple):
    """Methods over the same seeds.

    Attributes:
        means: For each method and metric an `Interval`.
        differences: The same of the method less the baseline, seed by seed.
        lower: On how many seeds the method's metric was below the baseline's.
        budgets: What each method cost, such as gradient evaluations; empty where not given.
        baseline: The method compared with.
    """

    means: dict[str, dict[str, Interval]]
    differences: dict[str, dict[str, Interval]]
    lower: dict[str, dict[str, int]]
    budgets: dict[str, float]
    baseline: str

    def table(self, digits: int = 4) -> list[dict[str, Any]]:
        """One row for each method, for `geojax.report`."""
        rows = []
        for method, means in self.means.items():
            row: dict[str, Any] = {"method": method}
            if self.budgets:
                row["budget"] = f"{self.budgets[method]:g}"
            row |= {name: f"{x:.{digits}f}" for name, x in means.items()}
            for name, x in self.differences[method].items():
                same = method == self.baseline
                row[f"{name} - {self.baseline}'s"] = "" if same else f"{x:.{digits}f}"
                row[f"lower {name}"] = "" if same else f"{self.lower[method][name]} of {x.num}"
            rows.append(row)
        return rows


def compare_seeds(
    scores: Mapping[str, Mapping[str, Sequence[float]]],
    baseline: str,
    *,
    budgets: Mapping[str, float] | None = None,
    level: float = 0.95,
    tolerance: float = 0.05,
) -> SeedComparison:
    """Methods over several seeds, each with an interval, and paired with a baseline.

    Pairing by seed takes out what all methods share, the data and the start, so that a difference
    is often far better known than either mean.

    Args:
        scores: From the method to its metrics, each with one number per seed, in one order.
        baseline: The method that differences are taken from.
        budgets: What each method cost, such as gradient evaluations. Methods that cost more than
            the baseline by over `tolerance` are refused: their comparison would not be fair.
        level: Of the intervals.
        tolerance: See `budgets`; infinity to allow anything.

    Raises:
        ValueError: If methods differ in metrics, seeds or budget, or there is no such baseline.

    Example:
        >>> found = compare_seeds({"one": {"nll": [0.3, 0.4]}, "two": {"nll": [0.2, 0.31]}}, "one")
        >>> f"{found.differences['two']['nll']:.3f}", found.lower["two"]["nll"]
        ('-0.095 ± 0.064', 2)
    """
    if baseline not in scores:
        raise ValueError(f"baseline is {baseline!r}; expected one of {list(scores)}.")
    first = {name: len(values) for name, values in scores[baseline].items()}
    for method, metrics in scores.items():
        sizes = {name: len(values) for name, values in metrics.items()}
        if sizes != first:
            raise ValueError(
                f"{method!r} has {sizes} (seeds of each metric) and {baseline!r} {first}; expected "
                "the same metrics over the same seeds."
            )
    costs = {} if budgets is None else {method: float(budgets[method]) for method in scores}
    for method, cost in costs.items():
        if cost > (1 + tolerance) * costs[baseline]:
            raise ValueError(
                f"{method!r} cost {cost:g} and {baseline!r} {costs[baseline]:g}; give both one "
                "budget, or say tolerance=math.inf."
            )
    values = {
        method: {name: np.asarray(x, np.float64) for name, x in metrics.items()}
        for method, metrics in scores.items()
    }
    away = {
        method: {name: x - values[baseline][name] for name, x in metrics.items()}
        for method, metrics in values.items()
    }
    return SeedComparison(
        {m: {name: interval(x, level) for name, x in xs.items()} for m, xs in values.items()},
        {m: {name: interval(x, level) for name, x in xs.items()} for m, xs in away.items()},
        {m: {name: int((x < 0).sum()) for name, x in xs.items()} for m, xs in away.items()},
        costs,
        baseline,
    )
