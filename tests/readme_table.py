"""The parameter table of README.md, made from the settings. Run as a program, it rewrites the README."""

from __future__ import annotations

import re
from pathlib import Path

from tvit_cli.options import bounds, default, what
from tvit_cli.settings.base import extra, flag
from tvit_cli.settings.train import TrainSettings

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"(?<=<!-- parameters -->\n).*?(?=<!-- /parameters -->)", re.DOTALL)


def table() -> str:
    """Markdown: a table per panel of `tvit train --help`."""
    panels: dict[str, list[str]] = {}
    for name, field in TrainSettings.model_fields.items():
        facts = extra(field)
        limits = bounds(field)
        text = what(field, is_series=name in TrainSettings.SERIES).replace("|", "\\|")
        text += f" ({limits})" if limits else ""
        reference = facts["reference"] or ""
        why = f"; {facts['why']}" if facts["why"] else ""
        row = f"| `{flag(name)}` | {text} | {default(field)} | {reference}{why} |"
        panels.setdefault(facts["panel"], []).append(row)
    head = "| flag | what | default | reference |\n|---|---|---|---|"
    return "\n\n".join(f"**{panel}**\n\n{head}\n" + "\n".join(rows) for panel, rows in panels.items()) + "\n"


def updated(text: str) -> str:
    """README text with a fresh table."""
    return BLOCK.sub(lambda match: "\n" + table() + "\n", text)


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
