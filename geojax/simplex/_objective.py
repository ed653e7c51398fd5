"""The loss of a complex as a function of its parts: draws, data, volume, similarity.

One compiled function for each setting; `training` checks what it is given and runs it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from geojax import fit as fit_
from geojax import tree
from geojax._families import Split, combined, whole, wide
from geojax.simplex import _heights, volume
from geojax.simplex.weights import Target

__all__ = ["Settings", "Shape", "complex_loss", "draw", "log_probabilities_of", "regularizer_of"]

PyTree = Any


class Shape(NamedTuple):
    """A complex without its numbers, and which of its vertices train; known to a trace."""

    num_vertices: int
    split: Split
    simplices: tuple[tuple[int, ...], ...]  # those with a free vertex, which alone are drawn
    num_components: int  # 0: one complex, without an axis

    @property
    def one_each(self) -> bool:
        """Whether each simplex has exactly one free vertex, the same one."""
        return len(self.split.free) == 1 and bool(self.split.fixed)


class Settings(NamedTuple):
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


# -------------------------------------------------------------------------------- volumes


def _log_volumes(parts: dict[str, PyTree], shape: Shape, faces: Any) -> jax.Array:
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


def _total(parts: dict[str, PyTree], shape: Shape, faces: Any, volumes: str) -> jax.Array:
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


def draw(key, shape: Shape, num: int, log_probabilities: jax.Array, layers: int) -> jax.Array:
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


def log_probabilities_of(parts, shape: Shape, faces, choose) -> jax.Array:
    number = len(shape.simplices)
    if choose == "uniform" or number == 1:
        return jnp.zeros(number)
    if choose == "volume":
        found = jax.lax.stop_gradient(_log_volumes(parts, shape, faces))
        # All at zero volume, as at a start from the centroid: all alike.
        return jnp.where(jnp.any(jnp.isfinite(found)), found, jnp.zeros_like(found))
    return jnp.log(jnp.asarray(np.array(choose, np.float32)))


# -------------------------------------------------------------------------------- the loss


def _component_loss(loss_fn: Callable, shape: Shape, settings: Settings, faces: Any) -> Callable:
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
        log_probabilities = log_probabilities_of(parts, shape, faces, settings.choose)
        layers = settings.layers
        number = max(layers) + 1 if layers else 1
        drawn = draw(key_draw, shape, settings.num_samples, log_probabilities, number)
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
def complex_loss(loss_fn, shape: Shape, settings: Settings, faces, together: str) -> Callable:
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


def _similarity(parts, shape: Shape) -> jax.Array:
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
def regularizer_of(shape: Shape, settings: Settings, faces, weight, together) -> Callable | None:
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
