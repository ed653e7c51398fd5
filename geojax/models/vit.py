"""Vision transformers."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from geojax.models import layers
from geojax.models.transformer import Block, check_heads

__all__ = ["ViT"]


class ViT(nn.Module):
    """A vision transformer with learned positions; small by default.

    Patches are cut by reshaping and embedded by a dense layer, the same map as a convolution with
    the patch as kernel and stride, and a faster one on a CPU.

    Attributes:
        num_classes: The number of outputs.
        patch_size: The side of a patch; it must divide height and width.
        width: The width of the residual stream.
        num_layers: The number of blocks.
        num_heads: The number of heads; it must divide the width.
        mlp_width: The hidden width of the MLPs; None for 4 times the width.
        pool: "mean" over the patches, or "cls", the token that is put before them.
        dropout: The rate on the embedding and on what each block adds.
        norm_epsilon: Added to the variance in the layer norms.
        initializer: One of `layers.INITIALIZERS`.
        dtype: The dtype of the computation; None takes that of the inputs.

    Reference:
        Dosovitskiy et al., An image is worth 16x16 words, 2021; B/16 is table 1.
    """

    num_classes: int = 10
    patch_size: int = 4
    width: int = 64
    num_layers: int = 4
    num_heads: int = 4
    mlp_width: int | None = None
    pool: str = "mean"
    dropout: float = 0.0
    norm_epsilon: float = 1e-6
    initializer: str = "lecun"
    dtype: str | None = None

    def __post_init__(self) -> None:
        check_heads(self.width, self.num_heads, self.num_heads)
        layers.check_choice("pool", self.pool, ("mean", "cls"))
        layers.check_choice("initializer", self.initializer, layers.INITIALIZERS)
        layers.check_choice("dtype", self.dtype, layers.DTYPES)
        layers.check_rate("dropout", self.dropout)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map `(batch, height, width, channels)` to `(batch, num_classes)`."""
        batch, height, breadth, channels = x.shape
        side = self.patch_size
        if height % side or breadth % side:
            raise ValueError(
                f"ViT: the images are {height}x{breadth} and the patches {side}x{side}; expected "
                "sizes that are multiples of patch_size."
            )
        rows, columns = height // side, breadth // side
        # One axis at a time: a sharded batch on an Explicit mesh allows no more.
        x = x.reshape(batch, rows, side, breadth, channels)
        x = x.reshape(batch, rows, side, columns, side, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, rows * columns, side, side, channels)
        x = x.reshape(batch, rows * columns, side * side * channels)
        x = layers.dense(x, self.width, init=self.initializer, dtype=self.dtype, name="embed")
        if self.pool == "cls":
            first = self.param("cls", nn.initializers.zeros, (1, 1, self.width))
            first = jnp.broadcast_to(first.astype(x.dtype), (batch, 1, self.width))
            x = jnp.concatenate([first, x], axis=1)
        positions = self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
        x = x + positions.astype(x.dtype)[None]
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        for i in range(self.num_layers):
            x = Block(
                num_heads=self.num_heads,
                num_kv_heads=self.num_heads,
                mlp_width=self.mlp_width or 4 * self.width,
                mlp="gelu",
                norm="layer",
                norm_epsilon=self.norm_epsilon,
                causal=False,
                rope_theta=None,
                bias=True,
                dropout=self.dropout,
                initializer=self.initializer,
                output_scale=(2 * self.num_layers) ** -0.5,
                dtype=self.dtype,
                name=f"block_{i}",
            )(x, train)
        x = layers.normalize(
            x, "layer", train=train, dtype=self.dtype, epsilon=self.norm_epsilon, name="norm"
        )
        x = x[:, 0] if self.pool == "cls" else jnp.mean(x, axis=1)
        x = layers.dense(
            x,
            self.num_classes,
            init=self.initializer,
            dtype=self.dtype,
            output=True,
            name="head",
        )
        return layers.logits(x, self.dtype)
