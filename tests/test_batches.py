"""The one loop over data: exact means, few compilations, clear refusals, meshes."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from geojax import batches

Pair = collections.namedtuple("Pair", ["x", "y"])


def data(n=23, seed=0):
    r = np.random.default_rng(seed)
    x = r.normal(size=(n, 3)).astype(np.float32)
    return {"x": x, "y": (x @ np.array([1.0, -2.0, 0.5]) + 1).astype(np.float32)}


def squared(params, batch):
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


PARAMS = {"w": jnp.array([0.3, -0.1, 0.2], jnp.float32)}


@pytest.mark.parametrize("size", [1, 4, 23, 100])
@pytest.mark.parametrize("loop", ["host", "scan"])
def test_the_mean_over_ragged_batches_equals_the_whole_data_set(size, loop):
    whole = jax.value_and_grad(squared)(PARAMS, data())
    parts = batches.mean(jax.value_and_grad(squared), batches.split(data(), size), loop=loop)(
        PARAMS
    )
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-6)
    np.testing.assert_allclose(parts[1]["w"], whole[1]["w"], rtol=1e-5)


def test_one_batch_gives_its_own_value_to_the_last_bit():
    for batch in (data(), Pair(**data()), tuple(data().values())):
        fn = lambda b: jnp.mean(jax.tree.leaves(b)[0])  # noqa: E731
        assert float(batches.mean(fn, batch)()) == float(jax.jit(fn)(batch))


@pytest.mark.parametrize("loop", ["host", "scan"])
def test_weight_fn_makes_the_mean_exact_over_unmasked_tokens(loop):
    r = np.random.default_rng(1)
    arrays = {
        "loss": r.normal(size=(10, 6)).astype(np.float32),
        "mask": (r.uniform(size=(10, 6)) < 0.4).astype(np.float32),
    }
    arrays["mask"][4:8] = 0  # two whole batches of two without a token: their mean is 0 / 0

    def per_token(batch):
        return jnp.sum(batch["loss"] * batch["mask"]) / jnp.sum(batch["mask"])

    got = batches.mean(
        per_token,
        batches.split(arrays, 2),
        weight_fn=lambda batch: jnp.sum(batch["mask"]),
        loop=loop,
    )()
    exact = arrays["loss"].astype(np.float64)[arrays["mask"] > 0].mean()
    np.testing.assert_allclose(got, exact, rtol=1e-6)


@pytest.mark.parametrize("loop", ["host", "scan"])
def test_weights_that_sum_to_zero_are_refused(loop):
    source = batches.split(data(4), 2)
    averaged = batches.mean(squared, source, weight_fn=lambda b: jnp.zeros(()), loop=loop)
    with pytest.raises(ValueError, match=r"sum to 0\.0; expected a positive"):
        averaged(PARAMS)


def test_the_function_is_traced_once_per_batch_shape_however_often_the_mean_is_made():
    traces = []

    def counted(params, batch):
        traces.append(batch["x"].shape)
        return squared(params, batch)

    for _ in range(3):
        averaged = batches.mean(counted, batches.split(data(23), 5))
        averaged(PARAMS)
        averaged({"w": jnp.ones(3)})
    assert traces == [(5, 3), (3, 3)]


def test_the_scan_is_compiled_once():
    traces = []

    def counted(params, batch):
        traces.append(batch["x"].shape)
        return squared(params, batch)

    for _ in range(3):
        batches.mean(counted, batches.split(data(20), 5), loop="scan")(PARAMS)
    first = len(traces)
    batches.mean(counted, batches.split(data(20), 5), loop="scan")({"w": jnp.ones(3)})
    assert len(traces) == first
    assert set(traces) == {(5, 3)}


def test_the_mean_can_be_differentiated_and_jitted():
    averaged = batches.mean(squared, batches.split(data(), 4))
    whole = jax.grad(squared)(PARAMS, data())["w"]
    np.testing.assert_allclose(jax.grad(averaged)(PARAMS)["w"], whole, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.grad(averaged))(PARAMS)["w"], whole, rtol=1e-5)
    tangent = {"w": jnp.ones(3)}
    _, out = jax.jvp(jax.grad(averaged), (PARAMS,), (tangent,))
    _, exact = jax.jvp(lambda p: jax.grad(squared)(p, data()), (PARAMS,), (tangent,))
    np.testing.assert_allclose(out["w"], exact["w"], rtol=1e-5)


def test_low_precision_and_integer_values_are_averaged_in_float32():
    source = batches.split({"x": np.arange(1000, dtype=np.int32)}, 10)
    out = batches.mean(
        lambda b: {"bf16": jnp.ones((), jnp.bfloat16) + jnp.all(b["x"] < 500).astype(jnp.bfloat16),
                   "count": jnp.max(b["x"]), "flag": jnp.all(b["x"] < 500)},
        source,
    )()  # fmt: skip
    assert {k: str(v.dtype) for k, v in out.items()} == dict.fromkeys(out, "float32")
    assert float(out["bf16"]) == 1.5
    assert float(out["count"]) == pytest.approx(504.0)
    assert float(out["flag"]) == 0.5


def test_a_list_a_loader_and_split_give_the_same_mean():
    class Loader:
        def __init__(self):
            self.arrays, self.passes = data(), 0

        def __iter__(self):
            self.passes += 1
            for i in range(0, 23, 5):
                yield [self.arrays["x"][i : i + 5], self.arrays["y"][i : i + 5]]

    def loss(params, batch):
        x, y = batch
        return squared(params, {"x": x, "y": y})

    loader = Loader()
    averaged = batches.mean(loss, loader)
    want = batches.mean(squared, batches.split(data(), 5))(PARAMS)
    assert float(averaged(PARAMS)) == float(want)
    assert float(averaged(PARAMS)) == float(want)
    assert loader.passes == 2
    assert float(batches.mean(loss, [tuple(b) for b in Loader()])(PARAMS)) == float(want)


def test_foreign_tensors_with_an_array_interface_are_read():
    class Tensor:
        def __init__(self, array):
            self.array = array

        def __array__(self, dtype=None, copy=None):
            return self.array

    class Loader:
        def __iter__(self):
            yield {"x": Tensor(np.ones((2, 3), np.float32)), "y": Tensor(np.zeros(2, np.float32))}

    assert float(batches.mean(squared, Loader())({"w": jnp.ones(3)})) == 9.0


def test_the_host_reads_at_most_two_batches_ahead_of_the_one_in_use():
    read = []

    class Loader:
        def __iter__(self):
            for i in range(6):
                read.append(i)
                yield {"x": np.full((2, 1), i, np.float32)}

    seen = []
    for i, pieces in enumerate(batches.prefetch(batches.as_batches(Loader()))):
        seen.append(float(pieces[0]["x"][0, 0]))
        assert len(read) <= i + 2
    assert seen == [0, 1, 2, 3, 4, 5]


def test_progress_counts_the_batches():
    seen = []
    batches.mean(squared, batches.split(data(23), 5), progress=lambda *a: seen.append(a))(PARAMS)
    assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_a_key_reorders_each_epoch_and_plain_iteration_stays_the_same():
    source = batches.split(np.arange(10), 4, key=jax.random.key(0))
    epochs = [np.concatenate(list(source.epoch(i))) for i in (0, 1)]
    assert not np.array_equal(*epochs)
    for order in epochs:
        np.testing.assert_array_equal(np.sort(order), np.arange(10))
    np.testing.assert_array_equal(np.concatenate(list(source)), epochs[0])
    np.testing.assert_array_equal(np.concatenate(list(source)), epochs[0])
    late = list(source.epoch(1, start=2))
    np.testing.assert_array_equal(late[0], epochs[1][8:])
    assert len(batches.split(np.arange(10), 4, drop_remainder=True)) == 2


def generator():
    yield data()


class Empty:
    def __iter__(self):
        return iter(())


class Once:
    def __init__(self):
        self.items = iter([data(4), data(4)])

    def __iter__(self):
        return self.items


@pytest.mark.parametrize(
    ("source", "kind", "says"),
    [
        (generator(), TypeError, "one-shot generator.*re-iterable.*batches.split"),
        ([], ValueError, "empty list"),
        (Empty(), ValueError, "gave 0 batches"),
        (3, TypeError, "got int"),
        ({}, ValueError, "without leaves"),
        ({"x": np.ones(()), "y": np.ones(2)}, ValueError, r"\['x'\] has no axes"),
        (
            {"x": np.ones((4, 2)), "y": np.ones(3)},
            ValueError,
            r"\['x'\] holds 4 examples and leaf \['y'\] 3",
        ),
        ([{"x": np.ones((4, 2)), "y": np.ones(3)}], ValueError, r"\['x'\] holds 4"),
        ({"x": np.ones((0, 2))}, ValueError, "holds no examples"),
        ([np.ones((4, 2)), np.ones(4, np.int32)], ValueError, "pass it as a tuple"),
    ],
)
def test_what_is_no_data_set_is_refused_in_a_sentence(source, kind, says):
    with pytest.raises(kind, match=says):
        batches.mean(lambda batch: jnp.zeros(()), source)()


def test_a_source_that_runs_dry_on_the_second_pass_is_refused():
    averaged = batches.mean(lambda b: jnp.mean(b["x"]), Once())
    averaged()
    with pytest.raises(ValueError, match=r"this pass gave 0 batches and an earlier one 2"):
        averaged()


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_a_batch_size_that_is_no_positive_integer_is_refused(size):
    with pytest.raises(ValueError, match="positive integer"):
        batches.split(data(), size)


def test_an_empty_or_wholly_dropped_data_set_is_refused():
    with pytest.raises(ValueError, match="hold no examples"):
        batches.split({"x": np.ones((0, 2))}, 4)
    with pytest.raises(ValueError, match="make no batch of 4"):
        batches.split(np.ones(3), 4, drop_remainder=True)


@pytest.mark.parametrize("num", [24, 23, 3])
def test_data_sharded_over_a_mesh_gives_the_same_mean(mesh, num):
    want = batches.mean(jax.grad(squared), batches.split(data(num), 6))(PARAMS)
    with jax.set_mesh(mesh):
        got = batches.mean(jax.grad(squared), batches.split(data(num), 6), mesh=mesh)(PARAMS)
        both = NamedSharding(mesh, P(("data", "model")))
        wide = batches.mean(jax.grad(squared), batches.split(data(num), 6), mesh=both)(PARAMS)
    np.testing.assert_allclose(got["w"], want["w"], rtol=1e-5)
    np.testing.assert_allclose(wide["w"], want["w"], rtol=1e-5)


def test_sharded_parameters_keep_their_sharding_in_the_mean(mesh):
    def loss(params, batch):
        return jnp.mean(jnp.tanh(batch["x"] @ params["w"]) ** 2)

    host = {"w": np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)}
    source = batches.split({"x": data(24)["x"]}, 8)
    want = batches.mean(jax.grad(loss), source)(host)["w"]
    params = jax.device_put(host, NamedSharding(mesh, P(None, "model")))
    with jax.set_mesh(mesh):
        got = batches.mean(jax.grad(loss), source, mesh=mesh)(params)["w"]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    assert got.sharding.is_equivalent_to(params["w"].sharding, 2)


def test_batches_already_on_the_mesh_and_arrays_split_there_are_left_there(mesh):
    arrays = jax.device_put(data(24), NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        source = batches.split(arrays, 10)
        pieces = list(source)
        got = batches.mean(squared, source)(PARAMS)
        one = batches.mean(squared, arrays)(PARAMS)
    assert [len(p["x"]) for p in pieces] == [10, 10, 4]
    assert pieces[2]["x"].sharding.spec[0] == "data"
    want = squared(PARAMS, data(24))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(one, want, rtol=1e-5)
