"""Time spent waiting for data, on CPU and GPU."""

import json
import time

import pytest
from tiny import make_clips, run

from tvit_cli.data.clips import ClipDataset
from tvit_cli.engine.train import loop
from tvit_cli.engine.train import monitor as module
from tvit_cli.engine.train.monitor import Clock


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


def test_a_gpu_that_is_never_idle_waits_for_nothing_though_the_loop_does(monkeypatch):
    assert wait_share(Gpu(monkeypatch), batch_every=0.02, step=0.03) < 0.02


def test_a_gpu_that_is_fed_too_slowly_waits_for_the_rest(monkeypatch):
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
