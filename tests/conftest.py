"""Strict numerics, eight CPU devices and a compilation cache for every test."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_CACHE = pathlib.Path(__file__).resolve().parent.parent / ".jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))

import jax  # noqa: E402
import jax.sharding as jsh  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(params=["auto", "explicit"])
def mesh(request):
    """A (data=4, model=2) mesh over eight CPU devices: once with Auto axes, once with Explicit."""
    kind = jsh.AxisType.Auto if request.param == "auto" else jsh.AxisType.Explicit
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


@pytest.fixture
def rng():
    """A seeded NumPy generator."""
    return np.random.default_rng(0)
