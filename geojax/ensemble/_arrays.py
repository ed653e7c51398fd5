"""Outputs as log-probabilities in float64 on the host, checked, and means over examples."""

from typing import Any, NamedTuple

import numpy as np


class Uncertain(NamedTuple):
    """A mean over the examples and its standard error (NaN where there is none)."""

    value: float
    standard_error: float


def mean(values: np.ndarray) -> Uncertain:
    value = float(values.mean())
    if len(values) < 2 or not np.isfinite(value):
        return Uncertain(value, float("nan"))
    return Uncertain(value, float(values.std(ddof=1) / np.sqrt(len(values))))


def normalized(log_probs: np.ndarray) -> np.ndarray:
    """Rows of log-probabilities that sum to 1; NaN where a row excludes every class."""
    with np.errstate(invalid="ignore"):
        shifted = log_probs - log_probs.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def check_finite(log_probs: np.ndarray, who: str) -> None:
    bad = np.isnan(log_probs).any(-1)
    if bad.any():
        raise ValueError(
            f"ensemble: {who} gives NaN or infinite outputs for {int(bad.sum())} of {bad.size} "
            f"examples, the first at {int(np.argmax(bad))}; leave it out, or look at its weights."
        )


def log_softmax(outputs: Any, who: str) -> np.ndarray:
    outputs = np.asarray(outputs, np.float64)
    found = normalized(outputs)
    check_finite(found, who)
    return found


def both(given: Any) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities and probabilities from either."""
    given = np.asarray(given, np.float64)
    if given.ndim < 2 or not given.size:
        raise ValueError(f"probs have shape {given.shape}; expected (num_examples, num_classes).")
    tolerance = 1e-3
    with np.errstate(divide="ignore", over="ignore"):
        if (given >= 0).all() and (np.abs(given.sum(-1) - 1) <= tolerance).all():
            return np.log(given), given
        probs = np.exp(given)
    if (given <= tolerance).all() and (np.abs(probs.sum(-1) - 1) <= tolerance).all():
        return given, probs
    raise ValueError(
        "probs: expected rows of probabilities that sum to 1, or their logarithms; got rows that "
        "are neither. Normalise logits with `jax.nn.log_softmax`."
    )


def check_labels(labels: Any, shape: tuple[int, ...], num_classes: int) -> np.ndarray:
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != shape:
        raise ValueError(
            f"labels are {labels.dtype} of shape {labels.shape}; expected integer classes of shape "
            f"{shape}, one for each example."
        )
    labels = labels.reshape(-1).astype(np.int64)
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels run from {labels.min()} to {labels.max()}; expected classes 0 to "
            f"{num_classes - 1}."
        )
    return labels
