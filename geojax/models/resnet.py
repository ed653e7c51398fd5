"""Residual networks: CIFAR ResNets, pre-activation ResNets, Wide ResNets and ImageNet ResNets."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from geojax.models import layers

__all__ = ["CifarResNet", "PreResNet", "ResNet", "WideResNet"]

Layer = Callable[..., jax.Array]


def _check_depth(what: str, depth: int, per_stage: int, rest: int, example: str) -> None:
    if depth <= rest or (depth - rest) % per_stage:
        raise ValueError(
            f"{what}: depth is {depth!r}; expected {per_stage}n + {rest} with n at least 1 "
            f"({example})."
        )


def _check_common(module: Any) -> None:
    layers.check_choice("norm", module.norm, layers.NORMS)
    layers.check_choice("initializer", module.initializer, layers.INITIALIZERS)
    layers.check_choice("dtype", module.dtype, layers.DTYPES)


def _parts(module: Any, train: bool, use_bias: bool = False) -> tuple[Layer, Layer]:
    """The convolution and the norm of a network, with its options filled in."""
    conv = functools.partial(
        layers.conv,
        init=module.initializer,
        dtype=module.dtype,
        use_bias=use_bias or module.norm is None,
    )
    norm = functools.partial(
        layers.normalize,
        norm=module.norm,
        train=train,
        dtype=module.dtype,
        num_groups=module.num_groups,
    )
    return conv, norm


def _head(module: Any, x: jax.Array, name: str) -> jax.Array:
    """The mean over space and the output layer."""
    x = jnp.mean(x, axis=(1, 2))
    x = layers.dense(
        x,
        module.num_classes,
        init=module.initializer,
        dtype=module.dtype,
        output=True,
        name=name,
    )
    return layers.logits(x, module.dtype)


# --------------------------------------------------------------------------------- CIFAR ResNet


class _Shortcut(nn.Module):
    """A convolution and a norm on the skip connection, named as in Git Re-Basin."""

    conv: Layer
    norm: Layer
    width: int
    kernel_size: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv(x, self.width, self.kernel_size, stride=2, name="layers_0")
        return self.norm(x, name="layers_1")


class _CifarBlock(nn.Module):
    conv: Layer
    norm: Layer
    width: int
    stride: int
    shortcut: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm(self.conv(x, self.width, stride=self.stride, name="conv1"), name="norm1")
        y = self.norm(self.conv(nn.relu(y), self.width, name="conv2"), name="norm2")
        if self.stride != 1 and self.shortcut == "pad":
            x = x[:, :: self.stride, :: self.stride]
            missing = self.width - x.shape[-1]
            channels = (missing // 2, missing - missing // 2)
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), channels))
        elif self.stride != 1:
            kernel_size = 3 if self.shortcut == "3x3" else 1
            x = _Shortcut(self.conv, self.norm, self.width, kernel_size, name="shortcut")(x)
        return nn.relu(y + x)


class _CifarGroup(nn.Module):
    conv: Layer
    norm: Layer
    width: int
    stride: int
    shortcut: str
    num_blocks: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.num_blocks):
            stride = self.stride if i == 0 else 1
            block = _CifarBlock(
                self.conv, self.norm, self.width, stride, self.shortcut, name=f"blocks_{i}"
            )
            x = block(x)
        return x


class CifarResNet(nn.Module):
    """The ResNets for 32x32 images, three stages of basic blocks, as Git Re-Basin has them.

    Parameter names and layout are those of Git Re-Basin's ResNet20, so its checkpoints fit.

    Attributes:
        num_classes: The number of outputs.
        depth: 6n + 2: 20, 32, 44, 56, 110.
        norm: None, "batch", "layer" (over the channels, the default) or "group".
        num_groups: For "group".
        width_multiplier: Scales the 16, 32, 64 channels.
        shortcut: What a skip connection does where the width doubles: "3x3" and "1x1" are
            convolutions with a norm; "pad" fills up with zero channels, as the first ResNets did,
            which ties the channels of all stages together and leaves less to permute.
        initializer: One of `layers.INITIALIZERS`.
        dtype: The dtype of the computation; None takes that of the inputs.

    Reference:
        He, Zhang, Ren, Sun, Deep residual learning for image recognition, 2016, section 4.2;
        Ainsworth, Hayase, Srinivasa, Git Re-Basin, 2023.
    """

    num_classes: int = 10
    depth: int = 20
    norm: str | None = "layer"
    num_groups: int = 8
    width_multiplier: float = 1.0
    shortcut: str = "3x3"
    initializer: str = "he"
    dtype: str | None = None

    def __post_init__(self) -> None:
        _check_common(self)
        _check_depth("CifarResNet", self.depth, 6, 2, "20, 32, 44, 56, 110")
        layers.check_choice("shortcut", self.shortcut, ("3x3", "1x1", "pad"))
        layers.scaled(1, self.width_multiplier)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map `(batch, height, width, channels)` to `(batch, num_classes)`."""
        conv, norm = _parts(self, train)
        conv = functools.partial(conv, padding="SAME")
        widths = [layers.scaled(width, self.width_multiplier) for width in (16, 32, 64)]
        x = nn.relu(norm(conv(x, widths[0], name="conv1"), name="norm1"))
        for i, width in enumerate(widths):
            x = _CifarGroup(
                conv,
                norm,
                width,
                1 if i == 0 else 2,
                self.shortcut,
                (self.depth - 2) // 6,
                name=f"blockgroups_{i}",
            )(x)
        return _head(self, x, "dense")


# ------------------------------------------------------------------------------ pre-activation


class _PreBlock(nn.Module):
    """Norm and ReLU before each convolution; a 1x1 convolution on the skip where shapes change."""

    conv: Layer
    norm: Layer
    width: int
    stride: int
    bottleneck: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        out = 4 * self.width if self.bottleneck else self.width
        # (channels, kernel size, stride) of each convolution.
        plan = [(self.width, 3, self.stride), (self.width, 3, 1)]
        if self.bottleneck:
            plan = [(self.width, 1, 1), (self.width, 3, self.stride), (out, 1, 1)]
        y = x
        for i, (width, kernel_size, stride) in enumerate(plan, start=1):
            y = nn.relu(self.norm(y, name=f"norm{i}"))
            y = self.conv(y, width, kernel_size, stride=stride, name=f"conv{i}")
        if self.stride != 1 or x.shape[-1] != out:
            x = self.conv(x, out, 1, stride=self.stride, name="shortcut")
        return x + y


class PreResNet(nn.Module):
    """Pre-activation ResNets for 32x32 images.

    Attributes:
        num_classes: The number of outputs.
        depth: 9n + 2 (110, 164) in bottleneck blocks of expansion 4; below 44 it is 6n + 2 (8, 14,
            20, 26, 32, 38) in basic blocks.
        norm: None, "batch", "layer" (over the channels) or "group".
        num_groups: For "group".
        width_multiplier: Scales the 16, 32, 64 channels.
        initializer: One of `layers.INITIALIZERS`.
        dtype: The dtype of the computation; None takes that of the inputs.

    Reference:
        He, Zhang, Ren, Sun, Identity mappings in deep residual networks, 2016, in the form of
        dnn-mode-connectivity: the skip branches off before the norm, and its convolution has none.
    """

    num_classes: int = 10
    depth: int = 110
    norm: str | None = "batch"
    num_groups: int = 8
    width_multiplier: float = 1.0
    initializer: str = "he"
    dtype: str | None = None

    def __post_init__(self) -> None:
        _check_common(self)
        if self.depth >= 44:
            _check_depth("PreResNet of depth 44 or more", self.depth, 9, 2, "110, 164")
        else:
            _check_depth("PreResNet of depth below 44", self.depth, 6, 2, "8, 14, 20, 26, 32, 38")
        layers.scaled(1, self.width_multiplier)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map `(batch, height, width, channels)` to `(batch, num_classes)`."""
        conv, norm = _parts(self, train)
        bottleneck = self.depth >= 44
        num_blocks = (self.depth - 2) // (9 if bottleneck else 6)
        x = conv(x, layers.scaled(16, self.width_multiplier), name="conv1")
        for i, width in enumerate((16, 32, 64), start=1):
            width = layers.scaled(width, self.width_multiplier)
            for j in range(num_blocks):
                stride = 2 if i > 1 and j == 0 else 1
                x = _PreBlock(conv, norm, width, stride, bottleneck, name=f"layer{i}_{j}")(x)
        x = nn.relu(norm(x, name="norm"))
        return _head(self, x, "dense")


class _WideBlock(nn.Module):
    """Two 3x3 convolutions; where the shape changes, the skip branches off after the first norm."""

    conv: Layer
    norm: Layer
    width: int
    stride: int
    dropout: float
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(self.norm(x, name="norm1"))
        if self.stride != 1 or x.shape[-1] != self.width:
            x = self.conv(y, self.width, 1, stride=self.stride, name="shortcut")
        y = self.conv(y, self.width, stride=self.stride, name="conv1")
        y = nn.relu(self.norm(y, name="norm2"))
        y = nn.Dropout(self.dropout)(y, deterministic=not self.train)
        return x + self.conv(y, self.width, name="conv2")


class WideResNet(nn.Module):
    """Wide ResNets for 32x32 images, as in the paper's own code.

    dnn-mode-connectivity has biases in the convolutions (`conv_bias=True` gives its parameter
    count), the stride in the second convolution of a block, and the skip before the norm.

    Attributes:
        num_classes: The number of outputs.
        depth: 6n + 4: 16, 22, 28, 40.
        widen_factor: Scales the 16, 32, 64 channels of the stages; the first convolution keeps 16.
        conv_bias: Whether convolutions have biases; without a norm they have in any case.
        norm: None, "batch", "layer" (over the channels) or "group".
        num_groups: For "group".
        dropout: The rate between the two convolutions of a block.
        initializer: One of `layers.INITIALIZERS`.
        dtype: The dtype of the computation; None takes that of the inputs.

    Reference:
        Zagoruyko, Komodakis, Wide residual networks, 2016.
    """

    num_classes: int = 10
    depth: int = 28
    widen_factor: float = 10
    conv_bias: bool = False
    norm: str | None = "batch"
    num_groups: int = 8
    dropout: float = 0.0
    initializer: str = "he"
    dtype: str | None = None

    def __post_init__(self) -> None:
        _check_common(self)
        _check_depth("WideResNet", self.depth, 6, 4, "16, 22, 28, 40")
        layers.check_rate("dropout", self.dropout)
        layers.scaled(1, self.widen_factor)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map `(batch, height, width, channels)` to `(batch, num_classes)`."""
        conv, norm = _parts(self, train, self.conv_bias)
        x = conv(x, 16, name="conv1")
        for i, width in enumerate((16, 32, 64), start=1):
            width = layers.scaled(width, self.widen_factor)
            for j in range((self.depth - 4) // 6):
                stride = 2 if i > 1 and j == 0 else 1
                x = _WideBlock(
                    conv, norm, width, stride, self.dropout, train, name=f"layer{i}_{j}"
                )(x)
        x = nn.relu(norm(x, name="norm"))
        return _head(self, x, "dense")


# ------------------------------------------------------------------------------------ ImageNet


class _Bottleneck(nn.Module):
    conv: Layer
    norm: Layer
    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        out = 4 * self.width
        y = nn.relu(self.norm(self.conv(x, self.width, 1, name="conv1"), name="norm1"))
        y = self.conv(y, self.width, stride=self.stride, name="conv2")
        y = nn.relu(self.norm(y, name="norm2"))
        y = self.norm(self.conv(y, out, 1, name="conv3"), name="norm3")
        if self.stride != 1 or x.shape[-1] != out:
            x = self.conv(x, out, 1, stride=self.stride, name="shortcut_conv")
            x = self.norm(x, name="shortcut_norm")
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNets of bottleneck blocks for ImageNet, version 1.5 (the stride in the 3x3 convolution).

    Attributes:
        num_classes: The number of outputs.
        depth: 50, 101 or 152, and 14 or 26 for a small one.
        norm: None, "batch", "layer" (over the channels) or "group".
        num_groups: For "group".
        width_multiplier: Scales all channels.
        initializer: One of `layers.INITIALIZERS`.
        dtype: The dtype of the computation; None takes that of the inputs.

    Reference:
        He, Zhang, Ren, Sun, Deep residual learning for image recognition, 2016, table 1.
    """

    num_classes: int = 1000
    depth: int = 50
    norm: str | None = "batch"
    num_groups: int = 32
    width_multiplier: float = 1.0
    initializer: str = "he"
    dtype: str | None = None

    def __post_init__(self) -> None:
        _check_common(self)
        layers.check_choice("depth", self.depth, _IMAGENET_BLOCKS)
        layers.scaled(1, self.width_multiplier)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map `(batch, height, width, channels)` to `(batch, num_classes)`."""
        conv, norm = _parts(self, train)
        x = conv(x, layers.scaled(64, self.width_multiplier), 7, stride=2, name="conv1")
        x = layers.max_pool(nn.relu(norm(x, name="norm1")), window=3, padding=1)
        for i, num_blocks in enumerate(_IMAGENET_BLOCKS[self.depth], start=1):
            width = layers.scaled(32 * 2**i, self.width_multiplier)
            for j in range(num_blocks):
                stride = 2 if i > 1 and j == 0 else 1
                x = _Bottleneck(conv, norm, width, stride, name=f"layer{i}_{j}")(x)
        return _head(self, x, "dense")


_IMAGENET_BLOCKS = {
    14: (1, 1, 1, 1),
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
