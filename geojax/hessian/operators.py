"""The Hessian over a data set as an operator: whole, of some parameters, or block by block."""

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from geojax import batches as batches_
from geojax import tree
from geojax.hessian import products, selection, sources
from geojax.hessian.products import Mode
from geojax.hessian.selection import Selection
from geojax.krylov import Operator

__all__ = ["hessian", "layer_blocks", "off_diagonal_block", "relative_difference"]

PyTree = Any
Reduction = Literal["mean", "sum"]
_scale = jax.jit(tree.scale)
_axpy = jax.jit(tree.axpy)
_norm = jax.jit(tree.norm)


class Setting:
    """What every operator over data has in common: its parameters, its data and its checks.

    Attributes:
        selected: The parameters that vectors resemble.
        frozen: The others.
        source: The batches, as `batches.mean` reads them.
    """

    def __init__(
        self,
        params: PyTree,
        batches: Any,
        *,
        select: Selection,
        key: jax.Array | None,
        keyed: bool,
        what: str,
        numbered: bool,
        weight_fn: Callable[[PyTree], jax.Array] | None,
        mesh: Mesh | NamedSharding | None,
        microbatch: int | None,
        reduction: str,
        precision: str | None,
        upcast: bool,
        loss_fn: Callable,
        mode: str = "forward_over_reverse",
    ):
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is {reduction!r}; expected 'mean' or 'sum'.")
        products.check_precision(precision)
        products.check_key(keyed, key, what)
        self.params = params
        self.selected, self.frozen = selection.select(params, select)
        _check_arrays(self.frozen)
        products.check_dtypes(self.selected, upcast, mode)
        source = batches_.as_batches(batches)
        if microbatch is not None:
            source = sources.recut(source, microbatch)
        if numbered:
            source = sources.numbered(source)
            weight_fn = None if weight_fn is None else sources.unnumbered_weight(weight_fn)
        self.source, self.weight_fn, self.mesh = source, weight_fn, mesh
        self.key = key if numbered else None
        self.reduction = reduction
        self._total: float | None = None
        if microbatch is not None:
            # The batches as they came, for one that is cut already shows no coupling.
            whole = batches_.as_batches(batches)
            whole = sources.numbered(whole) if numbered else whole
            value = products.cached(sources.jitted_value, loss_fn, precision, upcast)
            sources.check_uncoupled(value, self.selected, self.frozen, self.key, whole, weight_fn)

    def narrowed(self, select: Selection) -> "Setting":
        """The same for other parameters, without checking the data again."""
        out = copy.copy(self)
        out.selected, out.frozen = selection.select(self.params, select)
        return out

    def averaged(self, product: Callable, like: PyTree | None = None) -> Callable:
        """`(v, *extra) ->` the product over all data, sharded like the parameters."""
        mean = batches_.mean(product, self.source, weight_fn=self.weight_fn, mesh=self.mesh)
        like = self.selected if like is None else like

        def apply(v: PyTree, *extra: Any) -> PyTree:
            out = mean(self.selected, self.frozen, v, *extra, self.key)
            if self.reduction == "sum":
                out = _scale(self._weight(), out)
            return _placed(out, like)

        return apply

    def _weight(self) -> float:
        if self._total is None:
            with jax.ensure_compile_time_eval():  # the first product may be within a trace
                self._total = sources.total_weight(self.source, self.weight_fn, self.mesh)
        return self._total

    def operator(
        self, product: Callable, block: Callable | None, *, name: str, psd: bool, extra: Any = tuple
    ) -> Operator:
        """The operator of a product with one vector and of one with many.

        `extra()` gives what stands between the vector and the key in their arguments.
        """
        one = self.averaged(product)
        many = None if block is None else self.averaged(block)
        return Operator(
            lambda v: one(v, *extra()),
            self.selected,
            matmat=None if many is None else lambda vs: many(vs, *extra()),
            name=name,
            psd=psd,
        )


def _check_arrays(frozen: PyTree) -> None:
    for name, leaf in zip(tree.paths(frozen), jax.tree.leaves(frozen), strict=True):
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float, complex)):
            raise TypeError(
                f"params: leaf {name} is a {type(leaf).__name__}; expected arrays. Split it off "
                "with `tree.partition` and merge it within the loss."
            )


def _placed(out: PyTree, like: PyTree) -> PyTree:
    """The product in the sharding of the parameters, which an Auto mesh need not keep."""

    def one(x, p):
        if isinstance(x, Tracer) or isinstance(p, Tracer) or not isinstance(p, jax.Array):
            return x
        sharding = p.sharding
        if not isinstance(sharding, NamedSharding) or len(sharding.device_set) == 1:
            return x
        if x.ndim > p.ndim:
            sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
        return x if x.sharding.is_equivalent_to(sharding, x.ndim) else jax.device_put(x, sharding)

    return jax.tree.map(one, out, like)


def hessian(
    loss_fn: Callable[..., jax.Array],
    params: PyTree,
    batches: Any,
    *,
    select: Selection = None,
    key: jax.Array | None = None,
    mode: Mode = "forward_over_reverse",
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
    mesh: Mesh | NamedSharding | None = None,
    microbatch: int | None = None,
    reduction: Reduction = "mean",
    precision: str | None = "highest",
    upcast: bool = False,
    step: float | None = None,
) -> Operator:
    r"""The Hessian of the mean loss over a data set, as an operator.

    With batches b of weight :math:`w_b` a product is
    :math:`\sum_b w_b \nabla^2 L_b(\theta)\, v / \sum_b w_b`: one pass over the data, 2.67 gradients
    for dense layers. `matmat` makes one pass for all its vectors and shares what does not depend on
    them: 2.2 gradients a vector at four vectors, at the memory of that many tangents.

    The product is compiled once for a loss and a batch shape, whatever the parameters; a last batch
    that is smaller is computed as it is, which compiles a second program.

    Args:
        loss_fn: `loss_fn(params, batch)` or `loss_fn(params, batch, key)`, the mean over the batch.
        params: Pytree of floating arrays, sharded or not. The operator holds them, and stays at
            this point.
        batches: One batch or a re-iterable of batches, the same on every pass.
        select: Which parameters the Hessian is of; see `select`. The others are constants.
        key: For a loss that takes one. Each batch gets a fixed key, so that the operator is one
            matrix: that of one draw of the masks.
        mode: As for `hvp`.
        weight_fn: `weight_fn(batch)`, by default the number of examples. Where the loss is a mean
            over unmasked tokens, it must count those.
        mesh: Split each batch over this mesh's first axis (or as a `NamedSharding` says).
        microbatch: Cut each batch into pieces of at most this many examples, for less memory.
            Refused where the loss of an example depends on the others.
        reduction: 'sum' for the Hessian of the sum over the data, the mean times the weight of all.
        precision: As for `hvp`: the model's products run at full precision unless told otherwise.
        upcast: As for `hvp`.
        step: As for `hvp`.

    Returns:
        An operator on pytrees like the selected parameters (None elsewhere), in float32 or better.
        Differences of one product from exact arithmetic are `relative_difference` of two operators.

    Raises:
        TypeError: For a one-shot generator, a leaf that is not floating, or a missing key.
        ValueError: For an empty selection, an unknown option, or a batch-coupled loss that was to
            be cut.

    Example:
        >>> import jax.numpy as jnp
        >>> loss = lambda params, batch: jnp.mean((batch["x"] @ params["w"]) ** 2)
        >>> data = {"x": jnp.array([[1.0, 0.0], [0.0, 2.0]])}
        >>> operator = hessian(loss, {"w": jnp.zeros(2)}, data)
        >>> operator({"w": jnp.array([1.0, 1.0])})["w"].tolist()
        [1.0, 4.0]
    """
    selection.warn_of_copies(params)
    setting = _of_loss(
        loss_fn,
        params,
        batches,
        select,
        mode=mode,
        step=step,
        key=key,
        weight_fn=weight_fn,
        mesh=mesh,
        microbatch=microbatch,
        reduction=reduction,
        precision=precision,
        upcast=upcast,
    )
    one, many = products.cached(products.hessian_products, loss_fn, mode, precision, upcast, step)
    return setting.operator(one, many, name="Hessian", psd=False)


def _of_loss(
    loss_fn: Callable,
    params: PyTree,
    batches: Any,
    select: Selection,
    *,
    mode: Mode = "forward_over_reverse",
    step: float | None = None,
    **options: Any,
) -> Setting:
    products.check_mode(mode, step)
    keyed = products.takes_key(loss_fn)
    return Setting(
        params,
        batches,
        select=select,
        keyed=keyed,
        what="loss_fn",
        numbered=keyed,
        loss_fn=loss_fn,
        mode=mode,
        **options,
    )


def layer_blocks(
    loss_fn: Callable[..., jax.Array],
    params: PyTree,
    batches: Any,
    *,
    groups: Mapping[str, Selection] | None = None,
    key: jax.Array | None = None,
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
    mesh: Mesh | NamedSharding | None = None,
    microbatch: int | None = None,
    reduction: Reduction = "mean",
    precision: str | None = "highest",
    upcast: bool = False,
) -> dict[str, Operator]:
    """The diagonal blocks of the Hessian, one for each layer.

    Each is `hessian` of that layer's parameters: its product computes no tangents in front of the
    layer and no gradients of the others, and is compiled the first time that it is used. (To pay
    for one compilation alone and a full product each time, `krylov.restrict` the whole operator.)

    Args:
        loss_fn: As for `hessian`.
        params: As for `hessian`.
        batches: As for `hessian`.
        groups: From the name of each block to what it holds, as `select` takes it; by default
            `layers(params)`, the leaves whose paths differ in the last key alone.
        key: As for `hessian`.
        weight_fn: As for `hessian`.
        mesh: As for `hessian`.
        microbatch: As for `hessian`.
        reduction: As for `hessian`.
        precision: As for `hessian`.
        upcast: As for `hessian`.

    Returns:
        From the name of a block to its operator.

    Raises:
        ValueError: If a group selects nothing, listing the paths.
    """
    if groups is None:
        names = selection.layers(params)
        groups = {
            layer: functools.partial(_is_one_of, frozenset(paths)) for layer, paths in names.items()
        }
    selection.warn_of_copies(params)
    setting = _of_loss(
        loss_fn,
        params,
        batches,
        list(groups.values()),
        key=key,
        weight_fn=weight_fn,
        mesh=mesh,
        microbatch=microbatch,
        reduction=reduction,
        precision=precision,
        upcast=upcast,
    )
    one, many = products.cached(
        products.hessian_products, loss_fn, "forward_over_reverse", precision, upcast, None
    )
    return {
        name: setting.narrowed(spec).operator(one, many, name=f"Hessian of {name}", psd=False)
        for name, spec in groups.items()
    }


def _is_one_of(names: frozenset[str], path: str, leaf: Any) -> bool:
    del leaf
    return path in names


def off_diagonal_block(
    loss_fn: Callable[..., jax.Array],
    params: PyTree,
    batches: Any,
    rows: Selection,
    columns: Selection,
    *,
    key: jax.Array | None = None,
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
    mesh: Mesh | NamedSharding | None = None,
    microbatch: int | None = None,
    reduction: Reduction = "mean",
    precision: str | None = "highest",
    upcast: bool = False,
) -> Callable[[PyTree], PyTree]:
    """The block of the Hessian between two sets of parameters, as a function of a vector.

    Args:
        loss_fn: As for `hessian`.
        params: As for `hessian`.
        batches: As for `hessian`.
        rows: The parameters of the rows, as `select` takes it.
        columns: The parameters of the columns; the two may overlap.
        key: As for `hessian`.
        weight_fn: As for `hessian`.
        mesh: As for `hessian`.
        microbatch: As for `hessian`.
        reduction: As for `hessian`.
        precision: As for `hessian`.
        upcast: As for `hessian`.

    Returns:
        `product(v)`: from a vector like the columns' parameters to one like the rows'.

    Raises:
        ValueError: If one of the two selects nothing, listing the paths.
    """
    selection.warn_of_copies(params)
    setting = _of_loss(
        loss_fn,
        params,
        batches,
        columns,
        key=key,
        weight_fn=weight_fn,
        mesh=mesh,
        microbatch=microbatch,
        reduction=reduction,
        precision=precision,
        upcast=upcast,
    )
    across, _ = selection.select(params, rows)
    apply = setting.averaged(products.cached(_cross_product, loss_fn, precision, upcast), across)

    def product(v: PyTree) -> PyTree:
        tree.check_same(setting.selected, v, names=("the columns", "the vector"), dtype=False)
        tree.check_floating(v, "the vector")
        return apply(v, across)

    return product


@functools.lru_cache(maxsize=32)
def _cross_product(loss_fn: Callable, precision: str | None, upcast: bool) -> Callable:
    keyed = products.takes_key(loss_fn)

    def product(columns, frozen, v, across, key, batch):
        def gradient(c):
            here = tree.merge(c, products.working(frozen, upcast))
            r = _where(across, here, True)
            rest = _where(across, here, False)

            def loss(r):
                whole = tree.merge(r, rest)
                if keyed:
                    k = products.batch_key(key, batch)
                    return products.scalar(loss_fn(whole, batch.batch, k))
                return products.scalar(loss_fn(whole, batch))

            return jax.grad(loss)(r)

        c = products.working(columns, upcast)
        with products.matmul_precision(precision), products.explained(gradient, c):
            out = jax.jvp(gradient, (c,), (products.like_params(c, v),))[1]
            return products.widen(out, across)

    return product


def _where(mask: PyTree, params: PyTree, present: bool) -> PyTree:
    """The leaves of `params` that `mask` has, or those that it lacks; None in place of the rest."""
    return jax.tree.map(
        lambda m, x: x if (m is not None) == present else None,
        mask,
        params,
        is_leaf=lambda x: x is None,
    )


def relative_difference(
    operator: Operator, reference: Operator, *, key: jax.Array, num_vectors: int = 2
) -> float:
    r"""How far the products of two operators are apart, :math:`\|(A - B) v\| / \|B v\|`.

    The relative error of a product where the reference is the same operator in exact, or more
    exact, arithmetic: `precision=None` against 'highest', bfloat16 against `upcast=True`, one
    step of a finite difference against half of it. No eigenvalue can be had to less than this
    fraction of the largest.

    Args:
        operator: A.
        reference: B, on the same space.
        key: The key of the random vectors.
        num_vectors: How many normal vectors to take the root mean square over.

    Returns:
        The ratio; 0 where both products vanish, infinity where the reference's alone does.

    Raises:
        ValueError: If the two act on different spaces, naming the leaf.

    Example:
        >>> from geojax import krylov
        >>> a = krylov.from_matrix(np.eye(3))
        >>> round(relative_difference(1.01 * a, a, key=jax.random.key(0)), 4)
        0.01
    """
    tree.check_same(
        operator.like, reference.like, names=(operator.name, reference.name), dtype=False
    )
    gap, size = 0.0, 0.0
    for i in range(num_vectors):
        v = reference.random(jax.random.fold_in(key, i))
        exact = reference(v)
        gap += float(_norm(_axpy(-1.0, exact, operator(v)))) ** 2
        size += float(_norm(exact)) ** 2
    if size == 0:
        return 0.0 if gap == 0 else float("inf")
    return (gap / size) ** 0.5
