"""Averages of weights inside a region of low loss, on real data."""

import jax
import numpy as np
import optax

from geojax import batches, datasets, fit, models, objectives, simplex, tree


def reversed_units(params):
    """The same function, with the first hidden layer's units in reversed order."""
    first, second = params["Dense_0"], params["Dense_1"]
    first = {"kernel": first["kernel"][:, ::-1], "bias": first["bias"][::-1]}
    return params | {"Dense_0": first, "Dense_1": second | {"kernel": second["kernel"][::-1]}}


def test_the_centroid_of_a_simplex_of_low_loss_is_as_good_as_its_vertices():
    data = datasets.load("digits", validation=0)
    model = models.build("mlp", num_classes=10, widths=[32, 32], initializer="he")
    source = batches.split(data.train, 128, key=jax.random.key(9), drop_remainder=True)
    loss_fn = objectives.loss(model.apply, {})
    params, _ = model.init(jax.random.key(0), data.train.inputs[:1])
    steps = 15 * len(source)
    rule = optax.sgd(fit.warmup_cosine(0.05, steps), 0.9)
    options = {"key": jax.random.key(1), "progress": False}
    trained = fit.fit(loss_fn, params, source, rule, steps, **options).params
    grown = simplex.espro(
        loss_fn, tree.stack([trained]), source, rule, steps, num_vertices=3, num_samples=3,
        volume_weight=3e-2, **options,
    ).complexes[0]  # fmt: skip
    mean = batches.mean(objectives.metrics(model.apply, {}), data.test)
    nll = lambda params: float(mean(params)["loss"])  # noqa: E731
    vertices = tree.unstack(grown.vertices)
    mean_of_vertices = np.mean([nll(x) for x in vertices])
    assert mean_of_vertices < 0.4
    # As far apart as a tenth of the network is long, and yet one region.
    edges = simplex.edge_lengths(grown).values()
    assert min(edges) > 0.1 * float(tree.norm(trained))
    assert nll(simplex.centroid(grown.vertices)) <= 1.1 * mean_of_vertices
    # It is the place that makes it so: of three networks as good, two elsewhere, it is not true.
    elsewhere = tree.stack([vertices[0], *map(reversed_units, vertices[1:])])
    assert abs(nll(reversed_units(vertices[1])) - nll(vertices[1])) < 1e-5
    assert nll(simplex.centroid(elsewhere)) > 2 * mean_of_vertices
