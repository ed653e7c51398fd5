"""Data by name: digits, synthetic sets, and MNIST, Fashion-MNIST and the CIFARs from local files.

`load` finds a data set in the package's cache, a prepared tensorflow-datasets folder or the
published archives, checks it, and returns disjoint training, validation and test arrays. Random
augmentation is in `augment`. Optional dependencies load only where they are used.
"""

from geojax.datasets import augment
from geojax.datasets.loading import (
    NAMES,
    Augmentation,
    Augmented,
    load,
    load_augmented,
    prepare,
)
from geojax.datasets.splits import class_skewed_split
from geojax.datasets.synthetic import regression_1d, two_spirals
from geojax.datasets.tables import (
    NORMALIZATIONS,
    Dataset,
    Examples,
    Normalization,
    normalize,
)

__all__ = [
    "NAMES",
    "NORMALIZATIONS",
    "Augmentation",
    "Augmented",
    "Dataset",
    "Examples",
    "Normalization",
    "augment",
    "class_skewed_split",
    "load",
    "load_augmented",
    "normalize",
    "prepare",
    "regression_1d",
    "two_spirals",
]
