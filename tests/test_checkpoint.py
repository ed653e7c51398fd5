"""Checkpoints: exact round trips, kills, damage, shardings, exports; each test is one promise."""

import collections
import doctest
import inspect
import json
import os
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from geojax import _checksums, batches, checkpoint, fit, models, tree
from geojax.checkpoint import (
    Checkpointer,
    CheckpointError,
    _description,
    _exports,
    _files,
    _folders,
)

P = PartitionSpec
FORMATS = {
    ".npz": (checkpoint.export_npz, checkpoint.import_npz),
    ".safetensors": (checkpoint.export_safetensors, checkpoint.import_safetensors),
}


class Momentum(NamedTuple):
    trace: dict
    count: jax.Array


def fingerprints(tree):
    """Path -> all that must survive of a leaf: its kind, dtype, shape, weak type and bits."""
    import hashlib

    import jax
    import numpy as np

    def one(leaf):
        if isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return ["key", str(jax.random.key_impl(leaf)), *one(jax.random.key_data(leaf))]
        if isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
            bits = hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
            kind = "jax" if isinstance(leaf, jax.Array) else type(leaf).__name__
            weak = kind == "jax" and leaf.weak_type
            return [kind, leaf.dtype.name, list(leaf.shape), weak, bits]
        return [type(leaf).__name__, leaf.hex() if type(leaf) is float else repr(leaf)]

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
    return {jax.tree_util.keystr(path): one(leaf) for path, leaf in leaves}


def plain_paths(prints):
    """The same, with the paths that named fields have once they are dicts."""
    return {re.sub(r"\.([a-z_]+)", r"['\1']", path): one for path, one in prints.items()}


def everything():
    """One tree with every kind of leaf and container that a state of ours may have."""
    params = {
        "dense": {"kernel": jnp.linspace(-1, 1, 12).reshape(3, 4), "bias": -jnp.zeros(4)},
        "half": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3) / jnp.bfloat16(7),
        "empty": jnp.zeros((0, 3), jnp.float16),
        "scale": jnp.float32(np.nan),
    }
    floats = {name: params[name] for name in ("dense", "scale")}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.cosine_decay_schedule(1e-3, 10)),
        optax.masked(optax.trace(0.9), {"dense": True, "scale": False}),
    )
    with jax.enable_x64(True):
        wide = jnp.asarray(np.array([[1e300, -0.0], [np.pi, np.inf]]))
    return {
        "network": {"params": params, "state": {"mean": jnp.ones(3), "var": None}},
        "points": tree.stack([params["dense"], params["dense"]]),
        "optimizer": optimizer.init(floats),
        "momentum": Momentum({"w": jnp.ones(2)}, jnp.int32(7)),
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(5, impl="rbg"), (2, 3)),
        "no_keys": jax.random.split(jax.random.key(5), 0),
        "weak": [jnp.asarray(0.5), jnp.full((2, 3), 1.5), jnp.asarray(2)],
        "python": [True, -(2**70), 0.1, float("inf"), 1 - 2j, "a/b \u00e9", None, (), {}],
        "numpy": [np.arange(6.0).reshape(2, 3).T, np.int8(-3), np.float64(0.1), np.array(True)],
        "big_endian": np.arange(3, dtype=np.int32),
        "wide": wide,
        "counts": jnp.arange(5, dtype=jnp.uint8),
        "ordered": collections.OrderedDict(b=jnp.ones(1), a=jnp.zeros(1)),
        "numbered": {10: jnp.ones(1), 9: jnp.zeros(1)},
        "frozen": FrozenDict({"w": jnp.ones(2)}),
        "slash/key": jnp.ones(1),
        "file": jnp.ones(1),
    }


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    assert fingerprints(left) == fingerprints(right)


def run(source, *arguments, **keywords):
    """A fresh Python with the given program."""
    command = [sys.executable, "-c", source, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **keywords)


# ------------------------------------------------------------------------------------ round trips


def test_with_like_every_leaf_and_container_comes_back_exactly(tmp_path):
    saved = everything()
    checkpoint.save(tmp_path / "all", saved)
    loaded, _ = checkpoint.load(tmp_path / "all", saved)
    assert_same(loaded, saved)


def test_without_like_named_containers_come_back_as_dicts_and_the_rest_as_it_was(tmp_path):
    saved = everything()
    checkpoint.save(tmp_path / "all", saved)
    loaded, _ = checkpoint.load(tmp_path / "all")
    assert fingerprints(loaded) == plain_paths(fingerprints(saved))
    assert list(loaded["momentum"]) == ["trace", "count"]
    assert type(loaded["momentum"]) is type(loaded["ordered"]) is type(loaded["frozen"]) is dict
    assert loaded["optimizer"][0] == {}  # optax.EmptyState, a NamedTuple without fields
    assert loaded["python"][-2:] == [(), {}]
    assert list(loaded["numbered"]) == [9, 10]


def test_a_fresh_process_loads_without_arguments_and_gets_the_same_bits(tmp_path):
    saved = everything()
    checkpoint.save(tmp_path / "all", saved, kind="state", metadata={"seed": 3})
    child = run(
        inspect.getsource(fingerprints)
        + inspect.cleandoc("""
        import json, sys
        from geojax import checkpoint
        lazy = not {"orbax", "safetensors", "flax", "tensorstore"} & {*sys.modules}
        import jax
        before = dict(jax.config.values)
        tree, metadata = checkpoint.load(sys.argv[1])
        checkpoint.save(sys.argv[1] + "-again", tree)
        same = before == dict(jax.config.values)
        print(json.dumps([lazy, same, metadata["kind"], metadata["seed"], fingerprints(tree)]))
        """),
        tmp_path / "all",
        stderr=subprocess.PIPE,
    )
    out, noise = child.communicate(timeout=60)
    assert child.returncode == 0, noise
    lazy, same_config, kind, seed, found = json.loads(out)
    assert found == plain_paths(fingerprints(saved))
    assert (kind, seed) == ("state", 3)
    assert lazy, "importing geojax.checkpoint loaded orbax, safetensors or flax"
    assert same_config, "a load or a save changed the jax configuration"
    assert not re.search("orbax|absl|asyncio|tensorstore", noise), noise


def test_all_dtypes_survive_and_those_that_cannot_are_refused_by_leaf(tmp_path, rng):
    words = rng.integers(0, 256, (4, 8), np.uint8)
    arrays = {}
    for name in sorted(_description.DTYPES):
        dtype = np.dtype(name)
        small = name == "bool" or name.startswith(("int2", "int4", "float4"))
        arrays[name] = (
            (words % 2).astype(dtype) if small else np.resize(words, 4 * dtype.itemsize).view(dtype)
        )
    with jax.enable_x64(True):
        both = {"numpy": arrays, "jax": jax.tree.map(jnp.asarray, arrays)}
    checkpoint.save(tmp_path / "dtypes", both)
    assert_same(checkpoint.load(tmp_path / "dtypes")[0], both)
    with pytest.raises(TypeError, match=r"leaf \['odd'\] is uint4; expected one of"):
        checkpoint.save(tmp_path / "odd", {"odd": jnp.zeros(2, jnp.uint4)})
    assert not (tmp_path / "odd").exists()


@pytest.mark.parametrize(
    "single",
    [jnp.arange(3), jnp.zeros((2, 0)), 3, None, {}, [], jax.random.key],
    ids=["array", "empty", "number", "none", "dict", "list", "key"],
)
def test_a_single_leaf_or_an_empty_container_is_a_tree_too(tmp_path, single):
    single = single(0) if callable(single) else single
    checkpoint.save(tmp_path / "one", single)
    assert_same(checkpoint.load(tmp_path / "one")[0], single)
    assert_same(checkpoint.load(tmp_path / "one", single)[0], single)


def test_numbers_of_either_byte_order_come_back_equal(tmp_path):
    checkpoint.save(tmp_path / "order", np.arange(5, dtype=">i4"))
    np.testing.assert_array_equal(checkpoint.load(tmp_path / "order")[0], np.arange(5))


def test_a_flax_nnx_state_comes_back_into_its_own_model(tmp_path):
    graph, state = nnx.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    checkpoint.save(tmp_path / "nnx", state)
    loaded, _ = checkpoint.load(tmp_path / "nnx", jax.eval_shape(lambda: state))
    x = jnp.ones((1, 2))
    np.testing.assert_array_equal(nnx.merge(graph, loaded)(x), nnx.merge(graph, state)(x))
    plain, _ = checkpoint.load(tmp_path / "nnx")
    np.testing.assert_array_equal(plain["kernel"]["value"], state["kernel"][...])


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (object(), r"leaf \['x'\] is a object; a checkpoint holds"),
        (np.array(["a"]), r"leaf \['x'\] is <U1; expected one of"),
        (np.array([None]), r"leaf \['x'\] is object; expected one of"),
        (np.ma.masked_array([1.0], [True]), r"leaf \['x'\] is a MaskedArray"),
        (jax.ShapeDtypeStruct((2,), np.float32), r"leaf \['x'\] is a ShapeDtypeStruct"),
        ({(1, 2): 3.0}, r"dictionary key of \['x'\]\[\(1, 2\)\] is a tuple"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_path_and_nothing_is_written(tmp_path, leaf, message):
    with pytest.raises(TypeError, match=message):
        checkpoint.save(tmp_path / "bad", {"x": leaf})
    assert not (tmp_path / "bad").exists()


def test_traced_and_donated_arrays_are_refused_by_path(tmp_path):
    with pytest.raises(TypeError, match=r"leaf \['x'\] is traced; save outside of jit"):
        jax.jit(lambda x: checkpoint.save(tmp_path / "bad", {"x": x}))(jnp.ones(2))
    gone = jnp.ones(2)
    gone.delete()
    with pytest.raises(TypeError, match=r"leaf \['x'\] was donated or deleted"):
        checkpoint.save(tmp_path / "bad", {"x": gone})


# ---------------------------------------------------------------------------------------- metadata


def test_metadata_comes_back_with_what_the_save_knows(tmp_path):
    given = {
        "widths": (32, 32),
        "loss": jnp.float32(0.5),
        "seed": np.int64(3),
        "nested": {"a": [None, True, "b"]},
        "created": "overwritten",
    }
    checkpoint.save(tmp_path / "m", {"w": jnp.ones((3, 4))}, kind="simplex", metadata=given)
    _, metadata = checkpoint.load(tmp_path / "m")
    assert metadata["widths"] == [32, 32]
    assert (metadata["loss"], metadata["seed"]) == (0.5, 3)
    assert metadata["nested"] == given["nested"]
    assert metadata["kind"] == "simplex"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT.*\+00:00", metadata["created"])
    assert metadata["format_version"] == 1
    assert metadata["versions"]["jax"] == jax.__version__
    assert {"geojax", "flax", "optax", "orbax-checkpoint"} <= metadata["versions"].keys()
    described = checkpoint.describe(tmp_path / "m")
    assert described == {**metadata, "leaves": {"['w']": "float32[3,4]"}}


@pytest.mark.parametrize("bad", [{"x": {1}}, {"x": jnp.ones(2)}, {1: 2}, {"x": jnp.float32}])
def test_metadata_that_json_lacks_is_refused(tmp_path, bad):
    with pytest.raises(TypeError, match=r"metadata.* is a \w+, which JSON lacks"):
        checkpoint.save(tmp_path / "m", {}, metadata=bad)


def test_a_network_is_rebuilt_from_its_checkpoint_alone_with_the_same_outputs(tmp_path):
    options = {"widths": (8, 8), "num_classes": 3}
    model = models.build("mlp", **options)
    x = jnp.linspace(-1, 1, 10).reshape(2, 5)
    params, state = model.init(jax.random.key(0), x)
    checkpoint.save_network(
        tmp_path / "net",
        params,
        state,
        model="mlp",
        options=options,
        dataset="digits",
        seed=4,
        metadata={"epochs": 2, "seed": "overruled"},
    )
    network = checkpoint.load_network(tmp_path / "net")
    assert (network.model, network.options) == ("mlp", {"widths": [8, 8], "num_classes": 3})
    about = {key: network.metadata[key] for key in ("kind", "dataset", "seed", "epochs")}
    assert about == {"kind": "network", "dataset": "digits", "seed": 4, "epochs": 2}
    before, _ = model.apply(params, state, x, False)
    after, _ = network.build().apply(network.params, network.state, x, False)
    assert np.asarray(before).tobytes() == np.asarray(after).tobytes()


def test_a_network_loads_like_its_parameters_and_other_kinds_are_refused(tmp_path):
    params = Momentum({"w": jnp.ones(2)}, jnp.int32(1))
    checkpoint.save_network(tmp_path / "net", params, model="own")
    network = checkpoint.load_network(tmp_path / "net", (params, None))
    assert_same(network.params, params)
    checkpoint.save(tmp_path / "other", params)
    with pytest.raises(CheckpointError, match="is a 'pytree'; expected a 'network'"):
        checkpoint.load_network(tmp_path / "other")


def test_a_list_of_networks_becomes_a_stack_of_points(tmp_path):
    points = [{"w": jnp.full((2,), float(i), jnp.float32)} for i in range(3)]
    for i, point in enumerate(points):
        checkpoint.save_network(tmp_path / str(i), point, model="own")
    loaded = [checkpoint.load_network(tmp_path / str(i)).params for i in range(3)]
    assert_same(tree.stack(loaded), tree.stack(points))


# ---------------------------------------------------------------------------- like, and shardings


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"a": {"w": jnp.ones((3, 5))}, "n": 3}, r"leaf \['a'\]\['w'\] is float32\[3,4\] there and "
         r"float32\[3,5\] in `like`"),
        ({"a": {"w": jnp.ones((3, 4), jnp.bfloat16)}, "n": 3}, r"\['w'\] is float32\[3,4\] there "
         r"and bfloat16\[3,4\]"),
        ({"a": {"w": None}, "n": 3}, r"is float32\[3,4\] there and None"),
        ({"a": {"w": jnp.ones((3, 4))}, "n": jnp.int32(3)}, r"\['n'\] is a Python int there and "
         r"int32\[\]"),
        ({"a": {"w": jnp.ones((3, 4))}, "n": 3.0}, r"a Python int there and a Python float"),
        ({"a": {"w": jnp.ones((3, 4))}}, r"it has leaf \['n'\] besides \(0 lacking, 1 more\)"),
        ({"a": {"v": jnp.ones((3, 4))}, "n": 3}, r"it lacks leaf \['a'\]\['v'\]"),
        ({"a": [jnp.ones((3, 4))], "n": 3}, r"it lacks leaf \['a'\]\[0\]"),
    ],
)  # fmt: skip
def test_a_like_that_does_not_match_is_refused_by_leaf(tmp_path, like, message):
    checkpoint.save(tmp_path / "c", {"a": {"w": jnp.ones((3, 4))}, "n": 3})
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path / "c", like)


def test_a_key_of_another_generator_is_refused(tmp_path):
    checkpoint.save(tmp_path / "c", jax.random.key(0))
    with pytest.raises(CheckpointError, match=r"is key<fry>\[\] there and key<rbg>\[\]"):
        checkpoint.load(tmp_path / "c", jax.random.key(0, impl="rbg"))


def test_like_decides_between_numpy_and_jax_and_an_uncommitted_array_stays_so(tmp_path):
    checkpoint.save(tmp_path / "c", [jnp.ones(2), np.ones(2, np.float32), np.float32(1)])
    device = jax.devices()[3]
    like = [np.zeros(2, np.float32), jax.device_put(jnp.zeros(2), device), jnp.float32(0)]
    loaded, _ = checkpoint.load(tmp_path / "c", like)
    assert type(loaded[0]) is np.ndarray
    assert loaded[1].committed
    assert loaded[1].devices() == {device}
    assert not loaded[2].committed
    assert not any(leaf.committed for leaf in checkpoint.load(tmp_path / "c")[0][:1])


def sharded(mesh):
    """A tree of every layout on a mesh, with the same tree on the host."""
    rng = np.random.default_rng(1)
    host = {
        "both": rng.normal(size=(8, 6)).astype(np.float32),
        "rows": rng.normal(size=(8, 3)).astype(jnp.bfloat16),
        "swapped": rng.normal(size=(4, 8)),
        "replicated": np.float32(3.5),
        "empty": np.zeros((8, 0), np.float32),
        "wide": rng.integers(0, 2**62, (8,)),
    }
    specs = {
        "both": P("data", "model"),
        "rows": P("data"),
        "swapped": P("model", "data"),
        "replicated": P(),
        "empty": P("data"),
        "wide": P(("data", "model")),
    }
    with jax.enable_x64(True):
        placed = {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in host.items()}
    keys = jax.random.split(jax.random.key(1), 8)
    placed["keys"] = jax.device_put(keys, NamedSharding(mesh, P("data")))
    return placed, host


def shardings(leaves):
    return jax.tree.map(lambda x: x.sharding, leaves)


def test_sharded_arrays_come_back_in_their_own_sharding(tmp_path, mesh):
    placed, _ = sharded(mesh)
    checkpoint.save(tmp_path / "c", placed)
    loaded, _ = checkpoint.load(tmp_path / "c", placed)
    assert_same(loaded, placed)
    assert shardings(loaded) == shardings(placed)


def test_sharded_arrays_come_back_on_another_mesh_on_one_device_and_on_the_host(tmp_path, mesh):
    placed, host = sharded(mesh)
    checkpoint.save(tmp_path / "c", placed)
    other = jax.make_mesh((2, 4), ("x", "y"), axis_types=mesh.axis_types)

    def struct(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    for sharding in (NamedSharding(other, P("x")), SingleDeviceSharding(jax.devices()[5])):
        like = {k: struct(v, sharding) for k, v in placed.items() if k != "replicated"}
        like["replicated"] = struct(placed["replicated"], NamedSharding(other, P()))
        loaded, _ = checkpoint.load(tmp_path / "c", like)
        assert shardings(loaded) == shardings(like)
        assert fingerprints(loaded) == fingerprints(placed)
    loaded, _ = checkpoint.load(tmp_path / "c")
    assert fingerprints(loaded) == fingerprints(placed)
    assert all(len(leaf.devices()) == 1 for leaf in loaded.values())
    del loaded["keys"]
    assert [np.asarray(loaded[k]).tobytes() for k in host] == [v.tobytes() for v in host.values()]


def test_a_sharding_that_does_not_divide_the_leaf_is_refused_by_path(tmp_path, mesh):
    checkpoint.save(tmp_path / "c", {"w": jnp.ones((3, 2))})
    like = {"w": jax.ShapeDtypeStruct((3, 2), np.float32, sharding=NamedSharding(mesh, P("data")))}
    with pytest.raises(CheckpointError, match=r"leaf \['w'\] of .* cannot take the sharding"):
        checkpoint.load(tmp_path / "c", like)


def test_an_abstract_state_of_explicit_shardings_needs_its_mesh(tmp_path):
    mesh = jax.make_mesh((8,), ("data",))
    w = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, P("data")))
    checkpoint.save(tmp_path / "c", w)
    like = jax.eval_shape(lambda x: x, w)
    with pytest.raises(CheckpointError, match=r"load under `jax.set_mesh\(mesh\)`"):
        checkpoint.load(tmp_path / "c", like)
    with jax.set_mesh(mesh):
        loaded, _ = checkpoint.load(tmp_path / "c", like)
    assert_same(loaded, w)
    assert loaded.sharding == w.sharding


@pytest.mark.parametrize("dtype", ["int4", "bool", "bfloat16", "float32", "complex64"])
def test_the_checksum_is_that_of_any_sharding_and_changes_with_every_bit(mesh, rng, dtype):
    host = rng.integers(0, 2, (8, 4)).astype(dtype)
    whole = _checksums.checksums([host])
    for spec in (P("data", "model"), P("model", "data"), P(("data", "model")), P()):
        placed = jax.device_put(host, NamedSharding(mesh, spec))
        assert _checksums.checksums([placed]) == whole
    for i in range(host.size):
        changed = host.copy()
        changed.flat[i] = np.array(1, dtype) if host.flat[i] == 0 else np.array(0, dtype)
        assert _checksums.checksums([changed]) != whole
    assert _checksums.checksums([host.T]) != whole


def test_two_processes_save_and_load_what_they_share(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    source = inspect.cleandoc("""
        import os, sys
        import jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        path, port, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 2)
        jax.distributed.initialize(f"localhost:{port}", 2, rank)
        from geojax import checkpoint
        mesh = jax.make_mesh((4,), ("data",))
        host = np.arange(24, dtype=np.float32).reshape(8, 3)
        w = jax.device_put(host, NamedSharding(mesh, P("data")))
        state = {"w": w, "own": jax.numpy.arange(3), "step": 1}
        run = checkpoint.Checkpointer(path, every=1, keep=1)
        run.save(1, state)
        run.save(2, {**state, "step": 2})
        assert run.steps() == [2], run.steps()
        loaded, _ = run.restore(state)
        assert loaded["w"].sharding == w.sharding
        for shard in loaded["w"].addressable_shards:
            np.testing.assert_array_equal(shard.data, host[shard.index])
        try:
            checkpoint.export_npz(path + "/w.npz", state)
        except checkpoint.CheckpointError as error:
            assert "['w'] is spread over several processes" in str(error)
        else:
            raise AssertionError("exported an array that no process holds")
    """)
    children = [run(source, tmp_path / "run", port, rank) for rank in range(2)]
    outputs = [child.communicate(timeout=60)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    loaded, _ = Checkpointer(tmp_path / "run", every=1).restore()
    np.testing.assert_array_equal(loaded["w"], np.arange(24, dtype=np.float32).reshape(8, 3))
    assert loaded["step"] == 2


# ----------------------------------------------------------------------------- missing and damaged


def test_what_is_no_checkpoint_is_named_with_what_was_found(tmp_path):
    from orbax.checkpoint import v1 as ocp

    np.savez(tmp_path / "w.npz", w=np.ones(2))
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    ocp.save_checkpointables(tmp_path / "orbax", {"arrays": {"w": np.ones(2)}})
    Checkpointer(tmp_path / "run", every=1).save(1, {"w": np.ones(2)})
    (tmp_path / "killed" / f"arrays-{'0' * 16}.orbax-checkpoint-tmp").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "geojax.json").write_text('{"format": "something else"}')

    with pytest.raises(FileNotFoundError, match=rf"no checkpoint at {tmp_path}/missing"):
        checkpoint.load(tmp_path / "missing")
    for name, found in {
        "w.npz": "is a file; expected a checkpoint folder",
        "plain": r"holds 1 other entries \(notes.txt\)",
        "empty": "holds nothing",
        "orbax": "holds an orbax checkpoint of other making",
        "run": r"holds the checkpoints of a run, which `Checkpointer\(...\).restore` reads",
        "killed": "holds only what a save left that was stopped",
        "other": "a description that geojax did not write",
    }.items():
        for read in (checkpoint.load, checkpoint.describe, checkpoint.load_network):
            with pytest.raises(CheckpointError, match=rf"{tmp_path / name}.*{found}"):
                read(tmp_path / name)


def test_a_save_never_writes_among_files_of_others(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match="holds other files than a checkpoint's"):
        checkpoint.save(tmp_path, {"w": jnp.ones(2)})
    with pytest.raises(CheckpointError, match=r"notes.txt is a file; a checkpoint is a folder"):
        checkpoint.save(tmp_path / "notes.txt", {"w": jnp.ones(2)})
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


def damage(file, how):
    data = bytearray(file.read_bytes())
    if how == "deleted":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) * 2 // 3] ^= 0x10
        file.write_bytes(data)


def copies_with_one_damaged_file(folder, how):
    """Per file the folder of a copy in which that file alone is damaged, and the file's name."""
    copy = folder.with_name("copy")
    names = [f.relative_to(folder) for f in sorted(folder.rglob("*")) if f.is_file()]
    assert len(names) > 5
    for name in names:
        if (folder / name).stat().st_size:
            shutil.copytree(folder, copy)
            damage(copy / name, how)
            yield copy, name
            shutil.rmtree(copy)


@pytest.mark.parametrize("how", ["deleted", "truncated"])
def test_a_missing_or_short_file_is_named(tmp_path, how, capfd):
    checkpoint.save(tmp_path / "whole", {"w": jnp.ones((40, 50))})
    for copy, name in copies_with_one_damaged_file(tmp_path / "whole", how):
        described = {"deleted": "it lacks geojax.json", "truncated": "not whole JSON"}[how]
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(copy)
        assert str(copy) in str(caught.value)
        assert (described if name.name == "geojax.json" else name.as_posix()) in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_flipped_bit_in_any_file_is_an_error_or_harmless(tmp_path, monkeypatch, capfd):
    # Where one of orbax's reads fails, another may end after its event loop, which Python reports.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    rng = np.random.default_rng(2)
    saved = {"w": jnp.asarray(rng.normal(size=(40, 50)).astype(np.float32)), "n": np.arange(5)}
    checkpoint.save(tmp_path / "whole", saved)
    noticed = set()
    for copy, name in copies_with_one_damaged_file(tmp_path / "whole", "flipped"):
        for like in (None, saved):
            message = None
            try:
                loaded, _ = checkpoint.load(copy, like)
            except CheckpointError as error:
                message = str(error)
            if message is None:
                assert_same(loaded, saved)
            else:
                assert f"{copy} is damaged" in message
                assert "\n" not in message
                noticed.add(name.name)
    assert "geojax.json" in noticed
    assert len(noticed) > 2, "no change to the arrays was noticed"
    assert capfd.readouterr().err == ""
    time.sleep(0.1)


@pytest.mark.parametrize("committed", [False, True])
def test_other_numbers_than_were_saved_are_noticed(tmp_path, monkeypatch, committed):
    """What only a checksum sees: orbax reads all that it expects, and it is another array."""
    from orbax.checkpoint import v1 as ocp

    saved = jax.device_put(jnp.arange(4.0), jax.devices()[1] if committed else None)
    checkpoint.save(tmp_path / "c", {"w": saved})
    real = ocp.load_checkpointables

    def swapped(path, abstract):
        return jax.tree.map(lambda x: x[np.array([1, 0, 2, 3])], real(path, abstract))

    monkeypatch.setattr(ocp, "load_checkpointables", swapped)
    with pytest.raises(CheckpointError, match=r"is damaged: leaf \['w'\] should be .* checksum"):
        checkpoint.load(tmp_path / "c", {"w": saved})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"value": 37', '"value": 38', "its description was changed after it was written"),
        ('"format_version": 1', '"format_version": 2', "is of format 2 and this geojax reads"),
        ('"leaves"', "", "its description is not whole JSON"),
    ],
)
def test_a_changed_description_is_noticed(tmp_path, old, new, message):
    checkpoint.save(tmp_path / "c", {"step": 37})
    file = tmp_path / "c" / "geojax.json"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path / "c")


# ------------------------------------------------------------------------------ whole or not at all


def test_overwriting_keeps_the_old_checkpoint_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "c"
    checkpoint.save(path, {"w": jnp.zeros(3)})

    def killed(*_, **__):
        raise KeyboardInterrupt

    # Before the rename, as late as a kill can come.
    with monkeypatch.context() as patch:
        patch.setattr(_files, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(path, {"w": jnp.ones(3)})
    assert len(list(path.glob("arrays-*"))) == 2
    assert checkpoint.load(path)[0]["w"].tolist() == [0.0, 0.0, 0.0]

    # After the rename, before the old arrays are removed.
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(path, {"w": jnp.ones(3)})
    assert checkpoint.load(path)[0]["w"].tolist() == [1.0, 1.0, 1.0]

    checkpoint.save(path, {"w": jnp.full((3,), 2.0)})
    assert len(list(path.iterdir())) == 2
    assert checkpoint.load(path)[0]["w"].tolist() == [2.0, 2.0, 2.0]


def test_a_save_that_cannot_write_says_so_and_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    from orbax.checkpoint import v1 as ocp

    def full(*_):
        raise OSError(28, "No space left on device")

    checkpoint.save(tmp_path / "c", {"w": jnp.zeros(3)})
    monkeypatch.setattr(ocp, "save_checkpointables", full)
    with pytest.raises(CheckpointError, match="could not be written to .*No space left"):
        checkpoint.save(tmp_path / "c", {"w": jnp.ones(3)})
    assert checkpoint.load(tmp_path / "c")[0]["w"].tolist() == [0.0, 0.0, 0.0]


def killable_state(step):
    """Large and incompressible, so that a kill lands inside a save; another one at each step."""
    import numpy as np

    w = np.random.default_rng(step).standard_normal(1_000_000).astype(np.float32)
    return {"step": step, "w": w}


def test_a_kill_at_any_moment_leaves_the_previous_checkpoint_whole(tmp_path):
    source = inspect.getsource(killable_state) + inspect.cleandoc("""
        import sys
        from geojax import checkpoint
        run = checkpoint.Checkpointer(sys.argv[1] + "/run", every=1)
        step = run.latest() or 0
        while True:
            step += 1
            state = killable_state(step)
            run.save(step, state)
            checkpoint.save(sys.argv[1] + "/one", state)
            print(step, flush=True)
        """)
    checkpointer = Checkpointer(tmp_path / "run", every=1)
    interrupted = 0
    for _ in range(4):
        child = run(source, tmp_path)
        first = int(child.stdout.readline())
        assert first > 1 or interrupted == 0, "the killed run did not resume"
        time.sleep(random.uniform(0.0, 0.5))
        child.kill()
        saved = [first, *map(int, child.stdout.read().split())]
        child.wait()
        child.stdout.close()

        latest = checkpointer.latest()
        state, metadata = checkpointer.restore()
        assert saved[-1] <= latest <= saved[-1] + 1
        assert metadata["step"] == state["step"] == latest
        np.testing.assert_array_equal(state["w"], killable_state(latest)["w"])
        one, _ = checkpoint.load(tmp_path / "one")
        assert one["step"] in (saved[-1], saved[-1] + 1)
        np.testing.assert_array_equal(one["w"], killable_state(one["step"])["w"])
        left = len(list((tmp_path / "one").iterdir())) > 2
        interrupted += left or len(list((tmp_path / "run").iterdir())) > len(checkpointer.steps())
    assert interrupted, "no kill landed inside a save, so this test has shown nothing"

    checkpointer.save(latest + 1, {"w": jnp.ones(2)})
    checkpoint.save(tmp_path / "one", {"w": jnp.ones(2)})
    assert [int(p.name[5:]) for p in sorted((tmp_path / "run").iterdir())] == [latest, latest + 1]
    assert len(list((tmp_path / "one").iterdir())) == 2


# ------------------------------------------------------------------------------------ checkpointer


def test_no_step_is_skipped_and_the_newest_are_kept(tmp_path):
    everything_kept = Checkpointer(tmp_path / "all", every=5, keep=None)
    assert (everything_kept.every, everything_kept.latest()) == (5, None)
    assert everything_kept.location == str(tmp_path / "all")
    newest = Checkpointer(tmp_path / "two", every=1)
    for step in range(6):
        everything_kept.save(step, {"step": jnp.int32(step)})
        newest.save(np.int64(step), {"step": jnp.int32(step)}, {"loss": 0.5})
        assert newest.latest() == step
    assert everything_kept.steps() == list(range(6))
    assert newest.steps() == [4, 5]
    assert [int(everything_kept.restore(step=s)[0]["step"]) for s in range(6)] == list(range(6))
    state, metadata = newest.restore()
    assert int(state["step"]) == metadata["step"] == 5
    assert (metadata["loss"], metadata["kind"]) == (0.5, "state")


def test_steps_only_grow_and_missing_ones_are_named(tmp_path):
    run = Checkpointer(tmp_path / "run", every=1, keep=3)
    with pytest.raises(FileNotFoundError, match=rf"no checkpoint in {tmp_path}/run.*steps \[\]"):
        run.restore()
    run.save(3, {"w": jnp.zeros(1)})
    run.save(3, {"w": jnp.ones(1)})
    assert run.restore()[0]["w"].tolist() == [1.0]
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 2 .* of steps \[3\]"):
        run.restore(step=2)
    for step in (2, -1):
        with pytest.raises(ValueError, match=rf"step {step} cannot be saved .* the last is 3"):
            run.save(step, {"w": jnp.ones(1)})
    with pytest.raises(ValueError, match="every is 0"):
        Checkpointer(tmp_path, every=0)
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpointer(tmp_path, every=1, keep=0)


def test_pruning_leaves_files_of_others_alone(tmp_path):
    (tmp_path / "step_00000001").mkdir()
    (tmp_path / "step_00000001" / "notes.txt").write_text("x")
    (tmp_path / "step_00000002").mkdir()
    (tmp_path / "log.txt").write_text("x")
    Checkpointer(tmp_path, every=1, keep=1).save(3, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "log.txt",
        "step_00000001",
        "step_00000003",
    ]


def test_a_fit_stopped_at_step_37_and_resumed_ends_with_the_same_bits(tmp_path, rng):
    arrays = {"x": rng.normal(size=(20, 4)), "y": rng.normal(size=20)}
    arrays = jax.tree.map(lambda x: x.astype(np.float32), arrays)
    data = batches.split(arrays, 6, key=jax.random.key(1))

    def noisy_loss(params, batch, key):
        noise = jax.random.normal(key, batch["y"].shape)
        return jnp.mean((batch["x"] @ params["w"] - batch["y"] - noise) ** 2)

    def train(folder, num_steps):
        optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 60))
        run = Checkpointer(tmp_path / folder, every=20)
        key = jax.random.key(0)
        # optax's bias correction mixes float and int32.
        with jax.numpy_dtype_promotion("standard"):
            return fit.fit(
                noisy_loss, {"w": jnp.zeros(4)}, data, optimizer, num_steps, key=key, checkpoint=run
            )

    whole = train("whole", 60)
    train("parts", 37)
    resumed = train("parts", 60)
    assert (whole.start, resumed.start) == (0, 37)
    assert_same(resumed.state, whole.state)
    found, _ = Checkpointer(tmp_path / "parts", every=20).restore()
    assert fingerprints(found) == plain_paths(fingerprints(whole.state))


# ----------------------------------------------------------------------------------------- exports


def exportable():
    out = everything()
    del out["file"]  # tested on its own
    return {**out, "file": jnp.arange(3)}


@pytest.mark.parametrize("suffix", FORMATS)
def test_exports_come_back_exactly_with_and_without_like(tmp_path, suffix):
    export, restore = FORMATS[suffix]
    saved = exportable()
    file = tmp_path / "deep" / f"tree{suffix}"
    export(file, saved, kind="state", metadata={"seed": 3})
    loaded, metadata = restore(file)
    assert fingerprints(loaded) == plain_paths(fingerprints(saved))
    assert (metadata["kind"], metadata["seed"]) == ("state", 3)
    assert_same(restore(file, saved)[0], saved)
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("suffix", FORMATS)
def test_exports_hold_every_dtype_or_refuse_it_by_leaf(tmp_path, suffix):
    export, restore = FORMATS[suffix]
    saved = {name: np.ones((2, 3)).astype(name) for name in sorted(_description.DTYPES)}
    if suffix == ".safetensors":
        with pytest.raises(TypeError, match=r"leaf \['complex128'\] is complex128, which a"):
            export(tmp_path / "x", saved)
        del saved["complex128"]
    export(tmp_path / "x", saved)
    assert_same(restore(tmp_path / "x")[0], saved)


def test_numpy_alone_reads_the_npz_and_bfloat16_is_uint16(tmp_path):
    w = jnp.asarray([1.5, -2.0], jnp.bfloat16)
    checkpoint.export_npz(tmp_path / "w.npz", {"a": {"b": [w, jnp.ones((2, 3))]}, "n": 3})
    with np.load(tmp_path / "w.npz", allow_pickle=False) as archive:
        assert sorted(archive.files) == ["__geojax__", "a/b/0", "a/b/1"]
        assert archive["a/b/0"].dtype == np.uint16
        assert archive["a/b/0"].tobytes() == np.asarray(w).tobytes()
        assert archive["a/b/1"].shape == (2, 3)
        assert json.loads(str(archive["__geojax__"]))["leaves"][0]["dtype"] == "bfloat16"


def test_the_safetensors_file_has_the_layout_that_pytorch_reads(tmp_path):
    w = np.arange(6, dtype=np.float32).reshape(2, 3)
    saved = {"layer": {"weight": jnp.asarray(w.T).T, "half": jnp.ones(2, jnp.bfloat16)}}
    checkpoint.export_safetensors(tmp_path / "w.safetensors", saved)
    data = (tmp_path / "w.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {
        "layer/weight": "F32",
        "layer/half": "BF16",
    }
    start, end = header["layer/weight"]["data_offsets"]
    assert header["layer/weight"]["shape"] == [2, 3]
    assert data[8 + length + start : 8 + length + end] == w.tobytes()


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_of_other_making_gives_its_arrays_or_fills_a_like_by_name(tmp_path, suffix):
    from safetensors.numpy import save_file

    _, restore = FORMATS[suffix]
    arrays = {"a/w": np.ones((2, 3), np.float32), "fc.bias": np.arange(3), "a/s": np.float64(2)}
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    file = tmp_path / f"foreign{suffix}"
    if suffix == ".npz":
        np.savez(file, **arrays)
        entries = {}
    else:
        entries = {"format": "pt"}
        save_file(arrays, file, entries)
    loaded, metadata = restore(file)
    assert_same(loaded, arrays)
    assert metadata == {**entries, "kind": "foreign"}

    like = {"a": {"w": jnp.zeros((2, 3)), "s": np.float64(0)}, "fc.bias": np.zeros(3, np.int64)}
    loaded, _ = restore(file, like)
    assert isinstance(loaded["a"]["w"], jax.Array)
    assert loaded["a"]["w"].tolist() == [[1.0] * 3] * 2
    like["a"]["w"] = jnp.zeros((3, 2))
    with pytest.raises(CheckpointError, match=r"is float32\[2,3\] there and float32\[3,2\]"):
        restore(file, like)
    del like["a"]
    with pytest.raises(CheckpointError, match=r"it has leaf a/s besides \(0 lacking, 2 more\)"):
        restore(file, like)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_key_with_a_slash_is_exported_unless_two_names_would_be_one(tmp_path, suffix):
    export, restore = FORMATS[suffix]
    saved = {"mlp/~/linear": {"w": jnp.ones(2)}, "mlp": {"w": jnp.zeros(2)}}
    export(tmp_path / "x", saved)
    assert_same(restore(tmp_path / "x")[0], saved)
    for clash in ({"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, {"__geojax__": jnp.ones(1)}):
        with pytest.raises(CheckpointError, match="would belong to two arrays"):
            export(tmp_path / "x", clash)
    assert_same(restore(tmp_path / "x")[0], saved)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_damaged_export_is_an_error(tmp_path, suffix, how):
    export, restore = FORMATS[suffix]
    file = tmp_path / f"x{suffix}"
    export(file, {"w": jnp.arange(5000, dtype=jnp.float32)})
    damage(file, how)
    with pytest.raises(CheckpointError, match=str(file)):
        restore(file)


@pytest.mark.parametrize("suffix", FORMATS)
def test_exports_of_the_wrong_kind_are_refused(tmp_path, suffix):
    _, restore = FORMATS[suffix]
    checkpoint.save(tmp_path / "folder", {})
    (tmp_path / "text").write_text("hello")
    with pytest.raises(FileNotFoundError, match="no file at"):
        restore(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="is a folder, not a file; `load` reads"):
        restore(tmp_path / "folder")
    with pytest.raises(CheckpointError, match="could not be read as a"):
        restore(tmp_path / "text")


def test_pickled_objects_in_an_npz_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.array([{"a": 1}], object))
    with pytest.raises(CheckpointError, match="could not be read as an .npz file of plain arrays"):
        checkpoint.import_npz(tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", x=np.array(["text"]))
    with pytest.raises(CheckpointError, match=r"holds the array 'x' of <U4; expected numbers"):
        checkpoint.import_npz(tmp_path / "y.npz")


def test_an_export_is_replaced_only_by_a_whole_one(tmp_path, monkeypatch):
    checkpoint.export_npz(tmp_path / "x.npz", {"w": jnp.zeros(2)})

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(np.lib.format, "write_array", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.export_npz(tmp_path / "x.npz", {"w": jnp.ones(2)})
    assert checkpoint.import_npz(tmp_path / "x.npz")[0]["w"].tolist() == [0.0, 0.0]


# --------------------------------------------------------------------------- paths and installation


def test_relative_paths_and_the_home_sign_work(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    checkpoint.save("runs/a", {"w": jnp.ones(2)})
    checkpoint.save("~/b", {"w": jnp.ones(2)})
    checkpoint.export_npz("~/c.npz", {"w": jnp.ones(2)})
    assert (tmp_path / "runs" / "a" / "geojax.json").is_file()
    assert (tmp_path / "home" / "b" / "geojax.json").is_file()
    assert checkpoint.load("runs/../runs/a")[0]["w"].tolist() == [1.0, 1.0]
    assert checkpoint.load("~/b")[0]["w"].tolist() == [1.0, 1.0]
    assert checkpoint.import_npz(tmp_path / "home" / "c.npz")[0]["w"].tolist() == [1.0, 1.0]
    assert Checkpointer("runs", every=1).location == str(tmp_path / "runs")
    with pytest.raises(ValueError, match="gs://bucket/x is a URL"):
        checkpoint.save("gs://bucket/x", {})


def test_a_checkpoint_can_be_moved(tmp_path):
    checkpoint.save(tmp_path / "a", {"w": jnp.ones(2)})
    os.rename(tmp_path / "a", tmp_path / "b")
    assert checkpoint.load(tmp_path / "b")[0]["w"].tolist() == [1.0, 1.0]
    assert str(tmp_path) not in (tmp_path / "b" / "geojax.json").read_text()


def test_without_orbax_or_safetensors_the_error_says_what_to_install(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "a", {"w": jnp.ones(2)})
    for name in ("orbax.checkpoint", "safetensors"):
        monkeypatch.setitem(sys.modules, name, None)
    for attempt in (
        lambda: checkpoint.save(tmp_path / "b", {}),
        lambda: checkpoint.load(tmp_path / "a"),
        lambda: checkpoint.export_safetensors(tmp_path / "x", {}),
        lambda: checkpoint.import_safetensors(tmp_path / "x"),
    ):
        with pytest.raises(ImportError, match=r'pip install "geojax\[examples\]"'):
            attempt()
    assert checkpoint.describe(tmp_path / "a")["leaves"] == {"['w']": "float32[2]"}


def test_the_examples_of_the_docstrings_run():
    for module in (_folders, _exports):
        failed, attempted = doctest.testmod(module)
        assert attempted
        assert not failed
