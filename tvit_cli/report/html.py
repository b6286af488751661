"""Self-contained HTML pages from templates: no script, no network, light and dark, any width."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import tvit_cli
from tvit_cli.errors import plural
from tvit_cli.report.drawing import Drawing, is_own_png, style_sheet, to_png, to_svg


def number(value: float) -> str:
    """Three significant digits. 0.12345 -> 0.123"""
    return f"{value:.3g}"


def percent(value: float) -> str:
    """At most one decimal. 0.5 -> 50 %, 0.875 -> 87.5 %"""
    return f"{100 * value:.1f}".removesuffix(".0") + " %"


def count(value: int) -> str:
    """1234567 -> 1.23 M"""
    for limit, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return str(value)


def duration(seconds: float) -> str:
    """75 -> 1.2 min"""
    for limit, unit in ((3600, "h"), (60, "min")):
        if seconds >= limit:
            return f"{seconds / limit:.1f} {unit}"
    return f"{seconds:.1f} s"


@dataclass(frozen=True)
class Context:
    """Facts on every page: the setup by name, next commands as (purpose, command), and the device."""

    setup: Mapping[str, str]
    commands: Sequence[tuple[str, str]]
    device: torch.device


class Tile(NamedTuple):
    """A headline number with a remark; `span` is (low, value, high) from 0 to 1, drawn as an interval."""

    name: str
    value: str
    remark: str = ""
    span: tuple[float, float, float] | None = None


LOADER = PackageLoader("tvit_cli.report")
TEMPLATES = Environment(
    loader=LOADER, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
)
TEMPLATES.filters |= {
    "percent": percent,
    "plural": plural,
    "svg": lambda drawing: Markup(to_svg(drawing)),
    "fixed": lambda value, digits: f"{value:.{digits}f}",
}
TEMPLATES.globals["parts"] = TEMPLATES.get_template("parts.html.j2").module


def render(template: str, context: Context, **values: Any) -> str:
    """A page from its template. All values are escaped."""
    return TEMPLATES.get_template(template).render(
        values,
        context=context,
        palette=Markup(style_sheet()),
        now=time.strftime("%Y-%m-%d %H:%M"),
        software=software(Path.cwd()),
        hardware=hardware(context.device),
    )


def software(folder: Path) -> dict[str, str]:
    """Versions, and the git commit of a folder in a working tree."""
    found = {"tvit": tvit_cli.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for name in ("accelerate", "peft", "av", "numpy", "safetensors"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    if torch.version.cuda is not None:
        found["CUDA"] = torch.version.cuda
    found["system"] = platform.platform()
    if commit := git_commit(folder):
        found["git commit"] = commit
    return found


def hardware(device: torch.device) -> dict[str, str]:
    """Processor and memory, and all GPUs if the device is one."""
    found = {
        "processor": _processor(),
        "cores": str(os.cpu_count() or "?"),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
    }
    if device.type == "cuda":
        for gpu in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(gpu)
            found[f"GPU {gpu}"] = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
        if driver := _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"):
            found["driver"] = driver.splitlines()[0]
    return found


def git_commit(folder: Path) -> str:
    """The commit of a folder's working tree, and whether files differ from it; "" outside of one."""
    commit = _output("git", "-C", str(folder), "rev-parse", "HEAD")
    if not commit:
        return ""
    changed = _output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return commit + (", with uncommitted changes" if changed else "")


def _processor() -> str:
    """The processor's name from /proc/cpuinfo, else its architecture."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _output(*command: str) -> str:
    """Output of a program; "" if it is missing, fails or takes more than 5 seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout.strip()


def write_pages(
    folder: Path, html: str, drawings: Mapping[str, Drawing | None], *, name: str = "report.html"
) -> Path:
    """Writes the page atomically and plots/<name>.png; returns the page's path. Raises OSError.

    The file of a drawing that is None is removed if an earlier page left it.
    """
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    for drawn, drawing in drawings.items():
        picture = plots / f"{drawn}.png"
        if drawing is not None:
            picture.write_bytes(to_png(drawing))
        elif is_own_png(picture):
            picture.unlink()
    path = folder / name
    beside = path.with_suffix(".writing")  # known to `tvit train --overwrite` if a kill leaves it
    beside.write_text(html, encoding="utf-8", errors="backslashreplace")
    return beside.replace(path)
