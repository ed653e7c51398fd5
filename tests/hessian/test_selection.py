"""Which leaves a pattern selects, to the letter."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from geojax import hessian, tree
from geojax.hessian import selection

PARAMS = {
    "Dense_0": {"kernel": np.ones((2, 3), np.float32), "bias": np.ones(3, np.float32)},
    "Dense_10": {"kernel": np.ones((3, 3), np.float32), "bias": np.ones(3, np.float32)},
    "blocks": [{"scale": np.ones(2, np.float32)}, {"scale": np.ones(2, np.float32)}],
    "step": np.zeros((), np.int32),
    "temperature": np.ones((), np.float32),
}
D0, D10 = (["Dense_0/bias", "Dense_0/kernel"], ["Dense_10/bias", "Dense_10/kernel"])
BLOCKS = ["blocks/0/scale", "blocks/1/scale"]


def chosen(spec, params=PARAMS):
    selected, frozen = hessian.select(params, spec)
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(selected)
    ]
    merged = tree.merge(selected, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (merged, params)), strict=True))
    return names


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        ("Dense_0/kernel", ["Dense_0/kernel"]),
        ("Dense_0", D0),  # and not Dense_10
        ("Dense_*", D0 + D10),
        ("Dense_?", D0),
        ("Dense_[01]", D0),
        ("*/bias", ["Dense_0/bias", "Dense_10/bias"]),
        ("*scale", BLOCKS),  # a star crosses slashes
        ("blocks/1", ["blocks/1/scale"]),
        ("blocks", BLOCKS),
        ("temperature", ["temperature"]),
        ("*", [*D0, *D10, *BLOCKS, "temperature"]),  # every floating leaf
        ("['Dense_0']['bias']", ["Dense_0/bias"]),
        ("['Dense_0']", D0),
        ("['blocks'][0]", ["blocks/0/scale"]),
        (re.compile("bias$"), ["Dense_0/bias", "Dense_10/bias"]),
        (re.compile(r"^Dense_\d/"), D0),
        (lambda path, leaf: path.startswith("Dense") and leaf.ndim == 1, [D0[0], D10[0]]),
        (["temperature", re.compile("0/b"), "blocks/0"], [D0[0], D10[0], BLOCKS[0], "temperature"]),
    ],
)  # fmt: skip
def test_a_pattern_selects_these_leaves(spec, want):
    assert sorted(chosen(spec)) == sorted(want)


@pytest.mark.parametrize(
    ("spec", "kind", "says"),
    [
        ("dense_0", ValueError, "'dense_0' selects no floating leaf; the paths are Dense_0/bias"),
        ("kernel", ValueError, "'kernel' selects no floating leaf.*case-sensitive"),
        ("step", ValueError, "'step' selects no floating leaf"),
        ("['Dense_']", ValueError, "selects no floating leaf"),
        (["Dense_0", "conv"], ValueError, "'conv' selects no"),
        ([], ValueError, "an empty list selects nothing"),
        (re.compile("conv"), ValueError, "the expression 'conv' selects no"),
        (lambda path, leaf: False, ValueError, "the function given selects no"),
        (3, TypeError, "got int; expected a pattern"),
        (None, TypeError, r"\['step'\] is int32"),
    ],
)
def test_what_selects_nothing_is_refused_with_the_paths(spec, kind, says):
    with pytest.raises(kind, match=says):
        hessian.select(PARAMS, spec)


def test_layers_are_the_leaves_that_share_a_parent():
    assert hessian.layers(PARAMS) == {
        "Dense_0": tuple(D0),
        "Dense_10": tuple(D10),
        "blocks/0": ("blocks/0/scale",),
        "blocks/1": ("blocks/1/scale",),
        "temperature": ("temperature",),
    }


def weights(seed=0, shape=(4, 5)):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_copies_are_found_by_value_and_by_identity():
    weight = weights()
    for params in (
        {"a": weight, "b": jnp.array(weight)},
        {"a": weight, "b": weight},
        {"a": np.asarray(weight), "b": weight},
    ):
        with pytest.warns(UserWarning, match="leaves a and b hold the same numbers"):
            selection.warn_of_copies(params)


def test_what_is_no_copy_draws_no_warning():
    weight = weights()
    for params in (
        {"a": weight, "b": weights(1)},
        {"a": weight, "b": weight[:, ::-1]},  # the same sums, in another order
        {"a": weight, "b": weight.reshape(5, 4)},
        {"a": weight, "b": weight.astype(jnp.bfloat16)},
        {"a": jnp.ones((4, 5)), "b": jnp.ones((4, 5))},
        {"a": weights(shape=(3,)), "b": weights(shape=(3,))},
    ):
        selection.warn_of_copies(params)
    jax.jit(lambda params: selection.warn_of_copies(params))({"a": weight, "b": weight})


def test_copies_are_found_on_a_mesh(mesh):
    with jax.set_mesh(mesh):
        weight = jax.device_put(weights(shape=(4, 6)), NamedSharding(mesh, P("data", "model")))
        with pytest.warns(UserWarning, match="hold the same numbers"):
            selection.warn_of_copies({"a": weight, "b": jnp.array(weight)})
