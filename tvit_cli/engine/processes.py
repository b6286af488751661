"""The local processes of a training: started together, stopped together, one exit code."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from tvit_cli.engine.launch import EXIT_CODES
from tvit_cli.errors import RunError

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_SAVE = 60  # what a stopped process is given to finish its step and write its checkpoint


def are_started() -> bool:
    """Whether torchrun, `accelerate launch` or `run_processes` started this process."""
    return "WORLD_SIZE" in os.environ


def end_with_launcher() -> None:
    """Let this process end when the launcher that started it is gone: killed, it can end nobody any more."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun, `accelerate launch` and `run_processes` are parents
        threading.Thread(target=_end_without, args=(os.getppid(),), daemon=True).start()


def run_processes(count: int, arguments: Sequence[str], *, resumes: bool) -> int:
    """Run `python -m tvit_cli <arguments>` in `count` processes of one group; the exit code of them all.

    SIGINT, SIGTERM and SIGUSR1 are handed on, and each process saves and stops as a single one would. When one
    dies, the others are ended. Raises RunError where the first to fail was killed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the processes say themselves what failed
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    known = {field.name for field in fields(LaunchConfig)}
    signals = ",".join((*EXIT_CODES, "SIGHUP"))
    optional: dict[str, Any] = {"signals_to_handle": signals, "shutdown_timeout": SECONDS_TO_SAVE}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port of its own: several trainings on one machine do not meet
        max_restarts=0,
        monitor_interval=0.1,
        **{name: value for name, value in optional.items() if name in known},
    )
    try:
        elastic_launch(config, sys.executable)("-m", "tvit_cli", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise RunError(
                f"Process {rank} of {count} was killed ({name}), so all were ended. If memory ran out, take a "
                "smaller --per-gpu-batch-size. "
                + (
                    "Go on from the last checkpoint with --resume-from-checkpoint latest."
                    if resumes
                    else "Then start again."
                )
            ) from error
        return int(failure.exitcode)
    except SignalException as error:
        return EXIT_CODES.get(error.sigval.name, 128 + error.sigval.value)
    return 0


def _end_without(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os._exit(1)
