"""The papers' networks by name, and adapters for any flax linen or nnx module.

Every network, ours or adapted, comes as `apply(params, state, inputs, train, key=None) ->
(outputs, new_state)`. Importing this package loads no flax; the first use of a name does.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geojax.models.adapters import Model, from_linen, from_nnx
    from geojax.models.cnn import CNN, ConvFC, LeNet
    from geojax.models.gpt import GPT
    from geojax.models.mlp import MLP
    from geojax.models.registry import NAMES, build, options
    from geojax.models.resnet import CifarResNet, PreResNet, ResNet, WideResNet
    from geojax.models.vgg import VGG
    from geojax.models.vit import ViT

__all__ = [
    "CNN",
    "GPT",
    "MLP",
    "NAMES",
    "VGG",
    "CifarResNet",
    "ConvFC",
    "LeNet",
    "Model",
    "PreResNet",
    "ResNet",
    "ViT",
    "WideResNet",
    "build",
    "from_linen",
    "from_nnx",
    "options",
]

_HOMES = {
    "CNN": "cnn",
    "CifarResNet": "resnet",
    "ConvFC": "cnn",
    "GPT": "gpt",
    "LeNet": "cnn",
    "MLP": "mlp",
    "Model": "adapters",
    "NAMES": "registry",
    "PreResNet": "resnet",
    "ResNet": "resnet",
    "VGG": "vgg",
    "ViT": "vit",
    "WideResNet": "resnet",
    "build": "registry",
    "from_linen": "adapters",
    "from_nnx": "adapters",
    "options": "registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "flax":
            raise
        raise ImportError(
            f"geojax.models.{name} needs flax, which is not installed; "
            'install it with `pip install "geojax[examples]"`.'
        ) from error
    return getattr(home, name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
