"""Lanczos quadrature: the spectral measure that a vector sees, by a few products.

`tridiagonalize` and `quadratic_form` run the recurrence inside jit; `spectral_density` drives the
same steps from the host, for operators that stream data, and can be stopped and resumed.
"""

import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from geojax import fit as fit_
from geojax import tree
from geojax.krylov import probes as probes_
from geojax.krylov._smoothing import Axis, quadratures
from geojax.krylov.density import Curve, SpectralDensity
from geojax.krylov.operators import Operator
from geojax.krylov.recurrence import (
    LanczosState,
    Tridiagonal,
    init,
    quadratic_form,
    sparing_step,
    step,
    tridiagonalize,
)
from geojax.krylov.results import Eigenpairs

__all__ = [
    "LanczosState",
    "Tridiagonal",
    "init",
    "quadratic_form",
    "spectral_density",
    "step",
    "tridiagonalize",
]

PyTree = Any

# All of a state is stacked in a block but the number of the step.
_BLOCK: Any = LanczosState(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, None)  # pyright: ignore


@functools.partial(jax.jit, static_argnames=("num_steps", "reorthogonalize"), donate_argnums=0)
def _init_one(v0, *, num_steps, reorthogonalize):
    return init(v0, num_steps, reorthogonalize=reorthogonalize)


@functools.partial(jax.jit, static_argnames=("num_steps", "reorthogonalize"), donate_argnums=0)
def _init_many(v0s, *, num_steps, reorthogonalize):
    one = functools.partial(init, num_steps=num_steps, reorthogonalize=reorthogonalize)
    return jax.vmap(one, out_axes=_BLOCK)(v0s)


def _swapped(state: LanczosState) -> tuple:
    # Donated buffers are matched to results in order: the new vector takes the place of the one
    # before last, and the last one stays where it is.
    rest = state._replace(previous=None, current=None, basis=None)
    return state.current, state.previous, state.basis, rest


@functools.partial(jax.jit, donate_argnums=(0, 1, 2))
def _step_one(previous, current, basis, rest, product):
    state = rest._replace(previous=previous, current=current, basis=basis)
    return _swapped(sparing_step(state, product))


@functools.partial(jax.jit, donate_argnums=(0, 1, 2))
def _step_many(previous, current, basis, rest, product):
    many = jax.vmap(step, in_axes=(_BLOCK, 0), out_axes=_BLOCK)
    state = rest._replace(previous=previous, current=current, basis=basis)
    return _swapped(many(state, product))


def _advance(state: LanczosState, product: PyTree) -> LanczosState:
    """One step of a state or of a block of them, in place."""
    kernel = _step_one if state.alphas.ndim == 1 else _step_many
    rest = state._replace(previous=None, current=None, basis=None)
    current, previous, basis, rest = kernel(
        state.previous, state.current, state.basis, rest, product
    )
    return rest._replace(previous=previous, current=current, basis=basis)


def _off(vectors: PyTree, v: PyTree) -> PyTree:
    return tree.axpy(-1.0, tree.combine(vectors, tree.inner_products(vectors, v)), v)


_off_one = jax.jit(_off, donate_argnums=1)
_off_many = jax.jit(jax.vmap(_off, in_axes=(None, 0)), donate_argnums=1)


class _Deflated(NamedTuple):
    """Known pairs: the vectors, or None without any."""

    values: np.ndarray
    vectors: PyTree | None
    num_matvecs: int

    def off(self, v: PyTree, many: bool) -> PyTree:
        """`v` on the orthogonal complement of the pairs."""
        if self.vectors is None:
            return v
        return (_off_many if many else _off_one)(self.vectors, v)


@jax.jit
def _rows(vectors: PyTree, which: jax.Array) -> PyTree:
    return jax.tree.map(lambda x: jnp.take(x, which, axis=0), vectors)


@jax.jit
def _gram(vectors: PyTree) -> jax.Array:
    return jax.vmap(tree.inner_products, in_axes=(None, 0))(vectors, vectors)


@jax.jit
def _residual_norms(vectors: PyTree, values: jax.Array, images: PyTree) -> jax.Array:
    def one(value, v, image):
        return tree.norm(tree.axpy(-value, v, image))

    return jax.vmap(one)(values, vectors, images)


def _deflated(operator: Operator, deflate: Any, block_size: int) -> _Deflated:
    if deflate is None:
        return _Deflated(np.zeros(0), None, 0)
    converged = None
    if isinstance(deflate, Eigenpairs):
        values, vectors, converged = deflate.eigenvalues, deflate.eigenvectors, deflate.converged
    elif isinstance(deflate, tuple) and len(deflate) == 2:
        values, vectors = deflate
    else:
        raise TypeError(
            f"deflate is a {type(deflate).__name__}; expected the `Eigenpairs` of `eigsh`, or "
            "(values, stacked vectors)."
        )
    values = np.asarray(values, np.float64)
    k = tree.num_points(vectors)
    if values.shape != (k,):
        raise ValueError(f"deflate: values have shape {values.shape}; expected ({k},).")
    stacked = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((k, *jnp.shape(x)), jnp.result_type(x)), operator.like
    )
    tree.check_same(stacked, vectors, names=(operator.name, "the vectors of deflate"), dtype=False)
    if converged is not None and not np.all(converged):
        keep = np.flatnonzero(converged)
        warnings.warn(
            f"deflate: {k - len(keep)} of {k} pairs have not converged; these are left to the "
            "quadrature.",
            stacklevel=3,
        )
        if not len(keep):
            return _Deflated(np.zeros(0), None, 0)
        values, vectors = values[keep], _rows(vectors, jnp.asarray(keep))
    vectors = tree.cast(vectors, operator.dtype)
    gap = float(np.abs(np.asarray(_gram(vectors)) - np.eye(len(values))).max())
    if not gap < 1e-3:
        raise ValueError(
            f"deflate: the vectors are not orthonormal (their Gram matrix is off by {gap:.2g}); "
            "expected the orthonormal eigenvectors of `eigsh`."
        )
    num_matvecs = 0
    if converged is None:
        # Nothing vouches for these pairs, and a wrong one would be a wrong spike in the density.
        for first, end in probes_.blocks(0, k, block_size):
            some = _rows(vectors, jnp.arange(first, end))
            images = probes_.products(operator, some)
            given = jnp.asarray(values[first:end], operator.dtype)
            residuals = np.asarray(_residual_norms(some, given, images))
            worst = int(residuals.argmax())
            if not residuals[worst] <= 0.05 * np.abs(values).max():
                raise ValueError(
                    f"deflate: pair {first + worst} with value {values[first + worst]:.6g} is no "
                    f"eigenpair of {operator.name}: its residual is {residuals[worst]:.3g}."
                )
        num_matvecs = k
    return _Deflated(values, vectors, num_matvecs)


class _Run(NamedTuple):
    """What a checkpoint of `spectral_density` holds."""

    state: LanczosState  # of the block under way
    alphas: np.ndarray  # (num_probes, num_steps), of the blocks before it
    betas: np.ndarray
    counts: np.ndarray
    asymmetry: np.ndarray
    num_matvecs: np.ndarray


def spectral_density(
    operator: Operator,
    *,
    key: jax.Array,
    num_probes: int = 10,
    num_steps: int = 80,
    deflate: Eigenpairs | tuple[Any, PyTree] | None = None,
    reorthogonalize: bool | None = None,
    memory_bytes: float = 2**30,
    block_size: int = 1,
    grid: Any = None,
    width: float | None = None,
    axis: Axis = "linear",
    epsilon: float | None = None,
    confidence: float = 0.95,
    checkpoint: fit_.Checkpointer | None = None,
    progress: bool | None = None,
) -> SpectralDensity:
    r"""The density of the eigenvalues of a symmetric operator, with its uncertainty.

    Stochastic Lanczos quadrature: from each of R random unit vectors v, m steps of Lanczos give the
    nodes and weights of :math:`v^\top f(A) v \approx \sum_i w_i f(\theta_i)`, exact for polynomials
    of degree 2m - 1, and the mean over the probes estimates :math:`\operatorname{tr} f(A) / n`.
    Nodes and weights are what is returned; smoothing them is a pure function of the result.

    Args:
        operator: A, symmetric and the same in every product.
        key: A typed key; probe r draws from `fold_in(key, r)`.
        num_probes: R. One gives no uncertainty.
        num_steps: m.
        deflate: Eigenpairs that are known: the `Eigenpairs` of `eigsh`, or (values, stacked
            orthonormal vectors), which k products verify. Probes are kept in the complement of the
            vectors, and each pair is a spike of mass 1/n. The outliers are then exact, and the
            variance of the bulk is down.
        reorthogonalize: Whether to keep all m vectors and orthogonalise against them; None keeps
            them where they fit in `memory_bytes`. Without, an eigenvalue may appear as several
            nodes, which share its weight; functionals of the density stay accurate.
        memory_bytes: What the basis of a block may take, over all devices together.
        block_size: How many probes are multiplied at once by `operator.matmat`, sharing the pass
            over the data; the memory of the vectors and of the product grows with it.
        grid: Ascending positions of the curve, in units of eigenvalues; None for a grid as fine as
            the kernel needs.
        width: The standard deviation of the Gaussian kernel, in units of the axis; None for a
            width from the quartiles and the spacing of the weighted nodes, to which an outlier is
            nothing.
        axis: 'linear'; 'log', the density of :math:`\log(|\lambda| + \epsilon)`; or 'symlog', that
            of :math:`\operatorname{sign}(\lambda) \log(1 + |\lambda| / \epsilon)`.
        epsilon: That epsilon; see `SpectralDensity.density`.
        confidence: The probability of the pointwise intervals.
        checkpoint: A `geojax.checkpoint.Checkpointer`: saved every `checkpoint.every` steps (a step
            is one product with a block) and at the end; a run that finds one there goes on from it,
            to the same bits.
        progress: True or False for a bar; by default one appears on runs that take long.

    Returns:
        A `SpectralDensity`; `result.curve` is the smoothed density. Cost: R m products and R more
        reads of a vector, and (m + 3) vectors of memory for each probe of a block, or 4 without a
        basis, the product itself not counted.

    Raises:
        ValueError: For an operator that is stochastic or not symmetric, and for arguments out of
            range.
        FloatingPointError: If a product is not finite.

    Warns:
        UserWarning: If weights do not sum to 1 within 1e-5; if nodes lie off the given grid, or it
            is too coarse for the kernel; if the products look like those of an operator that is not
            symmetric or changes between products.

    Example:
        >>> from geojax.krylov import from_matrix
        >>> a = from_matrix(np.diag(np.linspace(0, 1, 50)).astype(np.float32))
        >>> found = spectral_density(a, key=jax.random.key(0), num_probes=20, num_steps=30)
        >>> round(found.curve.integral, 3), round(found.functional(np.square).estimate)
        (1.0, 17)

    Reference:
        Ghorbani, Krishnan and Xiao, An Investigation into Neural Net Optimization via Hessian
        Eigenvalue Density, 2019; Chen, Trogdon and Ubaru, Analysis of stochastic Lanczos
        quadrature for spectrum approximation, 2021.
    """
    _check(operator, key, num_probes, num_steps, block_size)
    probes_.check_confidence(confidence)
    known = _deflated(operator, deflate, block_size)
    rest = operator.size - len(known.values)
    steps = max(1, min(num_steps, rest))
    num_probes = num_probes if rest else 0
    if reorthogonalize is None:
        block = min(block_size, max(num_probes, 1))
        needed = block * steps * operator.size * np.dtype(operator.dtype).itemsize
        reorthogonalize = needed <= memory_bytes
    record = {
        "algorithm": "spectral_density",
        "key": jax.random.key_data(key).tolist(),
        "num_probes": num_probes,
        "num_steps": steps,
        "block_size": block_size,
        "reorthogonalize": bool(reorthogonalize),
        "deflated": known.values.tolist(),
    }
    run = _drive(
        operator, key, known, num_probes, steps, reorthogonalize, block_size, checkpoint, record,
        progress,
    )  # fmt: skip
    alphas, betas = np.asarray(run.alphas, np.float64), np.asarray(run.betas, np.float64)
    probes_.check_products(alphas, "spectral_density", operator)
    probes_.check_products(betas, "spectral_density", operator)
    counts = np.asarray(run.counts)
    found = quadratures(alphas, betas, counts)
    result = SpectralDensity(
        **found._asdict(),
        deflated=np.sort(known.values)[::-1],
        size=operator.size,
        alphas=alphas,
        betas=betas,
        num_steps=counts,
        exhausted=betas[np.arange(len(counts)), counts - 1] == 0,
        num_matvecs=int(run.num_matvecs) + known.num_matvecs,
        reorthogonalized=bool(reorthogonalize),
        asymmetry=float(run.asymmetry.max(initial=0.0)),
        weight_error=float(np.abs(found.weights.sum(1) - 1).max(initial=0.0)),
        eps=float(np.finfo(operator.dtype).eps),
        curve=None,  # pyright: ignore[reportArgumentType]
    )
    if result.weight_error > 1e-5:
        warnings.warn(
            f"spectral_density: the weights of a probe sum to 1 only within "
            f"{result.weight_error:.2g}; expected 1e-5. Its quadrature is not to be trusted.",
            stacklevel=2,
        )
    if result.asymmetry > 1e-2:
        warnings.warn(
            f"spectral_density: the products of {operator.name} are those of no symmetric matrix "
            f"(off by {result.asymmetry:.2g} of its norm). Is something in it random, or does it "
            "change from product to product?",
            stacklevel=2,
        )
    curve: Curve = result.density(
        grid, width=width, axis=axis, epsilon=epsilon, confidence=confidence
    )
    return result._replace(curve=curve)


def _check(operator: Operator, key: Any, num_probes: Any, num_steps: Any, block_size: Any) -> None:
    if operator.stochastic:
        raise ValueError(
            f"spectral_density: {operator.name} is stochastic; Lanczos needs the same operator in "
            "every product. Freeze its sample, or use `trace` with method='hutchinson'."
        )
    if not operator.symmetric:
        raise ValueError(
            f"spectral_density: {operator.name} is not symmetric; expected a symmetric operator, "
            "such as a.T @ a or a congruence."
        )
    probes_.check_key(key)
    probes_.check_count("num_probes", num_probes, 1)
    probes_.check_count("num_steps", num_steps, 1)
    probes_.check_count("block_size", block_size, 1)


def _drive(
    operator, key, known, num_probes, steps, reorthogonalize, block_size, checkpoint, record, show
) -> _Run:
    """All blocks of probes, one product after another."""
    ranges = list(probes_.blocks(0, num_probes, block_size))

    def begin(block, run):
        first, end = ranges[block]
        options = {"num_steps": steps, "reorthogonalize": reorthogonalize}
        if end - first == 1:
            start = probes_.probe(operator, key, first, "normal")
            state = _init_one(known.off(start, False), **options)
        else:
            start = probes_.probes(operator, key, first, end, "normal")
            state = _init_many(known.off(start, True), **options)
        return run._replace(state=state)

    shape, dtype = (num_probes, steps), operator.dtype
    empty = _Run(
        state=None,  # pyright: ignore[reportArgumentType]
        alphas=np.zeros(shape, dtype),
        betas=np.zeros(shape, dtype),
        counts=np.zeros(num_probes, np.int32),
        asymmetry=np.zeros(num_probes, dtype),
        num_matvecs=np.zeros((), np.int32),
    )
    if not ranges:
        return empty
    total = len(ranges) * steps

    def at(done):
        # The number of a step says which block it belongs to, and so the shapes of the state. At
        # the end of a block the next one has begun already, but after the last one.
        return begin(min(done // steps, len(ranges) - 1), empty)

    def advance(run, done):
        if not isinstance(run.alphas, np.ndarray):
            run = _Run(run.state, *(np.array(part) for part in run[1:]))
        block, many = done // steps, run.state.alphas.ndim > 1
        before = run.state.alive
        product = (operator.matmat if many else operator.matvec)(run.state.current)
        state = _advance(run.state, known.off(product, many))
        first, end = ranges[block]
        run = run._replace(state=state, num_matvecs=run.num_matvecs + (end - first))
        done += 1
        # The host runs one step ahead; every eighth it looks whether there is anything left.
        jax.block_until_ready(before)
        within = done % steps
        if within and within % 8 == 0 and not np.any(state.alive):
            done = (block + 1) * steps
        if done % steps == 0:
            run = _collect(run, first, end)
            if block + 1 < len(ranges):
                run = begin(block + 1, run)
        return run, done

    return probes_.drive(total, at, advance, record=record, checkpoint=checkpoint, progress=show)[0]


def _collect(run: _Run, first: int, end: int) -> _Run:
    """The finished block in its rows of the whole."""
    alphas, betas, counts, scale, asymmetry, index = jax.device_get(
        (run.state.alphas, run.state.betas, run.state.count, run.state.scale, run.state.asymmetry,
         run.state.index)
    )  # fmt: skip
    rows = slice(first, end)
    # What an early end left out repeats the first diagonal entry, as `step` would have done.
    reached = np.arange(alphas.shape[-1]) < index
    run.alphas[rows] = np.where(reached, alphas, alphas[..., :1])
    run.betas[rows] = betas
    run.counts[rows] = counts
    run.asymmetry[rows] = asymmetry / np.where(scale > 0, scale, 1)
    return run
