"""Pytrees as vectors, and stacked pytrees as sets of points.

A point is any pytree of arrays. A set of n points is one pytree whose leaves have a leading axis of
size n; everything that mixes points goes through `combine`.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

__all__ = [
    "accumulation_dtype",
    "axpy",
    "cast",
    "check_floating",
    "check_same",
    "combine",
    "combine_leaves",
    "explicit_sharding",
    "inner_products",
    "merge",
    "norm",
    "num_points",
    "partition",
    "paths",
    "placed_like",
    "random_like",
    "scale",
    "size",
    "stack",
    "unstack",
    "vdot",
]

PyTree = Any


def _flatten(tree: PyTree) -> tuple[list[tuple[str, Any]], Any]:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path) or "(root)", leaf) for path, leaf in leaves], treedef


def paths(tree: PyTree) -> list[str]:
    """The path of every leaf, in flattening order, as errors print it.

    Example:
        >>> paths({"dense": {"bias": 0.0, "kernel": 1.0}})
        ["['dense']['bias']", "['dense']['kernel']"]
    """
    return [path for path, _ in _flatten(tree)[0]]


def size(tree: PyTree) -> int:
    """The number of array elements in all leaves together (the parameter count)."""
    return sum(int(np.prod(jnp.shape(leaf))) for leaf in jax.tree.leaves(tree))


def _is_floating(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating) if _is_array(leaf) else False


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, float, int, complex)) or (
        hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    )


def check_floating(tree: PyTree, what: str = "parameters") -> None:
    """Raise unless every leaf is an array of real floating type.

    Args:
        tree: Any pytree.
        what: The name of `tree` in the error.

    Raises:
        TypeError: Naming the first leaf that cannot be combined or differentiated.
    """
    for path, leaf in _flatten(tree)[0]:
        if not _is_floating(leaf):
            kind = jnp.result_type(leaf) if _is_array(leaf) else type(leaf).__name__
            raise TypeError(
                f"{what}: leaf {path} is {kind}; expected real floating-point arrays. Split other "
                "leaves off with `tree.partition` and put them back with `tree.merge`."
            )


def check_same(expected: PyTree, actual: PyTree, *, names: tuple[str, str], dtype: bool = True):
    """Raise unless two pytrees have the same structure, leaf shapes and (optionally) dtypes.

    Args:
        expected: The pytree to compare with.
        actual: The pytree under test.
        names: What the error calls the two.
        dtype: Whether leaf dtypes must agree as well.

    Raises:
        ValueError: Naming the first leaf, by path, that is missing, extra or of another shape.
        TypeError: Naming the first leaf that is no array or has another dtype.
    """
    left, left_def = _flatten(expected)
    right, right_def = _flatten(actual)
    if left_def != right_def:
        missing = [path for path, _ in left if path not in dict(right)]
        extra = [path for path, _ in right if path not in dict(left)]
        detail = (
            f"{names[1]} lacks leaf {missing[0]}"
            if missing
            else f"{names[1]} has leaf {extra[0]} besides"
            if extra
            else f"containers differ: {left_def} and {right_def}"
        )
        raise ValueError(
            f"{names[0]} and {names[1]} differ in structure: {detail}. Both must be the same "
            "pytree of arrays."
        )
    for (path, a), (_, b) in zip(left, right, strict=True):
        for name, leaf in zip(names, (a, b), strict=True):
            if not _is_array(leaf):
                raise TypeError(
                    f"leaf {path} of {name} is a {type(leaf).__name__}; expected an array. Split "
                    "such leaves off with `tree.partition`."
                )
        if jnp.shape(a) != jnp.shape(b):
            raise ValueError(
                f"leaf {path} has shape {jnp.shape(a)} in {names[0]} and {jnp.shape(b)} in "
                f"{names[1]}; the shapes must agree."
            )
        if dtype and jnp.result_type(a) != jnp.result_type(b):
            raise TypeError(
                f"leaf {path} is {jnp.result_type(a)} in {names[0]} and {jnp.result_type(b)} in "
                f"{names[1]}; use `tree.cast` so that the dtypes agree."
            )


def partition(
    tree: PyTree, predicate: Callable[[Any], bool] = _is_floating
) -> tuple[PyTree, PyTree]:
    """Split a pytree in two of the same shape, with None where the other has the leaf.

    Args:
        tree: Any pytree, an Equinox module included.
        predicate: Leaves for which it holds go to the first half; by default floating arrays.

    Returns:
        `(selected, rest)`; `merge(selected, rest)` is `tree`.

    Example:
        >>> selected, rest = partition({"w": jnp.ones(2), "step": 3})
        >>> selected["step"], rest["step"]
        (None, 3)
    """
    selected = jax.tree.map(lambda leaf: leaf if predicate(leaf) else None, tree)
    rest = jax.tree.map(lambda leaf: None if predicate(leaf) else leaf, tree)
    return selected, rest


def merge(selected: PyTree, rest: PyTree) -> PyTree:
    """Put the two halves of `partition` together again."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, selected, rest, is_leaf=lambda leaf: leaf is None
    )


def explicit_sharding(array: Any) -> NamedSharding | None:
    """The sharding in the array's type, where that type has Explicit mesh axes."""
    sharding = getattr(jax.typeof(array), "sharding", None)
    if sharding is None or AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return sharding


def _member_axis_replicated(array: jax.Array) -> jax.Array:
    """The array with its leading axis unsharded, where the type system insists on it."""
    sharding = explicit_sharding(array)
    if sharding is None or not sharding.spec or sharding.spec[0] is None:
        return array
    return jax.sharding.reshard(
        array, NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[1:]))
    )


def stack(trees: Sequence[PyTree]) -> PyTree:
    """Make one stacked pytree from n points of equal structure.

    Leaves may be of any dtype, 0-d or empty; nothing is converted.

    Args:
        trees: n pytrees with the same structure, leaf shapes and dtypes.

    Returns:
        The pytree with leaves `(n, *leaf.shape)`; sharding of the leaf axes is kept.

    Raises:
        ValueError: For no trees, or where structures or shapes differ, naming the leaf.
        TypeError: Where dtypes differ, naming the leaf.

    Example:
        >>> stack([{"w": jnp.zeros(2)}, {"w": jnp.ones(2)}])["w"].shape
        (2, 2)
    """
    trees = list(trees)
    if not trees:
        raise ValueError("stack: expected at least one pytree, got none.")
    for i, other in enumerate(trees[1:], start=1):
        check_same(trees[0], other, names=("tree 0", f"tree {i}"))
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(x) for x in leaves]), *trees)


def num_points(points: PyTree) -> int:
    """The size n of the leading axis that all leaves of a stacked pytree share.

    Raises:
        ValueError: If there are no leaves, or a leaf has no leading axis or one of another size.
    """
    leaves = _flatten(points)[0]
    if not leaves:
        raise ValueError("points: expected a stacked pytree with at least one leaf, got none.")
    first_path, first = leaves[0]
    for path, leaf in leaves:
        if jnp.ndim(leaf) == 0:
            raise ValueError(
                f"points: leaf {path} is a scalar; every leaf of a stacked pytree has a leading "
                "axis over the points (make one with `tree.stack`)."
            )
        if jnp.shape(leaf)[0] != jnp.shape(first)[0]:
            raise ValueError(
                f"points: leaf {first_path} stacks {jnp.shape(first)[0]} points and leaf {path} "
                f"{jnp.shape(leaf)[0]}; the leading axes must agree (make one with `tree.stack`)."
            )
    return int(jnp.shape(first)[0])


def unstack(points: PyTree) -> list[PyTree]:
    """The n points of a stacked pytree, as a list: the inverse of `stack`.

    Raises:
        ValueError: If the leaves do not share a leading axis, naming the leaf.
    """
    n = num_points(points)
    points = jax.tree.map(lambda x: _member_axis_replicated(jnp.asarray(x)), points)
    return [jax.tree.map(lambda x, i=i: x[i], points) for i in range(n)]


def accumulation_dtype(*arrays: Any) -> Any:
    """The dtype in which sums are kept: float64 where one of the arrays is, else float32."""
    wide = any(jnp.result_type(array) == jnp.float64 for array in arrays)
    return jnp.float64 if wide else jnp.float32


def combine(points: PyTree, weights: jax.typing.ArrayLike) -> PyTree:
    r"""The affine combination :math:`\sum_i c_i w_i` of stacked points, or many at once.

    Each leaf is combined in float32 or better at the highest matmul precision and returned in its
    own dtype; a unit vector of weights returns its point bit for bit.

    Args:
        points: Stacked pytree, leaves `(n, *leaf.shape)`, floating.
        weights: `(n,)` for one point, or `(..., n)` for a stack of points with those leading axes.
            They need not sum to one.

    Returns:
        Leaves `weights.shape[:-1] + leaf.shape`, sharded like the leaf. One read of the points.

    Raises:
        TypeError: If a leaf is not floating, naming it.
        ValueError: If `weights` does not end in an axis of size n.

    Example:
        >>> points = stack([{"w": jnp.zeros(2)}, {"w": jnp.ones(2)}])
        >>> combine(points, jnp.array([0.25, 0.75]))["w"].tolist()
        [0.75, 0.75]
    """
    check_floating(points, "points")
    n = num_points(points)
    if jnp.ndim(weights) == 0 or jnp.shape(weights)[-1] != n:
        raise ValueError(
            f"combine: weights have shape {jnp.shape(weights)}; expected (..., {n}), one weight "
            f"for each of the {n} points."
        )

    return jax.tree.map(lambda leaf: _combined_leaf(leaf, weights), points)


def combine_leaves(points: PyTree, weights: PyTree) -> PyTree:
    """`combine` with coefficients for every leaf apart: layer-wise combinations.

    Args:
        points: Stacked pytree, leaves `(n, *leaf.shape)`, floating.
        weights: Pytree of the same structure, leaves `(..., n)`.

    Returns:
        Leaves `weights.shape[:-1] + leaf.shape`, each with the weights of its own leaf.

    Raises:
        TypeError: If a leaf of `points` is not floating, naming it.
        ValueError: If the structures differ, or a leaf of `weights` does not end in an axis of
            size n, naming it.

    Example:
        >>> points = stack([{"a": jnp.zeros(1), "b": jnp.zeros(1)},
        ...                 {"a": jnp.ones(1), "b": jnp.ones(1)}])
        >>> combine_leaves(points, {"a": jnp.array([1.0, 0.0]), "b": jnp.array([0.0, 1.0])})
        {'a': Array([0.], dtype=float32), 'b': Array([1.], dtype=float32)}

    Reference:
        Wortsman et al., "Learning Neural Network Subspaces", ICML 2021 (layer-wise coefficients).
    """
    check_floating(points, "points")
    n = num_points(points)
    given, structure = _flatten(weights)
    if structure != jax.tree.structure(points):
        raise ValueError(
            f"combine_leaves: weights have the structure {structure}; expected that of the points, "
            f"{jax.tree.structure(points)}, an array of weights for each leaf."
        )
    for path, one in given:
        if jnp.ndim(one) == 0 or jnp.shape(one)[-1] != n:
            raise ValueError(
                f"combine_leaves: weights{path} has shape {jnp.shape(one)}; expected (..., {n}), "
                f"one weight for each of the {n} points."
            )
    return jax.tree.map(_combined_leaf, points, weights)


def _combined_leaf(leaf: Any, weights: jax.typing.ArrayLike) -> jax.Array:
    dtype = accumulation_dtype(leaf, weights)
    leaf = jnp.asarray(leaf)
    # A reduction over the leading axis is hundreds of times slower than a dot on XLA's CPU backend.
    total = lax.dot_general(
        jnp.asarray(weights).astype(dtype),
        _member_axis_replicated(leaf).astype(dtype),
        (((jnp.ndim(weights) - 1,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )
    return total.astype(leaf.dtype)


def inner_products(points: PyTree, x: PyTree) -> jax.Array:
    """The inner products of n stacked points with one vector: the adjoint of `combine`.

    Accumulated in float32 or better at the highest matmul precision. `jax.vmap` over `x` gives a
    Gram matrix.

    Args:
        points: Stacked pytree, leaves `(n, *leaf.shape)`, floating, in any sharding.
        x: Pytree of the same structure without the leading axis.

    Returns:
        `(n,)`. One read of the points; under a mesh one all-reduce, and nothing is gathered.

    Raises:
        TypeError: If a leaf is not floating, naming it.
        ValueError: If structures or shapes differ, naming the leaf.

    Example:
        >>> points = stack([{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([1.0, 1.0])}])
        >>> inner_products(points, {"w": jnp.array([2.0, 3.0])}).tolist()
        [2.0, 5.0]
    """
    check_floating(points, "points")
    check_floating(x, "x")
    n = num_points(points)
    left, left_def = _flatten(points)
    right, right_def = _flatten(x)
    if left_def != right_def:
        check_same(points, x, names=("points", "x"))
    dtype = accumulation_dtype(*jax.tree.leaves(points), *jax.tree.leaves(x))
    total = jnp.zeros(n, dtype)
    for (path, a), (_, b) in zip(left, right, strict=True):
        a, b = jnp.asarray(a), jnp.asarray(b)
        if a.shape[1:] != b.shape:
            raise ValueError(
                f"leaf {path} has shape {a.shape} in points and {b.shape} in x; expected "
                f"{a.shape[1:]} in x."
            )
        a, b = _member_axis_replicated(a).astype(dtype), b.astype(dtype)
        if explicit_sharding(a) is not None or explicit_sharding(b) is not None:
            # A dot over several sharded axes has no rule on an Explicit mesh.
            total = total + jnp.sum(a * b[None], axis=tuple(range(1, a.ndim)))
        else:
            axes = tuple(range(b.ndim))
            total = total + lax.dot_general(
                a,
                b,
                ((tuple(i + 1 for i in axes), axes), ((), ())),
                precision=lax.Precision.HIGHEST,
                preferred_element_type=dtype,
            )
    return total


def vdot(x: PyTree, y: PyTree) -> jax.Array:
    """The inner product of two pytrees, accumulated in float32 or better.

    Args:
        x: Pytree of floating arrays, in any sharding.
        y: Pytree of the same structure and shapes.

    Returns:
        A scalar. Under a mesh this costs one all-reduce and gathers nothing.

    Raises:
        ValueError: If structures or shapes differ, naming the leaf.
        TypeError: If a leaf is not floating, naming it.

    Example:
        >>> float(vdot({"a": jnp.ones(2), "b": 2.0}, {"a": jnp.ones(2), "b": 3.0}))
        8.0
    """
    check_same(x, y, names=("x", "y"), dtype=False)
    check_floating(x, "x")
    check_floating(y, "y")
    dtype = accumulation_dtype(*jax.tree.leaves(x), *jax.tree.leaves(y))
    products = jax.tree.map(
        lambda a, b: jnp.sum(jnp.asarray(a).astype(dtype) * jnp.asarray(b).astype(dtype)), x, y
    )
    return sum(jax.tree.leaves(products), start=jnp.zeros((), dtype))


def norm(x: PyTree) -> jax.Array:
    """The Euclidean norm of a pytree, accumulated in float32 or better.

    It is computed on entries scaled by the largest one, so it neither overflows nor underflows
    before the norm itself does. Its gradient at zero is zero.
    """
    check_floating(x, "x")
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(x) if jnp.size(leaf)]
    dtype = accumulation_dtype(*leaves)
    largest = jnp.zeros((), dtype)
    for leaf in leaves:
        largest = jnp.maximum(largest, lax.stop_gradient(jnp.max(jnp.abs(leaf))).astype(dtype))
    # A zero or infinite entry must not turn into NaN by the scaling.
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, jnp.ones((), dtype))
    squares = jnp.zeros((), dtype)
    for leaf in leaves:
        squares = squares + jnp.sum(jnp.square(leaf.astype(dtype) / unit))
    nonzero = squares > 0
    root = jnp.sqrt(jnp.where(nonzero, squares, jnp.ones_like(squares)))
    return jnp.where(nonzero, unit * root, squares)


def scale(alpha: jax.typing.ArrayLike, x: PyTree) -> PyTree:
    """`alpha * x` leaf by leaf, in float32 or better, in the dtypes of `x`."""
    return jax.tree.map(
        lambda a: _scaled(alpha, a, accumulation_dtype(a)).astype(jnp.result_type(a)),
        x,
    )


def _scaled(alpha: Any, x: Any, dtype: Any) -> jax.Array:
    return jnp.asarray(alpha).astype(dtype) * jnp.asarray(x).astype(dtype)


def axpy(alpha: jax.typing.ArrayLike, x: PyTree, y: PyTree) -> PyTree:
    """`alpha * x + y` leaf by leaf, in float32 or better, in the dtypes of `y`.

    Args:
        alpha: A scalar.
        x: Pytree of floating arrays.
        y: Pytree of the same structure and shapes.

    Raises:
        ValueError: If structures or shapes differ, naming the leaf.
    """
    check_same(y, x, names=("y", "x"), dtype=False)

    def one(a, b):
        dtype = accumulation_dtype(a, b)
        out = _scaled(alpha, a, dtype) + jnp.asarray(b).astype(dtype)
        return out.astype(jnp.result_type(b))

    return jax.tree.map(one, x, y)


def cast(tree: PyTree, dtype: Any) -> PyTree:
    """The pytree with its floating leaves in another floating dtype; other leaves stay as they are.

    Example:
        >>> out = cast({"w": jnp.ones(2), "step": jnp.arange(2)}, jnp.bfloat16)
        >>> str(out["w"].dtype), str(out["step"].dtype)
        ('bfloat16', 'int32')
    """
    return jax.tree.map(lambda x: jnp.asarray(x).astype(dtype) if _is_floating(x) else x, tree)


def random_like(
    key: jax.Array,
    tree: PyTree,
    *,
    distribution: Literal["normal", "rademacher"] = "normal",
    dtype: Any = None,
) -> PyTree:
    """Independent random entries in the structure, dtypes and sharding of a pytree.

    The key of a leaf is `key` folded with a checksum of the leaf's path, so a leaf's numbers depend
    on neither the other leaves nor the sharding. (Inside `jit` on an Auto mesh a leaf's sharding is
    not known to the trace: there the compiler places the result.)

    Args:
        key: A typed key (`jax.random.key`).
        tree: Pytree of floating arrays or `jax.ShapeDtypeStruct`s; only shapes, dtypes and
            shardings are used.
        distribution: Standard normal entries, or -1 and +1 with equal probability.
        dtype: The dtype of all entries; by default each leaf's own.

    Raises:
        TypeError: If a leaf is not floating, naming it.
        ValueError: For another distribution.
    """
    check_floating(tree, "tree")
    if distribution not in ("normal", "rademacher"):
        raise ValueError(f"distribution is {distribution!r}; expected 'normal' or 'rademacher'.")
    sample = jax.random.normal if distribution == "normal" else jax.random.rademacher
    leaves, treedef = _flatten(tree)
    out = []
    for path, leaf in leaves:
        leaf_key = jax.random.fold_in(key, np.uint32(zlib.crc32(path.encode())))
        values = sample(leaf_key, jnp.shape(leaf), dtype or jnp.result_type(leaf))
        out.append(placed_like(values, leaf))
    return jax.tree.unflatten(treedef, out)


def placed_like(values: jax.Array, leaf: Any) -> jax.Array:
    """`values` in the sharding of `leaf`, where that is known here."""
    if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer):
        # What is committed to no device stays so, free to join arrays on a mesh.
        return jax.device_put(values, leaf.sharding) if leaf.committed else values
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return values if leaf.sharding is None else jax.device_put(values, leaf.sharding)
    sharding = explicit_sharding(leaf)
    return values if sharding is None else jax.sharding.reshard(values, sharding)
