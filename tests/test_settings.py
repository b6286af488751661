"""Settings from flags, files and variables, and the effect of each."""

import json
import os
from pathlib import Path

import pytest
import torch
from tiny import last_weights, records, run, same

from tvit_cli.engine.train.checkpoint import list_checkpoints
from tvit_cli.errors import SettingsError
from tvit_cli.model.folder import load_model
from tvit_cli.results import TrainResult
from tvit_cli.settings.base import extra, load, presets, read_config
from tvit_cli.settings.eval import EvalSettings
from tvit_cli.settings.export import ExportSettings
from tvit_cli.settings.predict import PredictSettings
from tvit_cli.settings.train import TrainSettings

pytestmark = pytest.mark.usefixtures("no_pictures")
VERBS = (TrainSettings, EvalSettings, PredictSettings)
# The parameter table of the system that tvit re-implements.
# fmt: off
REFERENCE = [
    "experiment_name", "path_to_data", "working_directory", "checkpoint_dir", "hf_model_name",
    "lora_rank", "lora_alpha", "lora_use_rslora", "lora_dropout", "lora_bias",
    "lora_target_modules", "lora_exclude_modules", "epochs", "warmup_epochs",
    "save_checkpoint_interval", "per_gpu_batch_size", "gradient_accumulation_steps",
    "learning_rate", "weight_decay", "label_smoothing", "custom_weight_init", "bias_weight_decay",
    "norm_weight_decay", "max_grad_norm", "img_size", "num_workers", "adam_beta1", "adam_beta2",
    "adam_epsilon", "log_wandb", "resume_from_checkpoint", "top_k", "max_no_of_checkpoints",
    "n_frames",
]


# fmt: on


def read(environ=None, **arguments):
    flags = arguments.pop("flags", {})
    return load(TrainSettings, flags=flags, environ=environ or {}, verbs=VERBS, **arguments)


def test_every_parameter_of_the_reference_is_a_setting_that_says_why():
    assert len(REFERENCE) == 34
    assert set(REFERENCE) <= set(TrainSettings.model_fields)
    for name in REFERENCE:
        facts = TrainSettings.model_fields[name].json_schema_extra
        assert isinstance(facts, dict) and facts["reference"], name
        default = TrainSettings.model_fields[name].default
        same = str(facts["reference"]).strip("'") in (str(default), f"{default:g}" if default == 1e-8 else "")
        assert same or facts["why"] or default in ((), None, 0.0, 8.0, 1e-8), name


def test_precedence_is_flag_environment_file_default(tmp_path):
    config = tmp_path / "c.toml"
    config.write_text("lora_rank = 1\nepochs = 1\ntop-k = 1\n")
    loaded = read(
        flags={"lora_rank": "3"}, environ={"TVIT_LORA_RANK": "2", "TVIT_EPOCHS": "2"}, config=config
    )
    assert (loaded.settings.lora_rank, loaded.settings.epochs, loaded.settings.top_k) == (3, 2, 1)
    assert loaded.origins["lora_rank"] == "flag"
    assert loaded.origins["epochs"] == "environment"
    assert loaded.origins["top_k"] == f"config {config}"
    assert loaded.origins["seed"] == "default"


def test_presets_and_saved_settings_yield_to_files_and_flags(tmp_path):
    preset = read(preset="quickstart").settings
    assert preset.hf_model_name is None
    config = tmp_path / "c.toml"
    config.write_text(f"epochs = {preset.epochs + 1}\n")
    assert read(preset="quickstart", config=config).settings.epochs == preset.epochs + 1
    saved = tmp_path / "mine.json"
    saved.write_text('{"lora_rank": 4, "epochs": 7}')
    flags = {"epochs": "9", "experiment_name": "mine"}
    loaded = read(
        flags=flags,
        beneath=lambda named: read_config(saved.with_name(f"{named.settings.experiment_name}.json")),
    )
    assert (loaded.settings.lora_rank, loaded.settings.epochs) == (4, 9)


def test_all_errors_are_reported_at_once_each_with_its_place(tmp_path):
    config = tmp_path / "c.toml"
    config.write_text("lora_rnak = 3\nweight_decay = -1\n")
    with pytest.raises(SettingsError) as caught:
        read(flags={"epochs": "many"}, environ={"TVIT_TOP_K": "0", "TVIT_LORA_RNAK": "8"}, config=config)
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert any("lora_rnak: unknown setting. Did you mean lora_rank?" in line for line in lines)
    assert any(
        "TVIT_LORA_RNAK: unknown environment variable. Did you mean TVIT_LORA_RANK?" in x for x in lines
    )
    assert any(line.startswith("--epochs: many: ") for line in lines)
    assert any(line.startswith("TVIT_TOP_K: 0: ") and "1" in line for line in lines)
    assert any(line.startswith(f"{config}, weight_decay: -1: ") for line in lines)


def test_lists_are_comma_separated_and_none_empties(tmp_path):
    config = tmp_path / "c.toml"
    config.write_text("max_grad_norm = 3.0\n")
    assert read(config=config, flags={"max_grad_norm": "none"}).settings.max_grad_norm is None
    assert read(config=config, flags={"val_groups": "none"}).settings.val_groups == "none"
    emptied = {"lora_exclude_modules": "none", "lora_rank_pattern": "none"}
    settings = read(preset="reference", flags=emptied).settings
    assert (settings.lora_exclude_modules, settings.lora_rank_pattern) == ((), {})
    assert read(flags={"lora_target_modules": "q, v,fc1"}).settings.lora_target_modules == ("q", "v", "fc1")


def test_pairs_are_given_as_text_or_as_a_table_and_come_back_from_json(tmp_path):
    expected = {"q": 16, "blocks.11.mlp.fc1": 4}
    typed = read(flags={"lora_rank_pattern": "q=16, blocks.11.mlp.fc1=4"}).settings
    config = tmp_path / "c.toml"
    config.write_text("[lora_rank_pattern]\nq = 16\n'blocks.11.mlp.fc1' = 4\n")
    saved = tmp_path / "settings.json"
    saved.write_text(typed.model_dump_json(include={"lora_rank_pattern"}))
    for found in (typed, read(config=config).settings, read(config=saved).settings):
        assert found.lora_rank_pattern == expected
    assert read(flags={"lora_alpha_pattern": "k=2.5"}).settings.lora_alpha_pattern == {"k": 2.5}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"learning_rate": "-1"}, "--learning-rate: -1"),
        ({"lora_rank_pattern": "q:16"}, "--lora-rank-pattern: q:16: 'q:16' is not of the form name=value"),
        ({"lora_rank_pattern": "q=1,q=2"}, "q is given twice"),
        ({"lora_rank_pattern": "q=0"}, "--lora-rank-pattern: q=0: it should be greater than or equal to 1"),
        ({"lora_alpha_pattern": "q=x"}, "--lora-alpha-pattern: q=x: it should be a valid number"),
        ({"train": "last-0"}, "--train: last-0: it should be lora, all, classifier, probe, or last-N"),
        ({"train": "half"}, "--train: half: it should be lora, all, classifier, probe, or last-N"),
        ({"lora_init": "pissa", "lora_use_dora": True}, "--lora-init pissa: it changes the weights"),
        ({"learning_rate": "nan"}, "--learning-rate: nan"),
        ({"mixup": "-0.1"}, "--mixup: -0.1"),
        ({"random_erasing": "1.5"}, "--random-erasing: 1.5"),
        ({"randaugment_magnitude": "11"}, "--randaugment-magnitude: 11"),
        ({"repeats": "3"}, "--repeats 3: it should divide the 8 clips per GPU"),
        ({"lora_dropout": "1"}, "--lora-dropout: 1"),
        ({"lora_bias": "some"}, "'none', 'lora_only' or 'all'"),
        ({"width": "64"}, "--width: fixed by the pretrained model"),
        ({"epochs": "3", "warmup_epochs": "4"}, "--warmup-epochs 4: it should be at most --epochs 3"),
        ({"tubelet_size": "2", "n_frames": "7"}, "it should be a multiple of --tubelet-size 2"),
        ({"attention": "space", "tubelet_size": "2"}, "Take --tubelet-size 1"),
        ({"attention": "joint", "temporal_depth": "1"}, "or take --attention factorized"),
        ({"attention": "divided", "temporal_rate": "0.5"}, "or take --attention factorized"),
        ({"attention": "factorized", "train": "classifier", "temporal_rate": "0.5"}, "--train classifier"),
        ({"experiment_name": "a/b"}, "one folder name"),
        ({"group_pattern": "("}, "not a regular expression"),
        ({"group_pattern": "(" * 20_000 + ")" * 20_000}, "it is not a regular expression"),
        ({"num_workers": "-1"}, "--num-workers: -1"),
    ],
)
def test_bad_values_name_the_flag_and_the_limit(flags, words):
    with pytest.raises(SettingsError) as caught:
        read(flags=flags)
    assert words in str(caught.value)


def test_defaults_follow_from_scratch_training_and_short_runs():
    assert read().settings.train == "lora"
    assert read(flags={"hf_model_name": "none"}).settings.train == "all"
    assert read(environ={"TVIT_HF_MODEL_NAME": "none"}).settings.train == "all"
    assert read(flags={"hf_model_name": "none", "train": "classifier"}).settings.train == "classifier"
    assert read(flags={"epochs": "20"}).settings.warmup() == 2
    assert read(flags={"epochs": "1000"}).settings.warmup() == 30
    assert read(flags={"epochs": "20", "warmup_epochs": "5"}).settings.warmup() == 5


def test_settings_of_adapters_without_an_adapter_are_known_to_be_idle():
    assert read(flags={"lora_bias": "all", "lora_exclude_modules": "q"}).settings.without_effect() == []
    whole = {"train": "all", "lora_rank": "4", "lora_bias": "all", "lora_rank_pattern": "q=3"}
    assert read(flags=whole).settings.without_effect() == ["lora_rank", "lora_rank_pattern", "lora_bias"]
    none = {"lora_rank": "0", "lora_bias": "all", "lora_exclude_modules": "q", "lora_use_dora": True}
    assert read(flags=none).settings.without_effect() == ["lora_use_dora"]
    assert read(flags={**none, "lora_bias": "lora_only"}).settings.without_effect() == [
        "lora_use_dora", "lora_bias",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("c.toml", "epochs = ", "is not TOML"),
        ("c.json", "{", "is not JSON"),
        ("c.json", "[1]", "no table"),
        ("c.json", "[" * 100_000, "is not JSON"),
        ("c.toml", "a = " + "[" * 100_000, "is not TOML"),
        ("c.toml", "#" * (2**20 + 1), r"1,048,577 bytes, more than the 1,048,576 of a config file"),
    ],
    ids=["half TOML", "half JSON", "a list", "deep JSON", "deep TOML", "large TOML"],
)
def test_config_files_that_are_no_table_too_deep_or_too_large_are_refused(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(SettingsError, match=words):
        read(config=tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_named_pipe_as_config_is_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "c.toml")
    with pytest.raises(SettingsError, match="is no regular file"):
        read(config=tmp_path / "c.toml")


def test_a_missing_config_file_and_an_unknown_preset_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="no such file"):
        read(config=tmp_path / "c.toml")
    with pytest.raises(SettingsError, match=r"unknown setting\. Did you mean lora_rank\?"):
        load(TrainSettings, flags={"LORA_RANK": 4}, environ={})
    with pytest.raises(SettingsError, match="Did you mean quickstart"):
        read(preset="quikstart")
    assert all(read(preset=preset) for preset in presets())


def test_models_are_described_alike_and_predict_says_how_to_call_it():
    verbs = (EvalSettings, PredictSettings, ExportSettings)
    assert {verb.model_fields["model"].description for verb in verbs} == {
        "Model folder, run folder, name on the Hugging Face hub, or checkpoint of the reference"
    }
    with pytest.raises(SettingsError, match=r"tvit predict clip.avi"):
        load(PredictSettings, flags={}, environ={}, verbs=VERBS)


def test_the_reference_preset_has_the_values_of_its_script():
    script = {
        "lora_rank": 4, "lora_alpha": 8, "lora_use_rslora": True, "lora_dropout": 0.1, "lora_bias": "lora_only",
        "lora_exclude_modules": ("classifier",), "max_grad_norm": 1.0, "warmup_epochs": 3, "epochs": 150,
        "save_checkpoint_interval": 1, "learning_rate": 3e-5, "weight_decay": 0.1, "adam_beta1": 0.9,
        "adam_beta2": 0.98, "adam_epsilon": 1e-6, "max_no_of_checkpoints": 3, "img_size": 224, "num_workers": 12,
        "top_k": 5, "n_frames": 18, "custom_weight_init": True, "log_wandb": True,
        "hf_model_name": "google/vit-base-patch16-224",
    }  # fmt: skip
    preset = read(preset="reference").settings
    assert {name: getattr(preset, name) for name in script} == script
    # The script's 144 clips are the sum of its passes: it divides them by the 8 steps it accumulates.
    assert preset.per_gpu_batch_size * preset.gradient_accumulation_steps == 144


def test_presets_have_the_values_and_the_panels_that_they_promise():
    panel = {
        name: field.default
        for name, field in TrainSettings.model_fields.items()
        if extra(field)["panel"] == "Regularisation"
    }
    assert len(panel) >= 10
    preset = read(preset="reference").settings
    assert {name: getattr(preset, name) for name in panel} == panel
    for name in ("video", "ucf101"):
        preset = read(preset=name).settings
        assert preset.global_batch_size is not None and isinstance(preset.per_gpu_batch_size, int)
        assert preset.global_batch_size % preset.per_gpu_batch_size == 0
    assert preset.ema_decay == 0.999 and preset.randaugment == 2 and preset.frame_grid == 32


def test_temporal_layers_learn_slowly_only_beside_pretrained_adapters():
    def share(**flags):
        return TrainSettings.model_validate({"attention": "factorized", **flags}).temporal_share()

    assert share() == 0.1
    assert share(train="all") == share(hf_model_name=None, train="all") == 1.0
    assert share(temporal_rate=0.3) == 0.3


def test_values_of_a_preset_yield_to_those_that_contradict_them():
    loaded = read(preset="quickstart", flags={"epochs": "1"})
    assert (loaded.settings.epochs, loaded.settings.warmup_epochs) == (1, None)
    assert loaded.origins["warmup_epochs"] == "default" and loaded.settings.learning_rate == 1.5e-3
    assert read(preset="quickstart", environ={"TVIT_N_FRAMES": "7"}).settings.tubelet_size == 1
    named = read(preset="quickstart", flags={"hf_model_name": "some/vit"}).settings
    assert (named.hf_model_name, named.width, named.patch_size) == ("some/vit", None, None)
    with pytest.raises(SettingsError, match="--warmup-epochs 2: it should be at most --epochs 1"):
        read(preset="quickstart", flags={"epochs": "1", "warmup_epochs": "2"})
    with pytest.raises(SettingsError, match="--repeats 3: it should divide the 32 clips per GPU"):
        read(preset="quickstart", flags={"repeats": "3"})


def saved_steps(result: TrainResult) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(result.run / "checkpoints")]


def weights_differ(base, changed):
    return not same(last_weights(base), last_weights(changed))


def counts_differ(base, changed):
    last = [records(result, "step")[-1]["step"] for result in (base, changed)]
    return last[0] != last[1] or weights_differ(base, changed)


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
    "seed": 5, "n_frames": 2, "img_size": 48, "frame_grid": 4, "clip_seconds": 0.2, "resize": "squash",
    "hf_model_name": None,
    "attention": "divided", "pool": "attentive", "feature_norm": True, "custom_weight_init": True,
    "train": "classifier", "lora_rank": 4, "lora_alpha": 32, "lora_rank_pattern": {"q": 2},
    "lora_alpha_pattern": {"q": 32}, "lora_use_rslora": True, "lora_use_dora": True, "lora_init": "gaussian",
    "lora_dropout": 0.5, "lora_bias": "lora_only", "lora_target_modules": "fc1", "lora_exclude_modules": "q",
    "warmup_epochs": 1, "per_gpu_batch_size": 5, "learning_rate": 0.02, "weight_decay": 0.5, "label_smoothing": 0.2,
    "bias_weight_decay": True, "max_grad_norm": 0.01, "adam_beta1": 0.5, "adam_beta2": 0.9, "adam_epsilon": 1e-2,
    "crop_scale_min": 1.0, "horizontal_flip": 0.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.3,
    "drop_path": 0.5, "token_drop": 0.5, "layer_decay": 0.5, "classifier_rate": 10.0, "mixup": 0.8, "cutmix": 1.0, "randaugment": 2,
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
    "epochs": ({}, 2, counts_differ),
    "clip_passes": ({}, 40, weights_differ),
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
    "save_checkpoint_interval": ({"epochs": 2}, 2, lambda a, b: len(saved_steps(b)) == 1),
    "save_every_steps": ({}, 2, lambda a, b: saved_steps(b) == [2, 3]),
    "save_every_minutes": ({}, 1e-9, lambda a, b: saved_steps(b) == [1, 2, 3]),
    "max_no_of_checkpoints": ({"epochs": 2}, 1, lambda a, b: len(saved_steps(b)) == 1),
}
BASES: dict[str, TrainResult] = {}


@pytest.mark.parametrize("name", EFFECTS)
def test_no_setting_without_an_effect(name, inputs, tmp_path, tmp_path_factory, monkeypatch):
    base, value, shows = EFFECTS[name]
    facts = {**inputs, "working_directory": tmp_path, "epochs": 1, **base}
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
    "deterministic": "test_deterministic_modes_hold_while_training_and_are_restored",
    "from_": "test_classifier_rows_of_known_classes_are_kept_by_name",
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
