"""Networks by name, with options that are plain JSON.

A name and its options are all that a script's command line or a checkpoint has to keep.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import linen as nn

from geojax.models.adapters import Model, from_linen
from geojax.models.cnn import CNN, ConvFC, LeNet
from geojax.models.gpt import GPT
from geojax.models.mlp import MLP
from geojax.models.resnet import CifarResNet, PreResNet, ResNet, WideResNet
from geojax.models.vgg import VGG
from geojax.models.vit import ViT

__all__ = ["NAMES", "build", "options"]


class _Entry(NamedTuple):
    """A network class, what the name fixes, and other defaults than the class's own."""

    module: Callable[..., nn.Module]
    fixed: Mapping[str, Any] = {}
    defaults: Mapping[str, Any] = {}


_LLAMA = {"positions": "rope", "mlp": "swiglu", "norm": "rms", "bias": False, "tied": False}

_ENTRIES = {
    "mlp": _Entry(MLP),
    "cnn": _Entry(CNN),
    "lenet": _Entry(LeNet),
    "convfc": _Entry(ConvFC),
    "vgg": _Entry(VGG),
    "vgg16": _Entry(VGG, {"depth": 16}),
    "vgg19": _Entry(VGG, {"depth": 19}),
    "cifar_resnet": _Entry(CifarResNet),
    "resnet20": _Entry(CifarResNet, {"depth": 20}),
    "preresnet": _Entry(PreResNet),
    "preresnet110": _Entry(PreResNet, {"depth": 110}),
    "preresnet164": _Entry(PreResNet, {"depth": 164}),
    "wide_resnet": _Entry(WideResNet),
    "wide_resnet28x10": _Entry(WideResNet, {"depth": 28, "widen_factor": 10}),
    "resnet": _Entry(ResNet),
    "resnet50": _Entry(ResNet, {"depth": 50}),
    "vit": _Entry(ViT),
    "vit_b16": _Entry(
        ViT,
        {
            "patch_size": 16,
            "width": 768,
            "num_layers": 12,
            "num_heads": 12,
            "mlp_width": 3072,
            "pool": "cls",
        },
        {"num_classes": 1000},
    ),
    "gpt": _Entry(GPT),
    "gpt2_small": _Entry(
        GPT,
        {
            "width": 768,
            "num_layers": 12,
            "num_heads": 12,
            "num_kv_heads": 12,
            "mlp_width": 3072,
            "positions": "learned",
            "mlp": "gelu_tanh",
            "norm": "layer",
            "bias": True,
            "tied": True,
        },
        {"vocab_size": 50257, "max_length": 1024},
    ),
    "llama_7b": _Entry(
        GPT,
        {"width": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 32, "mlp_width": 11008}
        | _LLAMA,
        {"vocab_size": 32000, "max_length": 2048, "norm_epsilon": 1e-6},
    ),
    "tinyllama": _Entry(
        GPT,
        {"width": 2048, "num_layers": 22, "num_heads": 32, "num_kv_heads": 4, "mlp_width": 5632}
        | _LLAMA,
        {"vocab_size": 32000, "max_length": 2048},
    ),
}

NAMES: tuple[str, ...] = tuple(_ENTRIES)


def _entry(name: str) -> _Entry:
    if name not in _ENTRIES:
        raise ValueError(f"there is no model {name!r}; the names are {', '.join(NAMES)}.")
    return _ENTRIES[name]


def options(name: str) -> dict[str, Any]:
    """All options of a model and their defaults.

    They are JSON values, and complete: `build(name, **options(name))` is `build(name)`.

    Args:
        name: One of `NAMES`.

    Raises:
        ValueError: If there is no such model.

    Example:
        >>> options("vgg16")["width_multiplier"]
        1.0
    """
    module, fixed, defaults = _entry(name)
    fields: Any = module
    known = {
        field.name: field.default
        for field in dataclasses.fields(fields)
        if field.name not in ("parent", "name") and field.name not in fixed
    }
    return {key: _as_json(value) for key, value in {**known, **defaults}.items()}


def _as_json(value: Any) -> Any:
    return [_as_json(v) for v in value] if isinstance(value, (tuple, list)) else value


def _as_static(value: Any) -> Any:
    return tuple(_as_static(v) for v in value) if isinstance(value, (tuple, list)) else value


def build(name: str, **chosen: Any) -> Model:
    """A network by name.

    `{**options(name), **chosen}` describes it in full, whatever becomes of the defaults later.

    Args:
        name: One of `NAMES`. A name with a number fixes what the number says (the depth of
            "vgg16"), which is then no option.
        **chosen: Options of the model, JSON values; see `options(name)` and the class's docstring.

    Returns:
        The `Model`.

    Raises:
        ValueError: If there is no such model or option, or an option has a value that the model
            does not know.
        TypeError: If an option is not a JSON value.

    Example:
        >>> import jax
        >>> model = build("mlp", widths=[8, 8], num_classes=8)
        >>> params, state = model.init(jax.random.key(0), jax.numpy.ones((1, 8)))
        >>> params["Dense_1"]["kernel"].shape
        (8, 8)
    """
    entry = _entry(name)
    known = options(name)
    for option, value in chosen.items():
        if option not in known:
            fixed = " (its name fixes that)" if option in entry.fixed else ""
            raise ValueError(
                f"model {name!r} has no option {option!r}{fixed}; the options are "
                f"{', '.join(known)}."
            )
        try:
            json.dumps(value)
        except TypeError as error:
            raise TypeError(
                f"option {option} is {value!r}; expected a JSON value (a number, a string, a "
                "boolean, None or a list of these), so that a checkpoint can keep it."
            ) from error
    values = {key: _as_static(value) for key, value in {**known, **chosen}.items()}
    return from_linen(entry.module(**values, **entry.fixed))
