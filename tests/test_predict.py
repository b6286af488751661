"""`tvit predict`: labels for videos, from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_clips, run

from tvit_cli.engine.predict import find_videos, predict
from tvit_cli.engine.train import TrainResult
from tvit_cli.errors import DataError, ModelError
from tvit_cli.settings.predict import PredictSettings


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    root = tmp_path_factory.mktemp("predict")
    return run(
        path_to_data=str(make_clips(root / "colours")),
        working_directory=root / "working_directory",
        hf_model_name=None,
        width=16,
        depth=1,
        num_heads=2,
        train="all",
        epochs=8,
    )


@pytest.fixture(scope="module")
def clip(trained: TrainResult) -> Path:
    return next(trained.run.parents[1].glob("colours/Red/*_g06_*"))


def tvit(trained: TrainResult, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("TVIT_")}
    return subprocess.run(
        [sys.executable, "-m", "tvit_cli", "predict", *arguments],
        cwd=trained.run.parents[1],
        env={**environ, "PYTHONPATH": str(Path(__file__).parents[1]), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_clip_is_labelled_by_the_newest_model_with_nothing_else_said(
    trained: TrainResult, clip: Path
) -> None:
    result = tvit(trained, str(clip), "--top-k", "2")
    assert result.returncode == 0, result.stderr
    assert "Red" in result.stdout.splitlines()[1]
    assert len(result.stdout.strip().splitlines()) == 3  # a heading and two labels


def test_json_lines_are_the_same_bytes_from_run_to_run(trained: TrainResult) -> None:
    first, second = (tvit(trained, "colours", "--json", "-q") for _ in range(2))
    assert first.stdout == second.stdout and first.returncode == 0
    answers = [json.loads(line) for line in first.stdout.splitlines()]
    assert len(answers) == 18
    assert {"label", "score"} == answers[0]["predictions"][0].keys()
    right = sum(a["predictions"][0]["label"] in a["video"] for a in answers)
    assert right >= 15


def test_a_broken_clip_is_reported_the_rest_is_predicted_and_the_exit_code_is_1(
    trained: TrainResult, clip: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.avi").write_text("not a video")
    (tmp_path / "empty.mp4").touch()
    result = tvit(trained, str(tmp_path / "text.avi"), str(clip), str(tmp_path / "empty.mp4"), "--json")
    assert result.returncode == 1
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert ["error" in a for a in answers] == [True, False, True]
    assert "2 of 3 videos could not be read" in result.stderr
    assert "Traceback" not in result.stderr


def test_predictions_are_the_evaluations(trained: TrainResult, clip: Path) -> None:
    from tvit_cli.engine.eval import evaluate
    from tvit_cli.settings.eval import EvalSettings

    result = evaluate(EvalSettings(model=trained.model, num_workers=0, device="cpu"))
    rows = [line.split(",") for line in (result.output / "scores.csv").read_text().splitlines()]
    by_name = {row[0]: dict(zip(rows[0][3:], row[3:], strict=True)) for row in rows[1:]}
    for name, scores in by_name.items():
        path = trained.run.parents[1] / "colours" / name
        settings = PredictSettings(paths=(path,), model=trained.model, top_k=3, device="cpu")
        for label, score in predict(settings).predictions[0].labels:
            assert score == pytest.approx(float(scores[label]), abs=2e-6)


def test_top_k_above_the_number_of_classes_is_clamped_and_said(trained: TrainResult, clip: Path) -> None:
    result = tvit(trained, str(clip), "--top-k", "50")
    assert result.returncode == 0
    assert "--top-k 50" in result.stderr


def test_folders_stand_for_the_videos_below_them(tmp_path: Path, trained: TrainResult) -> None:
    found = find_videos([trained.run.parents[1] / "colours" / "Red"])
    assert len(found) == 6 and found == sorted(found)
    with pytest.raises(DataError, match="no video in this folder"):
        find_videos([tmp_path])
    with pytest.raises(DataError, match="no such file"):
        find_videos([tmp_path / "nowhere.avi"])


def test_without_any_model_it_says_to_train_first(tmp_path: Path, clip: Path) -> None:
    with pytest.raises(ModelError, match="train"):
        predict(PredictSettings(paths=(clip,), working_directory=tmp_path / "none"))


def test_predicting_imports_neither_peft_nor_accelerate_nor_transformers(
    trained: TrainResult, clip: Path
) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from tvit_cli.engine.predict import predict\n"
        "from tvit_cli.settings.predict import PredictSettings\n"
        "predict(PredictSettings(paths=(Path(sys.argv[1]),), model=Path(sys.argv[2])))\n"
        "heavy = {'transformers', 'accelerate', 'peft', 'wandb', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code, str(clip), str(trained.model)], check=True)
