"""Two processes of two devices each: the same functions, the same numbers as one device."""

import inspect
import json
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from geojax import batches, fit, statistics

PROGRAM = inspect.cleandoc("""
    import json, sys
    import jax, jax.numpy as jnp, numpy as np, optax
    from jax.sharding import NamedSharding, PartitionSpec as P
    port, rank = sys.argv[1], int(sys.argv[2])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    sys.path.insert(0, sys.argv[3])
    import test_processes as shared
    from geojax import batches, fit, statistics, tree
    x, y = shared.data()
    # Each process holds its half of every batch of eight.
    mine = np.arange(24).reshape(3, 2, 4)[:, rank].reshape(-1)
    source = batches.split({"x": x[mine], "y": y[mine]}, 4)
    for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
        params = jax.device_put({"w": np.float32([0.3, -0.2, 0.1])}, NamedSharding(mesh, P()))
        with jax.set_mesh(mesh):
            gradient = batches.mean(jax.grad(shared.loss), source, mesh=mesh)(params)
            trained = fit.fit(shared.loss, params, source, optax.sgd(0.05, 0.9), 7,
                              key=jax.random.key(0), mesh=mesh)
            state = statistics.refresh(shared.apply, params, shared.STATE, source, mesh=mesh,
                                       inputs_fn=lambda b: b["x"])
            out = {"gradient": np.asarray(gradient["w"]).tolist(),
                   "trained": np.asarray(trained.params["w"]).tolist(),
                   "loss": trained.history["loss"].tolist(),
                   "var": np.asarray(state["var"]).tolist()}
        print("RESULT" + json.dumps(out))
""")

STATE = {"mean": np.zeros(3, np.float32), "var": np.ones(3, np.float32)}


def data():
    r = np.random.default_rng(0)
    x = r.normal(size=(24, 3)).astype(np.float32)
    return x, (x @ np.array([1.0, -1.0, 0.5])).astype(np.float32)


def loss(params, batch):
    return jnp.mean((jnp.sum(batch["x"] * params["w"][None], axis=1) - batch["y"]) ** 2)


def apply(params, state, inputs, train):
    mean, var = inputs.mean(0), inputs.var(0)
    new = {"mean": 0.9 * state["mean"] + 0.1 * mean, "var": 0.9 * state["var"] + 0.1 * var}
    return inputs - mean[None], new


def test_two_processes_with_half_of_each_batch_equal_one_device():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    here = str(pathlib.Path(__file__).parent)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(port), str(rank), here],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    x, y = data()
    source = batches.split({"x": x, "y": y}, 8)
    params = {"w": jnp.array([0.3, -0.2, 0.1])}
    gradient = batches.mean(jax.grad(loss), source)(params)["w"]
    trained = fit.fit(loss, params, source, optax.sgd(0.05, 0.9), 7, key=jax.random.key(0))
    for output in outputs:
        lines = [text for text in output.splitlines() if text.startswith("RESULT")]
        assert len(lines) == 2  # an Auto mesh and an Explicit one
        for line in lines:
            found = json.loads(line.removeprefix("RESULT"))
            np.testing.assert_allclose(found["gradient"], gradient, rtol=1e-5)
            np.testing.assert_allclose(found["trained"], trained.params["w"], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(found["loss"], trained.history["loss"], rtol=1e-5)
            np.testing.assert_allclose(found["var"], x.astype(float).var(0), rtol=1e-5)
    assert statistics.statistic_paths(apply, params, STATE, x) == [("['mean']", "['var']")]
