"""Small convolutional networks: one of our own, LeNet-5, and ConvFC."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from geojax.models import layers

__all__ = ["CNN", "ConvFC", "LeNet"]


class CNN(nn.Module):
    """Blocks of convolution, norm, activation and 2x2 max-pooling, then a mean and a linear layer.

    Attributes:
        num_classes: The number of outputs.
        widths: The channels of each block. A block halves the image, and is left unpooled once one
            side is a single pixel.
        activation: One of `layers.ACTIVATIONS`.
        norm: None, "batch", "layer" (over the channels) or "group".
        num_groups: For "group".
        dropout: The rate before the linear layer.
        initializer: One of `layers.INITIALIZERS`.
        dtype: The dtype of the computation; None takes that of the inputs.
    """

    num_classes: int = 10
    widths: Sequence[int] = (16, 32, 64)
    activation: str = "relu"
    norm: str | None = "batch"
    num_groups: int = 8
    dropout: float = 0.0
    initializer: str = "he"
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
        """Map `(batch, height, width, channels)` to `(batch, num_classes)`."""
        for width in self.widths:
            x = layers.conv(
                x, width, init=self.initializer, dtype=self.dtype, use_bias=self.norm is None
            )
            x = layers.normalize(
                x, self.norm, train=train, dtype=self.dtype, num_groups=self.num_groups
            )
            x = layers.ACTIVATIONS[self.activation](x)
            if min(x.shape[1:3]) >= 2:
                x = layers.max_pool(x)
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        x = layers.dense(x, self.num_classes, init=self.initializer, dtype=self.dtype, output=True)
        return layers.logits(x, self.dtype)


class LeNet(nn.Module):
    """LeNet-5 with max-pooling: two 5x5 convolutions and three dense layers, widths 6-16-120-84.

    It is made for 32x32 images; 28x28 ones are framed with zeros, which is how it met MNIST.

    Attributes:
        num_classes: The number of outputs.
        width_multiplier: Scales the four widths.
        activation: One of `layers.ACTIVATIONS`.
        initializer: One of `layers.INITIALIZERS`.
        dtype: The dtype of the computation; None takes that of the inputs.

    Reference:
        LeCun, Bottou, Bengio, Haffner, Gradient-based learning applied to document recognition,
        1998, figure 2.
    """

    num_classes: int = 10
    width_multiplier: float = 1.0
    activation: str = "relu"
    initializer: str = "he"
    dtype: str | None = None

    def __post_init__(self) -> None:
        layers.check_choice("activation", self.activation, layers.ACTIVATIONS)
        layers.check_choice("initializer", self.initializer, layers.INITIALIZERS)
        layers.check_choice("dtype", self.dtype, layers.DTYPES)
        layers.scaled(1, self.width_multiplier)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map `(batch, height, width, channels)` to `(batch, num_classes)`."""
        del train
        if min(x.shape[1:3]) < 16:
            raise ValueError(
                f"LeNet: the images are {x.shape[1]}x{x.shape[2]}; expected at least 16x16 (use "
                "the model 'cnn' for smaller ones)."
            )
        activation = layers.ACTIVATIONS[self.activation]
        if x.shape[1:3] == (28, 28):
            x = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
        for width in (6, 16):
            width = layers.scaled(width, self.width_multiplier)
            x = layers.conv(x, width, 5, init=self.initializer, dtype=self.dtype, padding="VALID")
            x = layers.max_pool(activation(x))
        x = x.reshape(x.shape[0], -1)
        for width in (120, 84):
            width = layers.scaled(width, self.width_multiplier)
            x = activation(layers.dense(x, width, init=self.initializer, dtype=self.dtype))
        x = layers.dense(x, self.num_classes, init=self.initializer, dtype=self.dtype, output=True)
        return layers.logits(x, self.dtype)


class ConvFC(nn.Module):
    """Three 5x5 convolutions with 3x3 max-pools of stride 2, then two wide dense layers.

    On 32x32 images the dense part is 1152-1000-1000-classes.

    Attributes:
        num_classes: The number of outputs.
        width_multiplier: Scales the convolutions' 32, 64, 128 channels and the dense 1000.
        initializer: One of `layers.INITIALIZERS`.
        dtype: The dtype of the computation; None takes that of the inputs.

    Reference:
        Garipov, Izmailov, Podoprikhin, Vetrov, Wilson, Loss surfaces, mode connectivity, and fast
        ensembling of DNNs, 2018. The original code draws the dense layers as "torch" has it, next
        to "he" convolutions.
    """

    num_classes: int = 10
    width_multiplier: float = 1.0
    initializer: str = "he"
    dtype: str | None = None

    def __post_init__(self) -> None:
        layers.check_choice("initializer", self.initializer, layers.INITIALIZERS)
        layers.check_choice("dtype", self.dtype, layers.DTYPES)
        layers.scaled(1, self.width_multiplier)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map `(batch, height, width, channels)` to `(batch, num_classes)`."""
        del train
        for width in (32, 64, 128):
            width = layers.scaled(width, self.width_multiplier)
            x = nn.relu(layers.conv(x, width, 5, init=self.initializer, dtype=self.dtype))
            x = layers.max_pool(x, window=3)
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            width = layers.scaled(1000, self.width_multiplier)
            x = nn.relu(layers.dense(x, width, init=self.initializer, dtype=self.dtype))
        x = layers.dense(x, self.num_classes, init=self.initializer, dtype=self.dtype, output=True)
        return layers.logits(x, self.dtype)
