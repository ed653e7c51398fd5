"""Temperature scaling: one number that makes predictions as sure as they are right."""

from typing import Any, NamedTuple

import numpy as np

from geojax.ensemble import _arrays

__all__ = ["Temperature", "fit_temperature", "tempered"]


class Temperature(NamedTuple):
    """A temperature fitted to held-out data.

    Attributes:
        value: T; above 1 where the predictions were too sure.
        standard_error: Of T, robust against a wrong model (the sandwich estimate).
        nll_before: The negative log-likelihood on those data at T = 1.
        nll_after: The same at T. Both are of the data that T was fitted to.
        converged: False where there is no minimum within the bounds, and T is a bound: all
            predictions right (T tends to 0), or worse than chance (to infinity).
    """

    value: float
    standard_error: float
    nll_before: float
    nll_after: float
    converged: bool


def fit_temperature(
    outputs: Any, labels: Any, *, bounds: tuple[float, float] = (1e-2, 1e2)
) -> Temperature:
    r"""The temperature T that makes softmax(outputs / T) most likely.

    The negative log-likelihood is convex in 1/T; Newton's method on it, kept within a bracket of
    the minimum. Give it data held out from both training and test.

    Args:
        outputs: `(num_examples, ..., num_classes)`: logits or log-probabilities.
        labels: `(num_examples, ...)`, integers.
        bounds: The smallest and the largest temperature.

    Returns:
        A `Temperature`; `tempered(outputs, result.value)` applies it.

    Raises:
        ValueError: If outputs are NaN, or -inf at a label; for labels that do not fit.

    Example:
        >>> outputs = np.log([[0.9, 0.1]] * 4)  # as sure as 9 to 1, and right 3 times in 4
        >>> round(fit_temperature(outputs, [0, 0, 0, 1]).value, 6)
        2.0

    Reference:
        Guo, Pleiss, Sun and Weinberger, On Calibration of Modern Neural Networks, 2017, section
        4.2.
    """
    low, high = bounds
    if not 0 < low < high < np.inf:
        raise ValueError(f"bounds are {bounds}; expected 0 < low < high.")
    logits = _arrays.log_softmax(outputs, "the network")
    labels = _arrays.check_labels(labels, logits.shape[:-1], logits.shape[-1])
    logits = logits.reshape(-1, logits.shape[-1])
    own = logits[np.arange(len(logits)), labels]
    if np.isinf(own).any():
        raise ValueError(
            f"fit_temperature: {int(np.isinf(own).sum())} labels have probability zero, which no "
            "temperature mends; average probabilities rather than votes."
        )
    finite = np.where(np.isfinite(logits), logits, 0.0)

    def at(beta):
        """The loss, the slope of each example, and the curvature at the inverse temperature."""
        scaled = _arrays.normalized(beta * logits)
        p = np.exp(scaled)
        mean = (p * finite).sum(-1)
        curvature = float(((p * np.square(finite)).sum(-1) - np.square(mean)).mean())
        return -float(scaled[np.arange(len(p)), labels].mean()), mean - own, curvature

    before = at(1.0)[0]
    left, right = 1 / high, 1 / low
    ends = [float(at(end)[1].mean()) for end in (left, right)]
    if not ends[0] < 0 < ends[1]:
        beta = left if ends[0] >= 0 else right
        return Temperature(1 / beta, float("nan"), before, at(beta)[0], False)
    beta = float(np.clip(1.0, left, right))
    for _ in range(100):
        _, slopes, curvature = at(beta)
        slope = float(slopes.mean())
        left, right = (beta, right) if slope < 0 else (left, beta)
        step = slope / curvature if curvature > 0 else np.inf
        new = beta - step if left < beta - step < right else np.sqrt(left * right)
        done = abs(new - beta) <= 1e-12 * beta
        beta = new
        if done:
            break
    after, slopes, curvature = at(beta)
    # d T = - d beta / beta^2.
    error = slopes.std() / np.sqrt(len(slopes)) / curvature / beta**2
    return Temperature(1 / float(beta), float(error), before, after, bool(done))


def tempered(outputs: Any, temperature: float) -> np.ndarray:
    """Log-probabilities at another temperature: log softmax(outputs / temperature), in float64.

    Raises:
        ValueError: If the temperature is not positive, or outputs are NaN.
    """
    if not (np.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; expected a positive number.")
    return _arrays.log_softmax(np.asarray(outputs, np.float64) / temperature, "the network")
