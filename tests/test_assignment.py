"""Assignments: SciPy's optimum in every setting, flagged failures, and certificates that hold."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.optimize import linear_sum_assignment

from geojax import assignment

EPS = np.finfo(np.float64).eps


def best(scores, maximize=True):
    rows, columns = linear_sum_assignment(scores, maximize=maximize)
    return scores[rows, columns].sum()


def check_matching(columns, shape):
    used = columns[columns >= 0]
    assert columns.dtype == np.int32
    assert columns.shape == shape[:1]
    assert len(np.unique(used)) == len(used) == min(shape)
    assert (used < shape[1]).all()


def random_scores(r, kind, n, m):
    return {
        "ties": lambda: r.integers(-3, 4, (n, m)),
        "integers": lambda: r.integers(-(2**40), 2**40, (n, m)),
        "negative": lambda: -r.exponential(size=(n, m)),
        "constant": lambda: np.full((n, m), -2.5),
        "zeros": lambda: np.where(r.uniform(size=(n, m)) < 0.5, -0.0, 0.0),
        "normal": lambda: r.normal(size=(n, m)) * 10.0 ** r.integers(-8, 8),
    }[kind]()


KINDS = ("ties", "integers", "negative", "constant", "zeros", "normal")


@pytest.mark.parametrize("maximize", [True, False])
def test_the_value_is_scipys_on_500_random_matrices_of_any_shape(rng, maximize):
    for i in range(250):
        n, m = rng.integers(1, 201, 2) if i % 2 else [rng.integers(1, 201)] * 2
        scores = random_scores(rng, KINDS[i % 6], n, m)
        columns, value = assignment.solve(scores, maximize=maximize)
        check_matching(columns, (n, m))
        want = best(scores, maximize)
        if np.issubdtype(scores.dtype, np.integer):
            assert value == want
        else:
            assert abs(value - want) <= 4 * EPS * min(n, m) * np.abs(scores).max()


@pytest.mark.parametrize(("kind", "n", "m"), [
    ("normal", 1024, 1024), ("integers", 1024, 700), ("normal", 300, 1000),
])  # fmt: skip
def test_the_value_is_scipys_on_large_matrices(rng, kind, n, m):
    scores = random_scores(rng, kind, n, m)
    columns, value = assignment.solve(scores)
    check_matching(columns, (n, m))
    assert value == pytest.approx(best(scores), rel=4 * EPS * n)


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (6, 6), (3, 5), (5, 3)])
def test_no_assignment_at_all_is_better(rng, shape, maximize):
    scores = rng.integers(-4, 5, shape)
    tall = scores if shape[0] <= shape[1] else scores.T
    every = itertools.permutations(range(tall.shape[1]), tall.shape[0])
    totals = [tall[np.arange(tall.shape[0]), list(p)].sum() for p in every]
    value = assignment.solve(scores, maximize=maximize).value
    assert value == (max(totals) if maximize else min(totals))


def test_an_empty_side_is_matched_with_nothing():
    for shape in ((0, 0), (0, 3), (3, 0)):
        columns, value = assignment.solve(np.zeros(shape))
        assert columns.tolist() == [-1] * shape[0]
        assert value == 0.0


def test_a_batch_equals_its_elements_one_by_one(rng):
    scores = rng.normal(size=(3, 4, 50, 60)).astype(np.float32)
    columns, value = assignment.solve(scores)
    assert columns.shape == (3, 4, 50)
    assert value.dtype == np.float64
    for index in np.ndindex(3, 4):
        one = assignment.solve(scores[index])
        np.testing.assert_array_equal(columns[index], one.columns)
        assert value[index] == one.value


solve_many = jax.jit(jax.vmap(assignment.solve))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_jit_and_vmap_equal_a_loop_of_scipy(rng, dtype):
    scores = jnp.asarray(rng.normal(size=(8, 64, 64)) * 50).astype(dtype)
    columns, value = solve_many(scores)
    assert (columns.dtype, value.dtype) == (jnp.int32, jnp.float32)
    for one, found, total in zip(np.asarray(scores).astype(float), columns, value, strict=True):
        rows, want = linear_sum_assignment(one, maximize=True)
        np.testing.assert_array_equal(found, want)
        np.testing.assert_allclose(total, one[rows, want].sum(), rtol=64 * 2.0**-24)


def test_it_works_inside_scan_with_the_previous_assignment_carried_along(rng):
    scores = jnp.asarray(rng.normal(size=(5, 12, 12)), jnp.float32)

    @jax.jit
    def sweep(scores):
        def step(previous, one):
            found = assignment.solve(one, previous=previous, maximize=False)
            return found.columns, found

        return jax.lax.scan(step, jnp.full(12, -1), scores)[1]

    found = sweep(scores)
    eager = assignment.solve(scores, maximize=False)
    np.testing.assert_array_equal(found.columns, eager.columns)
    np.testing.assert_allclose(found.value, eager.value, rtol=1e-6)


def test_the_derivative_of_the_value_is_one_at_the_matched_pairs(rng):
    scores = jnp.asarray(rng.normal(size=(5, 7)), jnp.float32)
    gradient = jax.jit(jax.grad(lambda s: assignment.solve(s).value))(scores)
    np.testing.assert_array_equal(gradient, np.eye(7)[assignment.solve(scores).columns])


def test_sharded_scores_are_solved_inside_jit(mesh, rng):
    scores = rng.normal(size=(8, 6, 6)).astype(np.float32)
    want = assignment.solve(scores)
    with jax.set_mesh(mesh):
        placed = jax.device_put(scores, NamedSharding(mesh, P("data", None, "model")))
        inside = jax.jit(assignment.solve)(placed)
        outside = assignment.solve(placed)
    for found in (inside, outside):
        np.testing.assert_array_equal(found.columns, want.columns)
        np.testing.assert_allclose(found.value, want.value, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused_by_place(bad):
    scores = np.ones((2, 3, 3))
    scores[1, 2, 0] = bad
    with pytest.raises(ValueError, match=r"row 2, column 0 of batch element \(1,\).*finite"):
        assignment.solve(scores)
    with pytest.raises(ValueError, match=r"row 2, column 0 is"):
        assignment.resolve(scores[1], assignment.start(3))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_inside_jit_scores_that_are_not_finite_flag_their_own_element_only(rng, bad):
    scores = rng.normal(size=(8, 64, 64)).astype(np.float32)
    clean = assignment.solve(scores)
    scores[3, 0, 5] = bad
    columns, value = solve_many(scores)
    assert (columns[3] == -1).all()
    assert np.isnan(value[3])
    others = np.arange(8) != 3
    np.testing.assert_array_equal(columns[others], clean.columns[others])
    assert np.isfinite(value[others]).all()


def test_large_finite_scores_are_not_taken_for_infinite():
    scores = np.array([[1.5e308, 0.0], [0.0, 1e300]])
    assert assignment.solve(scores).columns.tolist() == [0, 1]


def test_optax_has_two_traps_that_are_not_here(rng):
    # Its rows come unsorted for square costs, so that its second output alone is no permutation of
    # the rows; and NaN gives an identity without a word.
    hungarian = jax.jit(optax.assignment.hungarian_algorithm)
    unsorted = 0
    for _ in range(20):
        costs = rng.normal(size=(9, 9)).astype(np.float32)
        rows, columns = (np.asarray(x) for x in hungarian(costs))
        found = assignment.solve(costs, maximize=False)
        unsorted += not (rows == np.arange(9)).all()
        np.testing.assert_array_equal(columns[np.argsort(rows)], found.columns)
    assert unsorted
    costs[:] = np.nan
    rows, columns = hungarian(costs)
    np.testing.assert_array_equal(rows, columns)  # the identity
    assert (jax.jit(assignment.solve)(costs).columns == -1).all()


@pytest.mark.parametrize("inside_jit", [False, True])
def test_the_previous_assignment_is_kept_among_ties(rng, inside_jit):
    solve = jax.jit(assignment.solve) if inside_jit else assignment.solve
    previous = rng.permutation(30)
    kept = solve(np.ones((30, 30), np.float32), previous=previous).columns
    np.testing.assert_array_equal(kept, previous)
    # It is given up as soon as it loses anything.
    scores = np.ones((30, 30), np.float32)
    scores[0, previous[0]] = 1 - 1e-5
    assert solve(scores, previous=previous).columns[0] != previous[0]


def test_a_previous_that_is_no_assignment_is_ignored(rng):
    scores = rng.normal(size=(5, 5))
    want = assignment.solve(scores).columns
    for previous in (np.full(5, -1), np.zeros(5, int), np.arange(1, 6)):
        np.testing.assert_array_equal(assignment.solve(scores, previous=previous).columns, want)
    tall = np.ones((4, 2))
    kept = assignment.solve(tall, previous=np.array([-1, 1, -1, 0])).columns
    assert kept.tolist() == [-1, 1, -1, 0]


@pytest.mark.parametrize(
    ("scores", "options", "error", "says"),
    [
        (np.ones(3), {}, ValueError, r"shape \(3,\); expected \(..., rows"),
        (np.ones((2, 2), complex), {}, TypeError, "complex.*; expected real"),
        (np.ones((2, 2)), {"previous": np.arange(3)}, ValueError, r"shape \(3,\); expected \(2,\)"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(scores, options, error, says):
    with pytest.raises(error, match=says):
        assignment.solve(scores, **options)


# ------------------------------------------------------------------------- sequences of problems

SIZE = 320


def changing(r, kind, num=8):
    """Score matrices that change slowly, with what is expected of most calls."""
    scores = r.normal(size=(SIZE, SIZE))
    for i in range(num):
        if kind == "rows" and i:
            rows = r.choice(SIZE, 6, replace=False)
            scores[rows] = r.normal(size=(6, SIZE))
        elif kind == "columns" and i:
            scores[:, r.choice(SIZE, 3)] = r.normal(size=(SIZE, 3))
        elif kind == "noise" and i:
            scores += 1e-2 * r.normal(size=(SIZE, SIZE))
        elif kind == "scaled":
            scores = scores * 10.0 ** r.integers(-3, 4) + r.normal(size=(SIZE, 1))
        elif kind == "integers":
            scores = np.rint(100 * scores) if not i else scores + r.integers(-1, 2, scores.shape)
        elif kind == "ties":
            scores = np.rint(scores) if not i else scores + (r.uniform(size=scores.shape) < 0.01)
        elif kind == "unrelated":
            scores = r.normal(size=(SIZE, SIZE))
        yield scores.copy()


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize(
    "kind", ["rows", "columns", "noise", "scaled", "integers", "ties", "unrelated"]
)
def test_a_warm_solve_has_the_objective_of_a_cold_one(rng, kind, maximize):
    state = assignment.start(SIZE)
    for scores in changing(rng, kind):
        found, state = assignment.resolve(scores, state, maximize=maximize)
        check_matching(found.columns, (SIZE, SIZE))
        assert abs(found.value - best(scores, maximize)) <= 1e-12 * np.abs(scores).max()
        np.testing.assert_array_equal(state.columns, found.columns)
    if kind in ("rows", "columns", "noise"):
        assert (state.num_cold, state.num_warm + state.num_certified) == (1, 7)


@pytest.mark.parametrize("change", ["nothing", "row and column constants", "worse elsewhere"])
def test_an_assignment_that_stays_optimal_is_certified_without_a_solve(rng, change, monkeypatch):
    scores = rng.normal(size=(SIZE, SIZE))
    first, state = assignment.resolve(scores, assignment.start(SIZE))
    if change == "row and column constants":
        scores = scores + rng.normal(size=(SIZE, 1)) + 1e-3 * rng.normal(size=(1, SIZE))
    elif change == "worse elsewhere":
        drop = rng.exponential(size=scores.shape)
        drop[np.arange(SIZE), first.columns] = 0
        scores = scores - drop
    monkeypatch.setattr(assignment, "_solve_one", None)
    if change != "row and column constants":  # there paths through many columns change
        monkeypatch.setattr(assignment._Edges, "solve", None)
        again, state = assignment.resolve(scores, state)
        assert state.num_certified == 1
    else:
        again, state = assignment.resolve(scores, state)
        assert state.num_cold == 1
    np.testing.assert_array_equal(again.columns, first.columns)


def test_a_false_certificate_is_impossible_whatever_the_state_claims(rng):
    # Potentials and columns that were never those of a solve: the gap is measured, not believed.
    scores = rng.normal(size=(SIZE, SIZE))
    for potentials in (np.zeros(SIZE), rng.normal(size=SIZE), np.full(SIZE, np.nan)):
        state = assignment.WarmStart(rng.permutation(SIZE).astype(np.int32), potentials)
        found, state = assignment.resolve(scores, state)
        assert abs(found.value - best(scores)) <= 1e-12 * np.abs(scores).max()
        assert state.num_certified == 0


@pytest.mark.parametrize("n", [1, 8, SIZE])
def test_a_sequence_keeps_the_assignment_among_ties(rng, n):
    state = assignment.start(n)._replace(columns=rng.permutation(n).astype(np.int32))
    found, after = assignment.resolve(np.full((n, n), 3.0), state)
    np.testing.assert_array_equal(found.columns, state.columns)
    assert after.columns is not state.columns


def test_a_warm_solve_keeps_the_assignment_among_ties(rng):
    # Columns in equal pairs, swapped; the potentials are too far off for a certificate.
    scores = np.repeat(rng.normal(size=(SIZE, SIZE // 2)), 2, axis=1)
    first, state = assignment.resolve(scores, assignment.start(SIZE))
    swapped = first.columns ^ 1
    noise = 0.1 * rng.normal(size=SIZE)
    state = assignment.WarmStart(swapped, state.potentials + noise)
    found, state = assignment.resolve(scores, state)
    assert state.num_warm == 1
    np.testing.assert_array_equal(found.columns, swapped)


def test_resolve_says_where_it_does_not_work():
    with pytest.raises(TypeError, match="host only; inside `jit` use `solve`"):
        jax.jit(lambda s: assignment.resolve(s, assignment.start(3)))(jnp.ones((3, 3)))
    with pytest.raises(ValueError, match=r"shape \(3, 4\); expected \(3, 3\)"):
        assignment.resolve(np.ones((3, 4)), assignment.start(3))


# ------------------------------------------------------------------------------ other objectives


@pytest.mark.parametrize("shape", [(7, 7), (4, 7), (7, 4)])
def test_greedy_takes_at_least_half_of_the_optimum(rng, shape):
    for _ in range(20):
        scores = rng.exponential(size=shape)
        columns, value = assignment.greedy(scores)
        check_matching(columns, shape)
        assert 0.5 * best(scores) <= value <= best(scores) + 1e-12
        np.testing.assert_array_equal(assignment.greedy(-scores, maximize=False).columns, columns)
        assert columns[scores.max(1).argmax()] == scores.max(0).argmax()


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("shape", [(7, 7), (3, 6), (6, 3)])
def test_the_bottleneck_is_that_of_brute_force(rng, shape, maximize):
    for scores in (rng.normal(size=shape), rng.integers(0, 4, shape)):
        tall = scores if shape[0] <= shape[1] else scores.T
        every = np.array(list(itertools.permutations(range(tall.shape[1]), tall.shape[0])))
        picked = tall[np.arange(tall.shape[0])[None], every]
        want = picked.min(1).max() if maximize else picked.max(1).min()
        columns, value = assignment.bottleneck(scores, maximize=maximize)
        check_matching(columns, shape)
        assert value == want
        matched = scores[columns >= 0, columns[columns >= 0]]
        assert value == (matched.min() if maximize else matched.max())
