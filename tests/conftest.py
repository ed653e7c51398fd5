"""Strict numerics, eight CPU devices and a compilation cache for every test."""

import gc
import importlib.metadata
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Workers that each start a BLAS thread per core only wait for one another.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Collectives that run at once on eight devices need a thread each, or wait for one another for
# ever: by default XLA's pool is as large as the machine.
os.environ.setdefault("PJRT_NPROC", "16")
os.environ.setdefault("NPROC", "16")
# The programs under test are small and run a few times each: compiling them is most of the work,
# LLVM's optimiser much of that, and the emitters of fused loops most of the rest (a second-order
# product takes 50 ms to compile instead of 370). `make demo` and benchmarks compile as users do.
_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones refuse to know it
    _FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", _FLAGS)
_CACHE = pathlib.Path(__file__).resolve().parent.parent / ".jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))

import jax  # noqa: E402
import jax.sharding as jsh  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# The two workers compile the same small programs: one of them is enough.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(params=["auto", "explicit"])
def mesh(request):
    """A (data=4, model=2) mesh over eight CPU devices: once with Auto axes, once with Explicit."""
    kind = jsh.AxisType.Auto if request.param == "auto" else jsh.AxisType.Explicit
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


_MAPS = pathlib.Path("/proc/self/maps")


@pytest.fixture(scope="module", autouse=True)
def release_compiled_programs():
    """Let go of compiled programs between modules, when many have come together.

    A program holds a few memory maps, and Linux gives a process 65530: after some thousand
    programs the next compilation ends in a segmentation fault.
    """
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > 35_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def rng():
    """A seeded NumPy generator."""
    return np.random.default_rng(0)


def pytest_collection_finish():
    """Traces make many objects that live on: looking through them all so often finds nothing."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)


def pytest_collection_modifyitems(items):
    """The tests that start processes first, so that neither worker ends with a long one alone."""
    first = ("test_scripts.py", "test_processes.py", "test_package.py")
    items.sort(key=lambda item: item.path.name not in first)
