"""Training a complex: its step by hand, its volume in height form, its guards, on meshes."""

import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from geojax import _families, batches, checkpoint, simplex, tree
from geojax.simplex import _heights

KEY = jax.random.key(3)


def points(seed, num, scale=1.0):
    rng = np.random.default_rng(seed)
    shapes = {"a": (num, 4, 3), "b": [(num, 3), (num,)]}
    return jax.tree.map(
        lambda s: jnp.asarray(scale * rng.normal(size=s), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def data(seed=0, num=24):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(num, 4)).astype(np.float32),
        "y": rng.normal(size=(num, 3)).astype(np.float32),
    }


def loss_fn(params, batch):
    out = jnp.tanh(batch["x"] @ params["a"] + params["b"][0][None]) + params["b"][1]
    return jnp.mean(jnp.square(out - batch["y"]))


def flat(point):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(point)])


def rows(stack):
    return np.stack([flat(x) for x in tree.unstack(stack)])


def exact_log_volume(matrix):
    edges = matrix[1:] - matrix[0]
    values = np.linalg.svd(edges, compute_uv=False)
    return np.log(values).sum() - sum(np.log(np.arange(1, len(edges) + 1)))


def same_bits(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# --------------------------------------------------------------------------------- heights


@functools.partial(jax.jit, static_argnums=2)
def heights(free, frozen, faces, bases):
    def total(free):
        found = _heights.log_volumes(free, frozen, faces, bases)
        return jnp.sum(found), found

    (_, found), slope = jax.value_and_grad(total, has_aux=True)(free)
    return found, slope


@pytest.mark.parametrize(
    "members", [((0,),), ((0, 1),), ((0, 1, 2, 3),), ((0, 2, 3), (1, 2, 3)), ((0,), (1, 2))]
)
def test_the_height_form_is_the_volume_and_its_gradient(members):
    stack = points(1, 5)
    frozen = jax.tree.map(lambda x: x[:4], stack)
    free = jax.tree.map(lambda x: x[4], stack)
    faces, bases = _heights.bases(frozen, members)
    found, slope = heights(free, frozen, faces, bases)
    whole = rows(stack)
    expected, direction = [], 0
    for face in members:
        matrix = whole[[*face, 4]]
        expected.append(exact_log_volume(matrix))
        edges = matrix[1:-1] - matrix[0]
        u = matrix[-1] - matrix[0]
        h = u - edges.T @ np.linalg.lstsq(edges.T, u, rcond=None)[0] if len(edges) else u
        direction = direction + h / (h @ h)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    np.testing.assert_allclose(flat(slope), direction, rtol=2e-5, atol=2e-6)


def test_the_height_form_is_right_over_faces_that_are_nearly_flat():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(6, 20_000)) * np.sqrt(3509 / 2 / 20_000)
    matrix[4] = matrix[:4].mean(0) + 1e-3 * rng.normal(size=20_000) / np.sqrt(20_000)
    matrix[5] = matrix[:5].mean(0) + 1e-3 * rng.normal(size=20_000) / np.sqrt(20_000)
    matrix = matrix.astype(np.float32)
    frozen, free = {"w": jnp.asarray(matrix[:5])}, {"w": jnp.asarray(matrix[5])}
    faces, bases = _heights.bases(frozen, ((0, 1, 2, 3, 4),))
    assert faces.passes == 3
    found, slope = heights(free, frozen, faces, bases)
    wide = matrix.astype(np.float64)
    assert abs(2 * float(found[0]) - 2 * exact_log_volume(wide)) < 1e-2
    # The gradient is orthogonal to the face; what is left of it there is below a per mille.
    direction = np.asarray(slope["w"], np.float64)
    edges = wide[1:5] - wide[0]
    inside = edges.T @ np.linalg.lstsq(edges.T, direction, rcond=None)[0]
    assert np.linalg.norm(inside) < 1e-3 * np.linalg.norm(direction)


def test_a_height_of_zero_has_no_gradient_and_a_flat_face_is_refused():
    stack = points(2, 3)
    first, second, _ = tree.unstack(stack)
    frozen = tree.stack([first, second])
    faces, bases = _heights.bases(frozen, ((0,),))
    found, slope = heights(first, frozen, faces, bases)
    assert float(found[0]) == -np.inf
    assert not flat(slope).any()
    with pytest.raises(ValueError, match="affinely dependent"):
        _heights.bases(tree.stack([first, first]), ((0, 1),))


# --------------------------------------------------------------------------------- a step


def weights_of(key, shape_simplices, num_vertices, num):
    """The draws of a step, from its documented order of keys, in NumPy."""
    _, key_weights = jax.random.split(key)
    draws = np.asarray(jax.random.exponential(key_weights, (num, len(shape_simplices[0]))))
    out = np.zeros((num, num_vertices))
    out[:, list(shape_simplices[0])] = draws
    return out / out.sum(1, keepdims=True)


@pytest.mark.parametrize("decay", ["point", "vertices"])
def test_a_step_is_the_average_of_c_times_the_gradient_by_hand(decay):
    start, batch = simplex.single(points(4, 3)), data()
    found = simplex.fit(
        loss_fn, start, batch, optax.sgd(0.1), 1, key=KEY, num_samples=4, weight_decay=0.3,
        decay=decay, volume_weight=0.05,
    )  # fmt: skip
    # Step 0 of the loop, its one batch, the loss's half of that key, the draws' half of this.
    key = jax.random.fold_in(jax.random.fold_in(KEY, 0), 0)
    key_draw, _ = jax.random.split(jax.random.split(key)[1])
    weights = weights_of(key_draw, start.simplices, 3, 4)
    matrix = rows(start.vertices)
    slope, data_losses = np.zeros(matrix.shape[1]), []
    for c in weights:
        at = tree.combine(start.vertices, jnp.asarray(c, jnp.float32))
        value, gradient = jax.value_and_grad(loss_fn)(at, batch)
        data_losses.append(float(value))
        slope += c[2] * flat(gradient) / 4
        if decay == "point":
            slope += c[2] * 0.3 * flat(at) / 4
    if decay == "vertices":
        slope += 0.3 * matrix[2]
    edge, u = matrix[1] - matrix[0], matrix[2] - matrix[0]
    h = u - edge * (edge @ u) / (edge @ edge)
    slope -= 0.05 * h / (h @ h)
    moved = matrix[2] - 0.1 * slope
    np.testing.assert_allclose(rows(found.complex.vertices)[2], moved, rtol=1e-5, atol=1e-6)
    assert found.history["data_loss"][0] == pytest.approx(np.mean(data_losses), rel=1e-5)
    assert found.history["log_volume"][0] == pytest.approx(exact_log_volume(matrix), abs=1e-5)
    assert found.history["volume_gradient_norm"][0] == pytest.approx(
        0.05 / np.linalg.norm(h), rel=1e-4
    )
    parts = ("data_loss", "penalty", "volume_term")
    total = sum(float(found.history[name][0]) for name in parts)
    assert float(found.history["loss"][0]) == pytest.approx(total, rel=1e-6)


def test_the_sum_of_losses_is_the_mean_at_a_rate_times_as_high():
    start, batch = simplex.single(points(5, 3)), data()
    options = {"key": KEY, "num_samples": 5}
    mean = simplex.fit(loss_fn, start, batch, optax.sgd(0.1), 20, **options)
    total = simplex.fit(loss_fn, start, batch, optax.sgd(0.02), 20, reduction="sum", **options)
    np.testing.assert_allclose(
        rows(total.complex.vertices), rows(mean.complex.vertices), rtol=1e-5, atol=1e-5
    )


def test_draws_at_once_and_in_turn_are_the_same_step():
    start, batch = simplex.star(points(6, 2), points(7, 2)), data()
    options = {"key": KEY, "num_samples": 3, "volume_weight": 0.01, "weight_decay": 0.1}
    one = simplex.fit(loss_fn, start, batch, optax.sgd(0.1), 3, **options)
    two = simplex.fit(loss_fn, start, batch, optax.sgd(0.1), 3, samples="vmap", **options)
    np.testing.assert_allclose(
        rows(one.complex.vertices), rows(two.complex.vertices), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("free", [(-1,), (0, 2), (1,)])
def test_frozen_vertices_stay_to_the_bit_under_momentum_and_decay(free):
    start = simplex.star(points(8, 2), points(9, 2))
    rule = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.05, momentum=0.9))
    found = simplex.fit(
        loss_fn, start, data(), rule, 50, key=KEY, free=free, volume_weight=1e-2, num_samples=2
    )
    before, after = (tree.unstack(x.vertices) for x in (start, found.complex))
    for i in range(4):
        moves = i in {j % 4 for j in free}
        assert same_bits(before[i], after[i]) != moves
    assert found.complex.simplices == start.simplices


def test_one_vertex_alone_trains_as_a_plain_network():
    from geojax import fit

    start, batch = simplex.single(points(10, 1)), data()
    found = simplex.fit(
        loss_fn, start, batch, optax.sgd(0.1), 10, key=KEY, free=(0,), num_samples=1
    )
    plain = fit.fit(loss_fn, tree.unstack(start.vertices)[0], batch, optax.sgd(0.1), 10, key=KEY)
    np.testing.assert_allclose(
        rows(found.complex.vertices)[0], flat(plain.params), rtol=1e-6, atol=1e-6
    )


def test_several_complexes_train_as_if_alone():
    starts = [simplex.single(points(20 + i, 3)) for i in range(3)]
    source = batches.split(data(1, 32), 8, key=jax.random.key(1))
    rule = optax.chain(optax.clip_by_global_norm(0.3), optax.adam(0.01))
    options = {"num_samples": 2, "volume_weight": 1e-2}
    with jax.numpy_dtype_promotion("standard"):
        both = {
            name: simplex.fit(loss_fn, starts, source, rule, 12, key=KEY, together=name, **options)
            for name in ("vmap", "sequential")
        }
    for i in range(3):
        np.testing.assert_allclose(
            rows(both["vmap"].complex[i].vertices),
            rows(both["sequential"].complex[i].vertices),
            rtol=1e-5, atol=1e-5,
        )  # fmt: skip

    # Alone, with the keys that it has among others.
    def alone(i):
        def keyed(params, batch):
            return loss_fn(params, batch)

        del keyed
        return simplex.fit(loss_fn, starts[i : i + 1], source, rule, 12, key=KEY, **options)

    with jax.numpy_dtype_promotion("standard"):
        first = alone(0)
    np.testing.assert_allclose(
        rows(first.complex[0].vertices), rows(both["vmap"].complex[0].vertices),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip
    assert {"log_volume_2", "data_loss_1"} <= set(both["vmap"].history)


def test_simplices_are_drawn_by_their_volume_as_it_is():
    vertices = {"w": jnp.asarray([[0, 0], [1, 0], [0, 9], [0, 1.0]], jnp.float32)}
    # The free vertex 3 makes triangles of area 1/2 ... with (0, 1) and of height zero with (0, 2).
    one = simplex.SimplicialComplex(vertices, [(0, 1, 3), (1, 2, 3)])
    from geojax.simplex import _objective, training

    shape = training._shape([one], (3,), False)
    parts = _families.parts_of(one.vertices, shape.split)
    faces, bases = _heights.bases(parts["fixed"], ((0, 1), (1, 2)))
    parts |= {"bases": bases}
    log_probabilities = _objective.log_probabilities_of(parts, shape, faces, "volume")
    shares = jax.nn.softmax(log_probabilities)
    np.testing.assert_allclose(shares, [1 / 9, 8 / 9], rtol=1e-5)  # areas 1/2 and 4
    weights = np.asarray(_objective.draw(KEY, shape, 20_000, log_probabilities, 1))[:, 0]
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    inside_first = weights[:, 2] == 0
    assert inside_first.mean() == pytest.approx(1 / 9, abs=0.01)
    chosen = weights[~inside_first][:, [1, 2, 3]]
    np.testing.assert_allclose(chosen.mean(0), 1 / 3, atol=0.01)
    np.testing.assert_allclose(np.cov(chosen.T)[0, 1], -1 / 36, rtol=0.05)
    uniform = np.asarray(_objective.draw(KEY, shape, 20_000, jnp.zeros(2), 1))[:, 0]
    assert (uniform[:, 2] == 0).mean() == pytest.approx(0.5, abs=0.01)


# --------------------------------------------------------------------------------- volumes


def test_the_gradient_of_the_whole_volume_reaches_the_free_vertex_of_each_simplex():
    start = simplex.star(points(11, 3), points(12, 1))
    options = {"key": KEY, "num_samples": 1, "volume_weight": 1.0}
    logs = np.array([exact_log_volume(rows(start.vertices)[[i, 3]]) for i in range(3)])
    for volumes, expected in (
        ("all", np.log(np.exp(logs).sum())),
        ("each", logs.sum()),
        ("first", logs[0]),
        ("original", np.log(np.exp(2 * logs[0]) + 1e-4)),
    ):
        found = simplex.fit(loss_fn, start, data(), optax.sgd(0.0), 1, volumes=volumes, **options)
        assert found.history["log_volume"][0] == pytest.approx(expected, abs=1e-4), volumes


def test_the_general_volume_and_the_height_form_agree():
    start = simplex.star(points(13, 2), points(14, 2))
    shared = {"key": KEY, "num_samples": 1, "volume_weight": 0.5}
    zero = lambda params, batch: 0 * jnp.sum(params["a"])  # noqa: E731
    one = simplex.fit(zero, start, data(), optax.sgd(0.1), 1, **shared)
    both = simplex.fit(zero, start, data(), optax.sgd(0.1), 1, free=(2, 3), **shared)
    np.testing.assert_allclose(
        rows(one.complex.vertices)[3], rows(both.complex.vertices)[3], rtol=1e-5, atol=1e-6
    )
    assert one.history["log_volume"][0] == pytest.approx(both.history["log_volume"][0], abs=1e-5)


def test_a_schedule_a_target_and_the_originals_rule_weigh_the_volume():
    start = simplex.single(points(15, 3))
    shared = {"key": KEY, "num_samples": 1}
    rising = simplex.fit(
        loss_fn, start, data(), optax.sgd(0.0), 4,
        volume_weight=lambda step: jnp.float32(0.1) * step.astype(jnp.float32), **shared,
    )  # fmt: skip
    np.testing.assert_allclose(rising.history["volume_weight"], [0, 0.1, 0.2, 0.3], rtol=1e-6)
    now = float(rising.history["log_volume"][0])
    aim = simplex.fit(
        lambda p, b: 0 * jnp.sum(p["a"]), start, data(), optax.sgd(4.0), 600,
        volume_weight=simplex.Target(now + 1.0, 0.5), **shared,
    )  # fmt: skip
    assert aim.history["log_volume"][-1] == pytest.approx(now + 1.0, abs=0.02)
    assert aim.history["volume_weight"][0] == pytest.approx(0.5, rel=1e-4)
    # The table of the weights of the original's scripts, for VGG-16's distances.
    logs = [simplex.random_log_square_volume(3509, n) for n in (2, 3, 4, 5, 6, 8)]
    np.testing.assert_allclose(logs, [8.16, 14.65, 20.2, 25.1, 29.6, 37.3], atol=0.06)
    for scale, expected in (
        (1e-6, [1.2e-7, 6.8e-8, 4.9e-8, 4.0e-8, 3.4e-8, 2.7e-8]),
        (1e-10, [1e-8] * 6),
        (0.1, [1.2e-2, 6.8e-3, 4.9e-3, 4.0e-3, 3.4e-3, 2.7e-3]),
    ):
        found = [simplex.original_weight(scale, log) for log in logs]
        np.testing.assert_allclose(found, expected, rtol=0.03)
    assert simplex.original_weight(1e-6, simplex.random_log_square_volume(3509, 1)) == (
        pytest.approx(1e-2, rel=1e-2)
    )
    assert simplex.original_weight(1e-6, -3.0) == 1e-8
    wide = simplex.single(points(19, 3, scale=10.0))
    expected = 0.1 / exact_log_volume(rows(wide.vertices))
    assert simplex.normalized_weight(0.1, wide) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="more than 0"):
        simplex.normalized_weight(0.1, simplex.single(points(19, 3, scale=0.01)))


def test_a_weight_that_does_nothing_is_reported():
    start = simplex.single(points(16, 2))
    with pytest.warns(simplex.InertVolumeWarning, match="did nothing"):
        found = simplex.fit(loss_fn, start, data(), optax.sgd(0.01), 5, key=KEY, volume_weight=1e-8)
    assert found.volume_share < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simplex.fit(loss_fn, start, data(), optax.sgd(0.01), 5, key=KEY, volume_weight=0.1)


def test_similarity_drives_vertices_apart_from_scratch():
    base = points(17, 1)
    start = simplex.single(
        jax.tree.map(lambda x, y: x + 0.3 * y, jax.tree.map(lambda x: jnp.repeat(x, 3, 0), base),
                     points(18, 3))
    )  # fmt: skip
    zero = lambda params, batch: 0 * jnp.sum(params["a"])  # noqa: E731

    def cosines(vertices):
        matrix = rows(vertices)
        unit = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
        return np.mean((unit @ unit.T)[np.triu_indices(3, 1)] ** 2)

    found = simplex.fit(
        zero, start, data(), optax.sgd(0.5), 200, key=KEY, free=range(3), num_samples=1,
        similarity_weight=1.0,
    )  # fmt: skip
    assert cosines(found.complex.vertices) < 0.1 * cosines(start.vertices)


# --------------------------------------------------------------------------------- the run


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path):
    start = simplex.star(points(30, 2), points(31, 2))
    source = batches.split(data(2, 40), 8, key=jax.random.key(2))
    options = {"key": KEY, "volume_weight": 1e-2, "num_samples": 2}
    rule = optax.sgd(0.05, momentum=0.9)
    whole = simplex.fit(loss_fn, start, source, rule, 60, **options)
    keep = checkpoint.Checkpointer(tmp_path / "run", every=37)
    simplex.fit(loss_fn, start, source, rule, 37, checkpoint=keep, **options)
    again = simplex.fit(loss_fn, start, source, rule, 60, checkpoint=keep, **options)
    assert again.start == 37
    assert same_bits(again.complex.vertices, whole.complex.vertices)


def test_the_volumes_share_and_its_warning_do_not_depend_on_interrupts(tmp_path):
    start = simplex.single(points(34, 3))
    shared = {"key": KEY, "volume_weight": 1e-8, "num_samples": 2}
    rule = optax.sgd(0.05)

    def run(keep=None, stop=None):
        def evaluate(complex, step):
            if step == stop:
                raise KeyboardInterrupt
            return {}

        return simplex.fit(loss_fn, start, data(), rule, 12, checkpoint=keep, evaluate=evaluate,
                           evaluate_every=1, **shared)  # fmt: skip

    def inert():
        return pytest.warns(simplex.InertVolumeWarning, match="did nothing.*it was 1.0e-08")

    with inert():
        whole = run()
    by_hand = whole.history["volume_gradient_norm"] / whole.history["gradient_norm"]
    assert whole.volume_share == pytest.approx(np.median(by_hand), rel=1e-12)
    keep = checkpoint.Checkpointer(tmp_path / "run", every=100)
    with pytest.raises(KeyboardInterrupt):
        run(keep, stop=9)
    with inert():
        again = run(keep)
    assert again.start == 9
    assert again.volume_share == whole.volume_share
    # The median of the new steps alone is another number.
    assert np.median(by_hand[9:]) != whole.volume_share
    with inert():
        restored = run(keep)
    assert (restored.start, restored.volume_share) == (12, whole.volume_share)
    free = simplex.fit(loss_fn, start, data(), rule, 2, key=KEY)
    assert np.isnan(free.volume_share)


def test_the_volumes_share_does_not_depend_on_how_many_complexes_train():
    start = simplex.single(points(35, 3))
    zero = lambda params, batch: 0 * jnp.sum(params["a"])  # noqa: E731
    shared = {"key": KEY, "volume_weight": 0.1, "num_samples": 1}
    for given in (start, [start], [start] * 4):
        found = simplex.fit(zero, given, data(), optax.sgd(0.01), 3, **shared)
        # The volume is all there is in the gradient.
        assert found.volume_share == pytest.approx(1, rel=1e-5)


def test_shared_and_independent_keys_of_dropout():
    seen = []

    def noisy(params, batch, key):
        noise = jax.random.normal(key, ())
        jax.debug.callback(lambda x: seen.append(float(x)), noise)
        return loss_fn(params, batch) + 0 * noise

    start = simplex.single(points(32, 2))
    for kind, expected in (("shared", 1), ("independent", 3)):
        seen.clear()
        simplex.fit(noisy, start, data(), optax.sgd(0.1), 1, key=KEY, num_samples=3,
                    stochastic=kind)  # fmt: skip
        jax.effects_barrier()
        assert len(seen) == 3
        assert len(set(seen)) == expected


def test_accumulated_batches_are_one_large_batch():
    start, batch = simplex.single(points(33, 3)), data(4, 32)
    options = {"key": KEY, "num_samples": 1, "free": (0, 1, 2), "volume_weight": 0.1,
               "weight_decay": 0.1}  # fmt: skip

    def fixed(params, batch):
        return loss_fn(params, batch)

    # One vertex: whatever is drawn is that vertex, so that micro-batches draw alike.
    start = simplex.single(points(33, 1))
    options |= {"free": (0,), "volume_weight": 0.0}
    whole = simplex.fit(fixed, start, batch, optax.sgd(0.1), 3, **options)
    parts = simplex.fit(
        fixed, start, batches.split(batch, 8), optax.sgd(0.1), 3, accumulate=4, **options
    )
    np.testing.assert_allclose(
        rows(parts.complex.vertices), rows(whole.complex.vertices), rtol=1e-5, atol=1e-6
    )


def placed(mesh, stack, spec):
    return jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, spec if x.ndim > 2 else PartitionSpec())),
        stack,
    )


@functools.cache
def on_one_device():
    start = simplex.star(points(40, 2), points(41, 2))
    return simplex.fit(
        mesh_loss, start, data(5, 32), optax.sgd(0.1), 5, key=KEY, volume_weight=0.01,
        num_samples=2,
    )  # fmt: skip


def mesh_loss(params, batch):
    out = jnp.einsum("ni,ij->nj", batch["x"], params["a"]) + params["b"][0][None]
    return jnp.mean(jnp.square(jnp.tanh(out) + params["b"][1] - batch["y"]))


def test_sharded_data_and_sharded_vertices_train_as_on_one_device(mesh):
    start = simplex.star(points(40, 2), points(41, 2))
    options = {"key": KEY, "volume_weight": 0.01, "num_samples": 2}
    expected = rows(on_one_device().complex.vertices)
    with jax.set_mesh(mesh):
        split = batches.split(data(5, 32), 32)
        by_data = simplex.fit(mesh_loss, start, split, optax.sgd(0.1), 5, mesh=mesh, **options)
        np.testing.assert_allclose(rows(by_data.complex.vertices), expected, rtol=1e-5, atol=1e-5)
        sharded = simplex.SimplicialComplex(
            placed(mesh, start.vertices, PartitionSpec(None, "model", None)), start.simplices
        )
        by_vertex = simplex.fit(mesh_loss, sharded, data(5, 32), optax.sgd(0.1), 5, **options)
        np.testing.assert_allclose(rows(by_vertex.complex.vertices), expected, rtol=1e-5, atol=1e-5)
        assert by_vertex.complex.vertices["a"].sharding.spec[1] == "model"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"free": (7,)}, "indices of the 3 vertices"),
        ({"free": ()}, "nothing to train"),
        ({"num_samples": 0}, "at least 1"),
        ({"samples": "all"}, "expected one of"),
        ({"reduction": "max"}, "expected one of"),
        ({"choose": "often"}, "expected 'volume', 'uniform'"),
        ({"choose": [1.0, 2.0, 3.0]}, "nonnegative probabilities"),
        ({"volume_weight": -1.0}, "at least 0"),
        ({"weight_decay": -1.0}, "at least 0"),
        ({"frozen": None}, "set by simplex.fit"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(given, message):
    start = simplex.single(points(50, 3))
    with pytest.raises((ValueError, TypeError), match=message):
        simplex.fit(loss_fn, start, data(), optax.sgd(0.1), 1, key=KEY, **given)


def test_volumes_of_different_dimensions_are_not_added():
    mixed = simplex.SimplicialComplex(points(51, 4), [(0, 3), (1, 2, 3)])
    for given, message in (
        ({}, "compares volumes of different dimensions"),
        ({"choose": "uniform", "volume_weight": 0.1}, "adds volumes of different dimensions"),
    ):
        with pytest.raises(ValueError, match=message):
            simplex.fit(loss_fn, mixed, data(), optax.sgd(0.1), 1, key=KEY, **given)
    found = simplex.fit(
        loss_fn, mixed, data(), optax.sgd(0.1), 1, key=KEY, choose="uniform", volume_weight=0.1,
        volumes="each",
    )  # fmt: skip
    matrix = rows(mixed.vertices)
    logs = [exact_log_volume(matrix[list(s)]) for s in mixed.simplices]
    assert found.history["log_volume"][0] == pytest.approx(sum(logs), abs=1e-5)


# --------------------------------------------------------------------------------- growing


def test_a_star_grows_a_simplex_between_modes_and_stops_at_the_loss():
    modes = points(60, 2)
    result = simplex.spro(
        loss_fn, modes, data(), optax.sgd(0.1), 30, key=KEY, num_connectors=2, num_eval=50,
        volume_weight=3e-2, num_samples=2,
    )  # fmt: skip
    assert result.complex.simplices == ((0, 2, 3), (1, 2, 3))
    assert same_bits(tree.unstack(result.complex.vertices)[:2], tree.unstack(modes))
    highest = [stage.highest_loss for stage in result.stages]
    assert all(stage.accepted for stage in result.stages)
    expected = np.logaddexp(
        *[
            exact_log_volume(rows(result.complex.vertices)[list(s)])
            for s in result.complex.simplices
        ]
    )
    assert result.stages[-1].log_volume == pytest.approx(expected, abs=1e-4)
    # Monotone in the limit: below the first, between, above all.
    grown = []
    for limit in (min(highest) * 0.5, max(highest) * 2):
        limited = simplex.spro(
            loss_fn, modes, data(), optax.sgd(0.1), 30, key=KEY, num_connectors=2, num_eval=50,
            volume_weight=3e-2, num_samples=2, max_loss=limit,
        )  # fmt: skip
        grown.append(limited.complex.num_vertices)
    assert grown == [2, 4]


def test_a_mode_given_twice_is_refused():
    mode = tree.unstack(points(66, 1))[0]
    for grow in (simplex.spro, simplex.espro):
        with pytest.raises(ValueError, match="modes 0 and 1 are the same network"):
            grow(loss_fn, tree.stack([mode, mode]), data(), optax.sgd(0.1), 1, key=KEY)


def test_a_network_with_state_is_measured_with_the_state_of_each_point():
    modes = points(67, 2)

    def metrics_fn(params, state, batch):
        return {"loss": loss_fn(params, batch) + state}

    grown = {
        shift: simplex.spro(
            loss_fn, modes, data(), optax.sgd(0.1), 5, key=KEY, num_eval=20, num_samples=1,
            metrics_fn=metrics_fn, state_fn=lambda params, s=shift: jnp.float32(s),
        ).stages[0]
        for shift in (0.0, 1.0)
    }  # fmt: skip
    assert grown[1.0].mean_loss == pytest.approx(grown[0.0].mean_loss + 1, rel=1e-5)


def test_an_edge_that_collapsed_is_reported():
    modes = points(61, 1)
    with pytest.warns(simplex.CollapsedWarning, match="one network"):
        simplex.spro(
            loss_fn, modes, data(), optax.sgd(1e-6), 2, key=KEY, jitter=1e-4, num_samples=1
        )


def test_espro_grows_each_simplex_as_if_alone_and_from_scratch():
    modes = points(62, 2)
    options = {"key": KEY, "num_vertices": 3, "num_samples": 2, "volume_weight": 1e-2}
    both = simplex.espro(loss_fn, modes, data(), optax.sgd(0.1), 20, **options)
    assert [x.simplices for x in both.complexes] == [((0, 1, 2),)] * 2
    first = simplex.espro(
        loss_fn, jax.tree.map(lambda x: x[:1], modes), data(), optax.sgd(0.1), 20, **options
    )
    np.testing.assert_allclose(
        rows(first.complexes[0].vertices), rows(both.complexes[0].vertices), rtol=1e-4, atol=1e-5
    )
    for one, mode in zip(both.complexes, tree.unstack(modes), strict=True):
        assert same_bits(tree.unstack(one.vertices)[0], mode)
    assert len(both.stages) == 2
    scratch = simplex.espro(
        loss_fn, modes, data(), optax.sgd(0.1), [40, 10], from_scratch=True,
        **(options | {"num_vertices": 2}),
    )  # fmt: skip
    for one, mode in zip(scratch.complexes, tree.unstack(modes), strict=True):
        base = tree.unstack(one.vertices)[0]
        assert float(loss_fn(base, data())) < float(loss_fn(mode, data()))


def test_growth_goes_on_where_it_was_stopped(tmp_path):
    modes = points(63, 2)
    options = {"key": KEY, "num_connectors": 2, "num_samples": 2, "volume_weight": 1e-2,
               "num_eval": 3}  # fmt: skip
    whole = simplex.spro(loss_fn, modes, data(), optax.sgd(0.1), 20, **options)

    def keep(stage):
        return checkpoint.Checkpointer(tmp_path / f"stage-{stage}", every=5)

    class Stop(Exception):
        pass

    def stop(complex, step):
        if complex.num_vertices == 4 and step == 10:
            raise Stop
        return {}

    with pytest.raises(Stop):
        simplex.spro(
            loss_fn, modes, data(), optax.sgd(0.1), 20, checkpoints=keep, evaluate=stop,
            evaluate_every=5, **options,
        )  # fmt: skip
    again = simplex.spro(loss_fn, modes, data(), optax.sgd(0.1), 20, checkpoints=keep, **options)
    assert same_bits(again.complex.vertices, whole.complex.vertices)
    # The first vertex was restored without a step, the second had five of its steps behind it.
    assert [stage.row() for stage in again.stages] == [stage.row() for stage in whole.stages]
    with pytest.raises(ValueError, match="give `checkpoints`"):
        simplex.spro(loss_fn, modes, data(), optax.sgd(0.1), 20, checkpoint=keep(0), **options)


def test_every_face_of_a_star_holds_all_pairs_of_a_mode_and_a_connector():
    one = simplex.star(points(64, 3), points(65, 2))
    edges = set(simplex.faces(one, 1))
    assert edges == {*itertools.product(range(3), (3, 4)), (3, 4)}
