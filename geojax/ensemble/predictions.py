"""Predictions averaged over points of weight space, read member by member.

One member and the outputs on the data are all that is held, in float64 on the host.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from geojax import batches as batches_
from geojax import objectives, tree
from geojax import progress as progress_
from geojax.ensemble import _arrays
from geojax.ensemble.reliability import calibration

__all__ = ["Mode", "Running", "average", "log_probabilities", "predict", "running"]

PyTree = Any
Mode = Literal["probabilities", "logits", "votes", "geometric"]


class Running(NamedTuple):
    """How an ensemble grows: the metrics of its first 1, 2, ..., n members.

    Attributes:
        ensemble: Dict of `(n,)` arrays, for the ensemble of the first members: 'loss' (the negative
            log-likelihood in nats), 'error', 'brier' and 'ece' (15 bins of equal width).
        members: The same for each member alone.
        log_probs: `(num_examples, ..., num_classes)`: of the whole ensemble.
        labels: `(num_examples, ...)`, in the order of the batches.
    """

    ensemble: dict[str, np.ndarray]
    members: dict[str, np.ndarray]
    log_probs: np.ndarray
    labels: np.ndarray


def log_probabilities(
    model_fn: Callable[..., jax.Array],
    params: PyTree,
    batches: Any,
    *,
    state_fn: Callable[[PyTree], PyTree] | None = None,
    mesh: Mesh | NamedSharding | None = None,
) -> np.ndarray:
    """The log-probabilities of one network for all examples, in the order of the batches.

    Args:
        model_fn: `(params, batch)` to outputs `(n, ..., num_classes)`: logits, or log-probabilities
            up to a constant for each example. With `state_fn`, `(params, state, batch)`.
        params: The network, any pytree.
        batches: One batch or a re-iterable.
        state_fn: From the parameters to the state there; see `surface.line`.
        mesh: Split each batch over this mesh's first axis.

    Returns:
        `(num_examples, ..., num_classes)` on the host, float64, normalised in float32 or better.

    Raises:
        ValueError: If an output is NaN or +inf, or an example has no finite output.

    Example:
        >>> data = batches_.split({"x": np.eye(3, dtype=np.float32)}, 2)
        >>> log_probabilities(lambda w, batch: batch["x"] * w, 0.0, data).shape
        (3, 3)
    """
    found = _outputs(jax.jit(model_fn), params, batches_.as_batches(batches), state_fn, mesh)
    _arrays.check_finite(found, "the network")
    return found


@jax.jit
def _log_softmax(outputs: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(outputs.astype(tree.accumulation_dtype(outputs)), axis=-1)


def _outputs(compiled, params, source, state_fn, mesh) -> np.ndarray:
    extra = () if state_fn is None else (state_fn(params),)
    host, waiting = [], None
    for pieces in batches_.prefetch(source, mesh):
        for batch in pieces:
            outputs = compiled(params, *extra, batch)
            count = batches_.num_examples(batch)
            if jnp.ndim(outputs) < 2 or len(outputs) != count:
                raise ValueError(
                    f"model_fn: the outputs have shape {jnp.shape(outputs)} for {count} examples; "
                    "expected (examples, ..., classes)."
                )
            if not outputs.is_fully_addressable:
                raise ValueError(
                    "ensemble: the outputs lie on several processes; let each process predict on "
                    "batches of its own, without a mesh across processes."
                )
            # Fetched one batch late, so that the device has work while the host copies.
            if waiting is not None:
                host.append(np.asarray(waiting))
            waiting = _log_softmax(outputs)
    host.append(np.asarray(waiting))
    return np.concatenate(host).astype(np.float64)


def _members(points: Any) -> Iterator[PyTree]:
    """The members one after another; their number is not asked for."""
    if callable(points):
        points = points()
    if isinstance(points, list) or hasattr(points, "__next__"):
        return iter(points)
    return iter(tree.unstack(points))


def _num_members(points: Any) -> int | None:
    if callable(points) or hasattr(points, "__next__"):
        return None
    return len(points) if isinstance(points, list) else tree.num_points(points)


class _Average:
    """The running average of log-probabilities, in float64, with weights that need not sum to 1."""

    def __init__(self, mode: Mode):
        self.mode, self.weight = mode, 0.0
        self.total: Any = None

    def add(self, log_probs: np.ndarray, weight: float) -> None:
        if weight == 0:
            return
        if self.total is not None and self.total.shape != log_probs.shape:
            raise ValueError(
                f"ensemble: one member has outputs {log_probs.shape} and another "
                f"{self.total.shape}; all must see the same examples and classes."
            )
        self.weight += weight
        if self.mode == "probabilities":
            term = log_probs + np.log(weight)
            self.total = term if self.total is None else np.logaddexp(self.total, term, self.total)
            return
        if self.mode == "votes":
            classes = np.arange(log_probs.shape[-1])
            term = weight * (classes == log_probs.argmax(-1)[..., None])
        else:
            term = weight * log_probs
        self.total = term if self.total is None else np.add(self.total, term, self.total)

    def log_probs(self) -> np.ndarray:
        if self.total is None:
            raise ValueError(
                "ensemble: expected at least one member of positive weight, got none so far."
            )
        if self.mode == "probabilities":
            return self.total - np.log(self.weight)
        with np.errstate(divide="ignore"):
            if self.mode == "votes":
                return np.log(self.total / self.weight)
        found = _arrays.normalized(self.total / self.weight)
        _arrays.check_finite(found, "the geometric mean of members that exclude other classes")
        return found


def _check_average(mode: str, weights: Any, num_members: int | None) -> np.ndarray | None:
    if mode not in get_args(Mode):
        raise ValueError(f"mode is {mode!r}; expected one of {', '.join(get_args(Mode))}.")
    if weights is None:
        return None
    weights = np.asarray(weights, np.float64)
    if weights.ndim != 1 or not (np.isfinite(weights) & (weights >= 0)).all() or not weights.sum():
        raise ValueError(
            f"weights: expected `(n,)` nonnegative numbers, not all zero, got {weights}."
        )
    _check_counts(len(weights), num_members)
    return weights


def _check_counts(num_weights: int, num_members: int | None) -> None:
    if num_members is not None and num_members != num_weights:
        raise ValueError(
            f"weights: expected one for each of the {num_members} members, got {num_weights}."
        )


def _weighted(
    model_fn, points, batches, weights, state_fn, mesh, progress
) -> Iterator[tuple[np.ndarray, float]]:
    """The log-probabilities and the weight of one member after another."""
    source, compiled = batches_.as_batches(batches), jax.jit(model_fn)
    total, count = _num_members(points), 0
    with progress_.bar(total, "ensemble", show=progress) as bar:
        for params in _members(points):
            if weights is not None and count == len(weights):
                _check_counts(len(weights), count + 1)
            found = _outputs(compiled, params, source, state_fn, mesh)
            del params  # before the next one is read
            _arrays.check_finite(found, f"member {count}")
            yield found, 1.0 if weights is None else float(weights[count])
            count += 1
            bar(count)
    if weights is not None:
        _check_counts(len(weights), count)


def predict(
    model_fn: Callable[..., jax.Array],
    points: Any,
    batches: Any,
    *,
    mode: Mode = "probabilities",
    weights: Sequence[float] | np.ndarray | None = None,
    state_fn: Callable[[PyTree], PyTree] | None = None,
    mesh: Mesh | NamedSharding | None = None,
    progress: bool | None = None,
) -> np.ndarray:
    r"""The predictions of an ensemble of networks, averaged with weights w that sum to 1.

    'probabilities': :math:`\log \sum_i w_i p_i`, summed in log space. 'logits' and 'geometric':
    :math:`\sum_i w_i z_i`, normalised. The two names are one average, since logits and
    log-probabilities differ by a constant for each example. 'votes': the log of the weight of the
    members whose largest output it is (the first of equals), -inf where nobody votes.

    Args:
        model_fn: As for `log_probabilities`: logits, or a network that ends in a log-softmax.
        points: The members: a list of points; a stacked pytree, whose members are copied out; or a
            function without arguments that gives an iterator (or that iterator), read once, to
            stream members from disk: then one member is held at a time. A member may be any pytree
            that `model_fn` takes, such as (params, state).
        batches: One batch or a re-iterable, read once for each member.
        mode: What is averaged.
        weights: `(n,)`, nonnegative; divided by their sum. By default all equal.
        state_fn: From the parameters to the state there; see `surface.line`.
        mesh: Split each batch over this mesh's first axis.
        progress: True or False for a bar; by default one appears when it takes long.

    Returns:
        `(num_examples, ..., num_classes)` log-probabilities, float64 on the host, in the order of
        the batches. Cost: n passes over the data; memory: one member and three times the result.

    Raises:
        ValueError: If a member's outputs are NaN, naming it; for weights that do not fit.

    Example:
        >>> data = {"x": np.ones((1, 2), np.float32)}
        >>> points = {"w": jnp.log(jnp.array([[0.9, 0.1], [0.5, 0.5]]))}
        >>> out = predict(lambda p, batch: p["w"][None] * batch["x"], points, data)
        >>> np.exp(out).round(6).tolist()
        [[0.7, 0.3]]

    Reference:
        Lakshminarayanan, Pritzel and Blundell, Simple and Scalable Predictive Uncertainty
        Estimation Using Deep Ensembles, 2017, section 2.4.
    """
    weights = _check_average(mode, weights, _num_members(points))
    total = _Average(mode)
    for found, weight in _weighted(model_fn, points, batches, weights, state_fn, mesh, progress):
        total.add(found, weight)
    return total.log_probs()


def running(
    model_fn: Callable[..., jax.Array],
    points: Any,
    batches: Any,
    *,
    mode: Mode = "probabilities",
    weights: Sequence[float] | np.ndarray | None = None,
    label_fn: Callable[[PyTree], Any] | None = None,
    state_fn: Callable[[PyTree], PyTree] | None = None,
    mesh: Mesh | NamedSharding | None = None,
    progress: bool | None = None,
) -> Running:
    """Evaluate an ensemble as its members come: after the first, after the second, and so on.

    Args:
        model_fn: As for `predict`.
        points: As for `predict`.
        batches: One batch or a re-iterable, of `(inputs, labels)` or dicts with these entries.
        mode: As for `predict`.
        weights: As for `predict`; the first may not be zero.
        label_fn: `batch -> labels`, for batches of another form.
        state_fn: As for `predict`.
        mesh: As for `predict`.
        progress: As for `predict`.

    Returns:
        A `Running`. Its last entries do not depend on the order of the members.

    Raises:
        ValueError: As `predict`.
    """
    weights = _check_average(mode, weights, _num_members(points))
    source = batches_.as_batches(batches)
    label_fn = label_fn or (lambda batch: objectives._examples(batch)[1])
    labels = np.concatenate([np.asarray(label_fn(batch)) for batch in source])
    total = _Average(mode)
    rows, alone = [], []
    for found, weight in _weighted(model_fn, points, source, weights, state_fn, mesh, progress):
        total.add(found, weight)
        rows.append(_metrics(total.log_probs(), labels))
        alone.append(_metrics(found, labels))
    log_probs = total.log_probs()

    def columns(rows):
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}

    return Running(columns(rows), columns(alone), log_probs, labels)


def _metrics(log_probs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    found = calibration(log_probs, labels)
    return {
        "loss": found.nll.value,
        "error": 1 - found.accuracy.value,
        "brier": found.brier.value,
        "ece": found.ece.value,
    }


def average(
    members: Iterable[Any], *, mode: Mode = "probabilities", weights: Any = None
) -> np.ndarray:
    """What `predict` makes of its members' log-probabilities, where those are at hand.

    Args:
        members: n arrays `(num_examples, ..., num_classes)`, log-probabilities or logits.
        mode: As for `predict`.
        weights: As for `predict`.

    Returns:
        `(num_examples, ..., num_classes)` log-probabilities.

    Raises:
        ValueError: As `predict`.
    """
    members = list(members)
    weights = _check_average(mode, weights, len(members))
    total = _Average(mode)
    for i, member in enumerate(members):
        found = _arrays.log_softmax(member, f"member {i}")
        total.add(found, 1.0 if weights is None else float(weights[i]))
    return total.log_probs()
