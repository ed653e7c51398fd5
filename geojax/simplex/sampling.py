"""Points drawn from a complex: a simplex first, then coefficients uniform over it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from geojax import tree
from geojax.simplex import volume
from geojax.simplex.complexes import SimplicialComplex

__all__ = [
    "Choice",
    "Sampled",
    "dirichlet",
    "layer_numbers",
    "probabilities",
    "sample_layer_weights",
    "sample_weights",
    "sample_with_simplices",
]

PyTree = Any
Choice = Literal["volume", "uniform"] | Sequence[float] | np.ndarray | jax.Array


class Sampled(NamedTuple):
    """Points of a complex.

    Attributes:
        weights: `(num_samples, n)`, nonnegative, rows that sum to 1; zero outside the simplex.
        simplices: `(num_samples,)` which simplex each lies in, by its number.
    """

    weights: jax.Array
    simplices: jax.Array


def dirichlet(key: jax.Array, num_samples: int, n: int) -> jax.Array:
    """Coefficients uniform over the simplex of n vertices: the flat Dirichlet distribution.

    Exponential variables, divided by their sum. An affine map keeps uniformity, so that their
    points are uniform in parameter space whatever the shape of the simplex.

    Args:
        key: A typed key.
        num_samples: How many.
        n: The number of vertices, at least 1.

    Returns:
        `(num_samples, n)` float32, nonnegative, rows that sum to 1. Never NaN.

    Example:
        >>> dirichlet(jax.random.key(0), 2, 1).tolist()
        [[1.0], [1.0]]
    """
    if n < 1 or num_samples < 0:
        raise ValueError(f"num_samples is {num_samples} and n {n}; expected at least 0 and 1.")
    return _normalized(key, int(num_samples), np.ones((1, int(n)), bool), None)


@functools.partial(jax.jit, static_argnums=(1, 4))
def _normalized(
    key: jax.Array, num: int, inside: Any, simplices: Any, layers: int | None = None
) -> jax.Array:
    """Exponentials of the vertices of each sample's simplex over their sum."""
    shape = (num, inside.shape[1]) if layers is None else (num, layers, inside.shape[1])
    # From (0, 1), both ends left out, so that a sum is neither zero nor infinite.
    uniform = jax.random.uniform(key, shape, minval=jnp.finfo(jnp.float32).tiny)
    members = jnp.asarray(inside)
    if simplices is not None:
        members = members[simplices] if layers is None else members[simplices][:, None]
    drawn = jnp.where(jnp.broadcast_to(members, shape), -jnp.log(uniform), 0)
    return drawn / jnp.sum(drawn, axis=-1, keepdims=True)


def probabilities(complex: SimplicialComplex, choose: Choice = "volume") -> Any:
    """With what probability a point lies in each simplex, `(num_simplices,)`.

    Args:
        complex: Simplices of one dimension, unless the probabilities are given or equal.
        choose: "volume": in proportion to it, so that points are uniform over the complex;
            "uniform": all equal; or numbers, one for each simplex, divided by their sum.

    Returns:
        float32, on the host where the vertices are not traced. Compute it once for many draws.

    Raises:
        ValueError: For volumes of different dimensions, or that are all zero; for numbers that are
            negative, not finite, all zero or too many.

    Example:
        >>> from geojax.simplex import chain
        >>> path = chain({"w": jnp.array([[0.0], [1.0], [4.0]])})
        >>> probabilities(path).tolist(), probabilities(path, "uniform").tolist()
        ([0.25, 0.75], [0.5, 0.5])
    """
    num = len(complex.simplices)
    if isinstance(choose, str):
        if choose not in ("volume", "uniform"):
            raise ValueError(
                f"choose is {choose!r}; expected 'volume', 'uniform' or {num} probabilities."
            )
        if choose == "uniform" or num == 1:
            return np.full(num, 1 / num, np.float32)
        if len(set(complex.dimensions)) > 1:
            raise ValueError(
                f"choose='volume': the simplices have dimensions {complex.dimensions}, and lengths "
                f"are no areas; give {num} probabilities, or choose='uniform'."
            )
        logs = volume.log_volumes(complex)
        if isinstance(logs, Tracer):
            # Where all volumes are zero this is NaN, and so are the weights.
            return jax.nn.softmax(logs).astype(jnp.float32)
        logs = np.asarray(logs, np.float64)
        if np.isnan(logs).any():
            raise ValueError("choose='volume': a vertex holds NaN or infinity.")
        if not (logs > -np.inf).any():
            raise ValueError(
                "choose='volume': every simplex has volume 0; use choose='uniform', or move a "
                "vertex (`add_vertex` with jitter)."
            )
        shares = np.exp(logs - logs.max())
        return (shares / shares.sum()).astype(np.float32)
    if np.shape(choose) != (num,):
        raise ValueError(
            f"choose has shape {np.shape(choose)}; expected ({num},), one probability for each "
            "simplex."
        )
    if isinstance(choose, Tracer):
        return (choose / jnp.sum(choose)).astype(jnp.float32)
    shares = np.asarray(choose, np.float64)
    if not (np.isfinite(shares) & (shares >= 0)).all() or not shares.sum() > 0:
        raise ValueError(f"choose is {shares}; expected nonnegative numbers, not all zero.")
    return (shares / shares.sum()).astype(np.float32)


def sample_weights(
    key: jax.Array,
    complex: SimplicialComplex,
    num_samples: int,
    *,
    choose: Choice = "volume",
    stratified: bool = False,
) -> jax.Array:
    """Coefficients of points drawn from a complex; `tree.combine` makes the points.

    The original picks simplices uniformly, whatever their size: `choose="uniform"`.

    Args:
        key: A typed key. The draws depend on neither `jit` nor the number of devices.
        complex: Where to draw from.
        num_samples: How many.
        choose: How a simplex is picked: see `probabilities`.
        stratified: Give each simplex its share of the samples to within one, in the order of the
            simplices, instead of a random number of them.

    Returns:
        `(num_samples, n)` float32, nonnegative, rows that sum to 1; zero at every vertex that is
        not of the simplex drawn.

    Raises:
        ValueError: As `probabilities`.

    Example:
        >>> from geojax.simplex import chain
        >>> path = chain({"w": jnp.array([[0.0], [1.0], [4.0]])})
        >>> sample_weights(jax.random.key(0), path, 4, choose=[1, 0])[:, 2].tolist()
        [0.0, 0.0, 0.0, 0.0]

    Reference:
        Benton et al., "Loss Surface Simplexes for Mode Connecting Volumes and Fast Ensembling",
        ICML 2021, section 4.
    """
    return sample_with_simplices(
        key, complex, num_samples, choose=choose, stratified=stratified
    ).weights


def sample_with_simplices(
    key: jax.Array,
    complex: SimplicialComplex,
    num_samples: int,
    *,
    choose: Choice = "volume",
    stratified: bool = False,
) -> Sampled:
    """`sample_weights`, and the number of the simplex that each sample lies in."""
    _check_number(num_samples)
    shares = probabilities(complex, choose)
    return _sampled(
        key, shares, complex.simplices, complex.num_vertices, int(num_samples), stratified
    )


def layer_numbers(vertices: PyTree, layerwise: bool | Callable[[str], Any] = True) -> tuple:
    """The number of the layer of each leaf, in flattening order.

    Args:
        vertices: Any pytree.
        layerwise: True: leaves of one parent are a layer, as a kernel and its bias; or a function
            of a leaf's path, as `tree.paths` has it, to the layer's name.

    Raises:
        ValueError: If all leaves are of one layer.

    Example:
        >>> layer_numbers({"first": {"bias": 0.0, "kernel": 0.0}, "second": {"kernel": 0.0}})
        (0, 0, 1)
        >>> layer_numbers({"w1": 0.0, "w2": 0.0}, lambda path: path)
        (0, 1)
    """
    if not (layerwise is True or callable(layerwise)):
        raise ValueError(
            f"layerwise is {layerwise!r}; expected True, or a function of a leaf's path."
        )
    leaves, _ = jax.tree_util.tree_flatten_with_path(vertices)
    if layerwise is True:
        names = [jax.tree_util.keystr(path[:-1]) for path, _ in leaves]
    else:
        names = [layerwise(path) for path in tree.paths(vertices)]
    known = {name: place for place, name in enumerate(dict.fromkeys(names))}
    if len(known) < 2:
        raise ValueError(
            f"layerwise: the leaves {tree.paths(vertices)} are all of one layer; give a function "
            "of a leaf's path that names its layer."
        )
    return tuple(known[name] for name in names)


def sample_layer_weights(
    key: jax.Array,
    complex: SimplicialComplex,
    num_samples: int,
    *,
    layerwise: bool | Callable[[str], Any] = True,
    choose: Choice = "volume",
    stratified: bool = False,
) -> PyTree:
    """As `sample_weights`, with coefficients for every layer apart; of one simplex for all layers.

    Args:
        key: A typed key.
        complex: Where to draw from.
        num_samples: How many.
        layerwise: See `layer_numbers`.
        choose: How a simplex is picked: see `probabilities`.
        stratified: See `sample_weights`.

    Returns:
        A pytree like a vertex with leaves `(num_samples, n)`, equal within a layer;
        `tree.combine_leaves` makes the points.

    Raises:
        ValueError: As `layer_numbers` and `probabilities`.

    Example:
        >>> from geojax.simplex import single
        >>> line = single({"a": {"w": jnp.zeros((2, 3))}, "b": {"w": jnp.ones((2, 3))}})
        >>> drawn = sample_layer_weights(jax.random.key(0), line, 4)
        >>> drawn["a"]["w"].shape, bool((drawn["a"]["w"] == drawn["b"]["w"]).any())
        ((4, 2), False)

    Reference:
        Wortsman et al., "Learning Neural Network Subspaces", ICML 2021.
    """
    _check_number(num_samples)
    layers = layer_numbers(complex.vertices, layerwise)
    shares = probabilities(complex, choose)
    drawn = _sampled(
        key, shares, complex.simplices, complex.num_vertices, int(num_samples), stratified,
        max(layers) + 1,
    ).weights  # fmt: skip
    return jax.tree.structure(complex.vertices).unflatten([drawn[:, i] for i in layers])


def _check_number(num_samples: Any) -> None:
    if not isinstance(num_samples, (int, np.integer)) or num_samples < 0:
        raise ValueError(f"num_samples is {num_samples!r}; expected an integer of at least 0.")


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _sampled(
    key: jax.Array,
    shares: Any,
    simplices: Any,
    num_vertices: int,
    num: int,
    stratified: bool,
    layers: int | None = None,
) -> Sampled:
    key_simplex, key_weights = jax.random.split(key)
    inside = np.zeros((len(simplices), num_vertices), bool)
    for s, simplex in enumerate(simplices):
        inside[s, list(simplex)] = True
    if stratified:
        # One offset for all: each simplex gets the floor or the ceiling of its share.
        places = jnp.arange(num, dtype=jnp.float32) + jax.random.uniform(key_simplex, ())
        places = jnp.minimum(places / max(num, 1), 1 - 2.0**-24)
    else:
        places = jax.random.uniform(key_simplex, (num,))
    edges = jnp.cumsum(jnp.asarray(shares))
    # How many simplices end at or before the place; one of probability 0 is never reached.
    chosen = jnp.sum(places[:, None] >= (edges / edges[-1])[None, :-1], axis=1, dtype=jnp.int32)
    weights = _normalized(key_weights, num, inside, chosen, layers)
    return Sampled(jnp.where(jnp.isnan(edges[-1]), jnp.nan, weights), chosen)
