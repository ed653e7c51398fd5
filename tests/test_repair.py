"""REPAIR: targets met exactly on the data, for any cut of them and any model with such layers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from geojax import assignment, batches, datasets, statistics, tree

WIDTHS = (5, 7, 6, 4)


def perceptron(params, x):
    for layer in params[:-1]:
        x = jnp.maximum(x @ layer["kernel"] + layer["bias"][None], 0)
    return x @ params[-1]["kernel"] + params[-1]["bias"][None]


def pre_activations(params, x):
    """Those of all layers, in float64."""
    out = []
    x = np.asarray(x, np.float64)
    for layer in params:
        out.append(x @ np.asarray(layer["kernel"], float) + np.asarray(layer["bias"], float))
        x = np.maximum(out[-1], 0)
    return out


def network(seed, widths=WIDTHS):
    like = [
        {"kernel": jax.ShapeDtypeStruct((n, m), jnp.float32),
         "bias": jax.ShapeDtypeStruct((m,), jnp.float32)}
        for n, m in zip(widths, widths[1:], strict=False)
    ]  # fmt: skip
    return tree.random_like(jax.random.key(seed), like)


def inputs(n=53, offset=2.0):
    r = np.random.default_rng(0)
    return (r.normal(size=(n, WIDTHS[0])) + np.linspace(0, offset, n)[:, None]).astype(np.float32)


def ends(n=2):
    return tree.stack([network(i) for i in range(n)])


def mixed(points, weights):
    return tree.combine(points, jnp.asarray(weights, jnp.float32))


def moments(params, x):
    return [(z.mean(0), z.std(0)) for z in pre_activations(params, x)]


def meets(found, targets, rtol=1e-3):
    for moment, (mean, std) in zip(found, targets, strict=True):
        np.testing.assert_allclose(moment.std, std, rtol=rtol)
        np.testing.assert_allclose(moment.mean, mean, rtol=rtol, atol=rtol * std.max())


def interpolated(points, weights, x):
    every = [moments(p, x) for p in tree.unstack(points)]
    return [
        tuple(np.tensordot(weights, np.stack(ms), 1) for ms in zip(*layer, strict=True))
        for layer in zip(*every, strict=True)
    ]


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.8, 0.2), (0.2, 0.5, 0.3)])
def test_the_units_get_the_interpolated_means_and_deviations_of_the_endpoints(weights):
    points, x = ends(len(weights)), inputs()
    merged = mixed(points, weights)
    result = statistics.repair(perceptron, merged, points, x, weights=weights, progress=False)
    assert result.layers == ("[0]['kernel']", "[1]['kernel']", "[2]['kernel']")
    want = interpolated(points, weights, x)
    meets(result.targets, want, 1e-5)
    meets(result.before, moments(merged, x), 1e-5)
    meets(result.after, moments(result.params, x), 1e-5)
    meets(result.after, want, 1e-4)
    assert result.num_passes == len(weights) + 3 + 1
    assert result.num_dead == (0, 0, 0)
    assert np.abs(result.before[1].std / want[1][1] - 1).max() > 0.1


@pytest.mark.parametrize("size", [1, 7, 20, 53])
@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_the_result_does_not_depend_on_how_the_data_are_cut(size, order):
    points, x = ends(), inputs(offset=6.0)
    whole = statistics.repair(perceptron, mixed(points, (0.5, 0.5)), points, x, progress=False)
    if order == "shuffled":
        x = np.random.default_rng(1).permutation(x)
    cut = statistics.repair(
        perceptron, mixed(points, (0.5, 0.5)), points, batches.split(x, size), progress=False
    )
    for a, b in zip(jax.tree.leaves(cut.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    meets(cut.after, cut.targets, 1e-4)


def test_the_folded_network_is_the_one_that_normalises_explicitly():
    points, x = ends(), inputs()
    merged = mixed(points, (0.5, 0.5))
    targets = interpolated(points, (0.5, 0.5), x)
    hidden = x.astype(np.float64)
    for layer, (mean, std) in zip(merged, targets, strict=True):
        z = hidden @ np.asarray(layer["kernel"], float) + np.asarray(layer["bias"], float)
        z = mean + std * (z - z.mean(0)) / z.std(0)  # what a BatchNorm behind each layer does
        hidden = np.maximum(z, 0)
    folded = statistics.repair(perceptron, merged, points, x, progress=False).params
    np.testing.assert_allclose(perceptron(folded, x), z, rtol=1e-5, atol=1e-5 * np.abs(z).max())


@pytest.mark.parametrize("size", [20, 53])
def test_the_closed_form_rescales_by_the_correlations_of_the_endpoints(size):
    points, x, shares = ends(3), inputs(), np.array([0.2, 0.5, 0.3])
    merged = mixed(points, shares)
    result = statistics.repair(
        perceptron, merged, points, batches.split(x, size), weights=shares, method="closed_form",
        progress=False,
    )  # fmt: skip
    assert result.num_passes == 2 * 3 + 2
    meets(result.targets, interpolated(points, shares, x), 1e-5)
    every = [pre_activations(p, x) for p in tree.unstack(points)]
    for i, (mean, std) in enumerate(interpolated(points, shares, x)):
        expected = np.empty_like(std)
        for unit in range(len(std)):
            zs = np.stack([z[i][:, unit] for z in every])
            scaled = shares * zs.std(1)
            expected[unit] = np.sqrt(scaled @ np.corrcoef(zs) @ scaled)
        factor = std / expected
        kernel, bias = (np.asarray(merged[i][name], float) for name in ("kernel", "bias"))
        got = result.params[i]
        np.testing.assert_allclose(got["kernel"], factor * kernel, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(got["bias"], mean + factor * (bias - mean), atol=1e-4)
    # Units that are linear in Gaussian inputs, or in any, get what was asked for.
    meets(result.after[:1], result.targets[:1], 1e-4)


@pytest.mark.parametrize("what", ["scale", "shift"])
def test_rescale_leaves_the_means_and_reshift_the_deviations(what):
    points, x = ends(), inputs()
    merged = mixed(points, (0.5, 0.5))
    result = statistics.repair(perceptron, merged, points, x, what=what, progress=False)
    first, target = moments(merged, x)[0], result.targets[0]
    got = result.after[0]
    atol = 1e-5 * float(first[1].max())
    np.testing.assert_allclose(got.mean, first[0] if what == "scale" else target.mean, atol=atol)
    np.testing.assert_allclose(got.std, target.std if what == "scale" else first[1], atol=atol)
    for moment, (mean, std) in zip(result.after[1:], result.targets[1:], strict=True):
        aimed = (moment.std, std) if what == "scale" else (moment.mean, mean)
        np.testing.assert_allclose(*aimed, rtol=1e-3, atol=1e-4)


def test_endpoints_that_are_equal_change_nothing():
    one, x = network(0), inputs()
    result = statistics.repair(perceptron, one, tree.stack([one] * 2), x, progress=False)
    for a, b in zip(jax.tree.leaves(result.params), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_units_that_do_not_vary_are_only_shifted_and_counted():
    points, x = ends(), inputs()
    merged = mixed(points, (0.5, 0.5))
    dead, alive = np.array([0, 1, 3, 4]), np.array([2, 5])
    # What the third of them adds to its bias is lost but for the last bit: no variance to scale.
    weights = jnp.array([0.0, 0.0, 3e-6, 0.0])
    merged[1]["kernel"] = merged[1]["kernel"].at[:, dead].set(weights)
    merged[1]["bias"] = merged[1]["bias"].at[dead].set(jnp.array([1.7, -0.3, 123.456, 1e-3]))
    for source in (x, batches.split(x, 20)):
        result = statistics.repair(perceptron, merged, points, source, progress=False)
        assert result.num_dead == (0, 4, 0)
        assert (result.before[1].std[dead] > 0).tolist() == [False, False, True, False]
        got, target = result.params[1], result.targets[1]
        np.testing.assert_array_equal(got["kernel"][:, dead], merged[1]["kernel"][:, dead])
        rounding = 4 * float(np.finfo(np.float32).eps) * 123.456
        np.testing.assert_allclose(got["bias"][dead], target.mean[dead], rtol=0, atol=rounding)
        np.testing.assert_allclose(result.after[1].std[alive], target.std[alive], rtol=1e-4)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(result.params))


def test_a_selection_leaves_the_other_layers_as_they_are():
    points, x = ends(), inputs()
    merged = mixed(points, (0.5, 0.5))
    result = statistics.repair(
        perceptron, merged, points, x, select=lambda path: "[2]" not in path, progress=False
    )
    assert result.layers == ("[0]['kernel']", "[1]['kernel']")
    np.testing.assert_array_equal(result.params[2]["kernel"], merged[2]["kernel"])
    meets(result.after, result.targets, 1e-4)


# ------------------------------------------------------------------------------- kinds of networks


class Convolutions(nn.Module):
    """Two branches of one depth, strides, groups, and an output with two unit axes."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="first")(x))
        left = nn.Conv(6, (3, 3), strides=2, feature_group_count=2, name="left")(x)
        right = nn.Conv(6, (1, 1), strides=2, name="right")(x)
        x = nn.relu(left + right).mean((1, 2))
        x = nn.LayerNorm()(nn.DenseGeneral((2, 3), name="heads")(x))
        x = nn.Dense(3, use_bias=False, name="no_bias")(x.reshape((x.shape[0], -1)))
        return nn.Dense(1, name="last")(x)


convolutions = Convolutions()


@functools.cache
def image_networks():
    x = np.random.default_rng(0).normal(size=(13, 6, 6, 2)).astype(np.float32)
    params = jax.jit(convolutions.init)(jax.random.key(0), x)["params"]
    points = [tree.axpy(0.3, tree.random_like(jax.random.key(i), params), params) for i in (1, 2)]
    return x, tree.stack(points)


def apply_convolutions(params, x):
    return convolutions.apply({"params": params}, x)


def apply_with_state(params, state, x, train):
    assert not train
    return convolutions.apply({"params": params}, x), state


@pytest.mark.parametrize("with_state", [False, True])
def test_convolutions_groups_branches_and_many_unit_axes_meet_their_targets(with_state):
    x, points = image_networks()
    merged = mixed(points, (0.5, 0.5))
    result = statistics.repair(
        apply_with_state if with_state else apply_convolutions, merged, points,
        {"inputs": x, "label": np.zeros(13)}, progress=False, state={} if with_state else None,
    )  # fmt: skip
    names = ("first", "left", "right", "heads", "last")
    assert set(result.layers) == {f"['{name}']['kernel']" for name in names}
    assert result.num_passes == 2 + 4 + 1  # left and right share a pass
    meets(result.after, result.targets)
    # Against the module's own intermediates.
    heads = result.layers.index("['heads']['kernel']")
    assert result.after[heads].mean.shape == (2, 3)
    _, state = jax.jit(
        lambda params: convolutions.apply(
            {"params": params}, x, capture_intermediates=True, mutable="intermediates"
        )
    )(result.params)
    for name, moment in zip(result.layers, result.after, strict=True):
        z = np.asarray(state["intermediates"][name.split("'")[1]]["__call__"][0], np.float64)
        over = tuple(range(z.ndim - moment.mean.ndim))
        np.testing.assert_allclose(z.mean(over), moment.mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(z.std(over), moment.std, rtol=1e-4)
    # Leaves of other layers are not touched.
    np.testing.assert_array_equal(result.params["no_bias"]["kernel"], merged["no_bias"]["kernel"])


def test_layers_are_read_through_casts_transposes_jit_and_several_inputs():
    def apply(params, x, y):
        w, b = params["w"], params["b"]
        z = jax.jit(lambda x, w: jnp.einsum("oi,bi->bo", w, x))(x, w)
        return jax.checkpoint(jax.nn.gelu)(b.reshape(1, -1) + z) * y[:, None]

    like = {"w": jnp.zeros((4, 5)), "b": jnp.zeros(4)}
    points = tree.stack([tree.random_like(jax.random.key(i), like) for i in range(2)])
    x, y = inputs(20), np.arange(20, dtype=np.float32)
    assert statistics.unit_paths(apply, like, (x, y), inputs_fn=tuple) == [("['w']", "['b']")]
    result = statistics.repair(
        apply, mixed(points, (0.5, 0.5)), points, (x, y), inputs_fn=tuple, progress=False
    )
    z = x @ np.asarray(result.params["w"]).T + np.asarray(result.params["b"])
    np.testing.assert_allclose(z.std(0), result.targets[0].std, rtol=1e-4)
    np.testing.assert_allclose(z.mean(0), result.targets[0].mean, atol=1e-4)


@pytest.mark.parametrize(
    "apply",
    [
        lambda w, x: x @ w["kernel"],  # no bias
        lambda w, x: x @ w["kernel"] + w["bias"][None] + jnp.sum(w["kernel"]),  # read elsewhere
        lambda w, x: jnp.sum(x @ w["kernel"]) + x @ w["kernel"] + w["bias"][None],
        lambda w, x: 2 * (x @ w["kernel"]) + w["bias"][None],  # not the contraction's own units
        lambda w, x: (x @ w["kernel"])[:, ::-1] + w["bias"][None],
        lambda w, x: (x[:4].T @ x[:4]) @ w["kernel"] + w["bias"][:, None],  # a bias by example
        lambda w, x: jax.lax.scan(
            lambda c, _: (c @ w["kernel"] + w["bias"][None], None), x, length=2
        )[0],
    ],
)
def test_a_network_without_such_a_layer_is_refused(apply):
    like = {"kernel": jnp.ones((5, 5)), "bias": jnp.ones(5)}
    assert statistics.unit_paths(apply, like, inputs()) == []
    with pytest.raises(ValueError, match="no layer to correct; expected a dense layer"):
        statistics.repair(apply, like, tree.stack([like] * 2), inputs(), progress=False)


def test_arguments_that_make_no_sense_are_refused():
    points, x = ends(), inputs()
    merged = mixed(points, (0.5, 0.5))
    repair = functools.partial(statistics.repair, perceptron, progress=False)
    with pytest.raises(ValueError, match="'fast'; expected one of sequential, closed_form"):
        repair(merged, points, x, method="fast")
    with pytest.raises(ValueError, match="'all'; expected one of both, scale, shift"):
        repair(merged, points, x, what="all")
    for weights in ((0.5, 0.6), (1.0,), (1.5, -0.5)):
        with pytest.raises(ValueError, match="expected 2 nonnegative numbers that sum to 1"):
            repair(merged, points, x, weights=weights)
    with pytest.raises(ValueError, match=r"no layer to correct among \[0\]\['kernel'\]"):
        repair(merged, points, x, select=lambda path: False)
    with pytest.raises(ValueError, match=r"kernel \[0\]\['kernel'\] are not finite"):
        repair(merged, points, np.where(x > 3, np.nan, x))
    with pytest.raises(ValueError, match=r"has leaf \[2\]\['bias'\] besides"):
        repair(merged[:2], points, x)


def test_a_model_is_compiled_once_for_all_networks_and_passes():
    traces = []

    def counted(params, x):
        traces.append(x.shape)
        return perceptron(params, x)

    points, source = ends(), batches.split(inputs(60), 20)
    statistics.repair(counted, mixed(points, (0.5, 0.5)), points, source, progress=False)
    first = len(traces)
    assert first <= 4  # the shapes, the first batch, the sum and its shapes
    statistics.repair(counted, mixed(points, (0.3, 0.7)), points, source, progress=False)
    assert len(traces) <= first + 1


@pytest.mark.parametrize("shard_parameters", [False, True])
def test_sharded_data_and_parameters_give_the_same_network(mesh, shard_parameters):
    points = tree.stack([network(i, (5, 8, 6)) for i in range(2)])
    source = batches.split(inputs(34), 16)
    want = statistics.repair(perceptron, mixed(points, (0.5, 0.5)), points, source, progress=False)
    with jax.set_mesh(mesh):
        if shard_parameters:
            points = jax.tree.map(
                lambda x: jax.device_put(
                    x, NamedSharding(mesh, P(*(None,) * (x.ndim - 1), "model"))
                ),
                points,
            )
        merged = mixed(points, (0.5, 0.5))
        got = statistics.repair(perceptron, merged, points, source, mesh=mesh, progress=False)
    for a, b in zip(jax.tree.leaves(want.params), jax.tree.leaves(got.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    if shard_parameters:
        assert got.params[0]["kernel"].sharding.spec[-1] == "model"


def test_in_bfloat16_dtypes_are_kept_and_deviations_come_close():
    points, x = tree.cast(ends(), jnp.bfloat16), jnp.asarray(inputs(), jnp.bfloat16)
    merged = mixed(points, (0.5, 0.5))
    result = statistics.repair(perceptron, merged, points, x, progress=False)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(result.params))
    for got, target in zip(result.after, result.targets, strict=True):
        np.testing.assert_allclose(got.std, target.std, rtol=0.05)


# ------------------------------------------------------------------------- what it is good for


DEPTH, WIDTH = 10, 64


@pytest.fixture(scope="module")
def deep():
    """Two digits networks of ten hidden layers, the second aligned to the first, and the data."""
    train = datasets.load("digits").train
    x, y = train.inputs.reshape((len(train.labels), -1)), train.labels
    widths = (x.shape[1], *(WIDTH,) * DEPTH, 10)
    optimizer = optax.rmsprop(1e-3)  # optax's Adam needs the promotion that these tests forbid

    @jax.jit
    def step(params, state, x, y):
        def loss(params):
            logits = perceptron(params, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    trained = []
    for seed in range(2):
        params = [
            {"kernel": layer["kernel"] * float(np.sqrt(2 / n)), "bias": 0.0 * layer["bias"]}
            for n, layer in zip(widths, network(seed, widths), strict=False)
        ]
        state = optimizer.init(params)
        source = batches.split((x, y), 64, key=jax.random.key(seed), drop_remainder=True)
        for epoch in range(12):
            for batch in source.epoch(epoch):
                params, state = step(params, state, *batch)
        trained.append(params)
    a, b = trained
    # Units are matched by the correlation of their pre-activations, layer by layer.
    for i in range(DEPTH):
        za, zb = (pre_activations_of(p, x, i) for p in (a, b))
        with np.errstate(invalid="ignore"):
            scores = np.nan_to_num(np.corrcoef(za.T, zb.T)[:WIDTH, WIDTH:])
        order = assignment.solve(scores).columns
        b = [dict(layer) for layer in b]
        b[i] = {"kernel": b[i]["kernel"][:, order], "bias": b[i]["bias"][order]}
        b[i + 1]["kernel"] = b[i + 1]["kernel"][order]
    return tree.stack([a, b]), x, y


def pre_activations_of(params, x, index):
    x = np.asarray(x)
    for layer in params[:index]:
        x = np.maximum(x @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"]), 0)
    return x @ np.asarray(params[index]["kernel"]) + np.asarray(params[index]["bias"])


def accuracy(params, x, y):
    return float(np.mean(np.argmax(np.asarray(perceptron(params, x)), -1) == np.asarray(y)))


def test_the_accuracy_of_a_deep_network_at_the_midpoint_rises(deep):
    points, x, y = deep
    for point in tree.unstack(points):
        assert accuracy(point, x, y) > 0.95
    merged = mixed(points, (0.5, 0.5))
    plain = accuracy(merged, x, y)
    source = batches.split((x, y), 300)
    result = statistics.repair(perceptron, merged, points, source, progress=False)
    assert accuracy(result.params, x, y) > plain + 0.3
    # The variance had collapsed, the more so the deeper, and is that of the endpoints now.
    collapse = [
        np.mean(b.std) / np.mean(t.std) for b, t in zip(result.before, result.targets, strict=True)
    ]
    assert collapse[DEPTH - 1] < 0.5 * collapse[0]
    for got, target in zip(result.after, result.targets, strict=True):
        alive = got.std > 0
        np.testing.assert_allclose(got.std[alive], target.std[alive], rtol=1e-3)
    closed = statistics.repair(
        perceptron, merged, points, source, method="closed_form", progress=False
    )
    assert accuracy(closed.params, x, y) > plain
