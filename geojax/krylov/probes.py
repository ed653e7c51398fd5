"""Random probes in blocks, what independent samples say about their mean, and a loop that resumes.

Everything that estimates by probing an operator stands on these few functions.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from geojax import fit as fit_
from geojax import progress as progress_
from geojax import tree
from geojax.krylov.operators import Operator

__all__ = [
    "Distribution",
    "Estimate",
    "blocks",
    "drive",
    "mean_estimate",
    "probes",
    "products",
    "row",
    "unit_vectors",
]

PyTree = Any
Distribution = Literal["rademacher", "normal", "sphere"]


class Estimate(NamedTuple):
    """A number that was estimated from random probes, with its error.

    Attributes:
        estimate: The number.
        standard_error: Its standard error; NaN where one sample gives none.
        interval: `(lower, upper)`, the confidence interval asked for.
        samples: `(num_samples,)`, float64: what each probe gave.
        num_matvecs: Products with the operator.
        confidence: The probability that `interval` was made for.
    """

    estimate: float
    standard_error: float
    interval: tuple[float, float]
    samples: np.ndarray
    num_matvecs: int
    confidence: float

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.estimate:.6g} ± {self.standard_error:.2g}, "
            f"{self.num_matvecs} products)"
        )

    __str__ = __repr__


# -------------------------------------------------------------------------------- from samples


def check_confidence(confidence: float) -> None:
    """Raise unless it is a probability strictly between 0 and 1."""
    if not 0 < confidence < 1:
        raise ValueError(
            f"confidence is {confidence}; expected a probability between 0 and 1, such as 0.95."
        )


def check_count(name: str, value: Any, least: int) -> int:
    """Raise unless it is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}.")
    return int(value)


def check_key(key: Any) -> None:
    """Raise unless it is one typed key."""
    if not jnp.issubdtype(getattr(key, "dtype", np.int32), jax.dtypes.prng_key) or key.shape:
        raise TypeError("key: expected one typed key, `jax.random.key(seed)`.")


def check_operator(
    what: str,
    operator: Operator,
    key: Any,
    num_matvecs: Any,
    block_size: Any,
    *,
    stochastic: bool = False,
    symmetric: bool = False,
) -> None:
    """Raise for an operator, key or counts that an estimator cannot take."""
    if operator.stochastic and not stochastic:
        raise ValueError(
            f"{what}: {operator.name} is stochastic; expected the same operator in every product. "
            "Freeze its sample, or use `trace` with method='hutchinson'."
        )
    if symmetric and not operator.symmetric:
        raise ValueError(
            f"{what}: {operator.name} is not symmetric; expected a symmetric operator."
        )
    check_key(key)
    check_count("num_matvecs", num_matvecs, 1)
    check_count("block_size", block_size, 1)


def t_quantile(confidence: float, degrees: Any) -> Any:
    """Student's t: the half width of a two-sided interval in standard errors."""
    from scipy import special

    return special.stdtrit(degrees, 0.5 + confidence / 2)


def standard_error(samples: np.ndarray, dtype: Any = np.float64) -> float:
    """The standard error of the mean of samples; NaN for one sample.

    Samples computed in `dtype` are not better than its rounding, which the error never undercuts.
    """
    if len(samples) < 2:
        return float("nan")
    rounding = float(np.finfo(dtype).eps) * float(np.abs(samples).max())
    return float(np.hypot(samples.std(ddof=1) / np.sqrt(len(samples)), rounding))


def mean_estimate(
    samples: np.ndarray, confidence: float, num_matvecs: int, dtype: Any = np.float64
) -> Estimate:
    """The mean of independent samples, its standard error and its t-interval."""
    samples = np.asarray(samples, np.float64)
    mean, error = float(samples.mean()), standard_error(samples, dtype)
    if np.isnan(error):
        interval = (-np.inf, np.inf)
    else:
        half = float(t_quantile(confidence, len(samples) - 1)) * error
        interval = (mean - half, mean + half)
    return Estimate(mean, error, interval, samples, num_matvecs, confidence)


# ---------------------------------------------------------------------------------- the probes


def blocks(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """The ranges (first, end) of at most `size` numbers that cover `start` to `stop`."""
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


@functools.partial(jax.jit, static_argnames=("like", "distribution"))
def _draw(key: jax.Array, index: jax.Array, *, like: Any, distribution: str) -> PyTree:
    """One probe."""
    treedef, shapes, dtype = like
    struct = jax.tree.unflatten(treedef, [jax.ShapeDtypeStruct(s, dtype) for s in shapes])
    kind: Any = "normal" if distribution == "sphere" else distribution
    v = tree.random_like(jax.random.fold_in(key, index), struct, distribution=kind)
    if distribution == "sphere":
        total = sum(int(np.prod(s)) for s in shapes)
        v = tree.scale(np.sqrt(total) / tree.norm(v), v)
    return v


@functools.partial(jax.jit, static_argnames=("like", "distribution"))
def _draw_many(key: jax.Array, indices: jax.Array, *, like: Any, distribution: str) -> PyTree:
    return jax.vmap(lambda i: _draw(key, i, like=like, distribution=distribution))(indices)


@jax.jit
def _stacked(vectors: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *x: jnp.stack(x), *vectors)


def probes(
    operator: Operator, key: jax.Array, start: int, stop: int, distribution: Distribution
) -> PyTree:
    """The probes number `start` to `stop`, stacked.

    The key of a probe is `key` folded with its number: a probe depends on neither the block that it
    is made in nor the sharding, and the probes of neighbouring seeds have nothing in common.

    Args:
        operator: Gives the structure, dtype and sharding.
        key: The key of the whole set.
        start: The first probe.
        stop: The number after the last.
        distribution: 'rademacher', 'normal', or 'sphere': normal, scaled to the norm sqrt(n).
    """
    if stop - start <= 16 or operator.size > 4096:
        # One after another takes the least memory and one compiled program for every block.
        return _stacked([probe(operator, key, i, distribution) for i in range(start, stop)])
    numbers = np.arange(start, stop, dtype=np.uint32)
    drawn = _draw_many(key, numbers, like=_shapes(operator), distribution=distribution)
    return jax.tree.map(lambda x, leaf: placed(x, leaf, stacked=True), drawn, operator.like)


def probe(operator: Operator, key: jax.Array, number: int, distribution: Distribution) -> PyTree:
    """One of them, not stacked."""
    like = _shapes(operator)
    drawn = _draw(key, np.uint32(number), like=like, distribution=distribution)
    return jax.tree.map(placed, drawn, operator.like)


def _shapes(operator: Operator) -> Any:
    leaves, treedef = jax.tree.flatten(operator.like)
    return treedef, tuple(jnp.shape(x) for x in leaves), np.dtype(operator.dtype)


def placed(values: jax.Array, leaf: Any, *, stacked: bool = False) -> jax.Array:
    """Values in the sharding of a leaf; a leading axis, if any, is on every device."""
    if isinstance(leaf, jax.Array) and not leaf.committed:
        return values
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and stacked:
        sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    return values if sharding is None else jax.device_put(values, sharding)


def zeros(operator: Operator, *, stacked: bool = False) -> PyTree:
    """The zero vector, or a stack of one."""
    lead = (1,) if stacked else ()
    return jax.tree.map(
        lambda x: placed(jnp.zeros((*lead, *jnp.shape(x)), operator.dtype), x, stacked=stacked),
        operator.like,
    )


def products(operator: Operator, vectors: PyTree) -> PyTree:
    """The products with stacked vectors; a single one goes through `matvec`, compiled already."""
    if tree.num_points(vectors) > 1:
        return operator.matmat(vectors)
    return _with_axis(operator.matvec(without_axis(vectors)))


@jax.jit
def row(vectors: PyTree, index: Any) -> PyTree:
    """One of stacked vectors."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), vectors)


@jax.jit
def without_axis(vectors: PyTree) -> PyTree:
    """The only one of stacked vectors."""
    return jax.tree.map(lambda x: x[0], vectors)


@jax.jit
def _with_axis(v: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x[None], v)


def unit_vectors(operator: Operator, start: int, stop: int) -> PyTree:
    """The unit vectors number `start` to `stop`, stacked, in the order of the leaves."""
    leaves, treedef = jax.tree.flatten(operator.like)
    out, offset = [], 0
    for leaf in leaves:
        count = int(np.prod(jnp.shape(leaf)))
        rows = np.zeros((stop - start, count), operator.dtype)
        for i in range(max(start, offset), min(stop, offset + count)):
            rows[i - start, i - offset] = 1
        stacked = jnp.asarray(rows.reshape(-1, *jnp.shape(leaf)))
        out.append(placed(stacked, leaf, stacked=True))
        offset += count
    return jax.tree.unflatten(treedef, out)


def check_products(samples: np.ndarray, what: str, operator: Operator) -> None:
    """Raise for products that are not finite, which would make every estimate NaN."""
    if not np.isfinite(samples).all():
        raise FloatingPointError(
            f"{what}: a product of {operator.name} is NaN or infinite; look at its loss and "
            "parameters at this point."
        )


# ------------------------------------------------------------------------------------- the loop


def drive(
    total: int,
    begin: Callable[[int], Any],
    advance: Callable[[Any, int], tuple[Any, int]],
    *,
    record: dict[str, Any],
    checkpoint: fit_.Checkpointer | None,
    progress: bool | None,
    finished: Callable[[Any, int], bool] | None = None,
) -> tuple[Any, int]:
    """Run steps from the host with a bar, saves and an exact resume.

    Args:
        total: The number of steps at most.
        begin: From the number of a step to a state in its shapes; of step 0, the first state.
        advance: From a state and the steps done to the next state and the steps then done.
        record: JSON values that say which run this is, 'algorithm' among them.
        checkpoint: Where to save, or None.
        progress: As everywhere.
        finished: Whether a state is the last one; by default at `total`.

    Returns:
        The last state, and the number of steps.

    Raises:
        ValueError: For a checkpoint of another run.
    """
    done = 0
    if checkpoint is not None:
        done = checkpoint.latest() or 0
    state = begin(done)
    if checkpoint is not None and done:
        other = f"{record['algorithm']}: the checkpoint in {checkpoint.location} is of another run"
        remedy = "Use the same arguments to resume, or another folder."
        try:
            state, found = checkpoint.restore(state)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"{other}, or damaged ({error}). {remedy}") from error
        for name, value in record.items():
            if found.get(name) != value:
                raise ValueError(
                    f"{other}: its {name} is {found.get(name)} and this run's is {value}. {remedy}"
                )
    last = finished or (lambda state, done: done >= total)
    with progress_.bar(total, record["algorithm"], show=progress) as bar:
        while not last(state, done):
            before = done
            state, done = advance(state, done)
            bar(done)
            if checkpoint is not None and (
                done // checkpoint.every > before // checkpoint.every or last(state, done)
            ):
                checkpoint.save(done, state, record)
    return state, done
