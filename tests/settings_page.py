"""docs/settings.md from the options of the Typer app: `python tests/settings_page.py > docs/settings.md`."""

import re
from typing import Any

from documents import ROOT, program, settings_of
from typer.core import TyperArgument

PAGE = ROOT / "docs" / "settings.md"
EVERYWHERE = ("help", "help_all", "config", "verbose", "quiet", "preset", "model_argument")
HEAD = """# Settings

Every option of every command, generated from the settings (`python tests/settings_page.py > docs/settings.md`).

A value comes from, in this order: a flag, a `TVIT_*` environment variable (`--lora-rank` is `TVIT_LORA_RANK`),
`--config FILE` (TOML, or a run's `settings.json`; keys with underscores or hyphens), `--preset NAME`
(`tvit train` only), the default. Unknown names are errors with a suggestion, and all errors of a call are reported at
once. `tvit train --show-settings` prints every value with its origin. A switch has a `--no-` form. `none` resets an
optional value. Every command has `--help` (the essential options), `--help-all`, `--config FILE`, `--verbose` (`-v`) and
`--quiet` (`-q`). `tvit eval` and `tvit export` take the model as an argument, too: `tvit eval MODEL`.

*Reference* is the default of
[the system that tvit re-implements](https://github.com/detker/Temporal-Vision-Transformer-LoRA) where it differs.
"""
_HELP = re.compile(r"^(?P<text>.*) \((?:(?P<limits>.*); )?default (?P<default>.*)\)$", re.DOTALL)


def make_page() -> str:
    """The page's Markdown: a table per command, a bold row per panel, a row per option."""
    return HEAD + "".join(_section(name, command) for name, command in program().commands.items())


def _section(name: str, command: Any) -> str:
    fields = settings_of(command).model_fields
    own = [option for option in command.params if option.name not in EVERYWHERE]
    lines = [f"\n## tvit {name}\n", "| option | description | default |", "|---|---|---|"]
    panel = ""
    for option in own:
        if (new := getattr(option, "rich_help_panel", None) or "") != panel:
            panel = new
            lines.append(f"| **{panel}** | | |")
        extra = getattr(fields[str(option.name)], "json_schema_extra", None)
        lines.append(_row(option, extra if isinstance(extra, dict) else {}))
    return "\n".join(lines) + "\n"


def _row(option: Any, extra: dict[str, object]) -> str:
    help_text = (getattr(option, "help", None) or "").strip()
    found = _HELP.match(help_text)
    text = found["text"] if found else help_text.rstrip(".")
    limits = found["limits"] if found else None
    default = found["default"] if found else ""
    if limits:
        text += f" ({limits})"
    reference = str(extra.get("reference") or "")
    if reference and _plain(reference) != _plain(default) and not reference.startswith("required"):
        default += f"; reference: {reference}"
    cells = (_name(option), text, default)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _plain(value: str) -> str:
    """One spelling of a value in Python and in words. False -> off, 1e-08 -> 1e-08"""
    word = {"False": "off", "True": "on", "None": "none"}.get(value, value.strip("'"))
    try:
        return str(float(word))
    except ValueError:
        return word


def _name(option: Any) -> str:
    if isinstance(option, TyperArgument):
        return f"`{option.metavar or str(option.name).upper()}`"
    names = sorted(option.opts, key=len, reverse=True)
    value = "" if getattr(option, "is_flag", False) else f" {option.metavar}"
    return ", ".join([f"`{names[0]}{value}`", *(f"`{name}`" for name in names[1:])])


if __name__ == "__main__":
    print(make_page(), end="")
