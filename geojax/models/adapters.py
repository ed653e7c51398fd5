"""Any flax module as a pure function of parameters and state.

`from_linen` and `from_nnx` give what the rest of the library works on: `params`, a pytree of the
trainable floats, `state`, a pytree of everything else, and one pure function of both.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import errors, nnx
from flax import linen as nn
from flax.core import unfreeze
from jax.core import Tracer

from geojax import tree

__all__ = ["ApplyFn", "Model", "from_linen", "from_nnx"]

PyTree = Any


class ApplyFn(Protocol):
    """A network as a pure function.

    Args:
        params: The trainable floats.
        state: Everything else, batch statistics for one; `{}` if there is nothing.
        inputs: A batch, with the examples on the leading axis.
        train: A Python bool. In training mode batch statistics are those of the batch, and those in
            the state move; otherwise the state comes back as it went in.
        key: Drives dropout. Without it dropout is off, in training mode too, so that statistics can
            be refreshed free of its noise.

    Returns:
        `(outputs, new_state)`.
    """

    def __call__(
        self, params: PyTree, state: PyTree, inputs: PyTree, train: bool, key: Any = None
    ) -> tuple[Any, PyTree]:
        """Apply the network."""
        ...


class Model(NamedTuple):
    """A network: how to draw its parameters and how to apply it.

    Attributes:
        init: `init(key, inputs) -> (params, state)`. Of `inputs`, an example batch or a
            `jax.ShapeDtypeStruct`, only shapes and dtypes matter, and the batch size not at all.
        apply: The network as an `ApplyFn`.
    """

    init: Callable[[jax.Array, PyTree], tuple[PyTree, PyTree]]
    apply: ApplyFn


# The words that flax code has for "this is training", and for its opposite.
_TRAIN_NAMES = ("train", "training", "is_training")
_FLAG_NAMES = (*_TRAIN_NAMES, "use_running_average", "deterministic")


def _flags(names: Iterable[str], train: bool, dropout: bool) -> dict[str, bool]:
    """The values of those flags among `names` that tell a module its mode."""
    names = set(names)
    values = {name: train for name in _TRAIN_NAMES if name in names}
    if "use_running_average" in names:
        values["use_running_average"] = not train
    if "deterministic" in names:
        # Next to another flag it speaks of dropout alone; by itself it is the whole mode.
        values["deterministic"] = not (train and dropout) if values else not train
    return values


def _argument_names(function: Callable[..., Any], skip: int) -> list[str]:
    """The arguments that may be passed by name, but for the first `skip` ones."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = list(inspect.signature(function).parameters.values())[skip:]
    return [parameter.name for parameter in parameters if parameter.kind in named]


def _check_train(train: Any) -> None:
    if not isinstance(train, bool):
        raise TypeError(
            f"train is {train!r}; expected a Python bool, because the mode decides what is traced "
            "(under jit, mark it static: `jax.jit(apply, static_argnums=3)`)."
        )


# --------------------------------------------------------------------------------------- linen


def _equal(a: PyTree, b: PyTree) -> bool:
    """Whether two pytrees hold the same numbers; true inside a trace, which has shapes alone."""
    return all(
        isinstance(x, Tracer) or np.array_equal(np.asarray(x), np.asarray(y), equal_nan=True)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def _without_dropout(next_function: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """A linen interceptor that turns dropout off, whatever the module asks for."""
    module = context.module
    if context.method_name == "__call__" and isinstance(module, nn.Dropout):
        return args[0] if args else kwargs["inputs"]
    if context.method_name == "__call__" and isinstance(module, nn.MultiHeadDotProductAttention):
        # It draws its mask itself, without an `nn.Dropout`. The module is this call's own copy,
        # frozen like every linen module, hence the detour.
        rate = module.dropout_rate
        object.__setattr__(module, "dropout_rate", 0.0)
        try:
            return next_function(*args, **kwargs)
        finally:
            object.__setattr__(module, "dropout_rate", rate)
    return next_function(*args, **kwargs)


def from_linen(module: nn.Module, *, method: Callable[..., Any] | str | None = None) -> Model:
    """A linen module as a `Model`.

    The module learns its mode through whichever of `train`, `training`, `is_training`,
    `use_running_average` and `deterministic` its call takes; if it takes none, through fields of
    these names; if it has none either (what a `**kwargs` may take is not known), it is called with
    the inputs alone. All collections but "params" make up the state, and in training mode all of
    them may change. A key serves every random stream of the module.

    Args:
        module: An unbound module. Its parameters must be floating.
        method: What to call in place of `__call__`: a method's name, or a function
            `method(module, inputs)` with any of the five flags besides. It adapts modules of other
            signatures: `lambda m, x, train: m(x["a"], x["b"], is_eval=not train)`.

    Returns:
        The `Model`. `init` computes initial values alone: the forward pass is compiled away.

    Raises:
        TypeError: From `init`, if a parameter is not floating, naming it; from `apply`, if `train`
            is not a Python bool.
        ValueError: From `apply`, if the module draws random numbers in training mode other than
            through flax's dropout and there is no key.

    Example:
        >>> model = from_linen(nn.Dense(2))
        >>> params, state = model.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> outputs, state = model.apply(params, state, jnp.ones((5, 3)), train=False)
        >>> outputs.shape, state
        ((5, 2), {})
    """
    if callable(method):
        names = _argument_names(method, skip=2)
    else:
        names = _argument_names(getattr(module, method or "__call__"), skip=1)
    in_call = [name for name in names if name in _FLAG_NAMES]
    fields = (
        [] if in_call else [f.name for f in dataclasses.fields(module) if f.name in _FLAG_NAMES]
    )

    def configured(train: bool, dropout: bool) -> tuple[nn.Module, dict[str, bool]]:
        if fields:
            return module.clone(**_flags(fields, train, dropout)), {}  # pyright: ignore[reportArgumentType]
        return module, _flags(in_call, train, dropout)

    # Under jit the forward pass, whose result nobody uses, is compiled away. (Newer versions of
    # flax's own `lazy_init` take inputs for zeros, also where initial values depend on them.)
    @jax.jit
    def initial(key: jax.Array, inputs: PyTree) -> Any:
        chosen, flags = configured(False, False)
        return chosen.init({"params": key}, inputs, method=method, **flags)

    def init(key: jax.Array, inputs: PyTree) -> tuple[PyTree, PyTree]:
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(inputs)):
            variables, other = (
                initial(key, jax.tree.map(lambda x, v=v: jnp.full(x.shape, v, x.dtype), inputs))
                for v in (0, 1)
            )
            if not _equal(variables, other):
                raise ValueError(
                    "init: this module's initial values depend on the values of its inputs, and "
                    "only their shapes were given; pass an example batch."
                )
        else:
            variables = initial(key, inputs)
        state = unfreeze(variables)
        params = state.pop("params", {})
        tree.check_floating(params, "the module's parameters")
        return params, state

    def apply(
        params: PyTree, state: PyTree, inputs: PyTree, train: bool, key: Any = None
    ) -> tuple[Any, PyTree]:
        _check_train(train)
        chosen, flags = configured(train, key is not None)
        # linen looks for the stream "params" where it lacks the one a module asks for.
        rngs = {} if key is None else {"dropout": key, "params": jax.random.fold_in(key, 1)}
        quiet = contextlib.nullcontext() if rngs else nn.intercept_methods(_without_dropout)
        try:
            with quiet:
                outputs, changed = chosen.apply(
                    {"params": params, **state},
                    inputs,
                    rngs=rngs,
                    method=method,
                    mutable=list(state),
                    **flags,
                )
        except errors.InvalidRngError as error:
            raise ValueError(
                "apply: without a key no random numbers may be drawn, but the module draws some "
                "outside flax's dropout layers; pass a key, or give `from_linen` a `method` that "
                f"turns them off. ({error})"
            ) from error
        return outputs, {**state, **changed} if train else state

    return Model(init, apply)


# ----------------------------------------------------------------------------------------- nnx


def _is_trainable(path: Any, variable: Any) -> bool:
    del path
    return isinstance(variable, nnx.Param) and all(
        jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(variable)
    )


def _split(module: nnx.Module) -> tuple[Any, ...]:
    """The module's graph, parameters, random streams and remaining state."""
    return tuple(nnx.split(module, _is_trainable, nnx.RngState, ...))


def _restart(key: Any, random_state: PyTree) -> PyTree:
    """The random streams of a module anew, each from a key of its own."""

    def one(i: int, leaf: Any) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.zeros(leaf.shape, leaf.dtype)
        own = jax.random.fold_in(jax.random.key(0) if key is None else key, i)
        return jax.random.split(own, leaf.shape) if leaf.shape else own

    leaves, treedef = jax.tree.flatten(random_state)
    return jax.tree.unflatten(treedef, [one(i, leaf) for i, leaf in enumerate(leaves)])


def _matching(before: Mapping[Any, Any], after: PyTree) -> PyTree:
    """The leaves of `after` in the structure of `before`; what a call added is dropped."""
    values = dict(jax.tree_util.tree_leaves_with_path(after))
    paths, treedef = jax.tree_util.tree_flatten_with_path(before)
    return jax.tree.unflatten(treedef, [values[path] for path, _ in paths])


def _check_structure(what: str, expected: list[str], given: PyTree) -> None:
    """Raise unless the leaves are those of the module: they are told apart by order alone."""
    actual = tree.paths(given)
    if actual != expected:
        missing = [path for path in expected if path not in actual]
        extra = [path for path in actual if path not in expected]
        raise ValueError(
            f"{what} is not that of the nnx module: leaves missing {missing[:3]}, unknown "
            f"{extra[:3]}; expected nested dicts as `from_nnx` returns them."
        )


def from_nnx(
    module: nnx.Module, *, method: Callable[..., Any] | None = None
) -> tuple[ApplyFn, PyTree, PyTree]:
    """An nnx module as a pure function, with its present parameters and state.

    `params` are the floating `nnx.Param`; `state` is all the rest but for random streams: each
    call starts these from its key, so the same call gives the same result. `params` and `state`
    are plain nested dicts of arrays; `nnx.update(module, params)` writes them back. The module
    itself is left alone, and its mode (`train()` or `eval()`) when it is given has no influence.

    Args:
        module: An nnx module, concrete or from `nnx.eval_shape`.
        method: A function `method(module, inputs)` to call in place of the module; like the
            module's own call it may also take `train`, `training`, `is_training`,
            `use_running_average`, `deterministic` and `rngs` (None without a key).

    Returns:
        `(apply_fn, params, state)`. With no key, dropout is off in flax's layers; other random
        numbers that the module draws are then the same at each call.

    Raises:
        TypeError: From `apply_fn`, if `train` is not a Python bool.
        ValueError: From `apply_fn`, if parameters or state are not those of the module.

    Example:
        >>> apply_fn, params, state = from_nnx(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
        >>> outputs, state = apply_fn(params, state, jnp.ones((5, 3)), train=False)
        >>> outputs.shape, state
        ((5, 2), {})
    """
    call: Any = method or type(module).__call__
    names = _argument_names(call, skip=2)
    graph, *parts = _split(module)
    params, random_state, state = (nnx.to_pure_dict(part) for part in parts)
    treedefs = [jax.tree.structure(part) for part in parts]
    parameter_paths, state_paths = tree.paths(params), tree.paths(state)

    def apply(
        params: PyTree, state: PyTree, inputs: PyTree, train: bool, key: Any = None
    ) -> tuple[Any, PyTree]:
        _check_train(train)
        _check_structure("params", parameter_paths, params)
        _check_structure("state", state_paths, state)
        restarted = _restart(key, random_state)
        # Unflattening makes new variables: those of a split state are the module's own.
        fresh = [
            jax.tree.unflatten(treedef, jax.tree.leaves(part))
            for treedef, part in zip(treedefs, (params, restarted, state), strict=True)
        ]
        copy = nnx.merge(graph, *fresh)
        if train:
            copy.train()
        else:
            copy.eval()
        if key is None:
            copy.set_attributes(nnx.Dropout, rate=0.0, raise_if_not_found=False)
            copy.set_attributes(nnx.MultiHeadAttention, dropout_rate=0.0, raise_if_not_found=False)
        flags: dict[str, Any] = _flags(names, train, key is not None)
        if "rngs" in names:
            flags["rngs"] = None if key is None else nnx.Rngs(key)
        outputs = call(copy, inputs, **flags)
        if not train:
            return outputs, state
        return outputs, _matching(state, nnx.to_pure_dict(_split(copy)[3]))

    return apply, params, state
