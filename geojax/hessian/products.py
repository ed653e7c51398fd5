"""One Hessian-vector product: four ways to differentiate, and the precision that it runs in.

Everything here is a pure function of parameters, vector and one batch. Operators over a data set
are made of it in `operators`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from geojax import tree
from geojax.fit import takes_key

__all__ = ["Mode", "hvp"]

PyTree = Any
Mode = Literal[
    "forward_over_reverse", "reverse_over_forward", "reverse_over_reverse", "finite_difference"
]


def hvp(
    loss_fn: Callable[..., jax.Array],
    params: PyTree,
    batch: PyTree,
    v: PyTree,
    *,
    mode: Mode = "forward_over_reverse",
    key: jax.Array | None = None,
    precision: str | None = "highest",
    upcast: bool = False,
    step: float | None = None,
) -> PyTree:
    r"""The Hessian of a loss on one batch, times a vector: :math:`\nabla^2 L(\theta)\, v`.

    Costs two to three gradients; the Hessian itself is never formed. Pure: it works under `jit`,
    `vmap` and `grad`.

    Args:
        loss_fn: `loss_fn(params, batch)` or `loss_fn(params, batch, key)`, a scalar.
        params: Pytree of floating arrays.
        batch: What `loss_fn` takes.
        v: Pytree like `params`, in any floating dtype; it is cast to the parameters' own within.
        mode: 'forward_over_reverse', `jvp` of `grad`: exact, 2.67 gradients for dense layers, and
            right for nearly every model. 'reverse_over_forward' and 'reverse_over_reverse': exact,
            for models with an operation that has no rule for the first. 'finite_difference': the
            central difference of two gradients, for kernels that can be differentiated but once.
        key: The key of a loss that takes one.
        precision: The matmul precision of the model's products, a name that
            `jax.default_matmul_precision` takes; None leaves the platform's default, which on
            accelerators rounds float32 inputs to 8 or 11 bits and puts an error of about 1e-3 into
            every product. What the loss itself asks for by `precision=` stays.
        upcast: Compute in float32 where parameters have fewer bits (a loss may still cast within).
        step: For 'finite_difference', the length of the step over the norm of the parameters; by
            default the cube root of the dtype's epsilon.

    Returns:
        A pytree like `params`, in float32 or better.

    Raises:
        TypeError: If a leaf is not floating, or the loss takes a key and none is given.
        ValueError: If `v` and `params` differ, naming the leaf; for an unknown mode; or if the loss
            is not a scalar.

    Example:
        >>> loss = lambda params, batch: jnp.sum(batch * params["w"] ** 3)
        >>> params, v = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([1.0, 1.0])}
        >>> hvp(loss, params, jnp.array([1.0, 1.0]), v)["w"].tolist()
        [6.0, 12.0]

    Reference:
        Pearlmutter, Fast exact multiplication by the Hessian, 1994.
    """
    check_mode(mode, step)
    check_precision(precision)
    tree.check_floating(params, "params")
    tree.check_same(params, v, names=("params", "v"), dtype=False)
    tree.check_floating(v, "v")
    check_dtypes(params, upcast, mode)
    keyed = takes_key(loss_fn)
    check_key(keyed, key, "loss_fn")

    def loss(p):
        return scalar(loss_fn(p, batch, key) if keyed else loss_fn(p, batch))

    with matmul_precision(precision):
        return widen(apply_one(loss, working(params, upcast), v, mode, step), params)


def check_mode(mode: str, step: float | None) -> None:
    """Raise for a mode that is none of the four, or a step that is no step."""
    if mode not in get_args(Mode):
        raise ValueError(f"mode is {mode!r}; expected one of {', '.join(get_args(Mode))}.")
    if step is not None and not (mode == "finite_difference" and step > 0):
        raise ValueError(
            f"step is {step} with mode {mode!r}; a positive step goes with 'finite_difference'."
        )


def check_key(keyed: bool, key: Any, what: str) -> None:
    """Raise if a function asks for a key and there is none, or what there is is no typed key."""
    if keyed and key is None:
        raise TypeError(
            f"{what} takes a key, and none was given; pass `key=jax.random.key(seed)`, which is "
            "folded with the batch's place in the data so that the operator is one matrix, or "
            "leave the randomness out (dropout off)."
        )
    if key is not None and not jnp.issubdtype(jnp.result_type(key), jax.dtypes.prng_key):
        raise TypeError(f"key is {jnp.result_type(key)}; expected a typed key, `jax.random.key`.")


def check_dtypes(params: PyTree, upcast: bool, mode: str) -> None:
    """Raise where the arithmetic of the parameters would give a wrong product without a word."""
    if upcast:
        return
    for name, leaf in zip(tree.paths(params), jax.tree.leaves(params), strict=True):
        dtype = jnp.result_type(leaf)
        if dtype == jnp.float16:
            raise TypeError(
                f"params: leaf {name} is float16, in which the small products of a tangent "
                "underflow; use upcast=True (the loss may cast within), or bfloat16."
            )
        if mode == "finite_difference" and jnp.finfo(dtype).bits < 32:
            raise TypeError(
                f"params: leaf {name} is {dtype}, whose spacing swallows the step of a finite "
                "difference; use upcast=True, so that the loss is called with float32 parameters."
            )


@contextlib.contextmanager
def matmul_precision(precision: str | None) -> Iterator[None]:
    """`jax.default_matmul_precision`, or nothing for None."""
    with contextlib.nullcontext() if precision is None else jax.default_matmul_precision(precision):
        yield


def check_precision(precision: str | None) -> None:
    """Raise for a name that jax does not know, before anything is traced."""
    try:
        with matmul_precision(precision):
            pass
    except Exception as error:
        raise ValueError(
            f"precision is {precision!r}; expected None, 'default', 'high', 'highest' or another "
            "name that `jax.default_matmul_precision` takes."
        ) from error


def scalar(loss: Any) -> jax.Array:
    """The loss, once it is known to be one floating number."""
    if isinstance(loss, tuple):
        raise TypeError("loss_fn returned a tuple; expected a scalar, the mean over the batch.")
    if jnp.shape(loss):
        raise ValueError(
            f"loss_fn returned an array of shape {jnp.shape(loss)}; expected a scalar, the mean "
            "over the batch."
        )
    if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise TypeError(f"loss_fn returned {jnp.result_type(loss)}; expected a floating scalar.")
    return loss


def working(params: PyTree, upcast: bool) -> PyTree:
    """The parameters in the dtypes that the product is computed in; other leaves as they are."""
    if not upcast:
        return jax.tree.map(jnp.asarray, params)
    return jax.tree.map(
        lambda x: (
            jnp.asarray(x).astype(tree.accumulation_dtype(x))
            if jnp.issubdtype(jnp.result_type(x), jnp.floating)
            else x
        ),
        params,
    )


def like_params(params: PyTree, v: PyTree) -> PyTree:
    """A vector, or stacked ones, as tangents of the parameters: in their dtypes and shardings."""
    return jax.tree.map(
        lambda p, x: sharded_like(p, jnp.asarray(x).astype(jnp.result_type(p))), params, v
    )


def sharded_like(like: Any, x: jax.Array) -> jax.Array:
    """`x` sharded as `like` in the trailing axes that they share, where types know of sharding."""
    sharding = getattr(jax.typeof(like), "sharding", None)
    if sharding is None or AxisType.Explicit not in sharding.mesh.axis_types:
        return x
    lead = (None,) * max(0, x.ndim - jnp.ndim(like))
    spec = PartitionSpec(*lead, *sharding.spec[: x.ndim])
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, spec))


def replicated(x: jax.Array) -> jax.Array:
    """`x` on every device of its mesh, where types know of sharding."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    if sharding is None or AxisType.Explicit not in sharding.mesh.axis_types:
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def widen(product: PyTree, params: PyTree) -> PyTree:
    """The product in float32, or in float64 where the parameter is."""
    return jax.tree.map(lambda x, p: x.astype(tree.accumulation_dtype(p)), product, params)


def apply_one(
    loss: Callable[[PyTree], jax.Array],
    params: PyTree,
    v: PyTree,
    mode: Mode,
    step: float | None = None,
) -> PyTree:
    """The Hessian of `loss` at `params`, times `v`, in the dtypes of `params`."""
    v = like_params(params, v)
    with explained(loss, params):
        if mode == "forward_over_reverse":
            return jax.jvp(jax.grad(loss), (params,), (v,))[1]
        if mode == "reverse_over_forward":
            return jax.grad(lambda p: jax.jvp(loss, (p,), (v,))[1])(params)
        if mode == "reverse_over_reverse":
            return jax.vjp(jax.grad(loss), params)[1](v)[0]
        return _central_difference(jax.grad(loss), params, v, step)


def apply_many(
    loss: Callable[[PyTree], jax.Array],
    params: PyTree,
    vs: PyTree,
    mode: Mode,
    step: float | None = None,
) -> PyTree:
    """As `apply_one`, for stacked vectors: all share the pass that does not depend on them."""
    vs = like_params(params, vs)
    with explained(loss, params):
        if mode == "finite_difference":
            gradient = jax.jit(jax.grad(loss))  # traced once for all vectors
            return unrolled(lambda v: _central_difference(gradient, params, v, step), vs)
        if mode == "forward_over_reverse":
            return linear_many(jax.linearize(jax.grad(loss), params)[1], vs)
        if mode == "reverse_over_reverse":
            pull = jax.vjp(jax.grad(loss), params)[1]
            return linear_many(lambda v: pull(v)[0], vs)
        return linear_many(lambda v: jax.grad(lambda p: jax.jvp(loss, (p,), (v,))[1])(params), vs)


def unrolled(fn: Callable[[PyTree], PyTree], vs: PyTree) -> PyTree:
    """`fn` of each of the stacked vectors, one after another within one program."""
    return tree.stack([fn(v) for v in tree.unstack(vs)])


def linear_many(linear: Callable[[PyTree], PyTree], vs: PyTree) -> PyTree:
    """A linear function of stacked vectors, batched as the backend is quickest at it.

    Convolutions batched over tangents of their kernels take twice the time of a loop on XLA's CPU
    backend at eight vectors (34 ms against 18 ms a vector), so they are unrolled there, as long as
    the program stays small.
    """
    num = tree.num_points(vs)
    if num <= 16 and jax.default_backend() == "cpu":
        found = equations(jax.make_jaxpr(linear)(tree.unstack(vs)[0]).jaxpr)
        if any(equation.primitive.name == "conv_general_dilated" for equation in found):
            return unrolled(linear, vs)
    return jax.vmap(linear)(vs)


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a jaxpr, those of the jaxprs within it included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def _central_difference(gradient, params, v, step):
    if step is None:
        dtypes = [jnp.result_type(x) for x in jax.tree.leaves(params)]
        step = max(float(jnp.finfo(d).eps) for d in dtypes) ** (1 / 3)
    length = tree.norm(v)
    size = tree.norm(params)
    # At the origin there is no scale to take the step from; a zero vector has no direction.
    h = jnp.asarray(step, size.dtype) * jnp.where(size > 0, size, jnp.ones_like(size))
    unit = tree.scale(jnp.where(length > 0, 1 / length, jnp.zeros_like(length)), v)
    ahead = gradient(tree.axpy(h, unit, params))
    behind = gradient(tree.axpy(-h, unit, params))
    return tree.scale(length / (2 * h), tree.axpy(-1.0, behind, ahead))


@contextlib.contextmanager
def explained(fn: Callable, *args: Any, what: str = "loss_fn", remedy: str = "") -> Iterator[None]:
    """Turn jax's complaint about a custom rule into a sentence that names the function."""
    try:
        yield
    except (TypeError, NotImplementedError) as error:
        if not any(word in str(error) for word in ("custom_vjp", "custom_lin")):
            raise
        raise TypeError(
            f"{what} cannot be differentiated in forward mode: {_custom_functions(fn, args)} has "
            "a `jax.custom_vjp` rule and no forward one. "
            + (
                remedy
                or "Use mode='reverse_over_reverse', or 'finite_difference'; mode="
                "'forward_over_reverse' works where the rule itself is made of ordinary "
                "operations. Attention has implementation='xla'."
            )
        ) from error


def _custom_functions(fn: Callable, args: Any) -> str:
    try:
        found = [
            str(e.params["call_jaxpr"].jaxpr.debug_info.func_src_info)
            for e in equations(jax.make_jaxpr(fn)(*args).jaxpr)
            if e.primitive.name.startswith("custom_vjp_call")
        ]
    except Exception:  # The name is a courtesy, and where jax keeps it is its own affair.
        found = []
    return "; ".join(dict.fromkeys(found)) or "a function within"


@functools.lru_cache(maxsize=32)
def hessian_products(
    loss_fn: Callable, mode: Mode, precision: str | None, upcast: bool, step: float | None
) -> tuple[Callable, Callable]:
    """The products with one vector and with many, as `batches.mean` calls them.

    Both are `(selected, frozen, v, key, batch)`; they are made once for each loss, so that all
    operators of a loss share what is compiled.
    """
    keyed = takes_key(loss_fn)

    def with_(apply):
        def product(selected, frozen, v, key, batch):
            def loss(p):
                whole = tree.merge(p, working(frozen, upcast))
                if keyed:
                    return scalar(loss_fn(whole, batch.batch, batch_key(key, batch)))
                return scalar(loss_fn(whole, batch))

            with matmul_precision(precision):
                return widen(apply(loss, working(selected, upcast), v, mode, step), selected)

        return product

    return with_(apply_one), with_(apply_many)


def batch_key(key: jax.Array, numbered: Any) -> jax.Array:
    """The fixed key of a batch: that of the operator, folded with the number of its first row."""
    # A maximum or minimum is right on a sharded axis, where taking an element is not.
    return jax.random.fold_in(key, jnp.min(jnp.asarray(numbered.rows)))


def cached(make: Callable, fn: Any, *options: Any) -> Any:
    """What `make` has made for this function, made anew for one that cannot be hashed."""
    try:
        hash((fn, options))
    except TypeError:
        return make.__wrapped__(fn, *options)
    return make(fn, *options)
