"""How much the members of an ensemble differ, and what that is worth."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from geojax.ensemble import _arrays

__all__ = ["Ambiguity", "Diversity", "diversity"]


class Ambiguity(NamedTuple):
    """A loss of the ensemble as its members' mean loss less how far they differ.

    Attributes:
        members: The mean loss of the members; NaN without labels.
        ensemble: The loss of the ensemble; NaN without labels.
        ambiguity: `members - ensemble`, computed from the predictions alone; never negative.
    """

    members: float
    ensemble: float
    ambiguity: float


class Diversity(NamedTuple):
    """How much the members of an ensemble differ, averaged over the examples.

    Attributes:
        disagreement: `(n, n)`: the fraction of examples where two members predict other classes.
        kl: `(n, n)`: the mean Kullback-Leibler divergence of member j from member i, in nats.
        mean_disagreement: The mean over pairs of different members; NaN for one member.
        mean_kl: The same for `kl`.
        mutual_information: The entropy of the mean prediction less the mean entropy of the
            members (for two members the Jensen-Shannon divergence), in nats.
        brier: The ambiguity of the squared error, for averaged probabilities.
        nll: The ambiguity of the negative log-likelihood, for averaged logits; NaN where members
            exclude (by a probability of zero) all classes between them.
    """

    disagreement: np.ndarray
    kl: np.ndarray
    mean_disagreement: float
    mean_kl: float
    mutual_information: float
    brier: Ambiguity
    nll: Ambiguity


def diversity(members: Iterable[Any], labels: Any = None) -> Diversity:
    r"""How much the members of an ensemble differ from each other, and what that is worth.

    With the mean :math:`\bar p` of the probabilities, :math:`\tfrac1n \sum_i \|p_i - y\|^2 -
    \|\bar p - y\|^2 = \tfrac1n \sum_i \|p_i - \bar p\|^2`; and with the normalised geometric mean
    :math:`g`, the mean of the members' negative log-likelihoods less that of :math:`g` is
    :math:`\tfrac1n \sum_i \mathrm{KL}(g \| p_i)`.

    Args:
        members: n arrays `(num_examples, ..., num_classes)`, logits or log-probabilities, as
            `log_probabilities` gives them.
        labels: `(num_examples, ...)`, integers; only for the losses.

    Returns:
        A `Diversity`. Memory: all members' outputs, three times.

    Raises:
        ValueError: For no members, members of different shapes, NaN outputs or wrong labels.

    Reference:
        Krogh and Vedelsby, Neural Network Ensembles, Cross Validation, and Active Learning, 1995,
        equation 6. Heskes, Bias/Variance Decompositions for Likelihood-Based Estimators, 1998,
        section 4.
    """
    given = [_arrays.log_softmax(member, f"member {i}") for i, member in enumerate(members)]
    shapes = {found.shape for found in given}
    if len(shapes) != 1:
        raise ValueError(f"diversity: expected members of one shape, got {sorted(shapes)}.")
    if labels is not None:
        labels = _arrays.check_labels(labels, given[0].shape[:-1], given[0].shape[-1])
    logs = np.stack(given).reshape(len(given), -1, given[0].shape[-1])
    probs = np.exp(logs)
    n, count, num_classes = logs.shape
    choice = logs.argmax(-1)
    disagreement = np.array([[np.mean(a != b) for b in choice] for a in choice])
    kl = np.array([[_kl(a, b) for b in logs] for a in logs])
    mean = probs.mean(0)
    geometric = _arrays.normalized(logs.mean(0))
    apart = ~np.eye(n, dtype=bool)

    def pairs(matrix):
        return float(matrix[apart].mean()) if n > 1 else float("nan")

    brier = nll = (float("nan"), float("nan"))
    if labels is not None:
        truth = np.arange(num_classes) == labels[:, None]
        rows = np.arange(count)
        brier = (
            float(np.square(probs - truth).sum(-1).mean()),
            float(np.square(mean - truth).sum(-1).mean()),
        )
        nll = (float(-logs[:, rows, labels].mean()), float(-geometric[rows, labels].mean()))
    with np.errstate(divide="ignore"):
        information = np.mean([_kl(member, np.log(mean)) for member in logs])
    return Diversity(
        disagreement=disagreement,
        kl=kl,
        mean_disagreement=pairs(disagreement),
        mean_kl=pairs(kl),
        mutual_information=float(information),
        brier=Ambiguity(*brier, float(np.square(probs - mean).sum(-1).mean())),
        nll=Ambiguity(*nll, float(np.mean([_kl(geometric, member) for member in logs]))),
    )


def _kl(a: np.ndarray, b: np.ndarray) -> float:
    """The mean divergence of log-probabilities b from a; classes that a excludes count nothing."""
    with np.errstate(invalid="ignore"):
        terms = np.where(np.isneginf(a), 0.0, np.exp(a) * (a - b))
    # Rounding can leave a sum of nearly equal terms below zero.
    return float(np.maximum(terms.sum(-1), 0.0).mean())
