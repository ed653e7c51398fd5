"""Checkpoints that say what they are, a folder of them to resume from, and plain-format exports.

A checkpoint is a folder. `geojax.json` says what it is: kind, structure, dtypes, versions and a
checksum per leaf; orbax's arrays lie beside it. Nothing is pickled, and loading needs no argument.
"""

from geojax.checkpoint._description import CheckpointError
from geojax.checkpoint._exports import (
    export_npz,
    export_safetensors,
    import_npz,
    import_safetensors,
)
from geojax.checkpoint._folders import (
    Checkpointer,
    Network,
    describe,
    load,
    load_network,
    save,
    save_network,
)

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "Network",
    "describe",
    "export_npz",
    "export_safetensors",
    "import_npz",
    "import_safetensors",
    "load",
    "load_network",
    "save",
    "save_network",
]
