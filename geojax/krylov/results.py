"""What the eigensolvers return: pairs with the evidence for each."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Eigenpairs", "Which"]

PyTree = Any
Which = Literal["LM", "LA", "SA", "BE"]


class Eigenpairs(NamedTuple):
    r"""Eigenpairs of a symmetric operator, sorted by the order asked for.

    Attributes:
        eigenvalues: `(k,)`, float64.
        eigenvectors: Stacked pytree, leaves `(k, *leaf.shape)`, orthonormal rows; the entry of
            largest magnitude of each is positive. A row is a direction for `surface` and
            `tree.combine`.
        residuals: `(k,)`, float64: :math:`\|A x_i - \lambda_i x_i\|`, measured with one more
            product a pair where `verified`, else the larger of the solver's estimate and
            `noise_floor`.
        intervals: `(k, 2)`, float64: an eigenvalue lies in each, :math:`\lambda_i \pm` residual,
            and the noise floor besides where the residual was measured.
        angles: `(k,)`, float64, radians: a bound on the angle between the vector and the invariant
            subspace of its interval's eigenvalues, residual over the gap to the nearest other
            computed eigenvalue; pi/2 where the gap says nothing.
        converged: `(k,)`, bool.
        reasons: k strings: 'converged', or why not.
        num_matvecs: All products with A, those of verification included.
        verified: Whether `residuals` were measured.
        noise_floor: The smallest residual that the arithmetic of the products allows, as measured.
        history: A dict of arrays, one row for each look at the spectrum: 'num_matvecs', and for
            each pair 'eigenvalues' and 'residuals' then.
    """

    eigenvalues: np.ndarray
    eigenvectors: PyTree
    residuals: np.ndarray
    intervals: np.ndarray
    angles: np.ndarray
    converged: np.ndarray
    reasons: tuple[str, ...]
    num_matvecs: int
    verified: bool
    noise_floor: float
    history: dict[str, np.ndarray]

    def table(self) -> list[dict[str, Any]]:
        """One row for each pair, as `report.text_table` takes them."""
        return [
            {
                "eigenvalue": float(self.eigenvalues[i]),
                "residual": float(self.residuals[i]),
                "interval": f"[{self.intervals[i, 0]:.6g}, {self.intervals[i, 1]:.6g}]",
                "converged": "yes" if self.converged[i] else self.reasons[i],
            }
            for i in range(len(self.eigenvalues))
        ]

    def __repr__(self) -> str:
        done = int(self.converged.sum())
        how = "measured" if self.verified else "estimated"
        pairs = ", ".join(
            f"{value:.6g} ± {residual:.1g}"
            for value, residual in zip(self.eigenvalues, self.residuals, strict=True)
        )
        missing = sorted({r for r in self.reasons if r != "converged"})
        why = f" ({'; '.join(missing)})" if missing else ""
        return (
            f"Eigenpairs({done} of {len(self.converged)} converged{why}, residuals {how}, "
            f"{self.num_matvecs} products: {pairs})"
        )

    __str__ = __repr__


def wanted(values: np.ndarray, k: int, which: str) -> np.ndarray:
    """The indices of the k wanted values, in the order in which they are returned.

    'LM' by falling magnitude, 'LA' falling, 'SA' rising; 'BE' takes half from each end (one more
    from the upper) and gives them falling.
    """
    if which == "LM":
        return np.argsort(-np.abs(values), kind="stable")[:k]
    if which == "LA":
        return np.argsort(-values, kind="stable")[:k]
    if which == "SA":
        return np.argsort(values, kind="stable")[:k]
    order = np.argsort(-values, kind="stable")
    if k >= len(order):
        return order
    return np.concatenate([order[: (k + 1) // 2], order[len(order) - k // 2 :]])


def check_which(which: str) -> None:
    """Raise for an order that the solvers do not know."""
    if which not in ("LM", "LA", "SA", "BE"):
        hint = " (nearest to a value: `eigsh_interior`)" if which == "SM" else ""
        raise ValueError(
            f"which is {which!r}; expected 'LM' (largest magnitude), 'LA' (largest), 'SA' "
            f"(smallest) or 'BE' (both ends){hint}."
        )


def _fix_signs(vectors: PyTree) -> PyTree:
    """Each stacked vector times the sign that makes its entry of largest magnitude positive."""
    best = None
    for leaf in jax.tree.leaves(vectors):
        if leaf.size == 0:
            continue
        axes = tuple(range(1, leaf.ndim))
        high = jnp.max(leaf, axis=axes) if axes else leaf
        low = jnp.min(leaf, axis=axes) if axes else leaf
        found = jnp.where(high >= -low, high, low)
        best = found if best is None else jnp.where(jnp.abs(found) > jnp.abs(best), found, best)
    if best is None:
        return vectors
    sign = jnp.where(best < 0, -1.0, 1.0)
    return jax.tree.map(
        lambda x: x * sign.astype(x.dtype).reshape((-1,) + (1,) * (x.ndim - 1)), vectors
    )


fix_signs = jax.jit(_fix_signs)
fix_signs_in_place = jax.jit(_fix_signs, donate_argnums=0)


def angle_bounds(values: np.ndarray, residuals: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Bounds on the angles, from the gaps to `others`, all computed values (Parlett 1998, 11.7).

    A value within the residual of another belongs to a cluster with it; the gap is measured to the
    nearest value outside that cluster.
    """
    out = np.full(len(values), np.pi / 2)
    for i, (value, residual) in enumerate(zip(values, residuals, strict=True)):
        distance = np.abs(others - value)
        outside = distance[distance > 2 * residual]
        if len(outside) and residual < outside.min():
            out[i] = np.arcsin(min(1.0, residual / (outside.min() - residual)))
    return out
