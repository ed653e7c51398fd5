"""The faces of a complex, measured and drawn; complexes and decision boundaries in pictures."""

import io

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

from geojax import batches, plot, simplex, surface, tree
from geojax.checkpoint import Checkpointer
from geojax.plot import decisions
from geojax.plot._style import COLORS
from geojax.surface import planes

X = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
DATA = batches.split({"x": X}, 5)
CORNERS = {
    "a": jnp.asarray(np.random.default_rng(1).normal(size=(4, 3, 2)), jnp.float32),
    "b": jnp.asarray(np.random.default_rng(2).normal(size=(4, 2)), jnp.float32),
}
TETRAHEDRON = simplex.single(CORNERS)


def metrics(params, batch):
    out = jnp.tanh(batch["x"] @ params["a"]) @ params["b"]
    return {"loss": jnp.mean(out**2), "mean": jnp.mean(out)}


AVERAGE = batches.mean(metrics, DATA)


@pytest.fixture(scope="module")
def found():
    triangles = simplex.faces(TETRAHEDRON, 2)
    return surface.faces(metrics, CORNERS, triangles, DATA, num=5)


def panels(figure):
    """Axes without the colour bar."""
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def png(figure):
    image = plot.png(figure)
    pixels = matplotlib.image.imread(io.BytesIO(image))
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    return pixels


# ---------------------------------------------------------------------------------- measured


def test_values_are_those_of_direct_evaluation(found):
    assert [face.triangle for face in found] == [(0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)]
    members = tree.unstack(CORNERS)
    for face in found:
        assert face.plane.coordinates.shape == (5, 5, 2)
        for i, j in ((0, 0), (1, 3), (4, 2)):
            point = face.plane.frame.point(face.plane.coordinates[i, j])
            for name, value in AVERAGE(point).items():
                np.testing.assert_allclose(face.plane.values[name][i, j], value, rtol=1e-6)
        # The corners' own losses, at their own coordinates.
        for place, vertex in zip(face.plane.frame.points, face.triangle, strict=True):
            at = AVERAGE(face.plane.frame.point(place))["loss"]
            np.testing.assert_allclose(at, AVERAGE(members[vertex])["loss"], rtol=1e-5)


def test_coordinates_keep_the_shape_of_the_triangle(found):
    between = simplex.distances(CORNERS)
    for face in found:
        places = face.plane.frame.points
        sides = np.linalg.norm(places[:, None] - places[None], axis=-1)
        wanted = between[np.ix_(face.triangle, face.triangle)]
        np.testing.assert_allclose(sides, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("margin", [0.0, 0.25])
def test_a_triangle_fills_its_square_but_for_the_margin(margin):
    (face,) = surface.faces(metrics, CORNERS, [(3, 0, 2)], DATA, num=3, margin=margin)
    low, high = face.plane.coordinates.min((0, 1)), face.plane.coordinates.max((0, 1))
    corners = face.plane.frame.points
    wide = np.ptp(corners, axis=0)
    np.testing.assert_allclose(high - low, (1 + 2 * margin) * wide.max(), rtol=1e-12)
    np.testing.assert_allclose((low + high) / 2, (corners.min(0) + corners.max(0)) / 2, atol=1e-12)


def test_an_interrupted_mosaic_goes_on_where_it_was(found, tmp_path, monkeypatch):
    triangles = simplex.faces(TETRAHEDRON, 2)
    calls, measure = [], planes._measure

    def stopping(*args):
        calls.append(args[1])
        if len(calls) == 40:
            raise KeyboardInterrupt
        return measure(*args)

    def run():
        return surface.faces(
            metrics, CORNERS, triangles, DATA, num=5,
            checkpoints=lambda i: Checkpointer(tmp_path / str(i), every=5),
        )  # fmt: skip

    monkeypatch.setattr(planes, "_measure", stopping)
    with pytest.raises(KeyboardInterrupt):
        run()
    again = run()
    # The one that was stopped, and the one whose value was still awaited; and of the two faces that
    # were begun one position each, to know that they are the same.
    assert len(calls) == 4 * 25 + 2 + 2
    for first, second in zip(found, again, strict=True):
        np.testing.assert_array_equal(first.plane.values["loss"], second.plane.values["loss"])
    run()
    assert len(calls) == 4 * 25 + 2 + 2 + 4


def test_faces_that_were_kept_of_another_function_are_refused(tmp_path):
    def run(metrics_fn):
        return surface.faces(
            metrics_fn, CORNERS, [(0, 1, 2), (1, 2, 3)], DATA, num=2,
            checkpoints=lambda i: Checkpointer(tmp_path / str(i), every=5),
        )  # fmt: skip

    run(metrics)
    with pytest.raises(ValueError, match="at position 3 is .* by another function"):
        run(lambda p, b: {name: 2 * x for name, x in metrics(p, b).items()})


def test_statistics_belong_to_each_position():
    def with_state(params, state, batch):
        return {"loss": metrics(params, batch)["loss"] - state}

    (face,) = surface.faces(
        with_state, CORNERS, [(0, 1, 2)], DATA, num=2, state_fn=lambda p: AVERAGE(p)["loss"]
    )
    np.testing.assert_allclose(face.plane.values["loss"], 0, atol=1e-6)


def test_what_is_no_triangle_is_refused_before_anything_is_measured(monkeypatch):
    def forbidden(*args):
        raise AssertionError("a position was measured")

    monkeypatch.setattr(planes, "_measure", forbidden)
    flat = {"w": jnp.asarray([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])}
    for vertices, triangles, options, words in (
        (CORNERS, [], {}, "got none"),
        (CORNERS, [(0, 1)], {}, "three different indices"),
        (CORNERS, [(0, 1, 4)], {}, "from 0 to 3"),
        (CORNERS, [(0, 1, 1)], {}, "three different indices"),
        (CORNERS, [(0, 1, 2)], {"num": 1}, "at least 2"),
        (CORNERS, [(0, 1, 2)], {"margin": -0.1}, "at least 0"),
        (flat, [(0, 1, 2), (0, 1, 3)], {}, r"triangle \(0, 1, 3\).*on a line"),
    ):
        with pytest.raises(ValueError, match=words):
            surface.faces(metrics, vertices, triangles, DATA, **options)


# ------------------------------------------------------------------------------------- drawn


def test_a_tetrahedron_has_four_panels_in_one_scale(found):
    figure = plot.faces(found, "loss", names=["w", "x", "y", "z"])
    drawn = panels(figure)
    assert len(drawn) == 4
    pooled = np.concatenate([face.plane.values["loss"].ravel() for face in found])
    for axes, face in zip(drawn, found, strict=True):
        filled = axes.collections[0]
        # A hair wider, so that both ends are drawn.
        hair = 2e-9 * np.ptp(pooled)
        ends = [pooled.min(), pooled.max()]
        np.testing.assert_allclose(filled.levels[[0, -1]], ends, rtol=0, atol=hair)
        triangle = axes.lines[0].get_xydata()
        np.testing.assert_array_equal(triangle, face.plane.frame.points[[0, 1, 2, 0]])
        assert [text.get_text() for text in axes.texts] == ["wxyz"[i] for i in face.triangle]
        assert axes.get_aspect() == 1.0
    assert png(figure).shape[0] > 300


def test_levels_end_at_the_top_and_what_is_not_finite_is_drawn(found):
    values = {"loss": found[0].plane.values["loss"].copy()}
    values["loss"][0, 0], values["loss"][0, 1] = np.inf, np.nan
    spoilt = found[0]._replace(plane=found[0].plane._replace(values=values))
    top = float(np.median(found[0].plane.values["loss"]))
    figure = plot.faces([spoilt, *found[1:3]], "loss", top=top, percent=True)
    assert len(panels(figure)) == 4  # the last one empty
    assert not panels(figure)[3].axison
    assert figure.axes[0].collections[0].levels[-1] == pytest.approx(top)
    png(figure)


def test_a_mosaic_that_cannot_be_drawn_is_refused(found):
    for given, options, words in (
        ([], {"metric": "loss"}, "at least one face"),
        (found, {"metric": "error"}, "loss, mean"),
        (found, {"metric": "loss", "names": ["a"]}, "up to 3"),
    ):
        with pytest.raises(ValueError, match=words):
            plot.faces(given, **options)


def test_barycentric_weights_of_a_projection_are_those_of_the_points():
    principal = surface.principal_directions(CORNERS, 3)
    np.testing.assert_allclose(principal.explained.sum(), 1, rtol=1e-5)
    weights = np.asarray(simplex.sample_weights(jax.random.key(0), TETRAHEDRON, 5))
    for row in weights:
        away = tree.axpy(-1.0, principal.origin, tree.combine(CORNERS, row))
        place = [float(tree.vdot(away, u)) for u in tree.unstack(principal.directions)]
        np.testing.assert_allclose(row @ principal.coordinates, place, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", [2, 3])
def test_a_complex_shows_its_vertices_edges_and_triangles(depth):
    at = surface.principal_directions(CORNERS, 3).coordinates[:, :depth]
    simplices = [(0, 2, 3), (1, 2, 3)]
    weights = np.asarray(simplex.dirichlet(jax.random.key(0), 6, 4))
    figure = plot.complex(
        at, simplices, modes=[0, 1], points=weights @ at, values=np.arange(6.0) / 10,
        names=["w0", "w1", "c1", "c2"], explained=[0.5, 0.3, 0.2], percent=True,
    )  # fmt: skip
    axes = figure.axes[0]
    # Five edges, and the two kinds of vertices.
    assert len(axes.lines) == 7
    assert [text.get_text() for text in axes.texts] == ["w0", "w1", "c1", "c2"]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["network", "connector"]
    assert axes.get_xlabel() == "PC 1 (50 %)"
    modes = axes.lines[5]
    x, y = modes.get_data() if depth == 2 else modes.get_data_3d()[:2]
    np.testing.assert_array_equal([x, y], at[:2, :2].T)
    png(figure)


def test_a_complex_that_cannot_be_drawn_is_refused():
    at = np.zeros((3, 2))
    for coordinates, simplices, options, words in (
        (np.zeros((3, 1)), [(0, 1)], {}, r"\(n, 2\) or \(n, 3\)"),
        (at, [(0, 3)], {}, "from 0 to 2"),
        (at, [(0, 1)], {"modes": [3]}, "modes"),
        (at, [(0, 1)], {"names": ["a"]}, "expected 3"),
        (at, [(0, 1)], {"points": np.zeros((2, 3))}, r"\(m, 2\)"),
        (at, [(0, 1)], {"points": np.zeros((2, 2)), "values": [1.0]}, "one for each point"),
        (at, [(0, 1)], {"values": [1.0]}, "one for each point"),
    ):
        with pytest.raises(ValueError, match=words):
            plot.complex(coordinates, simplices, **options)


def test_boundaries_run_where_both_classes_are_equally_likely():
    line = np.linspace(-1, 1, 21)
    places = np.stack(np.meshgrid(line, line), axis=-1)
    found = 1 / (1 + np.exp(-4 * (places[..., 0] - 0.3)))
    figure = plot.boundaries(
        {"a": found, "b": found.T, "certain": np.ones_like(found)}, places,
        inputs=[[0.0, 0.0], [0.5, 0.5]], labels=[0, 1], columns=2,
    )  # fmt: skip
    drawn = panels(figure)
    assert [axes.get_title(loc="left") for axes in drawn] == ["a", "b", "certain", ""]
    boundary = drawn[0].collections[1].get_paths()[0].vertices
    np.testing.assert_allclose(boundary[:, 0], 0.3, atol=1e-3)
    np.testing.assert_allclose(
        drawn[1].collections[1].get_paths()[0].vertices[:, 1], 0.3, atol=1e-3
    )
    assert len(drawn[2].collections) == 1
    assert len(drawn[0].lines) == 2
    png(figure)


def several(num, sharp=4.0):
    """Probabilities of classes that lie around the origin, at places that are not evenly spaced."""
    x, y = 2 * np.linspace(-1, 1, 17) ** 3, np.linspace(-1.0, 3.0, 21)
    places = np.stack(np.meshgrid(x, y), axis=-1)
    angles = 0.3 + 2 * np.pi * np.arange(num) / num
    centers = np.stack([np.cos(angles), np.sin(angles)])

    def probabilities(at):
        logits = sharp * at @ centers
        found = np.exp(logits - logits.max(-1, keepdims=True))
        return found / found.sum(-1, keepdims=True)

    return places, probabilities


def classes_drawn(axes, num):
    """The class of each dot of a panel by its colour, and where the dots are."""
    (image,) = axes.images
    dots = np.asarray(image.get_array())
    left, right, under, over = image.get_extent()
    high, wide = dots.shape[:2]
    x = left + (right - left) * (np.arange(wide) + 0.5) / wide
    y = under + (over - under) * (np.arange(high) + 0.5) / high
    colors = [matplotlib.colors.to_rgb(c) for c in decisions._class_colors(num)]
    # A colour is mixed with white: what is taken away from white keeps its direction.
    hues = 1 - np.array(colors)
    taken = 1 - dots
    along = taken @ hues.T / np.linalg.norm(hues, axis=1)
    return along.argmax(-1), np.stack(np.meshgrid(x, y), axis=-1), np.linalg.norm(taken, axis=-1)


@pytest.mark.parametrize("num", [2, 3, 6])
def test_regions_are_those_of_the_likeliest_class_and_lines_run_between_them(num):
    places, probabilities = several(num)
    found = probabilities(places)
    figure = plot.boundaries(
        {"a": found, "mirrored": found[..., ::-1]}, places, inputs=places[3],
        labels=np.arange(17) % num, names=list("uvwxyz")[:num],
    )  # fmt: skip
    axes, mirrored = panels(figure)[:2]
    drawn, dots, depth = classes_drawn(axes, num)
    truth = np.sort(probabilities(dots), axis=-1)
    # These log-probabilities are linear, so that only dots on the very border may differ.
    clear = truth[..., -1] > truth[..., -2] * 1.1
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(drawn[clear], probabilities(dots).argmax(-1)[clear])
    np.testing.assert_array_equal(classes_drawn(mirrored, num)[0][clear], num - 1 - drawn[clear])
    # Paler where less likely: the colour's strength follows the probability.
    same = clear & (drawn == 0)
    assert np.corrcoef(depth[same], truth[..., -1][same])[0, 1] > 0.95
    lines = [path.vertices for lines in axes.collections for path in lines.get_paths()]
    border = np.concatenate([line for line in lines if len(line)])
    first, second = np.sort(np.log(probabilities(border)), axis=-1)[:, :-3:-1].T
    np.testing.assert_allclose(first, second, atol=0.05)
    assert len(axes.lines) == num
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == list("uvwxyz")[:num]
    png(figure)


def test_regions_agree_with_given_probabilities_that_follow_no_rule():
    rng = np.random.default_rng(0)
    line = np.arange(6.0)
    places = np.stack(np.meshgrid(line, line), axis=-1)
    found = rng.dirichlet(np.full(9, 0.3), size=(6, 6))
    found[0, 0] = np.eye(9)[4]
    axes = panels(plot.boundaries({"a": found}, places))[0]
    drawn, dots, _ = classes_drawn(axes, 9)
    # The dots that lie nearest to the places given.
    near = [np.abs(dots[0, :, 0] - x).argmin() for x in line]
    top = np.sort(found, axis=-1)
    clear = top[..., -1] > 1.2 * top[..., -2]
    assert clear.sum() > 25
    np.testing.assert_array_equal(drawn[np.ix_(near, near)][clear], found.argmax(-1)[clear])


def test_one_class_everywhere_has_no_border():
    places, _ = several(3)
    axes = panels(plot.boundaries({"a": np.eye(3)[np.ones((21, 17), int)]}, places))[0]
    assert (classes_drawn(axes, 3)[0] == 1).all()
    assert not axes.collections


@pytest.mark.parametrize("num", [6, 7, 12, 18, 40])
def test_classes_have_colors_of_their_own(num):
    found = decisions._class_colors(num)
    assert len(set(found)) == num
    if num <= 18:
        assert found[:6] == [color.lower() for color in COLORS[:6]]


def test_a_band_is_two_standard_deviations_around_the_mean():
    rng = np.random.default_rng(0)
    x = np.linspace(-1, 1, 7) ** 3
    found = {name: rng.normal(size=(num, 7)) for name, num in (("a", 5), ("b", 30))}
    figure = plot.bands(
        found, x, inputs=[[0.1], [0.2]], targets=[[1.0], [-1.0]], truth=x, num_members=4,
        y_label="target",
    )  # fmt: skip
    assert figure.get_supylabel() == "target"
    for axes, (title, outputs) in zip(panels(figure), found.items(), strict=True):
        assert axes.get_title(loc="left") == title
        edge = axes.collections[0].get_paths()[0].vertices
        for i, place in enumerate(x):
            mean, half = outputs[:, i].mean(), 2 * np.sqrt(outputs[:, i].var(ddof=1))
            ends = edge[np.isclose(edge[:, 0], place), 1]
            assert ends.max() == pytest.approx(mean + half)
            assert ends.min() == pytest.approx(mean - half)
        *members, mean, truth, data = axes.lines
        assert len(members) == 4
        np.testing.assert_array_equal(members[0].get_ydata(), outputs[0])
        np.testing.assert_array_equal(members[-1].get_ydata(), outputs[-1])
        np.testing.assert_allclose(mean.get_ydata(), outputs.mean(0))
        np.testing.assert_array_equal(truth.get_ydata(), x)
        np.testing.assert_array_equal(data.get_xydata(), [[0.1, 1.0], [0.2, -1.0]])
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["± 2 σ", "single networks", "mean", "truth", "data"]
    png(figure)


def test_bands_that_do_not_fit_are_refused():
    x, good = np.arange(4.0), np.zeros((3, 4))
    for panels_, at, options, words in (
        ({}, x, {}, "0 panels"),
        ({"a": good}, x[::-1], {}, "ascending"),
        ({"a": good}, x[:, None], {}, r"shape \(4, 1\)"),
        ({"a": good.T}, x, {}, r"expected \(members, 4\)"),
        ({"a": good[:1]}, x, {}, "two members"),
        ({"a": np.full((3, 4), np.nan)}, x, {}, "not finite"),
        ({"a": good}, x, {"truth": x[1:]}, r"expected \(4,\)"),
        ({"a": good}, x, {"inputs": x}, "or neither"),
        ({"a": good}, x, {"inputs": x, "targets": x[1:]}, "or neither"),
    ):
        with pytest.raises(ValueError, match=words):
            plot.bands(panels_, at, **options)


def test_boundaries_that_do_not_fit_are_refused():
    places = np.zeros((3, 4, 2))
    grid, probabilities = several(3)
    three = probabilities(grid)
    inside = {"inputs": np.zeros((2, 2))}
    for panels_, options, words in (
        ({"a": three, "b": three[..., 0]}, {}, "panel 'b' .* same for all"),
        ({"a": three[:-1]}, {}, "panel 'a'"),
        ({"a": three[..., :1]}, {}, "panel 'a'"),
        ({"a": np.log(three)}, {}, "from 0 to 1"),
        ({"a": 0.5 * three}, {}, "sum to 0.5"),
        ({"a": np.full_like(three, np.nan)}, {}, "from 0 to 1"),
        ({"a": three}, inside | {"labels": [0, 3]}, r"labels are \[0, 3\]; expected 0 to 2"),
        ({"a": three}, inside | {"labels": [0, 0.5]}, "expected 0 to 2"),
        ({"a": three[..., 0]}, inside | {"labels": [0, 2]}, "expected 0 to 1"),
        ({"a": three}, {"inputs": np.zeros((2, 3)), "labels": [0, 1]}, r"expected \(n, 2\)"),
        ({"a": three}, {"names": ["u", "v"]}, "got 2 names; expected one for each of 3"),
    ):
        with pytest.raises(ValueError, match=words):
            plot.boundaries(panels_, grid, **options)
    for turned in (grid[::-1], np.swapaxes(grid, 0, 1)):
        with pytest.raises(ValueError, match="both ascending"):
            plot.boundaries({"a": np.full((*turned.shape[:2], 3), 1 / 3)}, turned)
    for panels_, options, words in (
        ({}, {}, "at least one"),
        ({"a": np.zeros((4, 3))}, {}, "panel 'a'"),
        ({"a": np.full((3, 4), 1.5)}, {}, "from 0 to 1"),
        ({"a": np.zeros((3, 4))}, {"inputs": np.zeros((2, 2))}, "or neither"),
        ({"a": np.zeros((3, 4))}, {"inputs": np.zeros((2, 2)), "labels": [0]}, "or neither"),
    ):
        with pytest.raises(ValueError, match=words):
            plot.boundaries(panels_, places, **options)
