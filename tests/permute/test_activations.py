"""Activation matching reads the units of any model where its jaxpr does, and matches them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from geojax import permute
from geojax.permute import activations
from geojax.symmetry import SpecError, action, permutation_spec


def network(params, x):
    """A residual network with heads: in, two gated heads over features, out."""
    x = x @ params["in"] + params["in_bias"][None]
    heads = jnp.tanh(jnp.einsum("bd,dhk->bhk", x, params["up"]) + params["up_bias"][None])
    x = x + jnp.einsum("bhk,hkd->bd", heads, params["down"])
    hidden = jax.nn.relu(x @ params["wide"] + params["wide_bias"][None])
    return hidden @ params["out"]


SHAPES = {
    "in": (5, 12), "in_bias": (12,), "up": (12, 3, 4), "up_bias": (3, 4), "down": (3, 4, 12),
    "wide": (12, 20), "wide_bias": (20,), "out": (20, 2),
}  # fmt: skip


def draw(seed, shapes=None):
    rng = np.random.default_rng(seed)
    shapes = SHAPES if shapes is None else shapes
    return {k: jnp.asarray(0.5 * rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


@functools.cache
def planted():
    a = draw(0)
    spec = permutation_spec(network, a, jnp.ones((2, 5)))
    p = action.random(jax.random.key(1), spec)
    return spec, a, action.apply(spec, p, a), action.inverse(spec, p)


def inputs(num=96, seed=0):
    return np.random.default_rng(seed).normal(size=(num, 5)).astype(np.float32)


def same(p, q) -> bool:
    return all(bool((np.asarray(p[name]) == np.asarray(q[name])).all()) for name in p)


@pytest.mark.parametrize("score", activations.SCORES)
def test_a_planted_permutation_is_recovered_with_heads_and_what_is_inside_them(score):
    spec, a, b, truth = planted()
    x = inputs()
    # Uneven batches: 40, 40, 16.
    found = permute.activation_matching(
        spec, network, a, b, [x[:40], x[40:80], x[80:]], score=score
    )
    assert same(found.permutation, truth)
    assert found.converged
    if score == "correlation":
        np.testing.assert_allclose(list(found.group_scores.values()), 1, atol=1e-5)
    assert {len(g.index) for g in spec.groups} == {0, 1}


@pytest.mark.parametrize("size", [7, 64])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_scores_are_those_of_numpy_whatever_the_batches(size, offset):
    shapes = {"w": (5, 4), "v": (4, 2)}

    def linear(params, x):
        return jnp.maximum(x @ params["w"] + offset, 0.0) @ params["v"]

    a, b = draw(0, shapes), draw(1, shapes)
    x = inputs(150)
    spec = permutation_spec(linear, a, jnp.ones((2, 5)))
    (name,) = [g.name for g in spec.groups]
    parts = [x[i : i + size] for i in range(0, len(x), size)]
    left, right = (
        np.asarray(jnp.maximum(jnp.asarray(x) @ p["w"] + offset, 0.0), np.float64) for p in (a, b)
    )
    both = np.cov(left.T, right.T, bias=True)[:4, 4:]
    expected = {
        "covariance": both,
        "correlation": both / left.std(0)[:, None] / right.std(0)[None, :],
        "cross_moment": left.T @ right / len(x),
    }
    for score, value in expected.items():
        found = permute.activation_scores(spec, linear, a, b, parts, score=score)[name,]
        # What float32 keeps of the activations, not of the moments, is the limit.
        scale = np.abs(value).max()
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-5 * scale)


def test_a_dead_unit_scores_zero_and_is_counted():
    shapes = {"w": (5, 4), "bias": (4,), "v": (4, 2)}

    def relu(params, x):
        return jax.nn.relu(x @ params["w"] + params["bias"][None]) @ params["v"]

    a, b = draw(0, shapes), draw(1, shapes)
    a["bias"] = a["bias"].at[2].set(-100.0)
    spec = permutation_spec(relu, a, jnp.ones((2, 5)))
    (name,) = [g.name for g in spec.groups]
    scores = permute.activation_scores(spec, relu, a, b, inputs())[name,]
    assert (scores[2] == 0).all()
    assert (scores[[0, 1, 3]] != 0).all()
    assert permute.activation_matching(spec, relu, a, b, inputs()).num_dead == {name: 1}


def stacked(params, x):
    x = x @ params["in"]

    def layer(x, p):
        return x + jnp.tanh(x @ p["up"]) @ p["down"], None

    return lax.scan(layer, x, params["layers"])[0] @ params["out"]


def test_layers_in_a_scan_are_matched_one_by_one():
    rng = np.random.default_rng(0)
    a = {
        "in": rng.normal(size=(5, 6)),
        "layers": {"up": rng.normal(size=(3, 6, 8)), "down": 0.3 * rng.normal(size=(3, 8, 6))},
        "out": rng.normal(size=(6, 2)),
    }
    a = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), a)
    spec = permutation_spec(stacked, a, jnp.ones((2, 5)))
    assert sorted(g.shape for g in spec.groups) == [(3, 8), (6,)]
    p = action.random(jax.random.key(0), spec)
    found = permute.activation_matching(spec, stacked, a, action.apply(spec, p, a), inputs())
    assert same(found.permutation, action.inverse(spec, p))


def test_a_model_at_several_places_counts_all_of_them():
    spec, a, b, _ = planted()
    found = permute.activation_matching(spec, network, a, b, inputs())
    (residual,) = [g.name for g in spec.groups if g.size == 12]
    assert found.num_sites[residual] == 2  # read by `up` and by `wide`


def test_labels_and_dictionaries_pass_through():
    spec, a, b, truth = planted()
    x = inputs()
    for batch in [(x, np.zeros(len(x), np.int32)), {"inputs": x, "labels": np.zeros(len(x))}]:
        assert same(permute.activation_matching(spec, network, a, b, batch).permutation, truth)


def test_sharded_data_and_parameters_give_the_same_matching(mesh):
    spec, a, b, truth = planted()
    axis = mesh.axis_names[0]
    with jax.set_mesh(mesh):
        rows = jax.device_put(inputs(), NamedSharding(mesh, PartitionSpec(axis)))
        found = permute.activation_matching(spec, network, a, b, rows)
    assert same(found.permutation, truth)


def test_what_cannot_be_matched_is_refused_in_a_sentence():
    spec, a, b, _ = planted()
    with pytest.raises(ValueError, match="score is 'pearson'"):
        permute.activation_matching(spec, network, a, b, inputs(), score="pearson")
    other = draw(0, {"w": (5, 4), "v": (4, 2)})
    with pytest.raises(SpecError, match="derive the spec from this very function"):
        permute.activation_matching(
            spec, lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], other, other, inputs()
        )
