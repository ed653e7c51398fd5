"""Normalisation statistics: exact for any cut of the data, momentum, depth and framework."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from geojax import batches, models, statistics, tree


def make_data(n=60, features=5, order="sorted"):
    r = np.random.default_rng(0)
    labels = np.arange(n) // (n // 3)
    x = r.normal(size=(n, features)) * np.linspace(0.5, 3, features) + 4.0 * labels[:, None]
    if order == "shuffled":
        x = x[r.permutation(n)]
    return x.astype(np.float32)


class Network(nn.Module):
    """Dense, BatchNorm, ReLU, `depth` times; dropout when `dropout` is asked for."""

    depth: int = 1
    momentum: float = 0.99
    norm: str = "batch"

    @nn.compact
    def __call__(self, x, train):
        for i in range(self.depth):
            x = nn.Dense(6)(x) if i else x
            if self.norm == "batch":
                x = nn.BatchNorm(use_running_average=not train, momentum=self.momentum)(x)
            else:
                x = nn.LayerNorm()(x)
            x = nn.relu(x) if i + 1 < self.depth else x
        return x


def linen(**options):
    """The apply_fn, params and state of a `Network` with weights off their initial values."""
    module = Network(**options)
    variables = module.init(jax.random.key(0), jnp.zeros((1, 5)), False)
    noise = tree.random_like(jax.random.key(1), variables["params"])
    params = tree.axpy(0.3, noise, variables["params"])
    return apply_of(module), params, variables.get("batch_stats", {})


@functools.cache
def apply_of(module):
    def apply(params, state, inputs, train):
        variables = {"params": params, **({"batch_stats": state} if state else {})}
        if not train:
            return module.apply(variables, inputs, False), state
        out, new = module.apply(variables, inputs, True, mutable=["batch_stats"])
        return out, new.get("batch_stats", {})

    return apply


def leaves(state, layer=0):
    found = state[f"BatchNorm_{layer}"]
    return np.asarray(found["mean"]), np.asarray(found["var"])


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
@pytest.mark.parametrize("size", [1, 7, 60])
@pytest.mark.parametrize("method", ["exact", "batchwise"])
def test_one_layer_gets_the_mean_and_total_variance_of_the_whole_set(order, size, method):
    apply, params, state = linen(momentum=0.9)
    x = make_data(order=order)
    mean, var = leaves(
        statistics.refresh(apply, params, state, batches.split(x, size), method=method)
    )
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(var, exact.var(0), rtol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.999])
def test_the_momentum_does_not_matter(momentum):
    apply, params, state = linen(momentum=momentum)
    mean, var = leaves(statistics.refresh(apply, params, state, batches.split(make_data(), 16)))
    np.testing.assert_allclose(mean, make_data().astype(float).mean(0), rtol=1e-5)
    np.testing.assert_allclose(var, make_data().astype(float).var(0), rtol=1e-5)


@pytest.mark.parametrize(("order", "size"), [("sorted", 1), ("sorted", 25), ("shuffled", 25)])
def test_a_deep_network_gets_the_statistics_of_one_whole_batch_however_it_is_cut(order, size):
    apply, params, state = linen(depth=4, momentum=0.0)
    x = make_data(order=order)
    whole = apply(params, state, x, True)[1]  # momentum 0: what one batch of all the data leaves
    passes = []
    got = statistics.refresh(
        apply, params, state, batches.split(x, size), progress=lambda done, _: passes.append(done)
    )
    for layer in range(4):
        for a, b in zip(leaves(got, layer), leaves(whole, layer), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)
    assert passes[-1] <= 5
    # In evaluation mode with these statistics the network is the train-mode one on all the data.
    np.testing.assert_allclose(
        apply(params, got, x, False)[0], apply(params, state, x, True)[0], atol=2e-3
    )


def test_one_pass_on_sorted_data_is_wrong_for_a_deep_network():
    # What 'exact' is for: a pass in train mode sees layers that were normalised class by class.
    apply, params, state = linen(depth=3, momentum=0.0)
    x = make_data()
    exact = statistics.refresh(apply, params, state, batches.split(x, 20))
    once = statistics.refresh(apply, params, state, batches.split(x, 20), method="batchwise")
    for layer, close in ((0, True), (1, False), (2, False)):
        gap = np.abs(leaves(once, layer)[1] / leaves(exact, layer)[1] - 1).max()
        assert (gap < 1e-5) == close


def test_the_recipe_of_the_original_is_available_and_leaves_the_between_variance_out():
    apply, params, state = linen()
    x = make_data().astype(np.float64)
    cuts = [x[i : i + 16] for i in range(0, 60, 16)]
    mean, var = leaves(
        statistics.refresh(
            apply, params, state, batches.split(make_data(), 16), method="mean_of_batches"
        )
    )
    weights = np.array([len(c) for c in cuts]) / 60
    means = sum(w * c.mean(0) for w, c in zip(weights, cuts, strict=True))
    within = sum(w * c.var(0, ddof=1) for w, c in zip(weights, cuts, strict=True))
    np.testing.assert_allclose(mean, means, rtol=1e-5)
    np.testing.assert_allclose(var, within, rtol=1e-5)
    assert (var < 0.5 * x.var(0)).any()


def test_spatial_axes_count_in_the_recipe_and_in_the_exact_statistics():
    class Images(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.BatchNorm(use_running_average=not train)(x)

    module = Images()
    x = np.random.default_rng(0).normal(size=(10, 3, 3, 2)).astype(np.float32) + 5
    variables = module.init(jax.random.key(0), x, False)
    args = (apply_of(module), variables["params"], variables["batch_stats"], batches.split(x, 4))
    exact = leaves(statistics.refresh(*args))
    np.testing.assert_allclose(exact[1], x.astype(float).var((0, 1, 2)), rtol=1e-5)
    recipe = leaves(statistics.refresh(*args, method="mean_of_batches"))
    cuts = [x[0:4], x[4:8], x[8:10]]
    want = sum(len(c) / 10 * c.astype(float).var((0, 1, 2), ddof=1) for c in cuts)
    np.testing.assert_allclose(recipe[1], want, rtol=1e-5)


def test_without_such_statistics_the_state_itself_comes_back_and_no_data_are_read():
    class Untouched:
        def __iter__(self):
            raise AssertionError("the data were read")

    apply, params, state = linen(norm="layer", depth=2)
    assert state == {}
    assert statistics.refresh(apply, params, state, Untouched()) is state


def test_state_that_is_no_statistic_comes_back_bit_for_bit_and_the_callers_is_untouched():
    apply, params, state = linen()

    def with_more(params, state, inputs, train):
        out, new = apply(params, state["norm"], inputs, train)
        counted = state["count"] + jnp.int32(train)
        spectral = state["u"] / jnp.linalg.norm(state["u"])  # depends on no data
        return out, {"norm": new, "count": counted, "u": spectral}

    u = jax.random.normal(jax.random.key(2), (3,))
    full = {"norm": state, "count": jnp.int32(7), "u": u}
    before = jax.tree.map(np.array, full)
    got = statistics.refresh(with_more, params, full, batches.split(make_data(), 16))
    assert int(got["count"]) == 7
    np.testing.assert_array_equal(got["u"], u)
    for a, b in zip(jax.tree.leaves(full), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(leaves(got["norm"])[0], leaves(state)[0])


def test_dropout_is_off_while_statistics_are_computed():
    x = make_data()
    states = []
    for rate in (0.0, 0.5):
        model = models.build("mlp", widths=[6, 6], norm="batch", dropout=rate)
        params, state = model.init(jax.random.key(0), x)
        states.append(statistics.refresh(model.apply, params, state, batches.split(x, 16)))
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(a, b)


def test_dictionary_batches_masks_and_a_function_for_the_inputs():
    x = make_data(30)
    mask = np.random.default_rng(1).uniform(size=30) < 0.6

    def apply(params, state, inputs, train):
        values, keep = inputs["values"], inputs["keep"]
        count = jnp.sum(keep)
        mean = jnp.sum(values * keep[:, None], 0) / count
        var = jnp.sum((values - mean[None]) ** 2 * keep[:, None], 0) / count
        new = {
            "running_mean": 0.9 * state["running_mean"] + 0.1 * mean,
            "running_var": state["running_var"] + 0.1 * (var - state["running_var"]),
        }
        return (values - mean[None]) * jax.lax.rsqrt(var + 1e-5)[None] * params, new

    arrays = {"batch": {"values": x, "keep": mask.astype(np.float32)}, "label": np.zeros(30)}
    state = {"running_mean": jnp.zeros(5), "running_var": jnp.ones(5)}
    got = statistics.refresh(
        apply, jnp.ones(()), state, batches.split(arrays, 8),
        inputs_fn=lambda b: b["batch"], weight_fn=lambda b: jnp.sum(b["batch"]["keep"]),
    )  # fmt: skip
    np.testing.assert_allclose(got["running_mean"], x[mask].astype(float).mean(0), rtol=1e-5)
    np.testing.assert_allclose(got["running_var"], x[mask].astype(float).var(0), rtol=1e-5)


def test_nnx_modules_and_jitted_or_rematerialised_models_are_read():
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.BatchNorm(5, rngs=rngs)
            self.dense = nnx.Linear(5, 4, rngs=rngs)
            self.second = nnx.BatchNorm(4, rngs=rngs, momentum=0.7)

        def __call__(self, x):
            return self.second(nnx.relu(self.dense(self.first(x))))

    module = Two(nnx.Rngs(0))
    module.train()
    graph, params, state = nnx.split(module, nnx.Param, ...)

    @jax.jit
    def apply_train(params, state, inputs):
        merged = nnx.merge(graph, params, state)
        return merged(inputs), nnx.split(merged, nnx.Param, ...)[2]

    def apply(params, state, inputs, train):
        assert train
        return jax.checkpoint(apply_train)(params, state, inputs)

    x = make_data()
    got = statistics.refresh(apply, params, state, batches.split(x, 16))
    hidden = np.maximum(
        ((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)) @ np.asarray(params["dense"]["kernel"][...]), 0
    )
    np.testing.assert_allclose(got["first"]["var"][...], x.astype(float).var(0), rtol=1e-5)
    np.testing.assert_allclose(got["second"]["mean"][...], hidden.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got["second"]["var"][...], hidden.var(0), rtol=1e-4)
    assert statistics.statistic_paths(apply, params, state, x)[0][0].count("first") == 1


def test_many_points_at_once_equal_one_by_one():
    apply, params, state = linen(depth=2)
    points = tree.stack(
        [tree.axpy(0.1 * i, tree.random_like(jax.random.key(9), params), params) for i in range(4)]
    )
    source = batches.split(make_data(64)[:48], 16)
    alone = tree.stack(
        [statistics.refresh(apply, p, state, source, rtol=0) for p in tree.unstack(points)]
    )
    for num in (1, 3):
        many = statistics.refresh_points(apply, points, state, source, num_at_once=num, rtol=0)
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(many), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_model_is_compiled_once_for_many_points():
    traces = []
    apply, params, state = linen()

    def counted(params, state, inputs, train):
        traces.append(inputs.shape)
        return apply(params, state, inputs, train)

    source = batches.split(make_data(64), 16)
    statistics.refresh(counted, params, state, source)
    first = len(traces)
    statistics.refresh(counted, tree.scale(1.1, params), state, source)
    # Reading the layers traces the shapes once more; nothing is compiled.
    assert len(traces) <= first + 1


def test_ends_of_a_path_agree_with_the_endpoints():
    apply, params, state = linen(depth=2)
    other = tree.axpy(0.5, tree.random_like(jax.random.key(4), params), params)
    points = tree.stack([params, other])
    source = batches.split(make_data(), 16)
    x = make_data()[:9]
    for i, end in enumerate((params, other)):
        on_path = tree.combine(points, jnp.eye(2)[i])
        refreshed = statistics.refresh(apply, end, state, source)
        again = statistics.refresh(apply, on_path, state, source)
        np.testing.assert_allclose(
            apply(on_path, again, x, False)[0], apply(end, refreshed, x, False)[0], atol=1e-4
        )
        np.testing.assert_array_equal(
            apply(on_path, refreshed, x, False)[0], apply(end, refreshed, x, False)[0]
        )


@pytest.mark.parametrize("shard_parameters", [False, True])
def test_sharded_data_and_parameters_give_the_same_statistics(mesh, shard_parameters):
    apply, params, state = linen(depth=2)
    source = batches.split(make_data(), 16)
    want = statistics.refresh(apply, params, state, source)
    with jax.set_mesh(mesh):
        if shard_parameters:
            params = jax.device_put(params, jax.tree.map(
                lambda x: NamedSharding(mesh, P(*(None,) * (x.ndim - 1), "model"))
                if x.shape[-1] % 2 == 0 else NamedSharding(mesh, P()), params,
            ))  # fmt: skip
        got = statistics.refresh(apply, params, state, source, mesh=mesh)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_many_points_on_sharded_data_equal_one_device(mesh):
    apply, params, state = linen(depth=2)
    other = tree.axpy(0.1, tree.random_like(jax.random.key(9), params), params)
    points = tree.stack([params, other])
    source = batches.split(make_data()[:48], 16)
    want = statistics.refresh_points(apply, points, state, source, num_at_once=1)
    with jax.set_mesh(mesh):
        got = statistics.refresh_points(apply, points, state, source, num_at_once=2, mesh=mesh)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("update", "says"),
    [
        (lambda old, x: {"mean": jnp.maximum(old["mean"], x.mean(0))}, "through `max`"),
        (
            lambda old, x: {"mean": 0.9 * old["mean"] + x.mean(0) * old["mean"] * x.max(0)},
            "reads 2",
        ),
        (lambda old, x: {"peak": 0.9 * old["peak"] + 0.1 * x.max(0)}, "neither named 'mean'"),
        (lambda old, x: {"var": 0.9 * old["var"] + 0.1 * x.var(0)}, "neither named 'mean'"),
        (
            lambda old, x: {
                "mean": jax.lax.scan(lambda c, r: (0.9 * c + 0.1 * r, None), old["mean"], x)[0]
            },
            "through `scan`.*unroll",
        ),
    ],
)
def test_other_state_is_refused_by_path(update, says):
    def apply(params, state, inputs, train):
        return inputs, update(state, inputs)

    old = {name: jnp.zeros(5) for name in ("mean", "var", "peak")}
    state = {name: old[name] for name in update(old, jnp.ones((2, 5)))}
    with pytest.raises(ValueError, match=rf"\['{next(iter(state))}'\].*{says}"):
        statistics.refresh(apply, {"w": jnp.ones(1)}, state, make_data())


def test_an_unknown_method_is_refused():
    apply, params, state = linen()
    with pytest.raises(ValueError, match="'fast'; expected one of exact"):
        statistics.refresh(apply, params, state, make_data(), method="fast")
