"""Every export of a trained model, used by its example in an environment that has no tvit.

    python tests/bench/exports.py RUN --clips FOLDER [--environments FOLDER] [--count 20]

RUN is an experiment's folder (an adapter comes from its checkpoints), FOLDER holds videos at any depth. Two fresh
environments are made once: one with torch, transformers and peft, one with ONNX Runtime and neither torch nor
transformers. Each format is exported and proved, then `examples/use_*.py` label the videos there, from the file to the
label, offline; what they print is set against `tvit predict`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tvit_cli.engine.predict import predict
from tvit_cli.settings.base import load
from tvit_cli.settings.predict import PredictSettings

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "full": ["torch", "transformers", "peft", "safetensors", "numpy", "av", "pillow"],
    "onnx": ["onnxruntime", "numpy", "av"],
}


@dataclass(frozen=True)
class Form:
    """One way to export: its flags, and the example and environment that use it."""

    name: str
    flags: tuple[str, ...]
    environment: str = "full"

    @property
    def example(self) -> Path:
        return ROOT / "examples" / f"use_{self.flags[0]}.py"


FORMS = (
    Form("safetensors", ("safetensors",)),
    Form("huggingface", ("huggingface",)),
    Form("onnx", ("onnx",), "onnx"),
    Form("onnx, preprocessing inside", ("onnx", "--with-preprocessing"), "onnx"),
    Form("onnx, 8 bits", ("onnx", "--int8"), "onnx"),
    Form("onnx, 8 bits, preprocessing inside", ("onnx", "--int8", "--with-preprocessing"), "onnx"),
    Form("torch", ("torch",)),
    Form("torch, preprocessing inside", ("torch", "--with-preprocessing")),
    Form("adapter", ("adapter",)),
)


def environment(folder: Path, name: str) -> Path:
    """The Python of an environment, made when it is not there."""
    home = folder / name
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    done = home / "complete"
    if not done.exists():
        venv.create(home, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES[name]], check=True)
        done.touch()
    missing = subprocess.run([python, "-c", "import tvit_cli"], cwd=home, env=plain(), capture_output=True)
    assert b"ModuleNotFoundError" in missing.stderr, f"{python} has tvit"
    return python


def plain() -> dict[str, str]:
    """This process's variables without a way to find tvit, and without a network for models."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--clips", type=Path, required=True, help="folder of videos")
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "tvit-exports")
    parser.add_argument("--count", type=int, default=20)
    options = parser.parse_args()
    videos = sorted(
        p.resolve() for p in options.clips.rglob("*") if p.suffix in {".avi", ".mp4", ".mkv", ".webm"}
    )
    chosen = [videos[(2 * i + 1) * len(videos) // (2 * options.count)] for i in range(options.count)]
    pythons = {name: environment(options.environments, name) for name in PACKAGES}
    for name, python in pythons.items():
        listed = subprocess.run(
            [python, "-m", "pip", "list", "--format", "freeze"], capture_output=True, text=True
        )
        heads = tuple(f"{package}==" for package in PACKAGES[name])
        print(f"{name}: {', '.join(line for line in listed.stdout.splitlines() if line.startswith(heads))}")
    settings = load(
        PredictSettings,
        flags={"paths": tuple(map(str, chosen)), "model": options.run, "top_k": 1},
        environ={},
    ).settings
    expected = [answer.labels[0] for answer in predict(settings).predictions]

    print("| format | proof: logits | agreement | example: labels | scores | MB |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for number, form in enumerate(FORMS):
            target = Path(folder) / str(number)
            flags = ["--format", *form.flags, "--output", target]
            made = subprocess.run(
                [sys.executable, "-m", "tvit_cli", "export", options.run, *flags],
                capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(ROOT)),
            )  # fmt: skip
            if made.returncode:
                print(
                    f"| {form.name} | not made: {' '.join(made.stderr.split())[:200]} | | | | |", flush=True
                )
                continue
            proof = json.loads((target / "parity.json").read_text(encoding="utf-8"))
            size = sum(p.stat().st_size for p in target.rglob("*") if p.is_file()) / 1e6
            used = subprocess.run(
                [pythons[form.environment], form.example, target, *chosen],
                capture_output=True, text=True, env=plain(), cwd=folder,
            )  # fmt: skip
            answers = [line.split("\t") for line in used.stdout.splitlines()]
            if used.returncode or len(answers) != len(chosen):
                sys.exit(f"{form.example.name} on {form.name}:\n{used.stderr[-2000:]}")
            same = sum(answer[1] == label for answer, (label, _) in zip(answers, expected, strict=True))
            off = max(
                abs(float(answer[2]) - score) for answer, (_, score) in zip(answers, expected, strict=True)
            )
            print(
                f"| {form.name} | {proof['max_logit_difference']:.1e} | {proof['top1_agreement']:.3f} "
                f"| {same} of {len(chosen)} | {off:.1e} | {size:.1f} |", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
