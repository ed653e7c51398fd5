"""Linear systems with a symmetric operator, shifted or not, by MINRES on pytrees."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from geojax import tree
from geojax.krylov import _dense
from geojax.krylov.operators import Operator

__all__ = ["Solution", "minres"]

PyTree = Any


class Solution(NamedTuple):
    r"""The solution of a linear system by `minres`.

    Attributes:
        solution: A pytree like the right side.
        residual: :math:`\|(A - \sigma I) x - b\| / \|b\|`, measured with one more product.
        converged: Whether it is within the tolerance.
        num_matvecs: Products.
    """

    solution: PyTree
    residual: float
    converged: bool
    num_matvecs: int


class _Minres(NamedTuple):
    x: PyTree
    v: PyTree
    v_old: PyTree
    d: PyTree
    d_old: PyTree
    beta: jax.Array
    cosine: jax.Array
    cosine_old: jax.Array
    sine: jax.Array
    sine_old: jax.Array
    eta: jax.Array
    scale: jax.Array


@jax.jit
def _minres_start(b: PyTree) -> _Minres:
    length = tree.norm(b)
    zero = jax.tree.map(lambda a: a * 0, b)
    one, nothing = jnp.ones_like(length), jnp.zeros_like(length)
    return _Minres(
        zero,
        _dense._over(b, length),
        zero,
        zero,
        zero,
        nothing,
        one,
        one,
        nothing,
        nothing,
        length,
        nothing,
    )


@jax.jit
def _minres_step(s: _Minres, product: PyTree, shift: jax.Array) -> _Minres:
    """One Lanczos step, one Givens rotation, one update of the solution."""
    p = tree.axpy(-shift, s.v, product)
    alpha = tree.vdot(s.v, p)
    p = tree.axpy(-s.beta, s.v_old, tree.axpy(-alpha, s.v, p))
    beta = tree.norm(p)
    scale = jnp.maximum(s.scale, jnp.abs(alpha) + beta)
    # A breakdown ends the process: what is left of p is rounding.
    beta = jnp.where(beta <= 8 * jnp.finfo(beta.dtype).eps * scale, jnp.zeros_like(beta), beta)
    delta = s.cosine * alpha - s.cosine_old * s.sine * s.beta
    rho_2 = s.sine * alpha + s.cosine_old * s.cosine * s.beta
    rho_3 = s.sine_old * s.beta
    rho_1 = jnp.hypot(delta, beta)
    alive = rho_1 > 0
    safe = jnp.where(alive, rho_1, jnp.ones_like(rho_1))
    cosine, sine = jnp.where(alive, delta / safe, 0), jnp.where(alive, beta / safe, 0)
    d = _dense._over(tree.axpy(-rho_3, s.d_old, tree.axpy(-rho_2, s.d, s.v)), safe)
    step = jnp.where(alive, cosine * s.eta, jnp.zeros_like(s.eta))
    return _Minres(
        tree.axpy(step, d, s.x), _dense._over(p, beta), s.v, d, s.d, beta,
        cosine, s.cosine, sine, s.sine,
        jnp.where(alive, -sine * s.eta, s.eta), scale,
    )  # fmt: skip


@jax.jit
def _minres_residual(x: PyTree, product: PyTree, shift: jax.Array, b: PyTree) -> jax.Array:
    return tree.norm(jax.tree.map(jnp.subtract, tree.axpy(-shift, x, product), b))


def minres(
    operator: Operator,
    b: PyTree,
    *,
    shift: float = 0.0,
    tol: float = 1e-6,
    max_matvecs: int | None = None,
) -> Solution:
    r"""The x that makes :math:`\|(A - \sigma I) x - b\|` smallest in the Krylov space of b.

    For symmetric A, definite or not. Three-term recurrences, so memory does not grow with the
    number of products.

    Args:
        operator: A, symmetric, the same at each product.
        b: The right side, a pytree like the operator's vectors.
        shift: :math:`\sigma`.
        tol: The relative residual at which it stops.
        max_matvecs: The budget of products; by default 5 n, at most 1000.

    Returns:
        `Solution`. Memory: 9 vectors.

    Raises:
        ValueError: For a stochastic or asymmetric operator, or arguments out of range.
        FloatingPointError: If a product is NaN or infinite, naming which.

    Example:
        >>> from geojax import krylov
        >>> operator = krylov.from_matrix(np.diag(np.array([2.0, -4.0], np.float32)))
        >>> minres(operator, jnp.array([1.0, 1.0])).solution.round(4).tolist()
        [0.5, -0.25]

    Reference:
        Paige and Saunders, Solution of sparse indefinite systems of linear equations, 1975; the
        recurrence is algorithm 6.1 of Fischer, Polynomial based iteration methods, 1996.
    """
    _dense.check_operator("minres", operator, 1)
    _dense.check_tol("minres", tol)
    _dense.check_positive("minres", max_matvecs=max_matvecs)
    operator._check(b, "the right side")
    budget = min(5 * operator.size, 1000) if max_matvecs is None else int(max_matvecs)
    dtype = operator.dtype
    b = tree.cast(b, dtype)
    state = _minres_start(b)
    sigma = np.asarray(shift, dtype)
    size = float(state.eta)
    if not np.isfinite(size):
        raise ValueError(f"minres: the right side has norm {size}; expected finite entries.")
    done = 0
    while size > 0 and done < budget:
        for _ in range(min(10, budget - done)):
            state = _minres_step(state, _dense.product(operator, state.v), sigma)
            done += 1
        eta, beta = (float(x) for x in jax.device_get((state.eta, state.beta)))
        _dense.check_finite("minres", [eta, beta], operator, done, min(10, done))
        if abs(eta) <= 0.5 * tol * size or beta == 0:
            break
    if size == 0:
        return Solution(state.x, 0.0, True, 0)
    residual = float(_minres_residual(state.x, _dense.product(operator, state.x), sigma, b)) / size
    return Solution(state.x, residual, residual <= tol, done + 1)
