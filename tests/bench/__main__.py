"""All benchmarks by group: `python tests/bench [GROUP…]`, without a group their list.

Each prints medians and ratios of what it runs in turn, then a line of JSON with the machine and the versions.
Options after `--` go to the programs: `python tests/bench step -- --rounds 5`. What needs data, weights or a trained
model of its own (learning, kills, exports, timeline, explain) says so when it is asked: `python tests/bench/NAME.py
--help`. Figures that were kept are in RESULTS.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

GROUPS = {
    "data": ("reading clips, augmentation, extraction", ["data.py"]),
    "step": ("a training step: tvit, PEFT's layers, a naive LoRA", ["step.py", "--only", "time"]),
    "memory": ("memory of the same steps", ["step.py", "--only", "memory"]),
    "schemes": ("a step of each attention scheme at 18 frames beside joint attention", ["schemes.py"]),
    "epoch": ("a whole epoch, from a frame store and from videos, beside its steps alone", ["epoch.py"]),
    "peers": ("a step beside transformers' video models with PEFT", ["peers.py"]),
    "infer": ("tvit predict on one clip, whole process", ["predict.py"]),
    "startup": ("help and mistakes, whole process", ["startup.py"]),
    "scaling": ("how cost grows with frames, clips, classes, processes and videos", ["scaling.py"]),
    "checkpoint": ("size and time of a checkpoint of ViT-B", ["checkpoint.py"]),
    "display": ("what the live display costs", ["display.py"]),
    "gpu": ("steps on an accelerator, per scheme and frame count", ["gpu.py"]),
}


def main(arguments: list[str]) -> int:
    """Run the groups that are named, one after the other; the worst exit status."""
    names, extra = arguments, []
    if "--" in arguments:
        cut = arguments.index("--")
        names, extra = arguments[:cut], arguments[cut + 1 :]
    unknown = [name for name in names if name not in GROUPS]
    if unknown or not names:
        print(__doc__)
        for name, (what, _) in GROUPS.items():
            print(f"  {name:11} {what}")
        if unknown:
            print(f"\nno such group: {', '.join(unknown)}", file=sys.stderr)
        return 2 if unknown else 0
    worst = 0
    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    for name in names:
        program, *flags = GROUPS[name][1]
        print(f"== {name}: {GROUPS[name][0]} ==", flush=True)
        command = [sys.executable, str(Path(__file__).parent / program), *flags, *extra]
        worst = max(worst, abs(subprocess.run(command, env=environment, check=False).returncode))
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
