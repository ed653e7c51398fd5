"""Gauss-Newton and Fisher matrices over a data set, as operators: exact Jacobian products."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from geojax import batches as batches_
from geojax import tree
from geojax.hessian import products, selection
from geojax.hessian.operators import Reduction, Setting
from geojax.hessian.output_losses import OutputLoss
from geojax.hessian.selection import Selection
from geojax.krylov import Operator

__all__ = ["empirical_fisher", "fisher", "ggn"]

PyTree = Any
Jacobian = Literal["forward", "transposed"]
Loss = OutputLoss | Callable[[PyTree, PyTree], jax.Array]

_REMEDY = (
    "Products with the Jacobian need the forward derivative: use jacobian='transposed', which "
    "makes it of the backward rule, or a plain implementation of the function (attention has "
    "implementation='xla'). `hessian` works where the rule is made of ordinary operations."
)


def ggn(
    model_fn: Callable[..., PyTree],
    output_loss: Loss,
    params: PyTree,
    batches: Any,
    *,
    select: Selection = None,
    key: jax.Array | None = None,
    psd: bool | None = None,
    jacobian: Jacobian = "forward",
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
    mesh: Mesh | NamedSharding | None = None,
    microbatch: int | None = None,
    reduction: Reduction = "mean",
    precision: str | None = "highest",
    upcast: bool = False,
) -> Operator:
    r"""The generalized Gauss-Newton matrix of the mean loss over a data set, as an operator.

    :math:`G = \sum_b w_b\, J_b^T H_b J_b / \sum_b w_b`, with J the Jacobian of the outputs in the
    parameters and H the Hessian of the loss in the outputs. A product is exact, one pass over the
    data at 1.67 gradients for dense layers: one linearization, forward and transposed. It is the
    Hessian for a model linear in its parameters, and `hessian(...) - ggn(...)` is what it leaves
    out.

    Args:
        model_fn: `model_fn(params, batch)` or `model_fn(params, batch, key)`, the outputs: an
            array, or for a loss of your own any pytree.
        output_loss: One of `output_losses`, or any `fn(outputs, batch) -> scalar`, the mean over
            the batch, which is differentiated twice.
        params: Pytree of floating arrays.
        batches: As for `hessian`.
        select: As for `hessian`.
        key: As for `hessian`, for a model that takes one.
        psd: Whether the loss is convex in the outputs; by default what is known of one of
            `output_losses`, and False for a function.
        jacobian: 'forward', or 'transposed' to make J v by transposing the transposed product
            twice, for models with a `jax.custom_vjp` rule.
        weight_fn: As for `hessian`. By default the sum of the mask of a loss that has one.
        mesh: As for `hessian`.
        microbatch: As for `hessian`.
        reduction: As for `hessian`.
        precision: As for `hessian`.
        upcast: As for `hessian`.

    Returns:
        An operator on pytrees like the selected parameters.

    Raises:
        TypeError: As `hessian`; at the first product if the model has no forward derivative.
        ValueError: As `hessian`.

    Example:
        >>> from geojax.hessian import output_losses
        >>> model = lambda params, batch: batch["x"] @ params["w"]
        >>> data = {"x": jnp.array([[1.0, 0.0], [0.0, 2.0]]), "labels": jnp.zeros(2)}
        >>> operator = ggn(model, output_losses.mse(), {"w": jnp.zeros(2)}, data)
        >>> operator({"w": jnp.array([1.0, 1.0])})["w"].tolist()
        [1.0, 4.0]

    Reference:
        Schraudolph, Fast curvature matrix-vector products, 2002; Martens, New insights and
        perspectives on the natural gradient method, 2020, section 8.
    """
    _check_jacobian(jacobian)
    keyed = products.takes_key(model_fn)
    known = isinstance(output_loss, OutputLoss)
    if known and output_loss.masked and weight_fn is None:
        weight_fn = _mask_weight(output_loss)
    selection.warn_of_copies(params)
    setting = Setting(
        params,
        batches,
        select=select,
        key=key,
        keyed=keyed,
        what="model_fn",
        numbered=keyed,
        weight_fn=weight_fn,
        mesh=mesh,
        microbatch=microbatch,
        reduction=reduction,
        precision=precision,
        upcast=upcast,
        loss_fn=products.cached(_whole_loss, model_fn, output_loss),
    )
    one, many = products.cached(_ggn_products, model_fn, output_loss, jacobian, precision, upcast)
    if psd is None:
        psd = known and output_loss.convex
    return setting.operator(one, many, name="Gauss-Newton", psd=psd)


def _check_jacobian(jacobian: str) -> None:
    if jacobian not in ("forward", "transposed"):
        raise ValueError(f"jacobian is {jacobian!r}; expected 'forward' or 'transposed'.")


@functools.lru_cache(maxsize=32)
def _mask_weight(loss: OutputLoss) -> Callable[[PyTree], jax.Array]:
    return lambda batch: loss.weight(batch)


@functools.lru_cache(maxsize=32)
def _whole_loss(model_fn: Callable, output_loss: Loss) -> Callable:
    if products.takes_key(model_fn):
        return lambda params, batch, key: output_loss(model_fn(params, batch, key), batch)
    return lambda params, batch: output_loss(model_fn(params, batch), batch)


def _check_outputs(outputs: PyTree) -> None:
    for name, leaf in zip(tree.paths(outputs), jax.tree.leaves(outputs), strict=True):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"model_fn: output {name} is {jnp.result_type(leaf)}; expected floating arrays "
                "alone. Leave it out of what the model function returns."
            )


def _linear_model(
    model: Callable[[PyTree], PyTree], params: PyTree, jacobian: Jacobian
) -> tuple[PyTree, Callable[[PyTree], PyTree], Callable[[PyTree], PyTree]]:
    """The outputs, and the products with the Jacobian and with its transpose."""
    if jacobian == "transposed":
        outputs, pull = jax.vjp(model, params)
        _check_outputs(outputs)

        def forward(v):
            return jax.linear_transpose(lambda u: pull(u)[0], outputs)(v)[0]

        return outputs, forward, lambda u: pull(u)[0]
    with products.explained(model, params, what="the model", remedy=_REMEDY):
        outputs, linear = jax.linearize(model, params)
        _check_outputs(outputs)
        # A custom rule passes linearization, as its transpose is known, and fails when compiled.
        found = products.equations(jax.make_jaxpr(linear)(params).jaxpr)
        if any(equation.primitive.name == "custom_lin" for equation in found):
            raise NotImplementedError("custom_lin")
    return outputs, linear, lambda u: jax.linear_transpose(linear, params)(u)[0]


def _curvature(output_loss: Loss, outputs: PyTree, batch: PyTree) -> Callable[[PyTree], PyTree]:
    if isinstance(output_loss, OutputLoss):
        return lambda u: output_loss.hessian_product(outputs, batch, u)
    gradient = jax.grad(lambda o: products.scalar(output_loss(o, batch)))
    return lambda u: jax.jvp(gradient, (outputs,), (u,))[1]


@functools.lru_cache(maxsize=32)
def _ggn_products(
    model_fn: Callable, output_loss: Loss, jacobian: Jacobian, precision: str | None, upcast: bool
) -> tuple[Callable, Callable]:
    keyed = products.takes_key(model_fn)

    def linear(selected, frozen, key, batch):
        plain = batch.batch if keyed else batch

        def model(p):
            whole = tree.merge(p, products.working(frozen, upcast))
            if keyed:
                return model_fn(whole, plain, products.batch_key(key, batch))
            return model_fn(whole, plain)

        outputs, forward, back = _linear_model(model, selected, jacobian)
        curve = _curvature(output_loss, outputs, plain)
        return lambda v: back(curve(forward(v)))

    return _pair(linear, precision, upcast)


def _pair(linear: Callable, precision: str | None, upcast: bool) -> tuple[Callable, Callable]:
    """The products with one vector and with many of `linear(selected, frozen, *rest)(v)`."""

    def with_(apply):
        def product(selected, frozen, v, *rest):
            p = products.working(selected, upcast)
            with products.matmul_precision(precision):
                return products.widen(
                    apply(linear(p, frozen, *rest), products.like_params(p, v)), selected
                )

        return product

    return with_(lambda fn, v: fn(v)), with_(products.linear_many)


def fisher(
    model_fn: Callable[..., jax.Array],
    output_loss: OutputLoss,
    params: PyTree,
    batches: Any,
    *,
    key: jax.Array,
    num_samples: int = 1,
    select: Selection = None,
    jacobian: Jacobian = "forward",
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
    mesh: Mesh | NamedSharding | None = None,
    microbatch: int | None = None,
    reduction: Reduction = "mean",
    precision: str | None = "highest",
    upcast: bool = False,
) -> Operator:
    r"""The Fisher matrix from labels drawn of the model's predictions, as an operator.

    :math:`F = \frac{1}{S} \sum_s E\,[J^T g_s g_s^T J]`, with :math:`g_s` the gradient of the loss
    in the outputs for a drawn label. Its expectation over the draws is `ggn`, which costs the same
    and has no variance; this is for comparison with methods that sample. Each label that is drawn
    independently is a term of its own: a position of a softmax, an output of the other losses.

    The draws are fixed by `key` and the number of the example, so that the operator is one matrix,
    and the same one however the data is cut into batches or spread over devices.

    Args:
        model_fn: As for `ggn`; the outputs are one array.
        output_loss: One of `output_losses` that is a likelihood.
        params: As for `hessian`.
        batches: As for `hessian`.
        key: A typed key for the draws, and for a model that takes one.
        num_samples: S, labels drawn for each term; the model is linearized but once for all.
        select: As for `hessian`.
        jacobian: As for `ggn`.
        weight_fn: As for `ggn`.
        mesh: As for `hessian`.
        microbatch: As for `hessian`.
        reduction: As for `hessian`.
        precision: As for `hessian`.
        upcast: As for `hessian`.

    Returns:
        A positive semidefinite operator on pytrees like the selected parameters.

    Raises:
        TypeError: If `output_loss` is no likelihood; else as `ggn`.
        ValueError: As `hessian`.

    Reference:
        Kunstner, Hennig, Balles, Limitations of the empirical Fisher approximation, 2019.
    """
    _check_jacobian(jacobian)
    if not isinstance(output_loss, OutputLoss) or not output_loss.likelihood:
        name = getattr(output_loss, "name", type(output_loss).__name__)
        raise TypeError(
            f"fisher: {name} is no likelihood of which labels can be drawn; expected "
            "`output_losses.softmax_cross_entropy()` (without z-loss), `mse`, "
            "`binary_cross_entropy` or `poisson`. `ggn` takes any loss."
        )
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"num_samples is {num_samples!r}; expected a positive integer.")
    if weight_fn is None and output_loss.masked:
        weight_fn = _mask_weight(output_loss)
    selection.warn_of_copies(params)
    setting = Setting(
        params,
        batches,
        select=select,
        key=key,
        keyed=True,
        what="fisher",
        numbered=True,
        weight_fn=weight_fn,
        mesh=mesh,
        microbatch=microbatch,
        reduction=reduction,
        precision=precision,
        upcast=upcast,
        loss_fn=products.cached(_whole_loss, model_fn, output_loss),
    )
    one, many = products.cached(
        _fisher_products, model_fn, output_loss, num_samples, jacobian, precision, upcast
    )
    return setting.operator(one, many, name="Fisher", psd=True)


@functools.lru_cache(maxsize=32)
def _fisher_products(
    model_fn: Callable,
    loss: OutputLoss,
    num_samples: int,
    jacobian: Jacobian,
    precision: str | None,
    upcast: bool,
) -> tuple[Callable, Callable]:
    keyed = products.takes_key(model_fn)

    def linear(selected, frozen, key, batch):
        for_model, for_labels = jax.random.split(key)
        plain = batch.batch

        def model(p):
            whole = tree.merge(p, products.working(frozen, upcast))
            if keyed:
                return model_fn(whole, plain, products.batch_key(for_model, batch))
            return model_fn(whole, plain)

        outputs, forward, back = _linear_model(model, selected, jacobian)
        rows = jnp.asarray(batch.rows)
        if outputs.ndim and outputs.shape[0] == rows.shape[0]:
            rows = products.sharded_like(outputs, rows)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(for_labels, rows)
        else:
            keys = products.batch_key(for_labels, batch)

        def once(index, u):
            fold = jax.vmap(jax.random.fold_in, (0, None)) if keys.ndim else jax.random.fold_in
            return loss.sampled_product(fold(keys, index), outputs, plain, u)

        def curve(u):
            if num_samples == 1:
                return once(0, u)
            wide = u.astype(tree.accumulation_dtype(u))
            total, _ = jax.lax.scan(
                lambda t, i: (t + once(i, wide), None),
                jnp.zeros_like(wide),
                jnp.arange(num_samples),
            )
            return (total / num_samples).astype(u.dtype)

        return lambda v: back(curve(forward(v)))

    return _pair(linear, precision, upcast)


def empirical_fisher(
    per_example_loss_fn: Callable[..., jax.Array],
    params: PyTree,
    batches: Any,
    *,
    centered: bool = False,
    select: Selection = None,
    key: jax.Array | None = None,
    jacobian: Jacobian = "forward",
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
    mesh: Mesh | NamedSharding | None = None,
    microbatch: int | None = None,
    reduction: Reduction = "mean",
    precision: str | None = "highest",
    upcast: bool = False,
) -> Operator:
    r"""The second moment of the examples' gradients over a data set, as an operator.

    :math:`\frac{1}{N} \sum_i g_i g_i^T`, or with `centered` the covariance
    :math:`\frac{1}{N} \sum_i (g_i - \bar g)(g_i - \bar g)^T`. No gradient of an example is ever
    formed: a product is the derivative of the losses along v and its transpose, 1.67 gradients for
    dense layers, in the memory of one gradient of the batch.

    Args:
        per_example_loss_fn: `(params, batch)` or `(params, batch, key)`, giving the loss of each
            example, `(n,)`, or of each token, `(n, t)`: every entry counts as one sample.
        params: As for `hessian`.
        batches: As for `hessian`.
        centered: Subtract the mean gradient over all the data, which is found by one more pass
            before the first product.
        select: As for `hessian`.
        key: As for `hessian`.
        jacobian: As for `ggn`.
        weight_fn: As for `hessian`.
        mesh: As for `hessian`.
        microbatch: As for `hessian`.
        reduction: As for `hessian`.
        precision: As for `hessian`.
        upcast: As for `hessian`.

    Returns:
        A positive semidefinite operator on pytrees like the selected parameters.

    Raises:
        ValueError: If the losses are a scalar; else as `hessian`.
        TypeError: As `hessian`.

    Example:
        >>> losses = lambda params, batch: batch["x"] @ params["w"]
        >>> data = {"x": jnp.array([[1.0, 0.0], [3.0, 0.0]])}
        >>> v = {"w": jnp.array([1.0, 0.0])}
        >>> empirical_fisher(losses, {"w": jnp.zeros(2)}, data)(v)["w"].tolist()
        [5.0, 0.0]
        >>> empirical_fisher(losses, {"w": jnp.zeros(2)}, data, centered=True)(v)["w"].tolist()
        [1.0, 0.0]
    """
    _check_jacobian(jacobian)
    keyed = products.takes_key(per_example_loss_fn)
    mean_loss = products.cached(_mean_loss, per_example_loss_fn)
    selection.warn_of_copies(params)
    setting = Setting(
        params,
        batches,
        select=select,
        key=key,
        keyed=keyed,
        what="per_example_loss_fn",
        numbered=keyed,
        weight_fn=weight_fn,
        mesh=mesh,
        microbatch=microbatch,
        reduction=reduction,
        precision=precision,
        upcast=upcast,
        loss_fn=mean_loss,
    )
    one, many, gradient = products.cached(
        _empirical_products, per_example_loss_fn, jacobian, precision, upcast
    )
    if not centered:
        return setting.operator(one, many, name="empirical Fisher", psd=True, extra=lambda: (None,))

    @functools.cache
    def extra():
        mean = batches_.mean(gradient, setting.source, weight_fn=setting.weight_fn, mesh=mesh)
        with jax.ensure_compile_time_eval():  # the first product may be within a trace
            return (mean(setting.selected, setting.frozen, setting.key),)

    return setting.operator(one, many, name="gradient covariance", psd=True, extra=extra)


@functools.lru_cache(maxsize=32)
def _mean_loss(per_example_loss_fn: Callable) -> Callable:
    if products.takes_key(per_example_loss_fn):
        return lambda params, batch, key: jnp.mean(per_example_loss_fn(params, batch, key))
    return lambda params, batch: jnp.mean(per_example_loss_fn(params, batch))


@functools.lru_cache(maxsize=32)
def _empirical_products(
    per_example_loss_fn: Callable, jacobian: Jacobian, precision: str | None, upcast: bool
) -> tuple[Callable, Callable, Callable]:
    keyed = products.takes_key(per_example_loss_fn)

    def losses_of(frozen, key, batch):
        def losses(p):
            whole = tree.merge(p, products.working(frozen, upcast))
            if keyed:
                out = per_example_loss_fn(whole, batch.batch, products.batch_key(key, batch))
            else:
                out = per_example_loss_fn(whole, batch)
            num = batches_.num_examples(batch)
            if not hasattr(out, "shape") or not out.ndim or out.shape[0] != num:
                raise ValueError(
                    f"per_example_loss_fn returned shape {jnp.shape(out)}; expected ({num}, ...), "
                    "the loss of each example, not their mean."
                )
            return out

        return losses

    def linear(selected, frozen, mean_gradient, key, batch):
        losses, forward, back = _linear_model(losses_of(frozen, key, batch), selected, jacobian)

        def apply(v):
            slopes = forward(v).astype(tree.accumulation_dtype(losses))
            if mean_gradient is not None:
                # Taking the mean off the slopes is exact over all the data, where they sum to
                # zero, and loses fewer digits than taking it off the product.
                slopes = slopes - tree.vdot(mean_gradient, v).astype(slopes.dtype)
            return back((slopes / losses.size).astype(losses.dtype))

        return apply

    def gradient(selected, frozen, key, batch):
        p = products.working(selected, upcast)
        with products.matmul_precision(precision):
            return jax.grad(lambda p: jnp.mean(losses_of(frozen, key, batch)(p)))(p)

    return *_pair(linear, precision, upcast), gradient
