"""Records of a training: losses, waiting times, metrics files, trackers."""

import json
import shutil
import socket
import time
from types import SimpleNamespace

import pytest
import torch
from entry import run_python
from tiny import SCRATCH, make_clips, make_pretrained, run, settings

from tvit_cli.data.clips import ClipDataset
from tvit_cli.engine.launch import make_accelerator
from tvit_cli.engine.train import loop, train
from tvit_cli.engine.train import monitor as module
from tvit_cli.engine.train import trackers as trackers_module
from tvit_cli.engine.train.batches import BatchPlan, MicroBatch
from tvit_cli.engine.train.checkpoint import list_checkpoints, load_checkpoint
from tvit_cli.engine.train.monitor import BadClip, Clock, LossWatch, loss_error, non_finite_names
from tvit_cli.engine.train.trackers import Trackers
from tvit_cli.errors import RunError, SettingsError
from tvit_cli.portable.vit import TemporalViT
from tvit_cli.results import Note, silent

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


def test_an_update_begun_anew_counts_once_and_bad_tensors_are_named():
    watch, accelerator = LossWatch(), make_accelerator(device="cpu", mixed_precision="no")
    watch.add(micro_batch(3, (1, 2)), torch.tensor([1.0, 2.0]))
    watch.add(micro_batch(4, (5, 6)), torch.tensor([NAN, 2.0]))
    watch.drop(4)  # memory ran out in its second pass
    watch.add(micro_batch(4, (5,)), torch.tensor([NAN]))
    assert [(clip.step, clip.index) for clip in watch.check(accelerator)] == [(4, 5)]
    tensors = {"a": torch.ones(3), "b": torch.tensor([1.0, INF]), "c": torch.tensor(NAN)}
    assert non_finite_names(tensors) == ["b", "c"] and non_finite_names({}) == []


def test_the_message_names_clips_and_says_what_is_saved_and_what_may_help(tmp_path):
    names = [f"clip{n}.avi" for n in range(20)]
    own = settings(max_grad_norm=None, learning_rate=0.25)
    few = str(loss_error([BadClip(4, 2, NAN, 8), BadClip(4, 3, INF, 8, 5)], names, own, "bf16", tmp_path))
    assert "Step 5: the loss of 2 of its 8 clips is not finite:\n  clip2.avi: nan\n" in few
    assert "  clip3.avi, mixed with clip5.avi: inf\n" in few
    assert "Check these clips" in few and "No checkpoint had been written yet" in few
    assert "smaller --learning-rate (it is 0.25)" in few
    assert "--max-grad-norm 1" in few and "--mixed-precision no" in few
    (tmp_path / "step-000003").mkdir()
    (tmp_path / "step-000003" / "state.json").touch()
    every = str(loss_error([BadClip(4, n, NAN, 12) for n in range(12)], names, settings(), "no", tmp_path))
    assert "and 4 more" in every and "the run diverged" in every
    assert f"The last good checkpoint is {tmp_path / 'step-000003'}." in every
    assert "--max-grad-norm" not in every and "--mixed-precision" not in every


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


@pytest.mark.parametrize(("step", "launching", "expected"), [(0.05, 0.02, 0.0), (0.01, 0.02, 1.0)])
def test_a_gpu_faster_than_the_launches_is_host_bound(step, launching, expected, monkeypatch):
    gpu = Gpu(monkeypatch)
    clock = Clock(gpu.mark)
    for _ in range(20):
        clock.wait_ended()
        for _ in range(4):  # the pass is launched piece by piece
            gpu.work(step / 4)
            gpu.now += launching / 4
        clock.update_started()
        gpu.work(0.001)
        gpu.now += 0.002
        clock.update_ended()
        if clock.report_is_due():  # the loss is read: the queue is empty afterwards
            gpu.now = max(gpu.now, gpu.busy_until)
        clock.wait_started()
    assert clock.facts()["host_bound"] == expected
    assert "host_bound" not in Clock().facts()


@pytest.mark.parametrize(("compile", "advice"), [(False, ", or --compile"), (True, "size.")])
def test_host_bound_epoch_is_said_once(compile, advice, tmp_path, monkeypatch):
    real = Clock.facts
    monkeypatch.setattr(Clock, "facts", lambda self: {**real(self), "host_bound": 0.9})
    if compile:
        monkeypatch.setattr("tvit_cli.engine.train.compile_model", lambda model, device: model)
    events = []
    own = settings(
        path_to_data=str(make_clips(tmp_path / "data")),
        working_directory=tmp_path,
        compile=compile,
        **SCRATCH,
    )
    train(own, events.append)
    notes = [e.text for e in events if isinstance(e, Note) and "waits for Python" in e.text]
    assert len(notes) == 1 and notes[0].endswith(advice if compile else f"{advice}.")


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
    facts = {"epochs": 2, "per_gpu_batch_size": 8, "num_workers": workers, "val_groups": "none", **SCRATCH}
    result = run(path_to_data=str(data), working_directory=tmp_path, **facts)
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


def scalars(result):
    """TensorBoard's scalars of a run: tag -> (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(result.run / "tensorboard"))
    log.Reload()
    return {tag: [(e.step, e.value) for e in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def test_tensorboard_goes_on_in_the_same_log_without_a_step_twice(clips, tmp_path):
    facts = {"path_to_data": str(clips), "epochs": 3, "log_tensorboard": True, **SCRATCH}
    facts["working_directory"] = tmp_path
    first = run(**facts, experiment_name="mine")
    whole = scalars(first)
    records = [json.loads(line) for line in (first.run / "metrics.jsonl").read_text().splitlines()]
    losses = [(r["step"], r["val_loss"]) for r in records if r["kind"] == "epoch"]
    assert [step for step, _ in whole["epoch/val_loss"]] == [3, 6, 9]
    assert [value for _, value in whole["epoch/val_loss"]] == pytest.approx([value for _, value in losses])
    assert [step for step, _ in whole["step/train_loss"]] == list(range(1, 10))
    for path in list_checkpoints(first.run / "checkpoints")[1:]:  # stopped after the first epoch
        shutil.rmtree(path)
    shutil.rmtree(first.model)
    again = scalars(run(**facts, experiment_name="mine"))
    clocks = ("epoch/seconds", "epoch/clips_per_second", "epoch/data_wait")
    assert again.keys() == whole.keys()
    assert all([s for s, _ in again[tag]] == [s for s, _ in whole[tag]] for tag in whole)
    assert all(again[tag] == whole[tag] for tag in whole if tag not in clocks)


def test_without_tensorboard_the_extra_is_named_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"pip install 'tvit\[tensorboard\]'"):
        run(path_to_data="nowhere", working_directory=tmp_path, log_tensorboard=True)
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_counts_its_classes_as_an_undisturbed_one(clips, tmp_path):
    facts = {"path_to_data": str(clips), "working_directory": tmp_path, "epochs": 3, **SCRATCH}
    first = run(**facts, experiment_name="mine")
    file = first.run / "val_per_class.jsonl"
    whole = file.read_bytes()
    assert len(whole.splitlines()) == 3
    for path in list_checkpoints(first.run / "checkpoints")[1:]:
        shutil.rmtree(path)
    shutil.rmtree(first.model)
    with file.open("a") as end:
        end.write('{"step": 9, "cl')  # killed while it wrote
    again = run(**facts, experiment_name="mine")
    assert file.read_bytes() == whole
    assert again.report is not None
    page = again.report.read_text(encoding="utf-8")
    assert all(f"epoch {n}: val " in page for n in (1, 2, 3))


def test_counts_come_back_as_they_were_noted(tmp_path):
    trackers = Trackers(tmp_path)
    trackers.log_per_class(3, {"a": (4, 1)})
    trackers.log_per_class(6, {"a": (4, 2), "b": (1, 0)})
    assert trackers.per_class(6) == {"a": (4, 2), "b": (1, 0)} and trackers.per_class(9) == {}
    trackers.cut_after(5)
    assert trackers.per_class(6) == {} and trackers.per_class(3) == {"a": (4, 1)}
    assert Trackers(None).records("epoch") == [] and Trackers(None).per_class(3) == {}


@pytest.fixture
def nobody_is_logged_in(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.usefixtures("nobody_is_logged_in")
def test_wandb_without_login_is_offline_and_resumes_the_same_run(tmp_path, monkeypatch):
    asked = []
    real = socket.getaddrinfo

    def spy(host, *arguments, **keywords):
        asked.append(host)
        return real(host, *arguments, **keywords)

    monkeypatch.setattr(socket, "getaddrinfo", spy)
    events = []

    def go(**changes):
        facts = settings(
            path_to_data=str(tmp_path / "colours"), hf_model_name=str(tmp_path / "tiny-vit"),
            working_directory=tmp_path / "runs", log_wandb=True, **changes,
        )  # fmt: skip
        return train(facts, events.append)

    make_clips(tmp_path / "colours")
    make_pretrained(tmp_path / "tiny-vit")
    first = go()
    assert any("wandb login" in e.text and "wandb sync" in e.text for e in events if isinstance(e, Note))
    shutil.rmtree(first.model)
    shutil.rmtree(list_checkpoints(first.run / "checkpoints")[-1])
    go(resume_from_checkpoint="latest")
    own = (first.run / "wandb-id").read_text()
    kept = [path.name for path in (first.run / "wandb").glob("offline-run-*")]
    # offline-run-<time>-<id>, and -1 behind it for a second one in one second
    assert kept and {name.split("-")[3] for name in kept} == {own}
    assert not [host for host in asked if host not in ("localhost", "127.0.0.1")]


def test_a_record_that_cannot_be_written_names_the_file_and_the_way_on(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written.*--resume-from-checkpoint latest"):
        Trackers(tmp_path).log({"kind": "step", "step": 1})


def test_truncated_metrics_line_and_later_records_are_removed(tmp_path):
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 4, "lo')
    Trackers(tmp_path).cut_after(3)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines)
    Trackers(tmp_path).cut_after(1)
    assert (tmp_path / "metrics.jsonl").read_text() == lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_record_that_a_full_disk_cut_off_is_no_record(tmp_path):
    """The report of a run that ends so must not hide why it ended."""
    trackers = Trackers(tmp_path)
    trackers.log({"kind": "epoch", "step": 2, "val_loss": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 3, "lo')
    assert trackers.records("epoch") == [{"kind": "epoch", "step": 2, "val_loss": 0.5}]
    assert trackers.records("step") == []


def test_wandb_that_cannot_be_reached_says_what_to_do(tmp_path, monkeypatch):
    import wandb

    def unreachable(**_):
        raise wandb.errors.CommError("Run initialization has timed out")

    monkeypatch.setattr(wandb, "init", unreachable)
    monkeypatch.setenv("WANDB_MODE", "online")
    said = r"--log-wandb: W&B could not be reached .*timed out.* WANDB_MODE=offline"
    with pytest.raises(RunError, match=said):
        Trackers(tmp_path).open_wandb(name="mine", config={}, report=silent)


def test_steps_and_epochs_have_curves_of_their_own_in_wandb(tmp_path):
    logged = []
    trackers = Trackers(tmp_path)
    trackers._wandb = SimpleNamespace(log=lambda values, step: logged.append({**values, "at": step}))
    for kind, loss in (("step", 1.0), ("epoch", 2.0)):
        trackers.log({"kind": kind, "step": 3, "train_loss": loss})
    assert logged == [{"step/train_loss": 1.0, "at": 3}, {"epoch/train_loss": 2.0, "at": 3}]


def test_wandb_project_entity_group_and_tags_are_respected(tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from tvit_cli.engine.train.trackers import Trackers\n"
        "trackers = Trackers(Path(sys.argv[1]))\n"
        "trackers.open_wandb(name='mine', config={}, report=print)\n"
        "run = trackers._wandb\n"
        "print(run.project, run.entity, run.group, *run.tags)\n"
        "trackers.close()\n"
    )
    own = {
        "WANDB_PROJECT": "gestures",
        "WANDB_ENTITY": "lab",
        "WANDB_RUN_GROUP": "night",
        "WANDB_TAGS": "a,b",
    }
    for variables, answer in ((own, "gestures lab night a b"), ({}, "tvit")):
        (tmp_path / answer).mkdir()
        ended = run_python("-c", code, tmp_path / answer, WANDB_MODE="offline", **variables)
        assert ended.code == 0 and ended.out.startswith(answer), ended
