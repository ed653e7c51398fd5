"""VGG networks for 32x32 images."""

import jax
from flax import linen as nn

from geojax.models import layers

__all__ = ["VGG"]

# The number of convolutions between pools, by depth (which counts the three dense layers as well).
_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_WIDTHS = (64, 128, 256, 512, 512)

# How this differs from the original code:
# - with batch norm, dnn-mode-connectivity steps over layers (8 of the 13 convolutions of VGG16 run,
#   and 5 norms); here each convolution is followed by its norm, and all of them run;
# - "he" draws the hidden dense layers like the convolutions, where the originals leave them at
#   PyTorch's default;
# - Git Re-Basin's VGG16 is `norm="layer", dropout=0.0`, with the same parameter names.


class VGG(nn.Module):
    """Stages of 3x3 convolutions with 2x2 max-pools after each, then three dense layers.

    Attributes:
        num_classes: The number of outputs.
        depth: 11, 13, 16 or 19 layers with weights.
        norm: None, "batch", "layer" (over the channels) or "group", after each convolution.
        num_groups: For "group".
        width_multiplier: Scales all widths: channels 64 to 512, and the two dense layers of 512.
        dropout: The rate before each of the two hidden dense layers.
        initializer: One of `layers.INITIALIZERS`.
        dtype: The dtype of the computation; None takes that of the inputs.

    Reference:
        Simonyan, Zisserman, Very deep convolutional networks for large-scale image recognition,
        2015, with the small classifier that Garipov et al. 2018 and Benton et al. 2021 use.
    """

    num_classes: int = 10
    depth: int = 16
    norm: str | None = None
    num_groups: int = 8
    width_multiplier: float = 1.0
    dropout: float = 0.5
    initializer: str = "he"
    dtype: str | None = None

    def __post_init__(self) -> None:
        layers.check_choice("depth", self.depth, _STAGES)
        layers.check_choice("norm", self.norm, layers.NORMS)
        layers.check_choice("initializer", self.initializer, layers.INITIALIZERS)
        layers.check_choice("dtype", self.dtype, layers.DTYPES)
        layers.check_rate("dropout", self.dropout)
        layers.scaled(1, self.width_multiplier)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map `(batch, height, width, channels)` to `(batch, num_classes)`."""
        if min(x.shape[1:3]) < 32:
            raise ValueError(
                f"VGG: the images are {x.shape[1]}x{x.shape[2]}; expected at least 32x32, because "
                "each of the five pools halves them."
            )
        for width, count in zip(_WIDTHS, _STAGES[self.depth], strict=True):
            width = layers.scaled(width, self.width_multiplier)
            for _ in range(count):
                x = layers.conv(x, width, init=self.initializer, dtype=self.dtype)
                x = layers.normalize(
                    x, self.norm, train=train, dtype=self.dtype, num_groups=self.num_groups
                )
                x = nn.relu(x)
            x = layers.max_pool(x)
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            x = nn.Dropout(self.dropout)(x, deterministic=not train)
            width = layers.scaled(512, self.width_multiplier)
            x = nn.relu(layers.dense(x, width, init=self.initializer, dtype=self.dtype))
        x = layers.dense(x, self.num_classes, init=self.initializer, dtype=self.dtype, output=True)
        return layers.logits(x, self.dtype)
