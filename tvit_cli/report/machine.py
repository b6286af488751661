"""The machine and the software that a run ran on; what cannot be found out is left out."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import tvit_cli

PACKAGES = ("accelerate", "peft", "av", "numpy", "safetensors")
SECONDS_FOR_AN_ANSWER = 5.0


def software(folder: Path) -> dict[str, str]:
    """Versions, and the git commit of a folder where it is a working tree."""
    found = {"tvit": tvit_cli.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        found["CUDA"] = torch.version.cuda
    found["system"] = platform.platform()
    if commit := git_commit(folder):
        found["git commit"] = commit
    return found


def hardware(device: torch.device) -> dict[str, str]:
    """Processor, memory, and the GPUs where the model ran on one."""
    found = {"processor": _processor(), "cores": str(os.cpu_count() or "?")}
    if memory := _memory():
        found["memory"] = f"{memory / 2**30:.1f} GiB"
    if device.type == "cuda":
        for number in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(number)
            found[f"GPU {number}"] = f"{facts.name}, {facts.total_memory / 2**30:.1f} GiB"
        if driver := _answer(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]):
            found["driver"] = driver.splitlines()[0]
    return found


def git_commit(folder: Path) -> str:
    """The commit that a folder's working tree is at, and whether it differs from it; "" outside of one."""
    commit = _answer(["git", "-C", str(folder), "rev-parse", "HEAD"])
    if not commit:
        return ""
    changed = _answer(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"])
    return commit + (", with changes that are not committed" if changed else "")


def _processor() -> str:
    """The processor's name as the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> int:
    """Bytes of memory, 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0


def _answer(command: list[str]) -> str:
    """What a program prints, or "" where it is not there, fails or takes too long."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS_FOR_AN_ANSWER, check=True
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout.strip()
