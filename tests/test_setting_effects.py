"""Every training setting has an effect on a run."""

import json
from pathlib import Path

import pytest
import torch
from tiny import last_weights, records, run, same

from tvit_cli.engine.train.checkpoint import list_checkpoints
from tvit_cli.model.folder import load_model
from tvit_cli.results import TrainResult
from tvit_cli.settings.train import TrainSettings


def saved_steps(result: TrainResult) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(result.run / "checkpoints")]


def weights_differ(base, changed):
    return not same(last_weights(base), last_weights(changed))


def counts_differ(base, changed):
    return records(base, "step")[-1]["step"] != records(changed, "step")[-1]["step"] or weights_differ(
        base, changed
    )


def formats_differ(base, changed):
    """The training's format, and that of the test at its end."""
    said = [
        json.loads((result.run / "eval" / "test" / "metrics.json").read_text())["mixed_precision"]
        for result in (base, changed)
    ]
    return weights_differ(base, changed) and said == ["no", "bf16"]


def average_is_kept(base, changed):
    """The raw weights are trained as ever; what is validated and saved is another thing."""
    a, b = (load_model(result.model)[0].classifier.weight for result in (base, changed))
    said = "ema_decay" in records(changed)[0] and "ema_decay" not in records(base)[0]
    return same(last_weights(base), last_weights(changed)) and not torch.equal(a, b) and said


NO_BASE = {"hf_model_name": None, "width": 16, "depth": 1, "num_heads": 2, "patch_size": 16}


ALL = {"train": "all"}


# Groups of which class Red has others than the two that are held out: 6 of its clips are in train, 4 of the rest.
UNEVEN = {"group_pattern": r"(Red_g0[12]|g\d+)", "val_groups": "g01", "test_groups": "g02"}


STANDSTILL = {"epochs": 4, "learning_rate": 1e-30}


# fmt: off
# setting -> a value with which a run ends with other weights than the default run
WEIGHTS = {
    "seed": 5, "n_frames": 2, "img_size": 48, "frame_grid": 4, "resize": "squash", "hf_model_name": None,
    "attention": "divided", "pool": "attentive", "feature_norm": True, "custom_weight_init": True,
    "train": "classifier", "lora_rank": 4, "lora_alpha": 32, "lora_rank_pattern": {"q": 2},
    "lora_alpha_pattern": {"q": 32}, "lora_use_rslora": True, "lora_use_dora": True, "lora_init": "gaussian",
    "lora_dropout": 0.5, "lora_bias": "lora_only", "lora_target_modules": "fc1", "lora_exclude_modules": "q",
    "warmup_epochs": 2, "per_gpu_batch_size": 5, "learning_rate": 0.02, "weight_decay": 0.5, "label_smoothing": 0.2,
    "bias_weight_decay": True, "max_grad_norm": 0.01, "adam_beta1": 0.5, "adam_beta2": 0.9, "adam_epsilon": 1e-2,
    "crop_scale_min": 1.0, "horizontal_flip": 0.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.3,
    "drop_path": 0.5, "token_drop": 0.5, "layer_decay": 0.5, "mixup": 0.8, "cutmix": 1.0, "randaugment": 2,
    "random_erasing": 1.0,
}
# fmt: on
# setting -> (base settings, value, condition on the base run and the changed one)
EFFECTS = {
    **{name: ({}, value, weights_differ) for name, value in WEIGHTS.items()},
    "experiment_name": ({}, "mine", lambda a, b: b.run.name == "mine"),
    "working_directory": ({}, "elsewhere", lambda a, b: b.run.parent.name == "elsewhere"),
    "log_wandb": ({}, True, lambda a, b: (b.run / "wandb").is_dir() > (a.run / "wandb").exists()),
    "log_tensorboard": (
        {},
        True,
        lambda a, b: (b.run / "tensorboard").is_dir() > (a.run / "tensorboard").exists(),
    ),
    "test_at_end": ({}, True, lambda a, b: a.test is None and b.test is not None),
    "top_k": ({}, 3, lambda a, b: ("val_video_top3" in records(b)[0]) > ("val_video_top3" in records(a)[0])),
    "group_pattern": ({"val_groups": "none"}, r"_g0(?=[1-3])|_g", counts_differ),
    "val_groups": ({}, "2", counts_differ),
    "test_groups": ({}, "2", counts_differ),
    "width": (NO_BASE, 32, weights_differ),
    "depth": (NO_BASE, 2, weights_differ),
    "num_heads": (NO_BASE, 4, weights_differ),
    "patch_size": (NO_BASE, 8, weights_differ),
    "tubelet_size": (ALL, 2, weights_differ),
    "norm_weight_decay": (ALL, True, weights_differ),
    "temporal_depth": ({"attention": "factorized"}, 1, weights_differ),
    "temporal_rate": ({"attention": "factorized"}, 1.0, weights_differ),
    "epochs": ({}, 1, counts_differ),
    "gradient_accumulation_steps": ({}, 2, counts_differ),
    "global_batch_size": ({}, 8, counts_differ),
    "mixed_precision": ({"test_at_end": True}, "bf16", formats_differ),
    "ema_decay": ({}, 0.9, average_is_kept),
    "class_weights": (UNEVEN, "balanced", weights_differ),
    "balanced_sampling": (UNEVEN, True, weights_differ),
    "randaugment_magnitude": ({"randaugment": 2}, 3.0, weights_differ),
    "patience": (STANDSTILL, 1, lambda a, b: len(records(a)) == 4 and len(records(b)) == 2),
    "repeats": ({}, 2, lambda a, b: (records(a)[0]["step"], records(b)[0]["step"]) == (3, 6)),
    "checkpoint_dir": ({}, "saved", lambda a, b: (b.run / "saved").is_dir()),
    "save_checkpoint_interval": ({}, 2, lambda a, b: len(saved_steps(b)) == 1),
    "save_every_steps": ({}, 2, lambda a, b: saved_steps(b) == [2, 3, 4, 6]),
    "save_every_minutes": ({}, 1e-9, lambda a, b: saved_steps(b) == [1, 2, 3, 4, 5, 6]),
    "max_no_of_checkpoints": ({}, 1, lambda a, b: len(saved_steps(b)) == 1),
}


BASES: dict[str, TrainResult] = {}


@pytest.mark.parametrize("name", EFFECTS)
def test_no_setting_without_an_effect(name, inputs, tmp_path, tmp_path_factory, monkeypatch):
    base, value, shows = EFFECTS[name]
    facts = {**inputs, "working_directory": tmp_path, **base}
    if str(base) not in BASES:
        BASES[str(base)] = run(**{**facts, "working_directory": tmp_path_factory.mktemp("base")})
    if name == "working_directory":
        value = tmp_path / value
    monkeypatch.setenv("WANDB_MODE", "offline")
    changed = run(**{**facts, name: value})
    assert shows(BASES[str(base)], changed)


# setting -> the test of its effect elsewhere
TESTED_ELSEWHERE = {
    "dry_run": "test_a_dry_run_says_what_a_training_takes_and_writes_nothing",
    "gradient_checkpointing": "test_gradient_checkpointing_has_the_same_bits_with_less_memory",
    "compile": "test_compiled_run_compiles_each_size_once_and_keeps_names",
    "show_settings": "test_print_settings_shows_sources_and_trains_nothing",
    "overwrite": "test_overwrite_replaces_a_run_with_all_that_tvit_left",
    "num_processes": "test_two_processes_take_the_steps_of_one_and_one_of_them_speaks",
    "split": "test_the_official_split_decides_what_is_trained_on",
    "strict": "test_leaks_are_said_and_strict_refuses_them",
    "max_bad": "test_more_unreadable_videos_than_allowed_stop_the_run_before_it_starts",
    "path_to_data": "test_unusable_data_is_refused_before_the_model_is_built",
    "resume_from_checkpoint": "test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bits",
    "device": "test_what_cannot_be_used_is_named_and_leaves_no_run",
    "num_workers": "test_workers_are_as_many_as_asked_for",
}


def test_every_setting_has_a_test_of_its_effect():
    assert EFFECTS.keys() | TESTED_ELSEWHERE.keys() == set(TrainSettings.model_fields)
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert [name for name in TESTED_ELSEWHERE.values() if f"def {name}(" not in tests] == []
