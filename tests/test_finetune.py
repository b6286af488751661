"""The preset finetune: settings chosen from the data, their reasons, and data that leaves little to choose."""

from dataclasses import replace

import pytest
from entry import tvit
from tiny import make_clips, run, settings

from tvit_cli.engine.train import set_up, train
from tvit_cli.engine.train.adapt import Facts, choose, fit_to_data, flips
from tvit_cli.errors import DataError, SettingsError
from tvit_cli.settings.base import load
from tvit_cli.settings.train import TrainSettings

pytestmark = pytest.mark.usefixtures("no_pictures")
FACTS = Facts(
    labels=("walk", "run"), train=600, val=90, val_is_chosen=True, test=90,
    on_cpu=True, patch=14, is_video=False, processes=1,
)  # fmt: skip


def finetune(**flags):
    return load(TrainSettings, preset="finetune", flags={"device": "cpu", **flags}, environ={}).settings


def chosen(facts=FACTS, **flags):
    return {name: value for name, (value, _) in choose(finetune(**flags), facts).items()}


def test_epochs_follow_from_the_budget_and_its_bounds():
    assert chosen(clip_passes=10_200)["epochs"] == 20
    assert chosen(replace(FACTS, train=50, val=0))["epochs"] == 32
    assert chosen(replace(FACTS, train=50_000, val=7_500))["epochs"] == 10


def test_few_validation_clips_are_given_back_to_training():
    few = chosen(replace(FACTS, val=29, train=190))
    assert few["val_groups"] == "none" and "patience" not in few
    many = chosen()
    assert "val_groups" not in many and many["patience"] == 5
    stated = chosen(replace(FACTS, val=12, val_is_chosen=False))
    assert "val_groups" not in stated and stated["patience"] >= 5


def test_batches_crops_and_frame_size_follow_from_clips_and_device():
    assert chosen()["per_gpu_batch_size"] == 6 and chosen()["crop_scale_min"] < 0.5
    middle = chosen(replace(FACTS, train=5_000))
    assert not {"per_gpu_batch_size", "crop_scale_min", "gradient_accumulation_steps"} & middle.keys()
    assert chosen(replace(FACTS, train=50_000, processes=4))["gradient_accumulation_steps"] == 2
    assert chosen()["img_size"] == 98 and chosen(replace(FACTS, patch=16))["img_size"] == 96
    assert "img_size" not in chosen(replace(FACTS, on_cpu=False))


def test_rates_are_those_of_the_trained_weights_and_their_family():
    assert chosen()["learning_rate"] == 5e-4 and chosen()["token_drop"] == 0.5
    assert "fc1" in chosen()["lora_target_modules"] and chosen()["lora_dropout"] == 0
    assert not {"lora_target_modules", "lora_dropout"} & chosen(hf_model_name="none").keys()
    assert chosen(hf_model_name="none")["learning_rate"] == 1.5e-3
    assert chosen(train="classifier")["learning_rate"] == 5e-3
    assert chosen(train="all")["layer_decay"] < 1
    video = chosen(replace(FACTS, is_video=True))
    assert not {"img_size", "feature_norm", "token_drop"} & video.keys()
    assert "feature_norm" not in chosen(hf_model_name="none")
    assert "token_drop" not in chosen(attention="space")


@pytest.mark.parametrize(
    ("labels", "share"),
    [
        (("left", "right", "up"), 0.0),
        (("TurnLeft", "Stop"), 0.0),
        (("up", "down"), 0.5),
        (("bright", "cleft"), 0.5),
    ],
)
def test_classes_named_after_a_side_are_not_mirrored(labels, share):
    value, reason = flips(labels)["horizontal_flip"]
    assert value == share
    assert ("up and down would not change" in reason) == (labels[0] == "left")


def test_preset_prints_value_and_reason_and_flags_override(clips, pretrained, tmp_path):
    flags = ["--path-to-data", str(clips), "--hf-model-name", str(pretrained), "--device", "cpu"]
    flags += ["--working-directory", str(tmp_path), "--epochs", "2", "--img-size", "32", "--num-workers", "0"]
    result = tvit("train", "--preset", "finetune", *flags)
    assert result.code == 0
    said = result.out + result.err
    assert "--val-groups none: 3 validation videos would be fewer than 30" in said
    assert "--horizontal-flip 0.5: no class name has a word for a side" in said
    assert "3 test videos: the 95 % interval of top-1 is up to ±50 points" in said
    assert "--epochs" not in said.split("Run:")[0] and "--img-size" not in said.split("Run:")[0]
    assert "schedule  2 epochs" in said and "8 frames of 32×32" in said and "Test top-1" in said


def test_resumed_finetune_run_keeps_its_settings(inputs, tmp_path):
    facts = {
        **inputs,
        "clip_passes": 40,
        "device": "cpu",
        "working_directory": tmp_path,
        "experiment_name": "a",
    }
    facts |= {"img_size": 32, "n_frames": 4, "num_workers": 0}
    first = train(TrainSettings.model_validate(facts))
    again = load(TrainSettings, config=first.run / "settings.json", environ={}).settings
    events = []
    assert fit_to_data(again, events.append) == again
    assert [event.level for event in events] == ["warning"]  # of the few test videos
    assert again.epochs == 10 and again.val_groups == "none" and again.crop_scale_min < 0.5


def test_from_takes_the_settings_of_its_run_not_those_of_the_budget():
    assert finetune(from_="mine").clip_passes is None
    with pytest.raises(SettingsError, match="--clip-passes 9: --from mine takes over"):
        finetune(from_="mine", clip_passes=9)


def test_budget_of_0_is_refused():
    refused = tvit("train", "--preset", "finetune", "--clip-passes", "0")
    assert refused.code == 2 and "--clip-passes: 0: it should be greater than or equal to 1" in refused.err


def test_reference_epochs_on_few_clips_name_the_preset(inputs, tmp_path):
    own = settings(**inputs, working_directory=tmp_path)
    facts = {key: getattr(own, key) for key in own.model_fields_set - {"epochs"}}
    events = []
    set_up(TrainSettings.model_validate(facts), events.append)
    assert sum("--preset finetune chooses" in str(event) for event in events) == 1
    events.clear()
    set_up(own, events.append)
    assert not any("--preset finetune" in str(event) for event in events)


def test_one_class_is_refused_before_anything_is_chosen(tmp_path, make_classes):
    root = make_classes(tmp_path / "one", {"walk": ["a_g01_c01.avi", "a_g02_c01.avi"]})
    events = []
    with pytest.raises(DataError, match="one class"):
        fit_to_data(TrainSettings(path_to_data=str(root), clip_passes=9), events.append)
    assert events == []


@pytest.mark.parametrize(
    "names", [["a_g01_c01.avi"], ["a_g01_c01.avi", "a_g01_c02.avi"]], ids=["one clip", "one group"]
)
def test_data_without_clips_to_spare_is_trained_on_whole(names, tmp_path, make_classes, pretrained):
    root = make_classes(tmp_path / "data", {"walk": names, "run": names})
    own = {"path_to_data": str(root), "hf_model_name": str(pretrained), "working_directory": tmp_path}
    own |= {"clip_passes": 4, "img_size": 32, "device": "cpu", "num_workers": 0, "epochs": 1}
    result = train(TrainSettings.model_validate(own))
    assert result.test is None and result.model.is_dir()


def test_videos_shorter_than_the_clip_are_trained_on(tmp_path, pretrained):
    root = make_clips(tmp_path / "data", groups=4)  # six frames each
    own = {"path_to_data": str(root), "hf_model_name": str(pretrained), "working_directory": tmp_path}
    result = run(**own, clip_passes=9, epochs=1, n_frames=8)
    assert result.test is not None and result.model.is_dir()
