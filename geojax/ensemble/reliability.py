"""How far predicted probabilities can be trusted: reliability bins, proper scores, top-k.

Host arithmetic in float64 on the outputs for a set of examples.
"""

from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from geojax import objectives
from geojax.ensemble import _arrays
from geojax.ensemble._arrays import Uncertain

__all__ = ["Bins", "Calibration", "Scheme", "Uncertain", "calibration", "top_k_accuracy"]

Scheme = Literal["equal_width", "equal_mass", "classwise"]


class Bins(NamedTuple):
    """A reliability diagram. Empty bins have confidence, accuracy and error NaN.

    Attributes:
        edges: `(num_bins + 1,)`: bin j holds edges[j] <= p < edges[j + 1], the last one both ends.
        counts: `(num_bins,)`, or `(num_classes, num_bins)` for 'classwise', as are the others.
        confidence: The mean predicted probability in the bin.
        accuracy: How often it came true.
        standard_error: Of `accuracy - confidence`.
    """

    edges: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    standard_error: np.ndarray


class Calibration(NamedTuple):
    """How far predicted probabilities can be trusted.

    Attributes:
        bins: The reliability diagram.
        ece: The expected calibration error: the mean of |accuracy - confidence| over the bins,
            weighted by their examples; for 'classwise' the mean of that over the classes. Its
            standard error takes the signs of the gaps as given.
        ece_floor: The value of `ece` to expect from perfectly calibrated predictions with these
            confidences, which is not zero for finitely many examples: noise in each bin, taken as
            normal. An `ece` near it shows no miscalibration.
        mce: The largest gap of a bin, with the standard error of that bin.
        nll: The negative log-likelihood in nats.
        brier: The squared error summed over the classes, in [0, 2].
        accuracy: The fraction whose largest probability (the first of equals) is the label's.
        scheme: How it was binned.
        num_examples: How many examples there are.
    """

    bins: Bins
    ece: Uncertain
    ece_floor: float
    mce: Uncertain
    nll: Uncertain
    brier: Uncertain
    accuracy: Uncertain
    scheme: Scheme
    num_examples: int

    def __repr__(self) -> str:
        parts = ", ".join(
            f"{name}={value.value:.4g}±{value.standard_error:.2g}"
            for name in ("ece", "mce", "nll", "brier", "accuracy")
            for value in [getattr(self, name)]
        )
        return f"Calibration({parts}, ece_floor={self.ece_floor:.2g}, {self.num_examples} examples)"

    __str__ = __repr__


def calibration(
    probs: Any,
    labels: Any,
    *,
    num_bins: int = 15,
    scheme: Scheme = "equal_width",
) -> Calibration:
    r"""Reliability bins and proper scores of predicted probabilities.

    :math:`\mathrm{ECE} = \sum_b \tfrac{n_b}{n} |\mathrm{acc}_b - \mathrm{conf}_b|`. Every example
    counts once: bins are half-open on the right, and the last one holds p = 1 as well. (Guo et al.
    close the bins on the right instead, which leaves out p = 0.)

    Args:
        probs: `(num_examples, ..., num_classes)`, probabilities or log-probabilities, normalised;
            which of the two is seen from their signs.
        labels: `(num_examples, ...)`, integers.
        num_bins: How many bins.
        scheme: 'equal_width' over the confidence in the predicted class; 'equal_mass', bins with as
            nearly the same number of examples as equal confidences allow, which stay together (then
            there may be fewer bins); 'classwise', bins of equal width for the probability of each
            class, predicted or not.

    Returns:
        A `Calibration`.

    Raises:
        ValueError: For rows that are neither probabilities nor log-probabilities, such as logits;
            for labels of another shape or out of range; for an unknown scheme.

    Example:
        >>> found = calibration([[0.8, 0.2], [0.6, 0.4]], [0, 1], num_bins=10)
        >>> round(found.ece.value, 6), found.accuracy.value
        (0.4, 0.5)

    Reference:
        Guo, Pleiss, Sun and Weinberger, On Calibration of Modern Neural Networks, 2017, equation 3.
        Nixon et al., Measuring Calibration in Deep Learning, 2019, sections 3 and 4.
    """
    if scheme not in get_args(Scheme):
        raise ValueError(f"scheme is {scheme!r}; expected one of {', '.join(get_args(Scheme))}.")
    if not isinstance(num_bins, (int, np.integer)) or num_bins < 1:
        raise ValueError(f"num_bins is {num_bins!r}; expected a positive integer.")
    log_probs, probs = _arrays.both(probs)
    labels = _arrays.check_labels(labels, probs.shape[:-1], probs.shape[-1])
    num_classes = probs.shape[-1]
    log_probs, probs = log_probs.reshape(-1, num_classes), probs.reshape(-1, num_classes)
    count = len(probs)
    rows = np.arange(count)
    truth = np.arange(num_classes) == labels[:, None]
    predicted = probs.argmax(-1)
    if scheme == "classwise":
        confidence, hits = np.minimum(probs.T, 1.0), truth.T.astype(np.float64)
    else:
        confidence = np.minimum(probs[rows, predicted], 1.0)[None]
        hits = (predicted == labels).astype(np.float64)[None]
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    if scheme == "equal_mass":
        order = np.sort(confidence[0])
        inner = order[np.arange(1, num_bins) * count // num_bins]
        edges = np.unique(np.concatenate([order[:1], inner, order[-1:]]))
        edges = edges if len(edges) > 1 else np.repeat(edges, 2)
    bins, signed, floor = _binned(edges, confidence, hits)
    gaps = np.abs(bins.accuracy - bins.confidence)
    worst = int(np.nanargmax(gaps))
    return Calibration(
        bins=bins if scheme == "classwise" else Bins(edges, *(x[0] for x in bins[1:])),
        ece=_arrays.mean(signed),
        ece_floor=floor,
        mce=Uncertain(float(gaps.flat[worst]), float(bins.standard_error.flat[worst])),
        nll=_arrays.mean(-log_probs[rows, labels]),
        brier=_arrays.mean(np.square(probs - truth).sum(-1)),
        accuracy=_arrays.mean((predicted == labels).astype(np.float64)),
        scheme=scheme,
        num_examples=count,
    )


def _binned(
    edges: np.ndarray, confidence: np.ndarray, hits: np.ndarray
) -> tuple[Bins, np.ndarray, float]:
    """Bins of each row; what each example adds to the mean error; that error under calibration."""
    num_rows, count = confidence.shape
    num_bins = len(edges) - 1
    place = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, num_bins - 1)
    flat = (place + num_bins * np.arange(num_rows)[:, None]).ravel()

    def total(values):
        return np.bincount(flat, values.ravel(), num_rows * num_bins).reshape(num_rows, num_bins)

    counts = total(np.ones_like(confidence))
    gap = total(hits - confidence)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = hits - confidence - (gap / counts).ravel()[flat].reshape(hits.shape)
        variance = total(np.square(spread)) / (counts - 1)
        error = np.sqrt(np.where(counts > 1, variance, np.nan) / counts)
        bins = Bins(
            edges, counts.astype(np.int64), total(confidence) / counts, total(hits) / counts, error
        )
    signed = np.sign(gap).ravel()[flat].reshape(hits.shape) * (hits - confidence)
    # The mean of |x| for a centred normal x is sqrt(2 / pi) of its standard deviation.
    noise = np.sqrt(2 / np.pi * total(confidence * (1 - confidence)))
    return bins, signed.mean(0), float(noise.sum() / count / num_rows)


def top_k_accuracy(outputs: Any, labels: Any, k: int) -> Uncertain:
    """The fraction of examples whose label is among the k largest outputs of their own row.

    Among equal outputs the class of the lower index comes first, as in `argmax`: for k = 1 this is
    the accuracy. A row with a NaN counts as wrong.

    Args:
        outputs: `(num_examples, ..., num_classes)`: logits, probabilities or their logarithms.
        labels: `(num_examples, ...)`, integers.
        k: At least 1 and at most the number of classes.

    Example:
        >>> top_k_accuracy([[0.1, 0.3, 0.6], [0.5, 0.5, 0.0]], [1, 2], 2).value
        0.5
    """
    outputs = np.asarray(outputs)
    labels = _arrays.check_labels(labels, outputs.shape[:-1], outputs.shape[-1])
    outputs = outputs.reshape(-1, outputs.shape[-1])
    return _arrays.mean(objectives._within_top(outputs, labels, k).astype(np.float64))
