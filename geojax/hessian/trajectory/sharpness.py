"""Sharpness and learning rates: the edge of stability, the curvature along the gradient."""

from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np

from geojax import tree
from geojax.hessian.trajectory.subspaces import length_of, over
from geojax.krylov import Eigenpairs, Operator

__all__ = [
    "GradientCurvature",
    "Momentum",
    "Stability",
    "gradient_curvature",
    "stability",
    "stability_threshold",
]

PyTree = Any
Momentum = Literal["heavy_ball", "nesterov", "ema"]


class GradientCurvature(NamedTuple):
    r"""The curvature in the direction of the gradient.

    Attributes:
        curvature: :math:`\rho = g^T A g / \|g\|^2`.
        residual: :math:`\|A g - \rho g\| / \|g\|`: an eigenvalue lies within this of the curvature,
            and it is zero where the gradient is an eigenvector.
        gradient_norm: :math:`\|g\|`.
    """

    curvature: float
    residual: float
    gradient_norm: float


@jax.jit
def _rayleigh(unit: PyTree, product: PyTree) -> tuple[jax.Array, jax.Array]:
    value = tree.vdot(unit, product)
    return value, tree.norm(tree.axpy(-value, unit, product))


def gradient_curvature(operator: Operator, gradient: PyTree) -> GradientCurvature:
    r"""The curvature in the direction of the gradient, :math:`g^T A g / \|g\|^2`, by one product.

    To second order a step of gradient descent at rate :math:`\eta` changes the loss by
    :math:`-\eta \|g\|^2 (1 - \eta \rho / 2)`, so it falls while :math:`\rho < 2 / \eta`. The
    largest eigenvalue bounds it from above.

    Args:
        operator: A, the Hessian or another symmetric matrix.
        gradient: A pytree like the operator's vectors.

    Raises:
        ValueError: If the structures differ, naming the leaf; if the gradient is zero or not
            finite.
        TypeError: If a leaf is not floating.
        FloatingPointError: If the product is not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from geojax import krylov
        >>> operator = krylov.from_matrix(np.diag(np.array([1.0, 3.0], np.float32)))
        >>> found = gradient_curvature(operator, jnp.array([2.0, 2.0]))
        >>> round(found.curvature, 6), round(found.residual, 6)
        (2.0, 1.0)

    Reference:
        Cohen, Kaur, Li, Kolter and Talwalkar, Gradient Descent on Neural Networks Typically Occurs
        at the Edge of Stability, 2021; Parlett, The symmetric eigenvalue problem, 1998, theorem
        4.5.1 (the residual).
    """
    tree.check_same(operator.like, gradient, names=(operator.name, "the gradient"), dtype=False)
    tree.check_floating(gradient, "the gradient")
    length = float(length_of(gradient))
    if not (np.isfinite(length) and length > 0):
        raise ValueError(
            f"gradient_curvature: the norm of the gradient is {length}; expected a gradient that "
            "is finite and not zero."
        )
    unit = over(gradient, length)
    value, residual = (float(x) for x in _rayleigh(unit, operator.matvec(unit)))
    if not np.isfinite([value, residual]).all():
        raise FloatingPointError(
            f"gradient_curvature: the product with {operator.name} is not finite."
        )
    return GradientCurvature(value, residual, length)


class Stability(NamedTuple):
    """The largest eigenvalue against the largest that a learning rate is stable at.

    Attributes:
        sharpness: The largest eigenvalue.
        residual: How far it may be from an eigenvalue; 0 for one given as a number.
        threshold: See `stability_threshold`.
        ratio: `sharpness / threshold`: 1 at the edge of stability.
        stable: True below the threshold by more than the residual; False above it, which no error
            of an unconverged pair can undo, as its value is a lower bound; None where the pair's
            accuracy does not decide.
    """

    sharpness: float
    residual: float
    threshold: float
    ratio: float
    stable: bool | None


def stability_threshold(
    learning_rate: Any, momentum: Any = 0.0, *, form: Momentum = "heavy_ball"
) -> Any:
    r"""The largest eigenvalue at which gradient descent on a quadratic does not diverge.

    With rate :math:`\eta` and momentum :math:`\beta`: :math:`2 (1 + \beta) / \eta` for
    'heavy_ball', :math:`x_{t+1} = x_t - \eta g(x_t) + \beta (x_t - x_{t-1})`, the momentum of
    `optax.sgd` and of PyTorch; :math:`2 (1 + \beta) / (\eta (1 + 2 \beta))` for 'nesterov', the
    other momentum of both; and :math:`2 (1 + \beta) / (\eta (1 - \beta))` for 'ema', where the
    gradients are averaged with weights that sum to one, as in Adam. Without momentum all are
    :math:`2 / \eta`.

    Args:
        learning_rate: :math:`\eta`, positive; an array, such as a schedule's values, gives as many.
        momentum: :math:`\beta`, from 0 to 1.
        form: Which momentum.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> stability_threshold(0.1), round(stability_threshold(0.1, 0.9), 6)
        (20.0, 38.0)

    Reference:
        Cohen et al., Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability,
        2021 (momentum: appendix); Cohen et al., Adaptive Gradient Methods at the Edge of Stability,
        2022 ('ema': 38 over the learning rate at momentum 0.9).
    """
    if form not in get_args(Momentum):
        raise ValueError(f"form is {form!r}; expected one of {', '.join(get_args(Momentum))}.")
    rate, beta = np.asarray(learning_rate, np.float64), np.asarray(momentum, np.float64)
    if not (np.isfinite(rate).all() and (rate > 0).all()):
        raise ValueError(f"learning_rate is {learning_rate}; expected positive numbers.")
    if not ((beta >= 0) & (beta < 1)).all():
        raise ValueError(f"momentum is {momentum}; expected numbers from 0 to below 1.")
    scale = {"heavy_ball": 1.0, "nesterov": 1 / (1 + 2 * beta), "ema": 1 / (1 - beta)}[form]
    out = 2 * (1 + beta) / rate * scale
    return out if np.ndim(out) else float(out)


def stability(
    sharpness: float | Eigenpairs,
    learning_rate: float,
    momentum: float = 0.0,
    *,
    form: Momentum = "heavy_ball",
) -> Stability:
    r"""Whether gradient descent is stable along the direction of largest curvature.

    Full-batch training drives the largest eigenvalue up to the threshold and holds it there: the
    edge of stability. (Of negative eigenvalues nothing is said; along those every rate moves away.)

    For Adam the matrix is :math:`P^{-1/2} H P^{-1/2}` with the diagonal :math:`P = (1 - \beta_1^t)
    (\sqrt{\hat\nu_t} + \epsilon)` of its step t, as the example makes it of the state of
    `optax.scale_by_adam`; its eigenvalues are those of :math:`P^{-1} H`, and the form is 'ema'.

    Args:
        sharpness: The largest eigenvalue; or the `Eigenpairs` of `eigsh` or `eigenthings` for
            `which='LA'` or 'LM', whose residual and converged flag then count.
        learning_rate: :math:`\eta`.
        momentum: :math:`\beta`, Adam's :math:`\beta_1`.
        form: As for `stability_threshold`.

    Raises:
        ValueError: If an argument is out of range, or the pairs need not hold the largest
            eigenvalue.

    Example:
        >>> import jax.numpy as jnp
        >>> from geojax import krylov
        >>> operator = krylov.from_matrix(np.diag(np.array([25.0, 1.0], np.float32)))
        >>> pairs = krylov.eigsh(operator, 1, key=jax.random.key(0), which="LA")
        >>> found = stability(pairs, learning_rate=0.1)
        >>> round(found.ratio, 3), found.stable
        (1.25, False)

        The same for Adam, from the second moments `nu` after `count` steps:

        >>> nu, count, b1, b2, eps = jnp.array([1e4, 1.0]), 3, 0.9, 0.999, 1e-8
        >>> def factor(v):
        ...     p = (1 - b1**count) * (jnp.sqrt(v / (1 - b2**count)) + eps)
        ...     return 1 / jnp.sqrt(p)
        >>> adam = krylov.congruence(operator, jax.tree.map(factor, nu))
        >>> pairs = krylov.eigsh(adam, 1, key=jax.random.key(0), which="LA")
        >>> stability(pairs, 0.1, b1, form="ema").stable
        True

    Reference:
        Cohen et al., 2021; for Adam Cohen et al., 2022. Both as for `stability_threshold`.
    """
    threshold = stability_threshold(learning_rate, momentum, form=form)
    if not isinstance(sharpness, Eigenpairs):
        value = float(sharpness)
        if not np.isfinite(value):
            raise ValueError(f"sharpness is {value}; expected a finite eigenvalue.")
        return Stability(value, 0.0, threshold, value / threshold, value <= threshold)
    values = sharpness.eigenvalues
    if not len(values):
        raise ValueError("stability: there is no eigenpair; expected at least one.")
    if (len(values) > 1 and (np.diff(values) > 0).all()) or (len(values) == 1 and values[0] < 0):
        raise ValueError(
            "stability: the largest eigenvalue need not be among these pairs (they rise, or are "
            "one negative value). Compute them with which='LA'; or pass the number, if it is known "
            "to be the largest."
        )
    top = int(np.argmax(values))
    value, residual = float(values[top]), float(sharpness.residuals[top])
    stable: bool | None = None
    if value - sharpness.noise_floor > threshold:
        stable = False
    elif sharpness.converged[top] and value + residual < threshold:
        stable = True
    return Stability(value, residual, threshold, value / threshold, stable)
