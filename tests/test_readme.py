"""The README: its table is true, and what it tells people to type works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from readme_table import README, updated

from tvit_cli import main
from tvit_cli.settings.base import load, presets
from tvit_cli.settings.train import TrainSettings

TEXT = README.read_text(encoding="utf-8")


def test_the_parameter_table_is_the_one_that_the_settings_make() -> None:
    assert updated(TEXT) == TEXT, "run: python tests/readme_table.py"


def commands() -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    typed = [block for language, block in blocks if language in ("", "bash")]  # `text` is what is printed
    lines = [part.strip() for block in typed for line in block.splitlines() for part in line.split("&&")]
    return [line for line in lines if line.startswith("tvit ")]


@pytest.mark.parametrize("line", commands())
def test_every_command_of_the_readme_is_understood(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for verb in ("download", "extract", "train", "evaluate", "predict", "export"):
        monkeypatch.setattr(main.commands, verb, lambda loaded, verbosity: called.append(loaded))
    main.build_app()(shlex.split(line)[1:], standalone_mode=False)
    assert len(called) == 1


def test_the_readme_has_commands_for_every_verb_and_only_presets_that_exist() -> None:
    assert {line.split()[1] for line in commands()} == {
        "download",
        "extract",
        "train",
        "eval",
        "predict",
        "export",
    }
    assert set(re.findall(r"--preset (\w+)", TEXT)) <= {*presets(), "NAME"}


def test_the_two_commands_are_one_line_each_under_their_heading() -> None:
    chapter = TEXT.split("## Two commands")[1].split("\n## ")[0]
    blocks = re.findall(r"^```bash\n(.*?)^```", chapter, re.MULTILINE | re.DOTALL)
    assert [len(block.strip().splitlines()) for block in blocks] == [1, 1]
    assert (Path(__file__).parents[1] / ".ci" / "run").read_text().count("## Two commands") >= 1


CONFIGS = sorted((Path(__file__).parents[1] / "examples" / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_example_config_is_valid(path: Path) -> None:
    assert load(TrainSettings, flags={}, config=path, environ={}).settings
