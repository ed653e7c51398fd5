"""Linear operators on pytrees: a product, the space that it acts on, and an algebra.

An operator never holds its matrix. Its vectors have the structure, shapes and sharding of the
parameters it was made from, in float32 or better.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from geojax import tree

__all__ = [
    "Operator",
    "congruence",
    "deflate",
    "dense",
    "from_matrix",
    "identity",
    "project",
    "restrict",
    "shift",
]

PyTree = Any
_axpy = jax.jit(tree.axpy)
_scale = jax.jit(tree.scale)
_inner = jax.jit(tree.inner_products)
_combine = jax.jit(tree.combine)


class Operator:
    """A linear operator A on pytrees, known by its products A v.

    Operators add, subtract, scale and multiply: `a + b`, `a - b`, `2.0 * a`, `-a`, `a / 2.0`,
    `a @ b`. `a(v)` and `a @ v` are the product with a vector.

    Attributes:
        like: The pytree that vectors resemble: arrays or `jax.ShapeDtypeStruct`s. Products are
            taken and given in `dtype(leaf)`, float32 or better, whatever the dtype of `like`.
        size: The number of rows n.
        name: What messages call the operator.
        symmetric: Whether A equals its transpose; the algorithms of this package need it.
        psd: Whether A is known to be positive semidefinite.
        stochastic: Whether two products with one vector differ, as on a fresh batch each time.
            Algorithms whose result would be meaningless refuse such an operator.
    """

    def __init__(
        self,
        matvec: Callable[[PyTree], PyTree],
        like: PyTree,
        *,
        matmat: Callable[[PyTree], PyTree] | None = None,
        name: str = "operator",
        symmetric: bool = True,
        psd: bool = False,
        stochastic: bool = False,
    ):
        """Make an operator from its product.

        Args:
            matvec: From a vector to A times it: a pytree like `like`. Called from the host; it is
                jitted by whoever makes it, if at all.
            like: A pytree of floating arrays, or of `jax.ShapeDtypeStruct`s.
            matmat: From b stacked vectors, leaves `(b, *leaf.shape)`, to the stacked products.
                By default one `matvec` after another.
            name: What messages call it.
            symmetric: Whether A is symmetric.
            psd: Whether A is positive semidefinite.
            stochastic: Whether the product differs from call to call.

        Raises:
            TypeError: If a leaf of `like` is not floating.
            ValueError: If `like` has no elements.
        """
        tree.check_floating(like, "like")
        self.like = like
        self.size = tree.size(like)
        if self.size == 0:
            raise ValueError(f"{name}: the vectors have no elements (like has {tree.paths(like)}).")
        self.name = name
        self.symmetric = symmetric
        self.psd = psd
        self.stochastic = stochastic
        self._matvec = matvec
        self._matmat = matmat

    @property
    def dtype(self) -> Any:
        """The dtype of scalars: float64 if a leaf of `like` is, else float32."""
        return tree.accumulation_dtype(*jax.tree.leaves(self.like))

    def matvec(self, v: PyTree) -> PyTree:
        """The product A v.

        Raises:
            ValueError: If `v` is not of the operator's structure and shapes, naming the leaf.
            TypeError: If a leaf of `v` is not floating.
        """
        self._check(v, "the vector")
        return self._matvec(v)

    def matmat(self, vectors: PyTree) -> PyTree:
        """The products with b stacked vectors, leaves `(b, *leaf.shape)`; one data pass for all.

        Raises:
            ValueError: If a leaf has another shape, naming it.
        """
        b = tree.num_points(vectors)
        stacked = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((b, *jnp.shape(x)), jnp.result_type(x)), self.like
        )
        tree.check_same(stacked, vectors, names=(self.name, "the vectors"), dtype=False)
        tree.check_floating(vectors, "the vectors")
        if self._matmat is not None:
            return self._matmat(vectors)
        return tree.stack([self._matvec(v) for v in tree.unstack(vectors)])

    def random(self, key: jax.Array, distribution: Any = "normal") -> PyTree:
        """A random vector with independent entries; see `tree.random_like`."""
        return tree.random_like(key, self.like, distribution=distribution, dtype=self.dtype)

    def _check(self, v: PyTree, what: str) -> None:
        tree.check_same(self.like, v, names=(self.name, what), dtype=False)
        tree.check_floating(v, what)

    def __call__(self, v: PyTree) -> PyTree:
        """The product A v."""
        return self.matvec(v)

    def __repr__(self) -> str:
        kind = "psd" if self.psd else "symmetric" if self.symmetric else "not symmetric"
        extra = ", stochastic" if self.stochastic else ""
        return f"Operator({self.name}, size={self.size}, {kind}{extra})"

    def _with(self, other: "Operator", sign: float, name: str) -> "Operator":
        tree.check_same(self.like, other.like, names=(self.name, other.name), dtype=False)

        def matvec(v):
            return _axpy(sign, other._matvec(v), self._matvec(v))

        def matmat(vs):
            return _axpy(sign, other.matmat(vs), self.matmat(vs))

        return Operator(
            matvec,
            self.like,
            matmat=matmat,
            name=name,
            symmetric=self.symmetric and other.symmetric,
            psd=sign > 0 and self.psd and other.psd,
            stochastic=self.stochastic or other.stochastic,
        )

    def __add__(self, other: "Operator") -> "Operator":
        if not isinstance(other, Operator):
            return NotImplemented
        return self._with(other, 1.0, f"({self.name} + {other.name})")

    def __sub__(self, other: "Operator") -> "Operator":
        if not isinstance(other, Operator):
            return NotImplemented
        return self._with(other, -1.0, f"({self.name} - {other.name})")

    def __mul__(self, factor: Any) -> "Operator":
        if isinstance(factor, Operator) or jnp.ndim(factor):
            raise TypeError(
                f"{self.name}: an operator is scaled by one number, got "
                f"{type(factor).__name__}; use `a @ b` for products, `congruence` for diagonals."
            )
        positive = not isinstance(factor, Tracer) and float(factor) >= 0
        return Operator(
            lambda v: _scale(factor, self._matvec(v)),
            self.like,
            matmat=lambda vs: _scale(factor, self.matmat(vs)),
            name=f"{factor} * {self.name}",
            symmetric=self.symmetric,
            psd=self.psd and positive,
            stochastic=self.stochastic,
        )

    __rmul__ = __mul__

    def __truediv__(self, factor: Any) -> "Operator":
        return self * (1 / factor)

    def __neg__(self) -> "Operator":
        return self * -1.0

    def __matmul__(self, other: Any) -> Any:
        if not isinstance(other, Operator):
            return self.matvec(other)
        tree.check_same(self.like, other.like, names=(self.name, other.name), dtype=False)
        return Operator(
            lambda v: self._matvec(other._matvec(v)),
            self.like,
            matmat=lambda vs: self.matmat(other.matmat(vs)),
            name=f"({self.name} @ {other.name})",
            symmetric=self is other and self.symmetric,
            psd=self is other and self.symmetric,
            stochastic=self.stochastic or other.stochastic,
        )


def identity(like: PyTree) -> Operator:
    """The identity on pytrees like `like`."""
    return Operator(lambda v: v, like, matmat=lambda vs: vs, name="identity", psd=True)


def from_matrix(matrix: Any, *, name: str = "matrix", psd: bool = False) -> Operator:
    """The operator of a dense symmetric matrix, on flat vectors `(n,)`.

    Args:
        matrix: `(n, n)`, symmetric.
        name: What messages call it.
        psd: Whether it is positive semidefinite.

    Raises:
        ValueError: If the matrix is not square, or not symmetric to rounding.
    """
    matrix = jnp.asarray(matrix)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{name}: expected a square matrix, got shape {matrix.shape}.")
    host = np.asarray(matrix)
    gap = np.abs(host - host.T).max(initial=0.0)
    if not gap <= 100 * np.finfo(host.dtype).eps * np.abs(host).max(initial=0.0):
        raise ValueError(
            f"{name}: the matrix is not symmetric (entries differ from the transpose by up to "
            f"{gap:.3g}); expected A = A^T."
        )
    like = jax.ShapeDtypeStruct((matrix.shape[0],), matrix.dtype)
    return Operator(
        lambda v: _dense_product(matrix, v),
        like,
        matmat=lambda vs: _dense_products(matrix, vs),
        name=name,
        psd=psd,
    )


@jax.jit
def _dense_product(matrix: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.matmul(matrix, v.astype(matrix.dtype), precision="highest")


@jax.jit
def _dense_products(matrix: jax.Array, vs: jax.Array) -> jax.Array:
    return jnp.matmul(vs.astype(matrix.dtype), matrix.T, precision="highest")


def dense(operator: Operator, *, max_size: int = 5000) -> np.ndarray:
    """The matrix of a small operator, by n products.

    Args:
        operator: Any operator.
        max_size: The largest n for which this is done.

    Returns:
        `(n, n)`; rows and columns in the order of `jax.tree.leaves`, each leaf raveled.

    Raises:
        ValueError: For an operator of more than `max_size` rows.
    """
    if operator.size > max_size:
        raise ValueError(
            f"dense: {operator.name} has {operator.size} rows; expected at most {max_size}. Use "
            "`eigsh`, `trace` or `diagonal`, or raise max_size."
        )
    leaves, treedef = jax.tree.flatten(operator.like)
    columns = []
    block = 64
    for start in range(0, operator.size, block):
        rows = np.zeros((min(block, operator.size - start), operator.size), operator.dtype)
        rows[np.arange(len(rows)), start + np.arange(len(rows))] = 1
        vectors, offset = [], 0
        for leaf in leaves:
            n = int(np.prod(jnp.shape(leaf)))
            vectors.append(jnp.asarray(rows[:, offset : offset + n].reshape(-1, *jnp.shape(leaf))))
            offset += n
        products = jax.tree.leaves(operator.matmat(jax.tree.unflatten(treedef, vectors)))
        columns.append(np.concatenate([np.asarray(p).reshape(len(rows), -1) for p in products], 1))
    return np.concatenate(columns).T


def shift(operator: Operator, sigma: Any) -> Operator:
    """A + sigma I; a positive sigma is the usual damping."""
    known = not isinstance(sigma, Tracer)
    return Operator(
        lambda v: _axpy(sigma, v, operator._matvec(v)),
        operator.like,
        matmat=lambda vs: _axpy(sigma, vs, operator.matmat(vs)),
        name=f"({operator.name} + {sigma} I)",
        symmetric=operator.symmetric,
        psd=operator.psd and known and float(sigma) >= 0,
        stochastic=operator.stochastic,
    )


def _check_rows(operator: Operator, vectors: PyTree) -> int:
    k = tree.num_points(vectors)
    stacked = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((k, *jnp.shape(x)), jnp.result_type(x)), operator.like
    )
    tree.check_same(stacked, vectors, names=(operator.name, "vectors"), dtype=False)
    return k


_inner_many = jax.jit(jax.vmap(tree.inner_products, in_axes=(None, 0)))


def _subtract_span(vectors: PyTree, weights: Any, v: PyTree, out: PyTree) -> PyTree:
    """`out` minus the sum of weights_i u_i <u_i, v>."""
    return _axpy(-1.0, _combine(vectors, weights * _inner(vectors, v)), out)


def deflate(operator: Operator, vectors: PyTree, values: Any) -> Operator:
    """A - U diag(values) U^T: known eigenpairs taken out, their eigenvalues set to zero.

    Args:
        operator: A.
        vectors: k orthonormal vectors U, stacked, leaves `(k, *leaf.shape)`, such as the
            `eigenvectors` of `eigsh`.
        values: `(k,)`, their eigenvalues.

    Raises:
        ValueError: If shapes differ, naming the leaf.
    """
    k = _check_rows(operator, vectors)
    values = jnp.asarray(values, operator.dtype)
    if values.shape != (k,):
        raise ValueError(f"deflate: values have shape {values.shape}; expected ({k},).")

    def matmat(vs):
        weights = _inner_many(vectors, vs) * values[None]
        return _axpy(-1.0, _combine(vectors, weights), operator.matmat(vs))

    return Operator(
        lambda v: _subtract_span(vectors, values, v, operator._matvec(v)),
        operator.like,
        matmat=matmat,
        name=f"{operator.name} deflated by {k}",
        symmetric=operator.symmetric,
        stochastic=operator.stochastic,
    )


def project(operator: Operator, vectors: PyTree) -> Operator:
    """P A P with P = I - U U^T: the operator on the orthogonal complement of k vectors.

    Args:
        operator: A.
        vectors: k orthonormal vectors U, stacked.

    Raises:
        ValueError: If shapes differ, naming the leaf.
    """
    k = _check_rows(operator, vectors)
    ones = np.ones(k, operator.dtype)

    def off(v):
        return _subtract_span(vectors, ones, v, v)

    def off_many(vs):
        return _axpy(-1.0, _combine(vectors, _inner_many(vectors, vs)), vs)

    return Operator(
        lambda v: off(operator._matvec(off(v))),
        operator.like,
        matmat=lambda vs: off_many(operator.matmat(off_many(vs))),
        name=f"{operator.name} projected off {k}",
        symmetric=operator.symmetric,
        psd=operator.psd,
        stochastic=operator.stochastic,
    )


_multiply = jax.jit(
    lambda d, v: jax.tree.map(lambda a, b: (a.astype(b.dtype) * b).astype(b.dtype), d, v)
)


def _diagonal(operator: Operator, entries: PyTree) -> Operator:
    tree.check_same(operator.like, entries, names=(operator.name, "the diagonal"), dtype=False)
    return Operator(
        lambda v: _multiply(entries, v),
        operator.like,
        matmat=lambda vs: _multiply(jax.tree.map(lambda d: jnp.asarray(d)[None], entries), vs),
        name="diagonal",
    )


def congruence(operator: Operator, factor: Any) -> Operator:
    r"""M A M for a symmetric M: A in other coordinates.

    With M the diagonal :math:`P^{-1/2}` of a preconditioner P, its eigenvalues are those of
    :math:`P^{-1} A`, such as the sharpness that Adam sees.

    Args:
        operator: A.
        factor: M: a pytree like the parameters, the diagonal, or a symmetric `Operator`.

    Raises:
        ValueError: If shapes differ, naming the leaf.
    """
    if not isinstance(factor, Operator):
        factor = _diagonal(operator, factor)
    if not factor.symmetric:
        raise ValueError(f"congruence: {factor.name} is not symmetric; expected a symmetric M.")
    tree.check_same(operator.like, factor.like, names=(operator.name, factor.name), dtype=False)
    apply, apply_many, name = factor._matvec, factor.matmat, factor.name
    return Operator(
        lambda v: apply(operator._matvec(apply(v))),
        operator.like,
        matmat=lambda vs: apply_many(operator.matmat(apply_many(vs))),
        name=f"{name} * {operator.name} * {name}",
        symmetric=operator.symmetric,
        psd=operator.psd,
        stochastic=operator.stochastic,
    )


def restrict(operator: Operator, predicate: Callable[[str], bool]) -> Operator:
    """The diagonal block of A that belongs to some of the leaves.

    Args:
        operator: A.
        predicate: From a leaf's path, as `tree.paths` prints it, to whether it is in the block.

    Returns:
        An operator on the same structure with None in place of the other leaves. Each product
        costs one of A; where the operator comes from a loss, selecting the parameters when it is
        made (`hessian.hessian(..., select=...)`) is cheaper.

    Raises:
        ValueError: If no leaf is in the block, listing the paths.
    """
    leaves, treedef = jax.tree.flatten(operator.like)
    names = tree.paths(operator.like)
    kept = [predicate(name) for name in names]
    if not any(kept):
        raise ValueError(f"restrict: no leaf is selected; the paths are {', '.join(names)}.")

    def select(v):
        return jax.tree.unflatten(
            treedef,
            [leaf if k else None for leaf, k in zip(jax.tree.leaves(v), kept, strict=True)],
        )

    def embed(v, lead):
        chosen = iter(jax.tree.leaves(v))
        return jax.tree.unflatten(
            treedef,
            [
                next(chosen) if k else jnp.zeros((*lead, *jnp.shape(x)), operator.dtype)
                for x, k in zip(leaves, kept, strict=True)
            ],
        )

    return Operator(
        lambda v: select(operator._matvec(embed(v, ()))),
        select(operator.like),
        matmat=lambda vs: select(operator.matmat(embed(vs, (tree.num_points(vs),)))),
        name=f"a block of {operator.name}",
        symmetric=operator.symmetric,
        psd=operator.psd,
        stochastic=operator.stochastic,
    )
