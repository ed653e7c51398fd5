"""Parts of a data set that differ in their classes, for networks that are merged afterwards."""

import jax
import numpy as np

__all__ = ["class_skewed_split"]


def class_skewed_split(
    labels: np.ndarray, *, key: jax.Array, fraction: float = 0.2, num_classes: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Two disjoint halves of a data set, each with few examples of half of the classes.

    The first half gets `fraction` of the examples of each class in the first half of the classes,
    and all but `fraction` of each class in the second; the second half gets the rest. The counts
    are exact in each class, rounded to the nearest example; the paper's are so over all classes of
    a half together.

    Args:
        labels: `(n,)`, classes from 0.
        key: A typed key; what is drawn of a class depends on it and on that class alone.
        fraction: The share of a scarce class, from 0 to 1.
        num_classes: By default one more than the largest label.

    Returns:
        Two ascending index arrays that together hold each example once.

    Raises:
        ValueError: If the labels are no classes, or the fraction is no share.

    Example:
        >>> labels = np.repeat([0, 1], 10)
        >>> first, second = class_skewed_split(labels, key=jax.random.key(0))
        >>> np.bincount(labels[first]).tolist(), np.bincount(labels[second]).tolist()
        ([2, 8], [8, 2])

    Reference:
        Ainsworth et al., Git Re-Basin: Merging Models modulo Permutation Symmetries, 2023, section
        5.3.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not len(labels) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"class_skewed_split: labels are {labels.dtype}{list(labels.shape)}; expected integer "
            "classes (n,)."
        )
    num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"class_skewed_split: labels range from {labels.min()} to {labels.max()}; expected 0 "
            f"to {num_classes - 1}."
        )
    if not 0 <= fraction <= 1:
        raise ValueError(f"class_skewed_split: fraction is {fraction}; expected 0 to 1.")
    halves: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for label in range(num_classes):
        (members,) = np.nonzero(labels == label)
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, label), len(members)))
        few = round(fraction * len(members))
        scarce = 0 if label < num_classes // 2 else 1
        halves[scarce].append(members[order[:few]])
        halves[1 - scarce].append(members[order[few:]])
    first, second = (np.sort(np.concatenate(half)) for half in halves)
    return first, second
