"""README.md and docs/: links resolve, every command is valid, and the marked ones run."""

import re
import shutil
from pathlib import Path

import pytest
from documents import (
    PAGES,
    README,
    ROOT,
    anchors,
    blocks,
    commands,
    links,
    named_files,
    parse,
    program,
    settings_of,
)
from entry import run_python, tvit
from settings_page import PAGE, make_page
from walk import ITEMS, existing_tests, names_of

from tvit_cli.cli import VERBS
from tvit_cli.settings.base import load, presets

COMMANDS = [pytest.param(line, id=f"{page.stem}: {line}") for page in PAGES for line in commands(page)]
EXAMPLES = sorted(path for path in (ROOT / "examples").rglob("*") if path.suffix in (".py", ".sh", ".toml"))
TINY = {
    "TVIT_HF_MODEL_NAME": "none", "TVIT_WIDTH": "16", "TVIT_DEPTH": "1", "TVIT_NUM_HEADS": "2",
    "TVIT_IMG_SIZE": "32", "TVIT_N_FRAMES": "4", "TVIT_EPOCHS": "1", "TVIT_NUM_WORKERS": "0",
    "TVIT_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "COLUMNS": "160",
}  # fmt: skip


def validate(line):
    verb, typed = parse(line)
    model = settings_of(program().commands[verb])
    flags = {key: value for key, value in typed.items() if key in model.model_fields}
    config = typed.get("config")
    load(
        model, flags=flags, config=ROOT / str(config) if config else None, preset=typed.get("preset"),
        environ={},
    )  # fmt: skip


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_has_valid_names_and_values(line):
    validate(line)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples" / "configs").glob("*.toml")), ids=lambda path: path.stem
)
def test_every_example_config_is_valid(path):
    validate(f"tvit train --config {path.relative_to(ROOT)}")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_commands_in_the_comments_of_examples_are_valid(path):
    for line in re.findall(
        r"(?:^#\s+|`)(tvit [a-z]+ [^`\n]+)", path.read_text(encoding="utf-8"), re.MULTILINE
    ):
        validate(line)


def test_a_wrong_option_and_a_wrong_value_are_found():
    for line in ("tvit train --lora-rnk 8", "tvit train --attention sideways", "tvit eval --top-k 0"):
        with pytest.raises(Exception, match=r"lora-rnk|sideways|top-k"):
            validate(line)


@pytest.mark.parametrize("verb", VERBS)
def test_help_ends_with_valid_examples(verb):
    lines = VERBS[verb].examples.splitlines()
    assert 2 <= len(lines) <= 4
    for line in lines:
        assert line.startswith(f"tvit {verb}")
        validate(line)
    help_text = tvit(verb, "--help").out
    assert [line.strip() for line in help_text.partition("EXAMPLES")[2].splitlines() if line.strip()] == lines


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_anchors_resolve(page):
    for link in links(page):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_named_files_exist(page):
    assert [name for name in named_files(page) if not (ROOT / name).exists()] == []


def test_every_page_is_linked_from_the_readme():
    linked = {
        (README.parent / link.partition("#")[0]).resolve() for link in links(README) if "://" not in link
    }
    assert {page for page in PAGES if page != README} <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_page_is_longer_than_250_lines(page):
    assert len(page.read_text(encoding="utf-8").splitlines()) <= 250


def test_pictures_are_few_settings_fresh_and_every_verb_is_shown():
    pictures = sorted((ROOT / "docs" / "images").iterdir())
    assert len(pictures) <= 6
    assert [path.name for path in pictures if path.stat().st_size > 150_000] == []
    assert PAGE.read_text(encoding="utf-8") == make_page(), (
        "run: python tests/settings_page.py > docs/settings.md"
    )
    assert {line.split()[1] for page in PAGES for line in commands(page)} == set(program().commands)


# The commands that are run


CODE = """
import importlib.util, shlex, sys
where = "tvit_cli.cli" if importlib.util.find_spec("tvit_cli.cli") else "tvit_cli.cli"
program = importlib.import_module(where)
for line in sys.argv[1:]:
    print(f"$ {line}", flush=True)
    try:
        program.run(shlex.split(line)[1:])
    except SystemExit as end:
        if end.code:
            raise
"""


def run_commands(folder, lines):
    """Run command lines in a folder, in one process, made tiny by environment variables."""
    result = run_python("-c", CODE, *lines, cwd=folder, timeout=200, HF_HUB_OFFLINE="1", **TINY)
    assert result.code == 0, f"{result.out}{result.err}"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, make_classes):
    """A folder with what the pages name: my_videos, clips/, single clips, the runs motions-1 and mine."""
    folder = tmp_path_factory.mktemp("docs")
    people = ("anna", "ben", "cem", "dora", "eva", "finn")
    names = [f"{person}_g{number:02d}_c01.avi" for number, person in enumerate(people, start=1)]
    make_classes(folder / "my_videos", {"jump": names, "walk": names})
    for there in ("clips", "new_clips"):
        shutil.copytree(folder / "my_videos" / "jump", folder / there)
    for name in ("clip.avi", "match.mp4", "data/motions/test/MoveLeft/v_MoveLeft_g22_c01.avi"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "clips" / names[0], folder / name)
    run_commands(folder, ["tvit train --path-to-data my_videos --experiment-name motions-1"])
    shutil.copytree(folder / "working_directory" / "motions-1", folder / "working_directory" / "mine")
    return folder


RUN = [pytest.param(page, id=page.stem) for page in PAGES if any(block.is_run for block in blocks(page))]


@pytest.mark.parametrize("page", RUN)
def test_marked_commands_run_in_the_order_of_the_page(page, workspace, tmp_path):
    folder = Path(shutil.copytree(workspace, tmp_path / "work"))
    lines = [line for block in blocks(page) if block.is_run for line in block.commands()]
    if any(line.startswith("tvit train") and "--experiment-name mine" in line for line in lines):
        shutil.rmtree(folder / "working_directory" / "mine")
    run_commands(folder, lines)


PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.stem)
def test_python_of_a_page_runs_in_its_order(page, workspace, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(workspace, tmp_path / "work"))
    for name, value in TINY.items():
        if name != "TVIT_EPOCHS":  # given in each training
            monkeypatch.setenv(name, value)
    names = {}
    for block in blocks(page):
        if block.language == "python":
            exec(block.code.replace("epochs=30", "epochs=2"), names)
    assert names["timeline"].segments


def test_examples_of_help_run(workspace, tmp_path):
    folder = Path(shutil.copytree(workspace, tmp_path / "work"))
    shutil.rmtree(folder / "working_directory" / "mine")
    lines = [line for verb in VERBS.values() for line in verb.examples.splitlines()]
    on_pages = {line for page in PAGES for block in blocks(page) if block.is_run for line in block.commands()}
    slow = ("ucf101", "quickstart", "download motions", "data motions", "onnx")
    run_commands(folder, [x for x in lines if x not in on_pages and not any(word in x for word in slow)])


TEXT = README.read_text(encoding="utf-8")


def test_readme_is_short_and_begins_with_its_two_commands():
    assert len(TEXT.split()) <= 1600
    assert len(TEXT.splitlines()) <= 220
    first, second = [block.commands() for block in blocks(README) if block.language == "bash"][:2]
    assert first == ["python -m pip install .", "tvit train --preset quickstart"]
    assert second == ['python -m pip install ".[test]"', "python -m pytest"]
    assert "README.md" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert set(re.findall(r"--preset (\w+)", TEXT)) <= set(presets())


def test_the_walk_of_the_first_hour_names_tests_that_exist():
    assert {test for item in ITEMS for test in names_of(item)} <= existing_tests().keys()
