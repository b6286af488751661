"""Exit codes and streams: 0 with the answer on stdout; 2 or 1 with an error on stderr that names the thing."""

import json
import os
import signal

import pytest
from entry import run_python, tvit
from tiny import make_clips, make_model, make_pretrained

OK = [  # a command, and a word of its answer on stdout
    ("--version", "tvit "),
    ("--help", "extract"),
    ("train --help", "--lora-rank"),
    ("predict -h", "--top-k"),
    ("train --show-settings --lora-rank 3", "lora_rank"),
    ("train --show-settings --preset quickstart", "preset quickstart"),
    ("download --list", "ucf101"),
    ("extract --check --verbose --num-workers 0 --path-to-data colours", "v_Red_g01_c01.avi"),
    ("extract --num-workers 0 --path-to-data colours --output store-new", "store-new"),
    ("predict colours/Red/v_Red_g01_c01.avi --model model", "score"),
    ("predict colours/Red --model model --json", '"predictions"'),
    ("predict colours/Red --model model --csv", "video,rank,label,score"),
    ("eval --model model --path-to-data colours --subset all --device cpu --num-workers 0 --output scored", "video_top1"),
    ("export model --output exported --clips colours", "exported"),
    (
        "train --path-to-data colours --hf-model-name vit --img-size 32 --n-frames 2 --epochs 1 --device cpu "
        "--num-workers 0 --val-groups 1 --working-directory runs",
        "runs/colours-1/model",
    ),
]  # fmt: skip
BAD = [  # a command, its exit code, and the thing that stderr names
    ("bogus", 2, "bogus"),
    ("train --bogus", 2, "--bogus"),
    ("eval surplus", 2, "surplus"),
    ("train --lora-rank", 2, "--lora-rank"),
    ("train --epochs 0", 2, "--epochs"),
    ("train --epochs many --top-k 0", 2, "--top-k"),
    ("train --preset nope", 2, "nope"),
    ("train --config nope.toml", 2, "nope.toml"),
    ("train --config unknown.toml", 2, "epcohs"),
    ("train --path-to-data nowhere", 2, "nowhere"),
    ("train --path-to-data colours --hf-model-name vit --n-frames 3 --tubelet-size 2", 2, "--tubelet-size"),
    ("train --path-to-data colours --hf-model-name no/where --working-directory bad", 2, "no/where"),
    ("train --resume-from-checkpoint latest --experiment-name nope --working-directory runs", 2, "nope"),
    ("eval --model nowhere", 2, "nowhere"),
    ("eval --model model --subset bogus", 2, "bogus"),
    ("eval --model model --path-to-data nowhere", 2, "nowhere"),
    ("eval --compare model nowhere --path-to-data colours", 2, "nowhere"),
    ("predict", 2, "VIDEO"),
    ("predict nothing.avi --model model", 2, "nothing.avi"),
    ("predict colours/Red --model nowhere", 2, "nowhere"),
    ("predict colours/Red --model model --json --csv", 2, "--csv"),
    ("predict broken/Red/empty.avi --model model", 1, "empty.avi"),
    ("extract --path-to-data nowhere", 2, "nowhere"),
    ("extract --json --path-to-data colours", 2, "--json"),
    ("extract --check --num-workers 0 --path-to-data broken", 1, "cannot be read"),
    ("export nowhere", 2, "nowhere"),
    ("export model --format bogus", 2, "bogus"),
    ("export model --int8", 2, "--int8"),
    ("export model --output colours", 2, "colours"),
    ("export model --format adapter --output adapted", 2, "adapter"),
    ("download", 2, "NAME"),
    ("download bogus", 2, "bogus"),
    ("download motions --verify --repair", 2, "--repair"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exits")
    clips = make_clips(folder / "colours", groups=3)
    make_pretrained(folder / "vit")
    make_model(folder / "model", ["Blue", "Green", "Red"])
    (folder / "unknown.toml").write_text("epcohs = 3\n")
    for label in ("Blue", "Red"):
        (folder / "broken" / label).mkdir(parents=True)
        (folder / "broken" / label / "good.avi").write_bytes(next(clips.rglob("*.avi")).read_bytes())
    (folder / "broken" / "Red" / "empty.avi").touch()
    return folder


@pytest.fixture(autouse=True)
def _below_root(root, monkeypatch):
    for name in [name for name in os.environ if name.startswith("TVIT_") and name != "TVIT_TEST_DATA"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(root)


@pytest.mark.parametrize(("line", "answer"), OK, ids=[line[:60] for line, _ in OK])
def test_good_command_exits_0_and_answers_on_stdout(line, answer):
    ended = tvit(*line.split())
    assert ended.code == 0, ended.err
    assert answer in ended.out and "error:" not in ended.err


@pytest.mark.parametrize(("line", "code", "thing"), BAD, ids=[line[:60] for line, *_ in BAD])
def test_bad_command_names_the_thing_on_stderr(line, code, thing):
    ended = tvit(*line.split())
    assert (ended.code, "Traceback" in ended.err) == (code, False), ended.err
    assert thing in ended.err
    assert "error" not in ended.out.lower() and "bug in tvit" not in ended.err


def test_no_verb_is_2_json_is_all_of_stdout_and_processes_exit_alike():
    ended = tvit()
    assert ended.code == 2 and "extract" in ended.out + ended.err
    ended = run_python("-m", "tvit_cli", "predict", "colours/Red", "nothing.avi", "--model", "model")
    assert ended.code == 2 and not ended.out and ended.err.startswith("error: ")
    ended = tvit("predict", "colours/Red", "--model", "model", "--json")
    assert [set(json.loads(line)) for line in ended.out.splitlines()] == [{"video", "predictions"}] * 3


@pytest.mark.parametrize(
    ("line", "step", "advice"),
    [
        ("eval model --path-to-data colours", "evaluate.score", "Start again"),
        ("export model --output stopped", "export.reference", "Start again"),
        ("extract --path-to-data colours --output stopped", "extract.read_layout", "same command continues"),
        ("extract --path-to-data colours --check", "extract.read_layout", "same command continues"),
        ("download motions", "download.find", "same command continues"),
        ("train --path-to-data colours", "train.open_dataset", "Nothing is lost"),
    ],
)
def test_ctrl_c_is_acknowledged_and_named(line, step, advice, monkeypatch):
    monkeypatch.setattr(f"tvit_cli.engine.{step}", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    ended = tvit(*line.split())
    assert ended.code == 130 and "Traceback" not in ended.err
    *_, acknowledged, last = ended.err.splitlines()
    assert acknowledged == "Stopping…" and last.startswith("Stopped by Ctrl-C. ") and advice in last
