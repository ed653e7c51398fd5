"""Random changes to images as pure functions `augment(key, images) -> images`, for use under jit.

Image i of a batch draws from `key` folded with i, so the result depends on neither the batch's size
nor its sharding. Augment raw pixels and normalize afterwards: what is moved in from outside is
black.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

__all__ = ["affine", "crop", "flip", "pad_crop_flip", "warp"]


def pad_crop_flip(key: jax.Array, images: jax.Array, *, padding: int = 4) -> jax.Array:
    """Shift each image by up to `padding` pixels and mirror half of them, left to right.

    That is the training transform of the simplex and curve papers: pad with black, crop a window of
    the image's size anywhere, flip with probability one half.

    Args:
        key: A typed key.
        images: `(n, height, width, channels)` of any dtype; raw pixels, so that black is 0.
        padding: Pixels on each side.

    Returns:
        Images of the same shape, dtype and sharding over n.

    Raises:
        ValueError: If `images` has not four axes, or the padding is negative.
    """
    images = _images(images)
    if padding < 0:
        raise ValueError(f"pad_crop_flip: padding is {padding}; expected a number of pixels.")

    draws = _uniform(key, images, 3)
    offsets = jnp.floor(draws[:, :2] * (2 * padding + 1)).astype(jnp.int32)
    return flip(crop(images, offsets, padding=padding), draws[:, 2] < 0.5)


def affine(
    key: jax.Array,
    images: jax.Array,
    *,
    zoom: tuple[float, float] = (0.8, 1.2),
    angle: float = 30.0,
    mirror: bool = True,
) -> jax.Array:
    """Zoom, shift, rotate and mirror each image at random, in one bilinear interpolation.

    The zoom is log-uniform; the window it leaves lies anywhere within the image (or, for a zoom
    below one, the image anywhere within the window); the angle is uniform; half of the images are
    flipped.

    Differences from the transform used by git-re-basin: a zoom below one does happen. There the
    library raised the lower end of the range to one whenever a crop had the size of the image.

    Args:
        key: A typed key.
        images: `(n, height, width, channels)`; raw pixels, so that black is 0.
        zoom: The smallest and the largest magnification, positive.
        angle: The largest rotation either way, in degrees.
        mirror: Whether to flip, left to right.

    Returns:
        Images of the same shape, dtype (integers are rounded) and sharding over n.

    Raises:
        ValueError: If `images` has not four axes, or the range of zooms is empty or not positive.

    Reference:
        Ainsworth et al., Git Re-Basin, 2023: the augmentation of its CIFAR experiments.
    """
    images = _images(images)
    low, high = zoom
    if not 0 < low <= high:
        raise ValueError(f"affine: zoom is {zoom}; expected (smallest, largest), both positive.")
    draws = _uniform(key, images, 5)
    zooms = low * (high / low) ** draws[:, 0]
    angles = angle * (2 * draws[:, 1] - 1)
    left_over = (1 - 1 / zooms) / 2  # the part of the image on either side of a centered window
    shifts = jnp.stack(
        [
            left_over * size * (2 * draw - 1)
            for size, draw in zip(images.shape[1:3], (draws[:, 2], draws[:, 3]), strict=True)
        ],
        axis=-1,
    )
    out = warp(images, zooms, angles, shifts)
    return flip(out, draws[:, 4] < 0.5) if mirror else out


def crop(images: jax.Array, offsets: jax.Array, *, padding: int = 4) -> jax.Array:
    """The window of the original size at a given place of each padded image.

    Args:
        images: `(n, height, width, channels)` of any dtype.
        offsets: `(n, 2)` integers, the window's first row and column in the padded image: 0 to
            `2 * padding`; `padding` gives the image itself.
        padding: Pixels of zeros on each side.

    Returns:
        Images of the same shape and dtype.
    """
    images = _images(images)

    def one(image, offset):
        padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        start = (offset[0], offset[1], jnp.zeros((), offset.dtype))
        return jax.lax.dynamic_slice(padded, start, image.shape)

    return jax.vmap(one)(images, offsets)


def flip(images: jax.Array, where: jax.Array) -> jax.Array:
    """Mirror the images for which `where`, `(n,)` bool, is true, left to right."""
    images = _images(images)
    return jax.vmap(lambda image, w: jnp.where(w, image[:, ::-1], image))(images, where)


def warp(
    images: jax.Array, zooms: jax.Array, angles: jax.Array, shifts: jax.Array | None = None
) -> jax.Array:
    r"""Zoom and rotate each image about its center, with bilinear interpolation and black outside.

    The pixel at position p from the center takes the value at :math:`R p / z + s`, with z the zoom,
    s the shift and R the rotation back by the angle. A zoom of 1 and an angle of 0 give the image
    bit for bit.

    Args:
        images: `(n, height, width, channels)`.
        zooms: `(n,)` magnifications.
        angles: `(n,)` degrees, counter-clockwise as the picture is seen.
        shifts: `(n, 2)` rows and columns, in pixels of the original, by which the point seen at the
            center moves; none by default.

    Returns:
        Images of the same shape and dtype; computed in float32 or better, integers rounded.
    """
    images = _images(images)
    if shifts is None:
        shifts = jnp.stack([jnp.zeros_like(zooms)] * 2, axis=-1)
    height, width = images.shape[1:3]
    dtype = images.dtype
    floating = jnp.issubdtype(dtype, jnp.floating)
    compute = dtype if floating and dtype.itemsize >= 4 else jnp.float32

    def one(image, zoom, angle, shift):
        theta = jnp.deg2rad(angle)
        cos, sin = jnp.cos(theta) / zoom, jnp.sin(theta) / zoom
        y, x = jnp.meshgrid(
            jnp.arange(height, dtype=jnp.float32) - (height - 1) / 2,
            jnp.arange(width, dtype=jnp.float32) - (width - 1) / 2,
            indexing="ij",
        )
        rows = cos * y + sin * x + shift[0] + (height - 1) / 2
        columns = cos * x - sin * y + shift[1] + (width - 1) / 2
        return _bilinear(image.astype(compute), rows, columns)

    out = jax.vmap(one)(images, zooms, angles, shifts)
    return (out if floating else jnp.round(out)).astype(dtype)


def _bilinear(image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """The image `(height, width, channels)` between its pixels; zero outside."""
    height, width = image.shape[:2]
    top, left = jnp.floor(rows), jnp.floor(columns)
    total = jnp.zeros((*rows.shape, image.shape[2]), image.dtype)
    for row, row_weight in ((top, 1 - (rows - top)), (top + 1, rows - top)):
        for column, column_weight in ((left, 1 - (columns - left)), (left + 1, columns - left)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            weight = jnp.where(inside, row_weight * column_weight, 0.0).astype(image.dtype)
            value = image[
                jnp.clip(row, 0, height - 1).astype(jnp.int32),
                jnp.clip(column, 0, width - 1).astype(jnp.int32),
            ]
            total = total + value * weight[..., None]
    return total


def _images(images: Any) -> jax.Array:
    images = jnp.asarray(images)
    if images.ndim != 4:
        raise ValueError(
            f"images have shape {images.shape}; expected (n, height, width, channels). For one "
            "image pass image[None]."
        )
    return images


def _uniform(key: jax.Array, images: jax.Array, num: int) -> jax.Array:
    """`(n, num)` numbers in [0, 1), each row from its image's own key and placed like the image."""
    indices = jnp.arange(images.shape[0], dtype=jnp.uint32)
    draws = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i), (num,), jnp.float32))(
        indices
    )
    sharding = getattr(jax.typeof(images), "sharding", None)
    if sharding is None or AxisType.Explicit not in sharding.mesh.axis_types or not sharding.spec:
        return draws
    return jax.sharding.reshard(
        draws, NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0], None))
    )
