"""What the live display of `tvit train` costs: its share of one core, and of a training's steps.

    python tests/bench/display.py [--seconds 20] [--step-ms 100]

A process with a terminal (a pseudo-terminal 100 columns wide) reports steps as often as the engine does and
sleeps in between, so that all processor time it takes is the display's. The same without a terminal is
subtracted; what is left, by wall-clock time, is the share of a step that displaying takes where the computing
thread and the display share one core, the worst case. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def child(seconds: float, step: float) -> None:
    """Show a training; print the share of the time that its processor was busy."""
    from tvit_cli.console import Console
    from tvit_cli.engine.train.monitor import Clock
    from tvit_cli.results import EpochDone, StepDone, TrainingStarts

    steps = round(seconds / step)
    console = Console()
    with console:
        console.report(TrainingStarts({"data": "a bench"}, 10, steps, 0))
        clock = Clock()
        cpu, wall = time.process_time(), time.perf_counter()
        for number in range(1, steps + 1):
            time.sleep(step)
            if clock.report_is_due():
                console.report(StepDone(1, number, 1.234, 0.567, 1e-4, 123.4, 0.05))
        facts = {"seconds": 9.0, "clips_per_second": 9.0, "data_wait": 0.1}
        console.report(EpochDone(1, {"train_loss": 1.0, "train_clip_top1": 0.5, **facts}))
        share = (time.process_time() - cpu) / (time.perf_counter() - wall)
    print(share)


def measure(seconds: float, step: float, *, terminal: bool) -> float:
    """The share of one core that a child takes, with its stderr on a pseudo-terminal or not."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "TERM": "xterm-256color"}
    command = [sys.executable, __file__, "--child", "--seconds", str(seconds), "--step-ms", str(step * 1000)]
    if not terminal:
        return float(subprocess.run(command, env=environ, capture_output=True, check=True).stdout)
    master, slave = os.openpty()
    running = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=slave)
    os.close(slave)
    shown: list[bytes] = []
    reader = threading.Thread(target=drain, args=(master, shown))
    reader.start()
    out, _ = running.communicate()
    reader.join()
    os.close(master)
    assert b"waiting for data" in b"".join(shown), "nothing was displayed"
    return float(out)


def drain(descriptor: int, shown: list[bytes]) -> None:
    """Read a terminal until nobody writes to it any more."""
    while True:
        try:
            data = os.read(descriptor, 65536)
        except OSError:
            return
        if not data:
            return
        shown.append(data)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--seconds", type=float, default=20)
    arguments.add_argument("--step-ms", type=float, default=100)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--child", action="store_true")
    given = arguments.parse_args()
    if given.child:
        child(given.seconds, given.step_ms / 1000)
        return
    shares: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(given.rounds):
        for terminal in shares:
            shares[terminal].append(measure(given.seconds, given.step_ms / 1000, terminal=terminal))
    live, plain = (statistics.median(shares[terminal]) for terminal in (True, False))
    print(
        json.dumps(
            {
                "benchmark": "display",
                "live_share": round(live, 5),
                "plain_share": round(plain, 5),
                "display_share": round(live - plain, 5),
                "rounds": shares[True],
                "step_ms": given.step_ms,
                "python": platform.python_version(),
                "machine": platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
