"""Regression with a gap in its data: networks drawn from simplexes differ between the clusters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from geojax import datasets, fit, models, objectives, simplex, tree

NOISE = 0.1
GRID = np.linspace(-1, 1, 81, dtype=np.float32)
BETWEEN = (GRID > -0.7) & (GRID < 0.5)


@pytest.fixture(scope="module")
def grown():
    """Three simplexes from networks of their own seeds, the data, and what a point in them says."""
    data = datasets.load("regression_1d", noise=NOISE)
    model = models.build("mlp", widths=[32, 32], num_classes=1)
    loss_fn = objectives.evaluation_loss(model.apply, {}, "regression")

    def rule(num_steps):
        return optax.adam(fit.warmup_cosine(1e-2, num_steps))

    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes integers and floats
        first, modes = rule(400), []
        for seed in range(3):
            params, _ = model.init(jax.random.key(seed), data.train.inputs[:1])
            run = fit.fit(loss_fn, params, data.train, first, 400, key=jax.random.key(1))
            modes.append(run.params)
        found = simplex.espro(
            loss_fn, tree.stack(modes), data.train, rule(200), 200, key=jax.random.key(2),
            num_vertices=3, volume_weight=1e-2,
        )  # fmt: skip

    @jax.jit
    def say(vertices, weights):
        def one(c):
            params = tree.combine(vertices, c)
            outputs, _ = model.apply(params, {}, jnp.asarray(GRID)[:, None], False)
            return outputs[:, 0], loss_fn(params, data.train)

        return jax.vmap(one)(weights)

    return found.complexes, say


def spreads(outputs):
    """The mean width of the band of two sigma, between the clusters and at them."""
    widths = 4 * np.asarray(outputs).std(0, ddof=1)
    return widths[BETWEEN].mean(), widths[~BETWEEN].mean()


def test_networks_of_a_simplex_agree_at_the_clusters_and_differ_between_them(grown):
    complexes, say = grown
    for i, one in enumerate(complexes):
        weights = simplex.sample_weights(jax.random.fold_in(jax.random.key(3), i), one, 100)
        outputs, losses = say(one.vertices, weights)
        # All of them fit: their losses are close to the variance of the noise.
        assert float(losses.max()) < 2 * NOISE**2
        between, at = spreads(outputs)
        assert between > 1.5 * at
        assert at < NOISE
        # It is the training that does it: random directions of these lengths spread everywhere.
        first, *others = tree.unstack(one.vertices)
        turned = [first]
        for j, other in enumerate(others):
            random = tree.random_like(jax.random.key(10 * i + j), first)
            length = tree.norm(tree.axpy(-1.0, first, other)) / tree.norm(random)
            turned.append(tree.axpy(length, random, first))
        between, at = spreads(say(tree.stack(turned), weights)[0])
        assert between < at


def test_several_simplexes_differ_more_than_one(grown):
    complexes, say = grown
    outputs = [
        say(one.vertices, simplex.sample_weights(jax.random.key(4), one, 100))[0]
        for one in complexes
    ]
    alone = [spreads(x)[0] for x in outputs]
    between, at = spreads(np.concatenate(outputs))
    assert between > np.mean(alone)
    assert between > 3 * at
