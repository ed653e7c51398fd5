"""The transformer block that the vision transformer and the language model are made of.

Kernels keep the heads as an axis of their own, `(width, heads, head_width)`, and attention is two
einsums: a reader of the jaxpr sees which axes are heads and which are inside one.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from geojax.models import layers

__all__ = ["Block", "rotate"]


def rotate(x: jax.Array, theta: float = 10000.0) -> jax.Array:
    r"""Rotary position embedding: the pair (i, i + d/2) turns by an angle that grows with position.

    At position p the pair i of head width d turns by p `theta`^(-2i/d), so that the inner product
    of two rotated vectors depends on their positions through the difference alone.

    Args:
        x: `(batch, length, heads, head_width)`, at positions 0, 1, ...
        theta: The base of the wavelengths.

    Returns:
        The rotated vectors, computed in float32 or better and returned in the dtype of `x`.

    Raises:
        ValueError: If the head width is odd.

    Reference:
        Su, Lu, Pan, Murtadha, Wen, Liu, RoFormer: Enhanced transformer with rotary position
        embedding, 2021, in the pairing of LLaMA's Hugging Face port.
    """
    length, width = x.shape[1], x.shape[-1]
    if width % 2:
        raise ValueError(
            f"rotate: the head width is {width}; rotary positions need an even one, so choose "
            "another width or number of heads."
        )
    pairs = layers.at_least_float32(x)
    dtype = pairs.dtype
    frequency = theta ** (jnp.arange(width // 2, dtype=dtype) * (-2.0 / width))
    angle = jnp.arange(length, dtype=dtype)[:, None] * frequency[None, :]
    cos, sin = jnp.cos(angle)[None, :, None, :], jnp.sin(angle)[None, :, None, :]
    first, second = jnp.split(pairs, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention; with fewer key-value heads, grouped-query attention.

    Query head h attends with key-value head h // (num_heads / num_kv_heads).

    Attributes:
        num_heads: The number of query heads.
        num_kv_heads: The number of key and value heads, a divisor of `num_heads`.
        causal: Whether a position sees only itself and earlier ones.
        rope_theta: The base of rotary positions; None for no rotation.
        bias: Whether the projections have biases.
        initializer: One of `layers.INITIALIZERS`.
        output_scale: Factor of the output projection's deviation, for "normal".
        dtype: The dtype of the computation.
    """

    num_heads: int
    num_kv_heads: int
    causal: bool
    rope_theta: float | None
    bias: bool
    initializer: str
    output_scale: float
    dtype: str | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        head_width = width // self.num_heads
        groups = self.num_heads // self.num_kv_heads

        def project(heads: int, name: str) -> jax.Array:
            return layers.dense(
                x,
                (heads, head_width),
                init=self.initializer,
                dtype=self.dtype,
                use_bias=self.bias,
                name=name,
            )

        query = project(self.num_heads, "query")
        key = project(self.num_kv_heads, "key")
        value = project(self.num_kv_heads, "value")
        if self.rope_theta is not None:
            query, key = rotate(query, self.rope_theta), rotate(key, self.rope_theta)
        query = query * head_width**-0.5
        if groups == 1:
            scores = jnp.einsum("bqhd,bkhd->bhqk", query, key)
        else:
            query = query.reshape(batch, length, self.num_kv_heads, groups, head_width)
            scores = jnp.einsum("bqhgd,bkhd->bhgqk", query, key)
        scores = layers.at_least_float32(scores)
        if self.causal:
            position = jnp.arange(length)
            seen = position[:, None] >= position[None, :]
            seen = seen.reshape((1,) * (scores.ndim - 2) + seen.shape)
            scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
        weights = nn.softmax(scores).astype(value.dtype)
        if groups == 1:
            mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        else:
            mixed = jnp.einsum("bhgqk,bkhd->bqhgd", weights, value)
            mixed = mixed.reshape(batch, length, self.num_heads, head_width)
        return layers.dense(
            mixed,
            width,
            init=self.initializer,
            dtype=self.dtype,
            axis=(-2, -1),
            use_bias=self.bias,
            scale=self.output_scale,
            name="out",
        )


class MLPBlock(nn.Module):
    """Two dense layers with a GELU between them, or three with a SiLU-gated product (SwiGLU).

    Attributes:
        width: The hidden width.
        kind: "gelu" (exact), "gelu_tanh" (its approximation, GPT-2's) or "swiglu".
        bias: Whether the layers have biases.
        initializer: One of `layers.INITIALIZERS`.
        output_scale: Factor of the last layer's deviation, for "normal".
        dtype: The dtype of the computation.
    """

    width: int
    kind: str
    bias: bool
    initializer: str
    output_scale: float
    dtype: str | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def linear(y: jax.Array, features: int, name: str, scale: float = 1.0) -> jax.Array:
            return layers.dense(
                y,
                features,
                init=self.initializer,
                dtype=self.dtype,
                use_bias=self.bias,
                scale=scale,
                name=name,
            )

        hidden = linear(x, self.width, "up")
        if self.kind == "swiglu":
            hidden = nn.silu(linear(x, self.width, "gate")) * hidden
        else:
            hidden = nn.gelu(hidden, approximate=self.kind == "gelu_tanh")
        return linear(hidden, x.shape[-1], "down", self.output_scale)


class Block(nn.Module):
    """A pre-norm transformer block: attention, then an MLP, each added to the residual stream.

    Attributes:
        num_heads: The number of query heads; it must divide the width.
        num_kv_heads: The number of key and value heads; it must divide `num_heads`.
        mlp_width: The hidden width of the MLP.
        mlp: "gelu", "gelu_tanh" or "swiglu".
        norm: "layer" or "rms".
        norm_epsilon: Added to the variance.
        causal: Whether a position sees only itself and earlier ones.
        rope_theta: The base of rotary positions; None for no rotation.
        bias: Whether projections and layer norms have biases.
        dropout: The rate on what attention and MLP add to the stream.
        initializer: One of `layers.INITIALIZERS`.
        output_scale: Factor of the deviation of what writes to the stream, for "normal".
        dtype: The dtype of the computation.
    """

    num_heads: int
    num_kv_heads: int
    mlp_width: int
    mlp: str
    norm: str
    norm_epsilon: float
    causal: bool
    rope_theta: float | None
    bias: bool
    dropout: float
    initializer: str
    output_scale: float
    dtype: str | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map `(batch, length, width)` to the same shape."""

        def normalized(name: str) -> jax.Array:
            return layers.normalize(
                x,
                self.norm,
                train=train,
                dtype=self.dtype,
                epsilon=self.norm_epsilon,
                use_bias=self.bias,
                name=name,
            )

        def dropped(y: jax.Array) -> jax.Array:
            return nn.Dropout(self.dropout)(y, deterministic=not train)

        attention = Attention(
            self.num_heads,
            self.num_kv_heads,
            self.causal,
            self.rope_theta,
            self.bias,
            self.initializer,
            self.output_scale,
            self.dtype,
            name="attention",
        )
        mlp = MLPBlock(
            self.mlp_width,
            self.mlp,
            self.bias,
            self.initializer,
            self.output_scale,
            self.dtype,
            name="mlp",
        )
        x = x + dropped(attention(normalized("norm1")))
        return x + dropped(mlp(normalized("norm2")))


def check_heads(width: int, num_heads: int, num_kv_heads: int) -> None:
    """Raise `ValueError` unless heads divide the width, and key-value heads the heads."""
    if num_heads < 1 or width % num_heads:
        raise ValueError(
            f"width is {width} and num_heads {num_heads}; expected a width that is a multiple of "
            "the number of heads."
        )
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads is {num_heads} and num_kv_heads {num_kv_heads}; expected a number of heads "
            "that is a multiple of the number of key-value heads."
        )
