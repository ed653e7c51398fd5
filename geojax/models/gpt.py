"""Causal language models, from GPT-2's form to LLaMA's."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from geojax.models import layers
from geojax.models.transformer import Block, check_heads

__all__ = ["GPT"]


class GPT(nn.Module):
    """A causal decoder of pre-norm blocks; small and in GPT-2's form by default.

    LLaMA's form is `positions="rope", mlp="swiglu", norm="rms", bias=False, tied=False`.

    Attributes:
        vocab_size: The number of tokens.
        max_length: The number of learned positions; with rotary ones there is no limit.
        width: The width of the residual stream.
        num_layers: The number of blocks.
        num_heads: The number of query heads; it must divide the width.
        num_kv_heads: The number of key and value heads, a divisor of `num_heads`; None for as many.
        mlp_width: The hidden width of the MLPs; None for 4 times the width.
        positions: "learned" (a table added to the embedding) or "rope" (rotated queries and keys).
        rope_theta: The base of the rotary wavelengths.
        mlp: "gelu" (exact), "gelu_tanh" (GPT-2's approximation) or "swiglu".
        norm: "layer" or "rms".
        norm_epsilon: Added to the variance in the norms.
        tied: Whether the embedding table also makes the logits; otherwise a dense layer without
            bias does.
        bias: Whether projections and layer norms have biases.
        dropout: The rate on the embedding and on what each block adds.
        initializer: One of `layers.INITIALIZERS`; with "normal" the layers that write to the
            residual stream are drawn smaller by sqrt(2 num_layers), as in GPT-2.
        dtype: The dtype of the computation; None takes that of the parameters.

    Reference:
        Radford et al., Language models are unsupervised multitask learners, 2019; Touvron et al.,
        LLaMA, 2023; Ainslie et al., GQA, 2023; Shazeer, GLU variants improve transformer, 2020.
    """

    vocab_size: int = 256
    max_length: int = 256
    width: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None
    mlp_width: int | None = None
    positions: str = "learned"
    rope_theta: float = 10000.0
    mlp: str = "gelu_tanh"
    norm: str = "layer"
    norm_epsilon: float = 1e-5
    tied: bool = True
    bias: bool = True
    dropout: float = 0.0
    initializer: str = "normal"
    dtype: str | None = None

    def __post_init__(self) -> None:
        check_heads(self.width, self.num_heads, self.num_kv_heads or self.num_heads)
        layers.check_choice("positions", self.positions, ("learned", "rope"))
        layers.check_choice("mlp", self.mlp, ("gelu", "gelu_tanh", "swiglu"))
        layers.check_choice("norm", self.norm, ("layer", "rms"))
        layers.check_choice("initializer", self.initializer, layers.INITIALIZERS)
        layers.check_choice("dtype", self.dtype, layers.DTYPES)
        layers.check_rate("dropout", self.dropout)
        super().__post_init__()

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        """Map tokens `(batch, length)` to next-token logits `(batch, length, vocab_size)`."""
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise TypeError(f"GPT: the tokens are {tokens.dtype}; expected integers.")
        length = tokens.shape[1]
        embedding = self.param(
            "embedding",
            layers.embedding_init(self.initializer, self.width),
            (self.vocab_size, self.width),
        )
        if self.dtype is not None:
            embedding = embedding.astype(self.dtype)
        x = layers.look_up(embedding, tokens)
        if self.positions == "learned":
            if length > self.max_length:
                raise ValueError(
                    f"GPT: the sequences have {length} tokens and max_length is "
                    f"{self.max_length}; cut them, or build a model with more positions."
                )
            table = self.param(
                "positions", nn.initializers.normal(0.02), (self.max_length, self.width)
            )
            x = x + table[:length].astype(x.dtype)[None]
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        for i in range(self.num_layers):
            x = Block(
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads or self.num_heads,
                mlp_width=self.mlp_width or 4 * self.width,
                mlp=self.mlp,
                norm=self.norm,
                norm_epsilon=self.norm_epsilon,
                causal=True,
                rope_theta=self.rope_theta if self.positions == "rope" else None,
                bias=self.bias,
                dropout=self.dropout,
                initializer=self.initializer,
                output_scale=(2 * self.num_layers) ** -0.5,
                dtype=self.dtype,
                name=f"block_{i}",
            )(x, train)
        x = layers.normalize(
            x,
            self.norm,
            train=train,
            dtype=self.dtype,
            epsilon=self.norm_epsilon,
            use_bias=self.bias,
            name="norm",
        )
        if self.tied:
            return layers.logits(jnp.einsum("bld,vd->blv", x, embedding), self.dtype)
        x = layers.dense(
            x,
            self.vocab_size,
            init=self.initializer,
            dtype=self.dtype,
            use_bias=False,
            output=True,
            name="head",
        )
        return layers.logits(x, self.dtype)
