"""`--feature-norm`: training-set statistics on any world size."""

import importlib
from pathlib import Path

import pytest
import torch
from entry import run_python
from safetensors.torch import load_file
from tiny import last_weights, run, settings

from tvit_cli.data.layout import read_layout
from tvit_cli.engine.evaluate.scoring import WithFeatures, clips_to_score, merge_scores, score
from tvit_cli.engine.launch import ProcessGroup
from tvit_cli.engine.predict import load_model
from tvit_cli.engine.train.build import clips_to_standardise
from tvit_cli.engine.train.dryrun import dry_run
from tvit_cli.errors import SettingsError
from tvit_cli.portable.layers import FeatureNorm
from tvit_cli.portable.vit import ViTConfig, build_model
from tvit_cli.results import Note
from tvit_cli.settings.base import load
from tvit_cli.settings.train import TrainSettings


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
    model = load_model(run(**facts, working_directory=tmp_path).model)
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
    features = load_model(result.model).embed(videos)
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
