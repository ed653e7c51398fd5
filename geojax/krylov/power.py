"""Power iteration, with deflation and momentum, and its stochastic form.

The plainest eigensolver: a baseline to measure others by, and in the form of Oja the one that works
when each product comes from another batch.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from geojax import progress as progress_
from geojax import tree
from geojax.krylov import _dense
from geojax.krylov.operators import Operator
from geojax.krylov.results import Eigenpairs, fix_signs, wanted

__all__ = ["StochasticEigenpair", "power_iteration", "stochastic_power_iteration"]

PyTree = Any
_LOOK_EVERY = 5
# Looks near the noise floor without progress before it is taken for the floor itself.
_PATIENCE = 10


class _Iterate(NamedTuple):
    """Two iterates on one scale, the later of unit norm, and the product with the earlier one."""

    v: PyTree
    earlier: PyTree
    earlier_product: PyTree


@jax.jit
def _advance(iterate: _Iterate, product: PyTree, found: PyTree, momentum: jax.Array):
    """One step off the found vectors, both iterates over the new one's norm; the product's norm."""
    v, earlier, _ = iterate
    nxt = _off(tree.axpy(-momentum, earlier, product), found)
    nxt = _off(nxt, found)
    length = tree.norm(nxt)
    moves = length > 0
    safe = jnp.where(moves, length, jnp.ones_like(length))
    over = lambda x: jax.tree.map(lambda a: a / safe.astype(a.dtype), x)  # noqa: E731
    v_next = jax.tree.map(lambda a, b: jnp.where(moves, a, b), over(nxt), v)
    return _Iterate(v_next, over(v), over(product)), tree.norm(product)


def _off(x: PyTree, found: PyTree) -> PyTree:
    """A vector without its components along orthonormal (or zero) rows."""
    return jax.tree.map(jnp.subtract, x, tree.combine(found, tree.inner_products(found, x)))


@jax.jit
def _two_rows(iterate: _Iterate, product: PyTree, found: PyTree) -> tuple[PyTree, PyTree]:
    """The two iterates as unit rows, and their products off the found vectors."""
    length = tree.norm(iterate.earlier)
    safe = jnp.where(length > 0, length, jnp.ones_like(length))
    over = lambda x: jax.tree.map(lambda a: a / safe.astype(a.dtype), x)  # noqa: E731
    rows = tree.stack([iterate.v, over(iterate.earlier)])
    products = tree.stack([_off(product, found), _off(over(iterate.earlier_product), found)])
    return rows, products


@jax.jit
def _start(vector: PyTree, found: PyTree) -> _Iterate:
    vector = _off(_off(vector, found), found)
    length = tree.norm(vector)
    safe = jnp.where(length > 0, length, jnp.ones_like(length))
    v = jax.tree.map(lambda a: a / safe.astype(a.dtype), vector)
    zero = jax.tree.map(lambda a: a * 0, v)
    return _Iterate(v, zero, zero)


def power_iteration(
    operator: Operator,
    k: int = 1,
    *,
    key: jax.Array,
    momentum: float = 0.0,
    tol: float = 1e-3,
    initial: PyTree = None,
    max_matvecs: int | None = None,
    progress: bool | None = None,
) -> Eigenpairs:
    r"""The k eigenpairs of largest magnitude, by deflated power iteration with momentum.

    .. math:: w_{t+1} = A w_t - \beta w_{t-1}

    with both iterates divided by :math:`\|w_{t+1}\|` (De Sa et al. 2017, algorithm 1). The
    eigenvalue is the Rayleigh quotient of A itself, so momentum does not bias it. The best beta is
    :math:`\lambda_2^2 / 4`, with which the number of products grows as the root of
    :math:`\lambda_1 / (\lambda_1 - \lambda_2)`; above :math:`\lambda_1^2 / 4` nothing converges.

    It stops on the residual, never on the change of the Rayleigh quotient, which is small wherever
    progress is slow. Eigenvalues that differ in sign alone keep the iterate in the plane of their
    vectors; the two latest iterates span it, and a Rayleigh-Ritz step in their span, which costs no
    product, gives both. Found vectors are projected out, and refined by a Rayleigh-Ritz step among
    themselves, so residuals are those of A and not of the deflated operator.

    Nothing in the method tells that an eigenvalue was passed over; `eigsh` needs far fewer products
    and looks for missed copies.

    Args:
        operator: A, symmetric, the same at each product.
        k: How many pairs.
        key: A typed key, for the starting vectors.
        momentum: beta, in units of the square of A. It is used for each of the pairs.
        tol: The relative residual, :math:`\|A x - \lambda x\| \le` `tol` :math:`|\lambda|`.
        initial: A vector, or several stacked ones, to start from.
        max_matvecs: The budget of products; by default 1000 for each pair.
        progress: True or False for a bar; by default one appears when it takes long.

    Returns:
        `Eigenpairs` by falling magnitude. Memory: 2 k + 12 vectors.

    Raises:
        ValueError: For a stochastic or asymmetric operator, or arguments out of range.
        FloatingPointError: If a product is NaN or infinite, naming which.

    Example:
        >>> from geojax import krylov
        >>> operator = krylov.from_matrix(np.diag(np.array([3.0, -1.0, 0.5], np.float32)))
        >>> pairs = power_iteration(operator, key=jax.random.key(0), momentum=0.25)
        >>> round(float(pairs.eigenvalues[0]), 4), bool(pairs.converged[0])
        (3.0, True)

    Reference:
        De Sa, He, Mitliagkas, Re and Xu, Accelerated stochastic power iteration, 2017, algorithm 1
        and theorem 2.
    """
    _dense.check_operator("power_iteration", operator, k)
    _dense.check_tol("power_iteration", tol)
    _dense.check_positive("power_iteration", max_matvecs=max_matvecs)
    if not (np.isfinite(momentum) and momentum >= 0):
        raise ValueError(f"power_iteration: momentum is {momentum}; expected at least 0.")
    k, budget = int(k), 1000 * int(k) if max_matvecs is None else int(max_matvecs)
    starts = []
    if initial is not None:
        lead = {
            jnp.ndim(x) - jnp.ndim(y)
            for x, y in zip(jax.tree.leaves(initial), jax.tree.leaves(operator.like), strict=False)
        }
        rows = initial if lead == {1} else jax.tree.map(lambda x: jnp.asarray(x)[None], initial)
        starts = tree.unstack(_dense.check_rows("power_iteration", operator, rows, k))
    run = _Power(operator, k, float(momentum), float(tol), budget)
    with progress_.bar(budget, "power_iteration", show=progress) as bar:
        turn = 0
        while run.goes_on():
            if run.num_found < k:
                key_turn = jax.random.fold_in(key, turn)
                vector = starts.pop(0) if starts else operator.random(key_turn)
                turn += 1
            else:
                vector = run.give_up_worst()
            run.find(vector, bar)
    return run.finish()


class _Power:
    """One call: the pairs found so far, with their products."""

    def __init__(self, operator: Operator, k: int, momentum: float, tol: float, budget: int):
        self.operator, self.k, self.momentum, self.tol = operator, k, momentum, tol
        self.budget = budget
        # One row more than k, for a pair that is found as one of two.
        self.capacity = min(k + 1, operator.size)
        like = operator.random(jax.random.key(0))
        self.vectors = _dense.mix((_dense.stack((like,)),), np.zeros((self.capacity, 1)))[0]
        self.products = self.vectors
        self.values = np.zeros(0)
        self.residuals = np.zeros(0)
        self.epsilon = float(jnp.finfo(operator.dtype).eps)
        self.num_matvecs, self.num_found = 0, 0
        self.norm, self.noise = 0.0, 0.0
        self.history: list = []
        self.stalled: set[int] = set()
        self.given_up = 0
        self.stop = ""

    @property
    def floor(self) -> float:
        return max(2 * self.epsilon * self.norm, self.noise)

    def good(self, values, residuals, tol) -> np.ndarray:
        return _dense.accepted(
            np.asarray(values), np.asarray(residuals), self.norm, self.floor, tol, self.epsilon
        )

    def goes_on(self) -> bool:
        if self.num_found < self.k:
            return self.num_matvecs < self.budget
        bad = ~self.good(self.values, self.residuals, self.tol)[: self.k]
        return bool(bad.any()) and self.num_matvecs < self.budget and self.given_up < 2 * self.k

    def multiply(self, v: PyTree) -> PyTree:
        self.num_matvecs += 1
        return _dense.product(self.operator, v)

    def find(self, vector: PyTree, bar) -> None:
        """Iterate until a pair (or two) is good enough, cannot get better, or the budget ends."""
        dtype = np.dtype(self.operator.dtype)
        momentum = np.asarray(self.momentum, dtype)
        iterate = _start(vector, self.vectors)
        best: list[float] = []
        lengths: list[Any] = []
        while True:
            product = self.multiply(iterate.v)
            last = self.num_matvecs >= self.budget
            if self.num_matvecs % _LOOK_EVERY == 0 or last:
                self.check(lengths)
                lengths = []
                rows, products = _two_rows(iterate, product, self.vectors)
                values, residuals, weights = self.inspect(rows, products)
                self.history.append(
                    (
                        self.num_matvecs,
                        [*self.values, values[0]],
                        [*self.residuals, residuals[0]],
                    )
                )
                bar(self.num_matvecs, found=self.num_found, residual=f"{residuals[0]:.1e}")
                good = self.good(values, residuals, self.tol / 2)
                room = self.capacity - self.num_found
                best.append(float(residuals[0]))
                idle = (
                    best[-1] <= 100 * self.floor
                    and len(best) > 2 * _PATIENCE
                    and min(best[-_PATIENCE:]) > 0.7 * min(best[:-_PATIENCE])
                )
                if good[0] or idle or last:
                    self.keep(rows, np.array([[1.0, 0.0]]), iterate, product)
                    return
                if good[1:].all() and len(good) == 3:
                    # Both where neither is the larger; else the smaller may not be next in line.
                    tied = abs(abs(values[1]) - abs(values[2])) <= residuals[1] + residuals[2]
                    chosen = weights[1:] if tied and room >= 2 else weights[1:2]
                    self.keep(rows, chosen, iterate, product)
                    return
            iterate, length = _advance(iterate, product, self.vectors, momentum)
            lengths.append(length)

    def check(self, lengths: list[Any]) -> None:
        """Raise for the first of the products before the last one that is not finite."""
        bad = np.flatnonzero(~np.isfinite(np.asarray(jax.device_get(lengths), np.float64)))
        if len(bad):
            at = self.num_matvecs - len(lengths) + int(bad[0])
            _dense.check_finite("power_iteration", np.nan, self.operator, at, 1)

    def inspect(self, rows: PyTree, products: PyTree):
        """The last iterate, and the best two vectors in the span of the last two."""
        overlaps = _dense.gram((rows,), (rows,))
        projected = _dense.gram((rows,), (products,))
        lengths = np.asarray(_dense.norms(products), np.float64)
        _dense.check_finite(
            "power_iteration",
            np.append(lengths, projected),
            self.operator,
            self.num_matvecs,
            1,
        )
        self.norm = max(self.norm, float(lengths.max()))
        weights = np.array([[1.0, 0.0]])
        values = np.array([projected[0, 0] / overlaps[0, 0] if overlaps[0, 0] > 0 else 0.0])
        sizes, basis = np.linalg.eigh((overlaps + overlaps.T) / 2)
        # Two iterates that are nearly parallel span a plane that rounding decides.
        if overlaps[1, 1] > 0.5 and sizes[0] > 1e3 * self.epsilon:
            self.noise = max(self.noise, float(abs(projected[0, 1] - projected[1, 0])))
            scaled = basis / np.sqrt(sizes)
            found, vectors = np.linalg.eigh(scaled.T @ (projected + projected.T) / 2 @ scaled)
            order = wanted(found, 2, "LM")
            values = np.concatenate([values, found[order]])
            weights = np.concatenate([weights, (scaled @ vectors[:, order]).T])
        if len(values) == 1:
            weights = np.concatenate([weights, np.zeros((2, 2))])
            values = np.append(values, [0.0, 0.0])
            residuals = self.residuals_of(rows, products, values, weights)
            return values[:1], residuals[:1], weights[:1]
        return values, self.residuals_of(rows, products, values, weights), weights

    def residuals_of(self, rows, products, values, weights) -> np.ndarray:
        (x,), (ax,) = _dense.mix((rows,), weights), _dense.mix((products,), weights)
        _, sizes = _dense.defects(ax, x, np.asarray(values, self.operator.dtype))
        return np.asarray(sizes, np.float64)

    def keep(self, rows, weights, iterate: _Iterate, product: PyTree) -> None:
        """Add vectors to the found ones and refine all of them in their common span."""
        length = float(tree.norm(iterate.earlier))
        scale = 1 / length if length > 0 else 0.0
        raw = _dense.stack((product, iterate.earlier_product))
        num, add = self.num_found, len(weights)
        lift = np.zeros((self.capacity, self.capacity + 2))
        lift[np.arange(num), np.arange(num)] = 1
        lift[num : num + add, self.capacity :] = weights
        (vectors,) = _dense.mix((self.vectors, rows), lift)
        lift[:, -1] *= scale
        (products,) = _dense.mix((self.products, raw), lift)
        self.num_found = num + add
        projected = _dense.gram((vectors,), (products,))
        overlaps = _dense.gram((vectors,), (vectors,))
        grid = np.ix_(np.arange(self.num_found), np.arange(self.num_found))
        sizes, basis = np.linalg.eigh((overlaps + overlaps.T)[grid] / 2)
        scaled = basis / np.sqrt(sizes)
        h = (projected + projected.T)[grid] / 2
        values, small = np.linalg.eigh(scaled.T @ h @ scaled)
        order = wanted(values, len(values), "LM")
        rotate = np.zeros((self.capacity, self.capacity))
        rotate[grid] = (scaled @ small[:, order]).T
        (self.vectors,) = _dense.mix((vectors,), rotate)
        (self.products,) = _dense.mix((products,), rotate)
        self.values = values[order]
        padded = np.zeros(self.capacity, np.dtype(self.operator.dtype))
        padded[: self.num_found] = self.values
        _, lengths = _dense.defects(self.products, self.vectors, padded)
        self.residuals = np.asarray(lengths, np.float64)[: self.num_found]

    def give_up_worst(self) -> PyTree:
        """Take the pair that is worst for its size out of the found ones, to go on with it."""
        self.given_up += 1
        reference = np.maximum(np.abs(self.values), self.epsilon ** (2 / 3) * self.norm)
        bad = ~self.good(self.values, self.residuals, self.tol)
        ratio = np.where(bad, self.residuals / np.where(reference > 0, reference, 1), -1)
        worst = int(np.argmax(ratio[: self.k]))
        vector = tree.unstack(_dense.take(self.vectors, [worst]))[0]
        left = [i for i in range(self.num_found) if i != worst]
        move = np.zeros((self.capacity, self.capacity))
        move[np.arange(len(left)), left] = 1
        (self.vectors,) = _dense.mix((self.vectors,), move)
        (self.products,) = _dense.mix((self.products,), move)
        self.values, self.residuals = self.values[left], self.residuals[left]
        self.num_found -= 1
        return vector

    def finish(self) -> Eigenpairs:
        num = min(self.k, self.num_found)
        values, residuals = self.values[:num], self.residuals[:num]
        converged = self.good(values, residuals, self.tol)
        stuck = ~converged & (residuals <= 100 * self.floor) & (self.num_matvecs < self.budget)
        spent = f"stopped at max_matvecs={self.budget}"
        heavy = (np.abs(values) <= 2 * np.sqrt(self.momentum)) & (self.momentum > 0)
        reasons = [
            "converged"
            if done
            else _dense.floor_reason(self.floor)
            if low
            else f"momentum {self.momentum:g} is too large: expected less than eigenvalue^2 / 4"
            if much
            else spent
            for done, low, much in zip(converged, stuck, heavy, strict=True)
        ]
        _dense.warn_stuck("power_iteration", self.operator, stuck, self.tol, self.floor, self.norm)
        return _dense.pairs(
            values=values,
            vectors=_dense.take(self.vectors, range(num)),
            residuals=residuals,
            converged=converged,
            reasons=reasons,
            num_matvecs=self.num_matvecs,
            floor=self.floor,
            history=self.history,
            others=self.values,
        )


class StochasticEigenpair(NamedTuple):
    r"""An eigenpair of the mean of a random operator, as Oja's iteration estimates it.

    Attributes:
        eigenvalue: The mean of the Rayleigh quotients of the last half of the steps. It estimates
            the Rayleigh quotient of the mean operator, which is below the largest eigenvalue by the
            gap times the squared sine of the vector's error.
        standard_error: Of that mean, from means of consecutive steps (batch means), so that
            dependence between nearby steps is counted.
        variance: Of a single Rayleigh quotient: how much one batch differs from another.
        eigenvector: A pytree of unit norm; the entry of largest magnitude is positive.
        drift: The second half of those quotients minus the first half, carried on to endless steps
            (the error of a spectrum without a gap falls as one over the sum of the step sizes):
            what the iteration would still gain at that rate.
        converged: Whether the standard error is within `tol` of the eigenvalue, and the drift too,
            or not to be told from noise. No proof: see `residuals` of `eigsh` for that.
        reason: 'converged', or why not.
        num_matvecs: Products.
        rayleigh_quotients: `(num_steps,)`, float64.
    """

    eigenvalue: float
    standard_error: float
    variance: float
    eigenvector: PyTree
    drift: float
    converged: bool
    reason: str
    num_matvecs: int
    rayleigh_quotients: np.ndarray


@jax.jit
def _oja_step(v: PyTree, product: PyTree, size: jax.Array, rate: jax.Array, sign: jax.Array):
    """Add rate / size times the product, at unit norm; size follows the norm of the products."""
    quotient = tree.vdot(v, product)
    length = tree.norm(product)
    # The norm of the first product alone, then a mean that forgets.
    size = jnp.where(size > 0, size + (length - size) / 10, length)
    safe = jnp.where(size > 0, size, jnp.ones_like(size))
    scaled = jax.tree.map(lambda p: p / safe.astype(p.dtype), product)
    moved = jax.tree.map(jnp.add, v, tree.scale(sign * rate, scaled))
    length = tree.norm(moved)
    over = jnp.where(length > 0, length, jnp.ones_like(length))
    moved = jax.tree.map(lambda m: m / over.astype(m.dtype), moved)
    return moved, size, quotient


def stochastic_power_iteration(
    operator: Operator,
    *,
    key: jax.Array,
    num_steps: int = 1000,
    which: str = "LA",
    step_size: float = 1.0,
    decay_steps: float | None = None,
    tol: float = 2e-2,
    initial: PyTree = None,
    progress: bool | None = None,
) -> StochasticEigenpair:
    r"""The largest eigenvalue of the mean of a random operator: Oja's iteration.

    .. math:: w_{t+1} = v_t + \frac{\eta_t}{s_t} A_t v_t, \quad v_{t+1} = w_{t+1} / \|w_{t+1}\|,
              \quad \eta_t = \frac{\eta}{1 + t / \tau}

    with :math:`s_t` a running mean of :math:`\|A_t v_t\|`, so that steps have no units. Each
    product may come from another batch (`operator.stochastic`); it is multiplied with one vector
    and forgotten. The eigenvalue is the mean of the last half of the Rayleigh quotients
    :math:`\langle v_t, A_t v_t \rangle`: `v_t` knows nothing of the batch of step t, so each is
    unbiased for the mean operator, which the Rayleigh quotient of one batch's top vector is not.

    Args:
        operator: A, stochastic or not, symmetric; the mean of its products is a fixed matrix.
        key: A typed key, for the starting vector.
        num_steps: Products.
        which: 'LA' for the largest eigenvalue, 'SA' for the smallest.
        step_size: :math:`\eta`.
        decay_steps: :math:`\tau`; by default a twentieth of the steps.
        tol: The relative standard error and drift that count as converged.
        initial: A vector to start from.
        progress: True or False for a bar; by default one appears when it takes long.

    Returns:
        `StochasticEigenpair`, with its standard error. Memory: 4 vectors.

    Raises:
        ValueError: For an asymmetric operator, or arguments out of range.
        FloatingPointError: If a product is NaN or infinite, naming which.

    Example:
        >>> from geojax import krylov
        >>> operator = krylov.from_matrix(np.diag(np.array([3.0, 1.0, 0.5], np.float32)))
        >>> pair = stochastic_power_iteration(operator, key=jax.random.key(0), num_steps=200)
        >>> round(pair.eigenvalue, 3)
        3.0

    Reference:
        Oja, A simplified neuron model as a principal component analyzer, 1982; Jain, Jin, Kakade,
        Netrapalli and Sidford, Streaming PCA: matching matrix Bernstein, 2016 (the step sizes).
    """
    name = "stochastic_power_iteration"
    if not operator.symmetric:
        raise ValueError(f"{name}: {operator.name} is not symmetric; expected a symmetric one.")
    if which not in ("LA", "SA"):
        raise ValueError(f"{name}: which is {which!r}; expected 'LA' (largest) or 'SA' (smallest).")
    _dense.check_tol(name, tol)
    if not isinstance(num_steps, (int, np.integer)) or num_steps < 40:
        raise ValueError(f"{name}: num_steps is {num_steps!r}; expected an integer of at least 40.")
    decay_steps = num_steps / 20 if decay_steps is None else decay_steps
    if not (step_size > 0 and decay_steps > 0):
        raise ValueError(
            f"{name}: step_size is {step_size} and decay_steps {decay_steps}; expected positive "
            "numbers."
        )
    dtype = np.dtype(operator.dtype)
    v = operator.random(key)
    if initial is not None:
        rows = jax.tree.map(lambda x: jnp.asarray(x)[None], initial)
        v = tree.unstack(_dense.check_rows(name, operator, rows, 1))[0]
    v = tree.unstack(_dense.unit_rows(_dense.stack((v,)))[0])[0]
    sign = np.asarray(1 if which == "LA" else -1, dtype)
    size, pending, quotients = np.asarray(0, dtype), [], []
    with progress_.bar(num_steps, name, show=progress) as bar:
        for t in range(num_steps):
            rate = np.asarray(step_size / (1 + t / decay_steps), dtype)
            product = _dense.product(operator, v)
            v, size, quotient = _oja_step(v, product, size, rate, sign)
            pending.append(quotient)
            if len(pending) == 20 or t + 1 == num_steps:
                found = np.asarray(jax.device_get(pending), np.float64)
                bad = np.flatnonzero(~np.isfinite(found))
                if len(bad):
                    at = len(quotients) + int(bad[0]) + 1
                    _dense.check_finite(name, np.nan, operator, at, 1)
                quotients.extend(found)
                pending = []
                bar(t + 1, eigenvalue=f"{np.mean(quotients[-20:]):.4g}")
    quotients = np.array(quotients)
    tail = quotients[-(num_steps // 2) :]
    value, error = float(tail.mean()), _error_of_mean(tail)
    first, second = tail[: len(tail) // 2], tail[len(tail) // 2 :]
    # Of successive differences, so that a trend does not pass for noise.
    noise = np.sqrt(np.mean(np.square(np.diff(tail))) / 2 * (1 / len(first) + 1 / len(second)))
    path = np.cumsum(step_size / (1 + np.arange(num_steps) / decay_steps))
    middles = num_steps - len(tail) + np.array([len(first) // 2, len(first) + len(second) // 2])
    onward = float(path[-1] / (path[middles[1]] - path[middles[0]]))
    gained = float(second.mean() - first.mean())
    drift = onward * gained
    steady = abs(gained) <= 3 * noise or abs(drift) <= tol * abs(value)
    precise = error <= tol * abs(value)
    reason = "converged"
    if not steady:
        reason = "the Rayleigh quotient still moves: take more steps, or a larger decay_steps"
    elif not precise:
        reason = f"the standard error is above tol={tol:g} of the eigenvalue: take more steps"
    return StochasticEigenpair(
        eigenvalue=value,
        standard_error=error,
        variance=float(tail.var(ddof=1)),
        eigenvector=tree.unstack(fix_signs(_dense.stack((v,))))[0],
        drift=drift,
        converged=steady and precise,
        reason=reason,
        num_matvecs=num_steps,
        rayleigh_quotients=quotients,
    )


def _error_of_mean(samples: np.ndarray) -> float:
    """The standard error of the mean of a series, by batch means where there are enough."""
    num = min(len(samples), 20)
    means = np.array([part.mean() for part in np.array_split(samples, num)])
    alone = samples.std(ddof=1) / np.sqrt(len(samples))
    # Neighbors that depend on each other make batch means vary more, never less.
    return float(max(alone, means.std(ddof=1) / np.sqrt(num)))
