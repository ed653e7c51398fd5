"""Losses of a network's outputs, with the products of their Hessians in closed form.

Each is written so that XLA fuses it into passes over the outputs: no array of their size is made
besides the result. The Gauss-Newton and Fisher operators are built on them.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from geojax import tree
from geojax.hessian.products import replicated, sharded_like

__all__ = [
    "OutputLoss",
    "Targets",
    "binary_cross_entropy",
    "huber",
    "mse",
    "poisson",
    "softmax_cross_entropy",
]

PyTree = Any
Part = str | Callable[[PyTree], Any] | None
Reduction = Literal["mean", "sum"]


class Targets(NamedTuple):
    """What a batch says of its outputs.

    Attributes:
        labels: The labels, aligned with the terms.
        mask: How much each term counts, of the terms' shape; None for all alike.
    """

    labels: jax.Array
    mask: jax.Array | None


@dataclasses.dataclass(frozen=True)
class OutputLoss:
    """A mean over terms: the positions of a softmax, or the single outputs of the other losses.

    Call it as `loss(outputs, batch)` for the loss itself. Terms that are masked out count for
    nothing, even if they are NaN, and the mean is over the sum of the mask; with nothing left, the
    loss and all products are exactly zero. Everything is computed in float32 or better.

    Two losses made with equal options are equal, and share what is compiled for them.

    Attributes:
        labels: Where a batch has its labels: the name of an entry, or a function of the batch. By
            default the entry 'labels' of a dict, or the second of a pair.
        mask: Where it has a mask, if it does: booleans or weights, in the shape of the terms or its
            leading axes.
    """

    labels: Part = None
    mask: Part = None

    @property
    def convex(self) -> bool:
        """Whether the Hessian in the outputs is positive semidefinite everywhere."""
        return True

    @property
    def likelihood(self) -> bool:
        """Whether this is a negative log-likelihood, of which labels can be drawn."""
        return True

    @property
    def masked(self) -> bool:
        """Whether some terms may count less than others."""
        return self.mask is not None

    @property
    def name(self) -> str:
        """What messages call the loss."""
        return type(self).__name__.strip("_")

    def __call__(self, outputs: jax.Array, batch: PyTree) -> jax.Array:
        """The loss of a batch, a scalar."""
        targets = self.targets(outputs, batch)
        return self.total(outputs, targets) * self.normalizer(outputs, targets)

    def hessian_product(self, outputs: jax.Array, batch: PyTree, u: jax.Array) -> jax.Array:
        """The Hessian in the outputs, times `u`: in the shape and dtype of `u`."""
        targets = self.targets(outputs, batch)
        out = self.curvature(outputs, targets, u) * self.normalizer(outputs, targets)
        return out.astype(u.dtype)

    def sampled_product(
        self, key: jax.Array, outputs: jax.Array, batch: PyTree, u: jax.Array
    ) -> jax.Array:
        r"""An unbiased estimate of `hessian_product`, with labels drawn from the prediction.

        For each term it is :math:`g \langle g, u \rangle`, g the term's gradient with a drawn label
        in place of its own: positive semidefinite for any draw.

        Args:
            key: A key, or keys `(num_examples,)` along the leading axis of the outputs.
            outputs: As for the loss.
            batch: As for the loss; its labels matter only where they carry weights.
            u: Like the outputs.

        Raises:
            TypeError: If the loss is no likelihood.
        """
        if not self.likelihood:
            raise TypeError(
                f"{self.name} is no likelihood of which labels can be drawn; use `ggn`, which "
                "draws none, or `empirical_fisher`."
            )
        targets = self.targets(outputs, batch)
        z, w = widened(outputs), widened(u)
        # Keys of their own make an example's draw the same however the data is cut.
        draw = jax.vmap(self.draw) if key.ndim else self.draw
        out = self.sampled(self.drawn(draw, key, z), z, targets.labels, w)
        out = masked(out, _to_outputs(targets.mask, z))
        return (out * self.normalizer(outputs, targets)).astype(u.dtype)

    def weight(self, batch: PyTree) -> jax.Array:
        """What a batch weighs in a mean over the data: the sum of its mask."""
        return jnp.sum(jnp.asarray(part(self.mask, batch, "mask")).astype(jnp.float32))

    def targets(self, outputs: Any, batch: PyTree) -> Targets:
        """The labels and the mask of a batch, in the shapes of the terms; only shapes are read."""
        labels = self.aligned(check_output(outputs, self.name), part(self.labels, batch, "labels"))
        if self.mask is None:
            return Targets(labels, None)
        mask = self._mask(outputs, part(self.mask, batch, "mask"))
        return Targets(labels, mask)

    def _mask(self, outputs: Any, mask: Any) -> jax.Array:
        mask, shape = jnp.asarray(mask), self.terms(outputs)
        if mask.shape != shape[: mask.ndim]:
            raise ValueError(
                f"{self.name}: the mask has shape {mask.shape}; expected {shape}, the shape of the "
                "terms, or its leading axes."
            )
        mask = mask.astype(tree.accumulation_dtype(outputs))
        return jnp.broadcast_to(jnp.expand_dims(mask, tuple(range(mask.ndim, len(shape)))), shape)

    def normalizer(self, outputs: Any, targets: Targets) -> jax.Array:
        """One over the number of terms, or over the sum of the mask; 0 where that is 0."""
        dtype = tree.accumulation_dtype(outputs)
        if targets.mask is None:
            num = math.prod(self.terms(outputs)) / self.terms_per_unit(outputs)
            return jnp.asarray(1 / num, dtype)
        total = jnp.sum(targets.mask) / jnp.asarray(self.terms_per_unit(outputs), dtype)
        positive = total > 0
        one = jnp.ones_like(total)
        return jnp.where(positive, one / jnp.where(positive, total, one), jnp.zeros_like(total))

    def total(self, outputs: jax.Array, targets: Targets) -> jax.Array:
        """The sum of the terms, in float32 or better."""
        z = widened(outputs)
        if targets.mask is not None:
            # What is masked must be finite, or the derivative of its zero term would not be.
            z = kept(_to_outputs(targets.mask, z) != 0, z)  # pyright: ignore[reportArgumentType]
        return jnp.sum(masked(self.values(z, targets.labels), targets.mask))

    def curvature(self, outputs: jax.Array, targets: Targets, u: jax.Array) -> jax.Array:
        """The Hessian of the sum of the terms, times `u`, in float32 or better."""
        z = widened(outputs)
        out = self.product(z, targets.labels, widened(u))
        return masked(out, _to_outputs(targets.mask, z))

    # What a loss defines: the shape of its terms, the labels' check, and its mathematics.

    def terms(self, outputs: Any) -> tuple[int, ...]:
        """The shape of the terms."""
        return outputs.shape

    def terms_per_unit(self, outputs: Any) -> int:
        """How many terms make up one of what the mean is over."""
        del outputs
        return 1

    def aligned(self, outputs: Any, labels: Any) -> jax.Array:
        """The labels as `values` and `product` take them."""
        raise NotImplementedError

    def values(self, z: jax.Array, labels: jax.Array) -> jax.Array:
        """The loss of each term."""
        raise NotImplementedError

    def product(self, z: jax.Array, labels: jax.Array, u: jax.Array) -> jax.Array:
        """The Hessian of each term, times `u`."""
        raise NotImplementedError

    def drawn(self, draw: Callable, key: jax.Array, z: jax.Array) -> jax.Array:
        """`draw(key, z)`, where it may need its arguments on one device."""
        return draw(key, z)

    def draw(self, key: jax.Array, z: jax.Array) -> jax.Array:
        """A label for each term, drawn from the prediction."""
        raise NotImplementedError

    def sampled(self, drawn: jax.Array, z: jax.Array, labels: jax.Array, u: jax.Array) -> jax.Array:
        """As `product`, from one drawn label for each term."""
        raise NotImplementedError


def widened(x: jax.Array) -> jax.Array:
    """The array in float32 or better."""
    return x.astype(tree.accumulation_dtype(x))


def _to_outputs(mask: jax.Array | None, outputs: jax.Array) -> jax.Array | None:
    if mask is None or mask.ndim == outputs.ndim:
        return mask
    return jnp.expand_dims(mask, tuple(range(mask.ndim, outputs.ndim)))


def masked(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The values times the mask, and exactly zero where it is zero, whatever the value."""
    if mask is None:
        return values
    return kept(mask != 0, values * mask)


def kept(condition: jax.Array, x: jax.Array) -> jax.Array:
    """`x` where the condition, sharded as types demand it, holds; zero elsewhere."""
    condition = sharded_like(x, jnp.broadcast_to(condition, x.shape))
    return jnp.where(condition, x, jnp.zeros_like(x))


def check_output(outputs: Any, name: str) -> Any:
    """The outputs, once they are known to be one floating array."""
    if not hasattr(outputs, "dtype") or not jnp.issubdtype(outputs.dtype, jnp.floating):
        kind = getattr(outputs, "dtype", type(outputs).__name__)
        raise TypeError(
            f"{name}: the outputs are {kind}; expected one floating array. Let the model function "
            "return the outputs alone (without a new state), or give a loss of your own, "
            "fn(outputs, batch) -> scalar."
        )
    return outputs


def part(where: Part, batch: PyTree, what: str) -> Any:
    """The labels or the mask of a batch."""
    if callable(where):
        return where(batch)
    if isinstance(where, str):
        if isinstance(batch, dict) and where in batch:
            return batch[where]
        raise ValueError(
            f"{what}: expected batches that are dicts with an entry {where!r}, got "
            f"{jax.tree.structure(batch)}."
        )
    if isinstance(batch, dict) and "labels" in batch:
        return batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[1]
    raise ValueError(
        f"{what}: expected batches (inputs, labels) or dicts with an entry 'labels', got "
        f"{jax.tree.structure(batch)}; say where they are with `{what}=`, an entry's name or a "
        "function of the batch."
    )


# ------------------------------------------------------------------------------- cross-entropies


@dataclasses.dataclass(frozen=True)
class _SoftmaxCrossEntropy(OutputLoss):
    smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None
    temperature: float = 1.0
    z_loss: float = 0.0
    ignore_label: int | None = None

    @property
    def convex(self) -> bool:
        return self.z_loss == 0

    @property
    def likelihood(self) -> bool:
        return self.z_loss == 0

    @property
    def masked(self) -> bool:
        return self.mask is not None or self.ignore_label is not None

    def terms(self, outputs):
        return outputs.shape[:-1]

    def aligned(self, outputs, labels):
        labels = jnp.asarray(labels)
        soft = jnp.issubdtype(labels.dtype, jnp.floating)
        want = outputs.shape if soft else outputs.shape[:-1]
        if labels.shape != want or not len(outputs.shape):
            raise ValueError(
                f"{self.name}: the labels are {labels.dtype} of shape {labels.shape} and the "
                f"outputs of shape {outputs.shape}; expected integers {outputs.shape[:-1]} or "
                f"probabilities {outputs.shape}."
            )
        if self.class_weights is not None and len(self.class_weights) != outputs.shape[-1]:
            raise ValueError(
                f"{self.name}: {len(self.class_weights)} class weights for {outputs.shape[-1]} "
                "classes."
            )
        if soft and self.ignore_label is not None:
            raise ValueError(f"{self.name}: ignore_label needs integer labels, not probabilities.")
        return labels.astype(tree.accumulation_dtype(outputs) if soft else jnp.int32)

    def targets(self, outputs, batch):
        labels, mask = super().targets(outputs, batch)
        if self.ignore_label is not None:
            known = (labels != self.ignore_label).astype(tree.accumulation_dtype(outputs))
            mask = known if mask is None else mask * known
        return Targets(labels, mask)

    def weight(self, batch):
        if self.ignore_label is None:
            return super().weight(batch)
        labels = jnp.asarray(part(self.labels, batch, "labels")).astype(jnp.int32)
        known = (labels != self.ignore_label).astype(jnp.float32)
        if self.mask is not None:
            mask = jnp.asarray(part(self.mask, batch, "mask")).astype(jnp.float32)
            known = known * jnp.expand_dims(mask, tuple(range(mask.ndim, known.ndim)))
        return jnp.sum(known)

    def _per_class(self, z):
        return jnp.broadcast_to(jnp.asarray(self.class_weights, z.dtype), z.shape)

    def _chosen(self, z, labels, values):
        """Of each position the value at its label; a label that is no class gives NaN."""
        num = z.shape[-1]
        classes = jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1)
        out = jnp.sum(kept(classes == jnp.expand_dims(labels, -1), values), axis=-1)
        return jnp.where((labels >= 0) & (labels < num), out, jnp.full_like(out, jnp.nan))

    def _against(self, z, labels, values):
        """The sum over classes of target times class weight times `values`, for each position."""
        if self.class_weights is not None:
            values = values * self._per_class(z)
        if jnp.issubdtype(labels.dtype, jnp.floating):
            out = jnp.sum(labels * values, axis=-1)
        else:
            out = self._chosen(z, labels, values)
        if self.smoothing:
            spread = jnp.sum(values, axis=-1) / z.shape[-1]
            out = (1 - self.smoothing) * out + self.smoothing * spread
        return out

    def _total(self, z, labels):
        """The sum over classes of target times class weight, for each position."""
        if self.class_weights is None and not jnp.issubdtype(labels.dtype, jnp.floating):
            valid = (labels >= 0) & (labels < z.shape[-1])
            return jnp.where(valid, jnp.ones_like(labels, z.dtype), jnp.nan)
        return self._against(z, labels, jnp.ones_like(z))

    def values(self, z, labels):
        z = z / self.temperature
        lse = jax.nn.logsumexp(z, axis=-1)
        out = self._total(z, labels) * lse - self._against(z, labels, z)
        return out + self.z_loss * lse**2 if self.z_loss else out

    def product(self, z, labels, u):
        z = z / self.temperature
        lse = jax.nn.logsumexp(z, axis=-1, keepdims=True)
        # Not `softmax`: XLA recomputes this in each pass instead of storing the probabilities.
        p = jnp.exp(z - lse)
        mean = jnp.sum(p * u, axis=-1, keepdims=True)
        total = self._total(z, labels)[..., None]
        if not self.z_loss:
            return p * (u - mean) * total / self.temperature**2
        # total p (u - mean) + 2 c (p mean + lse p (u - mean)), with one factor of p to recompute.
        slope = total + 2 * self.z_loss * lse
        return p * (slope * (u - mean) + 2 * self.z_loss * mean) / self.temperature**2

    def draw(self, key, z):
        return jax.random.categorical(key, z / self.temperature, axis=-1)

    def sampled(self, drawn, z, labels, u):
        z = z / self.temperature
        p = jnp.exp(z - jax.nn.logsumexp(z, axis=-1, keepdims=True))
        classes = jax.lax.broadcasted_iota(drawn.dtype, z.shape, z.ndim - 1)
        g = (classes == drawn[..., None]).astype(z.dtype) - p
        inner = jnp.sum(g * u, axis=-1, keepdims=True)
        return g * inner * self._total(z, labels)[..., None] / self.temperature**2


def softmax_cross_entropy(
    labels: Part = None,
    mask: Part = None,
    *,
    smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
    temperature: float = 1.0,
    z_loss: float = 0.0,
    ignore_label: int | None = None,
) -> OutputLoss:
    r"""Softmax cross-entropy in nats, of outputs `(..., num_classes)`.

    With z the outputs over the temperature, p their softmax and q the target,
    :math:`-\sum_c w_c q_c \log p_c`, averaged over positions. The product of its Hessian is
    :math:`p \odot (u - \langle p, u \rangle)` times the target's weight :math:`\sum_c w_c q_c` over
    the temperature squared.

    Args:
        labels: Where the labels are; see `OutputLoss`. Integers in the shape of the positions, or
            probabilities in the shape of the outputs. A label that is no class gives NaN unless it
            is masked.
        mask: Where a mask over the positions is, if there is one.
        smoothing: The part of the target that is spread evenly over all classes.
        class_weights: A nonnegative weight for each class, constants of the compiled program. The
            mean stays over positions, not over their weights.
        temperature: What the outputs are divided by; any but 1 costs an array of their size.
        z_loss: The factor of an added :math:`\log^2 \sum_c e^{z_c}`. With it the loss need not be
            convex, and is no likelihood.
        ignore_label: An integer label that stands for none, such as -100.

    Raises:
        ValueError: For options out of range.

    Example:
        >>> loss = softmax_cross_entropy()
        >>> outputs, batch = jnp.zeros((1, 2)), {"labels": jnp.array([0])}
        >>> round(float(loss(outputs, batch)), 4)
        0.6931
        >>> loss.hessian_product(outputs, batch, jnp.array([[1.0, 0.0]])).tolist()
        [[0.25, -0.25]]
    """
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing is {smoothing}; expected a number from 0 to 1.")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a positive number.")
    if not z_loss >= 0:
        raise ValueError(f"z_loss is {z_loss}; expected a nonnegative number.")
    weights = None if class_weights is None else tuple(float(w) for w in class_weights)
    if weights is not None and not all(w >= 0 for w in weights):
        raise ValueError("class_weights: expected nonnegative numbers.")
    return _SoftmaxCrossEntropy(
        labels,
        mask,
        smoothing=float(smoothing),
        class_weights=weights,
        temperature=float(temperature),
        z_loss=float(z_loss),
        ignore_label=ignore_label,
    )


# ------------------------------------------------------------------------- losses of each output


@dataclasses.dataclass(frozen=True)
class _Elementwise(OutputLoss):
    reduction: Reduction = "mean"

    def terms_per_unit(self, outputs):
        return 1 if self.reduction == "mean" else math.prod(outputs.shape[1:])

    def aligned(self, outputs, labels):
        labels = jnp.asarray(labels)
        if labels.shape != outputs.shape:
            bare = [tuple(n for n in shape if n != 1) for shape in (labels.shape, outputs.shape)]
            if bare[0] != bare[1]:
                raise ValueError(
                    f"{self.name}: the labels have shape {labels.shape} and the outputs "
                    f"{outputs.shape}; expected equal shapes."
                )
            labels = labels.reshape(outputs.shape)
        return labels.astype(tree.accumulation_dtype(outputs))

    def _mask(self, outputs, mask):
        if self.reduction == "sum" and jnp.ndim(mask) != 1:
            raise ValueError(
                f"{self.name}: with reduction='sum' the mask is over examples, of shape (n,); got "
                f"shape {jnp.shape(mask)}."
            )
        return super()._mask(outputs, mask)


class _MeanSquaredError(_Elementwise):
    def values(self, z, labels):
        return jnp.square(z - labels)

    def product(self, z, labels, u):
        return 2 * u

    def draw(self, key, z):
        return z + jax.random.normal(key, z.shape, z.dtype) * 0.5**0.5

    def sampled(self, drawn, z, labels, u):
        return 4 * jnp.square(z - drawn) * u


class _BinaryCrossEntropy(_Elementwise):
    def values(self, z, labels):
        return jax.nn.softplus(z) - labels * z

    def product(self, z, labels, u):
        return jax.nn.sigmoid(z) * jax.nn.sigmoid(-z) * u

    def draw(self, key, z):
        return jax.random.bernoulli(key, jax.nn.sigmoid(z)).astype(z.dtype)

    def sampled(self, drawn, z, labels, u):
        return jnp.square(jax.nn.sigmoid(z) - drawn) * u


class _Poisson(_Elementwise):
    def values(self, z, labels):
        return jnp.exp(z) - labels * z

    def product(self, z, labels, u):
        return jnp.exp(z) * u

    def drawn(self, draw, key, z):
        # Its rejection sampler has no rule for axes that are sharded by type (jax 0.10).
        return sharded_like(z, draw(replicated(key), replicated(z)))

    def draw(self, key, z):
        return jax.random.poisson(key, jnp.exp(z)).astype(z.dtype)

    def sampled(self, drawn, z, labels, u):
        return jnp.square(jnp.exp(z) - drawn) * u


@dataclasses.dataclass(frozen=True)
class _Huber(_Elementwise):
    delta: float = 1.0

    @property
    def likelihood(self) -> bool:
        return False

    def values(self, z, labels):
        size = jnp.abs(z - labels)
        inside = jnp.square(size) / 2
        return jnp.where(size < self.delta, inside, self.delta * (size - self.delta / 2))

    def product(self, z, labels, u):
        return jnp.where(jnp.abs(z - labels) < self.delta, u, jnp.zeros_like(u))


def _checked(reduction: str) -> Any:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; expected 'mean' or 'sum'.")
    return reduction


def mse(labels: Part = None, mask: Part = None, *, reduction: Reduction = "mean") -> OutputLoss:
    """Squared error; its Hessian is twice the identity over the number of outputs.

    Args:
        labels: Where the targets are; see `OutputLoss`. In the shape of the outputs.
        mask: Where a mask over the outputs is, if there is one.
        reduction: 'mean' over all outputs, or 'sum' over those of an example and the mean over
            examples (the task 'regression' of `objectives`).

    Example:
        >>> loss = mse()
        >>> float(loss(jnp.array([[1.0, 3.0]]), {"labels": jnp.zeros((1, 2))}))
        5.0
    """
    return _MeanSquaredError(labels, mask, reduction=_checked(reduction))


def binary_cross_entropy(
    labels: Part = None, mask: Part = None, *, reduction: Reduction = "mean"
) -> OutputLoss:
    """Binary cross-entropy in nats of outputs that are log-odds; labels from 0 to 1.

    Args:
        labels: Where the labels are; see `OutputLoss`. In the shape of the outputs.
        mask: Where a mask over the outputs is, if there is one.
        reduction: As for `mse`.
    """
    return _BinaryCrossEntropy(labels, mask, reduction=_checked(reduction))


def poisson(labels: Part = None, mask: Part = None, *, reduction: Reduction = "mean") -> OutputLoss:
    """Negative Poisson log-likelihood of counts, without its constant; outputs are log-rates.

    Args:
        labels: Where the counts are; see `OutputLoss`. In the shape of the outputs.
        mask: Where a mask over the outputs is, if there is one.
        reduction: As for `mse`.
    """
    return _Poisson(labels, mask, reduction=_checked(reduction))


def huber(
    labels: Part = None,
    mask: Part = None,
    *,
    delta: float = 1.0,
    reduction: Reduction = "mean",
) -> OutputLoss:
    """Huber's loss: half the squared error up to `delta`, and linear beyond. No likelihood.

    Args:
        labels: Where the targets are; see `OutputLoss`. In the shape of the outputs.
        mask: Where a mask over the outputs is, if there is one.
        delta: Where the loss turns linear; there the Hessian drops from one to zero.
        reduction: As for `mse`.
    """
    if not delta > 0:
        raise ValueError(f"delta is {delta}; expected a positive number.")
    return _Huber(labels, mask, reduction=_checked(reduction), delta=float(delta))
