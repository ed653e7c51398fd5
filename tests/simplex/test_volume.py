"""Volumes against closed forms and float64: regular, flat, tiny, of many vertices, sharded."""

import itertools
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from geojax import simplex, tree

EPS = float(np.finfo(np.float32).eps)


def split(flat):
    """Rows of a matrix as stacked pytrees with a matrix, a vector and an empty leaf."""
    flat = np.asarray(flat)
    half = flat.shape[1] // 2
    return {
        "w": jnp.asarray(flat[:, : 2 * (half // 2)].reshape(len(flat), 2, -1)),
        "b": jnp.asarray(flat[:, 2 * (half // 2) :]),
        "none": jnp.zeros((len(flat), 0, 3), flat.dtype),
    }


def flat(points):
    return np.concatenate([np.asarray(points[k]).reshape(len(points[k]), -1) for k in "wb"], axis=1)


def exact(points):
    """log V in float64, by Householder QR of the edges."""
    points = np.asarray(points, np.float64)
    edges = points[1:] - points[0]
    heights = np.abs(np.diag(np.linalg.qr(edges.T)[1]))
    return np.log(heights).sum() - math.lgamma(len(points))


def exact_gradient(points):
    points = np.asarray(points, np.float64)
    rows = np.linalg.pinv(points[1:] - points[0]).T
    return np.concatenate([-rows.sum(0, keepdims=True), rows])


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def rotation(rng, size):
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


@pytest.mark.parametrize("m", range(1, 13))
def test_regular_and_right_simplices_have_their_volumes(m):
    corner = np.concatenate([np.zeros((1, m)), np.eye(m)]).astype(np.float32)
    np.testing.assert_allclose(simplex.log_volume({"w": corner}), -math.lgamma(m + 1), atol=1e-4)
    edge = 0.3
    regular = (np.eye(m + 1) * edge / math.sqrt(2)).astype(np.float32)
    square = math.log(m + 1) - m * math.log(2) - 2 * math.lgamma(m + 1) + 2 * m * math.log(edge)
    np.testing.assert_allclose(simplex.log_volume({"w": regular}), square / 2, atol=1e-4)


@pytest.mark.parametrize("n", [2, 4, 6])
def test_the_volume_keeps_under_motions_and_order_and_scales(n, rng):
    points = normal(rng, n, 40)
    want = exact(points)
    turned = points.astype(np.float64) @ rotation(rng, 40)
    moved = turned + 10 * rng.normal(size=40)
    for other, log in [
        (points, want),
        (turned, want),
        (moved, want),
        (points[::-1], want),
        (1e-25 * points.astype(np.float64), want + (n - 1) * math.log(1e-25)),
        (1e15 * points.astype(np.float64), want + (n - 1) * math.log(1e15)),
    ]:
        found = simplex.log_volume(split(np.asarray(other, np.float32)))
        np.testing.assert_allclose(found, log, atol=1e-4)


def centroid_case(rng, n=5, size=20_000, offset=1e-3):
    """Random points with square distances of 3500, and their mean moved by a little."""
    points = rng.normal(size=(n, size)) * math.sqrt(1750 / size)
    away = rng.normal(size=size)
    points[-1] = points[:-1].mean(0) + offset * away / np.linalg.norm(away)
    return points.astype(np.float32)


def test_a_vertex_next_to_the_centroid_has_its_volume_and_gradient(rng):
    points = centroid_case(rng)
    found, gradient = jax.value_and_grad(simplex.log_volume)(split(points))
    assert abs(2 * (found - exact(points))) < 1e-2  # the determinant is off by several
    assert abs(2 * (found - exact(points))) < 1e-4
    want = exact_gradient(points)[-1]
    gap = np.linalg.norm(flat(gradient)[-1] - want) / np.linalg.norm(want)
    assert gap < 1e-2
    assert abs(float(simplex.original_log_volume(split(points))) - 2 * exact(points)) > 1


def test_thirteen_vertices_are_finite_where_the_determinant_overflows(rng):
    points = centroid_case(rng, n=13)
    assert abs(2 * (simplex.log_volume(split(points)) - exact(points))) < 1e-2
    points = normal(rng, 13, 300) * np.float32(2.4)
    np.testing.assert_allclose(simplex.log_volume(split(points)), exact(points), atol=1e-4)
    assert not np.isfinite(simplex.square_volume(split(points)))


@pytest.mark.parametrize("n", [2, 3, 5, 9])
def test_the_gradient_is_the_height_over_its_square(n, rng):
    points = normal(rng, n, 30)
    found = flat(jax.jit(jax.grad(simplex.log_volume))(split(points)))
    want = exact_gradient(points)
    np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())
    # At a vertex: its height over the face of the others, by projection.
    others = np.delete(points, 1, axis=0).astype(np.float64)
    height = points[1] - others[0]
    if n > 2:
        edges = (others[1:] - others[0]).T
        height = height - edges @ np.linalg.lstsq(edges, height, rcond=None)[0]
    np.testing.assert_allclose(found[1], height / (height @ height), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(simplex.heights(split(points))[1], np.linalg.norm(height), rtol=1e-5)


def test_the_gradient_agrees_with_differences(rng):
    with jax.enable_x64(True):
        points = rng.normal(size=(4, 9))
        towards = rng.normal(size=(4, 9))
        slope = np.vdot(flat(jax.grad(simplex.log_volume)(split(points))), towards)
        h = 1e-6
        up, down = (simplex.log_volume(split(points + s * h * towards)) for s in (1, -1))
        np.testing.assert_allclose((up - down) / (2 * h), slope, rtol=1e-8)


def test_volume_zero_is_minus_infinity_without_a_gradient(rng):
    points = normal(rng, 6, 500)
    middle = np.concatenate([points, points.mean(0, keepdims=True, dtype=np.float64)])
    twice = np.concatenate([points, points[2:3]])
    inline = np.concatenate([points[:2], 3 * points[:1] - 2 * points[1:2]])
    for case in (middle, twice, inline, points[:1].repeat(3, 0), normal(rng, 4, 2)):
        case = np.asarray(case, np.float32)
        value, gradient = jax.value_and_grad(simplex.log_volume)(split(case))
        assert value == -np.inf
        assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(gradient))
    # An edge is known to the last bit, whatever it is added to.
    close = np.array([[1.0, 1.0], [1.0, np.nextafter(np.float32(1), np.float32(2))]], np.float32)
    np.testing.assert_allclose(simplex.log_volume({"w": close}), math.log(EPS), rtol=1e-6)


def test_entries_that_all_vertices_share_hide_no_height(rng):
    points = np.concatenate([np.full((4, 3), 1e6), 1e-3 * normal(rng, 4, 50)], axis=1)
    points = points.astype(np.float32)
    np.testing.assert_allclose(simplex.log_volume({"w": points}), exact(points), atol=1e-4)


def test_one_point_has_volume_one():
    value, gradient = jax.value_and_grad(simplex.log_volume)({"w": jnp.ones((1, 3))})
    assert value == 0
    assert (gradient["w"] == 0).all()
    assert simplex.square_volume({"w": jnp.ones((1, 3))}) == 1


def test_eager_jitted_and_mapped_volumes_agree_and_dtypes_stay(rng):
    many = normal(rng, 3, 4, 20)
    one_by_one = np.stack([simplex.log_volume({"w": x}) for x in many])
    np.testing.assert_allclose(jax.vmap(simplex.log_volume)({"w": many}), one_by_one, rtol=1e-6)
    jitted = jax.jit(simplex.log_volume)({"w": many[0]})
    assert jitted == one_by_one[0]
    half = {"w": jnp.asarray(many[0], jnp.bfloat16), "v": jnp.asarray(many[0])}
    value, gradient = jax.value_and_grad(simplex.log_volume)(half)
    assert value.dtype == jnp.float32
    assert [gradient[k].dtype for k in "wv"] == [jnp.bfloat16, jnp.float32]
    stored = np.concatenate([np.asarray(half[k], np.float64) for k in "wv"], axis=1)
    np.testing.assert_allclose(value, exact(stored), atol=1e-5)
    with jax.enable_x64(True):
        wide = simplex.log_volume({"w": many[0].astype(np.float64)})
        assert wide.dtype == jnp.float64
        np.testing.assert_allclose(wide, exact(many[0]), rtol=1e-13)


def test_lower_matmul_precision_changes_nothing(rng):
    points = split(normal(rng, 5, 200))
    with jax.default_matmul_precision("bfloat16"):
        low = jax.value_and_grad(simplex.log_volume)(points)
    high = jax.value_and_grad(simplex.log_volume)(points)
    np.testing.assert_array_equal(low[0], high[0])
    np.testing.assert_array_equal(flat(low[1]), flat(high[1]))


def sharded(points, mesh):
    spec = {"w": P(None, "model", "data"), "b": P(None, "data"), "none": P()}
    return {k: jax.device_put(x, NamedSharding(mesh, spec[k])) for k, x in points.items()}


def test_sharded_vertices_give_the_same_and_gather_nothing(mesh, rng):
    points = split(normal(rng, 4, 64))
    want, slopes = jax.value_and_grad(simplex.log_volume)(points)
    there = sharded(points, mesh)
    with jax.set_mesh(mesh):
        found, gradient = jax.value_and_grad(simplex.log_volume)(there)
        np.testing.assert_allclose(found, want, rtol=1e-5)
        np.testing.assert_allclose(flat(gradient), flat(slopes), atol=1e-5)
        text = jax.jit(jax.grad(simplex.log_volume)).lower(there).compile().as_text()
        complex = simplex.SimplicialComplex(there, [(0, 1, 2), (1, 2, 3)])
        logs = simplex.log_volumes(complex)
    assert "all-gather" not in text
    assert "all-reduce" in text
    assert gradient["w"].sharding.spec == there["w"].sharding.spec
    here = simplex.log_volumes(simplex.SimplicialComplex(points, [(0, 1, 2), (1, 2, 3)]))
    np.testing.assert_allclose(logs, here, rtol=1e-5)


def test_vertices_may_lie_on_different_devices(mesh, rng):
    points = {"w": jnp.asarray(normal(rng, 4, 6))}
    want, slopes = jax.value_and_grad(simplex.log_volume)(points)
    there = {"w": jax.device_put(points["w"], NamedSharding(mesh, P("data", "model")))}
    with jax.set_mesh(mesh):
        found, gradient = jax.value_and_grad(simplex.log_volume)(there)
    np.testing.assert_allclose(found, want, rtol=1e-5)
    np.testing.assert_allclose(gradient["w"], slopes["w"], atol=1e-5)


def memory(fn, size, n=5):
    """What a compiled function holds besides its arguments and its result, in points."""
    points = {"w": jax.ShapeDtypeStruct((n, size), jnp.float32)}
    held = jax.jit(fn).lower(points).compile().memory_analysis()
    return held.temp_size_in_bytes / (4 * size)


def test_in_pieces_less_than_a_point_is_held_besides_the_vertices():
    def pieces(points):
        return simplex.log_volume(points, chunk_size=1 << 14)

    assert memory(pieces, 1 << 20) < 0.2
    assert memory(jax.grad(pieces), 1 << 20) < 0.2
    # All at once it is the edges, and as much again for the gradient.
    assert 4 < memory(simplex.log_volume, 1 << 20) < 5.1
    assert memory(jax.grad(simplex.log_volume), 1 << 20) < 10.1


def test_on_one_device_pieces_are_the_default_within_jit_too():
    # Sizes that no piece divides, in two shapes: what is held besides, in points.
    program = """
import jax, jax.numpy as jnp
from geojax import simplex
shapes = {"a": (3, 1000, 1700), "b": (3, 1000003)}
points = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
mesh = jax.make_mesh((1,), ("x",))
placed = jax.device_put(jnp.eye(3)[:, None], jax.NamedSharding(mesh, jax.P(None, None, "x")))
with jax.set_mesh(mesh):
    print(float(jax.grad(simplex.log_volume)(placed).sum()))
for f in (simplex.log_volume, jax.grad(simplex.log_volume)):
    held = jax.jit(f).lower(points).compile().memory_analysis()
    print(held.temp_size_in_bytes / (4 * 2700003))
"""
    environment = os.environ | {"XLA_FLAGS": ""}
    out = subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True
    ).stdout
    total, value, gradient = map(float, out.split())
    assert abs(total) < 1e-6
    assert value < 1.5
    assert gradient < 1.5


@pytest.mark.parametrize("chunk_size", [1, 7, 40, 1000])
def test_pieces_give_the_same_volume_and_gradient(chunk_size, rng):
    points = split(normal(rng, 4, 81))
    want, slopes = jax.value_and_grad(simplex.log_volume)(points)
    found, gradient = jax.value_and_grad(simplex.log_volume)(points, chunk_size=chunk_size)
    np.testing.assert_allclose(found, want, rtol=1e-6)
    np.testing.assert_allclose(flat(gradient), flat(slopes), atol=1e-6)
    with pytest.raises(ValueError, match="chunk_size is 0"):
        simplex.log_volume(points, chunk_size=0)


def test_a_large_leaf_is_read_in_pieces_outside_of_jit(rng):
    points = rng.normal(size=(3, (1 << 18) + 5)).astype(np.float32)
    found = simplex.log_volume({"w": points})
    np.testing.assert_allclose(found, exact(points), atol=1e-4)
    np.testing.assert_allclose(found, jax.jit(simplex.log_volume)({"w": points}), rtol=1e-6)


def test_nan_stays_nan():
    value = simplex.log_volume({"w": jnp.array([[0.0, 1.0], [jnp.nan, 0.0], [1.0, 1.0]])})
    assert np.isnan(value)
    assert np.isnan(simplex.log_volume({"w": jnp.array([[0.0, 1.0], [jnp.inf, 0.0]])}))


# ---------------------------------------------------------------------------------- complexes


def test_the_total_is_the_sum_and_its_gradient_reaches_every_simplex(rng):
    points = normal(rng, 5, 12)
    triangles = [(0, 1, 2), (1, 2, 3), (0, 3, 4)]
    logs = [exact(points[list(t)]) for t in triangles]
    complex = simplex.SimplicialComplex(split(points), triangles)
    np.testing.assert_allclose(simplex.log_volumes(complex), logs, rtol=1e-5)

    def total(vertices):
        return simplex.log_total_volume(simplex.SimplicialComplex(vertices, triangles))

    value, gradient = jax.value_and_grad(total)(split(points))
    np.testing.assert_allclose(value, np.log(np.exp(logs).sum()), rtol=1e-5)
    want = np.zeros((5, 12))
    for t, log in zip(triangles, logs, strict=True):
        want[list(t)] += exact_gradient(points[list(t)]) * np.exp(log - float(value))
    np.testing.assert_allclose(flat(gradient), want, atol=1e-5)


def test_a_flat_simplex_adds_nothing_to_the_total_and_no_nan(rng):
    points = normal(rng, 4, 12)
    points[2] = points[0]
    complex = simplex.SimplicialComplex({"w": jnp.asarray(points)}, [(0, 1, 2), (0, 1, 3)])
    value, gradient = jax.value_and_grad(simplex.log_total_volume)(complex)
    np.testing.assert_allclose(value, exact(points[[0, 1, 3]]), rtol=1e-5)
    assert (gradient.vertices["w"][2] == 0).all()
    assert np.isfinite(gradient.vertices["w"]).all()
    flat_only = simplex.SimplicialComplex({"w": jnp.asarray(points)}, [(0, 1, 2)])
    value, gradient = jax.value_and_grad(simplex.log_total_volume)(flat_only)
    assert value == -np.inf
    assert (gradient.vertices["w"] == 0).all()


def test_volumes_of_different_dimensions_are_not_added(rng):
    complex = simplex.SimplicialComplex({"w": normal(rng, 3, 4)}, [(0, 1, 2), (0, 1)])
    with pytest.raises(ValueError, match="do not add up"):
        simplex.log_total_volume(complex)
    assert simplex.log_volumes(complex).shape == (2,)


# --------------------------------------------------------------------------- the original's


def test_the_determinant_is_the_square_of_the_volume(rng):
    with jax.enable_x64(True):
        for n in (2, 3, 4, 7):
            points = rng.normal(size=(n, 12))
            found = float(jnp.log(simplex.square_volume({"w": points})))
            assert abs(found - 2 * float(simplex.log_volume({"w": points}))) < 1e-8
        a, b = rng.normal(size=(2, 5))
        np.testing.assert_allclose(
            simplex.square_volume({"w": np.stack([a, b])}), np.sum((a - b) ** 2), rtol=1e-12
        )
        sides = np.array([3.0, 4.0, 6.0])
        corners = np.array([[0, 0], [6.0, 0], [43 / 12, 0]])
        corners[2, 1] = math.sqrt(16 - corners[2, 0] ** 2)
        s = sides.sum() / 2
        heron = s * np.prod(s - np.array([*map(np.linalg.norm, _sides(corners))]))
        np.testing.assert_allclose(simplex.square_volume({"w": corners}), heron, rtol=1e-12)


def _sides(corners):
    return [corners[i] - corners[j] for i, j in itertools.combinations(range(3), 2)]


def test_the_original_is_log_of_the_square_and_its_floor_with_a_gradient(rng):
    points = normal(rng, 3, 6)
    value, gradient = jax.value_and_grad(simplex.original_log_volume)({"w": jnp.asarray(points)})
    square = np.exp(2 * exact(points))
    np.testing.assert_allclose(value, np.log(square + 1e-4), rtol=1e-5)
    want = exact_gradient(points) * 2 * square / (square + 1e-4)
    np.testing.assert_allclose(gradient["w"], want, rtol=1e-3, atol=1e-4)
    far = np.concatenate([points, points.mean(0, keepdims=True)])
    np.testing.assert_allclose(
        simplex.original_log_volume({"w": far}, floor=0.5), math.log(0.5), atol=1e-3
    )


# ---------------------------------------------------------------------------------- geometry


def test_distances_edges_widths_and_angles_are_those_of_float64(rng):
    points = normal(rng, 5, 30)
    wide = points.astype(np.float64)
    away = np.linalg.norm(wide[:, None] - wide[None], axis=-1)
    found = simplex.distances(split(points))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, away, rtol=1e-6)
    edges = simplex.edge_lengths(simplex.SimplicialComplex(split(points), [(2, 0, 1), (3,)]))
    assert list(edges) == [(0, 1), (0, 2), (1, 2)]
    np.testing.assert_allclose(list(edges.values()), [away[0, 1], away[0, 2], away[1, 2]], 1e-6)
    assert simplex.edge_lengths(simplex.SimplicialComplex(split(points), [(3,)])) == {}
    want = np.linalg.svd(wide - wide.mean(0), compute_uv=False)[:4]
    np.testing.assert_allclose(simplex.widths(split(points)), want, rtol=1e-5)
    log = np.log(want).sum() + 0.5 * math.log(5) - math.lgamma(6)
    np.testing.assert_allclose(simplex.log_volume(split(points)), log + math.log(5), rtol=1e-5)
    angles = simplex.angles(split(points))
    for i, j, k in itertools.permutations(range(5), 3):
        a, b = wide[j] - wide[i], wide[k] - wide[i]
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        np.testing.assert_allclose(angles[i, j, k], np.arccos(cosine), rtol=1e-5)
    assert np.isnan(angles[0, 0, 1])
    assert np.isnan(angles[0, 1, 0])


def test_a_thin_simplex_has_its_small_width_and_height(rng):
    points = centroid_case(rng)
    centred = points - points.mean(0, dtype=np.float64)
    want = np.linalg.svd(centred, compute_uv=False)[:4]
    np.testing.assert_allclose(simplex.widths({"w": points})[-1], want[-1], rtol=1e-3)
    np.testing.assert_allclose(simplex.heights({"w": points})[-1], 1e-3, rtol=1e-2)


def test_flat_simplices_have_zero_heights_and_points_have_none():
    inline = {"w": jnp.array([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])}
    np.testing.assert_allclose(simplex.heights(inline), [1, 0, 0], atol=EPS)
    one = {"w": jnp.ones((1, 2))}
    assert simplex.heights(one).tolist() == [np.inf]
    assert simplex.widths(one).shape == (0,)
    assert np.isnan(simplex.angles(one)).all()


def test_leaves_that_are_no_floats_are_refused():
    with pytest.raises(TypeError, match=r"\['n'\] is int32"):
        simplex.log_volume({"n": jnp.zeros((2, 3), jnp.int32)})
    with pytest.raises(ValueError, match="leading axes must agree"):
        simplex.log_volume({"a": jnp.zeros((2, 3)), "b": jnp.zeros((3, 3))})
    assert tree.num_points(split(np.zeros((2, 4), np.float32))) == 2
