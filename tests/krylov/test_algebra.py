"""The algebra of operators: every combination is that of the dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geojax import krylov

LIKE = {"a": np.zeros((2, 2)), "b": np.zeros(3)}
N = 7


def symmetric(seed):
    a = np.random.default_rng(seed).normal(size=(N, N))
    return a + a.T


def flat(v, lead=0):
    leaves = [np.asarray(x) for x in jax.tree.leaves(v)]
    return np.concatenate([x.reshape(*x.shape[:lead], -1) for x in leaves], -1)


def unflat(x):
    x = jnp.asarray(x)
    return {"a": x[..., :4].reshape(*x.shape[:-1], 2, 2), "b": x[..., 4:]}


def operator(matrix, matmat=True, **options):
    """The operator of a matrix on the pytree, with or without a product for many vectors."""
    return krylov.Operator(
        lambda v: unflat(matrix @ flat(v)),
        LIKE,
        matmat=(lambda vs: unflat(flat(vs, 1) @ matrix.T)) if matmat else None,
        **options,
    )


def basis(k, seed=3):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(N, k)))[0].T


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


M, K = symmetric(0), symmetric(1)
D = np.random.default_rng(2).uniform(0.5, 2, N)
U, VALUES = basis(2), np.array([3.0, -1.0])
P = np.eye(N) - U.T @ U

ALGEBRA = {
    "sum": (lambda a, b: a + b, M + K),
    "difference": (lambda a, b: a - b, M - K),
    "multiple": (lambda a, b: 2.5 * a, 2.5 * M),
    "multiple from the right": (lambda a, b: a * 2.5, 2.5 * M),
    "quotient": (lambda a, b: a / 4.0, M / 4),
    "negative": (lambda a, b: -a, -M),
    "product": (lambda a, b: a @ b, M @ K),
    "square": (lambda a, b: a @ a, M @ M),
    "shift": (lambda a, b: krylov.shift(a, 0.7), M + 0.7 * np.eye(N)),
    "identity": (lambda a, b: krylov.identity(LIKE), np.eye(N)),
    "deflate": (
        lambda a, b: krylov.deflate(a, unflat(U), VALUES),
        M - U.T @ np.diag(VALUES) @ U,
    ),
    "project": (lambda a, b: krylov.project(a, unflat(U)), P @ M @ P),
    "diagonal congruence": (lambda a, b: krylov.congruence(a, unflat(D)), M * np.outer(D, D)),
    "congruence": (lambda a, b: krylov.congruence(a, b), K @ M @ K),
    "all at once": (
        lambda a, b: 2.0 * krylov.shift(krylov.project(a - b, unflat(U)), 0.5) @ b,
        2 * (P @ (M - K) @ P + 0.5 * np.eye(N)) @ K,
    ),
}


@pytest.mark.parametrize("matmat", [True, False])
@pytest.mark.parametrize("name", ALGEBRA)
def test_each_combination_is_that_of_the_matrices(name, matmat):
    make, want = ALGEBRA[name]
    made = make(operator(M, matmat), operator(K, matmat))
    r = np.random.default_rng(4)
    v, vs = r.normal(size=N), r.normal(size=(3, N))
    np.testing.assert_allclose(flat(made(unflat(v))), want @ v, rtol=0, atol=1e-10)
    np.testing.assert_allclose(flat(made.matmat(unflat(vs)), 1), vs @ want.T, rtol=0, atol=1e-10)
    np.testing.assert_allclose(krylov.dense(made), want, rtol=0, atol=1e-10)
    assert made.size == N
    assert made.symmetric == np.allclose(want, want.T)


def test_a_restriction_is_the_block_of_the_matrix():
    block = krylov.restrict(operator(M), lambda path: path == "['b']")
    assert block.size == 3
    np.testing.assert_allclose(krylov.dense(block), M[4:, 4:], rtol=0, atol=1e-10)
    out = block({"a": None, "b": jnp.ones(3)})
    assert out["a"] is None
    np.testing.assert_allclose(out["b"], M[4:, 4:].sum(1), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "psd"),
    [
        (lambda a: a, True),
        (lambda a: a + a, True),
        (lambda a: a - a, False),
        (lambda a: 2.0 * a, True),
        (lambda a: -1.0 * a, False),
        (lambda a: krylov.shift(a, 1.0), True),
        (lambda a: krylov.shift(a, -1.0), False),
        (lambda a: krylov.project(a, unflat(U)), True),
        (lambda a: krylov.deflate(a, unflat(U), VALUES), False),
        (lambda a: krylov.congruence(a, unflat(D)), True),
        (lambda a: a @ operator(K), False),
        (lambda a: operator(K) @ operator(K), False),
    ],
)
def test_what_is_known_to_be_semidefinite_stays_so_where_it_does(make, psd):
    assert make(operator(M @ M, psd=True)).psd == psd


def test_an_operator_that_changes_from_call_to_call_is_known_in_every_combination():
    noisy = operator(M, stochastic=True)
    plain = operator(K)
    for make, _ in ALGEBRA.values():
        made = make(noisy, plain)
        assert made.stochastic == (made.name != "identity")


def test_a_matrix_makes_an_operator_on_flat_vectors():
    made = krylov.from_matrix(M)
    np.testing.assert_allclose(made(jnp.arange(7.0)), M @ np.arange(7), rtol=1e-14)
    np.testing.assert_allclose(krylov.dense(made), M, rtol=1e-14)


def test_the_matrix_has_the_rows_of_the_leaves_in_flattening_order_and_real_precision():
    lower = np.tril(M)
    np.testing.assert_allclose(krylov.dense(operator(lower, symmetric=False)), lower, atol=1e-14)
    low = krylov.Operator(lambda v: v, {"w": jnp.zeros(2, jnp.bfloat16)})
    assert low.dtype == jnp.float32
    assert krylov.dense(low).dtype == np.float32


def test_random_vectors_have_the_structure_of_the_operator():
    v = operator(M).random(jax.random.key(0), "rademacher")
    assert {abs(x) for x in flat(v)} == {1.0}
    assert jax.tree.map(jnp.shape, v) == {"a": (2, 2), "b": (3,)}


ones = unflat(np.ones(N))


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda a: a({**ones, "b": jnp.ones(2)}), ValueError, r"leaf \['b'\] has shape \(3,\)"),
        (lambda a: a({"a": ones["a"]}), ValueError, r"the vector lacks leaf \['b'\]"),
        (lambda a: a({**ones, "b": np.ones(3, int)}), TypeError, r"leaf \['b'\] is int64"),
        (
            lambda a: a.matmat({"a": jnp.ones((2, 2, 2)), "b": jnp.ones((2, 4))}),
            ValueError,
            r"leaf \['b'\] has shape \(2, 3\)",
        ),
        (lambda a: a + krylov.from_matrix(M), ValueError, "differ in structure"),
        (lambda a: a @ krylov.from_matrix(M), ValueError, "differ in structure"),
        (lambda a: a * a, TypeError, "scaled by one number.*`a @ b`"),
        (lambda a: a * jnp.ones(3), TypeError, "scaled by one number"),
        (lambda a: a + 1.0, TypeError, "unsupported operand"),
        (lambda a: krylov.deflate(a, ones, VALUES), ValueError, r"\['a'\].*\['b'\]|\['b'\]"),
        (
            lambda a: krylov.deflate(a, unflat(U), np.ones(3)),
            ValueError,
            r"values have shape \(3,\); expected \(2,\)",
        ),
        (lambda a: krylov.congruence(a, {"a": ones["a"]}), ValueError, r"lacks leaf \['b'\]"),
        (
            lambda a: krylov.congruence(a, operator(M, symmetric=False)),
            ValueError,
            "expected a symmetric M",
        ),
        (lambda a: krylov.restrict(a, lambda path: False), ValueError, r"paths are \['a'\]"),
        (lambda a: krylov.dense(a, max_size=6), ValueError, "7 rows; expected at most 6"),
        (lambda a: krylov.from_matrix(np.triu(M)), ValueError, "not symmetric"),
        (lambda a: krylov.from_matrix(M[:3]), ValueError, "square matrix"),
        (lambda a: krylov.Operator(lambda v: v, {}), ValueError, "no elements"),
        (lambda a: krylov.Operator(lambda v: v, {"n": 3}), TypeError, "floating"),
    ],
)
def test_mistakes_are_refused_naming_the_leaf(call, kind, says):
    with pytest.raises(kind, match=says):
        call(operator(M))
