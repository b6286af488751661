"""Self-contained HTML pages: no script, no network, light and dark, any width."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NewType

import torch

import tvit_cli
from tvit_cli.errors import plural as plural
from tvit_cli.report.drawing import Drawing, Role, is_own_png, style_sheet, to_png, to_svg


def number(value: float) -> str:
    """Three digits. 0.12345 -> 0.123"""
    return f"{value:.3g}"


def percent(value: float) -> str:
    """Whole percent where that says it all. 0.5 -> 50 %, 0.875 -> 87.5 %"""
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


MOST_UNREADABLE = 50  # videos named on a page

Html = NewType("Html", str)  # text that is markup already; all other text is escaped

_STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1240px;margin:0 auto;padding:28px 20px 64px}
h1{font-size:28px;line-height:1.2;margin:0;overflow-wrap:anywhere}
h2{font-size:19px;margin:40px 0 12px;padding-bottom:6px;border-bottom:1px solid var(--grid)}
p{margin:8px 0;max-width:78ch}
.dim{color:var(--dim)}
.notice{border-left:4px solid var(--bad);padding:8px 14px;margin:18px 0;white-space:pre-wrap;
  overflow-wrap:anywhere;background:color-mix(in srgb,var(--bad) 8%,transparent)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:22px 0 0}
.tile{border:1px solid var(--grid);border-radius:10px;padding:12px;display:grid;
  grid-row:span 4;grid-template-rows:subgrid;gap:0;align-content:start}
.tile b{display:block;font-size:24px;line-height:1.3;white-space:nowrap;font-variant-numeric:tabular-nums}
.tile span{display:block;color:var(--dim);font-size:13px}
.span{position:relative;height:10px;margin:3px 0 7px}
.span::before{content:"";position:absolute;inset:4px 0;border-radius:2px;background:var(--grid)}
.span i{position:absolute;top:3px;height:4px;min-width:2px;border-radius:2px;background:var(--one);opacity:.55}
.tile .span b{position:absolute;top:0;width:4px;height:10px;margin-left:-2px;border-radius:2px;
  background:var(--one)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:20px}
.charts svg{display:block;width:100%;height:auto;border:1px solid var(--grid);border-radius:10px;padding:10px}
svg text{font-family:inherit;font-variant-numeric:tabular-nums}
.bars{columns:330px;column-gap:36px}
.bar{display:grid;grid-template-columns:minmax(0,11em) minmax(32px,1fr) minmax(8.8em,max-content);gap:10px;
  align-items:center;
  break-inside:avoid;font-size:13.5px;line-height:1.75}
.bar>span:first-child{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.bar>span:last-child{color:var(--dim);text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.track{height:9px;border-radius:5px;background:var(--grid);overflow:hidden}
.track i{display:block;height:100%}
.strips{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,540px),1fr));gap:26px 22px}
figure{margin:0;min-width:0}
figure div{overflow-x:auto;border-radius:8px}
figure img{display:block;height:72px;width:auto;max-width:none}
figcaption{color:var(--dim);font-size:13.5px;margin-top:4px;overflow-wrap:anywhere}
.scores{display:grid;grid-template-columns:minmax(0,9.5em) minmax(32px,200px) max-content;gap:2px 12px;
  align-items:center;margin-top:4px;font-variant-numeric:tabular-nums;line-height:1.4}
.scores>span{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
figcaption b{font-weight:600;color:var(--ink)}
figcaption .good{color:var(--good)}
figcaption .bad{color:var(--bad)}
.scroll,.wide{overflow-x:auto}
.wide{max-width:100%}
.wide svg{display:block;width:100%;height:auto}
.columns{display:flex;flex-wrap:wrap;gap:12px 40px;align-items:flex-start}
.columns>div{flex:0 1 auto;max-width:100%;min-width:min(100%,280px)}
table{border-collapse:collapse;font-size:14px}
th,td{text-align:left;padding:4px 18px 4px 0;vertical-align:top;border-bottom:1px solid var(--grid)}
th{color:var(--dim);font-weight:500;white-space:nowrap}
td{overflow-wrap:anywhere}
.facts th{min-width:9em}
td.number{text-align:right;font-variant-numeric:tabular-nums}
tr.changed td{font-weight:600}
tr.changed td:last-child{font-weight:400;color:var(--dim)}
details{margin:12px 0}
summary{cursor:pointer;color:var(--one)}
pre{background:color-mix(in srgb,var(--grid) 55%,transparent);border-radius:8px;padding:10px 14px;margin:4px 0 14px;
  overflow-x:auto;font:13.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
footer{margin-top:48px;color:var(--dim);font-size:13px}
"""
# What a page may load: nothing but its own styles and the pictures inside it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(title: str, subtitle: str, parts: Iterable[Html], *, footer: str) -> str:
    """The whole document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title>\n'
        f"<style>\n{style_sheet()}{_STYLE}</style></head>\n<body><main>\n"
        f'<h1>{escape(title)}</h1><p class="dim">{escape(subtitle)}</p>\n'
        + "\n".join(parts)
        + f"\n<footer>{escape(footer)}</footer>\n</main></body></html>\n"
    )


def text(words: str) -> Html:
    """Words that are not markup."""
    return Html(escape(words))


def section(title: str, *parts: Html) -> Html:
    """A heading and what stands under it; nothing where all of it is empty."""
    inside = "\n".join(part for part in parts if part)
    return Html(f"<section><h2>{escape(title)}</h2>\n{inside}</section>" if inside else "")


def paragraph(text: str) -> Html:
    """A sentence or two in the dimmer colour."""
    return Html(f'<p class="dim">{escape(text)}</p>' if text else "")


def notice(text: str) -> Html:
    """What went wrong, where it cannot be missed; line breaks are kept."""
    return Html(f'<div class="notice">{escape(text)}</div>' if text else "")


@dataclass(frozen=True)
class Tile:
    """One of the few numbers that matter, with a remark; `span` is (low, value, high) from 0 to 1, drawn."""

    what: str
    value: str
    remark: str = ""
    span: tuple[float, float, float] | None = None


def tiles(facts: Iterable[Tile]) -> Html:
    """The few numbers that matter, large."""
    cells = (
        f'<div class="tile"><span>{escape(tile.what)}</span><b>{escape(tile.value)}</b>'
        f"{'<span></span>' if tile.span is None else _span(*tile.span)}<span>{escape(tile.remark)}</span></div>"
        for tile in facts
    )
    return Html(f'<div class="tiles">{"".join(cells)}</div>')


def _span(low: float, value: float, high: float) -> str:
    """An interval on the line from 0 to 1, and the value in it; the tile says both in words."""
    return (
        f'<span class="span" aria-hidden="true"><i style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%">'
        f'</i><b style="left:{100 * value:.1f}%"></b></span>'
    )


def charts(drawings: Iterable[Drawing | None]) -> Html:
    """Drawings side by side, as many as there is room for; those that are None are left out."""
    inside = "\n".join(to_svg(drawing) for drawing in drawings if drawing is not None)
    return Html(f'<div class="charts">{inside}</div>' if inside else "")


def wide(drawing: Drawing, least_width: int) -> Html:
    """One drawing across the page; where there is less room than its least width, it scrolls."""
    inside = f'<div style="min-width:{least_width}px">{to_svg(drawing)}</div>'
    return Html(f'<div class="wide" style="width:{round(drawing.width)}px">{inside}</div>')


def columns(*parts: Html) -> Html:
    """Parts side by side where there is room."""
    return Html(f'<div class="columns">{"".join(f"<div>{part}</div>" for part in parts if part)}</div>')


def bars(rows: Iterable[tuple[str, float, str]]) -> Html:
    """Horizontal bars in columns: (name, share from 0 to 1, what stands at its end)."""
    inside = "".join(
        f'<div class="bar"><span title="{escape(name)}">{escape(name)}</span>'
        f"{_track(share, 'one')}<span>{escape(text)}</span></div>"
        for name, share, text in rows
    )
    return Html(f'<div class="bars">{inside}</div>' if inside else "")


@dataclass(frozen=True)
class Strip:
    """A wide picture: its data URI, what it shows in words, and what stands below it."""

    uri: str
    alt: str
    caption: Html


def strips(pictures: Iterable[Strip]) -> Html:
    """Wide pictures, side by side where there is room."""
    inside = "".join(
        f'<figure><div><img src="{strip.uri}" alt="{escape(strip.alt)}"></div>'
        f"<figcaption>{strip.caption}</figcaption></figure>"
        for strip in pictures
    )
    return Html(f'<div class="strips">{inside}</div>' if inside else "")


def answer(label: str, said: Iterable[str], remark: str) -> Html:
    """A true label and what one model or several said of it, with a remark."""
    words = (
        '<b class="good">right</b>' if name == label else f'taken for <b class="bad">{escape(name)}</b>'
        for name in said
    )
    return Html(f"<b>{escape(label)}</b>, {', then '.join(words)} · {escape(remark)}")


def scores(rows: Iterable[tuple[str, float, Role]]) -> Html:
    """What a model gives to a few labels: (label, score, the colour of its bar)."""
    return Html(
        '<div class="scores">'
        + "".join(
            f'<span class="{role}" title="{escape(label)}">{escape(label)}</span>{_track(share, role)}'
            f"<span>{percent(share)}</span>"
            for label, share, role in rows
        )
        + "</div>"
    )


def _track(share: float, role: Role) -> str:
    return f'<span class="track"><i style="width:{100 * share:.1f}%;background:var(--{role})"></i></span>'


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, changed: Iterable[int] = ()) -> Html:
    """A table; all that is a number stands right, and the rows whose numbers are in `changed` stand out."""
    marked = dict.fromkeys(changed, ' class="changed"')
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = "".join(
        f"<tr{marked.get(number, '')}>{''.join(map(_cell, row))}</tr>" for number, row in enumerate(rows)
    )
    return Html(f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>' if body else "")


def facts(values: Mapping[str, str]) -> Html:
    """A table of names and values."""
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in values.items()
    )
    return Html(f'<div class="scroll"><table class="facts">{body}</table></div>' if body else "")


def left_out(reasons: Mapping[str, str]) -> Html:
    """The videos that cannot be read, the first of them by name and reason."""
    if not reasons:
        return paragraph("All videos could be read.")
    text = f"{len(reasons)} videos cannot be read and were left out."
    if len(reasons) > MOST_UNREADABLE:
        text += f" The first {MOST_UNREADABLE}:"
    rows = list(reasons.items())[:MOST_UNREADABLE]
    return Html(paragraph(text) + table(("video", "reason"), rows))


def folded(summary: str, part: Html) -> Html:
    """A part that opens when its summary is clicked."""
    return Html(f"<details><summary>{escape(summary)}</summary>{part}</details>" if part else "")


def commands(lines: Iterable[tuple[str, str]]) -> Html:
    """What to type next: (what it does, the command)."""
    return Html("".join(f"<div>{escape(what)}</div><pre>{escape(line)}</pre>" for what, line in lines))


def _cell(value: object) -> str:
    start = '<td class="number">' if isinstance(value, int | float) else "<td>"
    return f"{start}{escape(str(value))}</td>"


PACKAGES = ("accelerate", "peft", "av", "numpy", "safetensors")
SECONDS_FOR_AN_ANSWER = 5.0


def software(folder: Path) -> dict[str, str]:
    """Versions, and the git commit of a folder where it is a working tree."""
    found = {"tvit": tvit_cli.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        found["CUDA"] = torch.version.cuda
    found["system"] = platform.platform()
    if commit := git_commit(folder):
        found["git commit"] = commit
    return found


def hardware(device: torch.device) -> dict[str, str]:
    """Processor, memory, and the GPUs where the model ran on one."""
    found = {"processor": _processor(), "cores": str(os.cpu_count() or "?")}
    if memory := _memory():
        found["memory"] = f"{memory / 2**30:.1f} GiB"
    if device.type == "cuda":
        for number in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(number)
            found[f"GPU {number}"] = f"{facts.name}, {facts.total_memory / 2**30:.1f} GiB"
        if driver := _answer(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]):
            found["driver"] = driver.splitlines()[0]
    return found


def git_commit(folder: Path) -> str:
    """The commit that a folder's working tree is at, and whether it differs from it; "" outside of one."""
    commit = _answer(["git", "-C", str(folder), "rev-parse", "HEAD"])
    if not commit:
        return ""
    changed = _answer(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"])
    return commit + (", with changes that are not committed" if changed else "")


def _processor() -> str:
    """The processor's name as the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> int:
    """Bytes of memory, 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0


def _answer(command: list[str]) -> str:
    """What a program prints, or "" where it is not there, fails or takes too long."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS_FOR_AN_ANSWER, check=True
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout.strip()


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
