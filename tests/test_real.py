"""Train, eval and predict on real clips: Weizmann with a pretrained ViT."""

import os
from pathlib import Path

import pytest
from tiny import run

from tvit_cli.engine.evaluate import evaluate
from tvit_cli.engine.predict import predict
from tvit_cli.settings.eval import EvalSettings
from tvit_cli.settings.predict import PredictSettings

pytestmark = pytest.mark.real


def weights():
    folder = Path(os.environ.get("TVIT_TEST_DATA", "")).parent / "weights" / "vit-small-patch14-224"
    if not os.environ.get("TVIT_TEST_DATA") or not folder.is_dir():
        pytest.skip("no pretrained weights beside TVIT_TEST_DATA")
    return folder


def test_people_who_were_left_out_are_scored_and_predicted(real_data, tmp_path):
    result = run(
        path_to_data=str(real_data / "weizmann"), working_directory=tmp_path, hf_model_name=str(weights()),
        group_pattern="^([a-z]+)_", test_groups="daria,eli,moshe", val_groups="none", img_size=42, n_frames=2,
        resize="squash", epochs=1, learning_rate=5e-4, train="classifier", top_k=5, num_workers=1,
    )  # fmt: skip
    scored = evaluate(EvalSettings(model=result.model, device="cpu", num_workers=0))
    assert scored.metrics["videos"] == 30
    assert {name.split("/")[1].split("_")[0] for name in read_names(scored.output)} == {
        "daria",
        "eli",
        "moshe",
    }
    answer = predict(
        PredictSettings(paths=(real_data / "weizmann" / "walk",), model=result.model, device="cpu")
    )
    assert len(answer.predictions) == 9 and not any(p.error for p in answer.predictions)


def read_names(output):
    return [line.split(",")[0] for line in (output / "scores.csv").read_text().splitlines()[1:]]
