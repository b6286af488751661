"""Dry runs."""

import shutil
from pathlib import Path

import pytest
from tiny import make_clips, settings

from tvit_cli import cli
from tvit_cli.engine.train.dryrun import dry_run
from tvit_cli.results import Note

FRAMES = 4


def test_a_dry_run_says_what_a_training_takes_and_writes_nothing(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = settings(**inputs, working_directory=tmp_path)
    words = [f"--{k.replace('_', '-')}={getattr(own, k)}" for k in own.model_fields_set - {"device"}]
    cli.build_app()(["train", "--dry-run", "--device", "cpu", *words], standalone_mode=False)
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["batch"].strip() == "global batch 4 = 1 process × 4 clips × 1 accumulation"
    assert shown["steps"].strip() == "2 epochs of 3"
    assert not list(tmp_path.iterdir())


def test_a_dry_run_counts_what_frozen_weights_spare(inputs, tmp_path):
    def plan(**changes):
        return dry_run(settings(**inputs, working_directory=tmp_path, **changes))

    lora, everything, classifier = plan(lora_rank=1), plan(train="all"), plan(train="classifier")
    forward = everything.forward_flops
    embedding = 2 * (FRAMES * 4) * (3 * 16 * 16) * 16  # its input, the frames, gets no gradient
    assert everything.pass_flops == pytest.approx(3 * forward - embedding, rel=0.02)
    assert classifier.pass_flops == pytest.approx(forward, rel=0.02)
    assert lora.pass_flops == pytest.approx(2 * forward - embedding, rel=0.1)
    again = plan(lora_rank=1, gradient_checkpointing=True)
    assert again.pass_flops == pytest.approx(3 * forward - 2 * embedding, rel=0.1)
    assert lora.trainable < lora.parameters == 4 * lora.memory.weights // 16
    assert lora.seconds_per_epoch == pytest.approx(3 * lora.seconds_per_step + lora.validation_seconds)
    assert 0 < lora.data_wait < 1 and lora.validation_seconds > 0
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_the_demo_makes_its_data_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clips = make_clips(tmp_path / "clips")
    monkeypatch.setattr(
        "tvit_cli.engine.train.dryrun.make_demo_data", lambda root, report: shutil.copytree(clips, root)
    )
    notes = []
    plan = dry_run(
        settings(path_to_data="motions", hf_model_name=None, width=16, depth=1, num_heads=2), notes.append
    )
    assert plan.folder == Path("working_directory/motions-1") and "motions: 3 classes" in plan.data
    assert any("temporary folder" in e.text for e in notes if isinstance(e, Note))
    assert [p.name for p in tmp_path.iterdir()] == ["clips"]
