"""Ensembles drawn from simplices of low loss: members streamed, predictions averaged."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from geojax import ensemble, tree
from geojax.simplex import sampling, volume
from geojax.simplex.complexes import SimplicialComplex

__all__ = ["component_weights", "members", "predict", "running"]

PyTree = Any
Complexes = SimplicialComplex | Sequence[SimplicialComplex]
Weights = Literal["equal", "volume"] | Sequence[float] | np.ndarray


def _components(complexes: Complexes) -> list[SimplicialComplex]:
    found = [complexes] if isinstance(complexes, SimplicialComplex) else list(complexes)
    for i, one in enumerate(found):
        if not isinstance(one, SimplicialComplex):
            raise TypeError(
                f"complexes: component {i} is a {type(one).__name__}; expected a SimplicialComplex "
                "(`single` makes one of stacked points)."
            )
    if not found:
        raise ValueError("complexes: expected at least one component, got none.")
    return found


def members(
    key: jax.Array,
    complexes: Complexes,
    num_samples: int = 25,
    *,
    choose: sampling.Choice = "volume",
) -> Callable[[], Iterator[PyTree]]:
    """Networks drawn from one or several complexes, one at a time.

    Args:
        key: A typed key; component i uses `fold_in(key, i)`.
        complexes: One complex, or the components of an ensemble.
        num_samples: Members of each component.
        choose: How a simplex is picked within a component: see `probabilities`.

    Returns:
        A function without arguments to an iterator over the members, component by component:
        what `geojax.ensemble.predict` takes as points. Each call gives the same members, and one
        is held at a time.

    Raises:
        ValueError: As `probabilities`, or if there is nothing to draw.

    Example:
        >>> import jax.numpy as jnp
        >>> from geojax.simplex import single
        >>> edge = single({"w": jnp.array([0.0, 1.0])})
        >>> len(list(members(jax.random.key(0), [edge, edge], 3)()))
        6
    """
    parts = _components(complexes)
    if not isinstance(num_samples, (int, np.integer)) or num_samples < 1:
        raise ValueError(f"num_samples is {num_samples!r}; expected an integer of at least 1.")
    drawn = [
        np.asarray(
            sampling.sample_weights(jax.random.fold_in(key, i), part, num_samples, choose=choose)
        )
        for i, part in enumerate(parts)
    ]

    def stream() -> Iterator[PyTree]:
        for part, weights in zip(parts, drawn, strict=True):
            for row in weights:
                yield _at(part.vertices, row)

    return stream


@jax.jit
def _at(vertices: PyTree, weights: jax.Array) -> PyTree:
    return tree.combine(vertices, weights)


def component_weights(complexes: Complexes, weights: Weights = "equal") -> np.ndarray:
    """What each component counts for, `(num_components,)`, summing to 1.

    Args:
        complexes: As for `members`.
        weights: "equal"; "volume", in proportion to the whole volume of each, so that members are
            uniform over the union; or numbers, divided by their sum.

    Raises:
        ValueError: For volumes of different dimensions or that are all zero; for numbers that are
            negative, not finite, all zero or too many.
    """
    parts = _components(complexes)
    if isinstance(weights, str):
        if weights not in ("equal", "volume"):
            raise ValueError(
                f"component_weights is {weights!r}; expected 'equal', 'volume' or {len(parts)} "
                "numbers."
            )
        if weights == "equal":
            return np.full(len(parts), 1 / len(parts))
        dimensions = [part.dimensions for part in parts]
        if len({d for each in dimensions for d in each}) > 1:
            raise ValueError(
                f"component_weights='volume': the components have dimensions {dimensions}; volumes "
                "of different dimensions are not comparable. Give the weights, or 'equal'."
            )
        logs = np.array([float(volume.log_total_volume(part)) for part in parts])
        if not (logs > -np.inf).any():
            raise ValueError("component_weights='volume': every component has volume 0.")
        found = np.exp(logs - logs.max())
        return found / found.sum()
    found = np.asarray(weights, np.float64)
    if found.shape != (len(parts),) or not (np.isfinite(found) & (found >= 0)).all():
        raise ValueError(
            f"component_weights is {weights!r}; expected {len(parts)} nonnegative numbers."
        )
    if not found.sum() > 0:
        raise ValueError(f"component_weights is {weights!r}; expected one that is not zero.")
    return found / found.sum()


def predict(
    model_fn: Callable[..., jax.Array],
    complexes: Complexes,
    batches: Any,
    *,
    key: jax.Array,
    num_samples: int = 25,
    choose: sampling.Choice = "volume",
    component_weights: Weights = "equal",
    mode: ensemble.Mode = "probabilities",
    state_fn: Callable[[PyTree], PyTree] | None = None,
    mesh: Mesh | NamedSharding | None = None,
    progress: bool | None = None,
) -> np.ndarray:
    """The averaged predictions of networks drawn from simplices of low loss (ESPRO).

    Args:
        model_fn: `(params, batch)` to outputs `(n, ..., num_classes)`, as for `ensemble.predict`;
            with `state_fn`, `(params, state, batch)`.
        complexes: One complex, or the components of the ensemble.
        batches: One batch or a re-iterable, read once for each member.
        key: A typed key, see `members`.
        num_samples: Members of each component.
        choose: How a simplex is picked within a component: see `probabilities`.
        component_weights: What a component counts for: see the function of that name.
        mode: What is averaged: see `ensemble.predict`.
        state_fn: From the parameters of a member to the state there. A network with BatchNorm
            needs it: `lambda params: statistics.refresh(apply_fn, params, state, batches)`.
        mesh: Split each batch over this mesh's first axis.
        progress: True or False for a bar; by default one appears when it takes long.

    Returns:
        `(num_examples, ..., num_classes)` log-probabilities, float64 on the host. Cost: a pass over
        the data for each member; memory: one member besides the complexes.

    Raises:
        ValueError: As `members`, `component_weights` and `ensemble.predict`.

    Example:
        >>> import jax.numpy as jnp
        >>> from geojax.simplex import single
        >>> edge = single({"w": jnp.zeros((2, 1, 3))})
        >>> data = np.ones((2, 1), np.float32)
        >>> out = predict(lambda p, batch: batch @ p["w"], edge, data, key=jax.random.key(0))
        >>> np.exp(out).round(4).tolist()
        [[0.3333, 0.3333, 0.3333], [0.3333, 0.3333, 0.3333]]

    Reference:
        Benton et al., "Loss Surface Simplexes for Mode Connecting Volumes and Fast Ensembling",
        ICML 2021, section 5; 25 members in each simplex. The released code has no such function.
    """
    stream = members(key, complexes, num_samples, choose=choose)
    return ensemble.predict(
        model_fn, stream, batches, mode=mode, state_fn=state_fn, mesh=mesh, progress=progress,
        weights=_of_members(complexes, component_weights, num_samples),
    )  # fmt: skip


def running(
    model_fn: Callable[..., jax.Array],
    complexes: Complexes,
    batches: Any,
    *,
    key: jax.Array,
    num_samples: int = 25,
    choose: sampling.Choice = "volume",
    component_weights: Weights = "equal",
    mode: ensemble.Mode = "probabilities",
    label_fn: Callable[[PyTree], Any] | None = None,
    state_fn: Callable[[PyTree], PyTree] | None = None,
    mesh: Mesh | NamedSharding | None = None,
    progress: bool | None = None,
) -> ensemble.Running:
    """How such an ensemble grows with its members: `ensemble.running`, component by component.

    Args:
        model_fn: As for `predict`.
        complexes: As for `predict`.
        batches: One batch or a re-iterable, of `(inputs, labels)` or dicts with these entries.
        key: As for `predict`, with the same members.
        num_samples: As for `predict`.
        choose: As for `predict`.
        component_weights: As for `predict`.
        mode: As for `predict`.
        label_fn: `batch -> labels`, for batches of another form.
        state_fn: As for `predict`.
        mesh: As for `predict`.
        progress: As for `predict`.

    Raises:
        ValueError: As `predict`.
    """
    stream = members(key, complexes, num_samples, choose=choose)
    return ensemble.running(
        model_fn, stream, batches, mode=mode, label_fn=label_fn, state_fn=state_fn, mesh=mesh,
        progress=progress, weights=_of_members(complexes, component_weights, num_samples),
    )  # fmt: skip


def _of_members(complexes: Complexes, weights: Weights, num_samples: int) -> np.ndarray:
    return np.repeat(component_weights(complexes, weights) / num_samples, num_samples)
