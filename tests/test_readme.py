"""README.md: length, first commands, presets."""

import re

from documents import README, ROOT, blocks

from tvit_cli.settings.base import presets

TEXT = README.read_text(encoding="utf-8")


def test_readme_has_at_most_1600_words_and_220_lines():
    assert len(TEXT.split()) <= 1600
    assert len(TEXT.splitlines()) <= 220


def test_the_two_commands_are_the_first_bash_blocks():
    first, second = [block.commands() for block in blocks(README) if block.language == "bash"][:2]
    assert first == ["python -m pip install .", "tvit train --preset quickstart"]
    assert second == ['python -m pip install ".[test]"', "python -m pytest"]
    assert "README.md" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_presets_in_the_readme_exist():
    assert set(re.findall(r"--preset (\w+)", TEXT)) <= set(presets())
