"""Start-up time of help and usage errors, whole processes, in turn.

    python tests/bench/startup.py [--runs 7]

Seconds by the clock and of the processor, medians; beside them a Python that imports nothing.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
CASES = {  # what is typed, and the exit code that it has to end with
    "python -c pass": (["-c", "pass"], 0),
    "tvit --help": (["-m", "tvit_cli", "--help"], 0),
    "tvit train --help": (["-m", "tvit_cli", "train", "--help"], 0),
    "tvit train --lora-rnk 8": (["-m", "tvit_cli", "train", "--lora-rnk", "8"], 2),
}


def run(arguments: list[str], exit_code: int) -> tuple[float, float]:
    """Wall and processor seconds of a process and its children; one that fails otherwise than it should is no time."""
    before = os.times()
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - start
    if done.returncode != exit_code:
        sys.exit(f"{' '.join(arguments)}: ended with {done.returncode}, not {exit_code}:\n{done.stderr}")
    after = os.times()
    used = (after.children_user - before.children_user) + (after.children_system - before.children_system)
    return wall, used


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
    for number in range(options.runs + 1):
        for name, case in CASES.items():
            took = run(*case)
            if number:  # the first writes bytecode and fills the disk's cache
                times[name].append(took)
    results = {
        name: {"wall": statistics.median(w for w, _ in rows), "cpu": statistics.median(c for _, c in rows)}
        for name, rows in times.items()
    }
    for name, found in results.items():
        print(f"{name:26} {found['wall']:.2f} s, {found['cpu']:.2f} s of the processor")
    print(json.dumps({"benchmark": "startup", "python": platform.python_version(), "results": results}))


if __name__ == "__main__":
    main()
