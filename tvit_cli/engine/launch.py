"""The process a training runs in: Accelerate's accelerator, and the signals that ask it to stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tvit_cli.engine.trained import pick_device

EXIT_CODES = {
    "SIGINT": 130,
    "SIGTERM": 143,
    "SIGUSR1": 75,
}  # 75: EX_TEMPFAIL, which queues take for "requeue"


def make_accelerator(*, device: str, mixed_precision: str) -> Accelerator:
    """An Accelerator on the device asked for. Raises ModelError when this machine has no such device."""
    chosen = pick_device(device)
    AcceleratorState._reset_state()  # else a second training in one process would keep the first's precision
    return Accelerator(cpu=chosen.type == "cpu", mixed_precision=mixed_precision)


class StopSignals:
    """Within this context, SIGINT, SIGTERM and SIGUSR1 ask for a stop; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for name in EXIT_CODES:
                if number := getattr(signal, name, None):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def agreed(self, accelerator: Accelerator, *, save_is_due: bool) -> tuple[str | None, bool]:
        """The signal that any process has received, and whether a save is due in any; the same for all."""
        if accelerator.num_processes == 1:
            return self.received, save_is_due
        names = list(EXIT_CODES)
        own = [names.index(self.received) + 1 if self.received else 0, int(save_is_due)]
        gathered = accelerator.gather(torch.tensor([own], device=accelerator.device))
        signal_number, due = gathered.amax(0).tolist()
        return names[signal_number - 1] if signal_number else None, bool(due)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == "SIGINT" and self.received == "SIGINT":
            raise KeyboardInterrupt
        self.received = name
