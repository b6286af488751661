"""Global batch, micro-batch and accumulation."""

import dataclasses
import json
import shutil

import pytest
from tiny import last_weights, same, settings

from tvit_cli.engine.train import memory, train
from tvit_cli.engine.train.checkpoint import list_checkpoints
from tvit_cli.engine.train.memory import Probe, global_batch, largest_that_fits
from tvit_cli.errors import RunError, SettingsError
from tvit_cli.results import MemoryModel, TrainingStarts


def test_auto_micro_batch_is_the_largest_fitting_divisor():
    terms = MemoryModel(
        weights=1000, gradients=10, moments=20, average=0, workspace=0, activations_per_clip=100
    )
    tried = []

    def fits(clips):
        tried.append(clips)
        return clips <= 3

    assert largest_that_fits(12, terms, free=700, fits=fits) == 3
    assert tried == [6, 4, 3]  # 12 is too much by the model, the weights being there already
    assert largest_that_fits(12, terms, free=100, fits=fits) is None


@pytest.mark.parametrize(
    ("changes", "processes", "expected"),
    [
        ({}, 1, 4),
        ({"gradient_accumulation_steps": 3}, 2, 24),
        ({"per_gpu_batch_size": "auto"}, 2, 16),
        ({"per_gpu_batch_size": "auto", "gradient_accumulation_steps": 2}, 1, 16),
        ({"global_batch_size": 24}, 2, 24),
        ({"per_gpu_batch_size": "auto", "global_batch_size": 6}, 2, 6),
    ],
)
def test_the_global_batch_is_what_was_given_or_what_the_default_comes_to(changes, processes, expected):
    assert global_batch(settings(**changes), processes) == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"global_batch_size": 10}, r"--global-batch-size 10: .* 2 × --per-gpu-batch-size 4. Take 8 or 16"),
        ({"global_batch_size": 1, "per_gpu_batch_size": "auto"}, r"no multiple of 2 processes. Take 2"),
    ],
)
def test_a_global_batch_that_cannot_be_cut_evenly_is_refused(changes, words):
    with pytest.raises(SettingsError, match=words):
        global_batch(settings(**changes), 2)


def test_a_global_batch_says_how_much_is_accumulated():
    with pytest.raises(ValueError, match="--gradient-accumulation-steps 2: --global-batch-size sets it"):
        settings(global_batch_size=8, gradient_accumulation_steps=2)


def test_a_global_batch_is_accumulated_over_passes(trained):
    cut = trained(per_gpu_batch_size=4, global_batch_size=8, epochs=1)
    assert same(
        last_weights(cut),
        last_weights(trained(per_gpu_batch_size=4, gradient_accumulation_steps=2, epochs=1)),
    )


def test_an_automatic_micro_batch_keeps_the_update_and_is_found_once(trained, inputs, tmp_path, monkeypatch):
    events = []
    own = settings(
        **inputs, working_directory=tmp_path, per_gpu_batch_size="auto", global_batch_size=8,
        experiment_name="auto", epochs=4,
    )  # fmt: skip
    per_clip = Probe.memory_model

    def as_if(self):
        return dataclasses.replace(
            per_clip(self), workspace=0, activations_per_clip=1000, moments=0, gradients=0
        )

    monkeypatch.setattr(Probe, "memory_model", as_if)
    monkeypatch.setattr(memory, "free_bytes", lambda device, processes: 2999)
    found = train(own, events.append)
    plan = next(e.facts["batch"] for e in events if isinstance(e, TrainingStarts))
    assert plan == "global batch 8 = 1 process × 2 clips × 4 accumulation"
    typed = trained(per_gpu_batch_size=2, global_batch_size=8, epochs=4)
    assert same(last_weights(found), last_weights(typed))
    written = json.loads((found.run / "settings.json").read_text())
    assert (written["per_gpu_batch_size"], written["global_batch_size"]) == (2, 8)

    def never(self):
        raise AssertionError("it is looked for twice")

    monkeypatch.setattr(Probe, "memory_model", never)
    shutil.rmtree(list_checkpoints(found.run / "checkpoints")[-1])
    shutil.rmtree(found.model)
    again = train(own)  # the same command: the named experiment goes on
    assert again.run == found.run and same(last_weights(again), last_weights(typed))


def test_without_room_for_one_clip_an_automatic_micro_batch_gives_advice(trained, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "free_bytes", lambda device, processes: 10)
    with pytest.raises(RunError, match=r"not even one clip fits.*--gradient-checkpointing.*--img-size 32"):
        trained(per_gpu_batch_size="auto")
    assert not list(tmp_path.iterdir())
