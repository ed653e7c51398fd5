"""One Hessian-vector product: exact in every mode, in the precision asked for, on any model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from geojax import hessian, tree
from geojax.hessian import output_losses, products

MODES = (
    "forward_over_reverse",
    "reverse_over_forward",
    "reverse_over_reverse",
    "finite_difference",
)
EPS = float(np.finfo(np.float32).eps)
softmax = output_losses.softmax_cross_entropy()


def network(params, x):
    h = jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"][None])
    return h @ params["out"]["kernel"] + params["out"]["bias"][None]


def cross_entropy(params, batch):
    x = batch["x"].astype(params["in"]["bias"].dtype)
    return softmax(network(params, x), batch)


def squared_error(params, batch):
    return jnp.mean(jnp.square(network(params, batch["x"]) - batch["targets"]))


def problem(sizes=(3, 5, 2), num=8, dtype=np.float64):
    r = np.random.default_rng(0)
    a, b, c = sizes
    params = {
        "in": {"kernel": r.normal(size=(a, b)) / a**0.5, "bias": r.normal(size=b)},
        "out": {"kernel": r.normal(size=(b, c)) / b**0.5, "bias": r.normal(size=c)},
    }
    batch = {"x": r.normal(size=(num, a)), "targets": r.normal(size=(num, c))}
    # Rounded to float32 in either case, so that both precisions see one problem.
    params, batch = jax.tree.map(
        lambda x: jnp.asarray(x.astype(np.float32), dtype), (params, batch)
    )
    return params, {**batch, "labels": jnp.asarray(r.integers(0, c, num))}


def wave(like):
    return jax.tree.map(
        lambda x: jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), like
    )


def flat(x, lead=0):
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(x)]
    return np.concatenate([leaf.reshape(*leaf.shape[:lead], -1) for leaf in leaves], -1)


def relative(got, want):
    return np.linalg.norm(flat(got) - flat(want)) / np.linalg.norm(flat(want))


def dense_hessian(loss, params, batch):
    vector, unravel = ravel_pytree(params)
    return np.asarray(jax.jit(jax.hessian(lambda p: loss(unravel(p), batch)))(vector))


@functools.cache
def product_of(loss, **options):
    return jax.jit(functools.partial(hessian.hvp, loss, **options))


@pytest.mark.parametrize("loss", [cross_entropy, squared_error])
def test_all_modes_equal_the_dense_hessian_in_float64(loss):
    with jax.enable_x64(True):
        params, batch = problem()
        vs = tree.stack([tree.random_like(jax.random.key(i), params) for i in range(5)])

        @jax.jit
        def all_modes(params, batch, vs):
            def one(v, mode):
                return hessian.hvp(loss, params, batch, v, mode=mode)

            return {mode: jax.vmap(functools.partial(one, mode=mode))(vs) for mode in MODES}

        want = flat(vs, 1) @ dense_hessian(loss, params, batch)
        for mode, got in all_modes(params, batch, vs).items():
            rtol = 1e-6 if mode == "finite_difference" else 1e-12
            np.testing.assert_allclose(flat(got, 1), want, rtol=0, atol=rtol * np.abs(want).max())


@pytest.mark.parametrize(("sizes", "num"), [((3, 5, 2), 8), ((64, 64, 10), 32)])
def test_a_float32_product_is_within_a_few_eps_of_the_float64_one(sizes, num):
    found = []
    for dtype, x64 in ((np.float32, False), (np.float64, True)):
        with jax.enable_x64(x64):
            params, batch = problem(sizes, num, dtype)
            found.append(flat(product_of(cross_entropy)(params, batch, wave(params))))
    assert relative(*found) < 8 * EPS


def test_eager_jitted_and_vmapped_products_are_one_and_can_be_differentiated():
    params, batch = problem(dtype=np.float32)
    v = wave(params)
    want = product_of(cross_entropy)(params, batch, v)
    assert relative(hessian.hvp(cross_entropy, params, batch, v), want) < 8 * EPS
    many = jax.jit(jax.vmap(product_of(cross_entropy), (None, None, 0)))
    stacked = tree.stack([v, tree.scale(2.0, v)])
    assert relative(tree.unstack(many(params, batch, stacked))[0], want) < 8 * EPS

    def curvature(v):
        return tree.vdot(v, product_of(cross_entropy)(params, batch, v))

    # The gradient of v^T H v in v is 2 H v.
    assert relative(jax.jit(jax.grad(curvature))(v), tree.scale(2.0, want)) < 16 * EPS


def test_unused_parameters_and_linear_losses_give_zeros():
    def loss(params, batch):
        return jnp.sum(batch * params["linear"]) + jnp.sum(params["square"] ** 2)

    @jax.jit
    def all_modes(params, batch):
        return {mode: hessian.hvp(loss, params, batch, params, mode=mode) for mode in MODES}

    params = {"linear": jnp.ones(3), "square": jnp.ones(2), "unused": jnp.ones((2, 2))}
    for mode, out in all_modes(params, jnp.arange(3.0)).items():
        tolerance = 2e-2 if mode == "finite_difference" else 0  # eps / cube root of eps, and sums
        np.testing.assert_allclose(out["linear"], 0, atol=tolerance)
        np.testing.assert_array_equal(out["unused"], 0)
        np.testing.assert_allclose(out["square"], 2, rtol=tolerance)


def test_the_finite_difference_converges_with_its_step_until_rounding():
    params, batch = problem(dtype=np.float32)
    v = wave(params)
    exact = product_of(cross_entropy)(params, batch, v)

    def error(step):
        options = {"mode": "finite_difference", "step": step}
        return relative(product_of(cross_entropy, **options)(params, batch, v), exact)

    assert 3 < error(0.2) / error(0.1) < 5  # second order
    default = product_of(cross_entropy, mode="finite_difference")(params, batch, v)
    assert relative(default, exact) < EPS ** (1 / 3)


@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_the_finite_difference_does_not_mind_the_length_of_the_vector(scale):
    params, batch = problem(dtype=np.float32)
    v = wave(params)
    product = product_of(cross_entropy, mode="finite_difference")
    want = tree.scale(scale, product(params, batch, v))
    got = product(params, batch, tree.scale(scale, v))
    assert relative(tree.scale(1 / scale, got), tree.scale(1 / scale, want)) < EPS ** (1 / 3)
    zero = product(params, batch, tree.scale(0.0, v))
    np.testing.assert_array_equal(flat(zero), 0)


def test_low_precision_parameters_give_float32_products():
    params, batch = problem(dtype=np.float32)
    v = wave(params)
    low = tree.cast(params, jnp.bfloat16)
    exact = product_of(cross_entropy)(tree.cast(low, jnp.float32), batch, v)
    rough = product_of(cross_entropy)(low, batch, v)
    fine = product_of(cross_entropy, upcast=True)(low, batch, v)
    assert {str(x.dtype) for x in jax.tree.leaves((rough, fine))} == {"float32"}
    assert relative(fine, exact) < 8 * EPS
    assert 2**-12 < relative(rough, exact) < 8 * 2**-8  # of bfloat16's own precision, no worse


@pytest.mark.parametrize(
    ("precision", "want"), [("highest", "HIGHEST"), ("high", "HIGH"), (None, None)]
)
def test_the_models_products_run_at_the_precision_asked_for(precision, want):
    params, batch = problem(dtype=np.float32)
    options = {} if precision == "highest" else {"precision": precision}  # the default is highest
    made = jax.make_jaxpr(functools.partial(hessian.hvp, cross_entropy, **options))
    found = {
        str(equation.params["precision"])
        for equation in products.equations(made(params, batch, params).jaxpr)
        if equation.primitive.name == "dot_general"
    }
    assert len(found) == 1
    assert (want or "None") in next(iter(found))


@functools.partial(jax.custom_vjp)
def own_tanh(x):
    return jnp.tanh(x)


own_tanh.defvjp(lambda x: (jnp.tanh(x),) * 2, lambda y, g: (g * (1 - y * y),))


def custom_loss(params, batch):
    h = own_tanh(batch["x"] @ params["in"]["kernel"] + params["in"]["bias"][None])
    return softmax(h @ params["out"]["kernel"] + params["out"]["bias"][None], batch)


def test_a_model_with_a_custom_backward_rule_has_a_hessian():
    params, batch = problem(dtype=np.float32)
    v = wave(params)
    want = product_of(cross_entropy)(params, batch, v)
    for mode in ("forward_over_reverse", "reverse_over_reverse"):
        assert relative(product_of(custom_loss, mode=mode)(params, batch, v), want) < 8 * EPS


def test_where_a_custom_rule_forbids_a_mode_the_error_names_the_function():
    params, batch = problem(dtype=np.float32)
    with pytest.raises(TypeError, match=r"own_tanh at .*custom_vjp.*mode='reverse_over_reverse'"):
        hessian.hvp(custom_loss, params, batch, params, mode="reverse_over_forward")


def test_rematerialized_layers_give_the_same_product_in_less_memory():
    # In a scan, as deep models are written for it; XLA's CPU backend merges unrolled copies again.
    def deep(layer, params, batch):
        h, _ = jax.lax.scan(lambda h, w: (layer(w, h), None), batch, params["layers"])
        return jnp.mean(h**2)

    def layer(w, h):
        for _ in range(3):
            h = jnp.tanh(h @ w)
        return h

    r = np.random.default_rng(0)
    params = {"layers": jnp.asarray(r.normal(size=(6, 8, 8)) / 3, jnp.float32)}
    batch = jnp.asarray(r.normal(size=(512, 8)), jnp.float32)
    found = []
    for body in (layer, jax.checkpoint(layer)):
        product = jax.jit(functools.partial(hessian.hvp, functools.partial(deep, body)))
        compiled = product.lower(params, batch, wave(params)).compile()
        memory = compiled.memory_analysis().temp_size_in_bytes
        found.append((compiled(params, batch, wave(params)), memory))
    assert relative(found[1][0], found[0][0]) < 8 * EPS
    assert found[1][1] < 0.5 * found[0][1]


def keyed_loss(params, batch, key):
    return jnp.sum(params["w"] ** 2 * jax.random.normal(key, (2,)))


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"mode": "forward"}, ValueError, "mode is 'forward'; expected one of forward_over"),
        ({"step": 0.1}, ValueError, "a positive step goes with 'finite_difference'"),
        ({"precision": "hi"}, ValueError, "precision is 'hi'; expected None, 'default'"),
        ({"params": {"w": np.arange(2)}}, TypeError, r"\['w'\] is int.*tree.partition"),
        ({"v": {"w": jnp.ones(3)}}, ValueError, r"\['w'\] has shape \(2,\) in params"),
        ({"v": {"u": jnp.ones(2)}}, ValueError, r"v lacks leaf \['w'\]"),
        ({"v": {"w": np.arange(2)}}, TypeError, r"v: leaf \['w'\] is int"),
        ({"loss": lambda p, b: p["w"]}, ValueError, r"shape \(2,\); expected a scalar"),
        ({"loss": lambda p, b: (p["w"][0], {})}, TypeError, "returned a tuple"),
        ({"loss": keyed_loss}, TypeError, "takes a key, and none was given; pass `key=jax"),
        ({"key": np.zeros(2, np.uint32)}, TypeError, "key is uint32; expected a typed key"),
        ({"params": {"w": jnp.ones(2, jnp.float16)}}, TypeError, "float16.*upcast=True"),
        (
            {"params": {"w": jnp.ones(2, jnp.bfloat16)}, "mode": "finite_difference"},
            TypeError,
            "bfloat16, whose spacing.*upcast=True",
        ),
    ],
)
def test_misuse_is_refused_in_a_sentence(change, kind, says):
    change = dict(change)
    loss = change.pop("loss", lambda p, b: jnp.sum(p["w"] ** 2))
    params = change.pop("params", {"w": jnp.ones(2)})
    v = change.pop("v", {"w": jnp.ones(2)})
    with pytest.raises(kind, match=says):
        hessian.hvp(loss, params, None, v, **change)


def test_a_loss_that_takes_a_key_gets_it():
    params, key = {"w": jnp.ones(2)}, jax.random.key(3)
    out = hessian.hvp(keyed_loss, params, None, params, key=key)
    np.testing.assert_allclose(out["w"], 2 * jax.random.normal(key, (2,)), rtol=4 * EPS)
