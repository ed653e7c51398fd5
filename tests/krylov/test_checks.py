"""Probes that tell one symmetric matrix from anything else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geojax import krylov

KEY = jax.random.key(0)


def test_a_clean_operator_passes_and_says_how_clean():
    matrix = np.random.default_rng(0).standard_normal((50, 50)).astype(np.float32)
    found = krylov.check(krylov.from_matrix(matrix + matrix.T), key=KEY)
    assert found.determinism == 0
    assert found.linearity < 1e-5
    assert found.symmetry < 1e-4
    assert found.num_matvecs == 4


def test_the_zero_operator_passes():
    found = krylov.check(krylov.Operator(lambda v: 0 * v, jnp.zeros(5)), key=KEY)
    assert found == krylov.Checks(0.0, 0.0, 0.0, 2)


@pytest.mark.parametrize("size", [8, 300])
def test_one_percent_of_asymmetry_is_seen(size):
    r = np.random.default_rng(1)
    a, b = r.standard_normal((2, size, size))
    matrix = jnp.asarray(a + a.T + 0.01 * (b - b.T), jnp.float32)
    skew = krylov.Operator(lambda v: matrix @ v, jnp.zeros(size), name="J")
    with pytest.raises(krylov.OperatorError, match="J: <u, A v> and <v, A u> differ") as error:
        krylov.check(skew, key=KEY)
    assert error.value.property == "symmetry"


def test_a_product_that_changes_is_seen():
    count = iter(range(10))
    op = krylov.Operator(lambda v: v * (1 + 0.01 * next(count)), jnp.zeros(5), name="H")
    with pytest.raises(krylov.OperatorError, match="H: two products with the same") as error:
        krylov.check(op, key=KEY)
    assert error.value.property == "determinism"


def test_a_product_that_is_not_linear_is_seen():
    op = krylov.Operator(lambda v: v + 0.1 * v**2, jnp.zeros(5), name="H")
    with pytest.raises(krylov.OperatorError, match="not linear in the vector") as error:
        krylov.check(op, key=KEY)
    assert error.value.property == "linearity"


def test_a_product_that_is_not_finite_is_seen():
    op = krylov.Operator(lambda v: v / 0, jnp.zeros(5), name="H")
    with pytest.raises(FloatingPointError, match="H: its product with a random vector"):
        krylov.check(op, key=KEY)
