"""A report in its folder: the page, and its drawings as PNGs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tvit_cli.report.drawing import Drawing
from tvit_cli.report.png import is_own_png, to_png

REPORT_FILE = "report.html"
PLOTS_FOLDER = "plots"


def write_pages(
    folder: Path, html: str, drawings: Mapping[str, Drawing | None], *, name: str = REPORT_FILE
) -> Path:
    """Write plots/<name>.png and the page, which is whole or as it was before; returns its path.

    A drawing that there is nothing for is None: the file that an earlier page of tvit left under
    its name goes.
    """
    plots = folder / PLOTS_FOLDER
    plots.mkdir(parents=True, exist_ok=True)
    for drawn, drawing in drawings.items():
        picture = plots / f"{drawn}.png"
        if drawing is None:
            if is_own_png(picture):
                picture.unlink()
        else:
            picture.write_bytes(to_png(drawing))
    path = folder / name
    beside = path.with_suffix(".writing")
    beside.write_text(html, encoding="utf-8", errors="backslashreplace")
    beside.replace(path)
    return path
