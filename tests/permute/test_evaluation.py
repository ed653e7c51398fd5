"""Barriers between two networks, before and after alignment."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from geojax import batches, surface
from geojax.permute import evaluation
from geojax.symmetry import Factor, Group, Leaf, PermutationSpec, SpecError, action

WIDTH, INPUTS, CLASSES = 6, 4, 3
HIDDEN = Factor("hidden", WIDTH)
SPEC = PermutationSpec(
    leaves=(
        Leaf("['b']", (WIDTH,), (HIDDEN,)),
        Leaf("['v']", (WIDTH, CLASSES), (HIDDEN, Factor("", CLASSES))),
        Leaf("['w']", (INPUTS, WIDTH), (Factor("", INPUTS), HIDDEN)),
    ),
    groups=(Group("hidden", WIDTH),),
)


def network(seed):
    rng = np.random.default_rng(seed)
    return {
        leaf.path[2:-2]: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)
        for leaf in SPEC.leaves
    }


def metrics(params, batch):
    hidden = jax.nn.relu(batch["x"] @ params["w"] + params["b"][None])
    logits = hidden @ params["v"]
    log_p = jax.nn.log_softmax(logits)
    loss = -jnp.mean(jnp.take_along_axis(log_p, batch["y"][:, None], axis=1))
    wrong = jnp.argmax(logits, axis=1).astype(batch["y"].dtype) != batch["y"]
    return {"loss": loss, "error": jnp.mean(wrong.astype(jnp.float32))}


def data(n=23):
    rng = np.random.default_rng(9)
    return {
        "x": rng.normal(size=(n, INPUTS)).astype(np.float32),
        "y": rng.integers(0, CLASSES, n).astype(np.int32),
    }


def measured(a, b, **options):
    return evaluation.barrier(metrics, a, b, batches.split(data(), 10), **options)


# -------------------------------------------------------------------------------- the numbers


def test_both_barriers_of_a_parabola_are_those_of_the_closed_form():
    # Values 1 + 4 h t (1 - t) + 2 g t, with the chord 1 + 2 g t.
    ts = np.linspace(0, 1, 401)
    h, g = 0.7, 0.25
    found = evaluation.barrier_of_values(ts, 1 + 4 * h * ts * (1 - ts) + 2 * g * ts)
    top = 0.5 + g / (4 * h)
    assert found.height == pytest.approx(h, rel=1e-12)
    assert found.t == 0.5
    assert found.t_highest == pytest.approx(top, abs=1 / 400)
    assert found.height_over_mean == pytest.approx(h + g**2 / (4 * h), abs=4 * h / 800**2)
    assert found.area == pytest.approx(2 * h / 3, rel=1e-5)
    assert (found.start, found.end) == (1.0, 1.0 + 2 * g)


def test_the_two_definitions_agree_where_the_ends_do():
    values = np.random.default_rng(0).normal(size=25)
    values[-1] = values[0]
    found = evaluation.barrier_of_values(np.linspace(0, 1, 25), values)
    assert found.height == pytest.approx(found.height_over_mean, rel=1e-12)
    assert found.t == found.t_highest


def test_the_two_definitions_differ_by_at_most_half_the_gap_and_neither_dominates():
    rng = np.random.default_rng(1)
    ts = np.linspace(0, 1, 25)
    signs = set()
    for _ in range(100):
        values = rng.normal(size=25) + rng.normal() * 3 * ts
        found = evaluation.barrier_of_values(ts, values)
        gap = abs(found.end - found.start)
        assert found.height >= 0
        assert found.height_over_mean >= gap / 2 - 1e-12
        assert abs(found.height_over_mean - found.height) <= gap / 2 + 1e-12
        signs.add(np.sign(found.height_over_mean - found.height))
        assert found.highest == values.max() == values[ts == found.t_highest][0]
    assert signs == {-1.0, 1.0}


# ---------------------------------------------------------------------------------- the lines


def test_both_lines_equal_a_loop_in_float64_with_a_ragged_last_batch():
    a, b = network(0), network(1)
    permutation = action.random(jax.random.key(0), SPEC)
    found = measured(a, b, spec=SPEC, permutation=permutation, ts=np.linspace(0, 1, 5))
    with jax.enable_x64(True):
        batch = {"x": data()["x"].astype(np.float64), "y": data()["y"]}
        a64, b64 = (jax.tree.map(lambda x: np.asarray(x, np.float64), p) for p in (a, b))
        moved = action.apply(SPEC, permutation, b64)
        for line, end in ((found.naive, b64), (found.aligned, moved)):
            for i, t in enumerate(found.ts):
                params = jax.tree.map(lambda x, y, t=t: jnp.asarray((1 - t) * x + t * y), a64, end)
                for name, value in metrics(params, batch).items():
                    assert line[name].values[i] == pytest.approx(float(value), abs=1e-6), name
            assert line["loss"].values.shape == (5,)
        gap = jax.tree.map(lambda x, y: np.sum((x - np.asarray(y)) ** 2), a64, moved)
    assert found.distance_aligned == pytest.approx(np.sqrt(sum(gap.values())), rel=1e-6)


def test_the_lines_are_those_of_surface():
    a, b = network(0), network(1)
    permutation = action.random(jax.random.key(0), SPEC)
    found = measured(a, b, spec=SPEC, permutation=permutation)
    line = surface.line(
        metrics, a, action.apply(SPEC, permutation, b), batches.split(data(), 10), found.ts
    )
    np.testing.assert_allclose(found.aligned["loss"].values, line.values["loss"], rtol=2e-6)
    want = surface.barrier(found.ts, found.aligned["loss"].values)
    got = found.aligned["loss"]
    assert (got.t, got.start, got.end, got.highest) == want[1:]
    assert got.height == pytest.approx(want.height, rel=1e-12)
    assert len(found.ts) == 25
    assert found.distance_aligned == pytest.approx(line.distance, rel=1e-6)


def test_the_barrier_of_a_network_with_itself_is_zero_to_the_last_bit():
    a = network(0)
    there = action.random(jax.random.key(3), SPEC)
    b = action.apply(SPEC, there, a)
    found = measured(a, b, spec=SPEC, permutation=action.inverse(SPEC, there))
    for name, aligned in found.aligned.items():
        assert (aligned.height, aligned.height_over_mean, aligned.area) == (0, 0, 0), name
        assert set(aligned.values) == {aligned.start}
    assert found.distance_aligned == 0
    assert np.ptp(found.naive["loss"].values) > 0.1


def test_one_program_measures_both_lines():
    traces = []

    def counted(params, batch):
        traces.append(1)
        return metrics(params, batch)

    evaluation.barrier(
        counted, network(0), network(1), data(), spec=SPEC, permutation=action.identity(SPEC)
    )
    assert len(traces) == 1


def test_without_a_permutation_there_is_one_line():
    found = measured(network(0), network(1), ts=[0.0, 0.5, 1.0])
    assert found.aligned is None
    assert found.distance_aligned is None
    assert [row["line"] for row in found.table()] == ["naive", "naive"]


def test_state_is_made_anew_at_each_point():
    def with_state(params, state, batch):
        return {"gap": jnp.abs(state - params["b"][0]) + 0 * jnp.mean(batch["x"])}

    found = evaluation.barrier(
        with_state, network(0), network(1), data(), spec=SPEC,
        permutation=action.random(jax.random.key(0), SPEC), ts=[0.0, 0.3, 1.0],
        state_fn=lambda params: params["b"][0],
    )  # fmt: skip
    np.testing.assert_array_equal(found.naive["gap"].values, 0)
    np.testing.assert_array_equal(found.aligned["gap"].values, 0)


def test_what_cannot_be_a_barrier_is_refused():
    a, b = network(0), network(1)
    with pytest.raises(ValueError, match="spec without a permutation"):
        measured(a, b, spec=SPEC)
    with pytest.raises(ValueError, match="ascend from 0 to 1"):
        measured(a, b, ts=[0.0, 0.5])
    with pytest.raises(ValueError, match=r"\['v'\] has shape"):
        measured(a, b | {"v": jnp.ones((2, 2))})
    with pytest.raises(SpecError, match="no permutation of 0..5"):
        measured(a, b, spec=SPEC, permutation={"hidden": np.zeros(WIDTH, np.int32)})
    with pytest.raises(ValueError, match="not finite"):
        measured(a, b | {"b": jnp.full(WIDTH, jnp.nan)}, ts=[0.0, 1.0])
    with pytest.raises(TypeError, match="dict of scalars"):
        evaluation.barrier(lambda p, d: p["w"], a, b, data())


def test_sharded_barriers_equal_those_of_one_device(mesh):
    a, b = network(0), network(1)
    permutation = action.random(jax.random.key(0), SPEC)
    options = {"spec": SPEC, "permutation": permutation, "ts": [0.0, 0.4, 1.0]}

    def loss(params, batch):
        hidden = jnp.sum(batch["x"][:, :, None] * params["w"][None], axis=1)
        out = jnp.sum(jax.nn.relu(hidden + params["b"][None])[:, :, None] * params["v"][None], 1)
        return {"square": jnp.mean(jnp.square(out))}

    source = batches.split({"x": data()["x"]}, 8)
    want = evaluation.barrier(loss, a, b, source, **options)
    where = {"w": P(None, "model"), "b": P("model"), "v": P("model")}
    where = {name: NamedSharding(mesh, spec) for name, spec in where.items()}
    with jax.set_mesh(mesh):
        got = evaluation.barrier(
            loss, jax.device_put(a, where), jax.device_put(b, where), source, mesh=mesh, **options
        )
    for mine, other in ((got.naive, want.naive), (got.aligned, want.aligned)):
        np.testing.assert_allclose(mine["square"].values, other["square"].values, rtol=1e-5)
    assert got.distance_aligned == pytest.approx(want.distance_aligned, rel=1e-6)


# ------------------------------------------------------------------------- a barrier that stays


def test_no_permutation_removes_the_barrier_between_two_exact_solutions():
    """Two networks that solve a task without an error, and no permutation that joins them.

    Git Re-Basin's example that linear connectivity is a property of what SGD finds.
    """
    two, four = Factor("first", 2), Factor("second", 2)
    fixed = Factor("", 2)
    spec = PermutationSpec(
        leaves=(
            Leaf("['b1']", (2,), (two,)),
            Leaf("['b2']", (2,), (four,)),
            Leaf("['w1']", (2, 2), (fixed, two)),
            Leaf("['w2']", (2, 2), (two, four)),
            Leaf("['w3']", (2,), (four,)),
        ),
        groups=(Group("first", 2), Group("second", 2)),
    )

    def solution(w1, b1, w2, b2):
        found = {"w1": w1, "b1": b1, "w2": w2, "b2": b2, "w3": [-1.0, -1.0]}
        return {name: jnp.asarray(value, jnp.float32) for name, value in found.items()}

    eye, turn = np.eye(2), np.diag([-1.0, 1.0])
    a = solution(-eye, [1.0, 0.0], turn, [1.0, 0.0])
    b = solution(eye, [0.0, 1.0], -turn, [0.0, 1.0])

    def error(params, batch):
        hidden = jax.nn.leaky_relu(batch["x"] @ params["w1"] + params["b1"][None], 0.01)
        hidden = jax.nn.leaky_relu(hidden @ params["w2"] + params["b2"][None], 0.01)
        positive = hidden @ params["w3"] >= 0
        return {"error": jnp.mean((positive != batch["y"]).astype(jnp.float32))}

    side = (np.arange(120, dtype=np.float32) + 0.5) / 60 - 1
    x = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    batch = {"x": x, "y": (x[:, 0] <= 0) & (x[:, 1] >= 0)}
    swaps = [np.array([0, 1], np.int32), np.array([1, 0], np.int32)]
    for first, second in itertools.product(swaps, swaps):
        found = evaluation.barrier(
            error, a, b, batch, spec=spec, permutation={"first": first, "second": second}
        ).aligned["error"]
        assert max(found.start, found.end) <= 0.001
        assert found.highest == pytest.approx(0.25, abs=0.01)
        assert found.height == pytest.approx(0.25, abs=0.01)
