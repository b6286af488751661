"""Parser of Markdown pages: code blocks, commands, headings and links."""

import importlib
import pkgutil
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

from tvit_cli import settings

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
_BLOCK = re.compile(
    r"^(?P<run><!-- run -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
_CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A code block of a page; `is_run` where `<!-- run -->` stands on the line before it."""

    language: str
    code: str
    is_run: bool

    def commands(self) -> list[str]:
        """Its command lines, continued lines joined and `&&` split. A comment is no command."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [
            part.strip() for line in lines for part in line.split("&&") if part.strip()[:1] not in ("", "#")
        ]


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page in order."""
    found = _BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(m["language"], m["code"], m["run"] is not None) for m in found]


def commands(page: Path) -> list[str]:
    """The `tvit` commands in the bash blocks of a page, and those with options in its sentences."""
    lines = [line for block in blocks(page) if block.language == "bash" for line in block.commands()]
    typed = [line for line in lines if line.startswith("tvit ")]
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`(tvit [a-z]+ [^`]+)`", prose)
    return list(dict.fromkeys(typed + [line for line in inline if not {"--help", "…"} & set(line.split())]))


def named_files(page: Path) -> list[str]:
    """The files of the repository that a page names, as in `examples/slurm.sh`."""
    return re.findall(r"\b((?:examples|tests|docs)/[\w/.-]+\.\w+)", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page: Path) -> list[str]:
    """The targets of the links and pictures of a page, code aside."""
    return re.findall(r"\]\(([^)\s]+)\)", _CODE.sub("", page.read_text(encoding="utf-8")))


def program() -> Any:
    """The click group of the Typer app (newer Typers bring a click of their own, hence no type)."""
    try:
        app = importlib.import_module("tvit_cli.cli")
    except ModuleNotFoundError:
        app = importlib.import_module("tvit_cli.cli")
    return typer.main.get_command(app.build_app())


def settings_of(command: Any) -> type[BaseModel]:
    """The settings model whose fields are the options of a command."""
    for module in pkgutil.iter_modules(settings.__path__, f"{settings.__name__}."):
        importlib.import_module(module.name)
    names = {option.name for option in command.params}
    fitting = [
        model for model in _models(BaseModel) if model.model_fields and names >= model.model_fields.keys()
    ]
    return max(fitting, key=lambda model: len(model.model_fields))


def parse(line: str) -> tuple[str, dict[str, object]]:
    """A `tvit` command line -> the verb and the options typed. Raises click's UsageError."""
    _, verb, *arguments = shlex.split(line)
    command = program().commands[verb]
    given = command.make_context(verb, arguments).params
    return verb, {key: value for key, value in given.items() if value not in (None, False, (), [])}


def _models(base: type[BaseModel]) -> list[type[BaseModel]]:
    return [model for child in base.__subclasses__() for model in (child, *_models(child))]
