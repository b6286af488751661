"""Self-contained HTML pages from templates: no network, readable without scripts, light and dark, any width."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import time
from base64 import b64encode
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape, unescape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import psutil
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import tvit_cli
from tvit_cli.errors import natural_key, plural
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
SCRIPT = LOADER.get_source(TEMPLATES, "page.js")[0]  # the only one that the page's policy allows, by its hash
SCRIPT_HASH = b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode("ascii")
LINKS = re.compile(r'(?<=<nav class="tvit">).*?(?=</nav>)', re.DOTALL)  # to other pages; text has no tags
LINK = re.compile(r'<a href="([^"]*)">([^<]*)</a>')


def render(template: str, context: Context, **values: Any) -> str:
    """A page from its template. All values are escaped."""
    return TEMPLATES.get_template(template).render(
        values,
        context=context,
        palette=Markup(style_sheet()),
        script=Markup(SCRIPT),
        script_hash=SCRIPT_HASH,
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


def href(path: Path, folder: Path) -> str:
    """The URL of a file relative to a page's folder; a file URL where there is no relative path."""
    try:
        return quote(os.fsencode(Path(os.path.relpath(path, folder)).as_posix()))
    except ValueError:  # another drive
        return path.absolute().as_uri()


def write_pages(
    folder: Path,
    html: str,
    drawings: Mapping[str, Drawing | None],
    *,
    name: str = "report.html",
    title: str = "",
    links: Mapping[Path, str] | None = None,
) -> Path:
    """Writes the page atomically and plots/<name>.png; returns the page's path. Raises OSError.

    The file of a drawing that is None is removed if an earlier page left it. Page and `links` (path -> text) link
    to each other, where they exist; they call the page `title`. Links of an earlier page are kept.
    """
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    for drawn, drawing in drawings.items():
        picture = plots / f"{drawn}.png"
        if drawing is not None:
            picture.write_bytes(to_png(drawing))
        elif is_own_png(picture):
            picture.unlink()
    page, links = folder / name, links or {}
    _write_linked(page, html, links)
    for other in links:
        with suppress(OSError, UnicodeDecodeError):  # such as a page that is missing or cannot be written
            if LINKS.search(text := other.read_text(encoding="utf-8")):  # else tvit did not write it
                _write_linked(other, text, {page: title})
    return page


def _write_linked(page: Path, html: str, links: Mapping[Path, str]) -> None:
    """Writes a page with its links, and those of its file, as far as their targets exist."""
    found = {}
    with suppress(OSError, UnicodeDecodeError):
        if before := LINKS.search(page.read_text(encoding="utf-8")):
            found = {unescape(url): unescape(text) for url, text in LINK.findall(before[0])}
    found |= {href(path, page.parent): text for path, text in links.items()}
    lines = [
        f'<a href="{escape(url)}">{escape(text)}</a>'
        for url, text in sorted(found.items(), key=lambda link: natural_key(link[1]))
        if (page.parent / unquote(url, errors="surrogateescape")).is_file()
    ]
    beside = page.with_suffix(".writing")  # known to `tvit train --overwrite` if a kill leaves it
    text = LINKS.sub(lambda _: "\n".join(lines), html, count=1)
    beside.write_text(text, encoding="utf-8", errors="backslashreplace")
    beside.replace(page)
