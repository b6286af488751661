"""One self-contained HTML page: no script, no network, light or dark as the reader's system is, at any width."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import NewType

from tvit_cli.report.drawing import Drawing, style_sheet, to_svg

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
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(142px,1fr));gap:12px;margin:22px 0 0}
.tile{border:1px solid var(--grid);border-radius:10px;padding:12px 14px}
.tile b{display:block;font-size:24px;line-height:1.3;white-space:nowrap;font-variant-numeric:tabular-nums}
.tile span{display:block;color:var(--dim);font-size:13px}
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
.track i{display:block;height:100%;background:var(--one)}
.strips{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,540px),1fr));gap:18px}
figure{margin:0;min-width:0}
figure div{overflow-x:auto;border-radius:8px}
figure img{display:block;height:72px;width:auto;max-width:none}
figcaption{color:var(--dim);font-size:13.5px;margin-top:4px;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:14px}
th,td{text-align:left;padding:4px 18px 4px 0;vertical-align:top;border-bottom:1px solid var(--grid)}
th{color:var(--dim);font-weight:500;white-space:nowrap}
td{overflow-wrap:anywhere}
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


def tiles(facts: Iterable[tuple[str, str, str]]) -> Html:
    """The few numbers that matter: (what, value, a remark below)."""
    cells = (
        f'<div class="tile"><span>{escape(what)}</span><b>{escape(value)}</b><span>{escape(remark)}</span></div>'
        for what, value, remark in facts
    )
    return Html(f'<div class="tiles">{"".join(cells)}</div>')


def charts(drawings: Iterable[Drawing]) -> Html:
    """Drawings side by side, as many as there is room for."""
    inside = "\n".join(map(to_svg, drawings))
    return Html(f'<div class="charts">{inside}</div>' if inside else "")


def bars(rows: Iterable[tuple[str, float, str]]) -> Html:
    """Horizontal bars in columns: (name, share from 0 to 1, what stands at its end)."""
    inside = "".join(
        f'<div class="bar"><span title="{escape(name)}">{escape(name)}</span>'
        f'<span class="track"><i style="width:{100 * share:.1f}%"></i></span><span>{escape(text)}</span></div>'
        for name, share, text in rows
    )
    return Html(f'<div class="bars">{inside}</div>' if inside else "")


def strips(pictures: Iterable[tuple[str, str]]) -> Html:
    """Wide pictures with a caption: (data URI, caption)."""
    inside = "".join(
        f'<figure><div><img src="{uri}" alt="{escape(caption)}"></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for uri, caption in pictures
    )
    return Html(f'<div class="strips">{inside}</div>' if inside else "")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, changed: Iterable[int] = ()) -> Html:
    """A table; numbers stand right, and the rows whose numbers are in `changed` stand out."""
    marked = dict.fromkeys(changed, ' class="changed"')
    head = f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in columns)}</tr>" if any(columns) else ""
    body = "".join(
        f"<tr{marked.get(number, '')}>{''.join(map(_cell, row))}</tr>" for number, row in enumerate(rows)
    )
    return Html(f'<div class="scroll"><table>{head}{body}</table></div>' if body else "")


def facts(values: Mapping[str, str]) -> Html:
    """A table of names and values."""
    return table(("", ""), list(values.items()))


def folded(summary: str, part: Html) -> Html:
    """A part that opens when its summary is clicked."""
    return Html(f"<details><summary>{escape(summary)}</summary>{part}</details>" if part else "")


def commands(lines: Iterable[tuple[str, str]]) -> Html:
    """What to type next: (what it does, the command)."""
    return Html("".join(f"<div>{escape(what)}</div><pre>{escape(line)}</pre>" for what, line in lines))


def _cell(value: object) -> str:
    start = '<td class="number">' if isinstance(value, int | float) else "<td>"
    return f"{start}{escape(str(value))}</td>"
