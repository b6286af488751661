"""`tvit train` from videos to a model folder: its output, its notes, its refusals."""

import json

import pytest
import torch
from tiny import COLOURS, records, settings

from tvit_cli import cli
from tvit_cli.engine.train import train
from tvit_cli.engine.train.checkpoint import list_checkpoints
from tvit_cli.errors import DataError, ModelError, TvitError
from tvit_cli.model.folder import load_model
from tvit_cli.results import Note


def test_a_run_leaves_a_model_folder_metrics_and_checkpoints(trained, clips):
    result = trained()
    model, card = load_model(result.model)
    assert card.labels == tuple(COLOURS)
    assert card.preprocessing.n_frames == 4 and card.preprocessing.frame_size == 32
    assert card.settings["path_to_data"] == str(clips)
    assert card.base is not None and card.base.name.endswith("tiny-vit")
    assert model(torch.zeros(1, 4, 3, 32, 32)).shape == (1, 3)
    assert [r["epoch"] for r in records(result)] == [1, 2]
    assert {"train_loss", "train_clip_top1", "val_loss", "val_video_top1", "val_video_top2"} <= records(
        result
    )[0].keys()
    assert [p.name for p in list_checkpoints(result.run / "checkpoints")] == ["step-000003", "step-000006"]
    assert json.loads((result.run / "settings.json").read_text())["lora_rank"] == 8


@pytest.mark.parametrize(
    "changes",
    [
        {"train": "classifier"},
        {"train": "last-1"},
        {"lora_rank": 0, "lora_bias": "all"},
        {"lora_init": "pissa"},
        {"lora_init": "orthogonal"},
    ],
    ids=str,
)
def test_a_frozen_model_of_tubelets_is_said_to_see_one_frame_of_each(clips, pretrained, tmp_path, changes):
    events = []
    facts = {"path_to_data": str(clips), "hf_model_name": str(pretrained), "working_directory": tmp_path}
    train(settings(**facts, **changes, tubelet_size=2, epochs=1), events.append)
    assert any("The model uses one frame of each tubelet of 2" in str(event) for event in events)


def test_other_scheme_at_start_and_ineffective_settings_are_noted(trained, clips, tmp_path):
    before = trained(attention="divided", epochs=1)
    events = []
    facts = {"path_to_data": str(clips), "hf_model_name": str(before.model), "working_directory": tmp_path}
    train(settings(**facts, epochs=1, randaugment_magnitude=5), events.append)
    said = " ".join(map(str, events))
    assert "was trained with --attention divided. Its temporal weights are left out." in said
    assert "--randaugment-magnitude 5: no effect without --randaugment" in said
    events.clear()
    train(settings(**facts, epochs=1, attention="divided"), events.append)
    assert "are left out" not in " ".join(map(str, events))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"lora_target_modules": "qq"}, ModelError, "patch_embed"),
        ({"lora_rank_pattern": {"fc1": 2}}, ModelError, "Add it to --lora-target-modules"),
        ({"lora_init": "pissa", "lora_target_modules": "patch_embed"}, ModelError, "is a convolution"),
        ({"train": "last-9"}, ModelError, "--train last-9: the model has"),
        ({"img_size": 33}, ModelError, "--img-size 33 is not a multiple"),
        ({"hf_model_name": "no/such-model"}, ModelError, "no/such-model"),
        ({"val_groups": "g99"}, DataError, "g99"),
        ({"resume_from_checkpoint": "latest"}, TvitError, "no run with a checkpoint"),
        pytest.param(
            {"device": "cuda"}, ModelError, "--device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named_and_leaves_no_run(trained, changes, error, words, tmp_path):
    with pytest.raises(error, match=words):
        trained(**changes)
    assert not list(tmp_path.iterdir())


def test_top_k_above_the_number_of_classes_is_clamped_and_said(clips, pretrained, tmp_path):
    events = []
    facts = settings(
        path_to_data=str(clips), hf_model_name=str(pretrained), working_directory=tmp_path, top_k=50
    )
    result = train(facts, events.append)
    assert any("top-3" in e.text for e in events if isinstance(e, Note))
    assert "val_video_top3" in records(result)[0]


def test_print_settings_shows_sources_and_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TVIT_EPOCHS", "7")
    words = ["train", "--show-settings", "--preset", "quickstart", "--lora-rank", "3"]
    cli.build_app()(words, standalone_mode=False)
    shown = {line.split()[0]: line.split(maxsplit=2)[1:] for line in capsys.readouterr().out.splitlines()}
    assert [word.strip() for word in shown["lora_rank"]] == ["3", "flag"]
    assert [word.strip() for word in shown["epochs"]] == ["7", "environment"]
    assert [word.strip() for word in shown["width"]] == ["128", "preset quickstart"]
    assert [word.strip() for word in shown["adam_beta1"]] == ["0.9", "default"]
    assert not list(tmp_path.iterdir())
