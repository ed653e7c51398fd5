"""Gauss-Newton and Fisher matrices: equal to dense ones, and made of exact Jacobian products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from geojax import batches, hessian, krylov, tree
from geojax.hessian import gauss_newton, output_losses

EPS = float(np.finfo(np.float32).eps)
softmax = output_losses.softmax_cross_entropy()
mse = output_losses.mse(labels="targets")


def network(params, batch):
    h = jnp.tanh(batch["x"] @ params["in"]["kernel"] + params["in"]["bias"][None])
    return h @ params["out"]["kernel"] + params["out"]["bias"][None]


def per_example(params, batch):
    z = network(params, batch)
    here = batch["labels"][:, None] == jnp.arange(z.shape[1], dtype=jnp.int32)[None]
    return jax.nn.logsumexp(z, axis=1) - jnp.sum(jnp.where(here, z, 0), axis=1)


def loss(params, batch):
    return softmax(network(params, batch), batch)


def problem(num=10, dtype=np.float32, sizes=(3, 5, 2)):
    r = np.random.default_rng(0)
    a, b, c = sizes
    params = {
        "in": {"kernel": r.normal(size=(a, b)), "bias": r.normal(size=b)},
        "out": {"kernel": r.normal(size=(b, c)), "bias": r.normal(size=c)},
    }
    data = {
        "x": (r.normal(size=(num, a)) * np.linspace(0.5, 2, num)[:, None]).astype(dtype),
        "targets": r.normal(size=(num, c)).astype(dtype),
        "labels": r.integers(0, c, num).astype(np.int32),
    }
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params), data


def flat(x, lead=0):
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(x)]
    return np.concatenate([leaf.reshape(*leaf.shape[:lead], -1) for leaf in leaves], -1)


def assert_close(got, want, rtol):
    """Equal to `rtol` of the largest entry."""
    got, want = flat(got), flat(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=rtol * np.abs(want).max())


def jacobian(fn, params):
    vector, unravel = ravel_pytree(params)
    return np.asarray(jax.jit(jax.jacobian(lambda p: fn(unravel(p))))(vector))


@pytest.fixture(scope="module")
def exact():
    """The problem in float64, its outputs, Jacobian, losses' gradients and Hessian."""
    with jax.enable_x64(True):
        params, data = problem(dtype=np.float64)
        dense = {
            "outputs": np.asarray(network(params, data)),
            "jacobian": jacobian(lambda p: network(p, data), params),
            "gradients": jacobian(lambda p: per_example(p, data), params),
            "hessian": jacobian(lambda p: ravel_pytree(jax.grad(loss)(p, data))[0], params),
        }
        return params, data, dense


def own_softmax(outputs, batch):
    return softmax(outputs, batch)


def dense_ggn(dense, name):
    z, j = dense["outputs"], dense["jacobian"]
    if name == "mse":
        return np.einsum("nca,ncb->ab", j, j) * 2 / z.size
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    curvature = p[:, :, None] * np.eye(2) - p[:, :, None] * p[:, None]
    return np.einsum("nca,ncd,ndb->ab", j, curvature, j) / len(z)


@pytest.mark.parametrize(
    ("name", "output_loss", "options"),
    [
        ("softmax", softmax, {}),
        ("mse", mse, {}),
        ("softmax", own_softmax, {}),
        ("softmax", softmax, {"jacobian": "transposed"}),
    ],
)
def test_the_operator_is_the_dense_gauss_newton_matrix(exact, name, output_loss, options):
    params, data, dense = exact
    with jax.enable_x64(True):
        source = batches.split(data, 8 if output_loss is softmax and not options else 10)
        operator = hessian.ggn(network, output_loss, params, source, **options)
        v = operator.random(jax.random.key(0))
        got, one = krylov.dense(operator), flat(operator(v))
        want = dense_ggn(dense, name)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
        np.testing.assert_allclose(one, want @ flat(v), rtol=1e-10, atol=1e-12)
    assert np.linalg.eigvalsh(got).min() > -1e-12
    assert operator.psd == (output_loss is not own_softmax)


def test_hessian_minus_gauss_newton_is_what_the_model_bends(exact):
    params, data, dense = exact
    with jax.enable_x64(True):
        source = batches.split(data, 8)
        whole = hessian.hessian(loss, params, source)
        bend = whole - hessian.ggn(network, softmax, params, source)
        want = dense["hessian"] - dense_ggn(dense, "softmax")
        assert np.abs(want).max() > 0.01
        np.testing.assert_allclose(krylov.dense(bend), want, rtol=0, atol=1e-10)


def test_closed_forms_of_linear_models():
    with jax.enable_x64(True):
        r = np.random.default_rng(0)
        x, n = r.normal(size=(12, 4)), 12
        w = {"w": jnp.asarray(r.normal(size=(4, 3)))}
        data = {"x": x, "labels": r.integers(0, 3, 12), "targets": r.normal(size=(12, 3))}

        def model(params, batch):
            return batch["x"] @ params["w"]

        p = np.asarray(jax.nn.softmax(x @ w["w"]))
        kronecker = np.einsum(
            "na,nb,ncd->acbd", x, x, p[:, :, None] * np.eye(3) - p[:, :, None] * p[:, None]
        ).reshape(12, 12)
        s = np.asarray(jax.nn.sigmoid(x @ w["w"][:, :1]))
        cases = [
            (softmax, w, data, kronecker / n),
            (mse, w, data, np.kron(x.T @ x, np.eye(3)) * 2 / (3 * n)),
            (
                output_losses.binary_cross_entropy(labels=lambda b: b["labels"] > 0),
                {"w": w["w"][:, :1]},
                data,
                x.T @ (s * (1 - s) * x) / n,
            ),
        ]
        for output_loss, params, batch, want in cases:
            fn = lambda p, b, f=output_loss: f(model(p, b), b)  # noqa: E731
            for operator in (
                hessian.hessian(fn, params, batches.split(batch, 6)),
                hessian.ggn(model, output_loss, params, batches.split(batch, 6)),
            ):
                np.testing.assert_allclose(krylov.dense(operator), want, rtol=1e-8, atol=1e-10)


def transformer(params, batch):
    """Causal attention and a gated layer, six times, in the dtype of the parameters."""

    def norm(h):
        return h / jnp.sqrt(jnp.mean(h * h, axis=-1, keepdims=True) + 1e-5)

    def block(h, w):
        q, k, v = (norm(h) @ w[name] for name in "qkv")
        scores = jnp.einsum("nid,njd->nij", q, k) / q.shape[-1] ** 0.5
        seen = jnp.tril(jnp.ones(scores.shape[1:], bool))[None]
        h = h + jax.nn.softmax(jnp.where(seen, scores, -1e9), axis=-1) @ v
        return h + jax.nn.gelu(norm(h) @ w["up"]) @ w["down"], None

    h = params["embedding"][batch["tokens"]] + params["position"][None]
    h, _ = jax.lax.scan(block, h, params["blocks"])
    return norm(h) @ params["embedding"].T


def test_float32_products_of_a_six_layer_transformer_are_exact_to_a_millionth():
    r = np.random.default_rng(0)
    shapes = {"q": (16, 16), "k": (16, 16), "v": (16, 16), "up": (16, 32), "down": (32, 16)}
    host = {
        "embedding": r.normal(size=(32, 16)) / 4,
        "position": r.normal(size=(8, 16)) / 4,
        "blocks": {k: r.normal(size=(6, *s)) / s[0] ** 0.5 for k, s in shapes.items()},
    }
    host = jax.tree.map(lambda x: x.astype(np.float32), host)
    tokens = r.integers(0, 32, (4, 9)).astype(np.int32)
    data = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
    v = jax.tree.map(lambda x: np.cos(np.arange(x.size)).reshape(x.shape).astype(np.float32), host)
    found = []
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype == np.float64):
            params, u = jax.tree.map(lambda x, d=dtype: jnp.asarray(x, d), (host, v))
            found.append(flat(hessian.ggn(transformer, softmax, params, data)(u)))
    error = np.linalg.norm(found[0] - found[1]) / np.linalg.norm(found[1])
    assert error < 1e-6


# ------------------------------------------------------------------------------------ custom rules


@jax.custom_vjp
def own_tanh(x):
    return jnp.tanh(x)


own_tanh.defvjp(lambda x: (jnp.tanh(x),) * 2, lambda y, g: (g * (1 - y * y),))


def custom_network(params, batch):
    h = own_tanh(batch["x"] @ params["in"]["kernel"] + params["in"]["bias"][None])
    return h @ params["out"]["kernel"] + params["out"]["bias"][None]


def test_a_model_with_a_custom_backward_rule_is_transposed_twice_when_asked():
    params, data = problem()
    v = tree.random_like(jax.random.key(0), params)
    plain = hessian.ggn(network, softmax, params, data)
    refused = hessian.ggn(custom_network, softmax, params, data)
    for call in (lambda: refused(v), lambda: refused.matmat(tree.stack([v, v]))):
        with pytest.raises(TypeError, match=r"own_tanh at .*jacobian='transposed'.*`hessian` work"):
            call()
    operator = hessian.ggn(custom_network, softmax, params, data, jacobian="transposed")
    assert_close(operator(v), plain(v), 16 * EPS)
    many = operator.matmat(tree.stack([v, tree.scale(2.0, v)]))
    assert_close(tree.unstack(many)[1], tree.scale(2.0, plain(v)), 16 * EPS)
    key = jax.random.key(1)
    drawn, same = (
        hessian.fisher(fn, softmax, params, data, key=key, jacobian=jacobian)(v)
        for fn, jacobian in ((custom_network, "transposed"), (network, "forward"))
    )
    assert_close(drawn, same, 16 * EPS)


def test_a_rematerialized_model_gives_the_same_product():
    params, data = problem()
    v = tree.random_like(jax.random.key(0), params)
    operator = hessian.ggn(jax.checkpoint(network), softmax, params, data)
    assert_close(operator(v), hessian.ggn(network, softmax, params, data)(v), 16 * EPS)


# ------------------------------------------------------------------------------------ masks, heads


def test_a_masked_loss_weighs_batches_by_its_mask():
    params, data = problem()
    data["mask"] = (np.arange(10) % 3 > 0).astype(np.float32)
    data["mask"][4:6] = 0
    v = tree.random_like(jax.random.key(0), params)
    masked = output_losses.softmax_cross_entropy(mask="mask")
    kept = jax.tree.map(lambda x: x[data["mask"] > 0], data)
    want = hessian.ggn(network, softmax, params, kept)(v)
    assert_close(hessian.ggn(network, masked, params, batches.split(data, 2))(v), want, 16 * EPS)
    total = hessian.ggn(network, masked, params, batches.split(data, 2), reduction="sum")
    assert_close(total(v), tree.scale(float(data["mask"].sum()), want), 16 * EPS)


def test_a_chunked_head_gives_the_matrix_of_the_whole_model_with_tied_weights():
    r = np.random.default_rng(0)
    params = {
        "embedding": jnp.asarray(r.normal(size=(8, 4)), jnp.float32),
        "kernel": jnp.asarray(r.normal(size=(4, 4)), jnp.float32),
    }
    tokens = r.integers(0, 8, (4, 6)).astype(np.int32)
    data = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}

    def hidden(params, batch):
        # On a mesh of Explicit axes the rows of a sharded table are not indexed but multiplied.
        onehot = batch["tokens"][..., None] == jnp.arange(8, dtype=jnp.int32)[None, None]
        h = jnp.tanh(onehot.astype(jnp.float32) @ params["embedding"] @ params["kernel"])
        return params["embedding"], h

    def head(embedding, h):
        return h @ embedding.T

    def whole(params, batch):
        return head(*hidden(params, batch))

    chunked = hessian.chunked_head(head, softmax, 2)
    v = tree.random_like(jax.random.key(0), params)
    operator = hessian.ggn(hidden, chunked, params, data)
    assert operator.psd
    want = hessian.ggn(whole, softmax, params, data)(v)
    assert_close(operator(v), want, 32 * EPS)
    # Sharded over the classes as well as over the examples.
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        shardings = {
            "embedding": NamedSharding(mesh, P("model", None)),
            "kernel": NamedSharding(mesh, P()),
        }
        sharded = hessian.ggn(hidden, chunked, jax.device_put(params, shardings), data, mesh=mesh)(
            v
        )
    assert_close(sharded, want, 1e-5)
    assert sharded["embedding"].sharding.is_equivalent_to(shardings["embedding"], 2)


# -------------------------------------------------------------------------------------- the Fishers


@pytest.mark.parametrize("name", ["softmax", "mse", "binary", "poisson"])
def test_the_sampled_fisher_is_unbiased_for_the_gauss_newton_matrix(exact, name):
    params, data, _ = exact
    output_loss = {
        "softmax": softmax,
        "mse": mse,
        "binary": output_losses.binary_cross_entropy(labels=lambda b: b["targets"] > 0),
        "poisson": output_losses.poisson(labels=lambda b: jnp.abs(b["targets"])),
    }[name]
    with jax.enable_x64(True):
        operator = hessian.fisher(
            network, output_loss, params, data, key=jax.random.key(0), num_samples=4000
        )
        got = krylov.dense(operator)
        want = krylov.dense(hessian.ggn(network, output_loss, params, data))
    np.testing.assert_allclose(got, want, rtol=0.1, atol=0.015 * np.abs(want).max())
    assert np.linalg.eigvalsh(got).min() > -1e-12 * np.abs(got).max()


def test_one_key_draws_one_matrix_however_the_data_is_cut():
    params, data = problem()
    v = tree.random_like(jax.random.key(0), params)

    def product(seed, source, **options):
        key = jax.random.key(seed)
        operator = hessian.fisher(network, softmax, params, source, key=key, **options)
        first, again = operator(v), operator(v)
        np.testing.assert_array_equal(flat(first), flat(again))
        return first

    one = product(0, data)
    shuffled = batches.split(data, 5, key=jax.random.key(5))
    for source in (batches.split(data, 5), shuffled, list(batches.split(data, 5))):
        assert_close(product(0, source), one, 16 * EPS)
    assert_close(product(0, data, microbatch=5), one, 16 * EPS)
    assert np.abs(flat(product(1, data)) - flat(one)).max() > 1e-2 * np.abs(flat(one)).max()


def test_each_example_has_the_gradient_of_one_drawn_label(exact):
    # Of two classes, g = onehot - p is (1 - p, p - 1) or (-p, p), p the first one's probability.
    params, data, dense = exact
    with jax.enable_x64(True):
        operator = hessian.fisher(network, softmax, params, data, key=jax.random.key(0))
        got = krylov.dense(operator)
    slopes = dense["jacobian"][:, 0] - dense["jacobian"][:, 1]
    terms = np.einsum("na,nb->nab", slopes, slopes).reshape(10, -1)
    squares, (gap,) = np.linalg.lstsq(terms.T, 10 * got.ravel(), rcond=None)[:2]
    assert gap < 1e-20
    p = np.exp(dense["outputs"]) / np.exp(dense["outputs"]).sum(-1, keepdims=True)
    first, second = (np.abs(squares - p[:, i] ** 2) < 1e-8 for i in (0, 1))
    assert (first | second).all()
    assert first.any()
    assert second.any()


def test_the_empirical_fisher_is_the_mean_of_outer_products(exact):
    params, data, dense = exact
    gradients = dense["gradients"]
    second, covariance = gradients.T @ gradients / 10, np.cov(gradients.T, bias=True)
    with jax.enable_x64(True):
        operator = hessian.empirical_fisher(per_example, params, data)
        np.testing.assert_allclose(krylov.dense(operator), second, rtol=0, atol=1e-10)
        source = batches.split(data, 8)  # the mean gradient is that of all the data
        centered = hessian.empirical_fisher(per_example, params, source, centered=True)
        np.testing.assert_allclose(krylov.dense(centered), covariance, rtol=0, atol=1e-10)
        v = centered.random(jax.random.key(0))
        one = hessian.empirical_fisher(per_example, params, data, centered=True)(v)
        np.testing.assert_allclose(flat(one), covariance @ flat(v), rtol=0, atol=1e-10)
        total = hessian.empirical_fisher(per_example, params, data, reduction="sum")
        np.testing.assert_allclose(flat(total(v)), 10 * second @ flat(v), rtol=0, atol=1e-10)


def flops(fn, *args):
    found = jax.jit(fn).lower(*args).compile().cost_analysis()
    return (found[0] if isinstance(found, list) else found)["flops"]


def test_products_cost_five_thirds_of_a_gradient_and_less_in_blocks():
    params, data = problem(num=256, sizes=(64, 64, 64))
    frozen = jax.tree.map(lambda _: None, params)
    gradient = flops(jax.grad(loss), params, data)
    one, many = gauss_newton._ggn_products(network, softmax, "forward", "highest", False)
    single = flops(one, params, frozen, params, None, data)
    assert single < 1.7 * gradient
    block = flops(many, params, frozen, tree.stack([params] * 4), None, data)
    assert block / 4 < 0.85 * single
    empirical, *_ = gauss_newton._empirical_products(per_example, "forward", "highest", False)
    assert flops(empirical, params, frozen, params, None, None, data) < 1.7 * gradient


def test_the_empirical_fisher_holds_no_gradient_of_an_example():
    # 256 gradients of five million numbers would be 5 GB.
    params = {
        "in": jax.ShapeDtypeStruct((1200, 2000), jnp.float32),
        "mid": jax.ShapeDtypeStruct((2000, 1300), jnp.float32),
    }
    batch = {"x": jax.ShapeDtypeStruct((256, 1200), jnp.float32)}
    assert tree.size(params) == 5_000_000

    def losses(params, batch):
        return jnp.mean(jnp.tanh(batch["x"] @ params["in"]) @ params["mid"], axis=1)

    one, *_ = gauss_newton._empirical_products(losses, "forward", "highest", False)
    frozen = jax.tree.map(lambda _: None, params)
    compiled = jax.jit(one).lower(params, frozen, params, None, None, batch).compile()
    memory = compiled.memory_analysis()
    total = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert total < 0.2e9


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "kind", "says"),
    [
        (
            lambda p, d: hessian.fisher(
                network, output_losses.huber(), p, d, key=jax.random.key(0)
            ),
            TypeError,
            "Huber is no likelihood.*`ggn` takes any loss",
        ),
        (
            lambda p, d: hessian.fisher(network, own_softmax, p, d, key=jax.random.key(0)),
            TypeError,
            "function is no likelihood",
        ),
        (
            lambda p, d: hessian.fisher(network, softmax, p, d, key=0),
            TypeError,
            "expected a typed key",
        ),
        (
            lambda p, d: hessian.fisher(
                network, softmax, p, d, key=jax.random.key(0), num_samples=0
            ),
            ValueError,
            "num_samples is 0",
        ),
        (
            lambda p, d: hessian.ggn(network, softmax, p, d, jacobian="reverse"),
            ValueError,
            "jacobian is 'reverse'",
        ),
        (
            lambda p, d: hessian.ggn(lambda p, b: (network(p, b), {}), softmax, p, d)(p),
            TypeError,
            "expected one floating array",
        ),
        (
            lambda p, d: hessian.ggn(lambda p, b: b["labels"], own_softmax, p, d)(p),
            TypeError,
            r"output \(root\) is int32",
        ),
        (
            lambda p, d: hessian.ggn(network, lambda o, b: o, p, d)(p),
            ValueError,
            "expected a scalar",
        ),
        (
            lambda p, d: hessian.empirical_fisher(loss, p, d)(p),
            ValueError,
            r"returned shape \(\); expected \(10, ...\)",
        ),
        (
            lambda p, d: hessian.ggn(lambda p, b, key: network(p, b), softmax, p, d),
            TypeError,
            "model_fn takes a key",
        ),
    ],
)
def test_misuse_is_refused_in_a_sentence(make, kind, says):
    with pytest.raises(kind, match=says):
        make(*problem())


# ------------------------------------------------------------------------------------------ meshes


def test_sharded_data_and_parameters_give_the_same_products(mesh):
    params, source = problem(num=8, sizes=(3, 4, 2))
    v = tree.random_like(jax.random.key(0), params)

    poisson = output_losses.poisson(labels=lambda batch: jnp.abs(batch["targets"]))
    explicit = AxisType.Explicit in mesh.axis_types

    def products(params, v, **options):
        key = jax.random.key(1)
        yield hessian.ggn(network, softmax, params, source, **options)(v)
        yield hessian.fisher(network, softmax, params, source, key=key, **options)(v)
        if explicit:  # where draws of counts go a way of their own
            yield hessian.fisher(network, poisson, params, source, key=key, **options)(v)
        yield hessian.empirical_fisher(per_example, params, source, centered=True, **options)(v)

    want = list(products(params, v))
    with jax.set_mesh(mesh):
        spec = lambda x: P(*(None,) * (x.ndim - 1), "model")  # noqa: E731
        shardings = jax.tree.map(lambda x: NamedSharding(mesh, spec(x)), params)
        params, v = jax.device_put((params, v), (shardings, shardings))
        got = list(products(params, v, mesh=mesh))
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, 1e-5)
        for x, p in zip(jax.tree.leaves(a), jax.tree.leaves(params), strict=True):
            assert x.sharding.is_equivalent_to(p.sharding, p.ndim)
