"""Block eigensolver with a preconditioner, a mass matrix and a warm start: LOBPCG.

The tool for a few eigenpairs that are followed from checkpoint to checkpoint, for A x = lambda M x,
and wherever something that resembles the inverse of A is at hand.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from geojax import progress as progress_
from geojax import tree
from geojax.krylov import _dense
from geojax.krylov.operators import Operator
from geojax.krylov.results import Eigenpairs

__all__ = ["lobpcg"]

PyTree = Any
# How many steps without progress near the noise floor are taken for the floor itself.
_PATIENCE = 8

_multiply_rows = jax.jit(
    lambda diagonal, block: jax.tree.map(
        lambda d, x: (d.astype(x.dtype)[None] * x).astype(x.dtype), diagonal, block
    )
)


def lobpcg(
    operator: Operator,
    k: int,
    *,
    key: jax.Array,
    which: str = "LA",
    preconditioner: Any = None,
    mass: Any = None,
    mass_floor: float | None = None,
    initial: PyTree = None,
    tol: float = 1e-3,
    block_size: int | None = None,
    max_matvecs: int | None = None,
    progress: bool | None = None,
) -> Eigenpairs:
    r"""The k largest or smallest eigenpairs of A x = lambda M x, by blocks.

    Locally optimal block preconditioned conjugate gradients (Knyazev 2001): each step finds the
    best vectors in the span of the current ones X, of their preconditioned residuals W and of the
    last step P. The span is kept orthonormal throughout: W is projected and whitened twice, and P
    is chosen orthonormal to X by small matrices alone (Hetmaniuk and Lehoucq 2006; Duersch et al.
    2018), so products with A follow X and P without loss. Gram matrices are dealt with in float64
    on the host, whatever the dtype of the vectors.

    It differs from JAX's `lobpcg_standard` in the tolerance, which is a relative residual and knows
    nothing of n, and from Knyazev's in that blocks keep a few fixed widths (a product is compiled
    for each): when fewer pairs remain than a width has room for, the best of the others are
    improved as well. Converged pairs stay in the search (soft locking). Before it returns, the
    products are taken anew and the residuals measured.

    For Adam's preconditioned curvature :math:`P^{-1/2} H P^{-1/2}`, give its diagonal P as `mass`
    (eigenvectors are then M-orthonormal), or use `congruence` with :math:`P^{-1/2}`.

    Args:
        operator: A, symmetric, the same at each product.
        k: How many pairs.
        key: A typed key, for the starting vectors.
        which: 'LA' for the largest, 'SA' for the smallest.
        preconditioner: T, positive definite, which resembles the inverse of A (for 'SA'; of
            lambda_max M - A for 'LA') up to a factor: an `Operator`, a pytree like the parameters
            (its diagonal), or a function from stacked residuals `(w, *leaf.shape)` to as many
            directions.
        mass: M, positive definite: an `Operator`, or a pytree like the parameters, its diagonal.
            By default the identity. It is multiplied twice for each product with A.
        mass_floor: A positive number that no eigenvalue of M is below, such as its damping. The
            intervals of a problem with an `Operator` for M need one; without it they are infinite.
        initial: Stacked vectors to start from, such as the eigenvectors at another checkpoint.
        tol: The relative residual: :math:`\|A x - \lambda M x\| \le` `tol`
            :math:`|\lambda| \|M x\|`.
        block_size: The width of the block, at least k; by default k + 1 + k // 4. The spare
            vectors speed up the last pairs.
        max_matvecs: The budget of products with A; by default 100 blocks.
        progress: True or False for a bar; by default one appears when it takes long.

    Returns:
        `Eigenpairs`. `residuals` are Euclidean norms of A x - lambda M x for vectors of unit
        M-norm; `angles` are for M the identity and pi/2 otherwise. Memory: 14 blocks at the most,
        21 with a mass.

    Raises:
        ValueError: For a stochastic or asymmetric operator, an M that is not positive definite, or
            arguments out of range.
        FloatingPointError: If a product is NaN or infinite.

    Example:
        >>> from geojax import krylov
        >>> operator = krylov.from_matrix(np.diag(np.arange(1.0, 31.0, dtype=np.float32)))
        >>> pairs = lobpcg(operator, 2, key=jax.random.key(0))
        >>> np.round(pairs.eigenvalues, 3).tolist()
        [30.0, 29.0]

    Reference:
        Knyazev, Toward the optimal preconditioned eigensolver, 2001, algorithm 5.1; Duersch, Shao,
        Yang and Gu, A robust and efficient implementation of LOBPCG, 2018; Parlett, The symmetric
        eigenvalue problem, 1998, section 15.4 (the intervals with a mass).
    """
    width = _check(operator, k, which, tol, block_size, max_matvecs)
    k, tol = int(k), float(tol)
    budget = 100 * width if max_matvecs is None else int(max_matvecs)
    weigh = _mass(operator, mass, mass_floor)
    precondition = _preconditioner(operator, preconditioner)
    key_start, key_fill = jax.random.split(key)
    block = _dense.random_rows(operator, key_start, width)
    if initial is not None:
        given = _dense.check_rows("lobpcg", operator, initial, width)
        num = tree.num_points(given)
        block = _dense.mix((given, block), np.eye(width, num + width))[0] if num < width else given
    run = _Run(operator, weigh, width, k, which, tol, budget)
    with progress_.bar(budget, "lobpcg", show=progress) as bar:
        span = run.start(block, key_fill)
        while True:
            look = run.look(span)
            bar(
                run.num_matvecs,
                converged=f"{int(look.converged[:k].sum())}/{k}",
                worst=f"{float(look.residuals[:k].max()):.1e}",
            )
            stop = run.judge(span, look)
            if stop:
                break
            refresh = run.needs_refresh
            span = run.refresh(span) if refresh else run.step(span, look, precondition)
    return run.finish(span, look, stop, mass, mass_floor)


class _Span(NamedTuple):
    """The vectors X and the last step P, with their products, and how X was made."""

    x: PyTree
    p: PyTree
    ax: PyTree
    ap: PyTree
    mx: PyTree
    mp: PyTree
    values: np.ndarray
    fresh: bool


class _Look(NamedTuple):
    """The residual block and what it says."""

    residual: PyTree
    residuals: np.ndarray
    lengths: np.ndarray
    converged: np.ndarray
    floor: float


class _Run:
    """One call: what is measured on the way."""

    def __init__(self, operator, weigh, width, k, which, tol, budget):
        self.operator, self.weigh = operator, weigh
        self.width, self.k, self.tol, self.budget = width, k, tol, budget
        self.sign = 1.0 if which == "LA" else -1.0
        self.epsilon = float(jnp.finfo(operator.dtype).eps)
        self.num_matvecs = 0
        self.norm = 0.0
        self.noise = 0.0
        self.history: list = []
        self.needs_refresh = False
        self.plateau: list[float] = []
        self.measured: float | None = None
        self.spanned = False

    def products(self, block: PyTree, num: int) -> PyTree:
        out = _dense.products(self.operator, block)
        self.num_matvecs += num
        lengths = np.asarray(_dense.norms(out), np.float64)
        _dense.check_finite("lobpcg", lengths, self.operator, self.num_matvecs, num)
        if self.weigh is None:
            self.norm = max(self.norm, float(lengths.max()))
        return out

    def image(self, block: PyTree) -> PyTree:
        """M times the rows."""
        if self.weigh is None:
            return block
        out = self.weigh(block)
        if not np.isfinite(np.asarray(_dense.norms(out))).all():
            raise FloatingPointError(
                "lobpcg: a product with the mass matrix is not finite (after "
                f"{self.num_matvecs} products with {self.operator.name})."
            )
        return out

    def start(self, block: PyTree, key: jax.Array) -> _Span:
        mass = None if self.weigh is None else self.image
        for attempt in range(3):
            block, _, rank = _dense.orthonormal(block, mass=mass)
            if rank == self.width:
                break
            more = _dense.random_rows(self.operator, jax.random.fold_in(key, attempt), self.width)
            weights = np.eye(self.width, 2 * self.width)
            weights[np.arange(rank, self.width), np.arange(rank, self.width) + self.width] = 1
            (block,) = _dense.mix((block, more), weights)
        else:
            raise ValueError(
                f"lobpcg: no {self.width} independent vectors could be made"
                + (
                    ": the mass matrix is not positive definite to working precision."
                    if mass
                    else f" from initial and {self.operator.name}."
                )
            )
        return self._best_of(block)

    def _best_of(self, block: PyTree) -> _Span:
        """Rayleigh-Ritz on a block alone, with fresh products."""
        image = self.image(block)
        product = self.products(block, self.width)
        values, weights, _ = self._ritz((block,), (product,), (image,))
        (x,), (ax,) = _dense.mix((block,), weights), _dense.mix((product,), weights)
        mx = x if self.weigh is None else _dense.mix((image,), weights)[0]
        zero = np.zeros_like(weights)
        (p,) = _dense.mix((x,), zero)
        return _Span(x, p, ax, p, mx, p, values, True)

    def refresh(self, span: _Span) -> _Span:
        """The same vectors with products taken anew; the last step is kept."""
        self.needs_refresh = False
        best = self._best_of(span.x)
        return best._replace(p=span.p, ap=span.ap, mp=span.mp)

    def _ritz(self, blocks, products, images):
        """Values and weights of the best vectors in a span, and of the step that led there."""
        projected = _dense.gram(blocks, products)
        overlaps = _dense.gram(blocks, images)
        if not (np.isfinite(projected).all() and np.isfinite(overlaps).all()):
            raise FloatingPointError(
                f"lobpcg: inner products with the last of {self.num_matvecs} products with "
                f"{self.operator.name} are not finite; they overflow. Scale the operator."
            )
        live = np.flatnonzero(np.diag(overlaps) > 0.5)
        grid = np.ix_(live, live)
        self.noise = max(self.noise, float(np.abs(projected - projected.T)[grid].max()))
        h = (projected + projected.T)[grid] / 2
        g = (overlaps + overlaps.T)[grid] / 2
        lengths, basis = np.linalg.eigh(g)
        keep = lengths > 0.1
        scaled = basis[:, keep] / np.sqrt(lengths[keep])
        values, vectors = np.linalg.eigh(self.sign * scaled.T @ h @ scaled)
        self.norm = max(self.norm, float(np.abs(values).max()))
        order = np.argsort(-values, kind="stable")[: self.width]
        values, vectors = self.sign * values[order], vectors[:, order]
        total = len(projected)
        weights = np.zeros((self.width, total))
        weights[:, live] = (scaled @ vectors).T
        # The part of the new vectors outside the old ones, made orthonormal to the new ones.
        beyond = (scaled @ vectors).copy()
        beyond[live < self.width] = 0
        beyond = (basis[:, keep] * np.sqrt(lengths[keep])).T @ beyond
        beyond -= vectors @ (vectors.T @ beyond)
        left, sizes, _ = np.linalg.svd(beyond, full_matrices=False)
        left = left[:, sizes > 1e-8 * max(sizes.max(initial=0.0), 1e-6)]
        left -= vectors @ (vectors.T @ left)
        directions = np.zeros((self.width, total))
        directions[: left.shape[1], live] = (scaled @ left).T
        return values, weights, directions

    def look(self, span: _Span) -> _Look:
        values = np.asarray(span.values, self.operator.dtype)
        residual, sizes = _dense.defects(span.ax, span.mx, values)
        residuals = np.asarray(sizes, np.float64)
        lengths = np.ones(self.width)
        if self.weigh is not None:
            lengths = np.asarray(_dense.norms(span.mx), np.float64)
        floor = max(2 * self.epsilon * self.norm, self.noise)
        converged = _dense.accepted(
            span.values, residuals, self.norm, floor, self.tol, self.epsilon, lengths
        )
        self.history.append((self.num_matvecs, span.values[: self.k], residuals[: self.k]))
        return _Look(residual, residuals, lengths, converged, floor)

    def judge(self, span: _Span, look: _Look) -> str:
        """Why to stop, or nothing; decides whether products are to be taken anew."""
        done = look.converged[: self.k]
        relative = (look.residuals / look.lengths)[: self.k]
        worst = float(relative[~done].max(initial=0.0))
        self.plateau.append(worst)
        recent, before = self.plateau[-_PATIENCE:], self.plateau[:-_PATIENCE]
        idle = (
            len(before) > 0
            and worst <= 100 * look.floor
            and min(recent) > 0.7 * min(before[-_PATIENCE:])
        )
        if not span.fresh:
            deep = bool((relative <= 0.1 * look.floor)[~done].all())
            short = self.num_matvecs + 2 * self.width > self.budget
            self.needs_refresh = bool(done.all()) or idle or deep or short or self.spanned
            return ""
        if done.all():
            return "converged"
        # Products that followed the vectors promised more than fresh ones confirm: once is drift,
        # twice is what the arithmetic allows.
        stalled = self.measured is not None and worst > 0.5 * self.measured
        if idle or stalled or self.spanned:
            return "noise"
        if self.num_matvecs + 2 * self.width > self.budget:
            return f"stopped at max_matvecs={self.budget}"
        self.measured = worst if len(self.plateau) > 1 else None
        return ""

    def step(self, span: _Span, look: _Look, precondition) -> _Span:
        """One step: residuals in, better vectors out."""
        done = look.converged
        relative = look.residuals / look.lengths / np.maximum(np.abs(span.values), 1e-300)
        wanted = np.flatnonzero(~done[: self.k])
        spare = np.arange(self.k, self.width)
        need = len(wanted) + len(spare)
        num = self.width
        while num > 1 and (num + 1) // 2 >= need:
            num = (num + 1) // 2
        locked = np.flatnonzero(done[: self.k])
        locked = locked[np.argsort(-relative[locked], kind="stable")]
        rows = np.concatenate([wanted, spare, locked])[:num]
        w = _dense.take(look.residual, rows) if num < self.width else look.residual
        if precondition is not None:
            # At unit length, so that a tiny residual survives what is done to it.
            w, _ = _dense.unit_rows(w)
            w = precondition(w)
            if not np.isfinite(np.asarray(_dense.norms(w))).all():
                raise FloatingPointError(
                    "lobpcg: the preconditioner's result is not finite (after "
                    f"{self.num_matvecs} products with {self.operator.name})."
                )
        mass = None if self.weigh is None else self.image
        w, mw, rank = _dense.orthonormal(
            w, against=(span.x, span.p), images=(span.mx, span.mp), mass=mass
        )
        if rank == 0:
            # The vectors span all there is: an invariant space, or all of it.
            self.spanned = True
            return span
        aw = self.products(w, num)
        blocks, products = (span.x, span.p, w), (span.ax, span.ap, aw)
        images = blocks if self.weigh is None else (span.mx, span.mp, mw)
        values, weights, directions = self._ritz(blocks, products, images)
        x, p = _dense.mix(blocks, weights, directions)
        ax, ap = _dense.mix(products, weights, directions)
        mx, mp = (x, p) if self.weigh is None else tuple(_dense.mix(images, weights, directions))
        return _Span(x, p, ax, ap, mx, mp, values, False)

    def finish(self, span: _Span, look: _Look, stop: str, mass, mass_floor) -> Eigenpairs:
        k = self.k
        residuals = look.residuals[:k]
        converged = look.converged[:k]
        values = span.values[:k]
        near = residuals <= 1e3 * look.floor * look.lengths[:k]
        stuck = ~converged & near & (stop == "noise")
        reason = "stopped without progress" if stop in ("noise", "converged") else stop
        reasons = [
            "converged" if done else _dense.floor_reason(look.floor) if low else reason
            for done, low in zip(converged, stuck, strict=True)
        ]
        _dense.warn_stuck("lobpcg", self.operator, stuck, self.tol, look.floor, self.norm)
        intervals, others = None, span.values
        if self.weigh is not None:
            residual = _dense.take(look.residual, range(k))
            noise = look.floor * look.lengths[:k]
            radius = _radius(residual, residuals, noise, mass, mass_floor)
            intervals, others = np.stack([values - radius, values + radius], 1), np.zeros(0)
        return _dense.pairs(
            values=values,
            vectors=_dense.take(span.x, range(k)),
            residuals=residuals,
            converged=converged,
            reasons=reasons,
            num_matvecs=self.num_matvecs,
            floor=look.floor,
            history=self.history,
            others=others,
            intervals=intervals,
        )


def _radius(residual: PyTree, residuals, noise, mass: Any, mass_floor: float | None):
    """The norm of the residuals in the inverse of M: how far an eigenvalue can be."""
    if isinstance(mass, Operator):
        if mass_floor is None:
            return np.full(len(residuals), np.inf)
        return (residuals + noise) / np.sqrt(mass_floor)
    least = min(float(jnp.min(jnp.asarray(d), initial=jnp.inf)) for d in jax.tree.leaves(mass))
    root = jax.tree.map(lambda d: 1 / jnp.sqrt(jnp.asarray(d)), mass)
    measured = np.asarray(_dense.norms(_multiply_rows(root, residual)), np.float64)
    return measured + noise / np.sqrt(least)


def _check(operator, k, which, tol, block_size, max_matvecs) -> int:
    _dense.check_operator("lobpcg", operator, k)
    if which not in ("LA", "SA"):
        raise ValueError(
            f"lobpcg: which is {which!r}; expected 'LA' (largest) or 'SA' (smallest). For the "
            "largest magnitude or both ends use `eigsh`, for the inside `eigsh_interior`."
        )
    _dense.check_tol("lobpcg", tol)
    _dense.check_positive("lobpcg", block_size=block_size, max_matvecs=max_matvecs)
    if block_size is not None and block_size < k:
        raise ValueError(f"lobpcg: block_size is {block_size}; expected at least k = {k}.")
    width = int(k) + 1 + int(k) // 4 if block_size is None else int(block_size)
    width = min(width, operator.size)
    if max_matvecs is not None and max_matvecs < width:
        raise ValueError(
            f"lobpcg: max_matvecs is {max_matvecs}; expected at least one block of {width}."
        )
    return width


def _mass(operator: Operator, mass: Any, mass_floor: float | None):
    """From a block to M times it, or None for the identity."""
    if mass_floor is not None and not mass_floor > 0:
        raise ValueError(f"lobpcg: mass_floor is {mass_floor}; expected a positive number.")
    if mass is None:
        return None
    if isinstance(mass, Operator):
        if mass.stochastic or not mass.symmetric:
            raise ValueError(
                f"lobpcg: the mass {mass.name} must be one symmetric positive definite matrix."
            )
        tree.check_same(
            operator.like, mass.like, names=(operator.name, "the mass matrix"), dtype=False
        )
        return lambda block: _dense.products(mass, block)
    tree.check_same(operator.like, mass, names=(operator.name, "the mass matrix"), dtype=False)
    tree.check_floating(mass, "the mass matrix")
    for path, leaf in zip(tree.paths(mass), jax.tree.leaves(mass), strict=True):
        least = float(jnp.min(jnp.asarray(leaf), initial=jnp.inf))
        if not least > 0:
            raise ValueError(
                f"lobpcg: leaf {path} of the mass matrix has the entry {least:g}; expected a "
                "positive diagonal (add a damping)."
            )
    return lambda block: _multiply_rows(mass, block)


def _preconditioner(operator: Operator, given: Any) -> Callable[[PyTree], PyTree] | None:
    if given is None:
        return None
    if isinstance(given, Operator):
        tree.check_same(
            operator.like, given.like, names=(operator.name, "the preconditioner"), dtype=False
        )
        return lambda block: _dense.products(given, block)
    if callable(given):

        def call(block):
            out = given(block)
            tree.check_same(block, out, names=("the residuals", "the preconditioner's result"))
            return out

        return call
    tree.check_same(operator.like, given, names=(operator.name, "the preconditioner"), dtype=False)
    tree.check_floating(given, "the preconditioner")
    return lambda block: _multiply_rows(given, block)
