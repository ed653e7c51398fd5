"""A report: one HTML page that opens anywhere, with its figures inside and their data beside it."""

import base64
import html
import json
import pathlib
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["Report", "claim", "text_table"]

_PAGE = string.Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 16px/1.55 system-ui, sans-serif; color: #1b1b1b; background: #fff;
       max-width: 56rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin-bottom: .2rem; }
h2 { font-size: 1.25rem; margin-top: 2.4rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
p.facts { color: #555; font-size: .9rem; margin-top: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .92rem;
        font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; text-align: right; border-bottom: 1px solid #e4e4e4; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 1.5px solid #555; font-weight: 600; }
figure { margin: 1.2rem 0; }
figure img { max-width: 100%; height: auto; }
figcaption { color: #555; font-size: .9rem; }
nav ol { padding-left: 1.2rem; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="facts">$facts</p>
<nav><ol>$contents</ol></nav>
$chapters
</body>
</html>
""")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same columns as text: the first column to the left, the others to the right.

    Example:
        >>> print(text_table([{"network": "a", "error": 0.5}, {"network": "bb", "error": 0.25}]))
        network  error
        a          0.5
        bb        0.25
    """
    columns = list(rows[0])
    cells = [columns] + [[_cell(row[name]) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    return "\n".join(lines)


def claim(
    folder: str | pathlib.Path,
    options: Mapping[str, Any],
    *,
    may_differ: Sequence[str] = (),
) -> None:
    """Note a run's options in its folder, and refuse a folder that holds a run with others.

    A run that is called again with the same options goes on from its checkpoints; with other
    options it would mix two runs.

    Args:
        folder: The folder of the run; made if missing.
        options: The options, written as JSON to `options.json` there.
        may_differ: Options that do not change the run, such as where its results go.

    Raises:
        ValueError: Naming each option that differs, with both values.
    """
    folder = pathlib.Path(folder)
    path = folder / "options.json"
    wanted = json.loads(json.dumps(dict(options), default=str))
    if path.exists():
        found = json.loads(path.read_text())
        other = [k for k in wanted if k not in may_differ and found.get(k) != wanted[k]]
        if other:
            lines = ", ".join(
                f"{k} is {found.get(k)!r} there and {wanted[k]!r} here" for k in other
            )
            raise ValueError(
                f"{folder} holds a run with other options: {lines}. Choose another folder (--out), "
                "or the same options to go on."
            )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(wanted, indent=2) + "\n")


class Report:
    """A page that grows by chapters; its figures and their data are written as they come.

    Args:
        folder: Where `report.html`, each figure as PNG and its data as NPZ go; made if missing.
        title: The heading of the page.
        facts: One line below it, such as the versions and the device.
    """

    def __init__(self, folder: str | pathlib.Path, title: str, facts: str):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._title, self._facts = title, facts
        self._chapters: list[tuple[str, str]] = []

    def chapter(self, title: str, text: str) -> None:
        """Begin a chapter with a paragraph."""
        self._chapters.append((title, f"<p>{html.escape(text)}</p>"))

    def _append(self, fragment: str) -> None:
        if not self._chapters:
            raise ValueError("report: begin a chapter before its text, tables and figures.")
        title, body = self._chapters[-1]
        self._chapters[-1] = (title, f"{body}\n{fragment}")

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._append(f"<p>{html.escape(text)}</p>")

    def table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add a table; all rows have the columns of the first."""
        head = "".join(f"<th>{html.escape(str(name))}</th>" for name in rows[0])
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_cell(row[n]))}</td>" for n in rows[0]) + "</tr>"
            for row in rows
        )
        self._append(
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody>'
            "</table></div>"
        )

    def figure(self, name: str, image: bytes, caption: str, data: Mapping[str, Any]) -> None:
        """Add a figure: into the page, as `name.png`, and its data as `name.npz`.

        Args:
            name: A file name without suffix.
            image: The bytes of a PNG at 200 dots an inch.
            caption: One sentence or two below the figure; also its alternative text.
            data: The arrays behind the figure.
        """
        (self.folder / f"{name}.png").write_bytes(image)
        arrays: dict[str, Any] = {k: np.asarray(v) for k, v in data.items()}
        np.savez(self.folder / f"{name}.npz", **arrays)
        inside = base64.b64encode(image).decode()
        width = int.from_bytes(image[16:20], "big") // 2  # the header's width; a page has 100 dots
        text = html.escape(caption)
        self._append(
            f'<figure><img src="data:image/png;base64,{inside}" alt="{text}" width="{width}">'
            f"<figcaption>{text} Data: {html.escape(name)}.npz</figcaption></figure>"
        )

    def write(self) -> pathlib.Path:
        """Write `report.html` and return its path."""
        chapters, contents = [], []
        for i, (title, body) in enumerate(self._chapters, start=1):
            chapters.append(f'<h2 id="c{i}">{i}. {html.escape(title)}</h2>\n{body}')
            contents.append(f'<li><a href="#c{i}">{html.escape(title)}</a></li>')
        page = _PAGE.substitute(
            title=html.escape(self._title),
            facts=html.escape(self._facts),
            contents="".join(contents),
            chapters="\n".join(chapters),
        )
        path = self.folder / "report.html"
        path.write_text(page, encoding="utf-8")
        return path
