"""Ensembles from simplices: averages of the networks drawn, weighted as asked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from geojax import batches, ensemble, simplex, tree

KEY = jax.random.key(0)
R = np.random.default_rng(0)
X = R.normal(size=(24, 4)).astype(np.float32)
LABELS = R.integers(3, size=24).astype(np.int32)
DATA = batches.split((X, LABELS), 16)


def component(seed, n=3, spread=1.0):
    r = np.random.default_rng(seed)
    vertices = {
        "w": jnp.asarray(r.normal(size=(4, 3)) + spread * r.normal(size=(n, 4, 3)), jnp.float32),
        "b": jnp.asarray(spread * r.normal(size=(n, 3)), jnp.float32),
    }
    return simplex.single(vertices)


A, B = component(1), component(2, spread=1.3)


def logits(params, batch):
    return batch[0] @ params["w"] + params["b"][None]


def probs(vertices, weights):
    """Of one network, in float64."""
    w, b = (
        np.tensordot(np.asarray(weights, np.float64), np.asarray(vertices[k], np.float64), 1)
        for k in "wb"
    )
    z = np.exp(X @ w + b)
    return z / z.sum(1, keepdims=True)


def test_predictions_are_the_average_of_the_networks_drawn():
    for mode in ("probabilities", "votes"):
        found = np.exp(simplex.predict(logits, [A, B], DATA, key=KEY, num_samples=5, mode=mode))
        each = [
            probs(part.vertices, row)
            for i, part in enumerate((A, B))
            for row in simplex.sample_weights(jax.random.fold_in(KEY, i), part, 5)
        ]
        if mode == "votes":
            each = [np.eye(3)[p.argmax(1)] for p in each]
        np.testing.assert_allclose(found, np.mean(each, 0), atol=1e-5)


def test_one_vertex_is_the_network_itself():
    network = simplex.vertex(A, 0)
    found = simplex.predict(
        logits, simplex.single(tree.stack([network])), DATA, key=KEY, num_samples=1
    )
    np.testing.assert_array_equal(found, ensemble.log_probabilities(logits, network, DATA))


def test_two_large_ensembles_agree():
    # Networks that differ by a fifth of their probabilities, as members of one mode do.
    parts = [component(1, spread=0.5), component(2, spread=0.5)]

    def variation(num_samples):
        one, two = (
            np.exp(
                simplex.predict(logits, parts, DATA, key=jax.random.key(s), num_samples=num_samples)
            )
            for s in (0, 1)
        )
        return 0.5 * np.abs(one - two).sum(1).mean()

    assert variation(400) < 1e-2
    assert variation(400) < variation(4) / 3
    assert variation(4) > 1e-2


def test_components_count_as_asked():
    parts = [
        np.mean([
            probs(part.vertices, row)
            for row in simplex.sample_weights(jax.random.fold_in(KEY, i), part, 3)
        ], 0)
        for i, part in enumerate((A, B))
    ]  # fmt: skip
    share = np.exp([float(simplex.log_volume(part.vertices)) for part in (A, B)])
    share = share / share.sum()
    assert abs(share[0] - 0.5) > 0.05
    for weights, want in [("equal", [0.5, 0.5]), ("volume", share), ([1, 3], [0.25, 0.75])]:
        np.testing.assert_allclose(simplex.component_weights([A, B], weights), want, rtol=1e-5)
        found = simplex.predict(
            logits, [A, B], DATA, key=KEY, num_samples=3, component_weights=weights
        )
        average = want[0] * parts[0] + want[1] * parts[1]
        np.testing.assert_allclose(np.exp(found), average, atol=1e-5)


def test_members_are_streamed_and_the_same_each_time():
    stream = simplex.members(KEY, [A, B], 2)
    first, again = list(stream()), list(stream())
    assert len(first) == 4
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a["w"], b["w"])
    assert not hasattr(stream(), "__len__")
    drawn = simplex.sample_weights(jax.random.fold_in(KEY, 1), B, 2)
    np.testing.assert_array_equal(first[2]["w"], tree.combine(B.vertices, drawn[0])["w"])


def test_an_ensemble_is_measured_as_it_grows():
    found = simplex.running(logits, [A, B], DATA, key=KEY, num_samples=3)
    whole = simplex.predict(logits, [A, B], DATA, key=KEY, num_samples=3)
    np.testing.assert_array_equal(found.log_probs, whole)
    assert found.ensemble["loss"].shape == (6,)
    want = -whole[np.arange(24), LABELS].mean()
    np.testing.assert_allclose(found.ensemble["loss"][-1], want, rtol=1e-6)
    # Jensen: the ensemble's loss is at most the members' mean.
    assert found.ensemble["loss"][-1] <= found.members["loss"].mean()


def test_fifty_points_of_a_curve_make_an_ensemble_no_worse_than_its_points():
    path = simplex.chain(A.vertices)
    found = simplex.running(logits, path, DATA, key=KEY, num_samples=50)
    assert found.ensemble["loss"][-1] <= found.members["loss"].mean()
    drawn = np.asarray(simplex.sample_weights(jax.random.fold_in(KEY, 0), path, 50))
    average = np.mean([probs(A.vertices, row) for row in drawn], axis=0)
    want = -np.log(average[np.arange(24), LABELS]).mean()
    np.testing.assert_allclose(found.ensemble["loss"][-1], want, rtol=1e-5)


def test_a_state_is_made_for_each_member():
    found = simplex.predict(
        lambda p, state, batch: logits(p, batch) + state[None],
        A, DATA, key=KEY, num_samples=3, state_fn=lambda p: -p["b"],
    )  # fmt: skip
    bare = simplex.single({**A.vertices, "b": jnp.zeros_like(A.vertices["b"])})
    want = simplex.predict(logits, bare, DATA, key=KEY, num_samples=3, choose="uniform")
    np.testing.assert_allclose(found, want, atol=1e-5)


def test_sharded_data_and_parameters_give_the_same(mesh):
    want = simplex.predict(logits, [A, B], DATA, key=KEY, num_samples=3, component_weights="volume")
    there = [
        simplex.single({
            "w": jax.device_put(part.vertices["w"], NamedSharding(mesh, P(None, "model"))),
            "b": jax.device_put(part.vertices["b"], NamedSharding(mesh, P())),
        })
        for part in (A, B)
    ]  # fmt: skip
    with jax.set_mesh(mesh):
        found = simplex.predict(
            on_mesh, there, DATA, key=KEY, num_samples=3, component_weights="volume", mesh=mesh
        )
    np.testing.assert_allclose(found, want, atol=1e-5)


def on_mesh(params, batch):
    # Products and sums entry by entry have a rule whatever is sharded.
    w = jax.sharding.reshard(params["w"], P()) if _explicit() else params["w"]
    return batch[0] @ w + params["b"][None]


def _explicit():
    kinds = jax.sharding.get_abstract_mesh().axis_types
    return jax.sharding.AxisType.Explicit in kinds


def test_what_cannot_be_predicted_is_refused():
    with pytest.raises(TypeError, match="component 0 is a dict"):
        simplex.predict(logits, [{"w": 0}], DATA, key=KEY)
    with pytest.raises(ValueError, match="at least one component"):
        simplex.predict(logits, [], DATA, key=KEY)
    with pytest.raises(ValueError, match="num_samples is 0"):
        simplex.predict(logits, A, DATA, key=KEY, num_samples=0)
    for weights, words in [
        ("area", "'equal', 'volume' or 2"),
        ([1.0], "expected 2 nonnegative"),
        ([1, -1], "expected 2 nonnegative"),
        ([0, 0], "not zero"),
    ]:
        with pytest.raises(ValueError, match=words):
            simplex.predict(logits, [A, B], DATA, key=KEY, component_weights=weights)
    with pytest.raises(ValueError, match="not comparable"):
        simplex.component_weights([A, component(3, n=2)], "volume")
    flat = simplex.single(jax.tree.map(jnp.ones_like, A.vertices))
    with pytest.raises(ValueError, match="every component has volume 0"):
        simplex.component_weights([flat], "volume")


def test_the_centroid_is_one_network_in_place_of_all():
    centroid = simplex.centroid(A.vertices)
    found = np.exp(ensemble.log_probabilities(logits, centroid, DATA))
    np.testing.assert_allclose(found, probs(A.vertices, np.full(3, 1 / 3)), atol=1e-5)
