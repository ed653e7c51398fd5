"""Planes through weight space, projections into them, principal directions, and their figures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from geojax import batches, ensemble, plot, surface, tree
from geojax.checkpoint import Checkpointer

EPS = float(np.finfo(np.float32).eps)


def network(seed, width=5):
    r = np.random.default_rng(seed)
    shapes = {"in": {"kernel": (3, width), "bias": (width,)}, "out": (width,), "scale": ()}
    return jax.tree.map(
        lambda s: jnp.asarray(r.normal(size=s), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


A, B, C = (network(seed) for seed in range(3))
X = np.random.default_rng(0).normal(size=(17, 3)).astype(np.float32)
DATA = batches.split({"x": X}, 8)


def metrics(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["in"]["kernel"] + params["in"]["bias"][None])
    out = params["scale"] * (hidden @ params["out"])
    return {"square": jnp.mean(out**2), "linear": jnp.mean(out)}


AVERAGE = batches.mean(metrics, DATA)


def flat(point):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(point)])


def midpoint(a, b, t=0.5):
    return tree.combine(tree.stack([a, b]), jnp.array([1 - t, t]))


def relative(got, want):
    return np.linalg.norm(flat(got) - flat(want)) / np.linalg.norm(flat(want))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_basis_is_orthonormal_and_coordinates_reproduce_the_points(dtype):
    with jax.enable_x64(dtype == np.float64):
        points = [tree.cast(point, dtype) for point in (A, B, C)]
        found = surface.frame(points)
        e1, e2 = map(flat, tree.unstack(found.basis))
        eps = float(np.finfo(dtype).eps)
        np.testing.assert_allclose([e1 @ e1, e2 @ e2, 1 + e1 @ e2], 1, atol=16 * eps)
        for point, place in zip(points, found.points, strict=True):
            assert relative(found.point(place), point) < 16 * eps
        assert all(x.dtype == dtype for x in jax.tree.leaves(found.point([0.3, -1.0])))
        # Distances in the plane are distances between the points.
        for i, j in ((0, 1), (0, 2), (1, 2)):
            apart = np.linalg.norm(flat(points[i]) - flat(points[j]))
            assert np.linalg.norm(found.points[i] - found.points[j]) == pytest.approx(
                apart, rel=32 * eps
            )
        assert found.points[0].tolist() == [0, 0]
        assert found.points[1, 1] == 0 < found.points[2, 1]
    stacked = surface.frame(tree.stack([A, B, C])).points
    np.testing.assert_allclose(stacked, found.points, rtol=1e-5)


def test_the_metrics_at_the_three_points_are_their_own():
    found = surface.frame([A, B, C])
    at = surface.plane(metrics, found, DATA, coordinates=found.points)
    assert at.values["square"].shape == (3,)
    for i, point in enumerate((A, B, C)):
        for name, value in AVERAGE(point).items():
            assert at.values[name][i] == pytest.approx(float(value), rel=1e-5)
    assert at.values["square"][0] == float(AVERAGE(A)["square"])


def test_the_grid_holds_the_coordinates_that_were_used_and_is_not_transposed():
    def height(params, batch):
        return {"height": params["w"][0] + 10 * params["w"][1] + 0 * jnp.mean(batch["x"])}

    points = [{"w": jnp.array(w)} for w in ([0.0, 0.0], [4.0, 0.0], [1.0, 2.0])]
    found = surface.plane(height, points, DATA, num=(5, 3))
    assert found.coordinates.shape == (3, 5, 2)
    assert found.values["height"].shape == (3, 5)
    x, y = found.coordinates[..., 0], found.coordinates[..., 1]
    np.testing.assert_allclose(found.values["height"], x + 10 * y, rtol=1e-6, atol=1e-5)
    # The box of the points and a fifth on each side.
    np.testing.assert_allclose(x[0, [0, -1]], [-0.8, 4.8])
    np.testing.assert_allclose(y[[0, -1], 0], [-0.4, 2.4])
    own = surface.plane(height, points, DATA, num=2, extent=((-1, 1), (0, 3)))
    assert own.coordinates.tolist() == [[[-1, 0], [1, 0]], [[-1, 3], [1, 3]]]


def test_chunks_equal_the_loop_and_each_is_compiled_once():
    traces = []

    def counted(params, batch):
        traces.append(jnp.shape(params["out"]))
        return metrics(params, batch)

    found = surface.plane(counted, [A, B, C], batches.split({"x": X}, 17), num=(4, 3))
    assert len(traces) == 1
    chunked = surface.plane(counted, [A, B, C], batches.split({"x": X}, 17), num=(4, 3), chunk=5)
    assert len(traces) == 2
    surface.plane(counted, [A, B, C], batches.split({"x": X}, 17), num=(2, 3), chunk=5)
    assert len(traces) == 2
    for name, values in found.values.items():
        np.testing.assert_allclose(chunked.values[name], values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 4])
def test_state_is_made_anew_at_each_point(chunk):
    def with_state(params, state, batch):
        gap = jnp.abs(state["twice"] - 2 * params["scale"])
        return {"gap": gap + 0 * jnp.mean(batch["x"]), "scale": params["scale"]}

    found = surface.plane(
        with_state, [A, B, C], DATA, num=3, chunk=chunk,
        state_fn=lambda params: {"twice": 2 * params["scale"]},
    )  # fmt: skip
    np.testing.assert_array_equal(found.values["gap"], 0)
    assert np.ptp(found.values["scale"]) > 0.1


def test_points_beside_the_plane_are_projected_and_say_how_far_off_they_lie():
    found = surface.frame([A, B, C])
    inside = tree.combine(tree.stack([A, B, C]), jnp.array([[0.2, 0.5, 0.3], [-1.0, 0.5, 1.5]]))
    seen = found.project(inside)
    want = np.array([[0.2, 0.5, 0.3], [-1.0, 0.5, 1.5]]) @ found.points
    np.testing.assert_allclose(seen.coordinates, want, atol=1e-5)
    assert seen.distances.max() < 16 * EPS * np.linalg.norm(flat(A))
    for point, place in zip(tree.unstack(inside), seen.coordinates, strict=True):
        assert relative(found.point(place), point) < 1e-6

    # The control points of a curve with its middle at C are in the plane of its ends and C.
    away = flat(network(7)) - flat(A)
    e1, e2 = map(flat, tree.unstack(found.basis))
    x, y = away @ e1, away @ e2
    off = np.linalg.norm(away - x * e1 - y * e2)
    for given in (network(7), [network(7)], iter([network(7)])):
        seen = found.project(given)
        np.testing.assert_allclose(seen.coordinates, [[x, y]], atol=1e-5)
        np.testing.assert_allclose(seen.distances, [off], rtol=1e-5)
    with pytest.raises(ValueError, match=r"\['out'\] has shape \(5,\) in the origin"):
        found.project([A | {"out": jnp.ones(4)}])


def test_a_far_and_wide_plane_reproduces_its_points():
    # Many parameters, close together and far from zero, where differences lose digits.
    r = np.random.default_rng(0)
    base = {"w": jnp.asarray(10 + r.normal(size=(300, 1000)), jnp.float32)}
    points = [base] + [
        {"w": base["w"] + jnp.asarray(size * r.normal(size=(300, 1000)), jnp.float32)}
        for size in (1e-3, 1.0)
    ]
    found = surface.frame(points)
    e1, e2 = tree.unstack(found.basis)
    assert abs(float(np.ravel(e1["w"]).astype(float) @ np.ravel(e2["w"]).astype(float))) < 1e-6
    for point, place in zip(points, found.points, strict=True):
        assert relative(found.point(place), point) < 1e-6
    seen = found.project(points)
    np.testing.assert_allclose(seen.coordinates, found.points, rtol=1e-6, atol=1e-5)


def test_nearly_parallel_directions_still_make_an_orthonormal_basis():
    first = {"w": tree.random_like(jax.random.key(0), jnp.zeros((100, 1000)))}
    other = {"w": tree.random_like(jax.random.key(1), jnp.zeros((100, 1000)))}
    found = surface.frame(first, directions=[first, tree.axpy(1e-4, other, first)])
    e1, e2 = map(flat, tree.unstack(found.basis))
    assert abs(e1 @ e2) < 1e-6
    assert abs(flat(other) @ e2) / np.linalg.norm(flat(other)) > 0.99


def test_points_on_a_line_and_parallel_directions_are_refused():
    for third in (midpoint(A, B), midpoint(A, B, 3.0), midpoint(A, B, -0.2), B):
        with pytest.raises(ValueError, match="three points lie on a line, as far as rounding"):
            surface.frame([A, B, third])
    for trio in ([A, A, C], [A, B, A]):
        with pytest.raises(ValueError, match="two of the points are the same"):
            surface.frame(trio)
    low = [tree.cast(x, jnp.bfloat16) for x in (A, B, midpoint(A, B, 0.3))]
    with pytest.raises(ValueError, match="on a line"):
        surface.frame(low)
    with pytest.raises(ValueError, match="two directions are parallel"):
        surface.frame(A, directions=[B, tree.scale(-2.0, B)])
    with pytest.raises(ValueError, match="a direction is zero"):
        surface.frame(A, directions=[B, tree.scale(0.0, B)])
    with pytest.raises(ValueError, match="not finite"):
        surface.frame([A, B, C | {"scale": jnp.array(np.nan)}])
    with pytest.raises(ValueError, match="got 2 points; expected three"):
        surface.frame([A, B])
    with pytest.raises(ValueError, match="got 3 directions"):
        surface.frame(A, directions=[A, B, C])
    with pytest.raises(ValueError, match=r"lacks leaf \['scale'\]"):
        surface.frame([A, B, {k: v for k, v in C.items() if k != "scale"}])
    # The points may lie close together if their dtype can tell.
    near = tree.axpy(1e-3, C, A)
    assert surface.frame([A, tree.axpy(1e-3, B, A), near]).points[2, 1] > 1e-4


def test_a_plane_of_bfloat16_points_is_spanned_in_float32():
    points = [tree.cast(x, jnp.bfloat16) for x in (A, B, C)]
    found = surface.frame(points)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(found.basis))
    for point, place in zip(points, found.points, strict=True):
        got = found.point(place)
        assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(got))
        np.testing.assert_array_equal(flat(got), flat(point))
        assert found.project(point).distances[0] < 1e-5


def test_two_directions_span_the_plane_in_units_of_distance():
    first, second = network(3), network(4)
    found = surface.frame(A, directions=[first, second])
    lengths = [np.linalg.norm(flat(d)) for d in (first, second)]
    np.testing.assert_allclose(np.linalg.norm(found.points, axis=1), [0, *lengths], rtol=1e-5)
    for direction, place in zip((first, second), found.points[1:], strict=True):
        assert relative(found.point(place), tree.axpy(1.0, direction, A)) < 1e-6
    np.testing.assert_allclose(found.box, [(-c, c) for c in np.abs(found.points).max(0)])
    stacked = surface.frame(A, directions=tree.stack([first, second]))
    np.testing.assert_allclose(stacked.points, found.points, rtol=1e-6)
    # As eigenvectors of some selected leaves come.
    part = {"in": {"kernel": None, "bias": None}, "out": second["out"], "scale": None}
    moved = surface.frame(A, directions=[first, part]).point([0.0, 1.0])
    assert relative(moved, A) > 1e-2
    same = surface.frame(A, directions=[part, first]).point([2.0, 0.0])
    np.testing.assert_array_equal(same["in"]["kernel"], A["in"]["kernel"])


def test_parameters_in_a_list_are_told_from_a_list_of_points():
    a, b, c = ([jnp.arange(3.0) * k, jnp.ones(2) * k * k] for k in (1.0, 2.0, -1.0))
    found = surface.frame([a, b, c])
    np.testing.assert_allclose(found.project(tree.stack([a, b, c])).coordinates, found.points,
                               atol=1e-5)  # fmt: skip
    np.testing.assert_allclose(found.project(c).coordinates, found.points[2:], atol=1e-5)
    again = surface.frame(a, directions=tree.stack([b, c]))
    assert again.points[1, 0] == pytest.approx(np.linalg.norm(flat(b)))


@pytest.mark.parametrize("chunk", [1, 3])
def test_an_interrupted_plane_goes_on_to_the_same_bits(tmp_path, chunk):
    want = surface.plane(metrics, [A, B, C], DATA, num=4, chunk=chunk)
    calls = []

    class Stopping:
        """Batches that end the first run in its fifth point or chunk."""

        def __iter__(self):
            calls.append(1)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return iter(DATA)

    folder = Checkpointer(tmp_path / "plane", every=100)
    with pytest.raises(KeyboardInterrupt):
        surface.plane(metrics, [A, B, C], Stopping(), num=4, chunk=chunk, checkpoint=folder)
    # The fourth was still on its way.
    assert folder.latest() == 3 * chunk
    found = surface.plane(metrics, [A, B, C], Stopping(), num=4, chunk=chunk, checkpoint=folder)
    # The last one kept once more, and those that were missing.
    assert len(calls) == 5 + 1 + -(-(16 - 3 * chunk) // chunk)
    for name, values in want.values.items():
        np.testing.assert_array_equal(found.values[name], values)
    # A plane that is done is read back, but for one position or chunk.
    before = len(calls)
    again = surface.plane(metrics, [A, B, C], Stopping(), num=4, chunk=chunk, checkpoint=folder)
    assert len(calls) == before + 1
    for name, values in want.values.items():
        np.testing.assert_array_equal(again.values[name], values)


def test_values_are_saved_as_often_as_asked_and_another_plane_is_refused(tmp_path):
    folder = Checkpointer(tmp_path / "plane", every=2, keep=None)
    surface.plane(metrics, [A, B, C], DATA, num=(3, 2), checkpoint=folder)
    assert folder.steps() == [2, 4, 6]
    with pytest.raises(ValueError, match="another run: its positions differ"):
        surface.plane(metrics, [A, B, C], DATA, num=(2, 2), checkpoint=folder)
    with pytest.raises(ValueError, match="another run: its origin differ"):
        surface.plane(metrics, [C, B, A], DATA, num=(3, 2), checkpoint=folder)
    with pytest.raises(ValueError, match="another run: its source differ"):
        surface.plane(metrics, [A, B, C], {"x": X}, num=(3, 2), checkpoint=folder)
    # Too close for the metrics to tell.
    other = batches.split({"x": X * np.float32(1.001)}, 8)
    with pytest.raises(ValueError, match="another run: its data differ"):
        surface.plane(metrics, [A, B, C], other, num=(3, 2), checkpoint=folder)


def halved(params, batch):
    return {name: x / 2 for name, x in metrics(params, batch).items()}


def stopped(metrics_fn, checkpoint, chunk):
    """A plane of which a part is kept."""

    class Stopping:
        passes = 0

        def __iter__(self):
            self.passes += 1
            if self.passes == 4:
                raise KeyboardInterrupt
            return iter(DATA)

    with pytest.raises(KeyboardInterrupt):
        surface.plane(metrics_fn, [A, B, C], Stopping(), num=4, chunk=chunk, checkpoint=checkpoint)


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("done", [False, True])
def test_values_of_other_metrics_states_or_data_are_never_handed_back(tmp_path, chunk, done):
    folder = Checkpointer(tmp_path / "plane", every=100)

    class Same:
        """Batches of which a checkpoint knows no more than that they are batches."""

        def __init__(self, x):
            self.x = x

        def __iter__(self):
            return iter(batches.split({"x": self.x}, 8))

    def run(metrics_fn=metrics, x=X, **how):
        return surface.plane(
            metrics_fn, [A, B, C], Same(x), num=4, chunk=chunk, checkpoint=folder, **how
        )

    if done:
        run()
    else:
        stopped(metrics, folder, chunk)
    kept = folder.latest()
    assert kept == (16 if done else 2 * chunk)
    for change, says in (
        ({"metrics_fn": halved}, r"at position \d+ is .* by another function"),
        ({"x": X[::-1] + 1}, r"at position \d+ is .* on other data"),
        (
            {"metrics_fn": lambda p, state, b: {k: x + state for k, x in metrics(p, b).items()},
             "state_fn": lambda params: jnp.ones(())},
            r"at position \d+ is .* by another function or state",
        ),
        (
            {"metrics_fn": lambda p, b: {"square": metrics(p, b)["square"]}},
            r"its metrics are \['linear', 'square'\] and this run's \['square'\]",
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says) as raised:
            run(**change)
        assert f"the checkpoint in {folder.location} is of another run" in str(raised.value)
        assert folder.latest() == kept
    want = surface.plane(metrics, [A, B, C], DATA, num=4, chunk=chunk)
    for name, values in run().values.items():
        np.testing.assert_array_equal(values, want.values[name])


@pytest.mark.parametrize("chunk", [1, 3])
def test_the_position_measured_again_is_one_that_can_tell(tmp_path, chunk):
    def far_off(scale):
        def metrics_fn(params, batch):
            loss = scale * jnp.mean(params["w"] ** 2) + jnp.mean(batch["x"])
            return {"loss": jnp.where(params["w"][1] > 0.5, jnp.nan, loss)}

        return metrics_fn

    points = [{"w": jnp.array(w)} for w in ([0.0, 0.0], [1.0, 0.0], [0.0, 1.0])]
    folder = Checkpointer(tmp_path, every=100)
    found = surface.plane(
        far_off(1.0), points, DATA, num=3, margin=0.0, chunk=chunk, checkpoint=folder
    )
    # The last of the rows is NaN under both functions.
    assert np.isnan(found.values["loss"]).tolist() == [[False] * 3] * 2 + [[True] * 3]
    with pytest.raises(ValueError, match="at position [345] is .* by another function"):
        surface.plane(far_off(2.0), points, DATA, num=3, margin=0.0, chunk=chunk, checkpoint=folder)


def test_positions_and_metrics_that_make_no_plane_are_refused():
    found = surface.frame([A, B, C])
    measure = lambda **kw: surface.plane(metrics, found, DATA, **kw)  # noqa: E731
    for kw, says in (
        ({"coordinates": [1.0, 2.0]}, r"coordinates have shape \(2,\)"),
        ({"coordinates": [[0.0, np.nan]]}, "a position is not finite"),
        ({"num": 1}, "num is 1"),
        ({"extent": ((1, 0), (0, 1))}, "expected .*x low, x high"),
        ({"margin": -0.5}, "margin is -0.5"),
        ({"chunk": 0}, "chunk is 0"),
        ({"directions": [A, B]}, "expected a Frame or directions, got both"),
    ):
        with pytest.raises(ValueError, match=says):
            measure(**kw)
    with pytest.raises(TypeError, match="dict of scalars"):
        surface.plane(lambda p, b: {"out": p["out"]}, found, DATA, num=2)
    with pytest.raises(ValueError, match=r"coordinates have shape \(3,\)"):
        found.point([0.0, 1.0, 2.0])


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("shard", ["data", "parameters"])
def test_a_sharded_plane_equals_one_device(mesh, shard, chunk):
    points = [{"w": jnp.arange(4.0) ** i + i, "b": jnp.array(1.0 * i)} for i in range(3)]
    arrays = {"x": np.random.default_rng(0).normal(size=(17, 4)).astype(np.float32)}

    def loss(params, batch):
        out = jnp.sum(batch["x"] * params["w"][None], axis=1) + params["b"]
        return {"square": jnp.mean(out**2)}

    source = batches.split(arrays, 8)
    want = surface.plane(loss, points, source, num=2)
    with jax.set_mesh(mesh):
        if shard == "parameters":
            where = {"w": NamedSharding(mesh, P("model")), "b": NamedSharding(mesh, P())}
            points = [jax.device_put(point, where) for point in points]
        got = surface.plane(loss, points, source, num=2, mesh=mesh, chunk=chunk)
        seen = got.project(points)
        moved = got.frame.point([1.0, 1.0])
        main = surface.principal_directions(points, center="last")
    np.testing.assert_allclose(got.values["square"], want.values["square"], rtol=1e-5)
    np.testing.assert_allclose(got.frame.points, want.frame.points, atol=1e-5)
    np.testing.assert_allclose(seen.coordinates, want.frame.points, atol=1e-5)
    if shard == "parameters":
        assert moved["w"].sharding.is_equivalent_to(where["w"], 1)
        for stacked in (got.frame.basis["w"], main.directions["w"]):
            assert stacked.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "model")), 2)
    np.testing.assert_allclose(main.explained.sum(), 1, rtol=1e-5)


# --------------------------------------------------------------------------- principal directions


@pytest.mark.parametrize("center", ["mean", "first", "last"])
def test_principal_directions_are_those_of_the_singular_value_decomposition(center):
    points = [network(seed) for seed in range(6)]
    found = surface.principal_directions(points, 3, center=center)
    rows = np.stack([flat(point) for point in points])
    origin = {"mean": rows.mean(0), "first": rows[0], "last": rows[-1]}[center]
    np.testing.assert_allclose(flat(found.origin), origin, atol=1e-6)
    left, sizes, right = np.linalg.svd(rows - origin, full_matrices=False)
    for k, direction in enumerate(tree.unstack(found.directions)):
        assert abs(flat(direction) @ right[k]) == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(
            np.abs(found.coordinates[:, k]), np.abs(left[:, k] * sizes[k]), atol=1e-4
        )
        assert found.coordinates[np.abs(found.coordinates[:, k]).argmax(), k] > 0
    np.testing.assert_allclose(found.explained, (sizes**2 / (sizes**2).sum())[:3], rtol=1e-5)
    off = np.linalg.norm((rows - origin) @ right[3:].T, axis=1)
    np.testing.assert_allclose(found.residuals, off, atol=1e-5)


def test_points_of_a_plane_are_explained_by_two_directions_which_span_it():
    weights = np.random.default_rng(0).dirichlet(np.ones(3), size=8)
    points = tree.combine(tree.stack([A, B, C]), jnp.asarray(weights, jnp.float32))
    found = surface.principal_directions(points)
    assert found.explained.sum() == pytest.approx(1, abs=1e-5)
    plane = surface.frame(found.origin, directions=found.directions)
    seen = plane.project(points)
    assert seen.distances.max() < 32 * EPS * np.linalg.norm(flat(A))
    np.testing.assert_allclose(seen.coordinates, found.coordinates, atol=1e-4)
    assert plane.project([A, B, C]).distances.max() < 1e-4
    with pytest.raises(ValueError, match="8 points span 2 directions, as far as rounding tells"):
        surface.principal_directions(points, 3)
    with pytest.raises(ValueError, match="num is 8 and there are 8 points"):
        surface.principal_directions(points, 8)
    with pytest.raises(ValueError, match="center is 'median'"):
        surface.principal_directions(points, center="median")
    assert "explained" in repr(found)

    (x, y), (low, high) = found.extent(0.0), seen.coordinates.T
    np.testing.assert_allclose([*x, *y], [low.min(), low.max(), high.min(), high.max()], atol=1e-4)
    np.testing.assert_allclose(np.diff(found.extent(0.5)[0]), 2 * np.diff(x))


# ---------------------------------------------------------------------------------------- figures


def shown(figure):
    """The size of the figure once it is drawn."""
    data = plot.png(figure)
    assert data[:4] == b"\x89PNG"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def sheet(values):
    """A plane whose values are given."""
    ny, nx = np.shape(values)
    xs, ys = np.meshgrid(np.linspace(-1, 3, nx), np.linspace(0, 2, ny))
    frame = surface.frame([{"w": jnp.array(w)} for w in ([0.0, 0.0], [2.0, 0.0], [1.0, 1.0])])
    places = np.stack([xs, ys], -1)
    return surface.Plane(frame, places, {"loss": np.asarray(values, np.float64)})


def test_levels_grow_by_a_factor_from_the_smallest_value_to_the_top():
    values = [0.5, 9.0, 100.5, np.nan, np.inf]
    found = plot.levels(values, 7, top=40.5, log_offset=-5.0)
    i = np.arange(1, 8)
    want = 0.5 + np.exp(-5 + i * (np.log(40.0) + 5) / 7)
    np.testing.assert_allclose(found, [0.5, *want], rtol=1e-12)
    assert plot.levels(values, 3)[[0, -1]].tolist() == [0.5, 100.5]
    assert (np.diff(plot.levels([2.0, 2.0])) > 0).all()
    for args in (([np.nan],), ([1.0, 2.0], 0), ([1.0, 2.0], 3)):
        with pytest.raises(ValueError, match="levels: expected a finite value"):
            plot.levels(*args, top=0.5 if args[-1] == 3 else None)
    with pytest.raises(ValueError, match="log_offset is 9"):
        plot.levels([0.0, 1.0], log_offset=9.0)


def test_contours_are_drawn_at_the_levels_and_the_top_is_open_only_if_something_is_above():
    values = np.add.outer(np.linspace(0, 1, 9) ** 2, np.linspace(-1, 1, 7) ** 2)
    for top, extend in ((None, "neither"), (1.0, "max")):
        figure = plot.plane(sheet(values), "loss", top=top, marks=("A", None, "C"))
        axes = figure.axes[0]
        filled = axes.collections[0]
        np.testing.assert_allclose(filled.levels, plot.levels(values, top=top), atol=1e-8)
        assert filled.extend == extend
        assert [text.get_text() for text in axes.texts] == ["A", "C"]
        assert axes.get_aspect() == 1
        labels = [text.get_text() for text in axes.child_axes[0].get_yticklabels()]
        assert labels[-1] == ("2" if top is None else "1")
        assert shown(figure)[0] == 840


def test_a_high_corner_of_the_data_is_that_corner_of_the_figure():
    values = np.zeros((5, 7))
    values[0, -1] = 1.0  # low y, high x
    figure = plot.plane(sheet(values), "loss", num_levels=2)
    last = figure.axes[0].collections[0].get_paths()[-1].vertices
    assert last[:, 0].min() > 2
    assert last[:, 1].max() < 1


def test_holes_infinities_and_flat_or_scattered_planes_are_drawn():
    values = np.add.outer(np.linspace(0, 1, 9), np.linspace(0, 1, 7))
    values[0, 0], values[-1, -1] = np.nan, np.inf
    figure = plot.plane(sheet(values), "loss", percent=True, title="holes", path=[[0, 0], [1, 1]])
    assert figure.axes[0].collections[0].extend == "max"
    shown(figure)
    shown(plot.plane(sheet(np.full((3, 3), 2.0)), "loss", size=(3.0, 3.0)))
    scattered = sheet(values)
    scattered = scattered._replace(
        coordinates=scattered.coordinates.reshape(-1, 2), values={"loss": values.reshape(-1)}
    )
    seen = surface.Projection(np.array([[0.0, 0.0], [1.0, 1.0]]), np.zeros(2))
    shown(plot.plane(scattered, "loss", path={"path": seen}, marks={"here": (0.5, 0.5)}))


def test_what_cannot_be_drawn_is_refused():
    plane = sheet(np.eye(3))
    with pytest.raises(ValueError, match="metric is 'error'; the plane has loss"):
        plot.plane(plane, "error")
    for marks in (("A", "B"), "ABC"):
        with pytest.raises(ValueError, match="names for the plane's 3 points"):
            plot.plane(plane, "loss", marks=marks)
    with pytest.raises(ValueError, match=r"expected coordinates \(x, y\)"):
        plot.plane(plane, "loss", marks={"A": 1.0})
    with pytest.raises(ValueError, match=r"has shape \(2,\); expected \(n, 2\)"):
        plot.plane(plane, "loss", path=[0.0, 1.0])


def test_reliability_diagrams_show_the_bins_of_one_or_several():
    probs = np.array([[0.5, 0.5], [0.25, 0.75], [0.1, 0.9], [1.0, 0.0], [0.4, 0.6]])
    labels = np.array([0, 0, 1, 0, 1])
    one = ensemble.calibration(probs, labels, num_bins=4)
    pooled = ensemble.calibration(probs, labels, num_bins=4, scheme="classwise")
    figure = plot.reliability(one, title="One")
    curve = figure.axes[0].lines[1]
    np.testing.assert_allclose(curve.get_xdata(), [0.55, 2.65 / 3])
    np.testing.assert_allclose(curve.get_ydata(), [1, 2 / 3])
    # Wilson's interval of two of three: 0.208 to 0.939.
    bar = figure.axes[0].collections[0].get_segments()[1]
    np.testing.assert_allclose(bar[:, 1], [0.2077, 0.9385], atol=1e-4)
    shown(figure)
    both = plot.reliability({"top": one, "classes": pooled})
    # All ten probabilities: 0, 0.1 | 0.25, 0.4 | 0.5, 0.5, 0.6 | 0.75, 0.9, 1.
    curve = both.axes[0].lines[2]
    np.testing.assert_allclose(curve.get_xdata(), [0.05, 0.325, 1.6 / 3, 2.65 / 3])
    np.testing.assert_allclose(curve.get_ydata(), [0, 0.5, 2 / 3, 2 / 3])
    assert "top: ECE" in both.axes[0].get_legend().get_texts()[0].get_text()
    shown(both)
