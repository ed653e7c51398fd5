"""Permutations learned with the loss, and the doubly stochastic matrices that stand for them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from geojax import batches, datasets, fit
from geojax.permute import evaluation, learned, relaxed, weight_matching
from geojax.symmetry import (
    Concatenation,
    Factor,
    Group,
    Leaf,
    PermutationSpec,
    Product,
    SpecError,
    action,
)

EPS = float(np.finfo(np.float32).eps)


def mlp_spec(sizes, kind="permutation"):
    """Dense layers w0, b0, w1, b1, ...; one group for each hidden layer."""
    units = [Factor("", sizes[0])]
    units += [Factor(f"h{i}", size) for i, size in enumerate(sizes[1:-1])]
    units += [Factor("", sizes[-1])]
    pairs = list(itertools.pairwise(units))
    biases = [Leaf(f"['b{i}']", (b.size,), (b,)) for i, (_, b) in enumerate(pairs)]
    kernels = [Leaf(f"['w{i}']", (a.size, b.size), (a, b)) for i, (a, b) in enumerate(pairs)]
    groups = tuple(Group(f.name, f.size, kind=kind) for f in units if f.name)
    return PermutationSpec((*biases, *kernels), groups)


def random_mlp(spec, seed):
    rng = np.random.default_rng(seed)
    return {
        leaf.path[2:-2]: jnp.asarray(rng.normal(size=leaf.shape) / leaf.shape[0] ** 0.5, np.float32)
        for leaf in spec.leaves
    }


def loss_fn(params, batch):
    x, depth = batch["x"], len(params) // 2
    for i in range(depth):
        x = x @ params[f"w{i}"] + params[f"b{i}"][None]
        x = jax.nn.relu(x) if i < depth - 1 else x
    log_p = jax.nn.log_softmax(x)
    return -jnp.mean(jnp.take_along_axis(log_p, batch["y"][:, None], axis=1))


def metrics_fn(params, batch):
    return {"loss": loss_fn(params, batch)}


def equal(p, q):
    return p.keys() == q.keys() and all((np.asarray(p[k]) == np.asarray(q[k])).all() for k in p)


def is_permutation(spec, p):
    action.check_permutation(spec, p)
    return all(x.dtype == np.int32 and isinstance(x, np.ndarray) for x in p.values())


# ----------------------------------------------------------------------------- digits, trained

DIGITS = mlp_spec((64, 64, 64, 10))


@functools.cache
def digits():
    train = datasets.load("digits").train
    x = train.inputs.reshape(len(train.labels), -1)
    return {"x": x, "y": train.labels.astype(np.int32)}


@functools.cache
def networks():
    """Two networks of width 64, a few epochs of Adam from different seeds."""
    optimizer = optax.rmsprop(2e-3)  # optax's Adam needs the promotion that these tests forbid
    out = []
    for seed in range(2):
        order = batches.split(digits(), 128, key=jax.random.key(seed))
        start = random_mlp(DIGITS, seed)
        start = {k: x * (0.0 if k[0] == "b" else 1.0) for k, x in start.items()}
        run = fit.fit(loss_fn, start, order, optimizer, 70, key=jax.random.key(seed))
        out.append(run.params)
    return out


@pytest.fixture(scope="module")
def straight_through():
    return learned.straight_through_matching(
        loss_fn, DIGITS, *networks(), batches.split(digits(), 256, key=jax.random.key(5)),
        optax.sgd(2.0, momentum=0.9), 40, key=jax.random.key(0), eval_batches=digits(),
        evaluate_every=4,
    )  # fmt: skip


def test_straight_through_is_no_worse_than_weight_matching_in_loss_and_barrier(straight_through):
    a, b = networks()
    matched = weight_matching(DIGITS, a, b, key=jax.random.key(0))
    barriers = [
        evaluation.barrier(
            metrics_fn, a, b, digits(), spec=DIGITS, permutation=p, ts=np.linspace(0, 1, 9)
        )
        for p in (straight_through.permutation, matched.permutation)
    ]
    assert barriers[0].aligned["loss"].height <= barriers[1].aligned["loss"].height
    assert straight_through.best_loss < straight_through.start_loss
    assert straight_through.best_step >= 0
    assert straight_through.num_moves > 0
    assert straight_through.converged
    # The objective is what weight matching maximizes, so the learned permutation has less of it.
    moved = action.apply(DIGITS, straight_through.permutation, b)
    want = sum(np.vdot(np.asarray(a[k], np.float64), moved[k]) for k in a if k != "b2")
    assert straight_through.objective == pytest.approx(want, rel=1e-5)


def test_the_best_permutation_reproduces_its_logged_loss_to_the_last_bit(straight_through):
    a, b = networks()
    assert is_permutation(DIGITS, straight_through.permutation)
    middle = learned.midpoint(DIGITS, straight_through.permutation, a, b)
    assert float(batches.mean(loss_fn, digits())(middle)) == straight_through.best_loss
    assert straight_through.best_loss == min(loss for _, loss in straight_through.candidates)
    ends = [float(batches.mean(loss_fn, digits())(p)) for p in (a, b)]
    assert straight_through.endpoint_loss == pytest.approx(np.mean(ends), rel=1e-6)
    # The loss of the first step is that of weight matching's midpoint, on the first batch.
    first = next(iter(batches.split(digits(), 256, key=jax.random.key(5))))
    matched = weight_matching(DIGITS, a, b, key=jax.random.split(jax.random.key(0))[0])
    middle = learned.midpoint(DIGITS, matched.permutation, a, b)
    assert straight_through.losses[0] == pytest.approx(float(loss_fn(middle, first)), rel=1e-5)


def test_the_start_is_a_candidate_and_is_left_as_it_was():
    a, b = networks()
    start = action.random(jax.random.key(7), DIGITS)
    start = {name: np.array(x) for name, x in start.items()}
    before = {name: x.copy() for name, x in start.items()}
    found = learned.straight_through_matching(
        loss_fn, DIGITS, a, b, digits(), optax.sgd(0.0), 2, key=jax.random.key(0), init=start
    )
    assert equal(start, before)
    assert [step for step, _ in found.candidates][:2] == [-1, -1]
    assert found.best_loss <= min(loss for _, loss in found.candidates[:2])
    assert found.candidates[0][1] == found.start_loss


def test_the_same_key_gives_the_same_permutation_and_the_step_is_compiled_once():
    spec = mlp_spec((5, 6, 4))
    a, b = random_mlp(spec, 0), random_mlp(spec, 1)
    rng = np.random.default_rng(0)
    data = {"x": rng.normal(size=(12, 5)).astype(np.float32), "y": np.arange(12) % 4}
    data["y"] = data["y"].astype(np.int32)
    traces = []

    def counted(params, batch):
        traces.append(1)
        return loss_fn(params, batch)

    run = functools.partial(
        learned.straight_through_matching, counted, spec, a, b,
        batches.split(data, 6, key=jax.random.key(1)), optax.sgd(0.5), 7, key=jax.random.key(3),
        eval_batches=data,
    )  # fmt: skip
    first, second = run(), run()
    assert equal(first.permutation, second.permutation)
    np.testing.assert_array_equal(first.losses, second.losses)
    assert len(traces) == 2  # the gradient and the evaluation


def test_the_loss_of_a_step_that_is_not_finite_is_an_error():
    spec = mlp_spec((5, 6, 4))
    a, b = random_mlp(spec, 0), random_mlp(spec, 1)
    data = {"x": np.full((3, 5), np.nan, np.float32), "y": np.zeros(3, np.int32)}
    with pytest.raises(fit.NonFiniteError, match="step 0 gave the loss nan"):
        learned.straight_through_matching(
            loss_fn, spec, a, b, data, optax.sgd(0.1), 1, key=jax.random.key(0)
        )


# ------------------------------------------------------------------------------------- Sinkhorn


def unrolled(logits, temperature, num_iterations):
    x = logits / temperature
    for _ in range(num_iterations):
        x = x - jax.nn.logsumexp(x, axis=-1, keepdims=True)
        x = x - jax.nn.logsumexp(x, axis=-2, keepdims=True)
    return jnp.exp(x)


def logits_of(shape, seed=0, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, jnp.float32)


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_sinkhorn_matrices_have_unit_marginals(scale):
    found = np.asarray(relaxed.sinkhorn(logits_of((3, 32, 32), scale=scale)), np.float64)
    assert found.min() >= 0
    assert np.abs(found.sum(-1) - 1).max() <= 1e-5
    assert np.abs(found.sum(-2) - 1).max() <= 1e-5


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_the_implicit_derivative_is_that_of_five_hundred_unrolled_iterations(scale):
    logits, weights = logits_of((12, 12), 1, scale), logits_of((12, 12), 2)

    @jax.jit
    def both(logits, temperature):
        def implicit(logits, temperature):
            found = relaxed.sinkhorn(logits, temperature=temperature, tolerance=0.0)
            return jnp.sum(weights * jnp.sin(3.0 * found))

        def explicit(logits, temperature):
            x = logits / temperature

            def one(x, _):
                x = x - jax.nn.logsumexp(x, axis=-1, keepdims=True)
                return x - jax.nn.logsumexp(x, axis=-2, keepdims=True), None

            x = jax.lax.scan(one, x, None, length=500)[0]
            return jnp.sum(weights * jnp.sin(3.0 * jnp.exp(x)))

        grad = functools.partial(jax.grad, argnums=(0, 1))
        return grad(implicit)(logits, temperature), grad(explicit)(logits, temperature)

    got, want = both(logits, jnp.float32(0.8))
    assert float(jnp.linalg.norm(got[0] - want[0])) <= 1e-4 * float(jnp.linalg.norm(want[0]))
    assert float(got[1]) == pytest.approx(float(want[1]), rel=1e-4)


def test_the_implicit_derivative_is_exact_in_float64():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        logits, weights = (jnp.asarray(rng.normal(size=(6, 6))) for _ in range(2))

        def implicit(x):
            return jnp.sum(weights * relaxed.sinkhorn(x, tolerance=1e-15))

        got = jax.grad(implicit)(logits)
        want = jax.grad(lambda x: jnp.sum(weights * unrolled(x, 1.0, 60)))(logits)
        np.testing.assert_allclose(got, want, atol=1e-12)


def test_the_derivative_at_a_permutation_is_finite():
    logits = 400.0 * jnp.eye(5)[jnp.array([2, 0, 1, 4, 3])]
    got = jax.grad(lambda x: jnp.sum(logits_of((5, 5)) * relaxed.sinkhorn(x)))(logits)
    assert bool(jnp.isfinite(got).all())
    assert float(jnp.abs(got).max()) <= 1e-5


def test_a_batch_of_matrices_is_the_matrices_one_by_one():
    logits = logits_of((3, 7, 7))
    value_and_grad = jax.value_and_grad(
        lambda x: jnp.sum(jnp.square(relaxed.sinkhorn(x, temperature=0.5)))
    )
    values, grads = jax.jit(jax.vmap(value_and_grad))(logits)
    total, together = jax.jit(value_and_grad)(logits)
    for i in range(3):
        value, grad = jax.jit(value_and_grad)(logits[i])
        assert float(values[i]) == pytest.approx(float(value), rel=1e-5)
        for other in (grads[i], together[i]):
            np.testing.assert_allclose(other, grad, atol=1e-5 * float(jnp.abs(grad).max()))
    assert float(total) == pytest.approx(float(values.sum()), rel=1e-5)


def test_sinkhorn_refuses_what_has_no_doubly_stochastic_form():
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        relaxed.sinkhorn(jnp.ones((2, 3)))
    with pytest.raises(TypeError, match="int32"):
        relaxed.sinkhorn(jnp.ones((2, 2), jnp.int32))


# ----------------------------------------------------------------------------------- soft action


def attention_spec():
    """A fused query-key-value kernel, an output kernel, a stack of layers, a tied matrix."""
    model, head = Factor("model", 5), Factor("head", 3)
    inner, value = Product((head, Factor("inner", 4))), Product((head, Factor("value", 4)))
    return PermutationSpec(
        leaves=(
            Leaf("['out']", (3, 4, 5), (head, value.parts[1], model)),
            Leaf("['qkv']", (5, 36), (model, Concatenation((inner, inner, value)))),
            Leaf("['stack']", (2, 6, 5), (Factor("l", 2), Factor("unit", 6), model)),
            Leaf("['tied']", (5, 5), (model, model)),
        ),
        groups=(
            Group("model", 5),
            Group("head", 3),
            Group("inner", 4, ("head",), (3,)),
            Group("value", 4, ("head",), (3,)),
            Group("unit", 6, ("l",), (2,)),
        ),
    )


def test_matrices_of_a_permutation_act_as_the_permutation():
    spec = attention_spec()
    tree = random_mlp(spec, 0)
    p = action.random(jax.random.key(0), spec)
    soft = jax.jit(relaxed.apply_soft, static_argnums=0)(spec, action.to_matrices(p), tree)
    hard = action.apply(spec, p, tree)
    for name, x in hard.items():
        np.testing.assert_allclose(soft[name], x, atol=1e-6)
        assert not np.array_equal(x, tree[name])


def test_soft_action_is_linear_in_each_matrix_and_keeps_dtypes():
    spec = mlp_spec((3, 4, 5, 2))
    tree = random_mlp(spec, 0)
    p, q = (action.to_matrices(action.random(jax.random.key(i), spec)) for i in range(2))
    mix = p | {"h0": 0.3 * p["h0"] + 0.7 * q["h0"]}
    got = relaxed.apply_soft(spec, mix, tree)
    one, other = (relaxed.apply_soft(spec, p | {"h0": x["h0"]}, tree) for x in (p, q))
    for name in tree:
        np.testing.assert_allclose(got[name], 0.3 * one[name] + 0.7 * other[name], atol=1e-6)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    assert {x.dtype for x in relaxed.apply_soft(spec, mix, half).values()} == {
        jnp.dtype("bfloat16")
    }


def test_soft_action_on_a_mesh_equals_one_device_and_keeps_the_sharding(mesh):
    spec = mlp_spec((4, 8, 8, 2))
    tree = random_mlp(spec, 0)
    p = action.to_matrices(action.random(jax.random.key(0), spec))
    want = relaxed.apply_soft(spec, p, tree)
    where = jax.tree.map(
        lambda x: NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), "model")), tree
    )
    with jax.set_mesh(mesh):
        got = relaxed.apply_soft(spec, p, jax.device_put(tree, where))
    for name, x in got.items():
        np.testing.assert_allclose(x, want[name], atol=1e-6)
        assert x.sharding.is_equivalent_to(where[name], x.ndim)


def test_soft_action_refuses_what_does_not_fit():
    spec = mlp_spec((3, 4, 2))
    tree = random_mlp(spec, 0)
    with pytest.raises(SpecError, match=r"matrices for \[\]; expected \['h0'\]"):
        relaxed.apply_soft(spec, {}, tree)
    with pytest.raises(SpecError, match=r"shape \(4,\); expected \(4, 4\)"):
        relaxed.apply_soft(spec, {"h0": jnp.ones(4)}, tree)
    with pytest.raises(SpecError, match=r"leaf \['x'\] of shape"):
        relaxed.apply_soft(spec, {"h0": jnp.eye(4)}, {"x": jnp.ones(3)})
    with pytest.raises(SpecError, match="of kind 'signed'"):
        relaxed.apply_soft(mlp_spec((3, 4, 2), "signed"), {"h0": jnp.eye(4)}, tree)


# ----------------------------------------------------------------------------- Sinkhorn matching


def test_a_planted_permutation_is_recovered_from_the_distance_of_the_weights():
    spec = mlp_spec((16, 32, 32, 10))
    b = random_mlp(spec, 0)
    planted = action.random(jax.random.key(1), spec)
    a = action.apply(spec, planted, b)
    found = learned.sinkhorn_matching(
        spec, a, b, optax.rmsprop(0.3), 60, key=jax.random.key(2), evaluate_every=20
    )
    assert equal(found.permutation, planted)
    assert is_permutation(spec, found.permutation)
    assert found.best_loss == 0
    assert found.marginal_error <= 1e-5
    assert found.losses[-1] < 0.1 * found.losses[0]
    want = sum(np.vdot(np.asarray(a[k], np.float64), a[k]) for k in a if k != "b2")
    assert found.objective == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("loss", ["midpoint", "random_point"])
def test_the_losses_of_points_find_a_better_permutation_than_the_weights(loss):
    a, b = networks()
    found = learned.sinkhorn_matching(
        DIGITS, a, b, optax.rmsprop(0.5), 30, key=jax.random.key(0), loss=loss, loss_fn=loss_fn,
        batches=batches.split(digits(), 256, key=jax.random.key(1)), eval_batches=digits(),
        num_iterations=50, evaluate_every=15,
    )  # fmt: skip
    assert is_permutation(DIGITS, found.permutation)
    assert found.best_loss == min(loss for _, loss in found.candidates)
    assert found.marginal_error <= 1e-5
    points = [0.5] if loss == "midpoint" else [0.1, 0.3, 0.5, 0.7, 0.9]

    def mean_loss(permutation):
        line = evaluation.barrier(
            metrics_fn, a, b, digits(), spec=DIGITS, permutation=permutation, ts=[0, *points, 1]
        )
        return line.aligned["loss"].values[1:-1].mean()

    assert found.best_loss == pytest.approx(mean_loss(found.permutation), rel=1e-6)
    matched = weight_matching(DIGITS, a, b, key=jax.random.key(0)).permutation
    assert found.best_loss < mean_loss(matched)


def test_a_given_start_is_a_candidate_and_the_logits_begin_near_it():
    spec = mlp_spec((3, 6, 6, 2))
    a, b = random_mlp(spec, 0), random_mlp(spec, 1)
    start = action.random(jax.random.key(0), spec)
    found = learned.sinkhorn_matching(
        spec, a, b, optax.sgd(0.0), 1, key=jax.random.key(0), init=start, noise=0.0
    )
    assert equal(found.permutation, start)
    assert [step for step, _ in found.candidates] == [-1]
    for name, matrix in action.to_matrices(start).items():
        np.testing.assert_allclose(
            found.matrices[name], 0.5 * matrix + 0.1 * (1 - matrix), atol=1e-6
        )
    assert found.rounding_distance == pytest.approx(0.5, abs=1e-6)
    moved = action.apply(spec, start, b)
    parts = [(np.sum((np.asarray(a[k]) - moved[k]) ** 2), np.sum(np.square(a[k])))
             for k in a if k != "b2"]  # fmt: skip
    assert found.best_loss == pytest.approx(np.divide(*np.sum(parts, 0)), rel=1e-5)


def test_sinkhorn_matching_says_what_its_losses_need():
    spec = mlp_spec((3, 4, 2))
    a, b = random_mlp(spec, 0), random_mlp(spec, 1)
    run = functools.partial(
        learned.sinkhorn_matching, spec, a, b, optax.rmsprop(0.1), 1, key=jax.random.key(0)
    )
    with pytest.raises(ValueError, match="'midpt'; expected one of"):
        run(loss="midpt")
    with pytest.raises(ValueError, match="loss_fn missing and batches missing"):
        run(loss="midpoint")
    with pytest.raises(ValueError, match="'weights' takes neither"):
        run(loss_fn=loss_fn)
    with pytest.raises(ValueError, match="takes no eval_batches"):
        run(eval_batches=())


# ------------------------------------------------------------------------------- by the gradient


def slope_in_float64(spec, a, b, data):
    with jax.enable_x64(True):
        a, b = (jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), p) for p in (a, b))
        data = {"x": np.asarray(data["x"], np.float64), "y": data["y"]}
        g = jax.grad(loss_fn)(a, data)
        moved = {leaf.path[2:-2] for leaf in spec.leaves if leaf.groups()}
        return sum(float(jnp.sum(g[k] * (b[k] - a[k]))) for k in moved)


@pytest.mark.parametrize("method", ["coordinate_descent", "best"])
def test_gradient_matching_lowers_the_slope_and_reports_it(method):
    a, b = networks()
    found = learned.gradient_matching(
        loss_fn, DIGITS, a, b, batches.split(digits(), 300), key=jax.random.key(0), method=method
    )
    assert found.slope < found.slope_identity
    assert found.converged
    assert is_permutation(DIGITS, found.permutation)
    moved = action.apply(DIGITS, found.permutation, b)
    assert found.slope == pytest.approx(slope_in_float64(DIGITS, a, moved, digits()), rel=1e-5)
    assert found.slope_identity == pytest.approx(slope_in_float64(DIGITS, a, b, digits()), rel=1e-5)


# ------------------------------------------------------------------------------------- on a mesh


def test_parameters_on_a_mesh_give_the_permutations_of_one_device(mesh):
    spec = mlp_spec((4, 8, 8, 2))
    a, b = random_mlp(spec, 0), random_mlp(spec, 1)
    data = {"x": np.random.default_rng(2).normal(size=(12, 4)).astype(np.float32)}

    def square(params, batch):
        x = batch["x"]
        for i in range(3):
            x = jnp.sum(x[:, :, None] * params[f"w{i}"][None], axis=1) + params[f"b{i}"][None]
            x = jax.nn.relu(x) if i < 2 else x
        return jnp.mean(jnp.square(x - 1.0))

    def run(a, b):
        key = jax.random.key(0)
        return (
            learned.straight_through_matching(
                square, spec, a, b, data, optax.sgd(0.5), 5, key=key, evaluate_every=1
            ),
            learned.sinkhorn_matching(spec, a, b, optax.rmsprop(0.3), 5, key=key),
            learned.gradient_matching(square, spec, a, b, data, key=key),
        )

    want = run(a, b)
    axes = {"w0": (None, "model"), "b0": ("model",), "w1": ("model", None)}
    where = {name: NamedSharding(mesh, PartitionSpec(*axes.get(name, ()))) for name in a}
    with jax.set_mesh(mesh):
        got = run(jax.device_put(a, where), jax.device_put(b, where))
    for mine, other in zip(got, want, strict=True):
        assert equal(mine.permutation, other.permutation)
    np.testing.assert_allclose(got[0].losses, want[0].losses, rtol=1e-5)
    np.testing.assert_allclose(got[1].losses, want[1].losses, rtol=1e-5)
    assert got[2].slope == pytest.approx(want[2].slope, rel=1e-5)


# -------------------------------------------------------------------------------------- refusals


def test_other_kinds_of_symmetry_and_other_networks_are_refused():
    spec = mlp_spec((3, 4, 2), "signed")
    a, b = random_mlp(spec, 0), random_mlp(spec, 1)
    data = {"x": np.ones((2, 3), np.float32), "y": np.zeros(2, np.int32)}
    key = jax.random.key(0)
    with pytest.raises(SpecError, match="'h0' is of kind 'signed'"):
        learned.straight_through_matching(loss_fn, spec, a, b, data, optax.sgd(0.1), 1, key=key)
    with pytest.raises(SpecError, match="'h0' is of kind 'signed'"):
        learned.sinkhorn_matching(spec, a, b, optax.sgd(0.1), 1, key=key)
    with pytest.raises(SpecError, match="'h0' is of kind 'signed'"):
        learned.gradient_matching(loss_fn, spec, a, b, data, key=key)
    spec = mlp_spec((3, 4, 2))
    with pytest.raises(ValueError, match=r"\['b0'\]"):
        learned.gradient_matching(loss_fn, spec, a, b | {"b0": jnp.ones(5)}, data, key=key)
    with pytest.raises(ValueError, match="num_steps is 0"):
        learned.sinkhorn_matching(spec, a, b, optax.sgd(0.1), 0, key=key)
