"""Permutations act on trees as the group that they are."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from geojax import tree as trees
from geojax.symmetry import (
    Concatenation,
    Factor,
    Group,
    Leaf,
    PermutationSpec,
    Product,
    SpecError,
    action,
)

HEADS, WIDTH, LAYERS, MODEL = 3, 4, 2, 5


def attention_spec() -> PermutationSpec:
    """A fused query-key-value kernel, an output kernel, and a stack of layers."""
    model = Factor("model", MODEL)
    head = Product((Factor("head", HEADS), Factor("inner", WIDTH)))
    value = Product((Factor("head", HEADS), Factor("value", WIDTH)))
    return PermutationSpec(
        leaves=(
            Leaf("['out']", (HEADS, WIDTH, MODEL), (head.parts[0], value.parts[1], model)),
            Leaf("['qkv']", (MODEL, 36), (model, Concatenation((head, head, value)))),
            Leaf("['stack']", (LAYERS, 6, MODEL), (Factor("l", 2), Factor("unit", 6), model)),
            Leaf("['tied']", (MODEL, MODEL), (model, model)),
        ),
        groups=(
            Group("model", MODEL),
            Group("head", HEADS),
            Group("inner", WIDTH, ("head",), (HEADS,)),
            Group("value", WIDTH, ("head",), (HEADS,)),
            Group("unit", 6, ("l",), (LAYERS,)),
        ),
    )


SPEC = attention_spec()


def random_tree(seed: int):
    rng = np.random.default_rng(seed)
    return {
        leaf.path[2:-2]: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)
        for leaf in SPEC.leaves
    }


@functools.cache
def random(seed: int):
    return action.random(jax.random.key(seed), SPEC)


def by_loops(permutation, tree):
    """The action, entry by entry."""
    p = {name: np.asarray(x) for name, x in permutation.items()}
    out = {name: np.empty_like(x) for name, x in tree.items()}
    for h, k, d in np.ndindex(HEADS, WIDTH, MODEL):
        out["out"][h, k, d] = tree["out"][p["head"][h], p["value"][h, k], p["model"][d]]
    for d, part, h, k in np.ndindex(MODEL, 3, HEADS, WIDTH):
        inner = p["inner" if part < 2 else "value"]
        row = part * 12 + h * WIDTH + k
        old = part * 12 + p["head"][h] * WIDTH + inner[h, k]
        out["qkv"][d, row] = tree["qkv"][p["model"][d], old]
    for i, u, d in np.ndindex(LAYERS, 6, MODEL):
        out["stack"][i, u, d] = tree["stack"][i, p["unit"][i, u], p["model"][d]]
    for d, e in np.ndindex(MODEL, MODEL):
        out["tied"][d, e] = tree["tied"][p["model"][d], p["model"][e]]
    return out


def equal(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


def test_apply_is_the_action_entry_by_entry():
    tree = random_tree(0)
    host = jax.tree.map(np.asarray, tree)
    for seed in range(4):
        assert equal(action.apply(SPEC, random(seed), tree), by_loops(random(seed), host))


def test_the_identity_moves_nothing():
    tree = random_tree(0)
    assert equal(action.apply(SPEC, action.identity(SPEC), tree), tree)


def test_composition_and_inverse_are_those_of_the_action():
    tree = random_tree(1)
    act = jax.jit(functools.partial(action.apply, SPEC))
    compose = jax.jit(functools.partial(action.compose, SPEC))
    undo = jax.jit(functools.partial(action.inverse, SPEC))
    for a, b in itertools.pairwise(range(30)):
        p, q = random(a), random(b)
        assert equal(act(compose(p, q), tree), act(p, act(q, tree)))
        assert equal(act(undo(p), act(p, tree)), tree)
        assert equal(compose(undo(p), p), action.identity(SPEC))


def test_jit_holds_the_same_values_and_vmap_is_a_loop():
    tree, seeds = random_tree(2), range(4)
    act = functools.partial(action.apply, SPEC)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(random(s) for s in seeds))
    many = jax.vmap(act, in_axes=(0, None))(stacked, tree)
    for i, moved in enumerate(trees.unstack(many)):
        assert equal(moved, jax.jit(act)(random(i), tree))


def test_the_gradient_is_carried_by_the_inverse():
    tree, weight = random_tree(3), random_tree(4)

    def inner(tree):
        moved = action.apply(SPEC, random(0), tree)
        return sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum(x * y), moved, weight)))

    expected = action.apply(SPEC, action.inverse(SPEC, random(0)), weight)
    assert equal(jax.grad(inner)(tree), expected)


def test_optimizer_states_and_gradients_are_permuted_by_their_paths():
    tree = random_tree(5)
    optimizer = optax.adam(1e-3)
    state = optimizer.init(tree)
    with jax.numpy_dtype_promotion("standard"):
        _, state = optimizer.update(random_tree(6), state, tree)
    moved = action.apply(SPEC, random(1), state)
    assert equal(moved[0].mu, action.apply(SPEC, random(1), state[0].mu))
    assert equal(moved[0].nu, action.apply(SPEC, random(1), state[0].nu))
    assert moved[0].count == state[0].count
    assert not equal(moved[0].mu, state[0].mu)


def test_nothing_given_is_changed():
    tree = jax.tree.map(np.asarray, random_tree(7))
    permutation = {name: np.asarray(x) for name, x in random(2).items()}
    before = jax.tree.map(np.copy, (tree, permutation))
    action.apply(SPEC, permutation, tree)
    action.compose(SPEC, permutation, permutation)
    action.inverse(SPEC, permutation)
    assert equal(before, (tree, permutation))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32])
def test_leaves_keep_their_dtype(dtype):
    tree = jax.tree.map(lambda x: x.astype(dtype), random_tree(8))
    moved = action.apply(SPEC, random(3), tree)
    assert {x.dtype for x in jax.tree.leaves(moved)} == {jnp.dtype(dtype)}


def test_matrices_act_as_the_indices_and_come_back():
    spec = PermutationSpec((Leaf("['w']", (5,), (Factor("h", 5),)),), (Group("h", 5),))
    p = action.random(jax.random.key(0), spec)
    matrix = action.to_matrices(p)["h"]
    x = jnp.arange(5.0)
    np.testing.assert_array_equal(matrix @ x, action.apply(spec, p, {"w": x})["w"])
    assert equal(action.from_matrices(spec, {"h": matrix}), p)
    with pytest.raises(SpecError, match="exactly one"):
        action.from_matrices(spec, {"h": np.full((5, 5), 0.2)})


def test_fixed_points_and_distance_count_units():
    p = {"h": np.array([0, 1, 3, 2])}
    assert action.num_fixed_points(p) == {"h": 2}
    assert action.distance(p, p) == {"h": 0.0}


@pytest.mark.parametrize("kind", ["signed", "scaled", "signed_scaled"])
def test_signs_and_scales_cancel_between_producer_and_consumer(kind):
    spec = PermutationSpec(
        (
            Leaf("['v']", (6, 2), (Factor("h", 6, -1), Factor("", 2))),
            Leaf("['w']", (3, 6), (Factor("", 3), Factor("h", 6, 1))),
        ),
        (Group("h", 6, kind=kind),),
    )
    rng = np.random.default_rng(0)
    tree = {"v": rng.normal(size=(6, 2)), "w": rng.normal(size=(3, 6))}
    tree = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
    p, q = (action.random(jax.random.key(s), spec) for s in (0, 1))
    scale = np.asarray(p["h"].scale)
    assert (np.abs(scale) != 1).any() == (kind != "signed")
    assert (scale < 0).any() == (kind != "scaled")
    moved = action.apply(spec, p, tree)
    tiny = 32 * np.finfo(np.float32).eps
    np.testing.assert_allclose(moved["w"] @ moved["v"], tree["w"] @ tree["v"], atol=tiny * 8)
    twice = action.apply(spec, p, action.apply(spec, q, tree))
    once = action.apply(spec, action.compose(spec, p, q), tree)
    back = action.apply(spec, action.inverse(spec, p), moved)
    for name in tree:
        np.testing.assert_allclose(once[name], twice[name], rtol=tiny)
        np.testing.assert_allclose(back[name], tree[name], rtol=tiny)


def test_what_does_not_fit_is_refused_by_name():
    p, tree = random(0), random_tree(0)
    with pytest.raises(SpecError, match=r"lacks the groups \['head'\]"):
        action.apply(SPEC, {k: v for k, v in p.items() if k != "head"}, tree)
    with pytest.raises(SpecError, match="no permutation of 0..4"):
        action.apply(SPEC, {**p, "model": np.array([0, 0, 1, 2, 3])}, tree)
    with pytest.raises(SpecError, match=r"\['qkv'\] has shape \(5, 3\)"):
        action.apply(SPEC, p, {**tree, "qkv": jnp.ones((5, 3))})
    with pytest.raises(SpecError, match=r"\['other'\] has no place"):
        action.apply(SPEC, p, {**tree, "other": jnp.ones(3)})
    model = action.Monomial(jnp.asarray(p["model"]), jnp.ones(MODEL))
    with pytest.raises(SpecError, match="may only be permuted"):
        action.apply(SPEC, {**p, "model": model}, tree)


def test_sharded_parameters_stay_sharded(mesh):
    spec = PermutationSpec(
        (
            Leaf("['v']", (16, 8), (Factor("h", 16), Factor("o", 8))),
            Leaf("['w']", (8, 16), (Factor("", 8), Factor("h", 16))),
        ),
        (Group("h", 16), Group("o", 8)),
    )
    rng = np.random.default_rng(0)
    host = {"v": rng.normal(size=(16, 8)), "w": rng.normal(size=(8, 16))}
    host = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), host)
    placed = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names[0]))
    p = action.random(jax.random.key(0), spec)
    expected = action.apply(spec, p, host)
    with jax.set_mesh(mesh):
        sharded = jax.tree.map(lambda x: jax.device_put(x, placed), host)
        moved = action.apply(spec, p, sharded)
    assert equal(jax.tree.map(np.asarray, moved), jax.tree.map(np.asarray, expected))
    for leaf in jax.tree.leaves(moved):
        assert leaf.sharding.is_equivalent_to(placed, leaf.ndim)


def loss(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["w"] + params["b"][None])
    return jnp.mean(jnp.square(hidden @ params["v"] - batch["y"]))


def mlp_spec():
    return PermutationSpec(
        (
            Leaf("['b']", (7,), (Factor("h", 7),)),
            Leaf("['v']", (7, 2), (Factor("h", 7), Factor("", 2))),
            Leaf("['w']", (3, 7), (Factor("", 3), Factor("h", 7))),
        ),
        (Group("h", 7),),
    )


def test_training_commutes_with_permuting_parameters_and_optimizer_state():
    spec, rng = mlp_spec(), np.random.default_rng(0)
    shapes = {leaf.path[2:-2]: leaf.shape for leaf in spec.leaves}
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    batch = {"x": rng.normal(size=(16, 3)), "y": rng.normal(size=(16, 2))}
    batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def steps(params, state):
        for _ in range(10):
            updates, state = optimizer.update(jax.grad(loss)(params, batch), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    with jax.numpy_dtype_promotion("standard"):
        half = steps(params, optimizer.init(params))
        p = action.random(jax.random.key(0), spec)
        moved = steps(*(action.apply(spec, p, x) for x in half))
        expected = action.apply(spec, p, steps(*half)[0])
    for name in params:
        np.testing.assert_allclose(moved[0][name], expected[name], rtol=1e-5, atol=1e-6)


def test_the_gradient_at_a_permuted_point_is_the_permuted_gradient():
    spec, rng = mlp_spec(), np.random.default_rng(1)
    params = {
        leaf.path[2:-2]: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)
        for leaf in spec.leaves
    }
    batch = {"x": jnp.ones((4, 3)), "y": jnp.zeros((4, 2))}
    p = action.random(jax.random.key(0), spec)
    there = jax.grad(loss)(action.apply(spec, p, params), batch)
    moved = action.apply(spec, p, jax.grad(loss)(params, batch))
    for name in params:
        np.testing.assert_allclose(there[name], moved[name], rtol=1e-5, atol=1e-6)


def test_permuting_only_gathers():
    closed = jax.make_jaxpr(functools.partial(action.apply, SPEC))(random(0), random_tree(0))

    def names(jaxpr):
        for eqn in jaxpr.eqns:
            yield eqn.primitive.name
            for value in eqn.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from names(inner)

    found = set(names(closed.jaxpr))
    assert "gather" in found
    assert not found & {"dot_general", "scatter", "pure_callback", "while", "sort"}
