"""The head of a language model by chunks of tokens: no logits of a whole batch at a time."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from geojax import tree
from geojax.hessian.output_losses import OutputLoss, Targets

__all__ = ["chunked_head"]

PyTree = Any


@dataclasses.dataclass(frozen=True)
class _ChunkedHead(OutputLoss):
    """`inner` of the logits that `head_fn` makes of hidden states, `chunk_size` tokens at a time.

    Its outputs are the pair (head parameters, hidden states).
    """

    head_fn: Any = None
    inner: OutputLoss = dataclasses.field(default_factory=OutputLoss)
    chunk_size: int = 128

    @property
    def convex(self) -> bool:
        return self.inner.convex

    @property
    def likelihood(self) -> bool:
        return False

    @property
    def masked(self) -> bool:
        return self.inner.masked

    @property
    def name(self) -> str:
        return f"chunked_head of {self.inner.name}"

    def weight(self, batch):
        return self.inner.weight(batch)

    def _read(self, outputs: Any, batch: PyTree) -> tuple[PyTree, jax.Array, Targets, jax.Array]:
        if not isinstance(outputs, (tuple, list)) or len(outputs) != 2:
            raise TypeError(
                f"{self.name}: the model function returned {type(outputs).__name__}; expected the "
                "pair (head parameters, hidden states)."
            )
        head, hidden = outputs
        logits = jax.eval_shape(self.head_fn, head, hidden)
        if hidden.ndim < 2 or logits.shape[:-1] != hidden.shape[:-1]:
            raise ValueError(
                f"{self.name}: hidden states of shape {hidden.shape} give logits of shape "
                f"{logits.shape}; expected (..., tokens, features) and (..., tokens, classes)."
            )
        targets = self.inner.targets(logits, batch)
        return head, hidden, targets, self.inner.normalizer(logits, targets)

    def __call__(self, outputs: Any, batch: PyTree) -> jax.Array:
        head, hidden, targets, normalizer = self._read(outputs, batch)
        inner = self.inner

        @jax.checkpoint  # so that no chunk's logits are kept for the gradient
        def one(total, chunk):
            hidden, labels, mask = chunk
            return total + inner.total(self.head_fn(head, hidden), Targets(labels, mask)), None

        chunks = (hidden, targets.labels, targets.mask)
        start = jnp.zeros((), normalizer.dtype)
        total, _ = _scan(one, start, chunks, hidden.ndim - 2, self.chunk_size)
        return total * normalizer

    def hessian_product(self, outputs: Any, batch: PyTree, u: Any) -> Any:
        head, hidden, targets, normalizer = self._read(outputs, batch)
        u_head, u_hidden = u

        def one(total, chunk):
            hidden, u_hidden, labels, mask = chunk
            logits, forward = jax.linearize(self.head_fn, head, hidden)
            out = self.inner.curvature(logits, Targets(labels, mask), forward(u_head, u_hidden))
            back = jax.linear_transpose(forward, u_head, u_hidden)
            to_head, to_hidden = back((out * normalizer).astype(logits.dtype))
            return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, to_head), to_hidden

        start = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=tree.accumulation_dtype(x)), u_head)
        chunks = (hidden, u_hidden, targets.labels, targets.mask)
        to_head, to_hidden = _scan(one, start, chunks, hidden.ndim - 2, self.chunk_size)
        to_head = jax.tree.map(lambda t, x: t.astype(x.dtype), to_head, u_head)
        return type(outputs)((to_head, to_hidden))


def _scan(one: Callable, start: Any, arrays: Any, axis: int, size: int) -> tuple[Any, Any]:
    """`lax.scan` over pieces of `size` along an axis, then over what is left; outputs joined."""
    length = jax.tree.leaves(arrays)[0].shape[axis]
    whole, rest = divmod(length, size)

    def piece(first, num):
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, num, axis), arrays)

    total, outs = start, []
    if whole:
        total, found = lax.scan(
            lambda t, i: one(t, piece(i * size, size)), total, jnp.arange(whole)
        )

        def joined(x):
            x = jnp.moveaxis(x, 0, axis)
            return x.reshape(*x.shape[:axis], whole * size, *x.shape[axis + 2 :])

        outs.append(jax.tree.map(joined, found))
    if rest:
        total, found = one(total, piece(whole * size, rest))
        outs.append(found)
    return total, jax.tree.map(lambda *xs: jnp.concatenate(xs, axis), *outs)


def chunked_head(
    head_fn: Callable[[PyTree, jax.Array], jax.Array],
    output_loss: OutputLoss,
    chunk_size: int,
) -> OutputLoss:
    r"""A loss of hidden states, through a head that is applied to a chunk of tokens at a time.

    For a language model, whose logits of a whole batch do not fit: let the model function return
    the pair `(head_params, hidden)` instead of logits, head_params being those of `params` that the
    head needs (the embedding itself, where it is tied), and give this as the `output_loss` of
    `ggn`. The product is that of the whole model, exactly; called as a loss, it serves `hessian`.

    With outputs :math:`o = (W, h)` its product is :math:`J^T H J u`, J the Jacobian of the logits
    in o and H the Hessian of the loss in the logits: the Gauss-Newton matrix of the head, so that
    with the model's own Jacobian around it the whole is the Gauss-Newton matrix of the model.

    Args:
        head_fn: `head_fn(head_params, hidden) -> logits`, each token on its own.
        output_loss: The loss of the logits, such as `softmax_cross_entropy()`.
        chunk_size: Tokens at a time, along the axis before the features: hidden states `(n, t, d)`
            are cut along t, so that memory grows with `n * chunk_size * num_classes`, and those of
            `(n * t, d)`, flattened by the model function and by `labels`, along the first axis.

    Returns:
        A loss like `output_loss`, of the pair.

    Raises:
        TypeError: If `output_loss` is not one of this module.
        ValueError: If `chunk_size` is not positive.

    Example:
        >>> from geojax.hessian import output_losses
        >>> inner = output_losses.softmax_cross_entropy()
        >>> loss = chunked_head(lambda kernel, hidden: hidden @ kernel, inner, chunk_size=2)
        >>> batch = {"labels": jnp.array([0, 1, 1])}
        >>> round(float(loss((jnp.zeros((4, 5)), jnp.ones((3, 4))), batch)), 4)  # log 5
        1.6094
    """
    if not isinstance(output_loss, OutputLoss) or isinstance(output_loss, _ChunkedHead):
        raise TypeError(
            f"chunked_head: output_loss is {output_loss!r}; expected a loss of `output_losses`, "
            "whose terms can be told apart."
        )
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size!r}; expected a positive number of tokens.")
    return _ChunkedHead(head_fn=head_fn, inner=output_loss, chunk_size=chunk_size)
