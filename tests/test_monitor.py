"""Non-finite losses, and time spent waiting for data on CPU and GPU."""

import json
import time

import pytest
import torch
from entry import run_python
from tiny import SCRATCH, make_clips, run, settings

from tvit_cli.data.clips import ClipDataset
from tvit_cli.engine.launch import make_accelerator
from tvit_cli.engine.train import loop
from tvit_cli.engine.train import monitor as module
from tvit_cli.engine.train.batches import BatchPlan, MicroBatch
from tvit_cli.engine.train.checkpoint import list_checkpoints, load_checkpoint
from tvit_cli.engine.train.monitor import BadClip, Clock, LossWatch, loss_error, non_finite_names
from tvit_cli.errors import RunError
from tvit_cli.portable.vit import TemporalViT

NAN, INF = float("nan"), float("inf")


def micro_batch(step, indices, *, real=None):
    keys = tuple((0, index) for index in indices)
    return MicroBatch(
        epoch=0, step=step, keys=keys, extra=(), partners=(), real=len(keys) if real is None else real,
        step_clips=8, ends_step=True, ends_epoch=False,
    )  # fmt: skip


def test_only_the_first_update_with_a_bad_loss_is_told_of():
    watch, accelerator = LossWatch(), make_accelerator(device="cpu", mixed_precision="no")
    assert watch.check(accelerator) == []
    watch.add(micro_batch(3, (5, 6)), torch.tensor([1.0, 2.0]))
    assert watch.check(accelerator) == []
    watch.add(micro_batch(4, (7, 8, 9), real=2), torch.tensor([1.0, INF, NAN]))  # the third does not count
    watch.add(micro_batch(4, (1, 2)), torch.tensor([NAN, 1.0]))
    watch.add(micro_batch(5, (3, 4)), torch.tensor([NAN, NAN]))
    found = watch.check(accelerator)
    assert [(clip.step, clip.index) for clip in found] == [(4, 8), (4, 1)]
    assert found[0].loss == INF and watch.check(accelerator) == []


def test_an_update_that_is_begun_anew_is_counted_once():
    watch, accelerator = LossWatch(), make_accelerator(device="cpu", mixed_precision="no")
    watch.add(micro_batch(3, (1, 2)), torch.tensor([1.0, 2.0]))
    watch.add(micro_batch(4, (5, 6)), torch.tensor([NAN, 2.0]))
    watch.drop(4)  # memory ran out in its second pass
    watch.add(micro_batch(4, (5,)), torch.tensor([NAN]))
    assert [(clip.step, clip.index) for clip in watch.check(accelerator)] == [(4, 5)]


def test_the_message_names_clips_and_says_what_is_saved_and_what_may_help(tmp_path):
    names = [f"clip{n}.avi" for n in range(20)]
    own = settings(max_grad_norm=None, learning_rate=0.25)
    few = str(loss_error([BadClip(4, 2, NAN, 8), BadClip(4, 3, INF, 8, 5)], names, own, "bf16", tmp_path))
    assert (
        "Step 5: the loss of 2 of its 8 clips is not finite:\n  clip2.avi: nan\n  clip3.avi, mixed with clip5.avi: inf\n"
        in few
    )
    assert "Check these clips" in few and "No checkpoint had been written yet" in few
    assert "smaller --learning-rate (it is 0.25)" in few
    assert "--max-grad-norm 1" in few and "--mixed-precision no" in few
    (tmp_path / "step-000003").mkdir()
    (tmp_path / "step-000003" / "state.json").touch()
    every = str(loss_error([BadClip(4, n, NAN, 12) for n in range(12)], names, settings(), "no", tmp_path))
    assert "and 4 more" in every and "the run diverged" in every
    assert f"The last good checkpoint is {tmp_path / 'step-000003'}." in every
    assert "--max-grad-norm" not in every and "--mixed-precision" not in every


def test_tensors_that_are_not_finite_are_found_by_name():
    tensors = {"a": torch.ones(3), "b": torch.tensor([1.0, INF]), "c": torch.tensor(NAN)}
    assert non_finite_names(tensors) == ["b", "c"] and non_finite_names({}) == []


def spoil_forward(monkeypatch, *, call, row):
    """Make one clip's logits NaN in the so-many-th forward pass of training."""
    real, calls = TemporalViT.forward, [0]

    def forward(self, clips):
        logits = real(self, clips)
        if self.training:
            calls[0] += 1
            if calls[0] == call:
                bad = torch.zeros_like(logits)
                bad[row] = NAN
                return logits + bad
        return logits

    monkeypatch.setattr(TemporalViT, "forward", forward)


def trained_names(clips):
    """The training videos of `tiny.settings`, in their order: one group of six held out for val, one for test."""
    from tvit_cli.engine.dataset import open_dataset

    facts = settings(path_to_data=str(clips))
    source = open_dataset(
        facts.path_to_data, group_pattern=facts.group_pattern, val_groups=facts.val_groups,
        test_groups=facts.test_groups, split=facts.split, report=lambda event: None,
    )  # fmt: skip
    return [video.name for video in source.readable("train")]


def test_a_nan_ends_the_run_names_the_clip_and_leaves_the_last_good_state(clips, tmp_path, monkeypatch):
    facts = {"path_to_data": str(clips), "working_directory": tmp_path, "save_every_steps": 1, **SCRATCH}
    whole = run(**facts, experiment_name="whole")
    spoil_forward(monkeypatch, call=5, row=2)
    plan = BatchPlan(clips=12, batch_size=4, global_batch=4, processes=1, rank=0, epochs=2, seed=0)
    _, index = list(plan.micro_batches())[4].keys[2]
    name = trained_names(clips)[index]
    with pytest.raises(RunError) as caught:
        run(**facts, experiment_name="bad")
    assert caught.value.exit_code == 1
    assert f"Step 5: the loss of 1 of its 4 clips is not finite:\n  {name}: nan" in str(caught.value)
    kept = list_checkpoints(tmp_path / "bad" / "checkpoints")
    assert kept[-1].name == "step-000004" and str(kept[-1]) in str(caught.value)
    good = load_checkpoint(whole.run / "checkpoints" / "step-000004")
    assert all(
        torch.equal(value, good.trainable[key]) for key, value in load_checkpoint(kept[-1]).trainable.items()
    )
    page = (tmp_path / "bad" / "report.html").read_text(encoding="utf-8")
    assert f"{name}: nan" in page and f"tvit train --resume-from-checkpoint {kept[-1]}" in page


def test_a_nan_at_the_first_step_leaves_no_checkpoint_and_says_so(clips, tmp_path, monkeypatch):
    spoil_forward(monkeypatch, call=1, row=0)
    with pytest.raises(RunError, match="No checkpoint had been written yet"):
        run(path_to_data=str(clips), working_directory=tmp_path, experiment_name="bad", **SCRATCH)
    assert not list_checkpoints(tmp_path / "bad" / "checkpoints")
    assert not (tmp_path / "bad" / "report.html").exists()


def test_weights_that_are_not_finite_are_never_saved(clips, tmp_path, monkeypatch):
    real = loop.update

    def update(own):
        norm = real(own)
        if own.step == 3:  # the fourth update: its loss was good, what it made of the weights is not
            with torch.no_grad():
                own.plain_model.classifier.bias[0] = INF
        return norm

    monkeypatch.setattr(loop, "update", update)
    with pytest.raises(RunError, match=r"Step 4: 1 weights are not finite \(classifier\.bias\)"):
        run(
            path_to_data=str(clips), working_directory=tmp_path, experiment_name="bad", save_every_steps=1,
            **SCRATCH,
        )  # fmt: skip
    assert list_checkpoints(tmp_path / "bad" / "checkpoints")[-1].name == "step-000003"


def test_two_processes_stop_together_with_one_message(clips, tmp_path):
    facts = {"path_to_data": str(clips), "working_directory": tmp_path, **SCRATCH}
    own = settings(**facts, num_processes=2, learning_rate=1e30, warmup_epochs=0, experiment_name="bad")
    (tmp_path / "c.json").write_text(json.dumps(own.model_dump(mode="json")))
    done = run_python("-m", "tvit_cli", "train", "--config", tmp_path / "c.json")
    assert done.code == 1, done.err
    assert done.err.count("is not finite") == 1 and "--learning-rate" in done.err
    assert "Traceback" not in done.err and "Warning" not in done.err
    assert not list_checkpoints(tmp_path / "bad" / "checkpoints")


class Gpu:
    """A pretended GPU: a time line of the host, and a queue that works through what it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.busy_until = 0.0
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)

    def work(self, seconds: float) -> None:
        self.busy_until = max(self.now, self.busy_until) + seconds

    def mark(self) -> "GpuMark":
        return GpuMark(self)


class GpuMark:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.at = max(self.gpu.now, self.gpu.busy_until)

    def query(self) -> bool:
        return self.gpu.now >= self.at

    def elapsed_time(self, other: "GpuMark") -> float:
        assert self.query() and other.query()
        return 1000 * (other.at - self.at)


def wait_share(gpu, *, batch_every, step):
    """The share that a clock finds when a batch comes every so often and a step keeps the GPU so long."""
    clock = Clock(gpu.mark)
    for number in range(1, 51):
        gpu.now = max(gpu.now, 100 + number * batch_every)  # the loop stands waiting
        clock.wait_ended()
        gpu.work(step)
        gpu.now += 0.001  # what the loop takes to fill the queue
        if clock.report_is_due():
            clock.facts()
        clock.wait_started()
    gpu.now = max(gpu.now, gpu.busy_until)
    return clock.facts()["data_wait"]


def test_a_gpu_waits_for_data_only_when_it_is_fed_too_slowly(monkeypatch):
    assert wait_share(Gpu(monkeypatch), batch_every=0.02, step=0.03) < 0.02
    assert wait_share(Gpu(monkeypatch), batch_every=0.05, step=0.03) == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("workers", [0, 1])
def test_clock_counts_waiting_for_slow_data_only(tmp_path, monkeypatch, workers):
    """A clip takes 20 ms to read and more, and a step of eight clips is made to take 300 ms and more."""
    read, update = ClipDataset.__getitem__, loop.update
    reading = {0: 0.0, 1: 0.0}  # epoch -> seconds, as seen from inside

    def slow_read(self, key):
        began = time.perf_counter()
        time.sleep(0.02)
        item = read(self, key)
        reading[key[0]] += time.perf_counter() - began
        return item

    def slow_update(*arguments):
        time.sleep(0.3)
        return update(*arguments)

    monkeypatch.setattr(ClipDataset, "__getitem__", slow_read)
    monkeypatch.setattr(loop, "update", slow_update)
    data = make_clips(tmp_path / "colours")
    facts = {
        "hf_model_name": None, "width": 16, "depth": 1, "num_heads": 2, "train": "all", "val_groups": "none",
    }  # fmt: skip
    result = run(
        path_to_data=str(data), working_directory=tmp_path, epochs=2, per_gpu_batch_size=8,
        num_workers=workers, **facts,
    )  # fmt: skip
    records = map(json.loads, (result.run / "metrics.jsonl").read_text().splitlines())
    last = [r for r in records if r["kind"] == "epoch"][-1]
    clips, steps = 15, 2
    waited, rest = last["data_wait"] * last["seconds"], (1 - last["data_wait"]) * last["seconds"]
    assert rest >= steps * 0.3
    assert last["clips_per_second"] * last["seconds"] == pytest.approx(clips)
    if workers == 0:
        assert clips * 0.02 <= reading[1] <= waited <= 1.2 * reading[1] + 0.05
    else:
        assert waited < 0.2
