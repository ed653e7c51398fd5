"""The Hessian over a data set: one exact matrix however the data is cut, placed or read."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from geojax import batches, hessian, krylov, models, tree
from geojax.hessian import products, sources

EPS = float(np.finfo(np.float32).eps)


def network(params, x):
    h = jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"][None])
    return h @ params["out"]["kernel"] + params["out"]["bias"][None]


def per_example(params, batch):
    z = network(params, batch["x"])
    here = batch["labels"][:, None] == jnp.arange(z.shape[1], dtype=jnp.int32)[None]
    return jax.nn.logsumexp(z, axis=1) - jnp.sum(jnp.where(here, z, 0), axis=1)


def loss(params, batch):
    return jnp.mean(per_example(params, batch))


def problem(num=10, dtype=np.float32, sizes=(3, 5, 2)):
    r = np.random.default_rng(0)
    a, b, c = sizes
    params = {
        "in": {"kernel": r.normal(size=(a, b)), "bias": r.normal(size=b)},
        "out": {"kernel": r.normal(size=(b, c)), "bias": r.normal(size=c)},
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    x = r.normal(size=(num, a)) * np.linspace(0.5, 3, num)[:, None]
    return params, {"x": x.astype(dtype), "labels": r.integers(0, c, num).astype(np.int32)}


def flat(x, lead=0):
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(x)]
    return np.concatenate([leaf.reshape(*leaf.shape[:lead], -1) for leaf in leaves], -1)


def assert_close(got, want, rtol, lead=0):
    """Equal to `rtol` of the largest entry."""
    got, want = flat(got, lead), flat(want, lead)
    np.testing.assert_allclose(got, want, rtol=0, atol=rtol * np.abs(want).max())


def dense_hessian(fn, params, *args):
    vector, unravel = ravel_pytree(params)
    return np.asarray(jax.jit(jax.hessian(lambda p: fn(unravel(p), *args)))(vector))


@pytest.fixture(scope="module")
def exact():
    """The problem in float64 and the dense Hessian of its whole data."""
    with jax.enable_x64(True):
        params, data = problem(dtype=np.float64)
        return params, data, dense_hessian(loss, params, data)


@functools.cache
def product_of(fn):
    return jax.jit(functools.partial(hessian.hvp, fn))


class Loader:
    """Batches as a DataLoader gives them: a list of tensors each, of a class of its own."""

    class Tensor:
        def __init__(self, array):
            self.array = array

        def __array__(self, dtype=None, copy=None):
            return self.array

    def __init__(self, arrays, size):
        self.source = batches.split(arrays, size)

    def __iter__(self):
        for batch in self.source:
            yield {name: self.Tensor(x) for name, x in batch.items()}


@pytest.mark.parametrize("kind", ["one batch", "8 + 2", "shuffled", "list", "loader", "on device"])
def test_the_operator_is_the_dense_hessian_of_all_the_data(exact, kind):
    params, data, want = exact
    with jax.enable_x64(True):
        source = {
            "one batch": data,
            "8 + 2": batches.split(data, 8),
            "shuffled": batches.split(data, 8, key=jax.random.key(0)),
            "list": list(batches.split(data, 8)),
            "loader": Loader(data, 8),
            "on device": batches.split(jax.tree.map(jnp.asarray, data), 8),
        }[kind]
        operator = hessian.hessian(loss, params, source)
        v = operator.random(jax.random.key(1))
        np.testing.assert_allclose(krylov.dense(operator), want, rtol=0, atol=1e-12)
        np.testing.assert_allclose(flat(operator(v)), want @ flat(v), rtol=1e-10, atol=1e-12)


def test_the_mean_of_uneven_batches_is_not_the_mean_of_their_means(exact):
    # What an operator without weights would give, to show that these data can tell.
    params, data, want = exact
    with jax.enable_x64(True):
        parts = [dense_hessian(loss, params, batch) for batch in batches.split(data, 8)]
    assert np.abs(sum(parts) / 2 - want).max() > 0.05 * np.abs(want).max()
    np.testing.assert_allclose((8 * parts[0] + 2 * parts[1]) / 10, want, atol=1e-12)


@pytest.mark.parametrize("mode", ["reverse_over_forward", "reverse_over_reverse"])
def test_other_modes_give_the_same_matrix(exact, mode):
    params, data, want = exact
    with jax.enable_x64(True):
        operator = hessian.hessian(loss, params, data, mode=mode)
        np.testing.assert_allclose(krylov.dense(operator), want, rtol=0, atol=1e-12)


def test_the_sum_is_the_number_of_examples_times_the_mean(exact):
    params, data, want = exact
    with jax.enable_x64(True):
        for source in (batches.split(data, 8), list(batches.split(data, 8))):
            total = hessian.hessian(loss, params, source, reduction="sum")
            np.testing.assert_allclose(krylov.dense(total), 10 * want, rtol=0, atol=1e-12)
        dropped = batches.split(data, 8, drop_remainder=True)
        total = hessian.hessian(loss, params, dropped, reduction="sum")
        first = dense_hessian(loss, params, next(iter(dropped)))
        np.testing.assert_allclose(krylov.dense(total), 8 * first, rtol=0, atol=1e-12)


def masked_loss(params, batch):
    return jnp.sum(per_example(params, batch) * batch["mask"]) / jnp.sum(batch["mask"])


def masked_problem():
    params, data = problem()
    mask = (np.random.default_rng(1).uniform(size=10) < 0.5).astype(np.float32)
    mask[4:6] = 0  # a whole batch of two without a term: its mean is 0 / 0
    return params, {**data, "mask": mask}


def test_masked_terms_are_weighed_by_their_number():
    params, data = masked_problem()
    v = tree.random_like(jax.random.key(0), params)
    want = product_of(masked_loss)(params, data, v)
    count = lambda batch: jnp.sum(batch["mask"])  # noqa: E731
    source = batches.split(data, 2)
    operator = hessian.hessian(masked_loss, params, source, weight_fn=count)
    assert_close(operator(v), want, 1e-6)
    total = hessian.hessian(masked_loss, params, source, weight_fn=count, reduction="sum")
    assert_close(total(v), tree.scale(float(data["mask"].sum()), want), 1e-6)


def test_cutting_batches_smaller_changes_nothing():
    params, data = problem()
    v = tree.random_like(jax.random.key(0), params)
    want = product_of(loss)(params, data, v)
    shuffled = batches.split(data, 7, key=jax.random.key(0))
    # 3 + 3 + 3 + 1; two batches of 7 and 3 that become 3 + 3 + 1 and 3; and nothing to cut.
    for source, size in ((data, 3), (shuffled, 3), (list(batches.split(data, 7)), 3), (data, 100)):
        operator = hessian.hessian(loss, params, source, microbatch=size)
        assert_close(operator(v), want, 16 * EPS)


def normalized_loss(params, batch):
    z = network(params, batch["x"])
    z = (z - jnp.mean(z, axis=0, keepdims=True)) / (jnp.std(z, axis=0, keepdims=True) + 1e-3)
    return jnp.mean(jnp.tanh(z[:, 0]) * batch["x"][:, 0])


def test_a_loss_that_couples_its_examples_is_not_cut():
    params, data = problem()
    with pytest.raises(ValueError, match="not the mean over its examples.*BatchNorm.*Leave micro"):
        hessian.hessian(normalized_loss, params, data, microbatch=5)
    with pytest.raises(ValueError, match="without `weight_fn`"):
        hessian.hessian(masked_loss, *masked_problem(), microbatch=5)
    weight_fn = lambda batch: jnp.sum(batch["mask"])  # noqa: E731
    hessian.hessian(masked_loss, *masked_problem(), microbatch=5, weight_fn=weight_fn)
    # Whole, it is a function like any other.
    v = tree.random_like(jax.random.key(0), params)
    want = product_of(normalized_loss)(params, data, v)
    assert_close(hessian.hessian(normalized_loss, params, data)(v), want, 16 * EPS)


def dropout_loss(params, batch, key):
    keep = jax.random.bernoulli(key, 0.5, batch["x"].shape)
    return loss(params, {**batch, "x": jnp.where(keep, 2 * batch["x"], 0)})


def test_a_loss_with_dropout_is_one_matrix_for_each_key():
    params, data = problem()
    v = tree.random_like(jax.random.key(0), params)

    def product(seed, source, **options):
        operator = hessian.hessian(
            dropout_loss, params, source, key=jax.random.key(seed), **options
        )
        first, again = flat(operator(v)), flat(operator(v))
        np.testing.assert_array_equal(first, again)
        return first

    source = batches.split(data, 5)
    one = product(0, source)
    np.testing.assert_array_equal(product(0, list(source)), one)
    assert np.abs(product(1, source) - one).max() > 1e-2 * np.abs(one).max()
    # A mask of its own for each piece is no coupling of the examples.
    np.testing.assert_array_equal(product(0, data, microbatch=5), one)
    # Two batches draw two masks: with one for both, the halves of doubled data would be equal.
    half = jax.tree.map(lambda x: x[:5], data)
    doubled = product(0, [half, half])
    assert np.abs(doubled - product(0, half)).max() > 1e-2 * np.abs(one).max()


def test_streamed_batches_and_a_scan_on_the_device_give_the_same_product():
    params, data = problem()
    v, key = tree.random_like(jax.random.key(0), params), jax.random.key(1)
    streamed = hessian.hessian(dropout_loss, params, list(batches.split(data, 5)), key=key)(v)
    one, _ = products.hessian_products(dropout_loss, "forward_over_reverse", "highest", False, None)
    source = sources.numbered(batches.split(jax.tree.map(jnp.asarray, data), 5))
    frozen = jax.tree.map(lambda _: None, params)
    scanned = batches.mean(one, source, loop="scan")(params, frozen, v, key)
    assert_close(scanned, streamed, 16 * EPS)


def test_a_loss_that_asks_for_a_key_is_refused_without_one():
    params, data = problem()
    with pytest.raises(TypeError, match="loss_fn takes a key, and none was given.*one matrix"):
        hessian.hessian(dropout_loss, params, data)


def test_a_generator_is_refused_when_the_operator_is_made():
    params, data = problem()
    with pytest.raises(TypeError, match="re-iterable"):
        hessian.hessian(loss, params, (b for b in [data]))


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"reduction": "none"}, ValueError, "reduction is 'none'; expected 'mean' or 'sum'"),
        ({"microbatch": 0}, ValueError, "microbatch is 0; expected a positive number"),
        ({"mode": "exact"}, ValueError, "mode is 'exact'; expected one of"),
        ({"precision": "double"}, ValueError, "precision is 'double'"),
        ({"select": "conv"}, ValueError, "'conv' selects no floating leaf; the paths are in/bias"),
        ({"key": 0}, TypeError, "expected a typed key"),
    ],
)
def test_misuse_is_refused_before_any_work(options, kind, says):
    with pytest.raises(kind, match=says):
        hessian.hessian(loss, *problem(), **options)


def test_what_is_frozen_must_be_arrays():
    params, data = problem()
    with pytest.raises(TypeError, match="'name'.*is a str; expected arrays"):
        hessian.hessian(loss, {**params, "name": "net"}, data, select="in")


# ------------------------------------------------------------------------------------- compilation


def test_products_are_compiled_once_for_a_loss_and_a_batch_shape():
    traces = []

    def counted(params, batch):
        traces.append(batch["x"].shape)
        return loss(params, batch)

    params, data = problem()
    v = tree.random_like(jax.random.key(0), params)
    for factor in (1.0, 2.0):
        here = tree.scale(factor, params)
        operator = hessian.hessian(counted, here, batches.split(data, 4))
        assert_close(operator(v), product_of(loss)(here, data, v), 16 * EPS)
        operator(v)
    assert traces == [(4, 3), (2, 3)]
    vectors = tree.stack([v, v])
    operator.matmat(vectors)
    operator.matmat(vectors)
    assert traces == [(4, 3), (2, 3)] * 2


def test_neither_parameters_nor_data_become_constants_of_the_program():
    params, data = problem(num=400, sizes=(3, 300, 2))
    operator = hessian.hessian(loss, params, data)
    one, many = products.hessian_products(loss, "forward_over_reverse", "highest", False, None)
    frozen = jax.tree.map(lambda _: None, params)
    for fn, v in ((one, params), (many, tree.stack([params] * 2))):
        made = jax.make_jaxpr(fn)(params, frozen, v, None, data)
        assert sum(np.size(c) for c in made.consts) == 0
        text = jax.jit(fn).lower(params, frozen, v, None, data).as_text()
        constants = re.findall(r"constant dense<(?:\"|\[).*?> : tensor<([0-9x]*)x\w+>", text)
        assert all(np.prod([int(n) for n in shape.split("x")]) < 256 for shape in constants)
    assert operator.size == 3 * 300 + 300 + 600 + 2


def flops(fn, *args):
    found = jax.jit(fn).lower(*args).compile().cost_analysis()
    return (found[0] if isinstance(found, list) else found)["flops"]


def test_a_product_costs_less_than_three_gradients_and_four_share_their_primal_pass():
    params, data = problem(num=256, sizes=(64, 64, 64))
    frozen = jax.tree.map(lambda _: None, params)
    one, many = products.hessian_products(loss, "forward_over_reverse", "highest", False, None)
    single = flops(one, params, frozen, params, None, data)
    assert single < 2.7 * flops(jax.grad(loss), params, data)
    block = flops(many, params, frozen, tree.stack([params] * 4), None, data)
    assert block / 4 < 0.85 * single


def convolution(params, batch):
    out = jax.lax.conv_general_dilated(
        batch["x"], params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.mean(jnp.tanh(jnp.mean(out, axis=(1, 2)) @ params["out"]) ** 2)


def test_blocks_of_vectors_equal_single_products_for_convolutions_too():
    r = np.random.default_rng(0)
    params = {
        "kernel": jnp.asarray(r.normal(size=(3, 3, 2, 4)), jnp.float32),
        "out": jnp.asarray(r.normal(size=(4, 2)), jnp.float32),
    }
    data = {"x": r.normal(size=(4, 5, 5, 2)).astype(np.float32)}
    operator = hessian.hessian(convolution, params, data)
    vectors = tree.stack([operator.random(jax.random.key(i)) for i in range(4)])
    want = np.stack([flat(operator(v)) for v in tree.unstack(vectors)])
    np.testing.assert_allclose(
        flat(operator.matmat(vectors), 1), want, rtol=0, atol=32 * EPS * np.abs(want).max()
    )


@pytest.mark.parametrize("mode", ["reverse_over_forward", "finite_difference"])
def test_blocks_of_vectors_equal_single_products_in_every_mode(mode):
    params, data = problem()
    operator = hessian.hessian(loss, params, data, mode=mode)
    vectors = tree.stack([operator.random(jax.random.key(i)) for i in range(2)])
    want = np.stack([flat(operator(v)) for v in tree.unstack(vectors)])
    rtol = 32 * EPS if mode != "finite_difference" else EPS ** (1 / 3)
    np.testing.assert_allclose(
        flat(operator.matmat(vectors), 1), want, rtol=0, atol=rtol * np.abs(want).max()
    )


# ------------------------------------------------------------------------ parts of the parameters


def indices(params, spec):
    """Where the selected leaves lie in the flattened parameters."""
    chosen = tree.paths(hessian.select(params, spec)[0])
    out, start = [], 0
    for path, leaf in zip(tree.paths(params), jax.tree.leaves(params), strict=True):
        if path in chosen:
            out.extend(range(start, start + leaf.size))
        start += leaf.size
    return np.array(out)


@pytest.mark.parametrize(
    "spec", ["in", "*/bias", re.compile("kernel$"), lambda path, leaf: leaf.ndim == 2]
)
def test_a_selection_gives_the_block_of_the_dense_hessian(exact, spec):
    params, data, want = exact
    with jax.enable_x64(True):
        got = krylov.dense(hessian.hessian(loss, params, batches.split(data, 8), select=spec))
    rows = indices(params, spec)
    assert 0 < len(rows) < len(want)
    np.testing.assert_allclose(got, want[np.ix_(rows, rows)], rtol=0, atol=1e-12)


def test_layer_blocks_are_the_diagonal_of_the_dense_hessian(exact):
    params, data, want = exact
    with jax.enable_x64(True):
        blocks = hessian.layer_blocks(loss, params, batches.split(data, 8))
        assert list(blocks) == ["in", "out"]
        for layer, operator in blocks.items():
            rows = indices(params, layer)
            block = want[np.ix_(rows, rows)]
            np.testing.assert_allclose(krylov.dense(operator), block, rtol=0, atol=1e-12)
        groups = {"weights": "*/kernel", "biases": "*/bias"}
        sizes = {
            name: operator.size
            for name, operator in hessian.layer_blocks(loss, params, data, groups=groups).items()
        }
    assert sizes == {"weights": 25, "biases": 7}


@pytest.mark.parametrize(("rows", "columns"), [("out", "in"), ("in", ["in/bias", "out/bias"])])
def test_an_off_diagonal_block_is_a_slice_of_the_dense_hessian(exact, rows, columns):
    params, data, want = exact
    with jax.enable_x64(True):
        product = hessian.off_diagonal_block(
            loss, params, batches.split(data, 8), rows, columns, reduction="sum"
        )
        v = tree.random_like(jax.random.key(0), hessian.select(params, columns)[0])
        out = product(v)
        block = want[np.ix_(indices(params, rows), indices(params, columns))]
        np.testing.assert_allclose(flat(out), 10 * block @ flat(v), rtol=0, atol=1e-11)
        assert tree.paths(out) == tree.paths(hessian.select(params, rows)[0])
        with pytest.raises(ValueError, match="the columns and the vector"):
            product(params)


def tied_loss(params, batch):
    h = jnp.tanh(params["embedding"][batch["x"]] @ params["kernel"])
    z = h @ params["embedding"].T  # the head is the embedding
    return jnp.mean(jax.nn.logsumexp(z, axis=1) - z[:, 0])


def test_a_weight_used_twice_has_the_hessian_of_both_uses():
    r = np.random.default_rng(0)
    with jax.enable_x64(True):
        params = {
            "embedding": jnp.asarray(r.normal(size=(5, 3))),
            "kernel": jnp.asarray(r.normal(size=(3, 3))),
        }
        data = {"x": np.array([0, 3, 4, 1])}
        got = krylov.dense(hessian.hessian(tied_loss, params, data))
        np.testing.assert_allclose(got, dense_hessian(tied_loss, params, data), rtol=0, atol=1e-10)


# ---------------------------------------------------------------------------------- how good it is


def test_the_relative_difference_tells_a_product_in_tensorfloat32_from_an_exact_one():
    def rounded(params, batch):
        tf32 = functools.partial(jax.lax.reduce_precision, exponent_bits=8, mantissa_bits=10)
        h = jnp.tanh(tf32(batch["x"]) @ tf32(params["in"]["kernel"]) + params["in"]["bias"][None])
        z = tf32(h) @ tf32(params["out"]["kernel"]) + params["out"]["bias"][None]
        return jnp.mean(jax.nn.logsumexp(z, axis=1) - z[:, 0])

    def unrounded(params, batch):
        z = network(params, batch["x"])
        return jnp.mean(jax.nn.logsumexp(z, axis=1) - z[:, 0])

    params, data = problem(num=64, sizes=(16, 32, 8))
    reference = hessian.hessian(unrounded, params, data)
    key = jax.random.key(0)
    rough = hessian.relative_difference(hessian.hessian(rounded, params, data), reference, key=key)
    assert 2**-12 < rough < 16 * 2**-11  # a rounding to 11 bits errs by 2^-11 at most
    again = hessian.hessian(unrounded, params, data)
    assert hessian.relative_difference(again, reference, key=key) == 0
    assert hessian.relative_difference(1.5 * reference, reference, key=key) == pytest.approx(0.5)
    zero = 0.0 * reference
    assert hessian.relative_difference(zero, zero, key=key) == 0
    assert hessian.relative_difference(reference, zero, key=key) == np.inf
    with pytest.raises(ValueError, match="differ in structure"):
        hessian.relative_difference(
            hessian.hessian(unrounded, params, data, select="in"), reference, key=key
        )


def test_the_global_configuration_is_left_alone():
    before = dict(jax.config.values)
    params, data = problem()
    operator = hessian.hessian(loss, params, data)
    operator(params)
    assert dict(jax.config.values) == before


# ----------------------------------------------------------------------------------------- meshes


def test_sharded_data_and_parameters_give_the_same_products(mesh):
    params, data = problem(num=8, sizes=(3, 4, 2))
    vectors = tree.random_like(jax.random.key(0), tree.stack([params, params]))
    want = hessian.hessian(loss, params, data).matmat(vectors)
    with jax.set_mesh(mesh):
        spec = lambda x: P(*(None,) * (x.ndim - 1), "model")  # noqa: E731
        shardings = jax.tree.map(lambda x: NamedSharding(mesh, spec(x)), params)
        params = jax.device_put(params, shardings)
        operator = hessian.hessian(loss, params, data, mesh=mesh)
        many = operator.matmat(vectors)
        out = operator(tree.unstack(vectors)[1])
        total = hessian.hessian(loss, params, [data], mesh=mesh, reduction="sum")(
            tree.unstack(vectors)[1]
        )
    assert_close(many, want, 1e-5, lead=1)
    assert_close(out, tree.unstack(want)[1], 1e-5)
    assert_close(total, tree.scale(8.0, tree.unstack(want)[1]), 1e-5)
    for x, xs, p in zip(*map(jax.tree.leaves, (out, many, params)), strict=True):
        assert x.sharding.is_equivalent_to(p.sharding, p.ndim)
        stacked = NamedSharding(mesh, P(None, *p.sharding.spec))
        assert xs.sharding.is_equivalent_to(stacked, xs.ndim)


def test_examples_left_over_by_the_mesh_count_like_the_others(mesh):
    params, data = problem(num=10)  # 8 over 4 devices, and 2
    v = tree.random_like(jax.random.key(0), params)
    with jax.set_mesh(mesh):
        got = hessian.hessian(loss, params, data, mesh=mesh)(v)
    assert_close(got, product_of(loss)(params, data, v), 1e-5)


def test_data_that_lies_on_the_mesh_is_used_there(mesh):
    params, data = problem(num=16)
    v = tree.random_like(jax.random.key(0), params)
    key = jax.random.key(1)
    want = product_of(loss)(params, data, v)
    masked = hessian.hessian(dropout_loss, params, data, key=key)(v)
    with jax.set_mesh(mesh):
        arrays = jax.device_put(data, NamedSharding(mesh, P("data")))
        cut = hessian.hessian(loss, params, arrays, microbatch=8)(v)
        keyed = hessian.hessian(dropout_loss, params, arrays, key=key)(v)
    assert_close(cut, want, 1e-5)
    assert_close(keyed, masked, 1e-5)


# ------------------------------------------------------------------------------------- frameworks


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(jnp.tanh(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.norm(self.first(x))))


def adapted(kind):
    if kind == "nnx":
        return models.from_nnx(Nnx(nnx.Rngs(0)))
    model = models.from_linen(Linen())
    return model.apply, *model.init(jax.random.key(0), jnp.zeros((1, 3)))


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_adapted_flax_modules_keep_their_state_and_have_the_dense_hessian(kind):
    apply_fn, params, state = adapted(kind)
    before = jax.tree.map(np.array, state)
    _, data = problem()

    def evaluated(params, batch):
        z, _ = apply_fn(params, state, batch["x"], False)
        return jnp.mean(jax.nn.logsumexp(z, axis=1) - z[:, 0])

    operator = hessian.hessian(evaluated, params, Loader(data, 5))
    v = operator.random(jax.random.key(0))
    assert_close(operator(v), product_of(evaluated)(params, data, v), 32 * EPS)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert operator.size == tree.size(params)


@jax.tree_util.register_pytree_with_keys_class
class Module:
    """A module that is its own pytree, with an activation that is no array beside its weights."""

    def __init__(self, weight, activation):
        self.weight, self.activation = weight, activation

    def tree_flatten_with_keys(self):
        keys = [jax.tree_util.GetAttrKey(name) for name in ("weight", "activation")]
        return list(zip(keys, (self.weight, self.activation), strict=True)), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)

    def __call__(self, x):
        return self.activation(x @ self.weight)


def test_a_module_that_is_a_pytree_is_partitioned_like_any_other():
    module = Module(jnp.arange(6.0).reshape(3, 2) / 5, jnp.tanh)
    params, static = tree.partition(module)

    def module_loss(params, batch):
        return jnp.mean(tree.merge(params, static)(batch["x"] / 10) ** 2)

    _, data = problem()
    operator = hessian.hessian(module_loss, params, data, select="weight")
    assert tree.paths(operator.like) == [".weight"]
    out = operator(params)
    assert isinstance(out, Module)
    assert_close(out, product_of(module_loss)(params, data, params), 16 * EPS)
    with pytest.raises(TypeError, match=r"\.activation is .*tree\.partition"):
        hessian.hessian(module_loss, module, data)


def test_copies_of_a_tied_weight_are_pointed_out():
    _, data = problem()
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(5, 5)), jnp.float32)
    params = {"embedding": weight, "head": jnp.array(weight), "bias": jnp.zeros(25)}

    def copied(params, batch):
        return jnp.sum(params["embedding"] * params["head"])

    with pytest.warns(UserWarning, match="embedding and head hold the same numbers.*store it once"):
        hessian.hessian(copied, params, data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hessian.hessian(copied, {**params, "head": 2 * weight}, data)
        hessian.hessian(copied, {"embedding": jnp.zeros((5, 5)), "head": jnp.zeros((5, 5))}, data)
