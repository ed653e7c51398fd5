"""Predictions on shifted inputs: graded corruptions, entropy, and telling the two apart."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from geojax.ensemble import _arrays

__all__ = ["Corruption", "auroc", "corrupt", "predictive_entropy"]

Corruption = Literal["noise", "blur", "rotation", "contrast"]
# Strengths 1 to 5: noise in standard deviations of the data, blur in pixels, rotation in degrees,
# contrast as what is left of it.
LEVELS: dict[str, tuple[float, ...]] = {
    "noise": (0.2, 0.4, 0.6, 0.8, 1.0),
    "blur": (0.5, 0.75, 1.0, 1.5, 2.0),
    "rotation": (10.0, 20.0, 30.0, 45.0, 60.0),
    "contrast": (0.7, 0.5, 0.35, 0.2, 0.1),
}


def corrupt(images: Any, kind: Corruption, level: int, *, key: jax.Array) -> jax.Array:
    """Images under a corruption of strength 1 to 5; 0 leaves them as they are.

    "noise" adds a Gaussian of 0.2 to 1 standard deviations of all pixels given; "blur" convolves
    with a Gaussian of 0.5 to 2 pixels, the edges repeated; "rotation" turns each image by 10 to 60
    degrees, to a side drawn for it, by linear interpolation, with its own mean outside; "contrast"
    pulls each image towards its mean, to 0.7 to 0.1 of its contrast.

    Args:
        images: `(num, height, width, channels)`, floating, normalised or not. They may be flat,
            `(num, pixels)`, for "noise" and "contrast".
        kind: See above.
        level: 0 to 5.
        key: A typed key; the same key gives the same corruption.

    Returns:
        An array of the same shape and dtype.

    Raises:
        ValueError: If kind, level or shape are others.

    Reference:
        Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
        Perturbations", ICLR 2019: its idea of levels, with strengths of our own.
    """
    images = jnp.asarray(images)
    if kind not in LEVELS:
        raise ValueError(f"kind is {kind!r}; expected one of {tuple(LEVELS)}.")
    if isinstance(level, bool) or not isinstance(level, (int, np.integer)) or not 0 <= level <= 5:
        raise ValueError(f"level is {level!r}; expected an integer from 0 to 5.")
    flat = kind in ("noise", "contrast")
    if images.ndim != 4 and not (flat and images.ndim >= 2):
        raise ValueError(
            f"images have shape {images.shape}; expected (num, height, width, channels) for "
            f"{kind!r}."
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images are {images.dtype}; expected floating pixels.")
    if level == 0:
        return images
    return _corrupted(images, key, kind, LEVELS[kind][int(level) - 1])


def _corrupted(images, key, kind: str, strength: float):
    pixels = tuple(range(1, images.ndim))
    mean = jnp.mean(images, axis=pixels, keepdims=True)
    if kind == "noise":
        noise = jax.random.normal(key, images.shape, images.dtype)
        return images + strength * jnp.std(images) * noise
    if kind == "contrast":
        return mean + strength * (images - mean)
    if kind == "blur":
        radius = int(np.ceil(3 * strength))
        at = np.arange(-radius, radius + 1)
        window = np.exp(-0.5 * (at / strength) ** 2)
        window /= window.sum()
        for axis in (1, 2):
            size = images.shape[axis]
            moved = [
                float(w) * jnp.take(images, jnp.clip(jnp.arange(size) + int(d), 0, size - 1), axis)
                for w, d in zip(window, at, strict=True)
            ]
            images = sum(moved[1:], start=moved[0])
        return images
    angles = np.deg2rad(strength) * jax.random.rademacher(key, (len(images),)).astype(jnp.float32)
    return _rotated(images, angles, mean)


@jax.jit
def _rotated(images, angles, outside):
    height, width = images.shape[1:3]
    y, x = jnp.meshgrid(
        jnp.arange(height, dtype=jnp.float32) - (height - 1) / 2,
        jnp.arange(width, dtype=jnp.float32) - (width - 1) / 2,
        indexing="ij",
    )

    def one(image, angle, mean):
        places = jnp.stack(
            [
                jnp.cos(angle) * y - jnp.sin(angle) * x + (height - 1) / 2,
                jnp.sin(angle) * y + jnp.cos(angle) * x + (width - 1) / 2,
            ]
        )

        def channel(pixels, level):
            moved = jax.scipy.ndimage.map_coordinates(
                pixels - level, list(places), order=1, mode="constant", cval=0.0
            )
            return moved + level

        levels = jnp.broadcast_to(mean.reshape(-1)[0], (image.shape[-1],))
        return jax.vmap(channel, in_axes=(2, 0), out_axes=2)(image, levels)

    return jax.vmap(one)(images, angles, outside).astype(images.dtype)


def predictive_entropy(probs: Any) -> np.ndarray:
    """The entropy of each predicted distribution in nats, from 0 to the log of the classes.

    Args:
        probs: `(num_examples, ..., num_classes)`, probabilities or their logarithms, such as
            `predict` returns.

    Returns:
        `(num_examples, ...)`, float64.

    Raises:
        ValueError: For rows that are neither.

    Example:
        >>> predictive_entropy(np.array([[1.0, 0.0], [0.5, 0.5]])).round(4).tolist()
        [0.0, 0.6931]
    """
    log_probs, values = _arrays.both(probs)
    terms = np.where(values > 0, -values * np.where(values > 0, log_probs, 0), 0.0)
    return np.abs(terms.sum(-1))


def auroc(inside: Any, outside: Any) -> _arrays.Uncertain:
    """How well a score tells two sets apart: the chance that one of `outside` has the larger one.

    Args:
        inside: Scores, such as entropies, of examples like those trained on.
        outside: Scores of others.

    Returns:
        The area under the receiver operating characteristic, ties counted half: 0.5 for no
        difference, 1 where all of `outside` lie above; with Hanley and McNeil's standard error.

    Raises:
        ValueError: If one of them is empty or not finite.

    Example:
        >>> auroc([0.1, 0.4], [0.4, 0.9]).value
        0.875

    Reference:
        Hanley and McNeil, "The Meaning and Use of the Area under a ROC Curve", 1982.
    """
    a, b = (np.asarray(x, np.float64).reshape(-1) for x in (inside, outside))
    for name, x in (("inside", a), ("outside", b)):
        if not len(x) or not np.isfinite(x).all():
            raise ValueError(f"{name}: expected finite scores, at least one; got {len(x)}.")
    order = np.sort(a)
    below = np.searchsorted(order, b, "left")
    ties = np.searchsorted(order, b, "right") - below
    area = float((below + 0.5 * ties).sum() / (len(a) * len(b)))
    one, two = area / (2 - area), 2 * area**2 / (1 + area)
    variance = (
        area * (1 - area) + (len(b) - 1) * (one - area**2) + (len(a) - 1) * (two - area**2)
    ) / (len(a) * len(b))
    return _arrays.Uncertain(area, float(np.sqrt(max(variance, 0.0))))
