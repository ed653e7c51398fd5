"""Averaged predictions, calibration, temperature and diversity."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from geojax import batches, ensemble, tree

EPS = float(np.finfo(np.float32).eps)
R = np.random.default_rng(0)
X = R.normal(size=(17, 4)).astype(np.float32)
LABELS = R.integers(3, size=17).astype(np.int32)
POINTS = [
    {"w": jnp.asarray(R.normal(size=(4, 3)), jnp.float32), "b": jnp.asarray(R.normal(size=3) * 0.3)}
    for _ in range(3)
]
POINTS = [tree.cast(point, jnp.float32) for point in POINTS]
DATA = batches.split({"inputs": X, "labels": LABELS}, 8)


def logits(params, batch):
    return batch["inputs"] @ params["w"] + params["b"][None]


def log_softmax(params, batch):
    return jax.nn.log_softmax(logits(params, batch))


def outputs_of(point):
    return X.astype(np.float64) @ np.asarray(point["w"], np.float64) + np.asarray(point["b"])


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


PROBS = np.stack([softmax(outputs_of(point)) for point in POINTS])


def by_hand(mode, weights):
    w = np.asarray(weights)[:, None, None] / np.sum(weights)
    if mode == "probabilities":
        return (w * PROBS).sum(0)
    if mode == "votes":
        return (w * (PROBS.argmax(-1)[..., None] == np.arange(3))).sum(0)
    return softmax((w * np.log(PROBS)).sum(0))


@pytest.mark.parametrize("mode", ["probabilities", "logits", "votes", "geometric"])
@pytest.mark.parametrize("model_fn", [logits, log_softmax])
def test_predictions_are_the_members_averages_in_the_order_of_the_data(mode, model_fn):
    for weights in (None, [1.0, 0.0, 3.0]):
        found = ensemble.predict(model_fn, POINTS, DATA, mode=mode, weights=weights)
        want = by_hand(mode, weights or [1.0] * 3)
        assert found.shape == (17, 3)
        np.testing.assert_allclose(np.exp(found), want, atol=16 * EPS)
        np.testing.assert_allclose(np.exp(found).sum(-1), 1, rtol=1e-6)


def test_logits_without_normalisation_have_the_average_of_their_logits():
    def shifted(params, batch):
        return logits(params, batch) + 100 * batch["inputs"][:, :1]

    found = ensemble.predict(shifted, POINTS, DATA, mode="logits")
    want = softmax(np.mean([outputs_of(point) for point in POINTS], 0))
    np.testing.assert_allclose(np.exp(found), want, atol=1000 * EPS)


@pytest.mark.parametrize("mode", ["probabilities", "logits", "geometric"])
def test_two_identical_members_are_the_member(mode):
    one = ensemble.log_probabilities(logits, POINTS[0], DATA)
    two = ensemble.predict(logits, [POINTS[0]] * 2, DATA, mode=mode)
    np.testing.assert_allclose(two, one, rtol=1e-6, atol=1e-7)
    alone = ensemble.average([one], mode=mode)
    np.testing.assert_allclose(ensemble.average([one, one], mode=mode), alone, rtol=1e-12)


@pytest.mark.parametrize("mode", ["probabilities", "logits"])
def test_logits_of_ten_thousand_are_averaged_without_overflow(mode):
    members = np.array([[[1e4, -1e4, 0.0]], [[-1e4, 1e4, 0.0]]])
    found = np.exp(ensemble.average(members, mode=mode))
    want = [[0.5, 0.5, 0.0]] if mode == "probabilities" else [[1 / 3] * 3]
    np.testing.assert_allclose(found, want, atol=1e-12)


def test_stacks_lists_and_streams_of_members_are_one_ensemble_with_one_member_at_a_time():
    alive = []

    def stream():
        for point in POINTS:
            alive.append("read")
            yield point
            assert alive[-1] == "used"

    traces = []

    def counted(params, batch):
        traces.append(batch["inputs"].shape)
        return logits(params, batch)

    class Data:
        def __iter__(self):
            alive.append("used")
            return iter(DATA)

    want = ensemble.predict(counted, POINTS, DATA)
    assert traces == [(8, 4), (1, 4)]
    np.testing.assert_array_equal(ensemble.predict(counted, tree.stack(POINTS), DATA), want)
    np.testing.assert_array_equal(ensemble.predict(counted, stream, Data()), want)
    np.testing.assert_array_equal(ensemble.predict(counted, stream(), Data()), want)
    assert len(traces) == 2
    assert alive == ["read", "used"] * 6


def test_a_streamed_member_is_let_go_before_the_next_is_read():
    dead = []

    def stream():
        for point in POINTS:
            member = jax.tree.map(jnp.copy, point)
            watched = weakref.ref(member["w"])
            box = [member]
            del member
            yield box.pop()
            dead.append(watched() is None)

    ensemble.predict(logits, stream, DATA)
    assert dead == [True] * 3


def test_each_member_has_its_own_state_by_a_function_or_beside_its_parameters():
    def stateful(params, state, batch):
        return logits(params, batch) * state[None]

    def paired(point, batch):
        return stateful(*point, batch)

    scale = lambda params: params["b"][:1]  # noqa: E731
    found = ensemble.predict(stateful, POINTS, DATA, state_fn=scale)
    want = ensemble.predict(paired, [(point, scale(point)) for point in POINTS], DATA)
    np.testing.assert_array_equal(found, want)
    by_numpy = np.mean([softmax(outputs_of(p) * np.asarray(p["b"][0])) for p in POINTS], 0)
    np.testing.assert_allclose(np.exp(found), by_numpy, atol=16 * EPS)


def test_outputs_for_each_token_keep_their_axes():
    def tokens(params, batch):
        return jnp.stack([logits(params, batch), 2 * logits(params, batch)], axis=1)

    found = ensemble.predict(tokens, POINTS, DATA)
    assert found.shape == (17, 2, 3)
    np.testing.assert_allclose(found[:, 0], ensemble.predict(logits, POINTS, DATA), atol=8 * EPS)
    pair = np.stack([LABELS, LABELS], 1)
    assert ensemble.calibration(found, pair).num_examples == 34


def test_a_running_evaluation_has_the_metrics_of_every_first_few_members():
    found = ensemble.running(logits, POINTS, DATA)
    np.testing.assert_array_equal(found.labels, LABELS)
    rows = np.arange(17)
    for k in range(1, 4):
        mean = PROBS[:k].mean(0)
        one = PROBS[k - 1]
        for got, p in ((found.ensemble, mean), (found.members, one)):
            assert got["loss"][k - 1] == pytest.approx(-np.log(p[rows, LABELS]).mean(), rel=1e-6)
            assert got["error"][k - 1] == pytest.approx(np.mean(p.argmax(-1) != LABELS))
            truth = np.eye(3)[LABELS]
            assert got["brier"][k - 1] == pytest.approx(((p - truth) ** 2).sum(-1).mean(), rel=1e-6)
    np.testing.assert_array_equal(found.log_probs, ensemble.predict(logits, POINTS, DATA))
    back = ensemble.running(logits, POINTS[::-1], DATA)
    np.testing.assert_allclose(back.log_probs, found.log_probs, rtol=1e-12)
    assert back.ensemble["loss"][-1] == pytest.approx(found.ensemble["loss"][-1], rel=1e-12)


def test_members_that_give_nan_and_weights_that_do_not_fit_are_refused():
    bad = POINTS[1] | {"b": jnp.array([0.0, np.nan, 0.0])}
    with pytest.raises(ValueError, match="member 1 gives NaN or infinite outputs for 17 of 17"):
        ensemble.predict(logits, [POINTS[0], bad], DATA)
    with pytest.raises(ValueError, match="one for each of the 3 members, got 2"):
        ensemble.predict(logits, POINTS, DATA, weights=[1.0, 1.0])
    for weights in ([1.0], [1.0] * 4):
        with pytest.raises(ValueError, match="one for each"):
            ensemble.predict(logits, lambda: iter(POINTS), DATA, weights=weights)
    for weights in ([1.0, -1.0, 1.0], [0.0] * 3, [np.nan] * 3):
        with pytest.raises(ValueError, match="nonnegative numbers, not all zero"):
            ensemble.predict(logits, POINTS, DATA, weights=weights)
    with pytest.raises(ValueError, match="mode is 'mean'"):
        ensemble.predict(logits, POINTS, DATA, mode="mean")
    with pytest.raises(ValueError, match="at least one member"):
        ensemble.predict(logits, [], DATA)
    with pytest.raises(ValueError, match=r"outputs have shape \(3,\)"):
        ensemble.predict(lambda p, batch: p["b"], POINTS, DATA)


@pytest.mark.parametrize("shard", ["data", "parameters"])
def test_a_sharded_ensemble_equals_one_device(mesh, shard):
    members = [
        {"w": jnp.pad(p["w"], ((0, 0), (0, 1))), "b": jnp.pad(p["b"], (0, 1))} for p in POINTS
    ]
    want = ensemble.predict(logits, members, DATA)
    if shard == "parameters":
        where = {"w": NamedSharding(mesh, P("model", None)), "b": NamedSharding(mesh, P())}
        members = [jax.device_put(member, where) for member in members]
    else:
        members = tree.stack(members)

    def by_sums(params, batch):
        # No dot over a sharded axis, which an Explicit mesh would ask about.
        terms = batch["inputs"][:, :, None] * params["w"][None]
        return jnp.sum(terms, axis=1) + params["b"][None]

    with jax.set_mesh(mesh):
        got = ensemble.predict(by_sums, members, DATA, mesh=mesh)
    np.testing.assert_allclose(got, want, atol=32 * EPS)


# ------------------------------------------------------------------------------------ calibration


def calibrated(rng, n, num_classes=4, sharpness=3.0):
    """Probabilities, and labels drawn from them."""
    probs = softmax(sharpness * rng.normal(size=(n, num_classes)))
    labels = (rng.uniform(size=(n, 1)) > probs.cumsum(-1)).sum(-1)
    return probs, np.minimum(labels, num_classes - 1)


@pytest.mark.parametrize("scheme", ["equal_width", "equal_mass", "classwise"])
def test_calibrated_predictions_have_no_calibration_error(rng, scheme):
    probs, labels = calibrated(rng, 100_000)
    found = ensemble.calibration(probs, labels, scheme=scheme)
    assert found.ece.value < 0.01
    # The floor is the error to expect from noise alone.
    assert 0.5 * found.ece_floor < found.ece.value < 2 * found.ece_floor
    gaps = (found.bins.accuracy - found.bins.confidence) / found.bins.standard_error
    assert np.nanmax(np.abs(gaps)) < 4.5
    assert found.bins.counts.sum() == 100_000 * (4 if scheme == "classwise" else 1)
    # Two calibrated scores, whose expectations are known.
    assert found.accuracy.value == pytest.approx(
        probs.max(-1).mean(), abs=4 * found.accuracy.standard_error
    )
    entropy = -(probs * np.log(probs)).sum(-1).mean()
    assert found.nll.value == pytest.approx(entropy, abs=4 * found.nll.standard_error)
    assert found.brier.value == pytest.approx(
        (probs * (1 - probs)).sum(-1).mean(), abs=4 * found.brier.standard_error
    )


def test_a_diagram_by_hand():
    # Confidences 0.5 and 0.75 are edges of four bins, and 1.0 belongs to the last.
    probs = np.array([[0.5, 0.5], [0.25, 0.75], [0.1, 0.9], [1.0, 0.0], [0.4, 0.6]])
    labels = np.array([0, 0, 1, 0, 1])
    found = ensemble.calibration(probs, labels, num_bins=4)
    assert found.bins.edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert found.bins.counts.tolist() == [0, 0, 2, 3]
    np.testing.assert_allclose(found.bins.confidence, [np.nan, np.nan, 0.55, 2.65 / 3])
    np.testing.assert_allclose(found.bins.accuracy, [np.nan, np.nan, 1, 2 / 3])
    errors = [np.std(gaps, ddof=1) / np.sqrt(len(gaps)) for gaps in ([0.5, 0.4], [-0.75, 0.1, 0])]
    np.testing.assert_allclose(found.bins.standard_error, [np.nan, np.nan, *errors])
    assert found.ece.value == pytest.approx((2 * 0.45 + 3 * (2.65 / 3 - 2 / 3)) / 5)
    assert found.mce == pytest.approx((0.45, errors[0]))
    assert found.accuracy == pytest.approx((0.8, np.sqrt(0.2 * 0.8 / 4)))
    nll = -np.log([0.5, 0.25, 0.9, 1.0, 0.6])
    assert found.nll == pytest.approx((nll.mean(), nll.std(ddof=1) / np.sqrt(5)))
    assert found.brier.value == pytest.approx(2 * (0.25 + 0.5625 + 0.01 + 0 + 0.16) / 5)
    with np.errstate(divide="ignore"):
        logs = ensemble.calibration(np.log(probs), labels, num_bins=4)
    assert logs.ece.value == pytest.approx(found.ece.value)
    assert "ece=" in repr(found)


def test_a_classwise_diagram_by_hand():
    probs, labels = np.array([[0.2, 0.8], [0.6, 0.4]]), np.array([1, 1])
    found = ensemble.calibration(probs, labels, num_bins=2, scheme="classwise")
    assert found.bins.counts.tolist() == [[1, 1], [1, 1]]
    np.testing.assert_allclose(found.bins.confidence, [[0.2, 0.6], [0.4, 0.8]])
    np.testing.assert_allclose(found.bins.accuracy, [[0, 0], [1, 1]])
    assert found.ece.value == pytest.approx((0.4 + 0.4) / 2)
    assert found.mce.value == pytest.approx(0.6)


def test_bins_of_equal_mass_hold_equal_numbers_and_keep_ties_together(rng):
    top = rng.permutation(np.linspace(0.5, 1.0, 103))
    probs = np.stack([top, 1 - top], -1)
    found = ensemble.calibration(probs, np.zeros(103, int), num_bins=10, scheme="equal_mass")
    assert found.bins.counts.sum() == 103
    assert set(found.bins.counts) == {10, 11}
    probs = np.array([[0.5, 0.5]] * 6 + [[0.9, 0.1]] * 3)
    tied = ensemble.calibration(probs, np.zeros(9, int), num_bins=3, scheme="equal_mass")
    assert tied.bins.counts.sum() == 9
    assert sorted(tied.bins.counts[tied.bins.counts > 0]) in ([3, 6], [9])
    same = ensemble.calibration(probs[:4], np.zeros(4, int), num_bins=3, scheme="equal_mass")
    assert same.bins.counts.tolist() == [4]


@pytest.mark.parametrize("scheme", ["equal_width", "equal_mass", "classwise"])
def test_the_standard_error_of_the_calibration_error_is_that_of_repetitions(scheme):
    # Overconfident enough that no gap changes its sign.
    found = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        probs, labels = calibrated(rng, 1000, 3)
        found.append(ensemble.calibration(softmax(3 * np.log(probs)), labels, num_bins=4,
                                          scheme=scheme))  # fmt: skip
    spread = np.std([one.ece.value for one in found], ddof=1)
    assert np.mean([one.ece.standard_error for one in found]) == pytest.approx(spread, rel=0.2)


@pytest.mark.parametrize(
    ("probs", "labels", "says"),
    [
        ([[2.0, 1.0]], [0], "neither"),
        ([[0.5, 0.6]], [0], "neither"),
        ([[np.nan, 0.5]], [0], "neither"),
        ([[0.5, 0.5]], [2], "labels run from 2 to 2; expected classes 0 to 1"),
        ([[0.5, 0.5]], [0.0], "labels are float64"),
        ([[0.5, 0.5]], [[1, 0]], r"of shape \(1, 2\)"),
        ([0.5, 0.5], [0], "probs have shape"),
    ],
)
def test_what_is_no_distribution_or_no_label_is_refused(probs, labels, says):
    with pytest.raises(ValueError, match=says):
        ensemble.calibration(np.array(probs), np.array(labels))


def test_unknown_schemes_and_bins_are_refused():
    with pytest.raises(ValueError, match="scheme is 'adaptive'; expected one of equal_width"):
        ensemble.calibration([[0.5, 0.5]], [0], scheme="adaptive")
    with pytest.raises(ValueError, match="num_bins is 0"):
        ensemble.calibration([[0.5, 0.5]], [0], num_bins=0)


def test_votes_that_miss_the_label_have_infinite_loss_and_finite_calibration():
    found = ensemble.running(logits, POINTS, DATA, mode="votes")
    assert found.ensemble["loss"][0] == np.inf
    assert np.isfinite(found.ensemble["ece"]).all()
    wrong = np.mean(by_hand("votes", [1] * 3).argmax(-1) != LABELS)
    assert found.ensemble["error"][-1] == pytest.approx(wrong)


def test_the_top_five_of_random_outputs_hold_one_label_in_twenty(rng):
    outputs, labels = rng.normal(size=(20_000, 100)), rng.integers(100, size=20_000)
    found = ensemble.top_k_accuracy(outputs, labels, 5)
    assert found.value == pytest.approx(0.05, abs=0.01)
    assert found.value == pytest.approx(0.05, abs=4 * found.standard_error)
    order = np.argsort(-outputs, -1)[:, :5]
    assert found.value == np.mean((order == labels[:, None]).any(-1))


# --------------------------------------------------------------------------- temperature, diversity


def test_a_temperature_is_found_again_and_its_error_is_honest(rng):
    probs, labels = calibrated(rng, 20_000, 5)
    sure = 2.5 * np.log(probs) + rng.normal(size=(20_000, 1))
    found = ensemble.fit_temperature(sure, labels)
    assert found.converged
    assert found.value == pytest.approx(2.5, abs=0.05)
    assert abs(found.value - 2.5) < 4 * found.standard_error < 0.2
    assert found.nll_after < found.nll_before - 0.1
    mended = ensemble.tempered(sure, found.value)
    assert found.nll_after == pytest.approx(ensemble.calibration(mended, labels).nll.value)
    assert ensemble.calibration(mended, labels).ece.value < 0.01
    for off in (0.99, 1.01):
        other = ensemble.calibration(ensemble.tempered(sure, off * found.value), labels)
        assert other.nll.value > found.nll_after
    again = ensemble.fit_temperature(mended, labels)
    assert again.value == pytest.approx(1, rel=1e-6)


def test_the_standard_error_of_a_temperature_is_that_of_repetitions():
    found = []
    for seed in range(200):
        probs, labels = calibrated(np.random.default_rng(seed), 500, 3)
        found.append(ensemble.fit_temperature(2.5 * np.log(probs), labels))
    spread = np.std([one.value for one in found], ddof=1)
    assert np.mean([one.standard_error for one in found]) == pytest.approx(spread, rel=0.2)


def test_a_temperature_without_a_minimum_says_so():
    sure = np.log([[0.9, 0.1], [0.2, 0.8]])
    right = ensemble.fit_temperature(sure, [0, 1])
    wrong = ensemble.fit_temperature(sure, [1, 0], bounds=(0.1, 10.0))
    assert (right.value, right.converged) == (pytest.approx(1e-2), False)
    assert (wrong.value, wrong.converged) == (pytest.approx(10), False)
    masked = ensemble.fit_temperature([[0.0, -3.0, -np.inf]] * 4, [0, 0, 0, 1])
    assert masked.value == pytest.approx(3 / np.log(3))
    with pytest.raises(ValueError, match="1 labels have probability zero"):
        ensemble.fit_temperature([[0.0, -np.inf]], [1])
    with pytest.raises(ValueError, match="bounds are"):
        ensemble.fit_temperature(sure, [0, 1], bounds=(2.0, 1.0))
    with pytest.raises(ValueError, match="temperature is 0"):
        ensemble.tempered(sure, 0)


def test_identical_members_do_not_differ():
    found = ensemble.diversity([np.log(PROBS[0])] * 3, LABELS)
    assert not found.disagreement.any()
    for value in (found.mean_kl, found.mutual_information, found.brier[2], found.nll[2]):
        assert value == pytest.approx(0, abs=1e-15)
    assert found.brier.members == pytest.approx(found.brier.ensemble, rel=1e-12)


def test_the_members_mean_loss_is_the_ensembles_and_their_ambiguity():
    members = np.log(PROBS)
    found = ensemble.diversity(members, LABELS)
    for mode, part, score in (
        ("probabilities", found.brier, "brier"),
        ("geometric", found.nll, "nll"),
    ):
        whole = getattr(ensemble.calibration(ensemble.average(members, mode=mode), LABELS), score)
        each = [getattr(ensemble.calibration(p, LABELS), score).value for p in PROBS]
        assert part.ensemble == pytest.approx(whole.value, rel=1e-12)
        assert part.members == pytest.approx(np.mean(each), rel=1e-12)
        assert part.members - part.ensemble == pytest.approx(part.ambiguity, rel=1e-10)
        assert part.ambiguity > 0.01
    bare = ensemble.diversity(members)
    assert np.isnan(bare.brier.members)
    assert bare.nll.ambiguity == found.nll.ambiguity


def test_pairwise_measures_by_hand():
    members = np.log([[[0.5, 0.5], [0.9, 0.1]], [[0.25, 0.75], [0.8, 0.2]]])
    found = ensemble.diversity(members)
    # argmax takes the first of equals, so the first example is class 0 to member 0.
    assert found.disagreement.tolist() == [[0, 0.5], [0.5, 0]]
    p, q = np.exp(members)
    kl = lambda a, b: (a * np.log(a / b)).sum(-1).mean()  # noqa: E731
    np.testing.assert_allclose(found.kl, [[0, kl(p, q)], [kl(q, p), 0]], rtol=1e-12)
    assert found.mean_disagreement == 0.5
    assert found.mean_kl == pytest.approx((kl(p, q) + kl(q, p)) / 2)
    m = (p + q) / 2
    assert found.mutual_information == pytest.approx((kl(p, m) + kl(q, m)) / 2)
    votes = ensemble.diversity(np.array([[[0.0, -np.inf]], [[-np.inf, 0.0]]]))
    assert votes.mutual_information == pytest.approx(np.log(2))
    assert votes.mean_kl == np.inf
    # No class is left for a geometric mean.
    assert np.isnan(votes.nll.ambiguity)
    with pytest.raises(ValueError, match="members that exclude other classes"):
        ensemble.average([[[0.0, -np.inf]], [[-np.inf, 0.0]]], mode="geometric")
    with pytest.raises(ValueError, match="members of one shape"):
        ensemble.diversity([members[0], members[0][:1]])
