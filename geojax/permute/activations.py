"""Activation matching: units go together that answer alike to the same data.

The places where a group's units are read come from the model's jaxpr, so no layer is named by hand:
in a residual network a group is read at many places, and all of them count.
"""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from geojax import assignment, tree
from geojax import batches as batches_
from geojax import progress as bars
from geojax.symmetry import action, taps, trace
from geojax.symmetry.action import Monomial
from geojax.symmetry.spec import (
    Factor,
    Group,
    Leaf,
    PermutationSpec,
    SpecError,
    blocks,
    layout_size,
)

__all__ = ["ActivationMatching", "Score", "activation_matching", "activation_scores"]

PyTree = Any
Score = Literal["correlation", "covariance", "cross_moment", "cca"]
SCORES: tuple[Score, ...] = ("correlation", "covariance", "cross_moment", "cca")


class ActivationMatching(NamedTuple):
    """A matching by activations.

    Attributes:
        permutation: For `apply_permutation(spec, permutation, params_b)`.
        objective: The sum of matched scores over all units, places and groups.
        group_scores: The mean score over matched units and places, for each group with all that
            depends on it. For correlations 1 says that every unit has a perfect partner.
        num_sites: At how many places each group was read.
        num_dead: For each group, units of A or B that are constant on the data at every place;
            their correlations count as zero.
        converged: Always true where groups do not depend on others: one assignment each is exact.
            For heads with two inner groups that share a place, whether alternation ended.
    """

    permutation: dict[str, Any]
    objective: float
    group_scores: dict[str, float]
    num_sites: dict[str, int]
    num_dead: dict[str, int]
    converged: bool


class _Place(NamedTuple):
    """A block of a site whose units can be compared without knowing other groups.

    Attributes:
        site: Where it is.
        block: Which of the blocks that the site's layouts make.
        fixed: Names of the factors that stay in place and that the groups depend on.
        keys: The groups of the unit axes, outermost first.
        axes: The block's axes for `fixed` and `keys`; all others are averaged over.
        shape: The sizes of `keys`.
    """

    site: trace.Site
    block: int
    fixed: tuple[str, ...]
    keys: tuple[str, ...]
    axes: tuple[int, ...]
    shape: tuple[int, ...]


def activation_matching(
    spec: PermutationSpec,
    apply_fn: Callable[..., Any],
    params_a: PyTree,
    params_b: PyTree,
    batches: Any,
    *,
    score: Score = "correlation",
    inputs_fn: Callable[[PyTree], Any] | None = None,
    ridge: float = 1e-3,
    mesh: Any = None,
    progress: bool | None = None,
) -> ActivationMatching:
    """Find the permutation of B's units whose activations are most alike to A's.

    For each group one assignment problem, on scores summed over the places where the network reads
    the group: after the nonlinearity, where the next layer multiplies. As units of B are compared
    as they are, nothing depends on the other groups' permutations; one pass over the data is all,
    and one more batch that fixes the shifts which keep the moments exact.

    - "correlation": Pearson's; a unit that never changes scores zero. For a group of kind "signed"
      the absolute value, with the sign in the permutation.
    - "covariance"; "cross_moment", E[a b], which the original uses for dense networks.
    - "cca": correlations after whitening both networks' units with a ridge.

    How it differs from the original: any model, at places that the spec's derivation finds, instead
    of hand-picked layers of sequential ones; one pass instead of two; one score for all models.

    Args:
        spec: The symmetry, derived by `symmetry.permutation_spec` (or edited from it): places
            are found anew at the batch's shape and matched to its groups by name.
        apply_fn: `(params, *inputs)`, as for the derivation; `params` may hold statistics.
        params_a: The network that stays.
        params_b: The network to permute.
        batches: One batch or a re-iterable; unlabelled inputs will do.
        score: See above.
        inputs_fn: From a batch to the tuple of inputs; by default the first entry of a tuple, the
            entry "inputs" of a dict, or the batch itself.
        ridge: For "cca", the ridge as a share of the mean variance.
        mesh: Split each batch over this mesh's first axis.
        progress: Whether to show a progress bar.

    Returns:
        An `ActivationMatching`. Memory: the square of each group's width, per place.

    Raises:
        SpecError: If a group is read nowhere that can be compared, naming it; pin it, or match it
            by weights.
        ValueError: If the score is unknown.

    Reference:
        Ainsworth, Hayase and Srinivasa, "Git Re-Basin", 2023, section 3.1. Li et al., "Convergent
        Learning", 2015 (correlations).
    """
    scores, places, dead = _scores(
        spec, apply_fn, params_a, params_b, batches, score, inputs_fn, ridge, mesh, progress
    )
    permutation: dict[str, Any] = {}
    names = {group.name for group in spec.groups}
    objective, converged = 0.0, True
    group_scores: dict[str, float] = {}
    for group in spec.groups:
        if names & set(group.index):
            continue
        below = [g for g in spec.groups if group.name in g.index]
        deep = [g.name for g in below if len(names & set(g.index)) > 1]
        if deep:
            raise SpecError(
                f"groups {deep} depend on several groups; activation matching knows one level. "
                "Match them by weights."
            )
        sizes = dict(zip(group.index, group.index_sizes, strict=True))
        tables = {keys: x for keys, x in scores.items() if group.name in keys}
        found = {g.name: np.empty(g.shape, np.int32) for g in (group, *below)}
        signs = np.ones(group.shape, np.float32)
        total, count = 0.0, 0
        for at in np.ndindex(*sizes.values()):
            here = {keys: x[at] for keys, x in tables.items()}
            orders, sign, value, fixed_point = _solve(group, below, here)
            for name, order in orders.items():
                found[name][at] = order
            if sign is not None:
                signs[at] = sign
            total += value
            count += sum(int(np.prod(place.shape)) for place in places if group.name in place.keys)
            converged &= fixed_point
        objective += total
        group_scores[group.name] = total / count
        permutation |= found
        if group.kind != "permutation":
            permutation[group.name] = Monomial(found[group.name], signs)  # type: ignore[arg-type]
    ordered = {group.name: permutation[group.name] for group in spec.groups}
    action.check_permutation(spec, ordered)
    counts = {g.name: sum(g.name in place.keys for place in places) for g in spec.groups}
    return ActivationMatching(ordered, objective, group_scores, counts, dead, converged)


def _solve(
    group: Group, below: Sequence[Group], tables: Mapping[tuple[str, ...], np.ndarray]
) -> tuple[dict[str, np.ndarray], np.ndarray | None, float, bool]:
    """The best units of one group, and inside each of them of those that depend on it."""
    n = group.size
    alone = tables.get((group.name,), np.zeros((n, n)))
    if not below:
        score = np.abs(alone) if group.kind in ("signed", "signed_scaled") else alone
        found = assignment.solve(score)
        picked = alone[np.arange(n), found.columns]
        sign = np.where(picked < 0, -1, 1).astype(np.float32)
        return (
            {group.name: found.columns},
            sign if group.kind in ("signed", "signed_scaled") else None,
            float(found.value),
            True,
        )
    inner = {keys[1:]: x for keys, x in tables.items() if len(keys) > 1}
    total = np.array(alone)
    best: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    fixed = True
    for i in range(n):
        for j in range(n):
            half = {keys: (x.ndim // 2) for keys, x in inner.items()}
            here = {keys: x[(i, *[slice(None)] * (half[keys] - 1), j)] for keys, x in inner.items()}
            best[i, j], value, ended = _alternate(below, here)
            total[i, j] += value
            fixed &= ended
    outer = assignment.solve(total)
    orders = {group.name: outer.columns}
    for g in below:
        orders[g.name] = np.stack([best[i, int(outer.columns[i])][g.name] for i in range(n)])
    return orders, None, float(outer.value), fixed


def _alternate(
    groups: Sequence[Group], tables: Mapping[tuple[str, ...], np.ndarray]
) -> tuple[dict[str, np.ndarray], float, bool]:
    """Orders of a few groups by alternating assignments; exact where no table holds two."""
    orders: dict[str, np.ndarray | None] = {g.name: None for g in groups}
    value, best = -np.inf, orders
    for _ in range(50):
        for g in groups:
            total = np.zeros((g.size, g.size))
            for keys, x in tables.items():
                if g.name in keys:
                    total += _given_others(x, keys, g.name, orders)
            orders[g.name] = assignment.solve(total, previous=orders[g.name]).columns
        new = sum(_value(x, keys, orders) for keys, x in tables.items())
        if new <= value:
            return best, value, True  # type: ignore[return-value]
        value, best = new, dict(orders)
        if all(len(keys) == 1 for keys in tables):
            return best, value, True  # type: ignore[return-value]
    return best, value, False  # type: ignore[return-value]


def _given_others(
    x: np.ndarray, keys: tuple[str, ...], name: str, orders: Mapping[str, np.ndarray | None]
) -> np.ndarray:
    """A table over one group's pairs, the others at their orders, or at the mean over all."""
    names = list(keys)
    for other in keys:
        if other == name:
            continue
        axis, half = names.index(other), len(names)
        order = orders[other]
        x = np.moveaxis(x, (axis, half + axis), (0, 1))
        rows = np.arange(len(x))
        x = x.mean(1).sum(0) if order is None else x[rows, order].sum(0)
        names.remove(other)
    return x


def _value(x: np.ndarray, keys: tuple[str, ...], orders: Mapping[str, np.ndarray | None]) -> float:
    matrix = _given_others(x, keys, keys[0], orders)
    order = orders[keys[0]]
    assert order is not None
    return float(matrix[np.arange(len(order)), order].sum())


def activation_scores(
    spec: PermutationSpec,
    apply_fn: Callable[..., Any],
    params_a: PyTree,
    params_b: PyTree,
    batches: Any,
    *,
    score: Score = "correlation",
    inputs_fn: Callable[[PyTree], Any] | None = None,
    ridge: float = 1e-3,
    mesh: Any = None,
    progress: bool | None = None,
) -> dict[tuple[str, ...], np.ndarray]:
    """The scores that `activation_matching` solves, for figures and other solvers.

    Args:
        spec: As for `activation_matching`.
        apply_fn: As for `activation_matching`.
        params_a: As for `activation_matching`.
        params_b: As for `activation_matching`.
        batches: As for `activation_matching`.
        score: As for `activation_matching`.
        inputs_fn: As for `activation_matching`.
        ridge: As for `activation_matching`.
        mesh: As for `activation_matching`.
        progress: As for `activation_matching`.

    Returns:
        From the groups on which units depend, and their own, outermost first, to an array with the
        axes of A's units, then those of B's; summed over places.
    """
    return _scores(
        spec, apply_fn, params_a, params_b, batches, score, inputs_fn, ridge, mesh, progress
    )[0]


# --------------------------------------------------------------------------- moments


def _inputs(batch: PyTree) -> tuple[Any, ...]:
    if isinstance(batch, dict) and "inputs" in batch:
        return (batch["inputs"],)
    return (batch[0],) if isinstance(batch, (tuple, list)) else (batch,)


def _scores(
    spec, apply_fn, params_a, params_b, batches, score, inputs_fn, ridge, mesh, progress
) -> tuple[dict[tuple[str, ...], np.ndarray], list[_Place], dict[str, int]]:
    """Scores by groups, fixed indices first, then the axes of A's units, then those of B's."""
    if score not in SCORES:
        raise ValueError(f"score is {score!r}; expected one of {SCORES}.")
    inputs_fn = _inputs if inputs_fn is None else inputs_fn
    source = batches_.as_batches(batches)
    first = next(iter(source))
    _, places = _places(spec, apply_fn, params_a, inputs_fn(first))
    read = functools.partial(_read, spec, apply_fn, inputs_fn)
    shift_fn = jax.jit(lambda a, b, batch: [
        [jnp.mean(x, 0) for x in read(params, batch)] for params in (a, b)
    ])  # fmt: skip
    shifts = shift_fn(params_a, params_b, first)
    whiten = score == "cca"

    def moments(a: PyTree, b: PyTree, shifts: Any, batch: PyTree) -> list[dict[str, jax.Array]]:
        found = []
        for x, y, s, t in zip(read(a, batch), read(b, batch), *shifts, strict=True):
            x, y = x - s[None], y - t[None]
            pair = {
                "mean_a": x.mean(0), "mean_b": y.mean(0), "cross": _second(x, y),
                "square_a": jnp.square(x).mean(0), "square_b": jnp.square(y).mean(0),
            }  # fmt: skip
            if whiten:
                pair |= {"within_a": _second(x, x), "within_b": _second(y, y)}
            found.append(pair)
        return found

    with bars.bar(None, "activations", show=progress) as update:
        averaged = batches_.mean(moments, batches, mesh=mesh, progress=update)(
            params_a, params_b, shifts
        )
    averaged, shifts = jax.tree.map(lambda x: np.asarray(x, np.float64), (averaged, shifts))
    out: dict[tuple[str, ...], np.ndarray] = {}
    alive: dict[str, Any] = {group.name: False for group in spec.groups}
    for place, found, s, t in zip(places, averaged, *shifts, strict=True):
        matrix, lives = _score(found, s, t, score, ridge)
        fixed = matrix.shape[:-2]
        matrix = matrix.reshape(*fixed, *place.shape, *place.shape)
        out[place.keys] = out[place.keys] + matrix if place.keys in out else matrix
        lives = lives.reshape(2, *fixed, *place.shape)
        for i, key in enumerate(place.keys):
            others = tuple(1 + len(fixed) + k for k in range(len(place.keys)) if k > i)
            alive[key] = alive[key] | lives.any(others) if others else alive[key] | lives
    return out, places, {name: int((~np.asarray(x)).sum()) for name, x in alive.items()}


def _second(x: jax.Array, y: jax.Array) -> jax.Array:
    """Means over samples of products of units: `(samples, *fixed, u)` to `(*fixed, u, v)`."""
    fixed = tuple(range(1, x.ndim - 1))
    explicit = tree.explicit_sharding(x)
    whole = None if explicit is None else NamedSharding(explicit.mesh, PartitionSpec())
    product = lax.dot_general(
        x,
        y,
        (((0,), (0,)), (fixed, fixed)),
        precision=lax.Precision.HIGHEST,
        out_sharding=whole,
    )
    return product / x.shape[0]


def _score(
    found: Mapping[str, np.ndarray], s: np.ndarray, t: np.ndarray, score: str, ridge: float
) -> tuple[np.ndarray, np.ndarray]:
    """Scores `(*fixed, u, v)` in float64, and which units of A and of B change at all."""
    covariance = found["cross"] - found["mean_a"][..., :, None] * found["mean_b"][..., None, :]
    variances, lives = [], []
    for side, shift in (("a", s), ("b", t)):
        mean = found[f"mean_{side}"]
        variance = found[f"square_{side}"] - mean**2
        # What is left of a constant after float32 rounding is no variance.
        rounding = (8 * np.finfo(np.float32).eps * np.abs(mean + shift)) ** 2
        live = variance > rounding
        variances.append(np.where(live, variance, 1.0))
        lives.append(live)
    both = lives[0][..., :, None] & lives[1][..., None, :]
    if score == "cross_moment":
        a, b = (found[f"mean_{side}"] + x for side, x in (("a", s), ("b", t)))
        return covariance + a[..., :, None] * b[..., None, :], np.stack(lives)
    if score == "covariance":
        return covariance, np.stack(lives)
    if score == "cca":
        left, right = (_whitening(found, side, ridge) for side in ("a", "b"))
        return np.where(both, left @ covariance @ right, 0.0), np.stack(lives)
    scale = np.sqrt(variances[0][..., :, None] * variances[1][..., None, :])
    return np.where(both, covariance / scale, 0.0), np.stack(lives)


def _whitening(found: Mapping[str, np.ndarray], side: str, ridge: float) -> np.ndarray:
    mean, within = found[f"mean_{side}"], found[f"within_{side}"]
    covariance = within - mean[..., :, None] * mean[..., None, :]
    values, vectors = np.linalg.eigh(covariance)
    level = np.maximum(values, 0) + ridge * np.maximum(values.mean(-1, keepdims=True), 1e-30)
    return (vectors / np.sqrt(level)[..., None, :]) @ np.swapaxes(vectors, -1, -2)


# --------------------------------------------------------------------------- places


def _site_leaf(site: trace.Site) -> Leaf:
    axes = (*site.context, *site.axes)
    return Leaf("site", tuple(layout_size(x) for x in axes), axes)


def _places(
    spec: PermutationSpec, apply_fn: Callable[..., Any], params: PyTree, inputs: tuple[Any, ...]
) -> tuple[trace.Analysis, list[_Place]]:
    """Where each group of the spec is read, without the axes of unrelated groups."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when the spec was derived
        analysis = trace.analyze(apply_fn, params, *inputs)
    names = {group.name for group in spec.groups}
    missing = sorted(names - analysis.sites.keys())
    if missing:
        raise SpecError(
            f"groups {missing} are not among those that the function has, "
            f"{sorted(analysis.sites)}; derive the spec from this very function."
        )
    places: dict[_Place, None] = {}
    for group in spec.groups:
        for site in analysis.sites[group.name]:
            if not taps.reachable(analysis, site):
                continue
            leaf = _site_leaf(site)
            shapes = blocks(leaf, np.broadcast_to(np.int8(0), leaf.shape))
            for number, (factors, _) in enumerate(shapes):
                place = _place(spec, group, site, number, factors)
                if place is not None:
                    places[place] = None
    read = {key for place in places for key in place.keys}
    unread = [name for name in sorted(names) if name not in read]
    if unread:
        raise SpecError(
            f"groups {unread} are read nowhere that activations can be compared at; pin them, or "
            "match them by weights."
        )
    return analysis, list(places)


def _place(
    spec: PermutationSpec, group: Group, site: trace.Site, number: int, factors: Sequence[Factor]
) -> _Place | None:
    groups = {g.name for g in spec.groups}
    found = [f.name for f in factors]
    held = [name for name in found if name in groups]
    if group.name not in held or len(set(held)) < len(held):
        return None
    root = next((i for i in group.index if i in groups), group.name)
    family = {root, *(g.name for g in spec.groups if root in g.index)}
    if not set(held) <= family or root not in held:
        return None  # another group's axis: its order is not known here
    fixed = tuple(i for i in spec[group.name].index if i not in groups)
    if any(i not in found for i in fixed):
        return None
    keys = (root, *(g.name for g in spec.groups if g.name in held and g.name != root))
    axes = tuple(found.index(name) for name in (*fixed, *keys))
    shape = tuple(factors[found.index(name)].size for name in keys)
    return _Place(site, number, fixed, keys, axes, shape)


def _read(
    spec: PermutationSpec,
    apply_fn: Callable[..., Any],
    inputs_fn: Callable[[PyTree], tuple[Any, ...]],
    params: PyTree,
    batch: PyTree,
) -> list[jax.Array]:
    """The units at each place: `(samples, *fixed, units)`, float32 or wider."""
    inputs = inputs_fn(batch)
    analysis, places = _places(spec, apply_fn, params, inputs)
    sites = list({place.site: None for place in places})
    values = dict(zip(sites, taps.evaluate(analysis, sites, params, *inputs), strict=True))
    out = []
    for place in places:
        _, x = blocks(_site_leaf(place.site), values[place.site])[place.block]
        x = jnp.moveaxis(x, place.axes, range(-len(place.axes), 0))
        fixed = x.shape[x.ndim - len(place.axes) : x.ndim - len(place.keys)]
        x = x.reshape(-1, *fixed, int(np.prod(place.shape)))
        out.append(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    return out
