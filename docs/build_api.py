"""Write docs/api.md: every public name with the first line of its docstring.

Run `python docs/build_api.py` after adding or changing a public name; a test runs it with --check.
"""

import importlib
import inspect
import pathlib
import sys

MODULES = [
    "tree", "batches", "fit", "statistics", "surface", "objectives", "models", "datasets",
    "datasets.augment", "checkpoint", "plot", "report", "progress", "krylov", "hessian",
    "hessian.output_losses", "symmetry", "permute", "assignment",
    "curves", "simplex", "ensemble",
]  # fmt: skip


def line(module, name):
    thing = getattr(module, name)
    if inspect.isfunction(thing) or inspect.isclass(thing):
        first = inspect.getdoc(thing).splitlines()[0]
    else:
        first = f"a {type(thing).__name__}."
    call = ""
    if inspect.isfunction(thing):
        names = [
            f"*{p.name}" if p.kind is p.VAR_POSITIONAL
            else f"**{p.name}" if p.kind is p.VAR_KEYWORD
            else p.name
            for p in inspect.signature(thing).parameters.values()
        ]  # fmt: skip
        call = f"({', '.join(names)})"
    return f"- `{name}{call}`: {first}"


def page():
    parts = ["# Public names\n\nMade by `python docs/build_api.py` from the docstrings.\n"]
    for name in MODULES:
        module = importlib.import_module(f"geojax.{name}")
        parts.append(f"## geojax.{name}\n\n{inspect.getdoc(module)}\n")
        parts.append("\n".join(line(module, public) for public in sorted(module.__all__)) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    path = pathlib.Path(__file__).parent / "api.md"
    text = page()
    if "--check" in sys.argv:
        if path.read_text() != text:
            sys.exit("docs/api.md is out of date; run python docs/build_api.py")
    else:
        path.write_text(text)
