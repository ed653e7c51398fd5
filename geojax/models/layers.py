"""What the networks share: initializers, and layers by name for use inside a compact module.

The functions make ordinary linen layers in the module that calls them, so parameters carry the
names that linen gives (`Conv_0`, `Dense_1`) unless a name is passed.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

__all__ = [
    "ACTIVATIONS",
    "DTYPES",
    "INITIALIZERS",
    "NORMS",
    "at_least_float32",
    "check_choice",
    "check_rate",
    "conv",
    "dense",
    "embedding_init",
    "logits",
    "look_up",
    "max_pool",
    "normalize",
    "scaled",
]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "leaky_relu": nn.leaky_relu,
    "tanh": jnp.tanh,
    "sigmoid": nn.sigmoid,
    "gelu": nn.gelu,
    "silu": nn.silu,
}
DTYPES = (None, "float32", "bfloat16", "float16")
INITIALIZERS = ("lecun", "he", "torch", "normal")
NORMS = (None, "batch", "layer", "group")


def check_choice(option: str, value: Any, choices: Collection[Any]) -> None:
    """Raise `ValueError` unless the option's value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{option} is {value!r}; expected one of {', '.join(map(repr, choices))}.")


def check_rate(option: str, value: float) -> None:
    """Raise `ValueError` unless the value is a dropout rate, in [0, 1)."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{option} is {value!r}; expected a rate of at least 0 and less than 1.")


def scaled(width: int, multiplier: float) -> int:
    """A width times a multiplier, rounded, and at least one.

    Raises:
        ValueError: If the multiplier is not positive.
    """
    if multiplier <= 0:
        raise ValueError(f"width_multiplier is {multiplier!r}; expected a positive number.")
    return max(1, round(width * multiplier))


def _kernel_init(init: str, output: bool, scale: float) -> Any:
    """The initializer of a kernel.

    - "lecun": truncated normal of variance 1 / fan_in, flax's default.
    - "he": normal of variance 2 / fan_out, as both connectivity papers have it for convolutions;
      1 / fan_in for the output layer, where the fan-out says nothing about the logits.
    - "torch": uniform on +-1 / sqrt(fan_in), PyTorch's default.
    - "normal": normal of deviation 0.02 `scale`, GPT-2's.
    """
    initializers = nn.initializers
    if init == "he" and not output:
        return initializers.variance_scaling(2.0, "fan_out", "normal")
    if init == "he":
        return initializers.variance_scaling(1.0, "fan_in", "normal")
    if init == "torch":
        return initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    if init == "normal":
        return initializers.normal(0.02 * scale)
    return initializers.lecun_normal()


def _bias_init(init: str, fan_in: int) -> Any:
    """PyTorch draws biases like weights; all others begin at zero."""
    if init != "torch":
        return nn.initializers.zeros
    bound = 1 / math.sqrt(fan_in)

    def uniform(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return uniform


def dense(
    x: jax.Array,
    features: int | tuple[int, ...],
    *,
    init: str,
    dtype: str | None,
    axis: tuple[int, ...] = (-1,),
    use_bias: bool = True,
    output: bool = False,
    scale: float = 1.0,
    name: str | None = None,
) -> jax.Array:
    """A linear map of the trailing axes of `x`.

    Args:
        x: `(..., *contracted)`.
        features: The new trailing axes; a tuple makes a kernel `(*contracted, *features)`, as
            attention has for its heads.
        init: One of `INITIALIZERS`.
        dtype: The dtype of the computation; None takes that of the inputs.
        axis: The axes of `x` to contract, the last ones.
        use_bias: Whether to add a bias.
        output: Whether this is the network's last layer, for "he".
        scale: Factor of the deviation, for "normal".
        name: The layer's name.
    """
    fan_in = math.prod(x.shape[a] for a in axis)
    options: dict[str, Any] = {
        "use_bias": use_bias,
        "kernel_init": _kernel_init(init, output, scale),
        "bias_init": _bias_init(init, fan_in),
        "dtype": dtype,
        "name": name,
    }
    if isinstance(features, int) and axis == (-1,):
        return nn.Dense(features, **options)(x)
    return nn.DenseGeneral(features, axis=axis, **options)(x)


def conv(
    x: jax.Array,
    features: int,
    kernel_size: int = 3,
    *,
    init: str,
    dtype: str | None,
    stride: int = 1,
    padding: int | str | None = None,
    use_bias: bool = True,
    name: str | None = None,
) -> jax.Array:
    """A square convolution over `(batch, height, width, channels)`.

    Args:
        x: The images.
        features: The number of output channels.
        kernel_size: Height and width of the kernel.
        init: One of `INITIALIZERS`.
        dtype: The dtype of the computation; None takes that of the inputs.
        stride: The stride in both directions.
        padding: Zeros on each side, or XLA's "SAME" or "VALID"; by default half the kernel, as in
            PyTorch. At stride 2 and even sizes "SAME" pads one side only and PyTorch both.
        use_bias: Whether to add a bias.
        name: The layer's name.
    """
    if padding is None:
        padding = kernel_size // 2
    return nn.Conv(
        features,
        (kernel_size, kernel_size),
        strides=stride,
        padding=padding,
        use_bias=use_bias,
        kernel_init=_kernel_init(init, False, 1.0),
        bias_init=_bias_init(init, kernel_size**2 * x.shape[-1]),
        dtype=dtype,
        name=name,
    )(x)


def max_pool(x: jax.Array, window: int = 2, stride: int = 2, padding: int = 0) -> jax.Array:
    """The maximum over square windows of `(batch, height, width, channels)`.

    Raises:
        ValueError: If the images are smaller than the window.
    """
    if min(x.shape[1:3]) + 2 * padding < window:
        raise ValueError(
            f"pooling: feature maps of {x.shape[1]}x{x.shape[2]} are smaller than the window of "
            f"{window}; the network needs larger images."
        )
    around: Any = ((padding, padding), (padding, padding))
    return nn.max_pool(x, (window, window), (stride, stride), around)


def normalize(
    x: jax.Array,
    norm: str | None,
    *,
    train: bool,
    dtype: str | None,
    num_groups: int = 8,
    epsilon: float = 1e-5,
    use_bias: bool = True,
    name: str | None = None,
) -> jax.Array:
    """A normalization layer by name, with scale and bias.

    The variance is computed from centred values: flax's default, the difference of two moments,
    loses half of float32's digits where the mean is large, and curvature feels that.

    Args:
        x: `(batch, ..., channels)`.
        norm: None, "batch" (running averages with momentum 0.9, PyTorch's 0.1), "layer" (over the
            channels, at each position), "group", or "rms".
        train: Whether "batch" uses the statistics of the batch and moves its running averages.
        dtype: The dtype of the result; statistics are float32 at least.
        num_groups: For "group".
        epsilon: Added to the variance.
        use_bias: Whether there is a bias ("rms" has none).
        name: The layer's name.

    Raises:
        ValueError: If the channels do not fall into equal groups.
    """
    if norm is None:
        return x
    if norm == "group" and x.shape[-1] % num_groups:
        raise ValueError(
            f"group norm: {x.shape[-1]} channels do not divide into {num_groups} groups; choose "
            "another num_groups or width."
        )
    shared: dict[str, Any] = {"epsilon": epsilon, "dtype": dtype, "name": name}
    if norm != "rms":
        shared |= {"use_bias": use_bias, "use_fast_variance": False}
    if norm == "rms":
        layer = nn.RMSNorm(**shared)
    elif norm == "layer":
        layer = nn.LayerNorm(**shared)
    elif norm == "group":
        layer = nn.GroupNorm(num_groups, **shared)
    else:
        layer = nn.BatchNorm(use_running_average=not train, momentum=0.9, **shared)
    # flax's norms promote bfloat16 and float64 with float32, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        return layer(x)


def embedding_init(init: str, width: int) -> Any:
    """For a table of vectors: deviation 0.02 for "normal", 1 for "torch", else 1 / sqrt(width)."""
    return nn.initializers.normal({"normal": 0.02, "torch": 1.0}.get(init, 1 / math.sqrt(width)))


def look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """The rows of `table` at `tokens`, `(*tokens.shape, width)`; NaN for a token out of range."""
    sharding = jax.typeof(tokens).sharding
    if AxisType.Explicit in sharding.mesh.axis_types:
        # Such a mesh leaves the sharding of a gather to its caller: that of the tokens.
        width = jax.typeof(table).sharding.spec[-1]
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec, width))
    else:
        sharding = None
    return table.at[tokens].get(mode="fill", fill_value=jnp.nan, out_sharding=sharding)


def at_least_float32(x: jax.Array) -> jax.Array:
    """`x` in float32 if it has less; under strict promotion too, which has no word for that."""
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x


def logits(x: jax.Array, dtype: str | None) -> jax.Array:
    """The outputs in float32 where the network computes in less by `dtype`."""
    return x if dtype is None else x.astype(jnp.float32)
