"""Regularisation and standardised features: resumed, on two processes, refused values."""

import importlib
import shutil
from pathlib import Path

import pytest
import torch
from entry import run_python
from safetensors.torch import load_file
from tiny import COLOURS, last_weights, records, run, run_in, same, settings
from torch.nn import functional as F

import tvit_cli
from tvit_cli.data.augment import Augmentation, train_transform
from tvit_cli.data.clips import ClipDataset, collate
from tvit_cli.data.layout import read_layout
from tvit_cli.engine.evaluate.scoring import WithFeatures, clips_to_score, merge_scores, score
from tvit_cli.engine.launch import ProcessGroup
from tvit_cli.engine.train import loop, train
from tvit_cli.engine.train.batches import class_weights
from tvit_cli.engine.train.build import clips_to_standardise
from tvit_cli.engine.train.checkpoint import list_checkpoints, load_checkpoint
from tvit_cli.engine.train.dryrun import dry_run
from tvit_cli.errors import ModelError, SettingsError
from tvit_cli.model.folder import load_model
from tvit_cli.portable.layers import FeatureNorm
from tvit_cli.portable.vit import ViTConfig, build_model
from tvit_cli.results import Note
from tvit_cli.settings.base import load
from tvit_cli.settings.train import TrainSettings

pytestmark = pytest.mark.usefixtures("no_pictures")
# Groups of which class Red has others than the two that are held out: 6 of its clips are in train, 4 of the rest.
UNEVEN = {"group_pattern": r"(Red_g0[12]|g\d+)", "val_groups": "g01", "test_groups": "g02"}
STANDSTILL = {"learning_rate": 1e-30}  # every epoch is as good as the first


def checkpoints(result):
    return list_checkpoints(result.run / "checkpoints")


def last_average(result):
    return load_file(checkpoints(result)[-1] / "ema.safetensors")


def classifier_of(result):
    return load_model(result.model)[0].classifier.weight.detach()


def test_stopped_in_mid_epoch_all_of_it_goes_on_to_the_same_bits(trained):
    facts = {**UNEVEN, "epochs": 2, "save_every_steps": 2, "drop_path": 0.4, "token_drop": 0.3}
    facts |= {
        "ema_decay": 0.8, "layer_decay": 0.6, "balanced_sampling": True, "patience": 2, "feature_norm": True,
    }  # fmt: skip
    whole, half = trained(**facts), trained(**facts)
    assert checkpoints(half)[2].name == "step-000006"  # 4 steps make an epoch
    shutil.rmtree(half.model)
    again = trained(**facts, resume_from_checkpoint=str(checkpoints(half)[2]))
    assert again.run == half.run
    assert same(last_weights(again), last_weights(whole)) and same(last_average(again), last_average(whole))
    assert records(again, "") == records(whole, "")
    models = [(result.model / "model.safetensors").read_bytes() for result in (again, whole)]
    assert models[0] == models[1]


def test_the_average_is_validated_and_kept_or_else_the_last(trained):
    result = trained(epochs=4, ema_decay=0.9, test_at_end=True)
    best = load_checkpoint(checkpoints(result)[result.best_epoch - 1])
    assert best.ema is not None and best.best is not None and same(best.best, best.ema)
    assert torch.equal(classifier_of(result), best.ema["classifier.weight"])
    assert not torch.equal(classifier_of(result), best.trainable["classifier.weight"])
    decays = [record["ema_decay"] for record in records(result)]
    assert decays == [(1 + n) / (10 + n) for n in (2, 5, 8, 11)]  # 3 steps per epoch
    result = trained(ema_decay=0.9, val_groups="none")
    assert torch.equal(classifier_of(result), last_average(result)["classifier.weight"])
    assert not torch.equal(classifier_of(result), last_weights(result)["classifier.weight"])


def test_training_ends_when_the_patience_does_and_is_finished(clips, pretrained, tmp_path):
    events = []
    facts = settings(
        path_to_data=str(clips),
        hf_model_name=str(pretrained),
        working_directory=tmp_path,
        **{**STANDSTILL, "epochs": 9, "patience": 2, "save_checkpoint_interval": 9, "test_at_end": True},
    )
    result = train(facts, events.append)
    assert [record["epoch"] for record in records(result)] == [1, 2, 3]
    assert [path.name for path in checkpoints(result)] == ["step-000009"]
    assert result.best_epoch == 1 and result.test is not None and (result.model / "card.json").is_file()
    assert any("Stopped early: epoch 1 is the best" in e.text for e in events if isinstance(e, Note))


def test_a_better_epoch_begins_the_patience_anew(trained):
    result = trained(epochs=12, warmup_epochs=0, patience=3, learning_rate=0.1)
    ranks = [(record["val_video_top1"], -record["val_loss"]) for record in records(result)]
    assert 4 < len(ranks) < 12  # else nothing is shown
    assert result.best_epoch == len(ranks) - 3
    for epoch in range(
        4, len(ranks)
    ):  # at the end of every earlier epoch, one of the last three was a record
        assert any(ranks[n] > max(ranks[:n], default=(-1.0, 0.0)) for n in range(epoch - 3, epoch))


@pytest.mark.parametrize("left", [1, 2])
def test_a_resumed_run_loses_its_patience_in_the_same_epoch(trained, left):
    facts = {**STANDSTILL, "epochs": 9, "patience": 2}
    whole, cut = trained(**facts), trained(**facts)
    for path in (cut.model, *checkpoints(cut)[left:]):
        shutil.rmtree(path)
    again = trained(**facts, resume_from_checkpoint=str(checkpoints(cut)[-1]))
    assert records(again, "") == records(whole, "") and (again.model / "card.json").is_file()
    shutil.rmtree(again.model)  # killed after its last step, before its end
    trained(**facts, resume_from_checkpoint=str(checkpoints(again)[-1]))
    assert records(again, "") == records(whole, "") and (again.model / "card.json").is_file()


def test_class_weights_leave_losses_in_float32(trained, monkeypatch):
    """In float64 they made all losses float64, which MPS does not have."""
    seen = set()
    own = loop.clip_losses

    def watched(*given, **options):
        losses = own(*given, **options)
        seen.add((options["class_weights"].dtype, losses.dtype))
        return losses

    monkeypatch.setattr(loop, "clip_losses", watched)
    trained(**UNEVEN, epochs=1, class_weights="balanced")
    assert seen == {(torch.float32, torch.float32)}


def test_the_training_loss_counts_each_clip_by_its_weight(trained, clips):
    result = trained(**UNEVEN, **STANDSTILL, epochs=1, class_weights="balanced", lora_dropout=0.0)
    layout = read_layout(
        clips, group_pattern=UNEVEN["group_pattern"], val_groups="g01", test_groups="g02", split=0, need_test=False
    )  # fmt: skip
    videos = layout.subset("train")
    # 32 / sqrt(crop_scale_min)
    dataset = ClipDataset(videos, layout.labels, n_frames=4, short_side=46, seed=0, training=True)
    batch = collate([dataset[0, index] for index in range(len(videos))])
    model, card = load_model(result.model)
    pixels = train_transform(
        batch.clips, batch.epochs, batch.indices, augmentation=Augmentation(), preprocessing=card.preprocessing,
        seed=0, device=torch.device("cpu"),
    )  # fmt: skip
    losses = F.cross_entropy(model(pixels), batch.labels, reduction="none").double()
    weights = torch.tensor(class_weights(batch.labels.tolist(), len(COLOURS)))[batch.labels]
    assert sorted(set(weights.tolist())) == pytest.approx([14 / 3 / 6, 14 / 3 / 4])
    (epoch,) = records(result)
    assert epoch["train_loss"] == pytest.approx((losses * weights).mean().item(), rel=1e-5)
    assert epoch["train_loss"] != pytest.approx(losses.mean().item(), rel=1e-4)


def test_two_processes_agree_on_all_of_it(trained, tmp_path, clips, pretrained):
    facts = {
        **UNEVEN, "epochs": 12, "warmup_epochs": 0, "lora_dropout": 0.0, "per_gpu_batch_size": 4,
        "ema_decay": 0.8,
    }  # fmt: skip
    facts |= {
        "ema_decay": 0.8, "layer_decay": 0.6, "balanced_sampling": True, "patience": 1, "learning_rate": 0.15,
    }  # fmt: skip
    one = trained(**facts, gradient_accumulation_steps=2)
    own = settings(
        path_to_data=str(clips), hf_model_name=str(pretrained), working_directory=tmp_path, **facts, num_processes=2
    )  # fmt: skip
    (tmp_path / "c.json").write_text(own.model_dump_json())
    child = run_python("-m", "tvit_cli", "train", "--config", tmp_path / "c.json", "--experiment-name", "two")
    assert child.code == 0, child.err
    two = run_in(tmp_path / "two")
    assert 2 < len(records(one)) == len(records(two)) < 12
    for a, b in zip(records(one), records(two), strict=True):
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-4)
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
    a, b = last_average(one), last_average(two)
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"train": "classifier", "drop_path": 0.1}, "--drop-path 0.1: --train classifier trains no block"),
        ({"train": "classifier", "layer_decay": 0.9}, "--layer-decay 0.9: --train classifier trains no block"),
        ({"class_weights": "balanced", "balanced_sampling": True}, "--class-weights balanced and --balanced-sampling .*Take one"),
        ({"drop_path": 1}, "--drop-path: 1: it should be less than 1"),
        ({"drop_path": -0.1}, "--drop-path: -0.1: it should be greater than or equal to 0"),
        ({"ema_decay": 1}, "--ema-decay: 1: it should be less than 1"),
        ({"layer_decay": 0}, "--layer-decay: 0: it should be greater than 0"),
        ({"layer_decay": 1.1}, "--layer-decay: 1.1: it should be less than or equal to 1"),
        ({"classifier_rate": 0}, "--classifier-rate: 0: it should be greater than 0"),
        ({"classifier_rate": -1}, "--classifier-rate: -1: it should be greater than 0"),
        ({"classifier_rate": "nan"}, "--classifier-rate: nan: it should be a finite number"),
        ({"classifier_rate": "inf"}, "--classifier-rate: inf: it should be a finite number"),
        ({"class_weights": "even"}, "--class-weights: even"),
        ({"patience": 0}, "--patience: 0: it should be greater than or equal to 1"),
    ],
)  # fmt: skip
def test_values_that_make_no_sense_are_refused(flags, words):
    with pytest.raises(SettingsError, match=words):
        load(TrainSettings, flags=flags, environ={})


def test_patience_without_validation_and_one_block_drop_path_are_refused(trained, tmp_path):
    with pytest.raises(SettingsError, match=r"--patience 3: .* has no validation subset.*--val-groups"):
        trained(patience=3, val_groups="none")
    with pytest.raises(ModelError, match=r"--drop-path 0\.1: it rises from 0 in the first block"):
        trained(hf_model_name=None, depth=1, width=16, num_heads=2, drop_path=0.1)
    assert not list(tmp_path.iterdir())


def test_off_means_off(trained):
    none = {"drop_path": 0.0, "token_drop": 0.0, "ema_decay": None, "layer_decay": 1.0, "patience": None}
    off = trained(**none, class_weights="none", epochs=1)
    even = trained(class_weights="balanced", epochs=1)  # classes that are even weigh 1 each, to the bit
    assert same(last_weights(off), last_weights(even))


@pytest.fixture(scope="module")
def facts(inputs):
    return {**inputs, "learning_rate": 1e-30, "epochs": 1, "feature_norm": True}  # nothing moves


def layout(facts):
    own = settings(**facts)
    return read_layout(
        Path(str(facts["path_to_data"])),
        group_pattern=own.group_pattern,
        val_groups=own.val_groups,
        test_groups=own.test_groups,
    ).videos


def test_fitted_features_have_mean_0_and_deviation_1():
    norm = FeatureNorm(4)
    norm.reset_parameters(generator=None, from_scratch=False)
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 2, 3, 0]) + 7
    torch.testing.assert_close(norm(features), features)
    norm.fit(features)
    fitted = norm(features).detach()
    torch.testing.assert_close(fitted.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(fitted[:, :3].std(0, correction=0), torch.ones(3))
    assert norm.scale[3].item() == pytest.approx(
        1 / (0.1 * features.std(0, correction=0).mean().item()), rel=1e-4
    )
    assert fitted[:, 3].abs().max() < 1e-4


def test_clips_that_do_not_differ_are_shifted_and_keep_their_scale():
    norm = FeatureNorm(3)
    norm.reset_parameters(generator=None, from_scratch=False)
    norm.fit(torch.full((4, 3), 5.0))
    assert norm.shift.tolist() == [5, 5, 5] and norm.scale.tolist() == [1, 1, 1]


def test_what_rounding_makes_of_one_clip_many_times_is_not_blown_up():
    """Nine equal clips are a batch of 8 and one of 1, whose features may differ in their last bits."""
    model = build_model(
        ViTConfig(num_classes=3, frame_size=32, n_frames=4, width=48, depth=2, num_heads=3),
        seed=0,
        from_scratch=True,
    ).eval()
    network = WithFeatures(model)
    clip = torch.rand(1, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        rows = [network(clip.expand(count, -1, -1, -1, -1))[:, 3:].double() for count in (8, 1)]
    features = torch.cat(rows)
    features[8] *= 1 + 1e-6  # where this machine's batches agree to the last bit
    norm = FeatureNorm(48)
    norm.reset_parameters(generator=None, from_scratch=False)
    norm.fit(features)
    another = norm(2 * features.float()).detach()
    assert another.isfinite().all() and another.abs().max() < 2 * features.abs().max()


def test_a_process_without_a_batch_takes_part(facts, tmp_path):
    model = tvit_cli.load_model(run(**facts, working_directory=tmp_path).model)
    videos = [video for video in layout(facts) if video.subset == "train"][:3]
    clips = clips_to_score(videos, model.labels, model.card.preprocessing)
    groups = [ProcessGroup(rank, 2, torch.device("cpu"), lambda own: [own]) for rank in (0, 1)]
    network = WithFeatures(model._trained.model)
    parts = [score(network, clips, group, batch_size=8, workers=0) for group in groups]
    assert not len(parts[1].indices)
    assert torch.equal(merge_scores(parts).logits, parts[0].logits)


def test_training_standardises_features_over_its_training_clips(facts, tmp_path):
    result = run(**facts, working_directory=tmp_path)
    videos = [video.path for video in layout(facts) if video.subset == "train"]
    features = tvit_cli.load_model(result.model).embed(videos)
    torch.testing.assert_close(features.mean(0), torch.zeros_like(features[0]), atol=1e-4, rtol=0)
    deviation = features.std(0, correction=0)
    assert deviation.max() == pytest.approx(1, abs=1e-3) and deviation.median() == pytest.approx(1, abs=1e-3)


def test_two_processes_start_with_the_numbers_of_one(facts, tmp_path):
    one = run(**facts, working_directory=tmp_path)
    own = settings(**facts, working_directory=tmp_path, num_processes=2, experiment_name="two")
    (tmp_path / "two.json").write_text(own.model_dump_json())
    child = run_python("-m", "tvit_cli", "train", "--config", tmp_path / "two.json")
    assert child.code == 0, child.err
    for name in ("feature_norm.shift", "feature_norm.scale"):
        first, second = (
            load_file(m / "model.safetensors")[name] for m in (one.model, tmp_path / "two" / "model")
        )
        assert torch.equal(first, second)


def test_a_dry_run_says_that_clips_would_be_read_and_reads_none_of_them(facts, tmp_path, monkeypatch):
    monkeypatch.setattr("tvit_cli.engine.train.standardise_features", None)  # to call it is an error
    said = []
    dry_run(settings(**facts, working_directory=tmp_path), said.append)
    videos = [video for video in layout(facts) if video.subset == "train"]
    sentence = f"A training reads {len(videos)} of its clips first, to standardise features."
    assert [e.text for e in said if isinstance(e, Note) and "standardise" in e.text] == [sentence]
    plain = []
    dry_run(settings(**{**facts, "feature_norm": False}, working_directory=tmp_path), plain.append)
    assert not any("standardise" in e.text for e in plain if isinstance(e, Note))


def test_of_many_clips_some_from_all_places_are_taken(facts, tmp_path, monkeypatch):
    whole = run(**facts, working_directory=tmp_path)
    monkeypatch.setattr(importlib.import_module("tvit_cli.engine.train.build"), "MOST_CLIPS", 3)
    few = run(**facts, working_directory=tmp_path)
    shifts = [load_file(r.model / "model.safetensors")["feature_norm.shift"] for r in (whole, few)]
    assert not torch.allclose(*shifts)
    videos = layout(facts)
    chosen = clips_to_standardise(videos)
    places = [videos.index(video) for video in chosen]
    assert places == [(2 * i + 1) * len(videos) // 6 for i in range(3)]


def test_a_linear_probe_keeps_them(facts, tmp_path):
    result = run(**{**facts, "train": "classifier"}, working_directory=tmp_path)
    assert {"feature_norm.shift", "feature_norm.scale"} < set(last_weights(result))


def test_features_of_a_model_from_scratch_are_not_standardised():
    flags = {"feature_norm": True, "hf_model_name": "none"}
    with pytest.raises(SettingsError, match="--feature-norm: untrained features"):
        load(TrainSettings, flags=flags, environ={})
