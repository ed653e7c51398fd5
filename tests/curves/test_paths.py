"""Relaxed paths find known saddles, keep their ends, and resume; trees bound every pair."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from geojax import batches, curves, datasets, fit, models, objectives, statistics, tree

KEY = jax.random.key(0)
ONE = jnp.ones(1)
EPS = float(np.finfo(np.float32).eps)

# Muller and Brown, "Location of saddle points and minimum energy paths", 1979.
HEIGHT = np.array([-200, -100, -170, 15], np.float32)
XX = np.array([-1, -1, -6.5, 0.7], np.float32)
XY = np.array([0, 0, 11, 0.6], np.float32)
YY = np.array([-10, -10, -6.5, 0.7], np.float32)
X0 = np.array([1, 0, -0.5, -1], np.float32)
Y0 = np.array([0, 0.5, 1.5, 1], np.float32)
SADDLE = -40.6648


def muller_brown(p, batch):
    dx, dy = p["w"][0] - X0, p["w"][1] - Y0
    energies = HEIGHT * jnp.exp(XX * dx * dx + XY * dx * dy + YY * dy * dy)
    return jnp.sum(energies) + 0 * jnp.sum(batch)


ENDS = {"w": jnp.array([-0.558, 1.442])}, {"w": jnp.array([0.623, 0.028])}


@pytest.mark.parametrize(("spring", "num"), [(None, 15), (50.0, 25)])
def test_the_top_of_a_relaxed_band_is_the_saddle_of_muller_and_brown(spring, num):
    start = curves.initialize(curves.polychain(num), *ENDS)
    found = curves.neb(
        muller_brown, start, ONE, optax.sgd(2e-4), 500, key=KEY, spring=spring, num_between=19
    )
    assert curves.measure_path(muller_brown, start, ONE).highest > 0
    assert found.highest == pytest.approx(SADDLE, rel=0.02)
    assert found.pivot_losses.max() <= found.highest
    top = curves.point(curves.polychain(num), found.points, found.t_highest)["w"]
    np.testing.assert_allclose(top, [-0.822, 0.624], atol=0.1)
    for end, i in zip(ENDS, (0, -1), strict=True):
        assert bool((found.points["w"][i] == end["w"]).all())
    gaps = np.linalg.norm(np.diff(np.asarray(found.points["w"]), axis=0), axis=1)
    assert spring or gaps.std() < 0.05 * gaps.mean()


def test_the_band_is_at_rest_where_the_gradient_has_no_part_across_it():
    start = curves.initialize(curves.polychain(9), *ENDS)
    found = curves.neb(muller_brown, start, ONE, optax.sgd(2e-4), 400, key=KEY, num_between=1)
    before, after = (curves.measure_path(muller_brown, x, ONE) for x in (start, found.points))
    assert found.history["gradient_norm"][-1] < 0.05 * found.history["gradient_norm"][0]
    assert after.highest < before.highest


def test_autoneb_inserts_pivots_where_the_loss_rises_between_them_and_finds_the_saddle():
    found = curves.autoneb(
        muller_brown, *ENDS, ONE, optax.sgd(2e-4), 300, key=KEY, num_pivots=5, num_cycles=3,
        threshold=0.05, num_between=9,
    )  # fmt: skip
    assert found.highest == pytest.approx(SADDLE, rel=0.02)
    nums = [cycle.num_pivots for cycle in found.cycles]
    assert nums[0] == 5
    assert nums[-1] > 5
    assert found.highest == min(cycle.highest for cycle in found.cycles)
    assert found.num_gradients == sum(300 * (n - 2) for n in nums)


def test_excess_is_the_rise_above_the_line_between_pivots():
    def hill(p, batch):
        return jnp.mean(batch) * (2 * p["x"] - p["x"] ** 2)

    found = curves.measure_path(hill, {"x": jnp.array([0.0, 2.0, 3.0])}, ONE, num_between=1)
    np.testing.assert_allclose(found.ts, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(found.losses, [0, 1, 0, -1.25, -3], atol=1e-6)
    np.testing.assert_allclose(found.excess, [[1], [0.25]], atol=1e-6)
    assert (found.highest, found.t_highest) == (1.0, 0.25)


def bowl(p, batch):
    return jnp.mean(jnp.sum(jnp.square(p["w"][None] - batch), axis=1)) + jnp.prod(p["w"][:2])


def three(seed=0, num=5, size=4):
    return {"w": jnp.asarray(np.random.default_rng(seed).normal(size=(num, size)), jnp.float32)}


def test_one_step_is_the_formula_of_henkelman_and_jonsson():
    w, rows, rate, k = three(), np.ones((3, 4), np.float32), 0.01, 0.3
    found = curves.neb(bowl, w, rows, optax.sgd(rate), 1, key=KEY, spring=k).points["w"]
    x = np.asarray(w["w"], np.float64)
    losses = np.array([float(bowl({"w": p}, jnp.asarray(rows))) for p in w["w"]])
    gradients = np.stack([np.asarray(jax.grad(bowl)({"w": p}, rows)["w"]) for p in w["w"]])
    expected = x.copy()
    for i in range(1, 4):
        after, before = x[i + 1] - x[i], x[i] - x[i - 1]
        rise, fall = abs(losses[i + 1] - losses[i]), abs(losses[i - 1] - losses[i])
        if losses[i + 1] > losses[i] > losses[i - 1]:
            tangent = after
        elif losses[i + 1] < losses[i] < losses[i - 1]:
            tangent = before
        elif losses[i + 1] > losses[i - 1]:
            tangent = after * max(rise, fall) + before * min(rise, fall)
        else:
            tangent = after * min(rise, fall) + before * max(rise, fall)
        tangent = tangent / np.linalg.norm(tangent)
        force = gradients[i] - (gradients[i] @ tangent) * tangent
        force -= k * (np.linalg.norm(after) - np.linalg.norm(before)) * tangent
        expected[i] -= rate * force
    np.testing.assert_allclose(found, expected, atol=64 * EPS)


def test_a_band_is_the_same_in_turn_and_at_once_with_one_program():
    traces = []

    def counted(p, batch, key):
        traces.append(1)
        return bowl(p, batch) * (1 + 0.1 * jax.random.normal(key))

    run = functools.partial(
        curves.neb, counted, three(), np.ones((3, 4), np.float32), optax.sgd(0.01, momentum=0.9),
        4, measure_fn=bowl,
    )  # fmt: skip
    found = run(key=KEY)
    assert len(traces) == 2  # the inner pivots, the ends
    run(key=jax.random.key(4))
    assert len(traces) == 2
    other = run(key=KEY, over="sequential")
    assert len(traces) == 2 + 5
    np.testing.assert_allclose(found.points["w"], other.points["w"], atol=64 * EPS)


def test_a_convolutional_path_is_judged_by_the_statistics_of_each_of_its_points():
    data = jax.tree.map(lambda x: x[:100], datasets.load("digits").train)
    model = models.build("cnn", widths=[4], num_classes=10)
    nets = [model.init(jax.random.key(i), data.inputs[:1]) for i in range(2)]
    state = nets[0][1]
    with_state = objectives.metrics_with_state(model.apply)

    def measure_fn(params, state, batch):
        return with_state(params, state, batch)["loss"]

    def fresh(params):
        return statistics.refresh(model.apply, params, state, data)

    chain = curves.initialize(curves.polychain(4), nets[0][0], nets[1][0])
    run = functools.partial(
        curves.neb, objectives.loss(model.apply, state), chain, batches.split(data, 50),
        optax.sgd(0.3), 4, key=KEY, measure_fn=measure_fn, state_fn=fresh, num_between=1,
    )  # fmt: skip
    found, other = run(), run(over="sequential")
    moved = float(tree.norm(tree.axpy(-1.0, chain, other.points)))
    assert moved > 0.1
    assert float(tree.norm(tree.axpy(-1.0, found.points, other.points))) < 64 * EPS * moved
    before = curves.measure_path(measure_fn, chain, data, state_fn=fresh, num_between=1)
    assert found.highest < before.highest
    for point, value in zip(tree.unstack(found.points), found.pivot_losses, strict=True):
        outputs, _ = model.apply(point, fresh(point), data.inputs, False)
        own = optax.softmax_cross_entropy_with_integer_labels(outputs, data.labels).mean()
        assert value == pytest.approx(float(own), rel=1e-5)


def test_a_stopped_autoneb_goes_on_to_the_same_bits(tmp_path):
    class Stopped(Exception):
        pass

    calls = []

    def stop(params, step):
        calls.append(step)
        if len(calls) == 4:
            raise Stopped
        return {}

    run = functools.partial(
        curves.autoneb, muller_brown, *ENDS, ONE, optax.sgd(2e-4, momentum=0.5), 30, key=KEY,
        num_pivots=4, num_cycles=2, threshold=0.01, num_between=3,
    )  # fmt: skip
    whole = run()
    with pytest.raises(Stopped):
        run(folder=tmp_path, save_every=10, evaluate=stop, evaluate_every=10)
    resumed = run(folder=tmp_path, save_every=10)
    assert resumed.points["w"].tobytes() == whole.points["w"].tobytes()
    assert resumed.cycles == whole.cycles
    with pytest.raises(ValueError, match="of other fixed points"):
        curves.autoneb(
            muller_brown, ENDS[1], ENDS[0], ONE, optax.sgd(2e-4, momentum=0.5), 30, key=KEY,
            num_pivots=4, num_cycles=2, folder=tmp_path,
        )  # fmt: skip


def test_sharded_data_and_pivots_relax_as_on_one_device(mesh):
    rng = np.random.default_rng(0)
    w = three(num=5, size=16)
    rows = rng.normal(size=(16, 16)).astype(np.float32)

    def loss(p, batch):
        return jnp.mean(jnp.square(jnp.tanh(batch * p["w"][None])))

    run = functools.partial(
        curves.neb, loss, optimizer=optax.sgd(0.5, momentum=0.5), num_steps=4, key=KEY,
        num_between=2,
    )  # fmt: skip
    expected = run(w, rows)
    with jax.set_mesh(mesh):
        placed = {"w": jax.device_put(w["w"], NamedSharding(mesh, PartitionSpec(None, "model")))}
        data = jax.device_put(rows, NamedSharding(mesh, PartitionSpec("data")))
        found = run(placed, data)
    np.testing.assert_allclose(found.points["w"], expected.points["w"], atol=1e-5)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
    assert found.points["w"].sharding.spec[1] == "model"


def test_what_cannot_be_relaxed_is_refused_in_a_sentence():
    run = functools.partial(
        curves.neb, bowl, batches=np.ones((3, 4)), optimizer=optax.sgd(0.1), num_steps=1, key=KEY
    )
    with pytest.raises(ValueError, match="there are 2 pivots; expected at least 3"):
        run(points=three(num=2))
    with pytest.raises(ValueError, match="without spacing"):
        run(points=three(), spring=1.0, spacing=[0, 0.1, 0.2, 0.3, 1])
    with pytest.raises(ValueError, match="expected 5 shares that ascend"):
        run(points=three(), spacing=[0, 0.5, 1])
    with pytest.raises(ValueError, match="give measure_fn"):
        curves.neb(
            lambda p, batch, key: bowl(p, batch), three(), np.ones((3, 4)), optax.sgd(0.1), 1,
            key=KEY,
        )  # fmt: skip
    with pytest.raises(ValueError, match="1 optimizers for 3 cycles"):
        curves.autoneb(bowl, *ENDS, ONE, [optax.sgd(0.1)], 1, key=KEY, num_cycles=3)


# ----------------------------------------------------------------------------- on networks


@functools.cache
def five_networks():
    data = datasets.load("digits", validation=0).train
    model = models.build("mlp", widths=[32], num_classes=10)
    source = batches.split(data, 128, drop_remainder=True)
    starts = [model.init(jax.random.key(s), data.inputs[:1]) for s in range(5)]
    loss_fn = objectives.evaluation_loss(model.apply, starts[0][1])
    modes = [
        fit.fit(
            loss_fn, params, source, optax.sgd(0.1, momentum=0.9), 120, key=jax.random.key(9)
        ).params
        for params, _ in starts
    ]  # fmt: skip
    return source, loss_fn, tree.stack(modes)


def test_a_path_between_networks_is_no_higher_than_the_chain_of_as_many_gradients():
    source, loss_fn, modes = five_networks()
    first, last = tree.unstack(modes)[:2]
    basis = curves.polychain(3)
    gradients = 600
    chain = curves.fit(
        loss_fn, basis, curves.initialize(basis, first, last), source,
        optax.sgd(0.1, momentum=0.9), gradients, key=KEY,
    ).control_points  # fmt: skip
    band = curves.initialize(curves.polychain(5), first, last)
    found = curves.neb(
        loss_fn, band, source, optax.sgd(0.1, momentum=0.9), gradients // 3, key=KEY,
        num_between=14,
    )  # fmt: skip
    assert found.num_gradients == gradients
    straight = curves.measure_path(loss_fn, tree.stack([first, last]), source, num_between=9)
    trained = curves.measure_path(loss_fn, chain, source, num_between=29)
    assert straight.highest > 3 * found.highest
    assert found.highest <= trained.highest
    assert found.highest <= 1.01 * max(found.pivot_losses[0], found.pivot_losses[-1])


def test_a_tree_over_five_networks_bounds_every_pair():
    source, loss_fn, modes = five_networks()
    few = batches.take(source, 1)
    members = tree.unstack(modes)
    refined = []

    def connect(i, j):
        refined.append((i, j))
        start = curves.initialize(curves.polychain(4), members[i], members[j])
        return curves.neb(
            loss_fn, start, few, optax.sgd(0.2, momentum=0.9), 30, key=KEY, num_between=2
        )

    found = curves.spanning_tree(
        loss_fn, modes, few, connect=connect, max_refinements=6, num_between=2
    )
    assert len(found.edges) == 4
    assert found.num_refined == len(refined) == len(set(refined)) == 6
    assert not found.complete
    assert found.num_gradients == 6 * 30 * 2
    assert all(edge.refined for edge in found.edges)
    for i in range(5):
        for j in range(i + 1, 5):
            along = found.path(i, j)
            measured = curves.measure_path(loss_fn, along, few, num_between=2)
            bound = found.bound(i, j)
            assert measured.highest == pytest.approx(bound, rel=1e-5)
            assert bound == found.bound(j, i)
            for end, mode in ((0, i), (-1, j)):
                for x, y in zip(jax.tree.leaves(along), jax.tree.leaves(modes), strict=True):
                    assert bool((x[end] == y[mode]).all())
            for k in range(5):
                assert bound <= max(found.bound(i, k), found.bound(k, j))
    dense = curves.measure_path(loss_fn, found.path(0, 4), few, num_between=14)
    assert dense.highest <= 1.05 * found.bound(0, 4)
    assert found.edges[0].cost < 0.7 * np.sort(found.straight[np.triu_indices(5, 1)])[3]


def ring(p, batch):
    """A circular valley around a hill."""
    radius = jnp.sqrt(jnp.sum(jnp.square(p["w"])))
    return (radius - 1) ** 2 + 0 * jnp.sum(batch)


def test_a_tree_is_complete_when_no_pair_is_left_and_resumes(tmp_path):
    angles = np.array([0, 1.5, 3, 4.5])
    modes = {"w": jnp.asarray(np.stack([np.cos(angles), np.sin(angles)], 1), jnp.float32)}
    run = functools.partial(
        curves.spanning_tree, ring, modes, ONE, optax.sgd(0.2), 20, key=KEY, num_cycles=1,
        num_pivots=5, num_between=4,
    )  # fmt: skip
    few = run(max_refinements=1)
    assert not few.complete
    found = run(max_refinements=6, folder=tmp_path)
    assert found.complete
    assert found.num_refined == 6
    assert max(edge.cost for edge in found.edges) < 0.01
    assert found.edges[0].cost <= few.edges[0].cost
    again = run(max_refinements=6, folder=tmp_path)
    for edge, other in zip(found.edges, again.edges, strict=True):
        assert edge.path.points["w"].tobytes() == other.path.points["w"].tobytes()
    with pytest.raises(ValueError, match="starts at another point than mode"):
        curves.spanning_tree(
            ring, modes, ONE,
            connect=lambda i, j: curves.measure_path(ring, {"w": jnp.ones((2, 2))}, ONE),
        )  # fmt: skip
    with pytest.raises(ValueError, match="expected an optimizer"):
        curves.spanning_tree(ring, modes, ONE)
