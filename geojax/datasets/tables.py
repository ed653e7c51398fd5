"""What a data set is: its arrays, its constants, and the facts about the four published image sets.

Everything here is static; files are read in `archives`, `cache` and `prepared`.
"""

import hashlib
import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "NORMALIZATIONS",
    "SPECS",
    "Arrays",
    "Dataset",
    "Examples",
    "Normalization",
    "Spec",
    "check_arrays",
    "content_md5",
    "needed",
    "normalize",
]

Arrays = dict[str, np.ndarray]
"""`train_images`, `train_labels`, `test_images`, `test_labels`, and for CIFAR-100 the superclasses
as `train_coarse_labels` and `test_coarse_labels`; all uint8, images `(n, height, width, channels)`,
in the order of the published archives."""


class Examples(NamedTuple):
    """One part of a data set; a pytree, so `batches.split` takes it as it is.

    Attributes:
        inputs: `(n, ...)`; images are `(n, height, width, channels)`, float32 (uint8 when raw).
        labels: `(n,)` int32 classes, or `(n, 1)` float32 targets of a regression.
    """

    inputs: np.ndarray
    labels: np.ndarray


class Normalization(NamedTuple):
    """The map `(pixels / scale - mean) / std` from stored pixels to a network's inputs.

    Attributes:
        mean: One number per channel (or one for all), or an array that broadcasts to an image.
        std: The same for the divisor.
        scale: The largest pixel value: 255, or 16 for digits.
    """

    mean: Any
    std: Any
    scale: float = 255.0


class Dataset(NamedTuple):
    """A data set in memory, in three disjoint parts.

    Attributes:
        train: The examples to fit parameters on.
        validation: The examples to choose anything else on; empty if none were asked for.
        test: The examples to report on, and for nothing else.
        name: The name it was loaded by.
        num_classes: The number of classes, or None for a regression.
        class_names: One word for each class; empty for a regression.
        normalization: What turns raw pixels into inputs, or None where inputs are no pixels.
        source: Where the arrays came from.
    """

    train: Examples
    validation: Examples
    test: Examples
    name: str
    num_classes: int | None
    class_names: tuple[str, ...]
    normalization: Normalization | None
    source: str


NORMALIZATIONS: dict[str, Normalization] = {
    "none": Normalization((0.0,), (1.0,)),
    "VGG": Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "ResNet": Normalization((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
}
"""By name: pixels scaled to [0, 1] only; ImageNet's constants, which the simplex and curve papers
use with VGG; and the customary CIFAR-10 constants, which they use with ResNets for both CIFARs.
(CIFAR-10's true deviations are 0.2470, 0.2435, 0.2616; the customary ones are kept so that results
compare.)"""


class Spec(NamedTuple):
    """Facts about a published image set.

    Attributes:
        image_shape: (height, width, channels).
        num_train: Training images in the published archives.
        num_test: Test images.
        class_names: Names of the classes, in order.
        coarse_class_names: Names of the superclasses, if there are any.
        normalization: The default one.
        content_md5: md5 of training images, training labels, test images and test labels as bytes,
            one after the other; None where it is not known.
    """

    image_shape: tuple[int, int, int]
    num_train: int
    num_test: int
    class_names: tuple[str, ...]
    coarse_class_names: tuple[str, ...]
    normalization: Normalization
    content_md5: str | None

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_DIGITS = tuple("0123456789")
_FASHION = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_CIFAR10 = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
_CIFAR100 = _words(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
    camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
    cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
    lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
    spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """
)
_CIFAR100_COARSE = _words(
    """
    aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices
    household_furniture insects large_carnivores large_man-made_outdoor_things
    large_natural_outdoor_scenes large_omnivores_and_herbivores medium_mammals
    non-insect_invertebrates people reptiles small_mammals trees vehicles_1 vehicles_2
    """
)

SPECS: dict[str, Spec] = {
    "mnist": Spec(
        image_shape=(28, 28, 1),
        num_train=60000,
        num_test=10000,
        class_names=_DIGITS,
        coarse_class_names=(),
        normalization=Normalization((0.1307,), (0.3081,)),
        content_md5="bd3808b2414328cf71cc2764408ae4c5",
    ),
    "fashion_mnist": Spec(
        image_shape=(28, 28, 1),
        num_train=60000,
        num_test=10000,
        class_names=_FASHION,
        coarse_class_names=(),
        normalization=Normalization((0.2860,), (0.3530,)),
        content_md5="254ac59ad730e84b1c39ea94cd8983c1",
    ),
    "cifar10": Spec(
        image_shape=(32, 32, 3),
        num_train=50000,
        num_test=10000,
        class_names=_CIFAR10,
        coarse_class_names=(),
        normalization=NORMALIZATIONS["ResNet"],
        content_md5="b6210169ef9681aaf316a55b4c99253a",
    ),
    "cifar100": Spec(
        image_shape=(32, 32, 3),
        num_train=50000,
        num_test=10000,
        class_names=_CIFAR100,
        coarse_class_names=_CIFAR100_COARSE,
        normalization=NORMALIZATIONS["ResNet"],
        content_md5=None,
    ),
}


def content_md5(arrays: Arrays) -> str:
    """The md5 of images and labels as bytes, training part first."""
    digest = hashlib.md5(usedforsecurity=False)
    for key in ("train_images", "train_labels", "test_images", "test_labels"):
        digest.update(np.ascontiguousarray(arrays[key]).data)
    return digest.hexdigest()


def check_arrays(name: str, arrays: Arrays, where: str, *, verify: bool = True) -> None:
    """Raise unless arrays are the published data set in the published order.

    Args:
        name: A key of `SPECS`.
        arrays: What was read.
        where: What the error calls the source.
        verify: False leaves out the counts and the checksum, and keeps the tests of form.

    Raises:
        ValueError: Saying what was expected and found.
    """
    spec = SPECS[name]
    for part, count in (("train", spec.num_train), ("test", spec.num_test)):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        if images.dtype != np.uint8 or images.shape[1:] != spec.image_shape:
            raise ValueError(
                f"{where}: expected {part} images of {name} as uint8 (n, *{spec.image_shape}), "
                f"found {images.dtype} {images.shape}."
            )
        if labels.shape != images.shape[:1]:
            raise ValueError(
                f"{where}: found {len(images)} {part} images and labels of shape {labels.shape}; "
                "expected one label for each image."
            )
        if labels.size and int(labels.max()) >= spec.num_classes:
            raise ValueError(
                f"{where}: found the {part} label {int(labels.max())}; {name} has the classes 0 to "
                f"{spec.num_classes - 1}."
            )
        if verify and len(images) != count:
            raise ValueError(
                f"{where}: expected {count} {part} images of {name}, found {len(images)}."
            )
        # Where no checksum of the content is known, it is known that classes are equally frequent.
        if verify and spec.content_md5 is None:
            counts = np.bincount(labels, minlength=spec.num_classes)
            if counts.min() != counts.max():
                raise ValueError(
                    f"{where}: expected {count // spec.num_classes} {part} images of each class of "
                    f"{name}, found from {counts.min()} to {counts.max()}."
                )
    if verify and spec.content_md5 is not None:
        found = content_md5(arrays)
        if found != spec.content_md5:
            raise ValueError(
                f"{where}: expected the published images of {name} in the published order (md5 "
                f"{spec.content_md5}), found others (md5 {found}). Remove this source, or pass "
                "verify=False to use it as it is."
            )


def normalize(images: Any, normalization: Normalization) -> Any:
    """Raw pixels as a network's inputs: `(pixels / scale - mean) / std`.

    Args:
        images: `(..., height, width, channels)`, NumPy or JAX, of any real dtype.
        normalization: The constants, as in `Dataset.normalization`; under jit an argument or not.

    Returns:
        A float32 array of the same shape and kind; for a JAX array, sharded like it.

    Raises:
        ValueError: If the constants do not broadcast to an image.

    Example:
        >>> pixels = np.full((1, 2, 2, 3), 255, np.uint8)
        >>> normalize(pixels, Normalization((0.5,), (0.5,))).max().item()
        1.0
    """
    traced = isinstance(images, jax.Array)
    array: Any = jnp.asarray if traced else np.asarray
    mean = array(normalization.mean, np.float32)
    std = array(normalization.std, np.float32)
    shape = np.shape(images)
    for what, value in (("mean", mean), ("std", std)):
        tail = shape[len(shape) - value.ndim :]
        if value.ndim > len(shape) or any(
            k not in (1, n) for k, n in zip(value.shape, tail, strict=True)
        ):
            raise ValueError(
                f"normalization: {what} has shape {value.shape}, which does not broadcast to "
                f"images of shape {shape}; give one number per channel, or one for all."
            )
    if not traced:
        out = np.empty(shape, np.float32)
        if not shape[:-3]:
            images, out = images[None], out[None]
        # Constants of an image's size, and a few images at a time: broadcasting three channels, or
        # passing three times over all of CIFAR, takes five times as long.
        mean, std = (np.broadcast_to(value, shape[-3:]).copy() for value in (mean, std))
        for first in range(0, len(images), 256):
            rows = out[first : first + 256]
            rows[...] = images[first : first + 256]
            rows /= np.float32(normalization.scale)
            rows -= mean
            rows /= std
        return out.reshape(shape)
    mean = mean.reshape((1,) * (images.ndim - mean.ndim) + mean.shape)
    std = std.reshape((1,) * (images.ndim - std.ndim) + std.shape)
    return (images.astype(jnp.float32) / normalization.scale - mean) / std


def needed(module: str, purpose: str) -> Any:
    """Import an optional dependency.

    Raises:
        ImportError: Saying what it is needed for and how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{purpose} needs {error.name or module}: pip install "geojax[data]".'
        ) from error
