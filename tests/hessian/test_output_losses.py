"""Losses of the outputs: closed forms equal autodiff, masks are exact, nothing large is made."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from geojax import hessian
from geojax.hessian import output_losses

EPS = float(np.finfo(np.float32).eps)


def batch_for(shape, kind):
    """Random outputs and a vector of a shape, and a batch of all labels that losses know."""
    r = np.random.default_rng(0)
    outputs, u = r.normal(size=(2, *shape)) * 2
    soft = np.exp(r.normal(size=shape))
    labels = {
        "hard": r.integers(0, shape[-1], shape[:-1]),
        "soft": soft / soft.sum(-1, keepdims=True),
        "real": r.normal(size=shape),
        "binary": (r.uniform(size=shape) < 0.5).astype(np.float64),
        "count": r.poisson(2.0, size=shape).astype(np.float64),
    }[kind]
    mask = r.uniform(size=shape[0]) * (np.arange(shape[0]) != 1)
    return outputs, u, {"labels": labels, "mask": mask}


softmax = output_losses.softmax_cross_entropy
LOSSES = {
    "hard labels": (softmax(), "hard"),
    "soft labels": (softmax(), "soft"),
    "smoothing": (softmax(smoothing=0.2), "hard"),
    "class weights": (softmax(class_weights=[1.0, 0.5, 3.0], smoothing=0.1), "hard"),
    "weights of soft": (softmax(class_weights=[1.0, 0.5, 3.0]), "soft"),
    "temperature": (softmax(temperature=2.5), "hard"),
    "z-loss": (softmax(z_loss=0.3, temperature=0.7), "hard"),
    "masked": (softmax(mask="mask"), "hard"),
    "mse": (output_losses.mse(), "real"),
    "mse, sum": (output_losses.mse(mask="mask", reduction="sum"), "real"),
    "binary": (output_losses.binary_cross_entropy(mask="mask"), "binary"),
    "huber": (output_losses.huber(delta=1.5), "real"),
    "poisson": (output_losses.poisson(mask="mask", reduction="sum"), "count"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_closed_form_is_the_derivative_of_the_gradient(name):
    loss, kind = LOSSES[name]
    with jax.enable_x64(True):
        outputs, u, batch = batch_for((4, 2, 3), kind)

        @jax.jit
        def both(outputs, u):
            exact = jax.jvp(jax.grad(lambda o: loss(o, batch)), (outputs,), (u,))[1]
            return loss.hessian_product(outputs, batch, u), exact

        got, want = both(outputs, u)
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12 * np.abs(want).max())
        # Where it says that it is convex, it is.
        assert not loss.convex or float(jnp.sum(u * got)) > 0


def test_the_values_are_those_of_the_formulas():
    with jax.enable_x64(True):
        outputs, _, hard = batch_for((4, 2, 3), "hard")
        soft = batch_for((4, 2, 3), "soft")[2]
        real, binary, count = (
            batch_for((4, 2, 3), kind)[2] for kind in ("real", "binary", "count")
        )
        error = outputs - real["labels"]
        lse = np.log(np.exp(outputs).sum(-1))
        log_p = outputs - lse[..., None]
        onehot = np.eye(3)[hard["labels"]]
        weights = np.array([1.0, 0.5, 3.0])
        smooth = 0.9 * onehot + 0.1 / 3
        mask = np.broadcast_to(hard["mask"][:, None], (4, 2))
        per_label = -np.sum(onehot * log_p, -1)
        cases = [
            (softmax(), hard, per_label.mean()),
            (softmax(), soft, -(soft["labels"] * log_p).sum(-1).mean()),
            (
                softmax(class_weights=weights, smoothing=0.1),
                hard,
                -(smooth * weights * log_p).sum(-1).mean(),
            ),
            (softmax(z_loss=0.3), hard, (per_label + 0.3 * np.square(lse)).mean()),
            (softmax(mask="mask"), hard, (per_label * mask).sum() / mask.sum()),
            (softmax(ignore_label=2), hard, per_label[hard["labels"] != 2].mean()),
            (output_losses.mse(), real, np.square(error).mean()),
            (output_losses.mse(reduction="sum"), real, np.square(error).sum((1, 2)).mean()),
            (output_losses.huber(delta=1.5), real, optax.huber_loss(error, delta=1.5).mean()),
            (
                output_losses.binary_cross_entropy(),
                binary,
                optax.sigmoid_binary_cross_entropy(outputs, binary["labels"]).mean(),
            ),
            (
                output_losses.poisson(),
                count,
                (np.exp(outputs) - count["labels"] * outputs).mean(),
            ),
        ]
        got = jax.jit(lambda outputs: [loss(outputs, batch) for loss, batch, _ in cases])(outputs)
        np.testing.assert_allclose(got, [want for *_, want in cases], rtol=1e-12)


product = jax.jit(
    lambda loss, outputs, batch, u: loss.hessian_product(outputs, batch, u), static_argnums=0
)


@pytest.mark.parametrize("classes", [7, 100, 50257, 130000])
@pytest.mark.parametrize("shift", [0.0, 50.0])
def test_the_softmax_product_is_right_for_any_number_of_classes_and_confident_outputs(
    classes, shift
):
    r = np.random.default_rng(0)
    outputs, u = r.normal(size=(2, 3, classes)).astype(np.float32)
    outputs[:, 2] += shift
    labels = np.array([0, 2, 5])
    z = outputs.astype(np.float64)
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    want = p * (u - (p * u).sum(-1, keepdims=True)) / 3
    got = np.asarray(product(softmax(), jnp.asarray(outputs), {"labels": labels}, jnp.asarray(u)))
    assert np.isfinite(got).all()
    # p itself is known to an epsilon of the exponent.
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=64 * EPS * np.abs(want).max() + 1e-12)


def test_masked_positions_count_for_nothing_even_if_they_are_not_finite():
    outputs, u, batch = batch_for((4, 2, 3), "hard")
    outputs, u = jnp.asarray(outputs, jnp.float32), jnp.asarray(u, jnp.float32)
    loss = softmax(mask="mask")
    batch = {"labels": batch["labels"].copy(), "mask": np.ones((4, 2), bool)}
    batch["labels"][1] = -100
    batch["mask"][1] = False
    broken = outputs.at[1].set(jnp.nan)
    got = product(loss, broken, batch, u)
    kept = np.array([0, 2, 3])
    want = product(softmax(), outputs[kept], {"labels": batch["labels"][kept]}, u[kept])
    np.testing.assert_allclose(np.asarray(got)[kept], want, rtol=4 * EPS)
    np.testing.assert_array_equal(np.asarray(got)[1], 0)
    value, gradient = jax.jit(jax.value_and_grad(loss))(broken, batch)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    ignoring = softmax(ignore_label=-100)
    np.testing.assert_allclose(product(ignoring, outputs, batch, u), got, rtol=4 * EPS)
    assert float(ignoring.weight(batch)) == float(loss.weight(batch)) == 6
    one = {**batch, "mask": np.arange(8).reshape(4, 2) == 5}
    alone = product(loss, broken, one, u)
    assert np.count_nonzero(np.asarray(alone).any(-1)) == 1


def test_a_batch_with_everything_masked_gives_exactly_zero():
    for name in ("masked", "mse, sum", "binary", "poisson"):
        loss, kind = LOSSES[name]
        outputs, u, batch = batch_for((4, 2, 3), kind)
        batch["mask"] = np.zeros(4)
        outputs, u = jnp.asarray(outputs, jnp.float32), jnp.asarray(u, jnp.float32)
        np.testing.assert_array_equal(product(loss, outputs, batch, u), 0)
        assert float(loss(outputs, batch)) == 0


def test_a_label_that_is_no_class_does_not_pass_for_one():
    outputs = jnp.zeros((2, 3))
    for label in (-1, 3):
        batch = {"labels": np.array([0, label])}
        assert np.isnan(softmax()(outputs, batch))
        got = np.asarray(product(softmax(), outputs, batch, jnp.ones((2, 3))))
        assert np.isfinite(got[0]).all()
        assert np.isnan(got[1]).all()


def test_low_precision_outputs_are_widened_within():
    outputs, u, batch = batch_for((4, 2, 3), "hard")
    low, v = jnp.asarray(outputs, jnp.bfloat16), jnp.asarray(u, jnp.bfloat16)
    got = product(softmax(), low, batch, v)
    assert got.dtype == jnp.bfloat16
    assert softmax()(low, batch).dtype == jnp.float32
    want = product(softmax(), low.astype(jnp.float32), batch, v.astype(jnp.float32))
    np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


def memory(fn, *args):
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    "options",
    [{}, {"smoothing": 0.1}, {"z_loss": 1e-3, "ignore_label": -1}],
    ids=["plain", "smoothed", "z-loss"],
)
def test_the_softmax_product_makes_no_array_of_the_size_of_the_outputs(options):
    n, classes = 256, 50304
    z, batch = shaped(n, classes), {"labels": shaped(n, dtype=jnp.int32)}
    assert memory(softmax(**options).hessian_product, z, batch, z) < 0.05 * 4 * n * classes


def head(kernel, hidden):
    return hidden @ kernel


@pytest.mark.parametrize("shape", [(3, 7, 4), (7, 4)])
def test_a_chunked_head_is_the_whole_head(shape):
    # 7 tokens by 3: two whole chunks and a rest.
    r = np.random.default_rng(0)
    loss = softmax(mask="mask", smoothing=0.1)
    with jax.enable_x64(True):
        hidden, kernel = jnp.asarray(r.normal(size=shape)), jnp.asarray(r.normal(size=(4, 5)))
        u = (jnp.asarray(r.normal(size=(4, 5))), jnp.asarray(r.normal(size=shape)))
        batch = {
            "labels": r.integers(0, 5, shape[:-1]),
            "mask": (r.uniform(size=shape[:-1]) < 0.7).astype(np.float64),
        }
        chunked = hessian.chunked_head(head, loss, 3)

        @jax.jit
        def both(outputs, u):
            logits, tangent = jax.jvp(head, outputs, u)
            middle = loss.hessian_product(logits, batch, tangent)
            want = jax.vjp(head, *outputs)[1](middle)
            values = [
                jax.value_and_grad(fn)(outputs)
                for fn in (lambda o: chunked(o, batch), lambda o: loss(head(*o), batch))
            ]
            return chunked.hessian_product(outputs, batch, u), want, *values

        got, want, value, expected = both((kernel, hidden), u)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14), got, want
        )
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14), value, expected
        )


def test_the_memory_of_a_chunked_head_grows_with_the_chunk_and_not_with_the_tokens():
    features, classes = 16, 8192

    def temporary(tokens, chunk):
        loss = hessian.chunked_head(head, softmax(), chunk)
        outputs = shaped(features, classes), shaped(tokens, features)
        return memory(
            loss.hessian_product, outputs, {"labels": shaped(tokens, dtype=jnp.int32)}, outputs
        )

    base = temporary(256, 32)
    assert temporary(1024, 32) < 1.1 * base
    assert base < 4 * 4 * 32 * classes
    assert 1.5 * base < temporary(1024, 128) < 0.3 * 4 * 1024 * classes


ONES = {"x": np.ones((2, 3))}


@pytest.mark.parametrize(
    ("loss", "outputs", "batch", "kind", "says"),
    [
        (softmax(), jnp.zeros((2, 3)), ONES, ValueError, "expected batches.*say where.*labels="),
        (softmax("y"), jnp.zeros((2, 3)), ONES, ValueError, "with an entry 'y'"),
        (softmax(), jnp.zeros((2, 3)), (0, np.zeros(3, int)), ValueError, r"integers \(2,\) or"),
        (softmax(), (jnp.zeros((2, 3)), {}), (0, np.zeros(2, int)), TypeError, "outputs alone"),
        (
            softmax(class_weights=[1.0]),
            jnp.zeros((2, 3)),
            (0, np.zeros(2, int)),
            ValueError,
            "1 class weights for 3 classes",
        ),
        (
            softmax(mask=lambda batch: np.ones(3)),
            jnp.zeros((2, 3)),
            (0, np.zeros(2, int)),
            ValueError,
            r"mask has shape \(3,\); expected \(2,\)",
        ),
        (
            softmax(ignore_label=0),
            jnp.zeros((2, 3)),
            (0, np.zeros((2, 3))),
            ValueError,
            "needs integer labels",
        ),
        (output_losses.mse(), jnp.zeros((2, 3)), (0, np.zeros(2)), ValueError, "equal shapes"),
        (
            output_losses.mse(mask=lambda b: np.ones((2, 3)), reduction="sum"),
            jnp.zeros((2, 3)),
            (0, np.zeros((2, 3))),
            ValueError,
            "mask is over examples",
        ),
        (
            hessian.chunked_head(head, softmax(), 2),
            jnp.zeros((2, 3)),
            (0, np.zeros(2, int)),
            TypeError,
            "expected the pair",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused_in_a_sentence(loss, outputs, batch, kind, says):
    with pytest.raises(kind, match=says):
        loss(outputs, batch)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: softmax(smoothing=2), "smoothing is 2; expected a number from 0 to 1"),
        (lambda: softmax(temperature=0), "temperature is 0"),
        (lambda: softmax(z_loss=-1), "z_loss is -1"),
        (lambda: softmax(class_weights=[-1.0]), "class_weights: expected nonnegative"),
        (lambda: output_losses.huber(delta=0), "delta is 0"),
        (lambda: output_losses.mse(reduction="max"), "reduction is 'max'"),
        (lambda: hessian.chunked_head(head, softmax(), 0), "chunk_size is 0"),
        (lambda: hessian.chunked_head(head, lambda o, b: 0.0, 2), "expected a loss of"),
    ],
)
def test_options_out_of_range_are_refused(make, says):
    with pytest.raises((ValueError, TypeError), match=says):
        make()


def test_losses_with_equal_options_are_equal():
    assert softmax(class_weights=[1, 2]) == softmax(class_weights=np.array([1.0, 2.0]))
    assert hash(output_losses.mse()) == hash(output_losses.mse())
    assert output_losses.mse() != output_losses.poisson()
