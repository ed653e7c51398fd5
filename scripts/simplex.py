"""Grow a simplex of low loss from one trained network, one vertex at a time.

The network is one that scripts/train.py saved (or `checkpoint.save_network`). This is
scripts/complex.py for one network: each new vertex is trained with the others as they are, so that
the loss is low in the whole simplex between them. The folder gets a report, the simplex as a
checkpoint, figures with their data, all numbers as JSON, and a log of the training as JSON lines,
where stage 0 is the first vertex added. Stop it at any time and call it again with the same
options: it goes on from its last checkpoint.

  python scripts/train.py --out out/a
  python scripts/simplex.py --networks out/a/network
  python scripts/simplex.py --networks out/a/network --volume-weight 0.1 --num-connectors 2
"""

import dataclasses
import pathlib
import sys

import complex as growing
import tyro


@dataclasses.dataclass(frozen=True)
class Options(growing.Options):
    """Options of the simplex."""

    networks: tuple[pathlib.Path, ...] = ()
    """The folder of the network."""
    num_connectors: int = 3
    """Vertices to add to the network; three make a tetrahedron."""
    epochs: int = 40
    """Passes over the training part for each new vertex."""
    out: pathlib.Path = pathlib.Path("out/simplex")
    """The folder of the results."""


def main(options: Options) -> None:
    growing.main(options, fewest=1, most=1)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, FileNotFoundError, FloatingPointError, ImportError) as error:
        sys.exit(f"simplex: {error}")
    except KeyboardInterrupt:
        sys.exit("simplex: stopped; the same command goes on from the last checkpoint.")
