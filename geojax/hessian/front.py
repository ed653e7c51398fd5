"""The one call: eigenpairs of the Hessian of a loss over data, after probing that it has any."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun
from jax.sharding import Mesh, NamedSharding

from geojax import batches as batches_
from geojax import krylov, tree
from geojax.hessian import operators, products, selection, sources
from geojax.hessian.selection import Selection
from geojax.krylov.checks import Checks, OperatorError

__all__ = ["eigenthings", "probe"]

PyTree = Any


def eigenthings(
    loss_fn: Callable[..., jax.Array],
    params: PyTree,
    batches: Any,
    k: int = 10,
    *,
    key: jax.Array,
    which: krylov.Which = "LM",
    tol: float = 1e-3,
    select: Selection = None,
    loss_key: jax.Array | None = None,
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
    mesh: Mesh | NamedSharding | None = None,
    microbatch: int | None = None,
    precision: str | None = "highest",
    upcast: bool = False,
    probes: bool = True,
    options: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> krylov.Eigenpairs:
    r"""The top k eigenvalues and eigenvectors of the Hessian of the mean loss over a data set.

    The products are exact (`hessian.hessian`), the solver is restarted Lanczos (`krylov.eigsh`),
    and each pair comes with its measured residual. Before it starts, `probe` spends about five
    passes over the data on making sure that there is one symmetric matrix to speak of.

    Args:
        loss_fn: `loss_fn(params, batch)`, the mean over the batch, in evaluation mode: running
            statistics, no dropout. `objectives.evaluation_loss` makes one of a network.
        params: Pytree of floating arrays, sharded or not.
        batches: One batch or a re-iterable of batches, the same on every pass.
        k: How many pairs.
        key: A typed key for the starting vector.
        which: 'LM' largest magnitude, 'LA' largest, 'SA' smallest, 'BE' both ends.
        tol: Relative residual at which a pair counts as converged.
        select: Which parameters; a glob, a regular expression or a predicate, as for `select`.
        loss_key: For a loss that takes a key: the one draw of its masks that is analysed.
        weight_fn: `weight_fn(batch)`, by default the number of examples.
        mesh: Split each batch over this mesh's first axis.
        microbatch: Examples computed at a time, for less memory.
        precision: Matmul precision of the model's products.
        upcast: Compute in float32 where parameters have fewer bits.
        probes: Whether to probe first.
        options: More arguments for `krylov.eigsh`: 'basis_size' or 'memory_bytes', 'max_matvecs',
            'max_seconds', 'block_size', 'initial', 'checkpoint', 'callback', 'verify', 'confirm'.
        progress: True or False for a bar; by default one appears when it takes long.

    Returns:
        `krylov.Eigenpairs`: `.eigenvalues`, `.eigenvectors` (a stacked pytree), `.residuals`,
        `.intervals`, `.converged`, `.num_matvecs` and more; printing it says how good it is.

    Raises:
        krylov.OperatorError: If the loss has no Hessian to speak of, saying why and what to do.
        TypeError, ValueError: As `hessian.hessian` and `krylov.eigsh`.

    Example:
        >>> import jax.numpy as jnp
        >>> loss = lambda params, batch: jnp.mean((batch["x"] @ params["w"]) ** 2)
        >>> data = {"x": jnp.array([[1.0, 0.0], [0.0, 2.0]])}
        >>> pairs = eigenthings(loss, {"w": jnp.zeros(2)}, data, 1, key=jax.random.key(0))
        >>> np.round(pairs.eigenvalues, 4).tolist(), bool(pairs.converged[0])
        ([4.0], True)
    """
    options = dict(options or {})
    taken = {"k", "key", "which", "tol", "progress"} & set(options)
    if taken:
        raise ValueError(
            f"options: {', '.join(sorted(taken))} are arguments of eigenthings itself; give them "
            "there."
        )
    if products.takes_key(loss_fn) and loss_key is None:
        raise TypeError(
            "loss_fn takes a key (dropout, sampling), so its Hessian is another matrix at each "
            "call. Give the loss in evaluation mode (`objectives.evaluation_loss`), or "
            "`loss_key=jax.random.key(seed)` for the Hessian of one fixed draw."
        )
    operator = operators.hessian(
        loss_fn,
        params,
        batches,
        select=select,
        key=loss_key,
        weight_fn=weight_fn,
        mesh=mesh,
        microbatch=microbatch,
        precision=precision,
        upcast=upcast,
    )
    key_probe, key_solve = jax.random.split(key)
    spent = 0
    # A resumed run was probed when it began.
    resumed = options.get("checkpoint") is not None and options["checkpoint"].latest() is not None
    if probes and not resumed:
        spent = probe(
            loss_fn,
            params,
            batches,
            key=key_probe,
            loss_key=loss_key,
            weight_fn=weight_fn,
            operator=operator,
        ).num_matvecs
    pairs = krylov.eigsh(
        operator, k, key=key_solve, which=which, tol=tol, progress=progress, **options
    )
    return pairs._replace(num_matvecs=pairs.num_matvecs + spent)


def probe(
    loss_fn: Callable[..., jax.Array],
    params: PyTree,
    batches: Any,
    *,
    key: jax.Array,
    loss_key: jax.Array | None = None,
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
    operator: krylov.Operator | None = None,
) -> Checks:
    """Make sure that a loss over data has one symmetric Hessian, or say why it has none.

    Three things besides `krylov.check`, which it runs: that the loss of an example does not depend
    on its batch (normalization in train mode); that a `stop_gradient` within does not change the
    gradient (in a log-sum-exp it does not); and, where two products differ, whether it is the data
    or the loss that changed.

    Args:
        loss_fn: As for `hessian.hessian`.
        params: As for `hessian.hessian`.
        batches: As for `hessian.hessian`.
        key: A typed key for the random vectors.
        loss_key: The fixed key of a loss that takes one.
        weight_fn: As for `hessian.hessian`.
        operator: The operator of this loss, if there is one already; by default the Hessian.

    Returns:
        What was measured. Four products; on the first batch, four losses and two gradients.

    Raises:
        krylov.OperatorError: With `.property` 'determinism', 'linearity', 'symmetry', 'batches' or
            'stop_gradient'.

    Example:
        >>> import jax.numpy as jnp
        >>> loss = lambda params, batch: jnp.mean((batch - params) ** 2)
        >>> probe(loss, jnp.zeros(()), jnp.ones(4), key=jax.random.key(0)).symmetry
        0.0
    """
    if operator is None:
        operator = operators.hessian(loss_fn, params, batches, key=loss_key, weight_fn=weight_fn)
    source = batches_.as_batches(batches)
    try:
        found = krylov.check(operator, key=key)
    except OperatorError as error:
        if error.property != "determinism":
            raise
        changed = _fingerprint(source) != _fingerprint(source)
        who = (
            "the data differ from one pass to the next: the loader augments, draws, or shuffles "
            "and drops a remainder. Give it a fixed order and fixed examples (collect the batches "
            "in a list, or use `batches.split` without a key)"
            if changed
            else "the data are the same on each pass, so the loss is random by itself: dropout or "
            "sampling with a key that it makes, or a host callback. Switch that off, or let the "
            "loss take a key and pass `loss_key`"
        )
        raise OperatorError(
            f"{str(error).split(' The loss or')[0]} Here {who}.", "determinism"
        ) from None
    _check_batches(loss_fn, params, source, loss_key, weight_fn)
    _check_stops(loss_fn, params, next(iter(source)), loss_key, key)
    return found


def _check_batches(loss_fn, params, source, loss_key, weight_fn) -> None:
    """Raise if the loss of an example depends on the batch that it is in."""
    keyed = products.takes_key(loss_fn)
    if keyed:
        source = sources.numbered(source)
        weight_fn = None if weight_fn is None else sources.unnumbered_weight(weight_fn)
    selected, frozen = selection.select(params, None)
    value = products.cached(sources.jitted_value, loss_fn, "highest", False)
    batch = iter(source)
    next(batch)
    if next(batch, None) is None:
        # One batch holds all the data: however its examples hang together, there is one Hessian.
        return
    try:
        sources.check_uncoupled(value, selected, frozen, loss_key, source, weight_fn)
    except ValueError as error:
        if "microbatch" not in str(error):
            raise
        raise OperatorError(
            "loss_fn: the loss of a batch is not the mean of its examples' losses "
            f"({str(error).split('(')[1].split(')')[0]}), so the Hessian depends on how the data "
            "are cut into batches. The likely cause is BatchNorm in train mode: evaluate it with "
            "its running statistics (`objectives.evaluation_loss`, train=False). For a mean over "
            "unmasked tokens pass `weight_fn`. For a loss that couples examples by intent pass "
            "all data as one batch, or probes=False.",
            "batches",
        ) from None


def _check_stops(loss_fn, params, batch, loss_key, key) -> None:
    """Raise if a `stop_gradient` makes the gradient that of another function than the loss."""
    selected, frozen = selection.select(params, None)
    extra = (loss_key,) if products.takes_key(loss_fn) else ()

    def loss(p):
        return products.scalar(loss_fn(tree.merge(p, frozen), batch, *extra))

    closed = jax.make_jaxpr(loss)(selected)
    if not any(e.primitive.name == "stop_gradient" for e in products.equations(closed.jaxpr)):
        return
    leaves, treedef = jax.tree.flatten(selected)
    identity = jax.make_jaxpr(lambda x: jnp.array(x, copy=True))(1.0).eqns[0].primitive
    passing = jaxpr_as_fun(closed.replace(jaxpr=_replaced(closed.jaxpr, identity)))

    def unstopped(p):
        return passing(*jax.tree.leaves(p))[0]

    # Away from the point itself: at a minimum both gradients may vanish.
    noise = tree.random_like(key, selected)
    moved = jax.tree.unflatten(
        treedef,
        [
            x + (0.05 * (jnp.sqrt(jnp.mean(jnp.square(x))) + 1e-3) * e).astype(x.dtype)
            for x, e in zip(leaves, jax.tree.leaves(noise), strict=True)
        ],
    )
    stopped, through = jax.jit(lambda p: (jax.grad(loss)(p), jax.grad(unstopped)(p)))(moved)
    size = float(tree.norm(through))
    gap = float(tree.norm(tree.axpy(-1.0, stopped, through))) / size if size else 0.0
    eps = max(float(jnp.finfo(x.dtype).eps) for x in leaves)
    if gap > max(1e-3, 20 * eps):
        raise OperatorError(
            f"loss_fn: a `stop_gradient` within changes its gradient by {gap:.2g} of its size, so "
            "what is differentiated is not the loss, and the matrix would be the Hessian of "
            "another function, in which the stopped parts are constants. Take it out (a "
            "straight-through estimator has no Hessian); or, if those parts are meant as "
            "constants, put them into the batch; or pass probes=False.",
            "stop_gradient",
        )


def _replaced(jaxpr: Any, identity: Any) -> Any:
    """A jaxpr with every `stop_gradient` turned into a copy, in inner jaxprs too."""

    def inner(value):
        if hasattr(value, "jaxpr") and hasattr(value, "consts"):
            return value.replace(jaxpr=_replaced(value.jaxpr, identity))
        if hasattr(value, "eqns"):
            return _replaced(value, identity)
        if type(value) in (tuple, list):
            return type(value)(inner(x) for x in value)
        return value

    equations = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "stop_gradient":
            equations.append(equation.replace(primitive=identity, params={}))
        else:
            params = {name: inner(value) for name, value in equation.params.items()}
            equations.append(equation.replace(params=params))
    return jaxpr.replace(eqns=equations)


def _fingerprint(source: Any) -> list[int]:
    """A checksum of each batch, order aside: equal for the same examples in another order."""
    sums = []
    for batch in source:
        sums.append(
            sum(
                zlib.crc32(np.ascontiguousarray(np.asarray(x)).tobytes())
                for x in jax.tree.leaves(batch)
                if isinstance(x, np.ndarray) or x.is_fully_addressable
            )
        )
    return sums
