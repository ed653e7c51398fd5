r"""Training a complex: the expected loss over its simplices, less the log of their volume.

.. math:: \min_\theta \; E_{s, c} \Big[ L\big(\textstyle\sum_i c_i w_i\big) \Big]
    - \lambda \log \sum_s V_s

How it differs from Benton et al.'s code: the volume is a volume, of all simplices, in its height
form; losses of several draws are averaged; simplices are drawn by volume; the model is left alone;
and a weight of the volume that does nothing is reported.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from geojax import fit as fit_
from geojax import tree
from geojax._families import (
    Guarded,
    HeldFixed,
    Split,
    combined,
    each,
    masked,
    parts_of,
    whole,
    wide,
)
from geojax.simplex import _heights, sampling, volume
from geojax.simplex.complexes import SimplicialComplex
from geojax.simplex.weights import Target

__all__ = ["ComplexFit", "InertVolumeWarning", "fit"]

PyTree = Any
Choose = Literal["volume", "uniform"]
# Below this share of the gradient the volume is called inert.
_INERT = 1e-3
# What the share is made of, at every step.
_NORMS = ("gradient_norm", "volume_gradient_norm", "volume_weight")


class InertVolumeWarning(UserWarning):
    """The weight of the volume is so small that training ignored it."""


class ComplexFit(NamedTuple):
    """A trained complex.

    Attributes:
        complex: Its frozen vertices are as they were, to the bit.
        history: Per step of this call: 'loss', 'data_loss', 'gradient_norm', and with a weight of
            the volume 'volume_term', 'volume_weight', 'log_volume' (of all simplices that train)
            and 'volume_gradient_norm'; with weight decay 'penalty'. Of several complexes: sums of
            the losses, means of the rest, and 'data_loss_0', 'log_volume_0' and so on of each.
        evaluations: What `evaluate` returned, with the steps.
        start: The step at which this call began; more than 0 after a resume.
        state: The state of the training loop.
        volume_share: The median over steps of the norm of the volume's gradient over that of the
            whole; NaN without a weight of the volume. Below 1e-3 the volume did nothing. It is of
            all steps of the run, those before a resume included: checkpoints keep both norms. Of
            several complexes it is the mean volume's over the root mean square of the whole ones,
            so that their number does not matter.
    """

    complex: Any
    history: dict[str, np.ndarray]
    evaluations: Any
    start: int
    state: Any
    volume_share: float


class _Shape(NamedTuple):
    """A complex without its numbers, and which of its vertices train; known to a trace."""

    num_vertices: int
    split: Split
    simplices: tuple[tuple[int, ...], ...]  # those with a free vertex, which alone are drawn
    num_components: int  # 0: one complex, without an axis

    @property
    def one_each(self) -> bool:
        """Whether each simplex has exactly one free vertex, the same one."""
        return len(self.split.free) == 1 and bool(self.split.fixed)


class _Settings(NamedTuple):
    """How a step is made; hashable."""

    num_samples: int
    samples: str
    reduction: str
    choose: Any  # "volume", "uniform" or a tuple of probabilities
    weight_decay: float
    decay: str
    stochastic: str
    volumes: str
    similarity_weight: float
    layers: tuple[int, ...] | None  # of each leaf, where every layer has coefficients of its own


def _shape(complexes: Sequence[SimplicialComplex], free: Sequence[int], stacked: bool) -> _Shape:
    first = complexes[0]
    num = first.num_vertices
    given = list(free)
    if any(
        isinstance(i, bool) or not isinstance(i, (int, np.integer)) or not -num <= i < num
        for i in given
    ):
        raise ValueError(f"free is {free}; expected indices of the {num} vertices.")
    chosen = tuple(sorted({int(i) % num for i in given}))
    if not chosen:
        raise ValueError("free is empty; there is nothing to train.")
    touched = tuple(s for s in first.simplices if set(s) & set(chosen))
    for i in chosen:
        if not any(i in s for s in touched):
            raise ValueError(f"vertex {i} is free and belongs to no simplex.")
    fixed = tuple(i for i in range(num) if i not in chosen)
    return _Shape(num, Split(chosen, fixed), touched, len(complexes) if stacked else 0)


# -------------------------------------------------------------------------------- volumes


def _log_volumes(parts: dict[str, PyTree], shape: _Shape, faces: Any) -> jax.Array:
    """`(s,)`, differentiable in the free vertices."""
    if faces is not None:
        free = jax.tree.map(lambda x: x[0], parts["free"])
        return _heights.log_volumes(free, parts["fixed"], faces, parts["bases"])
    members = dict(zip(shape.split.free, tree.unstack(parts["free"]), strict=True))
    if shape.split.fixed:
        fixed = jax.lax.stop_gradient(parts["fixed"])
        members |= dict(zip(shape.split.fixed, tree.unstack(fixed), strict=True))
    found = [volume.log_volume(tree.stack([members[i] for i in s])) for s in shape.simplices]
    return jnp.stack(found)


def _total(parts: dict[str, PyTree], shape: _Shape, faces: Any, volumes: str) -> jax.Array:
    """The log volume that is rewarded."""
    if volumes == "original":
        points = whole(parts, shape.split)
        members = tree.unstack(points)
        return volume.original_log_volume(tree.stack([members[i] for i in shape.simplices[0]]))
    found = _log_volumes(parts, shape, faces)
    if volumes == "first":
        return found[0]
    if volumes == "each":
        return jnp.sum(found)
    # The logarithm of the sum, defined where some or all volumes are zero.
    top = jax.lax.stop_gradient(jnp.max(found))
    some = jnp.isfinite(top)
    shifted = jnp.where(some, found - jnp.where(some, top, 0), 0)
    return jnp.where(some, top + jnp.log(jnp.sum(jnp.exp(shifted))), -jnp.inf)


# -------------------------------------------------------------------------------- draws


def _draw(key, shape: _Shape, num: int, log_probabilities: jax.Array, layers: int) -> jax.Array:
    """Coefficients `(num, layers, n)`, uniform within a simplex that is drawn first for all."""
    key_simplex, key_weights = jax.random.split(key)
    width = max(len(s) for s in shape.simplices)
    place = np.zeros((len(shape.simplices), width, shape.num_vertices), np.float32)
    for s, simplex in enumerate(shape.simplices):
        place[s, np.arange(len(simplex)), list(simplex)] = 1
    draws = jax.random.exponential(key_weights, (num, layers, width))
    draws = jnp.maximum(draws, np.finfo(np.float32).tiny)
    if len(shape.simplices) == 1:
        placed = jnp.broadcast_to(jnp.asarray(place[0]), (num, *place[0].shape))
    else:
        chosen = jax.random.categorical(key_simplex, log_probabilities, shape=(num,))
        placed = jnp.take(jnp.asarray(place), chosen, axis=0)
    spread = jnp.einsum("hgl,hln->hgn", draws, placed, precision=jax.lax.Precision.HIGHEST)
    return spread / jnp.sum(spread, axis=2, keepdims=True)


def _log_probabilities(parts, shape: _Shape, faces, choose) -> jax.Array:
    number = len(shape.simplices)
    if choose == "uniform" or number == 1:
        return jnp.zeros(number)
    if choose == "volume":
        found = jax.lax.stop_gradient(_log_volumes(parts, shape, faces))
        # All at zero volume, as at a start from the centroid: all alike.
        return jnp.where(jnp.any(jnp.isfinite(found)), found, jnp.zeros_like(found))
    return jnp.log(jnp.asarray(np.array(choose, np.float32)))


# -------------------------------------------------------------------------------- the loss


def _component_loss(loss_fn: Callable, shape: _Shape, settings: _Settings, faces: Any) -> Callable:
    """`(parts, batch, key)` to the data loss and the decay of one complex."""
    with_key = fit_.takes_key(loss_fn)

    def at(params, batch, key):
        loss = loss_fn(params, batch, key) if with_key else loss_fn(params, batch)
        penalty = jnp.zeros((), jnp.float32)
        if settings.weight_decay and settings.decay == "point":
            squares = [jnp.sum(jnp.square(x)) for x in jax.tree.leaves(wide(params))]
            penalty = 0.5 * settings.weight_decay * sum(squares)
        return loss, penalty

    def loss(parts, batch, key):
        key_draw, key_loss = jax.random.split(key)
        log_probabilities = _log_probabilities(parts, shape, faces, settings.choose)
        layers = settings.layers
        number = max(layers) + 1 if layers else 1
        drawn = _draw(key_draw, shape, settings.num_samples, log_probabilities, number)
        weights = drawn[:, 0]
        if layers:
            structure = jax.tree.structure(parts["free"])
            weights = structure.unflatten([drawn[:, place] for place in layers])
        if settings.stochastic == "independent":
            keys = jax.random.split(key_loss, settings.num_samples)
        else:
            keys = jnp.broadcast_to(key_loss, (settings.num_samples,))
        if settings.samples == "vmap":
            points = combined(parts, shape.split, weights)
            losses, penalties = jax.vmap(at, in_axes=(0, None, 0))(points, batch, keys)
        else:
            found = [
                at(combined(parts, shape.split, _component(weights, h)), batch, keys[h])
                for h in range(settings.num_samples)
            ]
            losses, penalties = (jnp.stack(list(x)) for x in zip(*found, strict=True))
        data = jnp.sum(losses) if settings.reduction == "sum" else jnp.mean(losses)
        penalty = jnp.mean(penalties)
        if settings.weight_decay and settings.decay == "vertices":
            squares = [jnp.sum(jnp.square(x)) for x in jax.tree.leaves(wide(parts["free"]))]
            penalty = penalty + 0.5 * settings.weight_decay * sum(squares)
        return data, penalty

    return loss


@functools.lru_cache(maxsize=32)
def _complex_loss(loss_fn, shape: _Shape, settings: _Settings, faces, together: str) -> Callable:
    """The loss of the parts of all components; one function per setting, compiled once."""
    one = _component_loss(loss_fn, shape, settings, faces)

    def loss(parts, batch, key):
        if not shape.num_components:
            data, penalty = one(parts, batch, key)
            return data + penalty.astype(data.dtype), {"data_loss": data, "penalty": penalty}
        number = shape.num_components
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(number))
        if together == "vmap":
            data, penalty = jax.vmap(one, in_axes=(0, None, 0))(parts, batch, keys)
        else:
            found = [one(_component(parts, i), batch, keys[i]) for i in range(number)]
            data, penalty = (jnp.stack(list(x)) for x in zip(*found, strict=True))
        metrics = {"data_loss": jnp.sum(data), "penalty": jnp.sum(penalty)}
        metrics |= {f"data_loss_{i}": data[i] for i in range(number)}
        return jnp.sum(data) + jnp.sum(penalty).astype(data.dtype), metrics

    return loss


def _component(parts: PyTree, i: int) -> PyTree:
    return jax.tree.map(lambda x: x[i], parts)


def _similarity(parts, shape: _Shape) -> jax.Array:
    """The mean squared cosine between two vertices, over all pairs with a free one."""
    members = tree.unstack(whole(parts, shape.split))
    pairs = [
        (i, j)
        for i in range(shape.num_vertices)
        for j in range(i)
        if i in shape.split.free or j in shape.split.free
    ]
    norms = [tree.norm(x) for x in members]
    cosines = [tree.vdot(members[i], members[j]) / (norms[i] * norms[j]) for i, j in pairs]
    return jnp.mean(jnp.square(jnp.stack(cosines)))


@functools.lru_cache(maxsize=32)
def _regularizer(shape: _Shape, settings: _Settings, faces, weight, together) -> Callable | None:
    """The volume's part of the loss, once a step, as `fit` takes it."""
    if weight == 0 and settings.similarity_weight == 0:
        return None

    def measure(parts):
        def total(free):
            return _total(parts | {"free": free}, shape, faces, settings.volumes)

        return jax.value_and_grad(total)(parts["free"])

    @jax.custom_vjp
    def rewarded(parts):
        return measure(parts)[0], jnp.zeros(())

    def forward(parts):
        value, slope = measure(parts)
        return (value, tree.norm(slope)), (slope, parts)

    def backward(saved, cotangents):
        slope, parts = saved
        moved = jax.tree.map(lambda x: x * cotangents[0].astype(x.dtype), slope)
        return (jax.tree.map(jnp.zeros_like, parts) | {"free": moved},)

    rewarded.defvjp(forward, backward)

    def one(parts, step):
        terms, measured = {}, {}
        if weight != 0:
            value, slope = rewarded(parts)
            factor, reward = _reward(weight, step, value)
            # At volume zero there is no direction, and minus infinity is no loss.
            terms["volume_term"] = jnp.where(jnp.isfinite(value), -reward, jnp.zeros_like(value))
            measured = {
                "log_volume": value,
                "volume_weight": factor,
                "volume_gradient_norm": factor * slope,
            }
        if settings.similarity_weight:
            terms["similarity_term"] = settings.similarity_weight * _similarity(parts, shape)
        return terms, measured

    def regularizer(parts, step):
        if not shape.num_components:
            return one(parts, step)
        number = shape.num_components
        if together == "vmap":
            terms, measured = jax.vmap(one, in_axes=(0, None))(parts, step)
        else:
            found = [one(_component(parts, i), step) for i in range(number)]
            terms, measured = jax.tree.map(lambda *x: jnp.stack(x), *found)
        volumes = measured.get("log_volume", ())
        each = {f"log_volume_{i}": volumes[i] for i in range(number if weight != 0 else 0)}
        means = {name: jnp.mean(x) for name, x in measured.items()}
        return {name: jnp.sum(x) for name, x in terms.items()}, means | each

    return regularizer


def _reward(weight: Any, step: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The weight in force at this step, and what it rewards the log volume with."""
    if isinstance(weight, Target):
        short = jnp.maximum(weight.log_volume - value, 0)
        return jax.lax.stop_gradient(weight.weight * short), -0.5 * weight.weight * short * short
    factor = weight(step) if callable(weight) else weight
    factor = jnp.asarray(factor, value.dtype)
    return factor, factor * value


# -------------------------------------------------------------------------------- the run


def _settings(shape: _Shape, **given: Any) -> _Settings:
    for name, least in (("num_samples", 1),):
        value = given[name]
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}.")
    for name, known in (
        ("samples", ("sequential", "vmap")),
        ("reduction", ("mean", "sum")),
        ("decay", ("point", "vertices")),
        ("stochastic", ("shared", "independent")),
        ("volumes", ("all", "first", "each", "original")),
    ):
        if given[name] not in known:
            raise ValueError(f"{name} is {given[name]!r}; expected one of {known}.")
    for name in ("weight_decay", "similarity_weight"):
        if not given[name] >= 0:
            raise ValueError(f"{name} is {given[name]!r}; expected at least 0.")
        given[name] = float(given[name])
    choose = given["choose"]
    dimensions = {len(s) for s in shape.simplices}
    if isinstance(choose, str):
        if choose not in ("volume", "uniform"):
            raise ValueError(
                f"choose is {choose!r}; expected 'volume', 'uniform' or a probability for each of "
                f"the {len(shape.simplices)} simplices with a free vertex."
            )
        if choose == "volume" and len(dimensions) > 1:
            raise ValueError(
                "choose='volume' compares volumes of different dimensions, of simplices with "
                f"{sorted(dimensions)} vertices; give a probability for each, or 'uniform'."
            )
    else:
        shares = np.asarray(choose, np.float64)
        if shares.shape != (len(shape.simplices),) or (shares < 0).any() or not shares.sum() > 0:
            raise ValueError(
                f"choose has shape {shares.shape}; expected {len(shape.simplices)} nonnegative "
                "probabilities, one for each simplex with a free vertex."
            )
        given["choose"] = tuple((shares / shares.sum()).tolist())
    given["num_samples"] = int(given["num_samples"])
    return _Settings(**given)


def _check_weight(weight: Any, settings: _Settings, shape: _Shape) -> None:
    if isinstance(weight, Target) or callable(weight):
        pass
    elif isinstance(weight, bool) or not isinstance(weight, (int, float, np.number)) or weight < 0:
        raise ValueError(
            f"volume_weight is {weight!r}; expected a number of at least 0, a function of the "
            "step, or a simplex.Target."
        )
    if (callable(weight) or weight != 0) and settings.volumes == "all":
        dimensions = {len(s) for s in shape.simplices}
        if len(dimensions) > 1:
            raise ValueError(
                "volumes='all' adds volumes of different dimensions, of simplices with "
                f"{sorted(dimensions)} vertices; 'each' adds their logarithms."
            )


class _Prepared(NamedTuple):
    """What a run hands to `geojax.fit`."""

    loss: Callable
    parts: dict[str, PyTree]
    optimizer: Any
    regularizer: Callable | None
    frozen: Any
    shape: _Shape


def _prepare(
    loss_fn, complex, optimizer, *, free, together, volume_weight, layerwise, **given
) -> _Prepared:
    """The loss, the parts and the optimizer of a run, checked."""
    stacked = not isinstance(complex, SimplicialComplex)
    complexes = _checked_complexes(complex) if stacked else [complex]
    if together not in ("vmap", "sequential"):
        raise ValueError(f"together is {together!r}; expected 'vmap' or 'sequential'.")
    shape = _shape(complexes, free, stacked)
    layers = None
    if layerwise is not False:
        layers = sampling.layer_numbers(complexes[0].vertices, layerwise)
    settings = _settings(shape, layers=layers, **given)
    _check_weight(volume_weight, settings, shape)
    parts = [parts_of(one.vertices, shape.split) for one in complexes]
    faces = None
    weighted = callable(volume_weight) or volume_weight != 0
    by_volume = settings.choose == "volume" and len(shape.simplices) > 1
    if shape.one_each and (by_volume or (weighted and settings.volumes != "original")):
        at = {i: place for place, i in enumerate(shape.split.fixed)}
        below = tuple(tuple(at[i] for i in s if i in at) for s in shape.simplices)
        made = [_heights.bases(one["fixed"], below) for one in parts]
        faces = made[0][0]._replace(passes=max(found.passes for found, _ in made))
        parts = [one | {"bases": arrays} for one, (_, arrays) in zip(parts, made, strict=True)]
    stacks = tree.stack(parts) if stacked else parts[0]
    labels = tuple((name, name == "free") for name in stacks)
    rule = masked(optimizer, labels)
    return _Prepared(
        _complex_loss(loss_fn, shape, settings, faces, together),
        stacks,
        each(rule) if stacked else rule,
        _regularizer(shape, settings, faces, volume_weight, together),
        HeldFixed() if len(stacks) > 1 else None,
        shape,
    )


def fit(
    loss_fn: Callable[..., Any],
    complex: SimplicialComplex | Sequence[SimplicialComplex],
    batches: Any,
    optimizer: Any,
    num_steps: int,
    *,
    key: jax.Array,
    free: Sequence[int] = (-1,),
    num_samples: int = 5,
    samples: Literal["sequential", "vmap"] = "sequential",
    reduction: Literal["mean", "sum"] = "mean",
    choose: Choose | Sequence[float] = "volume",
    volume_weight: float | Callable[[jax.Array], jax.Array] | Target = 0.0,
    volumes: Literal["all", "first", "each", "original"] = "all",
    weight_decay: float = 0.0,
    decay: Literal["point", "vertices"] = "point",
    similarity_weight: float = 0.0,
    layerwise: bool | Callable[[str], Any] = False,
    stochastic: Literal["shared", "independent"] = "shared",
    together: Literal["vmap", "sequential"] = "vmap",
    evaluate: Callable[[Any, int], dict[str, Any]] | None = None,
    evaluate_every: int | None = None,
    **options: Any,
) -> ComplexFit:
    """Train some vertices of a complex so that the loss is low within its simplices.

    A step draws `num_samples` points, each uniform within a simplex that has a free vertex, and
    costs as many ordinary gradients; with one free vertex its cost beyond them is a few reads of
    the frozen vertices, whatever their number.

    Args:
        loss_fn: `(params, batch)` or `(params, batch, key)` to the mean loss, a scalar.
        complex: The complex; or several of the same simplices, trained side by side, each as if
            alone, but for the order of the data that they share.
        batches: One batch or a re-iterable.
        optimizer: An optax transformation; it sees the free vertices alone, stacked `(f, ...)`. Of
            several complexes each has a state of its own.
        num_steps: Optimizer steps.
        key: For the draws, dropout and augmentation; complex i of several uses `fold_in` with i.
        free: The vertices that train: by default the last, as when a simplex grows. All of them,
            `range(n)`, trains a subspace from scratch.
        num_samples: Points drawn in a step.
        samples: "sequential", or "vmap" for all points at once: faster on accelerators for dense
            models, with more memory.
        reduction: "mean" of the losses; "sum" as in the original's code, which multiplies the
            learning rate by `num_samples` and divides the weight of the volume by it.
        choose: How a simplex is drawn: by its "volume" as it is at that step, "uniform" as in the
            original's code, or by given probabilities.
        volume_weight: Lambda: what a unit of log volume is worth in units of the loss; a number, a
            function of the step, or a `Target`. See `simplex.weights` for the original's. What
            works is 1e-3 to 1e-2 of a loss of about 1; what does nothing raises a warning.
        volumes: "all": the log of the sum of the volumes that a free vertex belongs to. "each": the
            sum of their logs, which also goes for mixed dimensions. "first": of the first simplex
            alone. "original": log(V^2 + 1e-4) of the first simplex by Cayley-Menger determinant in
            float32, as the original's code has it; about twice log V, and wrong where flat.
        weight_decay: The factor of half the squared norm that is added to the loss.
        decay: Of which norm: the "point" that was drawn, as in Garipov et al.; or the free
            "vertices", as in the original's code.
        similarity_weight: The factor of the mean squared cosine between vertices, for subspaces
            from scratch (Wortsman et al. 2021).
        layerwise: Draw coefficients for every layer apart, within one simplex for all: points then
            fill a larger set, of which the simplex is the diagonal. A layer is all leaves of one
            parent, as a kernel and its bias; or a function of a leaf's path names its layer.
        stochastic: Whether the points of a step share the key of dropout, or have their own.
        together: Several complexes under "vmap", or one after another within a step, which is
            faster for convolutions on a CPU.
        evaluate: `(complex, step) -> dict of numbers`, every `evaluate_every` steps.
        evaluate_every: Steps between evaluations.
        **options: Further options of `geojax.fit.fit`: `transform`, `mesh`, `checkpoint` (with
            which it resumes to the bit), `log`, `accumulate`, `progress` and so on.

    Returns:
        A `ComplexFit`; its `complex` is a tuple where several were given. Memory: the vertices, and
        of the free ones an optimizer state and a gradient.

    Raises:
        ValueError: If an option is unknown or does not go with the complex; for a volume on frozen
            vertices that are affinely dependent.
        NonFiniteError: As `geojax.fit.fit`.

    Warns:
        InertVolumeWarning: If the volume's gradient was below 1e-3 of the whole, the median over
            all steps of the run, those before a resume included.

    Example:
        >>> import optax
        >>> from geojax.simplex import single
        >>> loss = lambda p, batch: jnp.sum(jnp.square(p["w"][1] - batch))
        >>> start = single({"w": jnp.array([[0.0, 0.0], [0.5, 0.5]])})
        >>> found = fit(loss, start, jnp.zeros(1), optax.sgd(0.1), 200, key=jax.random.key(0),
        ...             volume_weight=0.01)
        >>> ends = found.complex.vertices["w"]
        >>> bool(abs(ends[1, 1]) < 0.1), bool(abs(ends[1, 0]) > 0.5)  # longer, where that is free
        (True, True)

    Reference:
        Benton, Maddox, Lotfi and Wilson, "Loss Surface Simplexes for Mode Connecting Volumes and
        Fast Ensembling", ICML 2021, equation 2.
    """
    made = _prepare(
        loss_fn, complex, optimizer, free=free, together=together, volume_weight=volume_weight,
        num_samples=num_samples, samples=samples, reduction=reduction, choose=choose,
        weight_decay=weight_decay, decay=decay, stochastic=stochastic, volumes=volumes,
        similarity_weight=similarity_weight, layerwise=layerwise,
    )  # fmt: skip
    for name in ("frozen", "has_metrics", "regularizer", "remember"):
        if name in options:
            raise ValueError(f"{name} is set by simplex.fit; use `free` or `volume_weight`.")
    shape, stacked = made.shape, made.shape.num_components > 0
    simplices = (complex if isinstance(complex, SimplicialComplex) else complex[0]).simplices

    def out(parts: dict[str, PyTree]) -> Any:
        if not stacked:
            return SimplicialComplex(whole(parts, shape.split), simplices)
        each = [dict(zip(parts, x, strict=True)) for x in zip(*map(tree.unstack, parts.values()),
                                                              strict=True)]  # fmt: skip
        return tuple(SimplicialComplex(whole(x, shape.split), simplices) for x in each)

    def hook(parts: dict[str, PyTree], step: int) -> dict[str, Any]:
        assert evaluate is not None
        return evaluate(out(parts), step)

    if options.get("checkpoint") is not None:
        options = options | {"checkpoint": Guarded(options["checkpoint"], made.parts)}
    result = fit_.fit(
        made.loss, made.parts, batches, made.optimizer, num_steps, key=key, has_metrics=True,
        regularizer=made.regularizer, frozen=made.frozen,
        remember=_NORMS if volume_weight != 0 else (),
        evaluate=None if evaluate is None else hook, evaluate_every=evaluate_every, **options,
    )  # fmt: skip
    history = dict(result.history)
    if not weight_decay:
        history.pop("penalty", None)
    share = _share(result.remembered, max(shape.num_components, 1))
    if share < _INERT:
        last = result.remembered["volume_weight"][-1]
        warnings.warn(
            f"simplex.fit: the volume's gradient was {share:.1e} of the whole (the median over "
            f"the steps): the volume did nothing. Raise volume_weight (it was {last:.1e}); "
            "1e-3 to 1e-2 of the loss is where it acts.",
            InertVolumeWarning,
            stacklevel=2,
        )
    trained = out(result.params)
    return ComplexFit(
        trained, history, result.evaluations, result.start, result.state, float(share)
    )


def _checked_complexes(given: Sequence[SimplicialComplex]) -> list[SimplicialComplex]:
    found = list(given)
    if not found or not all(isinstance(x, SimplicialComplex) for x in found):
        raise TypeError("complex: expected a SimplicialComplex or a sequence of them.")
    for place, other in enumerate(found[1:], 1):
        if other.simplices != found[0].simplices:
            raise ValueError(
                f"complex {place} has the simplices {other.simplices} and complex 0 "
                f"{found[0].simplices}; complexes that train together must agree."
            )
        tree.check_same(found[0].vertices, other.vertices, names=("complex 0", f"complex {place}"))
    return found


def _share(remembered: dict[str, np.ndarray], num: int) -> float:
    """The median share of the volume in the gradient, over the steps where it is known."""
    if not remembered:
        return float("nan")
    # The gradients of several complexes are one vector to `fit`.
    whole = np.maximum(remembered["gradient_norm"] / np.sqrt(num), np.finfo(np.float32).tiny)
    shares = remembered["volume_gradient_norm"] / whole
    known = shares[~np.isnan(shares)]
    return float(np.median(known)) if len(known) else float("nan")
