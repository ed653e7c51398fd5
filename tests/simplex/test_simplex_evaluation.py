"""Metrics over a complex against integrals in closed form, and maxima that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from geojax import batches, checkpoint, simplex, tree

KEY = jax.random.key(0)
R = np.random.default_rng(0)
X = R.normal(size=(20, 4)).astype(np.float32)
DATA = batches.split(X, 8)
CORNERS = R.normal(size=(4, 4)).astype(np.float32)
VERTICES = {"w": jnp.asarray(CORNERS)}
TRIANGLE = simplex.SimplicialComplex(VERTICES, [(0, 1, 2)])
TWO = simplex.SimplicialComplex(VERTICES, [(0, 1, 2), (1, 2, 3)])


def square(params, batch):
    return jnp.mean(jnp.sum(jnp.square(params["w"][None] - batch), axis=1))


def metrics(params, batch):
    return {"loss": square(params, batch), "total": jnp.sum(params["w"]) + 0 * jnp.mean(batch)}


def negative(params, batch):
    return -square(params, batch)


def exact(weights):
    """The loss in float64."""
    points = np.asarray(weights, np.float64) @ CORNERS.astype(np.float64)
    return np.square(points[:, None] - X[None].astype(np.float64)).sum(-1).mean(1)


def mean_over(simplex_):
    """E|w - x|^2 over the flat Dirichlet, with E[c c^T] = (1 + identity) / (n (n + 1))."""
    away = CORNERS[list(simplex_)].astype(np.float64) - X.astype(np.float64).mean(0)
    n = len(away)
    second = (np.ones((n, n)) + np.eye(n)) / (n * (n + 1))
    spread = np.square(X - X.mean(0)).sum(1).mean()
    return np.einsum("ij,id,jd->", second, away, away) + spread


@pytest.fixture(scope="module")
def found():
    return simplex.evaluate(metrics, TWO, DATA, 400, key=KEY)


def test_values_are_those_of_the_points_and_vertices(found):
    loss = found.metrics["loss"]
    np.testing.assert_allclose(loss.values, exact(found.weights), rtol=1e-5)
    np.testing.assert_allclose(loss.vertices, exact(np.eye(4)), rtol=1e-5)
    np.testing.assert_allclose(
        found.metrics["total"].values, (found.weights @ CORNERS).sum(1), atol=1e-5
    )
    assert found.weights.shape == (400, 4)


def test_the_mean_is_the_integral_to_its_standard_error():
    one = simplex.evaluate(metrics, TRIANGLE, DATA, 400, key=KEY).metrics["loss"]
    assert abs(one.mean - mean_over((0, 1, 2))) < 4 * one.standard_error
    assert one.standard_error < 0.05 * one.mean
    np.testing.assert_allclose(one.standard_error, one.values.std(ddof=1) / 20, rtol=1e-12)


def test_the_highest_lies_at_a_vertex_of_a_convex_loss(found):
    loss = found.metrics["loss"]
    top = int(exact(np.eye(4)).argmax())
    np.testing.assert_allclose(loss.highest, exact(np.eye(4))[top], rtol=1e-5)
    assert loss.at_highest.tolist() == np.eye(4)[top].tolist()
    without = simplex.evaluate(metrics, TWO, DATA, 400, key=KEY, include_vertices=False).metrics[
        "loss"
    ]
    assert without.highest == loss.values.max() < loss.highest
    assert np.isnan(without.vertices).all()
    np.testing.assert_array_equal(without.values, loss.values)
    assert loss.lowest == loss.values.min()


def test_each_simplex_has_its_own_mean_and_highest(found):
    loss = found.metrics["loss"]
    for s, members in enumerate(TWO.simplices):
        inside = loss.values[found.simplices == s]
        np.testing.assert_allclose(loss.simplex_means[s], inside.mean(), rtol=1e-12)
        assert loss.simplex_highest[s] == max(inside.max(), loss.vertices[list(members)].max())
        assert abs(inside.mean() - mean_over(members)) < 5 * inside.std() / np.sqrt(len(inside))
    few = simplex.evaluate(metrics, TWO, DATA, 3, key=KEY, choose=[1, 0], include_vertices=False)
    assert np.isnan(few.metrics["loss"].simplex_means[1])
    assert np.isnan(few.metrics["loss"].simplex_highest[1])


def test_quantiles_and_the_table_are_those_of_the_values(found):
    loss = found.metrics["loss"]
    assert loss.quantiles[0.5] == np.quantile(loss.values, 0.5)
    row = found.table()[0]
    assert row["metric"] == "loss"
    assert row["95 %"] == loss.quantiles[0.95]


def test_two_calls_agree_to_the_bit(found):
    again = simplex.evaluate(metrics, TWO, DATA, 400, key=KEY)
    for name in found.metrics:
        np.testing.assert_array_equal(again.metrics[name].values, found.metrics[name].values)
    np.testing.assert_array_equal(again.weights, found.weights)
    other = simplex.evaluate(metrics, TWO, DATA, 10, key=jax.random.key(1))
    assert (other.weights != found.weights[:10]).any()


def test_a_state_is_made_at_each_point():
    seen = []

    def state_fn(params):
        seen.append(params)
        return {"double": 2 * params["w"][0]}

    found = simplex.evaluate(
        lambda p, state, batch: {"x": state["double"] - p["w"][0] + 0 * jnp.mean(batch)},
        TRIANGLE, X, 3, key=KEY, state_fn=state_fn,
    )  # fmt: skip
    assert len(seen) == 3 + 4
    np.testing.assert_allclose(
        found.metrics["x"].values, (found.weights @ CORNERS)[:, 0], atol=1e-5
    )


def test_the_metrics_are_traced_once_for_each_batch_shape():
    traces = []

    def counted(params, batch):
        traces.append(batch.shape)
        return metrics(params, batch)

    simplex.evaluate(counted, TWO, DATA, 5, key=KEY)
    simplex.evaluate(counted, TWO, DATA, 7, key=KEY)
    assert sorted(set(traces)) == [(4, 4), (8, 4)]
    assert len(traces) <= 4


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="num_points is 0"):
        simplex.evaluate(metrics, TWO, DATA, 0, key=KEY)
    with pytest.raises(ValueError, match="'loss' has shape"):
        simplex.evaluate(lambda p, b: {"loss": p["w"]}, TWO, DATA, 2, key=KEY)
    with pytest.raises(ValueError, match="expected a dict of scalars"):
        simplex.evaluate(lambda p, b: jnp.sum(b), TWO, DATA, 2, key=KEY)
    mixed = simplex.SimplicialComplex(VERTICES, [(0, 1, 2), (2, 3)])
    with pytest.raises(ValueError, match="lengths are no areas"):
        simplex.evaluate(metrics, mixed, DATA, 2, key=KEY)


def test_sharded_data_and_parameters_give_the_same(mesh, found):
    sharding = NamedSharding(mesh, P(None, "model"))
    there = simplex.SimplicialComplex(jax.device_put(VERTICES, sharding), TWO.simplices)
    with jax.set_mesh(mesh):
        on_mesh = simplex.evaluate(metrics, there, DATA, 6, key=KEY, mesh=mesh)
        worst = simplex.worst_point(
            square, there, DATA, key=KEY, num_starts=2, num_steps=4, mesh=mesh
        )
    here = simplex.evaluate(metrics, TWO, DATA, 6, key=KEY)
    for name in ("loss", "total"):
        np.testing.assert_allclose(
            on_mesh.metrics[name].values, here.metrics[name].values, rtol=1e-5, atol=1e-6
        )
    plain = simplex.worst_point(square, TWO, DATA, key=KEY, num_starts=2, num_steps=4)
    np.testing.assert_allclose(worst.value, plain.value, rtol=1e-5)


# ------------------------------------------------------------------------------- resuming


class Counted:
    """Batches that count the passes over them, and end one with Ctrl-C."""

    def __init__(self, stop=None, rows=X):
        self.stop, self.rows, self.passes = stop, rows, 0

    def __iter__(self):
        self.passes += 1
        if self.passes == self.stop:
            raise KeyboardInterrupt
        return iter(batches.split(self.rows, 8))


def with_state(params, state, batch):
    return {name: x + state for name, x in metrics(params, batch).items()}


def same_bits(one, other):
    for name, metric in one.metrics.items():
        for field, x in metric._asdict().items():
            np.testing.assert_array_equal(getattr(other.metrics[name], field), x)
    np.testing.assert_array_equal(one.weights, other.weights)
    np.testing.assert_array_equal(one.simplices, other.simplices)


@pytest.mark.parametrize("vertices", [True, False])
def test_an_interrupted_evaluation_goes_on_to_the_same_bits(vertices, tmp_path):
    made = []

    def state_fn(params):
        made.append(1)
        return jnp.sum(params["w"] ** 2)

    def run(source, **how):
        return simplex.evaluate(
            with_state, TWO, source, 7, key=KEY, state_fn=state_fn, include_vertices=vertices, **how
        )

    total = 7 + 4 * vertices
    whole = run(Counted())
    keep = checkpoint.Checkpointer(tmp_path, every=2, keep=None)
    with pytest.raises(KeyboardInterrupt):
        run(Counted(stop=6), checkpoint=keep)
    # The fifth point was still on its way.
    assert keep.steps() == [2, 4]
    made.clear()
    rest = Counted()
    same_bits(whole, run(rest, checkpoint=keep))
    # The last one kept once more, and those that were missing.
    assert rest.passes == len(made) == 1 + total - 4
    assert keep.latest() == total
    made.clear()
    done = Counted()
    same_bits(whole, run(done, checkpoint=keep))
    assert done.passes == len(made) == 1


def test_only_the_evaluation_that_was_stopped_goes_on(tmp_path):
    keep = checkpoint.Checkpointer(tmp_path, every=3)
    given = {
        "metrics_fn": metrics, "complex": TWO, "batches": DATA, "num_points": 5, "key": KEY,
        "checkpoint": keep,
    }  # fmt: skip
    found = simplex.evaluate(**given)
    # One unit in the last place of one weight.
    nearby = {"w": VERTICES["w"].at[1, 2].set(jnp.nextafter(VERTICES["w"][1, 2], jnp.float32(9)))}
    for change, says in (
        ({"complex": simplex.SimplicialComplex(nearby, TWO.simplices)}, "its vertices differ"),
        ({"complex": TRIANGLE}, "its positions differ"),
        ({"key": jax.random.key(1)}, "its positions differ"),
        ({"num_points": 6}, "its positions differ"),
        ({"choose": [1, 0]}, "its positions differ"),
        ({"include_vertices": False}, "its positions differ"),
        ({"batches": batches.split(X, 5)}, "its source differ"),
        # Too close for the metrics to tell.
        ({"batches": batches.split(X * np.float32(1.001), 8)}, "its data differ"),
        (
            {"metrics_fn": lambda p, b: {k: x / 2 for k, x in metrics(p, b).items()}},
            "at position 8 is .* by another function",
        ),
        (
            {"metrics_fn": with_state, "state_fn": lambda params: jnp.ones(())},
            "at position 8 is .* by another function or state",
        ),
        (
            {"metrics_fn": lambda p, b: {"loss": square(p, b)}},
            r"its metrics are \['loss', 'total'\] and this run's \['loss'\]",
        ),
    ):
        with pytest.raises(ValueError, match=says) as raised:
            simplex.evaluate(**(given | change))
        assert "is of another run" in str(raised.value)
        assert str(tmp_path) in str(raised.value)
        assert keep.latest() == 9
    same_bits(found, simplex.evaluate(**given))


def test_data_of_which_nothing_is_known_are_told_by_the_metrics(tmp_path):
    keep = checkpoint.Checkpointer(tmp_path, every=3)
    found = simplex.evaluate(metrics, TWO, Counted(), 3, key=KEY, checkpoint=keep)
    with pytest.raises(ValueError, match="at position 6 is .* on other data"):
        simplex.evaluate(metrics, TWO, Counted(rows=X + 1), 3, key=KEY, checkpoint=keep)
    same_bits(found, simplex.evaluate(metrics, TWO, Counted(), 3, key=KEY, checkpoint=keep))


def test_an_evaluation_stopped_on_one_device_goes_on_on_eight(mesh, tmp_path):
    whole = simplex.evaluate(metrics, TWO, Counted(), 5, key=KEY)
    keep = checkpoint.Checkpointer(tmp_path, every=1)
    with pytest.raises(KeyboardInterrupt):
        simplex.evaluate(metrics, TWO, Counted(5), 5, key=KEY, checkpoint=keep)
    assert keep.latest() == 3
    sharding = NamedSharding(mesh, P(None, "model"))
    there = simplex.SimplicialComplex(jax.device_put(VERTICES, sharding), TWO.simplices)
    rest = Counted()
    with jax.set_mesh(mesh):
        found = simplex.evaluate(metrics, there, rest, 5, key=KEY, checkpoint=keep, mesh=mesh)
    assert rest.passes == 1 + 6
    for name, metric in whole.metrics.items():
        np.testing.assert_allclose(found.metrics[name].values, metric.values, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found.metrics[name].values[:3], metric.values[:3])


# ------------------------------------------------------------------------------- the worst point


def test_ascent_finds_the_vertex_where_a_convex_loss_is_largest(found):
    worst = simplex.worst_point(square, TWO, DATA, key=KEY, num_starts=6, num_steps=20)
    assert worst.value >= worst.start_values.max()
    assert (worst.values >= worst.start_values).all()
    assert worst.value >= found.metrics["loss"].values.max()
    np.testing.assert_allclose(worst.value, exact(np.eye(4)).max(), rtol=1e-5)
    assert worst.num_gradients <= 6 * 21
    np.testing.assert_allclose(exact(worst.weights[None]), worst.value, rtol=1e-5)


@pytest.mark.parametrize("inside", [True, False])
def test_ascent_finds_a_maximum_within_or_on_a_face(inside):
    # -|w - mean x|^2 is largest at the nearest point to the mean of the data.
    weights = np.array([0.2, 0.5, 0.3, 0.0]) if inside else np.array([0.6, 0.6, -0.2, 0.0])
    data = (X - X.mean(0) + weights @ CORNERS).astype(np.float32)
    worst = simplex.worst_point(negative, TRIANGLE, data, key=KEY, num_starts=2, num_steps=60)
    near = simplex.nearest(
        {"w": VERTICES["w"][:3]}, {"w": jnp.asarray(data.astype(np.float64).mean(0), jnp.float32)}
    )
    np.testing.assert_allclose(worst.weights[:3], near.weights, atol=2e-3)
    assert worst.weights[3] == 0
    spread = np.square(data - data.mean(0)).sum(1).mean()
    np.testing.assert_allclose(worst.value, -(spread + near.distance**2), rtol=1e-5)
    assert worst.slopes[worst.values.argmax()] < 0.05


def test_ascent_goes_on_from_the_worst_points_of_an_evaluation(found):
    starts = found.worst("loss", 3)
    worst = simplex.worst_point(square, TWO, DATA, starts=starts, num_steps=5)
    np.testing.assert_allclose(
        worst.start_values, np.sort(found.metrics["loss"].values)[:-4:-1], 1e-5
    )
    assert worst.value >= found.metrics["loss"].values.max()
    none = simplex.worst_point(square, TWO, DATA, starts=starts, num_steps=0)
    assert none.num_gradients == 3
    np.testing.assert_array_equal(none.values, none.start_values)


def test_an_ascent_compiles_its_gradient_once():
    traces = []

    def counted(params, batch):
        traces.append(1)
        return square(params, batch)

    for seed in range(2):
        simplex.worst_point(counted, TWO, X, key=jax.random.key(seed), num_starts=2, num_steps=3)
    assert len(traces) == 1


def test_a_search_without_starts_or_with_nan_is_refused():
    with pytest.raises(ValueError, match="expected a key"):
        simplex.worst_point(square, TWO, DATA)
    with pytest.raises(ValueError, match="num_starts is 0"):
        simplex.worst_point(square, TWO, DATA, key=KEY, num_starts=0)
    with pytest.raises(ValueError, match="the loss is NaN at the weights"):
        simplex.worst_point(lambda p, b: jnp.nan * p["w"][0], TWO, X, key=KEY)
    assert tree.num_points(VERTICES) == 4
