"""A posterior over the networks of a subspace: a simplex, a complex, a curve, or a plane.

Each subspace is the image of a standard normal vector, by a map that makes its prior what it should
be: uniform in volume, uniform in arc length, or Gaussian. So one sampler serves all, and no
Jacobian is left to forget.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from geojax import batches as batches_
from geojax import progress as bars
from geojax import tree
from geojax.simplex import sampling, volume
from geojax.simplex.complexes import SimplicialComplex

__all__ = [
    "EllipticalState",
    "Posterior",
    "Subspace",
    "affine_subspace",
    "curve_subspace",
    "effective_sizes",
    "elliptical_init",
    "elliptical_step",
    "sample_posterior",
    "simplex_subspace",
]

PyTree = Any


class Subspace(NamedTuple):
    """Networks as combinations of a few points, with a prior.

    Attributes:
        points: Stacked, leaves `(n, ...)`.
        weights_fn: From z, `(num_coordinates,)`, to the weights of the points, `(n,)`. The prior is
            the image of a standard normal z.
        num_coordinates: The length of z.
        smooth: Whether `weights_fn` has a gradient, as Hamiltonian samplers need.
    """

    points: PyTree
    weights_fn: Callable[[jax.Array], jax.Array]
    num_coordinates: int
    smooth: bool


def simplex_subspace(complex: SimplicialComplex, choose: sampling.Choice = "volume") -> Subspace:
    r"""The uniform prior over a complex.

    In a simplex of n vertices the k-th stick that is broken off is
    :math:`1 - (1 - \Phi(z_k))^{1 / (n - k)}` of what is left, with :math:`\Phi` the normal
    distribution function: the weights of a standard normal z are flat Dirichlet. With several
    simplices a first coordinate picks one.

    Args:
        complex: One simplex or several.
        choose: How a simplex is picked: see `probabilities`.

    Raises:
        ValueError: As `probabilities`; for a single point, where there is nothing to sample.

    Example:
        >>> from geojax.simplex import single
        >>> edge = simplex_subspace(single({"w": jnp.array([0.0, 1.0])}))
        >>> edge.weights_fn(jnp.zeros(1)).tolist()
        [0.5, 0.5]
    """
    shares = np.asarray(sampling.probabilities(complex, choose), np.float64)
    several = len(complex.simplices) > 1
    largest = max(complex.dimensions)
    if not several and largest == 0:
        raise ValueError("simplex_subspace: one point is no subspace; expected two vertices.")
    num, simplices = complex.num_vertices, complex.simplices
    edges = np.cumsum(shares)[:-1].astype(np.float32)

    def weights_fn(z: jax.Array) -> jax.Array:
        rows = []
        for simplex in simplices:
            broken = _sticks(z[int(several) :], len(simplex))
            rows.append(jnp.zeros(num, z.dtype).at[np.array(simplex)].set(broken))
        if not several:
            return rows[0]
        place = jax.scipy.special.ndtr(z[0])
        return jnp.stack(rows)[jnp.sum(place >= jnp.asarray(edges, z.dtype))]

    return Subspace(complex.vertices, weights_fn, largest + several, not several)


def _sticks(z: jax.Array, n: int) -> jax.Array:
    rest, out = jnp.ones((), z.dtype), []
    for k in range(n - 1):
        # The logarithm of what is left of the rest, good in both tails.
        left = jax.scipy.special.log_ndtr(-z[k]) / (n - 1 - k)
        out.append(-rest * jnp.expm1(left))
        rest = rest * jnp.exp(left)
    return jnp.stack([*out, rest])


def curve_subspace(
    basis: Callable[[Any], jax.Array], control_points: PyTree, num_steps: int = 1000
) -> Subspace:
    """The prior that is uniform along a curve, in arc length: slow parts do not count double.

    Args:
        basis: From t in [0, 1] to the weights of the control points, such as `curves.bezier(3)`.
        control_points: Stacked points.
        num_steps: Chords by which the length is measured.

    Raises:
        ValueError: If the curve has no length.

    Example:
        >>> from geojax import curves
        >>> chain = {"w": jnp.array([[0.0], [1.0], [4.0]])}
        >>> half = curve_subspace(curves.polychain(3), chain).weights_fn(jnp.zeros(1))
        >>> np.asarray(half, np.float64).round(3).tolist()  # 2 of 4: a third into the second edge
        [0.0, 0.667, 0.333]
    """
    square = np.square(volume.distances(control_points))
    ts = np.linspace(0, 1, num_steps + 1).astype(np.float32)
    at = np.stack([np.asarray(row, np.float64) for row in _rows(basis, ts)])
    if at.shape[1] != len(square):
        raise ValueError(
            f"the basis gives {at.shape[1]} coefficients and there are {len(square)} control "
            "points; expected one coefficient for each."
        )
    # Coefficients of a chord sum to zero, so that its square is -d^T D d / 2.
    steps = np.diff(at, axis=0)
    chords = np.sqrt(np.maximum(-0.5 * np.einsum("mi,ij,mj->m", steps, square, steps), 0))
    lengths = np.concatenate([[0.0], np.cumsum(chords)])
    if not lengths[-1] > 0:
        raise ValueError("curve_subspace: the curve has no length.")
    share = (lengths / lengths[-1]).astype(np.float32)

    def weights_fn(z: jax.Array) -> jax.Array:
        place = jax.scipy.special.ndtr(z[0])
        return basis(jnp.interp(place, jnp.asarray(share, z.dtype), jnp.asarray(ts, z.dtype)))

    return Subspace(control_points, weights_fn, 1, True)


def _rows(basis: Callable, ts: np.ndarray) -> jax.Array:
    return jax.jit(jax.vmap(basis))(ts)


def affine_subspace(origin: PyTree, directions: PyTree) -> Subspace:
    """The Gaussian prior around a network: origin + sum_i z_i d_i with z standard normal.

    Args:
        origin: A point, such as the mean of a trajectory.
        directions: Stacked, leaves `(k, ...)`; their lengths are the prior's standard deviations,
            such as principal directions times the singular values.

    Raises:
        ValueError: If a direction differs from the origin, naming the leaf.
    """
    num = tree.num_points(directions)
    points = tree.stack([origin, *tree.unstack(directions)])

    def weights_fn(z: jax.Array) -> jax.Array:
        return jnp.concatenate([jnp.ones(1, z.dtype), z])

    return Subspace(points, weights_fn, num, True)


# --------------------------------------------------------------------------- elliptical slices


class EllipticalState(NamedTuple):
    """Where elliptical slice sampling stands.

    Attributes:
        position: `(d,)` float64.
        log_likelihood: There.
        num_evaluations: Of the likelihood, so far.
    """

    position: np.ndarray
    log_likelihood: float
    num_evaluations: int


def elliptical_init(
    log_likelihood_fn: Callable[[np.ndarray], float], position: Any
) -> EllipticalState:
    """The state at a position.

    Raises:
        ValueError: If the log-likelihood is not finite there.
    """
    position = np.asarray(position, np.float64)
    value = float(log_likelihood_fn(position))
    if not np.isfinite(value):
        raise ValueError(
            f"the log-likelihood is {value} at the start {position.tolist()}; expected a finite "
            "number there."
        )
    return EllipticalState(position, value, 1)


def elliptical_step(
    log_likelihood_fn: Callable[[np.ndarray], float], key: jax.Array, state: EllipticalState
) -> EllipticalState:
    """One step of elliptical slice sampling, for a standard normal prior. It has nothing to tune.

    Args:
        log_likelihood_fn: From a position `(d,)` to a number; NaN counts as impossible.
        key: A typed key; the same one gives the same step.
        state: From `elliptical_init` or the last step.

    Reference:
        Murray, Adams and MacKay, "Elliptical Slice Sampling", AISTATS 2010, figure 2.
    """
    noise, uniform = (np.asarray(x, np.float64) for x in _draws(key, len(state.position)))
    level = state.log_likelihood + np.log(uniform[0])
    angle = 2 * np.pi * uniform[1]
    low, high = angle - 2 * np.pi, angle
    count = state.num_evaluations
    for u in uniform[2:]:
        position = state.position * np.cos(angle) + noise * np.sin(angle)
        value = float(log_likelihood_fn(position))
        count += 1
        if value > level:
            return EllipticalState(position, value, count)
        low, high = (angle, high) if angle < 0 else (low, angle)
        angle = low + u * (high - low)
    # The bracket has shrunk to the position itself, which lies in every slice.
    return EllipticalState(state.position, state.log_likelihood, count)


_MOST_TRIES = 60


def _draws(key: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    return _jitted_draws(key, size)


def _both(key: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    key_normal, key_uniform = jax.random.split(key)
    tiny = jnp.finfo(jnp.float32).tiny
    return (
        jax.random.normal(key_normal, (size,)),
        jax.random.uniform(key_uniform, (_MOST_TRIES + 2,), minval=tiny),
    )


_jitted_draws = jax.jit(_both, static_argnums=1)


# ---------------------------------------------------------------------------------- front door


class Posterior(NamedTuple):
    """Draws from a posterior over a subspace.

    Attributes:
        coordinates: `(num_samples, d)` of the standard normal z.
        weights: `(num_samples, n)`: `tree.combine(subspace.points, weights[i])` is a network.
        log_likelihoods: `(num_samples,)`, tempered.
        effective_sizes: `(d,)`: as many independent draws give the mean of a coordinate as well.
        num_evaluations: Passes over the data: losses, or gradients with 'nuts' (warm-up left out).
        num_divergent: Steps of 'nuts' that diverged; any above zero calls for suspicion.
    """

    coordinates: np.ndarray
    weights: np.ndarray
    log_likelihoods: np.ndarray
    effective_sizes: np.ndarray
    num_evaluations: int
    num_divergent: int


def sample_posterior(
    loss_fn: Callable[..., jax.Array],
    subspace: Subspace,
    batches: Any,
    num_samples: int,
    *,
    key: jax.Array,
    num_warmup: int = 100,
    num_data: float | None = None,
    temperature: float = 1.0,
    sampler: Literal["elliptical", "nuts"] = "elliptical",
    start: Any = None,
    state_fn: Callable[[PyTree], PyTree] | None = None,
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
    mesh: Mesh | NamedSharding | None = None,
    progress: bool | None = None,
) -> Posterior:
    r"""Draw networks of a subspace from its tempered posterior.

    Its density with respect to the prior is :math:`\exp(-N L / T)`, with L the mean loss over N
    examples and T the temperature. A loss in nats (cross-entropy) makes T = 1 Bayes' rule; in a
    subspace of few dimensions a likelihood of many examples is often so sharp that T is raised.

    Args:
        loss_fn: `(params, batch)` to the mean loss; with `state_fn`, `(params, state, batch)`.
        subspace: From `simplex_subspace`, `curve_subspace`, `affine_subspace`, or your own.
        batches: One batch or a re-iterable.
        num_samples: Draws to return, each a step of the chain.
        key: A typed key.
        num_warmup: Steps that are thrown away before; 'nuts' adapts in them.
        num_data: N; by default the examples, or the sum of the weights with `weight_fn`.
        temperature: T, more than 0.
        sampler: "elliptical", our own, which needs losses alone; or "nuts", which needs gradients,
            the package blackjax, a smooth subspace and data in memory.
        start: Where the chain begins, `(d,)`; by default at z = 0.
        state_fn: From the parameters to the state there; for "elliptical".
        weight_fn: Weight of a batch; by default its number of examples.
        mesh: Split each batch over this mesh's first axis; for "elliptical".
        progress: True or False for a bar; by default one appears when it takes long.

    Returns:
        A `Posterior`. Cost of 'elliptical': a few passes over the data for each step.

    Raises:
        ValueError: For counts or temperatures that cannot be; if the loss at the start is not
            finite; for 'nuts' on a subspace with several simplices, with a state or a mesh.
        ImportError: For 'nuts' without blackjax.

    Reference:
        Izmailov et al., "Subspace Inference for Bayesian Deep Learning", UAI 2019.
    """
    if num_samples < 1 or num_warmup < 0:
        raise ValueError(
            f"num_samples is {num_samples} and num_warmup {num_warmup}; expected at least 1 and 0."
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected more than 0.")
    if sampler not in ("elliptical", "nuts"):
        raise ValueError(f"sampler is {sampler!r}; expected 'elliptical' or 'nuts'.")
    d = subspace.num_coordinates
    position = np.zeros(d) if start is None else np.asarray(start, np.float64)
    if position.shape != (d,):
        raise ValueError(f"start has shape {position.shape}; expected ({d},).")
    source = batches_.as_batches(batches)
    if num_data is None:
        weigh = batches_.num_examples if weight_fn is None else weight_fn
        num_data = float(sum(float(weigh(batch)) for batch in source))
    scale = num_data / temperature
    if sampler == "nuts":
        if state_fn is not None or mesh is not None or not subspace.smooth:
            raise ValueError(
                "sampler='nuts' takes a smooth subspace (one simplex) and neither state_fn nor "
                "mesh; use 'elliptical'."
            )
        found, logs, count, divergent = _nuts(
            loss_fn, subspace, source, num_samples, num_warmup, scale, weight_fn, position, key
        )
    else:
        averaged = batches_.mean(loss_fn, source, weight_fn=weight_fn, mesh=mesh)
        weights_fn = jax.jit(subspace.weights_fn)

        def log_likelihood(z: np.ndarray) -> float:
            weights = np.asarray(weights_fn(z.astype(np.float32)))
            params = _at(subspace.points, weights)
            extra = () if state_fn is None else (state_fn(params),)
            return -scale * float(averaged(params, *extra))

        state = elliptical_init(log_likelihood, position)
        rows, values = [], []
        with bars.bar(num_warmup + num_samples, "posterior", show=progress) as update:
            for i in range(num_warmup + num_samples):
                state = elliptical_step(log_likelihood, jax.random.fold_in(key, i), state)
                if i >= num_warmup:
                    rows.append(state.position)
                    values.append(state.log_likelihood)
                update(i + 1)
        found, logs = np.stack(rows), np.array(values)
        count, divergent = state.num_evaluations, 0
    weights = np.asarray(_all_weights(subspace.weights_fn, found.astype(np.float32)))
    return Posterior(found, weights, logs, effective_sizes(found), count, divergent)


@jax.jit
def _at(points: PyTree, weights: jax.Array) -> PyTree:
    return tree.combine(points, weights)


def _all_weights(weights_fn: Callable, coordinates: np.ndarray) -> jax.Array:
    return jax.jit(jax.vmap(weights_fn))(coordinates)


def _nuts(loss_fn, subspace, source, num_samples, num_warmup, scale, weight_fn, position, key):
    try:
        import blackjax  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "sampler='nuts' needs the package blackjax (`pip install blackjax`); "
            "sampler='elliptical' needs nothing."
        ) from error
    pieces = [jax.device_put(batch) for batch in source]
    weigh = batches_.num_examples if weight_fn is None else weight_fn
    shares = np.array([float(weigh(batch)) for batch in pieces])
    shares = (shares / shares.sum()).astype(np.float32)

    @jax.jit
    def run(key, position, points, pieces):
        def log_likelihood(z):
            params = tree.combine(points, subspace.weights_fn(z))
            losses = [loss_fn(params, batch).astype(jnp.float32) for batch in pieces]
            return -scale * sum(s * x for s, x in zip(shares, losses, strict=True))

        def log_density(z):
            return log_likelihood(z) - 0.5 * jnp.sum(jnp.square(z))

        key_warmup, key_run = jax.random.split(key)
        warmup = blackjax.window_adaptation(blackjax.nuts, log_density)
        (state, parameters), _ = warmup.run(key_warmup, position, num_steps=num_warmup)
        kernel = blackjax.nuts(log_density, **parameters)

        def step(state, key):
            state, info = kernel.step(key, state)
            logs = state.logdensity + 0.5 * jnp.sum(jnp.square(state.position))
            return state, (
                state.position, logs, info.num_integration_steps, info.is_divergent
            )  # fmt: skip

        return jax.lax.scan(step, state, jax.random.split(key_run, num_samples))[1]

    # Its own arithmetic mixes dtypes and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        start = jnp.asarray(position, jnp.float32)
        found, logs, steps, divergent = jax.device_get(run(key, start, subspace.points, pieces))
    if not np.isfinite(logs).all():
        raise ValueError("sampler='nuts': the log-likelihood became NaN or infinite.")
    return (
        found.astype(np.float64), logs.astype(np.float64), int(steps.sum()), int(divergent.sum())
    )  # fmt: skip


def effective_sizes(samples: Any) -> np.ndarray:
    """How many independent draws a chain is worth, for the mean of each coordinate.

    Autocorrelations are summed in pairs until a pair's sum is negative.

    Args:
        samples: `(num_samples, d)`, in the order of the chain.

    Returns:
        `(d,)`, at most `num_samples`; NaN for a coordinate that does not move.

    Reference:
        Geyer, "Practical Markov Chain Monte Carlo", Statistical Science 7, 1992, section 3.3.
    """
    samples = np.asarray(samples, np.float64)
    num = len(samples)
    away = samples - samples.mean(0)
    spectrum = np.abs(np.fft.rfft(away, 2 * num, axis=0)) ** 2
    covariances = np.fft.irfft(spectrum, axis=0)[:num]
    out = np.full(samples.shape[1], np.nan)
    for i, column in enumerate(covariances.T):
        if not column[0] > 0:
            continue
        correlations = column / column[0]
        pairs = correlations[: num // 2 * 2].reshape(-1, 2).sum(1)
        ends = np.flatnonzero(pairs < 0)
        total = pairs[: ends[0] if len(ends) else len(pairs)].sum()
        out[i] = min(num, num / max(2 * total - 1, 1e-12))
    return out
