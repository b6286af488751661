"""All benchmarks by group: `python tests/bench [GROUP…] [--json FILE]`, without a group their list.

Each prints medians and ratios of what it runs in turn, then a line of JSON with the machine and the versions.
`--json FILE` appends that line to a file, with the group, the commit, the date, the processor, and how many cores
others kept busy meanwhile; `tests/speed_table.py` makes the speed tables of README.md and docs/benchmarks.md from results.jsonl.
Options after `--` go to the programs: `python tests/bench step -- --rounds 5`. What needs data, weights or a trained
model of its own is a program by itself: `python tests/bench/NAME.py --help` (decoders, learning, kills, timeline). Figures are
in docs/benchmarks.md.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
GROUPS = {
    "data": ("reading clips, augmentation, extraction", ["data.py"]),
    "augment": ("augmentation alone", ["data.py", "--only", "augmentation"]),
    "step": ("a training step: tvit, PEFT's layers, a naive LoRA", ["step.py", "--only", "time"]),
    "memory": ("memory of the same steps", ["step.py", "--only", "memory"]),
    "schemes": ("a step of each attention scheme at 18 frames beside joint attention", ["schemes.py"]),
    "epoch": ("a whole epoch, from a frame store and from videos, beside its steps alone", ["epoch.py"]),
    "peers": ("a step beside transformers' video models with PEFT", ["peers.py"]),
    "infer": ("tvit predict on one clip, whole process", ["predict.py"]),
    "startup": ("help and mistakes, whole process", ["startup.py"]),
    "gpu-check": ("on a GPU: parity, training under faults, speed", ["gpu.py"]),
}


def main(arguments: list[str]) -> int:
    """Run the groups that are named, one after the other; the worst exit status."""
    own, extra = arguments, []
    if "--" in arguments:
        cut = arguments.index("--")
        own, extra = arguments[:cut], arguments[cut + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS,
        epilog="\n".join(f"  {name:11} {what}" for name, (what, _) in GROUPS.items()),
    )  # fmt: skip
    parser.add_argument("groups", nargs="*", metavar="GROUP")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the results to a file")
    options = parser.parse_args(own)
    if not options.groups:
        parser.print_help()
        return 0
    if unknown := [name for name in options.groups if name not in GROUPS]:
        parser.error(f"no such group: {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    worst = 0
    for name in options.groups:
        print(f"== {name}: {GROUPS[name][0]} ==", flush=True)
        since = busy_seconds(), time.perf_counter()
        status, result = run(name, extra)
        worst = max(worst, abs(status))
        if options.json and result is not None and not status:
            facts = {"group": name, **place(), "others": busy_others(*since)}
            with options.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**facts, **result}) + "\n")
    return worst


def run(name: str, extra: list[str]) -> tuple[int, dict[str, Any] | None]:
    """A group's exit status and its line of JSON; what it prints is shown as it comes."""
    program, *flags = GROUPS[name][1]
    command = [sys.executable, str(HERE / program), *flags, *extra]
    paths = [str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    result = None
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("{"):
                result = json.loads(line)
    return process.returncode, result


def place() -> dict[str, Any]:
    """Commit, date and processor of a measurement."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {
        "commit": done.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "cores": os.cpu_count(),
    }


def busy_seconds() -> float | None:
    """CPU seconds of all other processes; None where the system does not count them."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    user, nice, system, _, _, *interrupts = map(
        int, path.read_text(encoding="utf-8").split("\n")[0].split()[1:9]
    )
    own = os.times()
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK") - sum(own[:4])


def busy_others(before: float | None, since: float) -> float | None:
    """How many cores others have kept busy since then, in the mean; clocks of a tick may make it more than there are."""
    now = busy_seconds()
    if before is None or now is None:
        return None
    busy = max(0.0, now - before) / (time.perf_counter() - since)
    return round(min(busy, os.cpu_count() or busy), 1)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
