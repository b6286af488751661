"""The command line: one option per field, help, exit codes, what is imported."""

import json
import subprocess
import sys

import pytest
from documents import program
from entry import run_python
from entry import tvit as call
from tiny import make_clips

import tvit_cli
from tvit_cli import cli
from tvit_cli.settings.base import SYNONYMS, flag
from tvit_cli.settings.train import TrainSettings


@pytest.fixture(autouse=True)
def _wide_screen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def test_help_all_of_train_shows_every_setting_with_its_default_and_range():
    text = call("train", "--help-all").out
    for name, field in TrainSettings.model_fields.items():
        assert flag(name) in text, name
        assert f"default {cli.default(field)}" in " ".join(text.split()), name
    assert "at least 0, at most 1024; default 8" in " ".join(text.split())
    for panel in ("LoRA", "Optimisation", "Augmentation", "Checkpoints", "Everywhere"):
        assert panel in text.splitlines()


def test_help_of_train_fits_one_screen_of_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = call("train", "--help").out.splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 80
    assert 12 <= sum(line.startswith("  --") for line in lines) <= 18
    assert len(lines[lines.index("EXAMPLES") + 1 :]) == 3
    assert any("--help-all" in line for line in lines)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_no_option_name_is_cut_at_80_columns(verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = call(verb, "--help-all").out
    assert max(map(len, text.splitlines())) <= 80
    for option in program().commands[verb].params:
        names = [*option.opts, *option.secondary_opts] if option.param_type_name == "option" else []
        assert {*names, option.metavar or names[0]} <= {word.rstrip(",.;") for word in text.split()} | {"A B"}


@pytest.mark.parametrize("verb", ["download", "export"])
def test_help_of_a_verb_with_few_options_shows_all(verb):
    assert call(verb, "--help").out == call(verb, "--help-all").out


def test_help_of_the_program_starts_own_videos_in_three_commands(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = [line.strip() for line in call("--help").out.splitlines()]
    start = next(number for number, line in enumerate(lines) if line.startswith("YOUR OWN VIDEOS"))
    assert [line.split()[:2] for line in lines[start + 1 : start + 4]] == [
        ["tvit", "train"], ["tvit", "eval"], ["tvit", "predict"],
    ]  # fmt: skip
    assert max(map(len, lines)) <= 80 and "--preset quickstart" in lines[-1]


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("train --lr 1e-3", ["--lr", "--learning-rate"]),
        ("train --frame-stride 4", ["--frame-stride", "--clip-seconds"]),
        ("train --batch_size 4", ["--batch-size", "--global-batch-size or --per-gpu-batch-size"]),
        ("eval --batch-size 4", ["--batch-size", "--per-gpu-batch-size"]),
        ("train --model vit", ["--model", "--hf-model-name"]),
        ("train --data videos", ["--data", "--path-to-data"]),
        ("predict --data videos", ["--data", "VIDEO"]),
        ("train videos", ["videos", "--path-to-data videos"]),
        ("infer clip.avi", ["infer", "predict"]),
        ("trian", ["trian", "train"]),
        ("eval --subset validation", ["--subset", "validation", "Did you mean val?"]),
        ("train --lora-rnak 8", ["--lora-rnak", "--lora-rank"]),
        ("train --colour-space rgb", ["--colour-space", "tvit train --help-all"]),
        ("train --epochs", ["--epochs: requires an argument", "tvit train --help-all"]),
    ],
)
def test_names_of_other_programs_are_suggested_by_meaning(line, names):
    ended = call(*line.split())
    assert ended.code == 2 and not ended.out
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1
    for name in names:
        assert name in ended.err


def test_config_files_and_suggestions_know_every_setting(tmp_path):
    (tmp_path / "other.toml").write_text("lr = 0.1\n")
    assert "Did you mean learning_rate?" in call("train", "--config", tmp_path / "other.toml").err
    keys = {p.name for verb in program().commands.values() for p in verb.params}
    assert {key for found in SYNONYMS.values() for key in found} <= keys
    (tmp_path / "settings.json").write_text(json.dumps({"path_to_data": "nowhere"}))
    assert "nowhere" in call("train", "--config", tmp_path / "settings.json").err


@pytest.mark.parametrize(("verb", "function"), [("eval", "evaluate"), ("export", "export")])
def test_a_model_is_an_option_or_an_argument(verb, function, monkeypatch):
    seen = []
    monkeypatch.setattr(cli.commands, function, lambda loaded, console: seen.append(loaded.settings.model))
    for words in (["--model", "mine"], ["-m", "mine"], ["mine"]):
        assert call(verb, *words).code == 0
    assert list(map(str, seen)) == ["mine"] * 3
    twice = call(verb, "mine", "--model", "yours")
    assert twice.code == 2 and "MODEL mine and --model yours" in twice.err


def test_help_and_bad_flags_load_neither_torch_nor_transformers():
    lines = ("--help", "train --help", "train --help-all", "--version", "train --epcohs 3", "infer")
    code = (
        "import sys\n"
        "from tvit_cli.cli import run\n"
        "for line in sys.argv[1:]:\n"
        "    try: run(line.split())\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'peft', 'av', 'numpy', 'wandb'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code, *lines], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (
            "train --lora_rank 3 --per_gpu-batch_size=5 --no_log_wandb",
            {"lora_rank": 3, "per_gpu_batch_size": 5, "log_wandb": False},
        ),
        (
            "train --lora-bias lora_only --experiment-name a_b",
            {"lora_bias": "lora_only", "experiment_name": "a_b"},
        ),
        ("predict a.avi b --top-k 3 --json", {"paths": ("a.avi", "b"), "top_k": 3, "json_lines": True}),
    ],
)
def test_words_become_settings_with_underscores_or_hyphens(words, found, monkeypatch):
    seen = []
    for verb in ("train", "predict"):
        monkeypatch.setattr(cli.commands, verb, lambda loaded, console: seen.append(loaded))
    cli.build_app()(words.split(), standalone_mode=False)
    assert {name: getattr(seen[0].settings, name) for name in found} == found
    assert {seen[0].origins[name] for name in found} == {"flag"}


def test_version_is_the_packages_and_bad_flags_come_together():
    assert call("--version").out.strip() == f"tvit {tvit_cli.__version__}"
    result = call("train", "--epochs", "none", "--lora-rank", "-1", "--resize", "stretch")
    assert result.code == 2 and "Traceback" not in result.err
    for name in ("--epochs: none", "--lora-rank: -1", "--resize: stretch"):
        assert name in result.err


def test_without_data_train_says_what_to_do_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("train")
    assert result.code == 2 and "--path-to-data" in result.err and "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []
    debugged = run_python("-m", "tvit_cli", "train", cwd=tmp_path, TVIT_DEBUG="1")
    assert "Traceback" in debugged.err


def test_a_download_that_failed_is_no_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("download", "ucf101", "--archive", "nope.zip")
    assert result.code == 2 and "--archive nope.zip: no such file" in result.err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "data" / "ucf101").mkdir(parents=True)
    (tmp_path / "data" / "ucf101" / ".lock").touch()
    result = call("train")
    assert result.code == 2 and "tvit download ucf101" in result.err


def test_a_check_ends_with_what_it_found(tmp_path):
    videos = make_clips(tmp_path / "colours", groups=2)
    words = ("extract", "--check", "--num-workers", 0, "--path-to-data", videos)
    whole = call(*words)
    assert whole.code == 0 and "6 of 6 videos can be read." in whole.out + whole.err
    assert [json.loads(line)["problem"] for line in call(*words, "--json").out.splitlines()] == [""] * 6
    next(videos.rglob("*.avi")).write_bytes(b"")
    spoilt = call(*words)
    assert spoilt.code == 1 and "error: 1 of 6 videos cannot be read." in spoilt.err
    assert "can be read." not in spoilt.out
    assert "the file is empty" in spoilt.out and spoilt.out.count(".avi") == 1
    for fact in ("clips    3 classes: ", "length   1.2 s; a video 0.24 to 0.24 s", "size     48x40 (5)"):
        assert fact in spoilt.out
    assert call(*words, "--verbose").out.count(".avi") == 6


def test_a_screen_without_the_letters_of_a_name_is_shown_others(tmp_path):
    videos = make_clips(tmp_path / "caf\u00e9", groups=1)
    words = ("extract", "--check", "--json", "--num-workers", 0, "--path-to-data", videos)
    shown = run_python("-m", "tvit_cli", *words, PYTHONIOENCODING="ascii")
    assert shown.code == 0 and "caf\\" in shown.out, shown.err
