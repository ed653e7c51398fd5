"""Merging networks: means of many kinds, slerp, soups, and arithmetic with task vectors.

The points must lie in one basin to begin with: align them first. Everything keeps the dtypes and
sharding of its leaves and refuses leaves that are no floating-point numbers, by path.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from geojax import batches as batches_
from geojax import progress as progress_
from geojax import tree

__all__ = [
    "GreedySoup",
    "RegressionMean",
    "add_task_vectors",
    "fisher_diagonal",
    "fisher_merge",
    "greedy_soup",
    "lerp",
    "regression_mean",
    "slerp",
    "task_vector",
    "uniform_soup",
    "weighted_mean",
]

PyTree = Any
Scope = Literal["global", "leaf", "axis"]
_SCOPES = ("global", "leaf", "axis")


# ------------------------------------------------------------------------------- between two points


def lerp(a: PyTree, b: PyTree, t: jax.typing.ArrayLike) -> PyTree:
    """The point `(1 - t) a + t b` on the line through two points.

    Args:
        a: The point at t = 0, returned there bit for bit.
        b: The point at t = 1, returned there bit for bit.
        t: A scalar, or an array of any shape for a stack of points. May lie outside [0, 1].

    Returns:
        Leaves `t.shape + leaf.shape`, in the dtypes of `a`.

    Raises:
        ValueError: If structures or shapes differ, naming the leaf.
        TypeError: If dtypes differ or a leaf is not floating, naming the leaf.

    Example:
        >>> lerp({"w": jnp.zeros(2)}, {"w": jnp.ones(2)}, 0.25)["w"].tolist()
        [0.25, 0.25]
    """
    tree.check_same(a, b, names=("a", "b"))
    tree.check_floating(a, "a")
    t = _real(t)
    return tree.combine(tree.stack([a, b]), jnp.stack([1 - t, t], axis=-1))


def _real(t: Any) -> jax.Array:
    t = jnp.asarray(t)
    return t if jnp.issubdtype(t.dtype, jnp.floating) else t.astype(jnp.float32)


def slerp(a: PyTree, b: PyTree, t: jax.typing.ArrayLike, *, scope: Scope = "global") -> PyTree:
    r"""The point between two that turns from one direction to the other at constant speed.

    With the angle :math:`\omega` between a and b,

    .. math:: ((1 - t)\|a\| + t\|b\|)
        \left(\frac{\sin((1-t)\omega)}{\sin\omega} \frac{a}{\|a\|}
        + \frac{\sin(t\omega)}{\sin\omega} \frac{b}{\|b\|}\right),

    so that the norm is interpolated as well. Where :math:`\sin\omega \le \sqrt{\epsilon}`, the
    epsilon of the accumulation dtype, or a norm is zero, the result is `lerp`: for equal directions
    the two agree to rounding there; between opposite ones there is no shortest turn, and the line
    goes through zero.

    Args:
        a: The point at t = 0, returned there bit for bit.
        b: The point at t = 1, returned there bit for bit.
        t: A scalar, or an array of any shape for a stack of points.
        scope: What counts as one vector: 'global' the whole network, 'leaf' each leaf, 'axis' each
            slice of a leaf at one index of its last axis (the weights into one unit; leaves with
            fewer than two axes whole).

    Returns:
        Leaves `t.shape + leaf.shape`, in the dtypes of `a`.

    Raises:
        ValueError: If structures or shapes differ, naming the leaf; for an unknown scope.
        TypeError: If dtypes differ or a leaf is not floating, naming the leaf.

    Example:
        >>> middle = slerp({"w": jnp.array([2.0, 0.0])}, {"w": jnp.array([0.0, 2.0])}, 0.5)
        >>> float(jnp.round(tree.norm(middle), 4))
        2.0

    Reference:
        Shoemake, Animating rotation with quaternion curves, 1985; the angle as in Kahan, How
        futile are mindless assessments of roundoff, 2006, section 12, which small and nearly flat
        angles survive.
    """
    if scope not in _SCOPES:
        raise ValueError(f"scope is {scope!r}; expected one of {', '.join(_SCOPES)}.")
    tree.check_same(a, b, names=("a", "b"))
    tree.check_floating(a, "a")
    return _slerp(a, b, _real(t), scope=scope)


@functools.partial(jax.jit, static_argnames="scope")
def _slerp(a: PyTree, b: PyTree, t: jax.Array, *, scope: Scope) -> PyTree:
    points = tree.stack([a, b])
    if scope == "global":
        return tree.combine(points, _turn(a, b, t, tree.norm))

    def leaf(x, y, both):
        if scope == "leaf" or jnp.ndim(x) < 2:
            return tree.combine(both, _turn(x, y, t, tree.norm))
        return _turn_slices(jnp.asarray(x), jnp.asarray(y), t)

    return jax.tree.map(leaf, a, b, points)


def _turn(a: PyTree, b: PyTree, t: jax.Array, norm: Callable[[PyTree], jax.Array]) -> jax.Array:
    """The coefficients `(..., 2)` of a and b; the shape is that of t and then of the norms."""
    dtype = tree.accumulation_dtype(*jax.tree.leaves(a), t)
    a, b, t = tree.cast(a, dtype), tree.cast(b, dtype), t.astype(dtype)
    norm_a, norm_b = norm(a), norm(b)
    # A product of norms may underflow; each is its own divisor.
    one = jnp.ones_like(norm_a)
    divisor_a, divisor_b = jnp.where(norm_a > 0, norm_a, one), jnp.where(norm_b > 0, norm_b, one)
    unit_a = jax.tree.map(lambda x: x / _like(divisor_a, x), a)
    unit_b = jax.tree.map(lambda x: x / _like(divisor_b, x), b)
    apart = norm(jax.tree.map(jnp.subtract, unit_a, unit_b))
    together = norm(jax.tree.map(jnp.add, unit_a, unit_b))
    angle = 2 * jnp.arctan2(apart, together)
    sine = jnp.sin(angle)
    t = t.reshape(t.shape + (1,) * norm_a.ndim)
    lead = (1,) * (t.ndim - norm_a.ndim)
    norm_a, norm_b, divisor_a, divisor_b, angle, sine = (
        x.reshape(lead + x.shape) for x in (norm_a, norm_b, divisor_a, divisor_b, angle, sine)
    )
    straight = (sine <= np.sqrt(np.finfo(dtype).eps)) | (norm_a == 0) | (norm_b == 0)
    sine = jnp.where(straight, jnp.ones_like(sine), sine)
    length = (1 - t) * norm_a + t * norm_b
    turned_a = length * jnp.sin((1 - t) * angle) / sine / divisor_a
    turned_b = length * jnp.sin(t * angle) / sine / divisor_b
    straight = straight | (t == 0) | (t == 1)  # the ends themselves, without rounding
    t = t + jnp.zeros_like(turned_a)
    return jnp.stack(
        [jnp.where(straight, 1 - t, turned_a), jnp.where(straight, t, turned_b)], axis=-1
    )


def _like(norms: jax.Array, x: jax.Array) -> jax.Array:
    return norms.reshape((1,) * (x.ndim - norms.ndim) + norms.shape)


def _norms_of_slices(x: jax.Array) -> jax.Array:
    """The norm of each slice along the last axis, without overflow."""
    axes = tuple(range(x.ndim - 1))
    largest = jnp.max(jnp.abs(x), axis=axes, initial=0)
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, jnp.ones_like(largest))
    return unit * jnp.sqrt(jnp.sum(jnp.square(x / _like(unit, x)), axis=axes))


def _turn_slices(x: jax.Array, y: jax.Array, t: jax.Array) -> jax.Array:
    coefficients = _turn(x, y, t, _norms_of_slices)
    dtype = coefficients.dtype
    shape = t.shape + (1,) * (x.ndim - 1) + x.shape[-1:]
    lead = (1,) * t.ndim
    parts = [
        coefficients[..., i].reshape(shape) * leaf.astype(dtype).reshape(lead + leaf.shape)
        for i, leaf in enumerate((x, y))
    ]
    return (parts[0] + parts[1]).astype(x.dtype)


# ----------------------------------------------------------------------------- means of many points


def weighted_mean(points: PyTree, weights: jax.typing.ArrayLike) -> PyTree:
    r"""The mean :math:`\sum_i c_i w_i` of stacked points with weights that sum to one.

    Args:
        points: Stacked pytree, leaves `(n, *leaf.shape)`.
        weights: `(n,)`, or `(..., n)` for a stack of means. They may be negative.

    Returns:
        Leaves `weights.shape[:-1] + leaf.shape`.

    Raises:
        ValueError: If weights do not sum to one to 1e-5 (not seen inside `jit`), or do not fit.
        TypeError: If a leaf is not floating, naming it.

    Example:
        >>> points = tree.stack([{"w": jnp.zeros(2)}, {"w": jnp.ones(2)}])
        >>> weighted_mean(points, [0.75, 0.25])["w"].tolist()
        [0.25, 0.25]
    """
    weights = _real(weights)
    if not isinstance(weights, Tracer):
        sums = np.asarray(weights, np.float64).sum(axis=-1) if weights.ndim else np.asarray(1.0)
        worst = np.max(np.abs(sums - 1), initial=0.0)
        if not worst <= 1e-5:
            raise ValueError(
                f"weighted_mean: the weights sum to {np.ravel(sums).tolist()[:3]}; expected 1. "
                "Divide them by their sum, or use `tree.combine` for any combination."
            )
    return tree.combine(points, weights)


def fisher_merge(
    points: PyTree,
    fishers: PyTree,
    *,
    weights: jax.typing.ArrayLike | None = None,
    floor: float = 0.0,
) -> PyTree:
    r"""The mean of stacked points in which each entry counts by its diagonal Fisher information.

    .. math:: \theta = \frac{\sum_i c_i (F_i + f)\, \theta_i}{\sum_i c_i (F_i + f)}

    Entries for which all of these weights vanish get the mean with weights c. With equal Fishers it
    is that mean throughout.

    Args:
        points: Stacked pytree, leaves `(n, *leaf.shape)`.
        fishers: The diagonals :math:`F_i`, nonnegative, stacked like `points`: from
            `fisher_diagonal` (empirical, exact), or `geojax.krylov.diagonal` of
            `geojax.hessian.fisher` (an estimate of the true one). Any common factor cancels.
        weights: c, `(n,)`, nonnegative; by default all equal.
        floor: f, added to each Fisher entry, so that none counts for nothing.

    Returns:
        Leaves `leaf.shape`, in the dtypes of `points`.

    Raises:
        ValueError: If structures or shapes differ; for negative or NaN Fishers, naming the leaf, or
            weights (values are not seen inside `jit`).
        TypeError: If a leaf is not floating, naming it.

    Example:
        >>> points = {"w": jnp.array([[0.0, 0.0], [1.0, 1.0]])}
        >>> fisher_merge(points, {"w": jnp.array([[1.0, 0.0], [3.0, 0.0]])})["w"].tolist()
        [0.75, 0.5]

    Reference:
        Matena and Raffel, Merging models with Fisher-weighted averaging, 2022, equation 2.
    """
    n = tree.num_points(points)
    tree.check_same(points, fishers, names=("points", "fishers"), dtype=False)
    tree.check_floating(points, "points")
    tree.check_floating(fishers, "fishers")
    counts = jnp.full(n, 1.0 / n) if weights is None else _real(weights)
    if counts.shape != (n,):
        raise ValueError(
            f"fisher_merge: weights have shape {counts.shape}; expected ({n},), one for each point."
        )
    if not isinstance(counts, Tracer) and not (
        np.all(np.asarray(counts) >= 0) and float(jnp.sum(counts)) > 0
    ):
        raise ValueError(
            f"fisher_merge: weights are {np.asarray(counts).tolist()}; expected nonnegative "
            "numbers, not all zero."
        )
    if not floor >= 0:
        raise ValueError(f"fisher_merge: floor is {floor}; expected a nonnegative number.")
    for path, fisher in zip(tree.paths(fishers), jax.tree.leaves(fishers), strict=True):
        if not isinstance(fisher, Tracer) and jnp.size(fisher) and not bool(jnp.all(fisher >= 0)):
            raise ValueError(
                f"fisher_merge: fishers leaf {path} has an entry that is negative or NaN; expected "
                "the diagonal of a Fisher matrix."
            )
    return _fisher_merge(points, fishers, counts, floor)


@jax.jit
def _fisher_merge(points: PyTree, fishers: PyTree, counts: jax.Array, floor: Any) -> PyTree:
    n = counts.shape[0]
    plain = tree.combine(points, counts / jnp.sum(counts))
    members, information = tree.unstack(points), tree.unstack(fishers)

    def one(mean, *leaves):
        dtype = tree.accumulation_dtype(*leaves)
        weights = [counts[i].astype(dtype) for i in range(n)]
        thetas = [x.astype(dtype) for x in leaves[:n]]
        diagonals = [
            jnp.where(c > 0, f.astype(dtype) + jnp.asarray(floor).astype(dtype), 0.0)
            for c, f in zip(weights, leaves[n:], strict=True)
        ]
        # Relative to the largest, so that tiny Fishers neither underflow nor divide by zero.
        largest = functools.reduce(jnp.maximum, diagonals)
        known = largest > 0
        largest = jnp.where(known, largest, jnp.ones_like(largest))
        share = [c * (f / largest) for c, f in zip(weights, diagonals, strict=True)]
        total = functools.reduce(jnp.add, share)
        total = jnp.where(known, total, jnp.ones_like(total))
        # About the plain mean, so that members that agree keep their value.
        centre = mean.astype(dtype)
        moved = [s * (x - centre) for s, x in zip(share, thetas, strict=True)]
        merged = centre + functools.reduce(jnp.add, moved) / total
        return jnp.where(known, merged, centre).astype(mean.dtype)

    return jax.tree.map(one, plain, *members, *information)


@functools.lru_cache(maxsize=64)
def _squares_fn(loss_fn: Callable) -> Callable:
    """The mean of squared gradients over a batch; cached so that it is compiled once for a loss."""

    def squares(params, batch):
        def one(example):
            alone = jax.tree.map(lambda x: x[None], example)
            return jax.grad(loss_fn)(params, alone)

        gradients = jax.vmap(one)(batch)
        return jax.tree.map(
            lambda g: jnp.mean(jnp.square(g.astype(tree.accumulation_dtype(g))), axis=0), gradients
        )

    return squares


def fisher_diagonal(
    loss_fn: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    batches: Any,
    *,
    mesh: Any = None,
    progress: bool | None = None,
) -> PyTree:
    r"""The diagonal of the empirical Fisher matrix, :math:`\sum_k (\nabla \ell_k)^2 / N`, exactly.

    Args:
        loss_fn: `loss_fn(params, batch)`, the mean loss of a batch. It is called on batches of one
            example; for a likelihood it is the negative log-likelihood of the data's own labels.
        params: The point.
        batches: One batch or a re-iterable of batches.
        mesh: Split each batch over this mesh's first axis.
        progress: True for a progress bar, False for none, None for one on long runs.

    Returns:
        A pytree like `params`, nonnegative, float32 or better. Cost: one gradient for each example,
        made at once for a batch: peak memory is the batch size in multiples of the parameters.

    Raises:
        TypeError: If a leaf of `params` is not floating, naming it.

    Example:
        >>> loss = lambda w, x: jnp.mean(w * x)
        >>> float(fisher_diagonal(loss, jnp.ones(()), jnp.array([1.0, 3.0])))
        5.0

    Reference:
        Matena and Raffel, Merging models with Fisher-weighted averaging, 2022, section 3.2, which
        samples the labels from the model instead.
    """
    tree.check_floating(params)
    source = batches_.as_batches(batches)
    with progress_.bar(None, "Fisher diagonal", show=progress) as update:
        return batches_.mean(_squares_fn(loss_fn), source, mesh=mesh, progress=update)(params)


class RegressionMean(NamedTuple):
    """The result of `regression_mean`.

    Attributes:
        params: The merged network.
        ranks: For each kernel path, how many directions of its inputs the summed Gram matrix
            determines; in the others the kernel is the plain mean.
    """

    params: PyTree
    ranks: dict[str, int]


def regression_mean(
    points: PyTree,
    grams: Mapping[str, Any],
    *,
    shrinkage: float = 0.0,
) -> RegressionMean:
    r"""The network whose dense layers reproduce those of all members best, each on its own inputs.

    For each layer named in `grams`, with inputs :math:`X_i` of member i and
    :math:`G_i = X_i^\top X_i`, the kernel is the least-squares solution
    :math:`W = (\sum_i G_i)^{-1} \sum_i G_i W_i` of :math:`\sum_i \|X_i W - X_i W_i\|^2`; other
    leaves are averaged. Solved on the host in float64, about the plain mean, which stands where the
    inputs say nothing (dead units, fewer examples than inputs).

    Args:
        points: Stacked pytree, leaves `(n, *leaf.shape)`.
        grams: From the path of a kernel, as `tree.paths` prints it, to its members' Gram matrices
            `(n, d, d)`; sums or means over examples, alike for all. A kernel's leading axes whose
            sizes multiply to d are the inputs. Biases are averaged, as in the paper.
        shrinkage: Off-diagonal entries of each Gram matrix are multiplied by `1 - shrinkage`.

    Returns:
        The merged network and the ranks. Runs on the host: not under `jit`.

    Raises:
        ValueError: For an unknown path, or a Gram matrix that fits no leading axes of its kernel or
            is not finite.
        TypeError: If a leaf is not floating, naming it.

    Example:
        >>> x, y = np.eye(2)[:1], np.eye(2)[1:]  # each member saw one of the two inputs
        >>> points = {"kernel": jnp.array([[[1.0], [9.0]], [[9.0], [2.0]]])}
        >>> found = regression_mean(points, {"['kernel']": np.stack([x.T @ x, y.T @ y])})
        >>> found.params["kernel"].tolist(), found.ranks
        ([[1.0], [2.0]], {"['kernel']": 2})

    Reference:
        Jin, Ren, Preotiuc-Pietro and Cheng, Dataless knowledge fusion by merging weights of
        language models, 2023, equation 2 and section 3.3 (there 1 - shrinkage is 0.9).
    """
    n = tree.num_points(points)
    tree.check_floating(points, "points")
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage is {shrinkage}; expected a number from 0 to 1.")
    paths = tree.paths(points)
    unknown = [path for path in grams if path not in paths]
    if unknown:
        raise ValueError(
            f"regression_mean: grams name {unknown[0]!r}, which is no leaf; expected some of "
            f"{', '.join(paths)}."
        )
    mean = uniform_soup(points)
    treedef = jax.tree.structure(points)
    out, ranks = [], {}
    for path, leaf, plain in zip(
        paths, jax.tree.leaves(points), jax.tree.leaves(mean), strict=True
    ):
        if path not in grams:
            out.append(plain)
            continue
        kernel, ranks[path] = _regress(path, np.asarray(leaf), grams[path], n, shrinkage)
        out.append(jax.device_put(jnp.asarray(kernel, plain.dtype), plain.sharding))
    return RegressionMean(jax.tree.unflatten(treedef, out), ranks)


def _regress(path: str, kernels: np.ndarray, gram: Any, n: int, shrinkage: float):
    own = np.finfo(np.float32 if jnp.result_type(gram) != jnp.float64 else np.float64).eps
    grams = np.asarray(gram).astype(np.float64)
    shape = kernels.shape[1:]
    if grams.ndim != 3 or grams.shape != (n, grams.shape[-1], grams.shape[-1]):
        raise ValueError(
            f"regression_mean: the Gram matrices of {path} have shape {grams.shape}; expected "
            f"({n}, d, d)."
        )
    size = grams.shape[-1]
    if not any(int(np.prod(shape[:axes])) == size for axes in range(1, len(shape) + 1)):
        raise ValueError(
            f"regression_mean: {path} has shape {shape}, no leading axes of which make the "
            f"{size} inputs of its Gram matrices."
        )
    if not np.isfinite(grams).all():
        raise ValueError(f"regression_mean: the Gram matrices of {path} are not finite.")
    diagonal = np.eye(size, dtype=bool)
    grams = np.where(diagonal, grams, (1 - shrinkage) * grams)
    weights = kernels.astype(np.float64).reshape((n, size, -1))
    centre = weights.mean(axis=0)
    wanted = np.einsum("nij,njk->ik", grams, weights - centre)
    # Units of different scale are compared at a diagonal of one.
    total = grams.sum(axis=0)
    scale = np.sqrt(np.maximum(np.diagonal(total), 0))
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    values, vectors = np.linalg.eigh(inverse[:, None] * (total + total.T) / 2 * inverse)
    determined = values > size * own * max(values.max(initial=0.0), 0.0)
    basis = vectors[:, determined]
    step = basis @ ((basis.T @ (inverse[:, None] * wanted)) / values[determined][:, None])
    return (centre + inverse[:, None] * step).reshape(shape), int(determined.sum())


# -------------------------------------------------------------------------------------------- soups


def uniform_soup(points: PyTree) -> PyTree:
    """The plain mean of stacked points.

    Raises:
        TypeError: If a leaf is not floating, naming it.

    Example:
        >>> uniform_soup({"w": jnp.array([[0.0], [1.0]])})["w"].tolist()
        [0.5]

    Reference:
        Wortsman et al., Model soups, 2022, section 2.
    """
    n = tree.num_points(points)
    return tree.combine(points, jnp.full(n, 1.0 / n))


class GreedySoup(NamedTuple):
    """The result of `greedy_soup`.

    Attributes:
        params: The mean of the members used.
        members: Their indices, in the order in which they were added; the best one is first.
        score: The score of `params`, at least that of every member alone.
        scores: `(n,)`, each member's own score, NaN where that is what `score_fn` gave.
    """

    params: PyTree
    members: tuple[int, ...]
    score: float
    scores: np.ndarray


def greedy_soup(
    points: PyTree,
    score_fn: Callable[[PyTree], Any],
    *,
    progress: bool | None = None,
) -> GreedySoup:
    """The mean of those points that do not harm it, added from the best one on.

    The members are sorted by their own score, equal ones in the order given. One after another is
    taken in if the score of the mean does not fall by it. A member whose own score is NaN is not
    considered, and one that makes the mean's score NaN is not taken in.

    Args:
        points: Stacked pytree, leaves `(n, *leaf.shape)`, aligned.
        score_fn: From the parameters of one network to a number that is better when larger, such
            as the accuracy on held-out data. Called from the host at most 2n - 1 times.
        progress: True for a progress bar, False for none, None for one on long runs.

    Returns:
        The soup, with the scores that chose it. On the data of `score_fn` it is never worse than
        the best member; on other data it may be.

    Raises:
        ValueError: If no member has a score that is a number.
        TypeError: If a leaf is not floating, naming it.

    Example:
        >>> points = {"w": jnp.array([0.0, 4.0, 30.0])}
        >>> soup = greedy_soup(points, lambda p: -abs(p["w"] - 1.8))
        >>> soup.members, float(soup.params["w"])
        ((0, 1), 2.0)

    Reference:
        Wortsman et al., Model soups, 2022, recipe 1.
    """
    tree.check_floating(points, "points")
    n = tree.num_points(points)

    def mean_of(members):
        weights = np.zeros(n)
        weights[list(members)] = 1 / len(members)
        return tree.combine(points, weights)

    with progress_.bar(2 * n - 1, "greedy soup", show=progress) as update:
        scores = np.empty(n)
        for i in range(n):
            scores[i] = float(score_fn(mean_of([i])))
            update(i + 1, 2 * n - 1)
        if np.isnan(scores).all():
            raise ValueError(
                "greedy_soup: the score of every member is NaN; expected score_fn(params) to give "
                "a number that is better when larger."
            )
        order = [int(i) for i in np.argsort(-scores, kind="stable") if not np.isnan(scores[i])]
        members, score = (order[0],), float(scores[order[0]])
        for done, i in enumerate(order[1:], start=n + 1):
            candidate = float(score_fn(mean_of([*members, i])))
            if candidate >= score:
                members, score = (*members, i), candidate
            update(done, 2 * n - 1)
    return GreedySoup(mean_of(members), members, score, scores)


# ------------------------------------------------------------------------------------- task vectors


def task_vector(params: PyTree, base: PyTree) -> PyTree:
    """What training added: `params - base`, in the dtypes of `params`.

    Of networks that were permuted, take the difference after both were aligned.

    Raises:
        ValueError: If structures or shapes differ, naming the leaf.
        TypeError: If dtypes differ or a leaf is not floating, naming the leaf.

    Example:
        >>> task_vector({"w": jnp.array([3.0])}, {"w": jnp.array([1.0])})["w"].tolist()
        [2.0]

    Reference:
        Ilharco et al., Editing models with task arithmetic, 2023, section 2.
    """
    tree.check_same(params, base, names=("params", "base"))
    tree.check_floating(params)
    return tree.axpy(-1.0, base, params)


def add_task_vectors(base: PyTree, vectors: PyTree, coefficients: jax.typing.ArrayLike) -> PyTree:
    r"""The point :math:`w + \sum_k c_k \tau_k`: skills added, or with negative c taken away.

    Args:
        base: The point w.
        vectors: Task vectors, stacked: leaves `(k, *leaf.shape)`.
        coefficients: `(k,)`, or `(..., k)` for a stack of points.

    Returns:
        Leaves `coefficients.shape[:-1] + leaf.shape`, in the dtypes of `base`, rounded once.

    Raises:
        ValueError: If the structures, shapes or counts do not fit.
        TypeError: If a leaf is not floating, naming it.

    Example:
        >>> vectors = {"w": jnp.array([[2.0], [10.0]])}
        >>> add_task_vectors({"w": jnp.array([1.0])}, vectors, [0.5, -0.1])["w"].tolist()
        [1.0]

    Reference:
        Ilharco et al., Editing models with task arithmetic, 2023, section 2.
    """
    tree.check_floating(base, "base")
    k = tree.num_points(vectors)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], x.dtype), vectors)
    tree.check_same(base, one, names=("base", "one of the vectors"), dtype=False)
    coefficients = _real(coefficients)
    if not coefficients.ndim or coefficients.shape[-1] != k:
        raise ValueError(
            f"add_task_vectors: coefficients have shape {coefficients.shape}; expected (..., {k})."
        )
    dtype = tree.accumulation_dtype(*jax.tree.leaves(base), *jax.tree.leaves(vectors))
    moved = tree.combine(tree.cast(vectors, dtype), coefficients)
    lead = (1,) * (coefficients.ndim - 1)

    def add(w, delta):
        w = jnp.asarray(w)
        return (w.astype(dtype).reshape(lead + w.shape) + delta).astype(w.dtype)

    return jax.tree.map(add, base, moved)
