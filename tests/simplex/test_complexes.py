"""Complexes are what they were given, to the bit, and refuse what they cannot be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from geojax import curves, simplex, tree


def points(n, seed=0):
    r = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(r.normal(size=(n, 3, 2)), jnp.float32),
        "b": jnp.asarray(r.normal(size=n), jnp.bfloat16),
    }


def same(a, b):
    return all(
        x.dtype == y.dtype and x.shape == y.shape and (np.asarray(x) == np.asarray(y)).all()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize(
    ("simplices", "error", "words"),
    [
        ([(0, 3)], ValueError, "simplex 0 names vertex 3; the vertices are 0 to 2"),
        ([(0, -1)], ValueError, "names vertex -1"),
        ([(0, 1), (1, 1)], ValueError, r"simplex 1 is \(1, 1\); expected each vertex once"),
        ([()], ValueError, "simplex 0 is empty"),
        ([], ValueError, "at least one simplex"),
        ([(0, 1), (1, 0)], ValueError, "simplices 0 and 1 are the same"),
        ([0], TypeError, r"expected a tuple of indices, such as \(0,\)"),
        ([(0, 1.0)], TypeError, "expected an integer index"),
        ([(0, True)], TypeError, "expected an integer index"),
    ],
)
def test_what_is_no_complex_is_refused_in_a_sentence(simplices, error, words):
    with pytest.raises(error, match=words):
        simplex.SimplicialComplex(points(3), simplices)


def test_vertices_must_be_floating():
    with pytest.raises(TypeError, match=r"leaf \['w'\] is int32"):
        simplex.SimplicialComplex({"w": jnp.zeros((2, 3), jnp.int32)}, [(0, 1)])


def test_what_was_given_is_not_changed_and_dimensions_may_be_mixed():
    given, vertices = [[0, 1, 2], (np.int64(2), 3), range(1)], points(4)
    complex = simplex.SimplicialComplex(vertices, given)
    assert given == [[0, 1, 2], (2, 3), range(1)]
    assert complex.simplices == ((0, 1, 2), (2, 3), (0,))
    assert complex.dimensions == (2, 1, 0)
    assert complex.num_vertices == 4
    assert "3 simplices" in repr(complex)
    before = jax.tree.map(np.asarray, vertices)
    simplex.add_vertex(complex)
    simplex.replace_vertex(complex, 0, simplex.vertex(complex, 1))
    assert complex.simplices == ((0, 1, 2), (2, 3), (0,))
    assert same(complex.vertices, before)


def test_a_complex_is_a_pytree_that_is_traced_once():
    traces = []

    @jax.jit
    def total(complex):
        traces.append(complex.simplices)
        return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(complex.vertices))

    a, b = (simplex.single(points(3, seed)) for seed in (0, 1))
    assert total(a) != total(b)
    assert len(traces) == 1
    total(simplex.chain(points(3)))
    assert traces == [((0, 1, 2),), ((0, 1), (1, 2))]
    leaves, structure = jax.tree.flatten(a)
    again = jax.tree.unflatten(structure, leaves)
    assert again.simplices == a.simplices
    assert same(again.vertices, a.vertices)
    assert ".vertices['b']" in tree.paths(a)


def test_a_chain_is_the_polygonal_chain():
    vertices = tree.cast(points(5), jnp.float32)
    complex, basis = simplex.chain(vertices), curves.polychain(5)
    for t in np.linspace(0, 1, 21):
        weights = np.asarray(basis(np.float32(t)))
        held = set(np.flatnonzero(weights))
        assert any(held <= set(edge) for edge in complex.simplices)
        want = curves.point(basis, vertices, t)
        found = tree.combine(complex.vertices, weights)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
    with pytest.raises(ValueError, match="got 1 points"):
        simplex.chain(points(1))


def test_a_star_shares_one_face_of_all_connectors():
    complex = simplex.star(points(4), points(3, seed=1))
    assert complex.simplices == tuple((i, 4, 5, 6) for i in range(4))
    shared = set.intersection(*map(set, complex.simplices))
    assert shared == {4, 5, 6}
    assert complex.num_vertices == 7
    assert same(simplex.vertex(complex, 5), tree.unstack(points(3, seed=1))[1])
    assert simplex.star(points(4)).simplices == ((0,), (1,), (2,), (3,))
    assert simplex.faces(complex, 3) == complex.simplices
    assert (4, 5, 6) in simplex.faces(complex, 2)


def test_networks_go_in_and_out_of_vertices_to_the_bit():
    complex = simplex.single(points(3))
    network = tree.unstack(points(1, seed=3))[0]
    other = simplex.replace_vertex(complex, -1, network)
    assert same(simplex.vertex(other, 2), network)
    assert same(simplex.vertex(other, -1), network)
    for i in (0, 1):
        assert same(simplex.vertex(other, i), simplex.vertex(complex, i))
    for i, weights in enumerate(np.eye(3, dtype=np.float32)):
        assert same(tree.combine(complex.vertices, weights), simplex.vertex(complex, i))
    with pytest.raises(ValueError, match=r"leaf \['w'\] has shape"):
        simplex.replace_vertex(complex, 0, {**network, "w": jnp.zeros(2)})
    with pytest.raises(ValueError, match="vertex 3: the vertices are 0 to 2"):
        simplex.vertex(complex, 3)
    with pytest.raises(TypeError, match="expected an integer index"):
        simplex.vertex(complex, 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("at", ["joined", "centroid"])
def test_a_new_vertex_starts_at_the_mean_and_the_old_ones_stay(at):
    complex = simplex.SimplicialComplex(points(4), [(0, 1), (1, 2), (3,)])
    grown = simplex.add_vertex(complex, joins=[0, 1], at=at)
    assert grown.simplices == ((0, 1, 4), (1, 2, 4), (3,))
    for i in range(4):
        assert same(simplex.vertex(grown, i), simplex.vertex(complex, i))
    members = range(3) if at == "joined" else range(4)
    want = np.asarray(complex.vertices["w"], np.float64)[list(members)].mean(0)
    np.testing.assert_allclose(simplex.vertex(grown, 4)["w"], want, rtol=1e-6, atol=1e-6)
    assert simplex.vertex(grown, 4)["b"].dtype == jnp.bfloat16


def test_a_new_vertex_may_be_given_or_moved_at_random():
    complex = simplex.SimplicialComplex(tree.cast(points(3), jnp.float32), [(0, 1), (1, 2)])
    network = tree.unstack(tree.cast(points(1, seed=3), jnp.float32))[0]
    grown = simplex.add_vertex(complex, at=network)
    assert same(simplex.vertex(grown, 3), network)
    start = simplex.centroid(complex.vertices)
    moved = simplex.add_vertex(complex, jitter=0.1, key=jax.random.key(1))
    away = tree.norm(tree.axpy(-1.0, start, simplex.vertex(moved, 3)))
    distances = [tree.norm(tree.axpy(-1.0, start, w)) for w in tree.unstack(complex.vertices)]
    np.testing.assert_allclose(away, 0.1 * np.mean(distances), rtol=1e-5)
    again = simplex.add_vertex(complex, jitter=0.1, key=jax.random.key(1))
    other = simplex.add_vertex(complex, jitter=0.1, key=jax.random.key(2))
    assert same(moved.vertices, again.vertices)
    assert not same(moved.vertices, other.vertices)
    assert np.isfinite(simplex.log_volumes(moved)).all()
    assert (simplex.log_volumes(simplex.add_vertex(complex, [0], at="joined"))[:1] == -np.inf).all()
    one = simplex.add_vertex(
        simplex.single(tree.stack([network])), jitter=0.1, key=jax.random.key(0)
    )
    away = simplex.distances(one.vertices)[0, 1]
    np.testing.assert_allclose(away, 0.1 * float(tree.norm(network)), rtol=1e-5)


def test_wrong_joins_and_jitters_are_refused():
    complex = simplex.chain(points(3))
    for joins in ([], [2], [-1], [0.0], "some", [True]):
        with pytest.raises(ValueError, match="expected 'all' or numbers of simplices, 0 to 1"):
            simplex.add_vertex(complex, joins)
    with pytest.raises(ValueError, match="and a key where it is more"):
        simplex.add_vertex(complex, jitter=0.1)
    with pytest.raises(ValueError, match="expected at least 0"):
        simplex.add_vertex(complex, jitter=-1.0, key=jax.random.key(0))
    with pytest.raises(ValueError, match="at is 'middle'"):
        simplex.add_vertex(complex, at="middle")
    with pytest.raises(ValueError, match="at lacks leaf"):
        simplex.add_vertex(complex, at={"w": jnp.zeros((3, 2))})


def test_faces_are_listed_once():
    two = simplex.SimplicialComplex(points(4), [(2, 1, 0), (1, 2, 3), (3,)])
    assert simplex.faces(two, 0) == ((0,), (1,), (2,), (3,))
    assert simplex.faces(two, 1) == ((0, 1), (0, 2), (1, 2), (1, 3), (2, 3))
    assert simplex.faces(two, 2) == ((0, 1, 2), (1, 2, 3))
    assert simplex.faces(two, 3) == ()
    with pytest.raises(ValueError, match="dimension is -1"):
        simplex.faces(two, -1)


def test_the_centroid_is_the_mean_of_those_named():
    vertices = points(4)
    wide = np.asarray(vertices["w"], np.float64)
    np.testing.assert_allclose(simplex.centroid(vertices)["w"], wide.mean(0), atol=1e-6)
    np.testing.assert_allclose(
        simplex.centroid(vertices, [1, 3])["w"], wide[[1, 3]].mean(0), atol=1e-6
    )
    twice = simplex.centroid(vertices, [1, 1, 3])["w"]
    np.testing.assert_allclose(twice, (2 * wide[1] + wide[3]) / 3, atol=1e-6)
    for members in ([], [4], [-1]):
        with pytest.raises(ValueError, match="expected numbers of points, 0 to 3"):
            simplex.centroid(vertices, members)


def test_sharded_networks_keep_their_sharding(mesh):
    spec = P(None, None, "model")
    modes, connectors = (
        {"w": jax.device_put(tree.cast(points(n, n), jnp.float32)["w"], NamedSharding(mesh, spec))}
        for n in (2, 1)
    )
    with jax.set_mesh(mesh):
        complex = simplex.add_vertex(
            simplex.star(modes, connectors), jitter=0.1, key=jax.random.key(0)
        )
        new = simplex.vertex(complex, 3)["w"]
        logs = simplex.log_volumes(complex)
    host = simplex.star(*(jax.tree.map(np.asarray, x) for x in (modes, connectors)))
    grown = simplex.add_vertex(host, jitter=0.1, key=jax.random.key(0))
    np.testing.assert_allclose(new, simplex.vertex(grown, 3)["w"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logs, simplex.log_volumes(grown), rtol=1e-4)
    np.testing.assert_array_equal(simplex.vertex(complex, 0)["w"], modes["w"][0])
    assert complex.vertices["w"].sharding.spec[2] == "model"
