"""The one call: right eigenpairs of real losses, and refusals where there are none to have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from geojax import batches, hessian, krylov, models, objectives

KEY = jax.random.key(0)


def network(key=KEY, dtype=jnp.float32, sizes=(3, 5, 2)):
    keys = jax.random.split(key, 2 * len(sizes))
    return {
        f"layer{i}": {
            "w": jax.random.normal(keys[2 * i], (m, n), dtype) / np.sqrt(m).astype(dtype),
            "b": 0.1 * jax.random.normal(keys[2 * i + 1], (n,), dtype),
        }
        for i, (m, n) in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
    }


def logits(params, x):
    layers = list(params.values())
    for layer in layers[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"][None])
    return x @ layers[-1]["w"] + layers[-1]["b"][None]


def loss_fn(params, batch):
    scores = jax.nn.log_softmax(logits(params, batch["x"]).astype(batch["x"].dtype))
    return -jnp.mean(jnp.take_along_axis(scores, batch["y"][:, None], axis=1))


def examples(num=10, seed=0, width=3):
    r = np.random.default_rng(seed)
    x = r.standard_normal((num, width)).astype(np.float32)
    return {"x": x, "y": r.integers(0, 2, num).astype(np.int32)}


def flat(vectors):
    return np.concatenate([np.asarray(x).reshape(len(x), -1) for x in jax.tree.leaves(vectors)], 1)


def _is_block(b, params):
    """Whether b is d2 L / d leaf d params, at the place of a leaf."""
    return isinstance(b, dict) and b.keys() == params.keys()


def dense(params, data, fn=loss_fn):
    blocks = jax.jit(jax.hessian(fn))(params, data)
    n = sum(x.size for x in jax.tree.leaves(params))
    rows = [
        np.concatenate([np.asarray(b).reshape(p.size, -1) for b in jax.tree.leaves(block)], 1)
        for p, block in zip(
            jax.tree.leaves(params),
            jax.tree.leaves(blocks, is_leaf=lambda b: b is not blocks and _is_block(b, params)),
            strict=True,
        )
    ]  # fmt: skip
    return np.concatenate(rows).reshape(n, n)


@pytest.fixture(scope="module")
def data():
    return examples()


def test_top_three_of_a_network_agree_with_the_dense_hessian_in_float64(data):
    with jax.enable_x64(True):
        wide = {"x": data["x"].astype(np.float64), "y": data["y"]}
        params = network(dtype=jnp.float64)
        exact, vectors = np.linalg.eigh(dense(params, wide))
        order = np.argsort(-np.abs(exact))[:3]
        pairs = hessian.eigenthings(loss_fn, params, batches.split(wide, 8), 3, key=KEY, tol=1e-9)
        np.testing.assert_allclose(pairs.eigenvalues, exact[order], rtol=1e-8)
        cosines = np.abs((flat(pairs.eigenvectors) * vectors.T[order]).sum(1))
        assert cosines.min() > 1 - 1e-8
        assert pairs.converged.all()


def test_uneven_batches_have_the_hessian_of_the_whole(data):
    params = network()
    one = hessian.eigenthings(loss_fn, params, data, 3, key=KEY)
    cut = hessian.eigenthings(loss_fn, params, batches.split(data, 8), 3, key=KEY)
    np.testing.assert_allclose(cut.eigenvalues, one.eigenvalues, rtol=1e-5)


def test_a_bfloat16_network_is_within_five_percent_of_float32():
    data = examples(64, width=6)
    params = network(sizes=(6, 16, 2))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), half)

    def cast(params, batch):
        dtype = params["layer0"]["w"].dtype
        return loss_fn(params, {"x": batch["x"].astype(dtype), "y": batch["y"]}).astype(jnp.float32)

    full = hessian.eigenthings(cast, params, data, 2, key=KEY)
    low = hessian.eigenthings(cast, half, data, 2, key=KEY, tol=2e-2)
    np.testing.assert_allclose(low.eigenvalues, full.eigenvalues, rtol=5e-2)
    assert np.abs((flat(low.eigenvectors) * flat(full.eigenvectors)).sum(1)).min() > 0.99
    assert low.eigenvectors["layer0"]["w"].dtype == jnp.float32


def test_one_program_for_the_products_whatever_the_parameters(data):
    traces = []

    def counted(params, batch):
        traces.append(1)
        return loss_fn(params, batch)

    hessian.eigenthings(counted, network(), data, 2, key=KEY, probes=False)
    first = len(traces)
    assert first <= 2
    hessian.eigenthings(counted, network(jax.random.key(1)), data, 2, key=KEY, probes=False)
    assert len(traces) == first


def test_the_products_of_probing_are_counted(data):
    params = network()
    with_probes = hessian.eigenthings(loss_fn, params, data, 2, key=KEY)
    without = hessian.eigenthings(loss_fn, params, data, 2, key=KEY, probes=False)
    assert with_probes.num_matvecs == without.num_matvecs + 4
    np.testing.assert_array_equal(with_probes.eigenvalues, without.eigenvalues)


def test_a_selection_is_the_block_of_the_dense_hessian(data):
    params = network()
    pairs = hessian.eigenthings(loss_fn, params, data, 2, key=KEY, select="layer1/*")
    inner = jax.tree.map(lambda _: False, params)
    inner["layer1"] = jax.tree.map(lambda _: True, inner["layer1"])
    mask = np.concatenate(
        [
            np.full(p.size, m)
            for p, m in zip(jax.tree.leaves(params), jax.tree.leaves(inner), strict=True)
        ]
    )
    exact = np.linalg.eigvalsh(dense(params, data)[np.ix_(mask, mask)])
    order = np.argsort(-np.abs(exact))[:2]
    np.testing.assert_allclose(pairs.eigenvalues, exact[order], rtol=1e-5)
    assert pairs.eigenvectors["layer0"]["w"] is None


def test_global_configuration_is_left_alone(data):
    names = ("jax_enable_x64", "jax_default_matmul_precision")
    before = {name: getattr(jax.config, name) for name in names}
    hessian.eigenthings(loss_fn, network(), data, 1, key=KEY)
    for name, value in before.items():
        assert getattr(jax.config, name) == value


# ------------------------------------------------------------------------------------- refusals


def test_a_stop_gradient_that_matters_is_caught(data):
    @jax.jit
    def inner(params, batch):
        first = jax.lax.stop_gradient(params["layer0"]["w"])
        return loss_fn(params, batch) * (1 + jnp.sum(first**2))

    def stopped(params, batch):
        return inner(params, batch)

    with pytest.raises(krylov.OperatorError, match="stop_gradient.*put them into the") as error:
        hessian.eigenthings(stopped, network(), data, 2, key=KEY)
    assert error.value.property == "stop_gradient"


def test_a_rule_that_is_no_gradient_is_caught_by_the_symmetry_probe(data):
    @jax.custom_vjp
    def odd(w):
        return jnp.sum(w**2) / 2

    odd.defvjp(lambda w: (odd(w), w), lambda w, g: (g * jnp.cumsum(w.ravel()).reshape(w.shape),))

    def loss(params, batch):
        return loss_fn(params, batch) + odd(params["layer0"]["w"])

    with pytest.raises(krylov.OperatorError, match="not symmetric.*custom_vjp") as error:
        hessian.eigenthings(loss, network(), data, 2, key=KEY)
    assert error.value.property == "symmetry"


def test_normalisation_in_train_mode_is_caught(data):
    model = models.build("mlp", widths=[8], num_classes=2, norm="batch")
    params, state = model.init(KEY, data["x"][:1])
    source = batches.split((data["x"], data["y"]), 4)

    def train_mode(params, batch):
        outputs, _ = model.apply(params, state, batch[0], True)
        return -jnp.mean(
            jnp.take_along_axis(jax.nn.log_softmax(outputs), batch[1][:, None], axis=1)
        )

    with pytest.raises(krylov.OperatorError, match="BatchNorm in train mode.*evaluation_loss"):
        hessian.eigenthings(train_mode, params, source, 2, key=KEY)
    pairs = hessian.eigenthings(
        objectives.evaluation_loss(model.apply, state), params, source, 2, key=KEY
    )
    assert pairs.converged.all()


class Shuffling:
    """A loader that shuffles and drops the remainder, with another order on each pass."""

    def __init__(self, data, size):
        self.data, self.size, self.rng = data, size, np.random.default_rng(0)

    def __iter__(self):
        order = self.rng.permutation(len(self.data["y"]))
        for start in range(0, len(order) - self.size + 1, self.size):
            rows = order[start : start + self.size]
            yield {name: x[rows] for name, x in self.data.items()}


def test_a_loader_that_shuffles_and_drops_is_caught(data):
    with pytest.raises(
        krylov.OperatorError, match="data differ from one pass to the next"
    ) as error:
        hessian.eigenthings(loss_fn, network(), Shuffling(data, 4), 2, key=KEY)
    assert error.value.property == "determinism"


def test_a_loader_that_only_reorders_is_no_obstacle(data):
    params = network()
    pairs = hessian.eigenthings(loss_fn, params, Shuffling(data, 5), 2, key=KEY)
    still = hessian.eigenthings(loss_fn, params, data, 2, key=KEY)
    np.testing.assert_allclose(pairs.eigenvalues, still.eigenvalues, rtol=1e-5)


def test_dropout_needs_one_fixed_draw(data):
    def dropout(params, batch, key):
        keep = jax.random.bernoulli(key, 0.5, batch["x"].shape)
        return loss_fn(params, {"x": jnp.where(keep, batch["x"], 0), "y": batch["y"]})

    with pytest.raises(TypeError, match="takes a key.*loss_key"):
        hessian.eigenthings(dropout, network(), data, 2, key=KEY)
    runs = [
        hessian.eigenthings(dropout, network(), data, 2, key=KEY, loss_key=jax.random.key(seed))
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(runs[0].eigenvalues, runs[1].eigenvalues)
    assert np.abs(runs[0].eigenvalues - runs[2].eigenvalues).max() > 1e-3


def test_randomness_of_the_host_within_the_loss_is_caught(data):
    rng = np.random.default_rng(0)

    def noisy(params, batch):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        factor = jax.pure_callback(lambda: np.float32(rng.uniform(0.5, 1.5)), shape)
        return factor * loss_fn(params, batch)

    with pytest.raises(krylov.OperatorError, match="data are the same on each pass, so the loss"):
        hessian.eigenthings(noisy, network(), data, 2, key=KEY)


def test_a_mean_over_tokens_without_their_weight_is_caught():
    r = np.random.default_rng(0)
    batch = {
        "x": r.standard_normal((8, 3)).astype(np.float32),
        "mask": np.float32([1, 0, 0, 0, 1, 1, 1, 1]),
    }

    def masked(params, batch):
        values = jnp.sum((batch["x"] @ params["w"]) ** 2, axis=1) * batch["mask"]
        return jnp.sum(values) / jnp.maximum(jnp.sum(batch["mask"]), 1)

    params = {"w": jnp.ones((3, 2))}
    source = batches.split(batch, 6)
    with pytest.raises(krylov.OperatorError, match="unmasked tokens pass `weight_fn`"):
        hessian.eigenthings(masked, params, source, 2, key=KEY)
    right = hessian.eigenthings(
        masked, params, source, 2, key=KEY, weight_fn=lambda b: jnp.sum(b["mask"])
    )
    whole = hessian.eigenthings(masked, params, batch, 2, key=KEY)
    np.testing.assert_allclose(right.eigenvalues, whole.eigenvalues, rtol=1e-5)


def test_clean_losses_pass_the_probes(data):
    found = hessian.probe(loss_fn, network(), batches.split(data, 4), key=KEY)
    assert max(found.determinism, found.linearity, found.symmetry) < 1e-5


def test_options_of_the_solver_cannot_contradict_the_call(data):
    with pytest.raises(ValueError, match="options: tol are arguments of eigenthings itself"):
        hessian.eigenthings(loss_fn, network(), data, 2, key=KEY, options={"tol": 1e-3})


# --------------------------------------------------------------------------------------- meshes


@pytest.mark.parametrize("what", ["data", "parameters"])
def test_sharded_runs_equal_one_device(mesh, what):
    data = examples(16, width=8)
    params = network(sizes=(8, 16, 2))
    one = hessian.eigenthings(loss_fn, params, data, 2, key=KEY, options={"basis_size": 16})
    with jax.set_mesh(mesh):
        if what == "data":
            many = hessian.eigenthings(
                loss_fn, params, data, 2, key=KEY, mesh=mesh, options={"basis_size": 16}
            )
        else:
            specs = {
                "layer0": {"w": PartitionSpec(None, "model"), "b": PartitionSpec("model")},
                "layer1": {"w": PartitionSpec(), "b": PartitionSpec()},
            }
            placed = jax.tree.map(
                lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), params, specs
            )

            def gathered(params, batch):
                # The second layer contracts over the sharded axis of the first.
                first = jax.tree.map(_replicated, params["layer0"])
                return loss_fn({"layer0": first, "layer1": params["layer1"]}, batch)

            many = hessian.eigenthings(
                gathered, placed, data, 2, key=KEY, options={"basis_size": 16}
            )
            found = many.eigenvectors["layer0"]["w"]
            assert found.sharding.shard_shape(found.shape) == (2, 8, 8)
    np.testing.assert_allclose(many.eigenvalues, one.eigenvalues, rtol=1e-5)


def _replicated(x):
    sharding = jax.typeof(x).sharding
    if any(kind == jax.sharding.AxisType.Explicit for kind in sharding.mesh.axis_types):
        return jax.sharding.reshard(x, PartitionSpec())
    return x
