"""Multilayer perceptrons."""

from collections.abc import Sequence

import jax
from flax import linen as nn

from geojax.models import layers

__all__ = ["MLP"]


class MLP(nn.Module):
    """Dense layers with an activation between them, on flattened inputs.

    The defaults are the 784-512-512-512-10 network of Git Re-Basin, with its parameter names.

    Attributes:
        num_classes: The number of outputs.
        widths: The widths of the hidden layers; none at all makes a linear model.
        activation: One of `layers.ACTIVATIONS`.
        norm: None, "batch", "layer" or "group", between each hidden layer and its activation.
        num_groups: For "group".
        dropout: The rate after each hidden activation.
        initializer: One of `layers.INITIALIZERS`.
        dtype: The dtype of the computation: None (that of the inputs), "float32", "bfloat16" or
            "float16". Parameters are float32 whatever it is, and so are the outputs then.
    """

    num_classes: int = 10
    widths: Sequence[int] = (512, 512, 512)
    activation: str = "relu"
    norm: str | None = None
    num_groups: int = 8
    dropout: float = 0.0
    initializer: str = "lecun"
    dtype: str | None = None

    def __post_init__(self) -> None:
        layers.check_choice("activation", self.activation, layers.ACTIVATIONS)
        layers.check_choice("norm", self.norm, layers.NORMS)
        layers.check_choice("initializer", self.initializer, layers.INITIALIZERS)
        layers.check_choice("dtype", self.dtype, layers.DTYPES)
        layers.check_rate("dropout", self.dropout)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map `(batch, ...)` to `(batch, num_classes)`."""
        x = x.reshape(x.shape[0], -1)
        for width in self.widths:
            x = layers.dense(x, width, init=self.initializer, dtype=self.dtype)
            x = layers.normalize(
                x, self.norm, train=train, dtype=self.dtype, num_groups=self.num_groups
            )
            x = layers.ACTIVATIONS[self.activation](x)
            x = nn.Dropout(self.dropout)(x, deterministic=not train)
        x = layers.dense(x, self.num_classes, init=self.initializer, dtype=self.dtype, output=True)
        return layers.logits(x, self.dtype)
