"""Pytree algebra: stacks, combinations, inner products, random vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from geojax import tree

EPS = float(jnp.finfo(jnp.float32).eps)


def odd_tree(seed: int = 0):
    """Nested containers; 0-d, empty, bfloat16 and integer leaves."""
    r = np.random.default_rng(seed)
    return {
        "dense": {"kernel": jnp.asarray(r.normal(size=(3, 4)), jnp.float32)},
        "scalar": jnp.asarray(r.normal(), jnp.float32),
        "list": [jnp.zeros((0, 5)), jnp.asarray(r.normal(size=7), jnp.bfloat16)],
        "step": jnp.asarray(r.integers(9), jnp.int32),
    }


def floats(seed: int = 0):
    return tree.partition(odd_tree(seed))[0]


def test_stack_then_unstack_is_exact_for_every_kind_of_leaf():
    trees = [odd_tree(i) for i in range(3)]
    stacked = tree.stack(trees)
    assert stacked["list"][1].dtype == jnp.bfloat16
    assert stacked["scalar"].shape == (3,)
    assert tree.num_points(stacked) == 3
    for before, after in zip(trees, tree.unstack(stacked), strict=True):
        tree.check_same(before, after, names=("before", "after"))
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_partition_then_merge_is_the_tree_also_with_leaves_that_are_no_arrays():
    module = {"w": jnp.ones(2), "activation": jax.nn.relu, "step": 3, "name": "mlp"}
    selected, rest = tree.partition(module)
    assert jax.tree.leaves(selected) == [module["w"]]
    assert tree.merge(selected, rest) == module


@settings(max_examples=12, deadline=None)
@given(n=st.sampled_from([1, 2, 9]), seed=st.integers(0, 99))
def test_combine_equals_numpy_in_float64(n, seed):
    r = np.random.default_rng(seed)
    points = {"a": r.normal(size=(n, 3, 2)).astype(np.float32), "b": r.normal(size=n).astype("f4")}
    weights = r.normal(size=n).astype(np.float32)
    out = tree.combine(points, weights)
    for name, leaf in points.items():
        exact = np.tensordot(weights.astype(np.float64), leaf.astype(np.float64), 1)
        size = np.tensordot(abs(weights.astype(np.float64)), abs(leaf.astype(np.float64)), 1)
        np.testing.assert_array_less(abs(out[name] - exact), n * EPS * size + 1e-30)


def test_combine_with_a_unit_vector_returns_the_point_bit_for_bit():
    trees = [floats(i) for i in range(4)]
    points = tree.stack(trees)
    for i, point in enumerate(trees):
        out = tree.combine(points, jnp.eye(4)[i])
        for a, b in zip(jax.tree.leaves(point), jax.tree.leaves(out), strict=True):
            assert a.dtype == b.dtype
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_combine_accumulates_bfloat16_in_float32():
    # 1 + 200 * 2^-8 rounds away every term when the sum itself is kept in bfloat16.
    points = {"w": jnp.concatenate([jnp.ones(1), jnp.full(200, 2.0**-8)]).astype(jnp.bfloat16)}
    assert float(tree.combine(points, jnp.ones(201))["w"]) == pytest.approx(1 + 200 / 256, rel=4e-3)


def test_batched_weights_equal_vmap_equal_one_by_one_eager_and_jitted():
    points = tree.stack([floats(i) for i in range(3)])
    weights = jax.random.normal(jax.random.key(0), (2, 5, 3))
    batched = tree.combine(points, weights)
    mapped = jax.vmap(jax.vmap(tree.combine, (None, 0)), (None, 0))(points, weights)
    jitted = jax.jit(tree.combine)(points, weights)
    one = tree.combine(points, weights[1, 4])
    assert batched["dense"]["kernel"].shape == (2, 5, 3, 4)
    for a, b, c, d in zip(*map(jax.tree.leaves, (batched, mapped, jitted, one)), strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=4 * EPS, atol=1e-6)
        np.testing.assert_allclose(np.float32(a), np.float32(c), rtol=4 * EPS, atol=1e-6)
        np.testing.assert_allclose(np.float32(a[1, 4]), np.float32(d), rtol=4 * EPS, atol=1e-6)


def test_the_gradient_through_combine_is_the_weight_times_the_gradient_at_the_point():
    points = tree.stack([{"w": jnp.arange(3.0)}, {"w": jnp.ones(3)}])
    weights = jnp.array([0.25, 0.75])
    grads = jax.grad(lambda p: jnp.sum(tree.combine(p, weights)["w"] ** 2))(points)
    at_point = 2 * tree.combine(points, weights)["w"]
    np.testing.assert_allclose(grads["w"], jnp.outer(weights, at_point), rtol=4 * EPS)


def test_float64_is_kept_and_used():
    with jax.enable_x64(True):
        points = {"w": jnp.array([[1.0], [1e-12]], jnp.float64)}
        out = tree.combine(points, jnp.ones(2, jnp.float64))["w"]
        assert out.dtype == jnp.float64
        assert float(out[0]) == 1.0 + 1e-12
        assert tree.vdot(points, points).dtype == jnp.float64
        assert tree.random_like(jax.random.key(0), points)["w"].dtype == jnp.float64


def test_vdot_norm_axpy_and_scale_agree_with_flat_vectors():
    x, y = floats(1), floats(2)

    def flat(t):
        return np.concatenate([np.ravel(np.float64(leaf)) for leaf in jax.tree.leaves(t)])

    np.testing.assert_allclose(tree.vdot(x, y), flat(x) @ flat(y), rtol=32 * EPS)
    np.testing.assert_allclose(tree.norm(x), np.linalg.norm(flat(x)), rtol=32 * EPS)
    # bfloat16 leaves round the result to 8 bits.
    np.testing.assert_allclose(flat(tree.axpy(0.5, x, y)), 0.5 * flat(x) + flat(y), rtol=2**-7)
    np.testing.assert_allclose(flat(tree.scale(-2.0, x)), -2 * flat(x), rtol=2**-7)
    assert tree.axpy(0.5, x, y)["list"][1].dtype == jnp.bfloat16
    assert tree.size(x) == 3 * 4 + 1 + 0 + 7


@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1e25])
def test_norm_neither_overflows_nor_underflows(magnitude):
    x = {"w": jnp.full(16, magnitude, jnp.float32)}
    np.testing.assert_allclose(tree.norm(x), 4 * magnitude, rtol=8 * EPS)


def test_norm_has_a_gradient_everywhere_and_tells_non_finite_entries():
    x = {"w": jnp.array([3.0, 4.0])}
    np.testing.assert_allclose(jax.grad(tree.norm)(x)["w"], [0.6, 0.8], rtol=4 * EPS)
    zero = {"w": jnp.zeros(2)}
    assert float(tree.norm(zero)) == 0.0
    np.testing.assert_array_equal(jax.grad(tree.norm)(zero)["w"], [0.0, 0.0])
    assert np.isnan(tree.norm({"w": jnp.array([1.0, np.nan])}))
    assert np.isinf(tree.norm({"w": jnp.array([1.0, np.inf])}))


def test_random_like_depends_on_the_path_alone():
    key = jax.random.key(3)
    whole = tree.random_like(key, {"a": jnp.zeros((4, 2)), "b": jnp.zeros((4, 2))})
    alone = tree.random_like(key, {"b": jnp.zeros((4, 2))})
    np.testing.assert_array_equal(whole["b"], alone["b"])
    assert not np.array_equal(whole["a"], whole["b"])
    signs = tree.random_like(key, {"a": jnp.zeros((64, 64))}, distribution="rademacher")["a"]
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 4 / 64
    normal = tree.random_like(key, {"a": jnp.zeros((64, 64))})["a"]
    assert abs(float(normal.std()) - 1) < 4 / 64


def test_cast_leaves_integers_alone():
    out = tree.cast(odd_tree(), jnp.float32)
    assert out["list"][1].dtype == jnp.float32
    assert out["step"].dtype == jnp.int32


def test_sharded_leaves_keep_their_sharding_and_their_numbers(mesh):
    spec = {"w": P("data", "model"), "b": P("model")}
    host = [
        {"w": np.float32(np.arange(64).reshape(8, 8) + i), "b": np.ones(8, np.float32) * i}
        for i in range(3)
    ]
    put = [
        jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), t, spec) for t in host
    ]
    weights = jnp.array([0.2, 0.3, 0.5])
    with jax.set_mesh(mesh):
        points = tree.stack(put)
        out = jax.jit(tree.combine)(points, weights)
        eager = tree.combine(points, weights)
        dot = jax.jit(tree.vdot)(put[1], put[2])
        noise = tree.random_like(jax.random.key(0), put[0])
        total = tree.axpy(2.0, put[1], put[2])
    for name in spec:
        assert points[name].sharding.spec == P(None, *spec[name])
        for made in (out, eager, noise, total):
            assert made[name].sharding.is_equivalent_to(put[0][name].sharding, made[name].ndim)
        np.testing.assert_allclose(
            out[name], tree.combine(tree.stack(host), weights)[name], rtol=4 * EPS
        )
    np.testing.assert_allclose(dot, tree.vdot(host[1], host[2]), rtol=32 * EPS)
    alone = tree.random_like(jax.random.key(0), host[0])
    np.testing.assert_array_equal(noise["w"], alone["w"])


def test_a_sharded_member_axis_is_combined_and_unstacked(mesh):
    host = {"w": np.arange(24, dtype=np.float32).reshape(4, 6)}
    points = jax.device_put(host, NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        out = tree.combine(points, jnp.array([1.0, 2.0, 3.0, 4.0]))
        members = tree.unstack(points)
    np.testing.assert_allclose(out["w"], np.array([1, 2, 3, 4]) @ host["w"])
    np.testing.assert_array_equal(members[2]["w"], host["w"][2])


def test_vdot_of_sharded_trees_gathers_nothing(mesh):
    x = {"w": jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, P("data", "model")))}
    with jax.set_mesh(mesh):
        text = jax.jit(tree.vdot).lower(x, x).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda: tree.stack([]), ValueError, "at least one"),
        (lambda: tree.stack([{"a": 1.0}, {"b": 1.0}]), ValueError, r"lacks leaf \['a'\]"),
        (
            lambda: tree.stack([{"a": jnp.ones(2)}, {"a": jnp.ones(3)}]),
            ValueError,
            r"\['a'\] has shape \(2,\) in tree 0 and \(3,\) in tree 1",
        ),
        (
            lambda: tree.stack([{"a": jnp.ones(2)}, {"a": jnp.ones(2, jnp.bfloat16)}]),
            TypeError,
            r"\['a'\] is float32 in tree 0 and bfloat16 in tree 1",
        ),
        (lambda: tree.num_points({"a": jnp.ones(())}), ValueError, r"\['a'\] is a scalar"),
        (
            lambda: tree.num_points({"a": jnp.ones(2), "b": jnp.ones(3)}),
            ValueError,
            r"\['a'\] stacks 2 points and leaf \['b'\] 3",
        ),
        (
            lambda: tree.combine({"n": jnp.arange(3)}, jnp.ones(3)),
            TypeError,
            r"\['n'\] is int32.*tree.partition",
        ),
        (lambda: tree.combine({"w": jnp.ones(3)}, jnp.ones(2)), ValueError, r"expected \(..., 3\)"),
        (lambda: tree.vdot({"a": jnp.ones(2)}, {"a": jnp.ones(3)}), ValueError, r"\['a'\]"),
        (
            lambda: tree.vdot({"f": jax.nn.relu}, {"f": jax.nn.relu}),
            TypeError,
            r"\['f'\] of x is a",
        ),
        (
            lambda: tree.random_like(jax.random.key(0), {"w": jnp.ones(1)}, distribution="cauchy"),
            ValueError,
            "cauchy",
        ),
    ],
)
def test_bad_input_is_refused_by_leaf_path(call, kind, says):
    with pytest.raises(kind, match=says):
        call()


@jax.tree_util.register_pytree_node_class
class Module:
    """A network as Equinox has it: a pytree with an activation and a counter among its leaves."""

    def __init__(self, weight, activation, steps):
        self.weight, self.activation, self.steps = weight, activation, steps

    def tree_flatten(self):
        return (self.weight, self.activation, self.steps), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        del aux
        return cls(*children)

    def __call__(self, x):
        return self.activation(x @ self.weight)


def test_a_module_that_is_a_pytree_goes_into_a_stack_and_out_with_the_same_outputs():
    modules = [
        Module(jax.random.normal(jax.random.key(i), (3, 2)), jnp.tanh, np.int32(i))
        for i in range(3)
    ]
    halves = [tree.partition(module) for module in modules]
    points = tree.stack([selected for selected, _ in halves])
    x = jax.random.normal(jax.random.key(9), (5, 3))
    for i, (module, (_, rest)) in enumerate(zip(modules, halves, strict=True)):
        again = tree.merge(tree.combine(points, jnp.eye(3)[i]), rest)
        assert again.steps == i
        assert np.asarray(again(x)).tobytes() == np.asarray(module(x)).tobytes()
