"""Data that need no files: scikit-learn's digits, two spirals, a regression with a gap."""

from typing import Any

import numpy as np

from geojax.datasets.tables import Arrays, Dataset, Examples, needed

__all__ = ["digits_arrays", "regression_1d", "two_spirals"]

_GAP = (-0.7, 0.5)


def digits_arrays() -> Arrays:
    """The 1797 digits, in the layout of the published image sets.

    Examples `numpy.random.default_rng(0).permutation(1797)[:898]` are for training, the other 899
    for testing, in that order. Images are `(n, 8, 8, 1)` with pixels from 0 to 16.

    Raises:
        ImportError: Without scikit-learn.
    """
    bunch = needed("sklearn.datasets", "The data set digits").load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.images))
    images = bunch.images.astype(np.uint8)[order][..., None]
    labels = bunch.target.astype(np.uint8)[order]
    return {
        "train_images": images[:898],
        "train_labels": labels[:898],
        "test_images": images[898:],
        "test_labels": labels[898:],
    }


def two_spirals(
    *,
    num_per_class: int = 50,
    num_test_per_class: int = 100,
    validation: int | None = None,
    noise: float = 1.0,
    seed: int = 0,
) -> Dataset:
    r"""Two interleaved spirals in the plane, one per class.

    A point of class 0 lies at :math:`1.5 u (-\cos u, \sin u)` plus Gaussian noise in both
    coordinates, with :math:`u = \sqrt{U} \cdot 10\pi/3` and U uniform on [0, 1]; class 1 is the
    same under :math:`x \mapsto -x`.

    Differences from the original notebook: the seed is used; every point is drawn by itself, where
    there the second class mirrored the first one's noise as well; and the order is shuffled, where
    there all of one class came first.

    Args:
        num_per_class: Training points of each class.
        num_test_per_class: Test points of each class.
        validation: Validation points of both classes together, drawn besides; by default as many
            as training points.
        noise: Standard deviation of each coordinate.
        seed: Same seed, same data.

    Returns:
        Inputs `(n, 2)` float32 and labels `(n,)` int32.

    Raises:
        ValueError: If a count or the noise is negative, or there is no training point.

    Example:
        >>> two_spirals(num_per_class=3, seed=1).train.inputs.shape
        (6, 2)

    Reference:
        Benton et al., Loss Surface Simplexes for Mode Connecting Volumes and Fast Ensembling, 2021,
        notebook on two spirals.
    """
    sizes = _sizes(2 * num_per_class, validation, 2 * num_test_per_class, noise)
    rng = np.random.default_rng(seed)

    def draw(size: int) -> Examples:
        labels = rng.permutation(np.arange(size) % 2)
        angle = np.sqrt(rng.random(size)) * (600 * np.pi / 180)
        curve = 1.5 * angle[:, None] * np.stack([-np.cos(angle), np.sin(angle)], axis=1)
        points = curve * (1 - 2 * labels[:, None]) + noise * rng.normal(size=(size, 2))
        return Examples(points.astype(np.float32), labels.astype(np.int32))

    return _synthetic("two_spirals", draw, sizes, ("0", "1"), seed)


def regression_1d(
    *,
    num_train: int = 100,
    num_test: int = 100,
    validation: int | None = None,
    noise: float = 0.1,
    seed: int = 0,
) -> Dataset:
    r"""A curve seen only in two clusters, for uncertainty in the gap between them.

    Inputs are uniform on [-1, -0.7] and [0.5, 1], half of them in each; targets are
    :math:`\cos(4x + 0.8)` plus Gaussian noise. Nothing is drawn between: evaluate a grid there.

    Args:
        num_train: Training points.
        num_test: Test points, drawn from the same clusters.
        validation: Validation points, drawn besides; by default as many as training points.
        noise: Standard deviation of a target.
        seed: Same seed, same data.

    Returns:
        Inputs and labels `(n, 1)` float32; `num_classes` is None.

    Raises:
        ValueError: If a count or the noise is negative, or there is no training point.

    Example:
        >>> inputs = regression_1d().train.inputs
        >>> bool(((inputs > -0.7) & (inputs < 0.5)).any())
        False

    Reference:
        Foong et al., "In-Between" Uncertainty in Bayesian Neural Networks, 2019, section 4.
    """
    sizes = _sizes(num_train, validation, num_test, noise)
    rng = np.random.default_rng(seed)

    def draw(size: int) -> Examples:
        left = rng.permutation(np.arange(size) % 2)[:, None] == 0
        unit = rng.random((size, 1))
        low, high = np.where(left, -1.0, _GAP[1]), np.where(left, _GAP[0], 1.0)
        inputs = low + (high - low) * unit
        targets = np.cos(4 * inputs + 0.8) + noise * rng.normal(size=(size, 1))
        return Examples(inputs.astype(np.float32), targets.astype(np.float32))

    return _synthetic("regression_1d", draw, sizes, (), seed)


def _sizes(train: int, validation: int | None, test: int, noise: float) -> tuple[int, int, int]:
    sizes = (train, train if validation is None else validation, test)
    if train <= 0 or min(sizes) < 0 or noise < 0:
        raise ValueError(
            f"expected at least one training point and no negative count or noise, got {train} "
            f"training, {sizes[1]} validation and {test} test points with noise {noise}."
        )
    return sizes


def _synthetic(
    name: str, draw: Any, sizes: tuple[int, int, int], class_names: tuple[str, ...], seed: int
) -> Dataset:
    train, validation, test = (draw(size) for size in sizes)
    return Dataset(
        train=train,
        validation=validation,
        test=test,
        name=name,
        num_classes=len(class_names) or None,
        class_names=class_names,
        normalization=None,
        source=f"drawn with seed {seed}",
    )
