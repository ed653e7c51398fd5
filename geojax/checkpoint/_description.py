"""A tree as a JSON description plus arrays, and back, verified.

Folders and exports share it: they differ only in where the arrays lie.
"""

import datetime
import functools
import hashlib
import importlib.metadata
import json
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import primitives
from jax.sharding import AbstractMesh, NamedSharding, Sharding
from jax.tree_util import (
    DictKey,
    FlattenedIndexKey,
    SequenceKey,
    keystr,
    tree_flatten_with_path,
)

from geojax._checksums import checksums
from geojax.checkpoint._files import CheckpointError, first_line

PyTree = Any
Record = dict[str, Any]

_FORMAT = "geojax.checkpoint"
_FORMAT_VERSION = 1
# What a save writes about itself; entries of these names in a user's metadata give way.
_RESERVED = ("kind", "created", "format_version", "versions")
_PACKAGES = ("geojax", "jax", "jaxlib", "numpy", "flax", "optax", "orbax-checkpoint")

# What NumPy's own files can hold, and what tensorstore can.
NUMPY_DTYPES = {"bool", "float16", "float32", "float64", "complex64", "complex128"} | {
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}
DTYPES = NUMPY_DTYPES | {
    "bfloat16",
    "int2",
    "int4",
    "float4_e2m1fn",
    "float8_e3m4",
    "float8_e4m3b11fnuz",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
}


# ---------------------------------------------------------------------------------- from a tree


def describe_tree(
    tree: PyTree, kind: str, metadata: Mapping[str, Any] | None
) -> tuple[dict[str, Any], list[Any]]:
    """The description of a tree, as JSON, and for each leaf the array to store or None.

    Raises:
        TypeError: For a leaf, a key or a metadata value that cannot be stored, naming it.
    """
    about = {key: value for key, value in (metadata or {}).items() if key not in _RESERVED}
    records: list[Record] = []
    values: list[Any] = []

    def visit(node: Any, path: tuple[Any, ...]) -> Any:
        children, _ = tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
        if node is None or (children and not children[0][0]):
            record, value = _record(node, path)
            records.append(record)
            values.append(value)
            return len(records) - 1
        keys = [keypath[0] for keypath, _ in children]
        plain = _plain_type(node, keys)
        out: dict[str, Any] = {"type": plain.__name__}
        if type(node) is not plain:
            out["was"] = f"{type(node).__module__}.{type(node).__qualname__}"
        if plain is dict:
            out["keys"] = [_key(key, (*path, key)) for key in keys]
        out["children"] = [
            visit(child, (*path, key)) for key, (_, child) in zip(keys, children, strict=True)
        ]
        return out

    document = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "kind": kind,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in _PACKAGES}},
        "metadata": _json(about, "metadata"),
        "arrays": None,
        "files": {},
        "structure": visit(tree, ()),
        "leaves": records,
    }
    stored = [(record, v) for record, v in zip(records, values, strict=True) if v is not None]
    sums = checksums([value for _, value in stored])
    for (record, value), total in zip(stored, sums, strict=True):
        record["stored"] = {"dtype": value.dtype.name, "shape": list(value.shape)}
        record["checksum"] = f"{total:016x}"
    return document, values


def _plain_type(node: Any, keys: Sequence[Any]) -> type:
    """The builtin container that stands for a node when no `like` says better."""
    if isinstance(node, tuple) and not hasattr(node, "_fields"):
        return tuple
    indexed = keys and isinstance(keys[0], (SequenceKey, FlattenedIndexKey))
    return list if isinstance(node, list) or (indexed and not isinstance(node, dict)) else dict


def _key(entry: Any, path: tuple[Any, ...]) -> Any:
    key = entry.key if isinstance(entry, DictKey) else keystr((entry,), simple=True)
    if type(key) not in (str, int, float, bool):
        raise TypeError(
            f"the dictionary key of {keystr(path)} is a {type(key).__name__}; a checkpoint takes "
            "strings and Python numbers as keys."
        )
    return key


def _record(leaf: Any, path: tuple[Any, ...]) -> tuple[Record, Any]:
    """The description of one leaf, and its array if it has one."""
    where = spell_path(path)
    record: Record = {
        "path": where,
        "name": spell_name(path),
        "kind": "none" if leaf is None else type(leaf).__name__,
    }
    if leaf is None:
        return record, None
    if type(leaf) in (bool, int, str):
        return {**record, "value": leaf}, None
    if type(leaf) is float:
        return {**record, "value": leaf.hex()}, None
    if type(leaf) is complex:
        return {**record, "value": [leaf.real.hex(), leaf.imag.hex()]}, None
    if isinstance(leaf, Tracer):
        raise TypeError(f"leaf {where} is traced; save outside of jit, grad and vmap.")
    if isinstance(leaf, jax.Array):
        record |= _jax_record(leaf, where)
    elif isinstance(leaf, np.ndarray) and not isinstance(leaf, np.ma.MaskedArray):
        record["kind"] = "numpy"
    elif isinstance(leaf, np.generic):
        record["kind"] = "numpy scalar"
    else:
        raise TypeError(
            f"leaf {where} is a {type(leaf).__name__}; a checkpoint holds JAX and NumPy arrays, "
            "typed keys, Python numbers, strings and None."
        )
    record |= {"dtype": leaf.dtype.name, "shape": list(leaf.shape)}
    if isinstance(leaf, jax.Array) and record["kind"] == "key":
        return record, jax.random.key_data(leaf)
    if leaf.dtype.name not in DTYPES:
        raise TypeError(f"leaf {where} is {leaf.dtype}; expected one of {sorted(DTYPES)}.")
    if isinstance(leaf, jax.Array):
        return record, leaf
    return record, np.asarray(leaf, leaf.dtype.newbyteorder("="))


def _jax_record(leaf: jax.Array, where: str) -> Record:
    if leaf.is_deleted():
        raise TypeError(f"leaf {where} was donated or deleted; save it while its buffer lives.")
    record: Record = {"kind": "jax"}
    if isinstance(leaf.sharding, NamedSharding):
        record["sharding"] = f"{leaf.sharding.spec} over {dict(leaf.sharding.mesh.shape)}"
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        implementation = jax.random.key_impl(leaf)
        if not isinstance(implementation, str):
            raise TypeError(f"leaf {where} is a key of an unregistered generator; expected JAX's.")
        record |= {"kind": "key", "impl": implementation}
    elif leaf.weak_type:
        record["weak_type"] = True
    return record


def _json(value: Any, where: str) -> Any:
    if isinstance(value, (np.generic, np.ndarray, jax.Array)) and np.ndim(value) == 0:
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _json(item, f"{where}[{key!r}]") for key, item in value.items()}
    raise TypeError(
        f"{where} is a {type(value).__name__}, which JSON lacks; expected None, numbers, strings, "
        "and lists or string-keyed dicts of them."
    )


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ------------------------------------------------------------------------------------ to a tree


class _Target(NamedTuple):
    """What a leaf is to become."""

    kind: str
    sharding: Sharding | None
    weak_type: bool


Wanted = dict[int, tuple[Record, Sharding | None]]


def assemble(
    document: dict[str, Any],
    like: PyTree,
    what: str,
    fetch: Callable[[Wanted], dict[int, Any]],
    *,
    by: str = "path",
) -> PyTree:
    """The tree that a description describes, its arrays fetched and verified.

    Args:
        document: The description.
        like: None, or the tree whose structure, dtypes and shardings are wanted.
        what: The name of the source in errors.
        fetch: From leaf numbers, with record and sharding, to the stored arrays: NumPy arrays, or
            JAX arrays already in that sharding.
        by: Whether leaves of `like` are found by "path" or by slash-joined "name".

    Raises:
        CheckpointError: If `like` does not match or an array is not what was saved.
    """
    records = document["leaves"]
    if like is None:
        order = list(range(len(records)))
        treedef = None
        targets = [_Target(r["kind"], None, r.get("weak_type", False)) for r in records]
    else:
        leaves, treedef = tree_flatten_with_path(like, is_leaf=lambda x: x is None)
        order = _matched(records, [path for path, _ in leaves], what, by)
        targets = [_Target("none", None, False)] * len(records)
        for i, (_, leaf) in zip(order, leaves, strict=True):
            targets[i] = _target(records[i], leaf, what)

    wanted = {
        i: (record, targets[i].sharding)
        for i, record in enumerate(records)
        if "stored" in record and 0 not in record["stored"]["shape"]
    }
    fetched = fetch(wanted) if wanted else {}
    sums = checksums([fetched[i] for i in wanted])
    for (i, (record, _)), total in zip(wanted.items(), sums, strict=True):
        found = {"dtype": fetched[i].dtype.name, "shape": list(fetched[i].shape)}
        if found != record["stored"] or f"{total:016x}" != record["checksum"]:
            raise CheckpointError(
                f"{what} is damaged: leaf {record['path']} should be {record['stored']} with "
                f"checksum {record['checksum']} and was read as {found} with {total:016x}; load "
                "another checkpoint."
            )
    values = [
        _finish(record, target, fetched.get(i))
        for i, (record, target) in enumerate(zip(records, targets, strict=True))
    ]
    if treedef is None:
        return _plain(document["structure"], values)
    return treedef.unflatten([values[i] for i in order])


def _matched(records: list[Record], paths: list[Any], what: str, by: str) -> list[int]:
    """The number of the record for each path of `like`."""
    if by == "path":
        wanted = [spell_path(path) for path in paths]
    else:
        wanted = unique_names([spell_name(path) for path in paths], "`like` cannot be used")
    found = {record[by]: i for i, record in enumerate(records)}
    missing = [name for name in wanted if name not in found]
    extra = sorted(found.keys() - set(wanted))
    if missing or extra:
        detail = f"it lacks leaf {missing[0]}" if missing else f"it has leaf {extra[0]} besides"
        raise CheckpointError(
            f"{what} does not match `like`: {detail} ({len(missing)} lacking, {len(extra)} more). "
            "Without `like` it comes back in its own structure."
        )
    return [found[name] for name in wanted]


def _target(record: Record, leaf: Any, what: str) -> _Target:
    expected, found = _spell_leaf(leaf), spell_record(record)
    if expected != found:
        raise CheckpointError(
            f"{what} does not match `like`: leaf {record['path']} is {found} there and {expected} "
            "in `like`; both must agree."
        )
    if "stored" not in record:
        return _Target(record["kind"], None, False)
    if isinstance(leaf, (np.ndarray, np.generic)):
        kind = "numpy" if isinstance(leaf, np.ndarray) else "numpy scalar"
        return _Target(kind, None, False)
    sharding = None
    # An uncommitted array must come back uncommitted, or jit would refuse it beside sharded ones.
    if not (isinstance(leaf, jax.Array) and not leaf.committed):
        sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            raise CheckpointError(
                f"leaf {record['path']} of `like` is sharded {sharding.spec} over an abstract "
                "mesh; load under `jax.set_mesh(mesh)`, or give a sharding over real devices."
            )
        sharding = NamedSharding(mesh, sharding.spec)
    if sharding is not None:
        try:
            sharding.shard_shape(tuple(record["stored"]["shape"]))
        except ValueError as error:
            raise CheckpointError(
                f"leaf {record['path']} of {what} cannot take the sharding of `like` "
                f"({first_line(error)})."
            ) from error
    return _Target("jax", sharding, bool(getattr(leaf, "weak_type", False)))


def _finish(record: Record, target: _Target, array: Any) -> Any:
    """The leaf of a record, from its verified array if it has one."""
    value: Any = record.get("value")
    match record["kind"]:
        case "none" | "bool" | "int" | "str":
            return value
        case "float":
            return float.fromhex(value)
        case "complex":
            return complex(float.fromhex(value[0]), float.fromhex(value[1]))
    if array is None:
        array = np.zeros(record["stored"]["shape"], record["stored"]["dtype"])
    if target.kind in ("numpy", "numpy scalar"):
        return array if target.kind == "numpy" else array[()]
    # What was made where 64-bit types are on must not be truncated where they are off.
    with jax.enable_x64(True):
        if not isinstance(array, jax.Array):
            array = jax.device_put(array, target.sharding)
        if target.weak_type:
            array = primitives.convert_element_type_p.bind(
                array, new_dtype=array.dtype, weak_type=True, sharding=None
            )
    if record["kind"] == "key":
        return jax.random.wrap_key_data(array, impl=record["impl"])
    return array


def _plain(structure: Any, values: list[Any]) -> PyTree:
    if isinstance(structure, int):
        return values[structure]
    children = [_plain(child, values) for child in structure["children"]]
    if structure["type"] == "dict":
        return dict(zip(structure["keys"], children, strict=True))
    return tuple(children) if structure["type"] == "tuple" else children


# ------------------------------------------------------------------------------ names and errors


def spell_path(path: tuple[Any, ...]) -> str:
    """A leaf's path as errors print it and descriptions hold it."""
    return keystr(path) or "(root)"


def spell_name(path: tuple[Any, ...]) -> str:
    """A leaf's path as a plain name, its keys joined by slashes."""
    return keystr(path, simple=True, separator="/") or "array"


def unique_names(names: Sequence[str], what: str) -> list[str]:
    """The names, unless two are equal or one is taken by the file formats themselves."""
    for name, count in Counter([*names, "__geojax__", "__metadata__"]).items():
        if count > 1:
            raise CheckpointError(
                f"{what}: the name {name!r} would belong to two arrays, because a key holds a "
                "slash or is reserved; rename the key, or use `save`."
            )
    return list(names)


def spell_record(record: Record) -> str:
    """A leaf's dtype and shape, such as "float32[3,4]", or its Python kind."""
    if "dtype" in record:
        return f"{record['dtype']}[{','.join(map(str, record['shape']))}]"
    return "None" if record["kind"] == "none" else f"a Python {record['kind']}"


def _spell_leaf(leaf: Any) -> str:
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        return f"{leaf.dtype.name}[{','.join(map(str, leaf.shape))}]"
    return "None" if leaf is None else f"a Python {type(leaf).__name__}"


def metadata_of(document: dict[str, Any]) -> dict[str, Any]:
    """The user's metadata and what the save wrote about itself."""
    return {**document["metadata"], **{name: document[name] for name in _RESERVED}}


def seal(document: dict[str, Any]) -> str:
    """The description as text that carries its own digest."""
    entries = {key: json.dumps(value) for key, value in document.items()}
    # A line per leaf reads better than a line per number.
    rows = ",\n  ".join(json.dumps(record) for record in document["leaves"])
    entries["leaves"] = f"[\n  {rows}\n ]"
    entries["sha256"] = json.dumps(_digest(document))
    body = ",\n ".join(f"{json.dumps(key)}: {text}" for key, text in entries.items())
    return f"{{\n {body}\n}}\n"


def _digest(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def unseal(text: str, what: str) -> dict[str, Any]:
    """The description in a text that `seal` made.

    Raises:
        CheckpointError: If the text is damaged, of another format or of a later version.
    """
    try:
        document = json.loads(text)
    except ValueError as error:
        raise CheckpointError(
            f"{what} is damaged: its description is not whole JSON ({error}); load another."
        ) from error
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise CheckpointError(f"{what} has a description that geojax did not write.")
    if document.get("format_version") != _FORMAT_VERSION:
        raise CheckpointError(
            f"{what} is of format {document.get('format_version')} and this geojax reads format "
            f"{_FORMAT_VERSION}; use the versions that wrote it: {document.get('versions')}."
        )
    digest = document.pop("sha256", None)
    if digest != _digest(document):
        raise CheckpointError(
            f"{what} is damaged: its description was changed after it was written; load another."
        )
    return document
