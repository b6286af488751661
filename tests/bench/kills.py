"""A training killed at chosen and at random points, resumed, and compared with one that was left alone, bit for bit.

    python tests/bench/kills.py --out kills.jsonl

Cells of {SIGKILL, SIGTERM, SIGINT, disk full} × {decode, step, checkpoint write, checkpoint prune, validation,
end-of-run save} × {1, 2 processes} × {0, 2 workers} × {videos, store} that contain every pair of values, then random
kills. Each cell appends one line when it ends; run again, what passed already is not done again.

Who is hit: SIGKILL the process that is there (a loader worker, a rank, the training), as when memory runs out; SIGTERM
the process that was started (with several, the launcher), as a queue does; SIGINT its process group, as a terminal
does. A full disk is a small tmpfs with a file that fills it, or, without the right to mount one, files that take no
byte. The hooks are in tests/fuse.
"""

import argparse
import fcntl
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny import make_clips, make_pretrained, settings  # noqa: E402

from tvit_cli.engine.extract import extract  # noqa: E402
from tvit_cli.engine.train import train  # noqa: E402
from tvit_cli.engine.train.checkpoint import list_checkpoints, load_checkpoint  # noqa: E402
from tvit_cli.model.folder import load_model  # noqa: E402
from tvit_cli.results import silent  # noqa: E402
from tvit_cli.settings.extract import ExtractSettings  # noqa: E402
from tvit_cli.settings.train import TrainSettings  # noqa: E402

FULL = "disk full"
FACTORS: dict[str, tuple[Any, ...]] = {
    "how": ("SIGKILL", "SIGTERM", "SIGINT", FULL),
    "phase": ("decode", "step", "checkpoint write", "checkpoint prune", "validation", "end-of-run save"),
    "processes": (1, 2),
    "workers": (0, 2),
    "source": ("videos", "store"),
}
Cell = tuple[Any, ...]  # one value of each factor
# One of each phase, all ways to die, one and two processes: these run in the test suite.
IN_THE_SUITE: tuple[Cell, ...] = (
    ("SIGKILL", "checkpoint write", 1, 0, "videos"),
    ("SIGTERM", "decode", 1, 2, "store"),
    ("SIGINT", "validation", 1, 2, "videos"),
    (FULL, "end-of-run save", 1, 0, "store"),
    ("SIGKILL", "step", 2, 0, "videos"),
    (FULL, "checkpoint prune", 1, 0, "videos"),
)
EXIT_CODES = {"SIGTERM": 143, "SIGINT": 130, FULL: 1}
TARGETS = {"SIGKILL": "self", "SIGTERM": "top", "SIGINT": "group", FULL: "self"}
WALL_CLOCK = frozenset({"seconds", "clips_per_second", "data_wait"})
OWN = frozenset({"experiment_name", "working_directory", "num_workers"})  # what a card says of its own run
TMPFS_BYTES = 2 << 20


def covering(seed: int = 0) -> list[Cell]:
    """Cells that contain every pair of values of two factors; those of the test suite come first."""
    everything = list(itertools.product(*FACTORS.values()))
    random.Random(seed).shuffle(everything)
    chosen = list(IN_THE_SUITE)
    missing = {pair for cell in everything for pair in pairs(cell)} - {
        p for cell in chosen for p in pairs(cell)
    }
    while missing:
        chosen.append(max(everything, key=lambda cell: len(missing & pairs(cell))))
        missing -= pairs(chosen[-1])
    return chosen


def pairs(cell: Cell) -> set[tuple[tuple[int, Any], ...]]:
    """The pairs of (factor, value) that a cell contains."""
    return set(itertools.combinations(enumerate(cell), 2))


@dataclass(frozen=True)
class Kill:
    """One kill: at the nth call of a phase, or when a share of the training's time has passed."""

    how: str
    phase: str  # "" for a time
    nth: int = 1
    share: float = 0.0
    rank: int = 0
    target: str = "self"


@dataclass(frozen=True)
class Plan:
    """A run and the kills it suffers, one after the other."""

    name: str
    processes: int
    workers: int
    source: str
    kills: tuple[Kill, ...]


def plan_of(cell: Cell) -> Plan:
    """The plan of a cell: the same call in every run of this program."""
    how, phase, processes, workers, source = cell
    name = f"{how}, {phase}, {processes} processes, {workers} workers, {source}"
    return Plan(
        name, processes, workers, source, (_kill(random.Random(name), how, phase, processes, workers),)
    )


def random_plans(count: int, seed: int = 1) -> list[Plan]:
    """Kills at random: half of them at a call drawn at random, half after a time; a third strikes again."""
    plans = []
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        processes, workers = draw.choice((1, 2)), draw.choice((0, 2))
        kills = []
        for _ in range(1 + (draw.random() < 1 / 3)):
            how = draw.choice(FACTORS["how"])
            if number % 2:
                target = draw.choice(("top", "group"))
                how = "SIGKILL" if how == FULL else how
                kills.append(Kill(how, "", share=draw.random(), target=target))
            else:
                kills.append(_kill(draw, how, draw.choice(FACTORS["phase"]), processes, workers, first=1))
        plans.append(
            Plan(f"random {number:02d}", processes, workers, draw.choice(FACTORS["source"]), tuple(kills))
        )
    return plans


# Calls per process in one run (`Bench.settings`), lowest of all ranks: 24 or 12 steps, a checkpoint every second
# step and at the end of each of 4 epochs, each of 3 files or more.
CALLS = {
    ("step", 1): 24, ("step", 2): 12, ("checkpoint write", 1): 40, ("checkpoint write", 2): 24,
    ("checkpoint prune", 1): 9, ("checkpoint prune", 2): 5, ("decode", 1): 48, ("decode", 2): 24,
    ("validation", 1): 4, ("validation", 2): 4, ("end-of-run save", 1): 1, ("end-of-run save", 2): 1,
}  # fmt: skip
MAIN_ONLY = ("checkpoint write", "checkpoint prune", "end-of-run save")


def _kill(draw: random.Random, how: str, phase: str, processes: int, workers: int, first: int = 0) -> Kill:
    """A kill at a call drawn at random; without `first`, one in the second half, where there are checkpoints."""
    calls = CALLS[phase, processes] // (max(1, workers) if phase == "decode" else 1)
    rank = 0 if phase in MAIN_ONLY else draw.randrange(processes)
    if phase == "validation" and rank:
        calls -= 1
    return Kill(how, phase, draw.randint(first or max(1, calls // 2), calls), rank=rank, target=TARGETS[how])


@dataclass
class Bench:
    """Data, weights, undisturbed runs, and a small disk that fills up.

    `quick` takes every undisturbed run of one process in this process, which has imported all it needs.
    """

    folder: Path
    may_mount: bool
    quick: bool = False
    sources: dict[str, Path] = field(init=False)
    pretrained: Path = field(init=False)

    def __post_init__(self) -> None:
        self.sources = {
            "videos": self.folder / "videos" / "colours",
            "store": self.folder / "store" / "colours",
        }
        self.pretrained = self.folder / "tiny-vit"
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            if not self.pretrained.exists():
                for root in self.sources.values():
                    make_clips(root)
                stored = str(self.sources["store"])
                extract(ExtractSettings(path_to_data=stored, num_workers=0, frames_per_video=6), silent)
                make_pretrained(self.pretrained)

    def settings(self, plan: Plan, runs: Path, name: str, **changes: Any) -> TrainSettings:
        """Settings of the run: four epochs, a checkpoint every second step, two of them kept."""
        return settings(
            path_to_data=str(self.sources[plan.source]), hf_model_name=str(self.pretrained),
            working_directory=runs, experiment_name=name, num_processes=plan.processes, num_workers=plan.workers,
            epochs=4, per_gpu_batch_size=2, save_every_steps=2, max_no_of_checkpoints=2, **changes,
        )  # fmt: skip

    def start(self, facts: TrainSettings, **variables: str) -> subprocess.Popen[str]:
        """Start `tvit train` in a session of its own."""
        config = self.folder / f"{facts.working_directory.name}.json"
        config.write_text(facts.model_dump_json())
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("TVIT_", "FUSE"))}
        path = os.pathsep.join([str(ROOT / "tests" / "fuse"), str(ROOT)])
        return subprocess.Popen(
            [sys.executable, "-m", "tvit_cli", "train", "--config", str(config)],
            env={**environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def finish(self, facts: TrainSettings) -> float:
        """Train to the end and leave it alone; the seconds from the first record on, or 0 if in this process."""
        if self.quick and facts.num_processes == 1:
            train(facts)
            return 0.0
        child = self.start(facts)
        _wait_for(facts.working_directory / str(facts.experiment_name) / "metrics.jsonl", child)
        started = time.monotonic()
        errors = _errors_of(child)
        _must(child.returncode == 0, f"an undisturbed run failed:\n{errors}")
        return time.monotonic() - started

    def undisturbed(self, plan: Plan) -> Path:
        """The undisturbed run of this code, without workers, which change nothing."""
        code = hashlib.sha256()
        for file in sorted((ROOT / "tvit_cli").rglob("*.py")):
            code.update(file.read_bytes())
        runs = self.folder / f"undisturbed-{code.hexdigest()[:12]}"
        name = f"{plan.processes}-{plan.source}"
        with self._alone():
            if not (runs / name / "seconds").exists():
                shutil.rmtree(runs / name, ignore_errors=True)
                seconds = self.finish(self.settings(replace(plan, workers=0), runs, name))
                (runs / name / "seconds").write_text(str(seconds))
        return runs / name

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with (self.folder / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def disk(self) -> Iterator[tuple[Path, bool]]:
        """A folder for a run that meets a full disk, and whether it is a file system of its own."""
        disk = Path(tempfile.mkdtemp(dir=self.folder, prefix="disk-"))
        mount = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", str(disk)]
        is_mounted = self.may_mount and subprocess.run(mount, capture_output=True).returncode == 0
        try:
            yield disk, is_mounted
        finally:
            if is_mounted:
                subprocess.run(["umount", str(disk)], check=True)
            shutil.rmtree(disk)
            for beside in (".json", ".marker"):
                disk.with_suffix(beside).unlink(missing_ok=True)


class Wrong(Exception):
    """A killed run that differs from the undisturbed one."""


def run_plan(bench: Bench, plan: Plan) -> dict[str, Any]:
    """Kill, look, resume, finish, compare. Raises Wrong; returns facts for the table."""
    whole = bench.undisturbed(plan)
    with bench.disk() as (runs, is_mounted):
        run = runs / "killed"
        hits = [strike(bench, plan, kill, runs, run, is_mounted=is_mounted) for kill in plan.kills]
        if not (run / "model").exists():
            bench.finish(bench.settings(plan, runs, run.name, **how_to_go_on(run)))
        compare(run, whole)
    return {"hits": hits, "disk": "tmpfs" if is_mounted else "files that take no byte"}


def strike(
    bench: Bench, plan: Plan, kill: Kill, runs: Path, run: Path, *, is_mounted: bool
) -> dict[str, Any]:
    """Start or resume the run, kill it, and look at what it left."""
    marker, filler = runs.with_suffix(".marker"), runs / "filler"
    marker.unlink(missing_ok=True)
    resumes = run.exists()
    facts = bench.settings(plan, runs, run.name, **(how_to_go_on(run) if resumes else {}))
    if kill.phase:
        fuse = {
            **{k: v for k, v in asdict(kill).items() if k != "share"},
            "marker": str(marker), "folder": str(runs), "filler": str(filler) if is_mounted else None,
        }  # fmt: skip
        child = bench.start(facts, FUSE=json.dumps(fuse))
    else:
        seconds = float((bench.undisturbed(plan) / "seconds").read_text())
        records_before = _identity(run / "metrics.jsonl")
        child = bench.start(facts)
        _wait_for(run / "metrics.jsonl", child, other_than=records_before)
        time.sleep(kill.share * seconds)
        before = [p.name for p in list_checkpoints(run / "checkpoints")]
        with suppress(ProcessLookupError):  # it is done already
            (os.kill if kill.target == "top" else os.killpg)(child.pid, signal.Signals[kill.how])
        marker.write_text(json.dumps({"checkpoints": before}))
    errors = _errors_of(child)
    filler.unlink(missing_ok=True)
    was_hit = marker.exists()
    # A resumed run makes fewer calls than a whole one, and a run may end before its time has come.
    _must(was_hit or resumes, f"{kill}: no such call:\n{errors}")
    if was_hit:
        codes = expected_codes(plan, kill, is_done=(run / "model").exists())
        _must(child.returncode in codes, f"exit code {child.returncode}, not {codes}:\n{errors}")
        _must("Traceback" not in errors and "bug in tvit" not in errors, f"no clear message:\n{errors}")
        if kill.how == "SIGKILL" and kill.phase == "step" and plan.processes > 1:
            _must("was killed (SIGKILL)" in errors, f"the killed rank is not named:\n{errors}")
        if kill.how == FULL:
            _must(
                "disk is full" in errors or "No space left" in errors,
                f"the full disk is not named:\n{errors}",
            )
        look(run, json.loads(marker.read_text())["checkpoints"], saved=child.returncode in (130, 143))
    else:
        _must(child.returncode == 0, f"a resumed run failed:\n{errors}")
    return {**asdict(kill), "exit code": child.returncode, "was hit": was_hit}


def expected_codes(plan: Plan, kill: Kill, *, is_done: bool) -> tuple[int, ...]:
    """Expected exit codes; a kill by time may come after the run has ended."""
    if not kill.phase and is_done:
        return 0, -signal.Signals[kill.how], EXIT_CODES.get(kill.how, 0)
    if kill.how != "SIGKILL":
        return (EXIT_CODES[kill.how],)
    # threads read a store
    in_worker = kill.phase == "decode" and plan.workers > 0 and plan.source == "videos"
    return (1,) if kill.target == "self" and (in_worker or plan.processes > 1) else (-9,)


def look(run: Path, before: Sequence[str], *, saved: bool) -> None:
    """Nothing that can be found is half written, and no checkpoint is lost but to a newer one."""
    left = list_checkpoints(run / "checkpoints")
    for path in left:
        load_checkpoint(path)
    if (run / "model").exists():
        load_model(run / "model")
    newest = max(map(_step, before), default=0)
    _must(newest <= max((_step(p.name) for p in left), default=0), f"lost: {before} -> {left}")
    _must(bool(left) or not saved, "stopped by a signal, and nothing was saved")


def how_to_go_on(run: Path) -> dict[str, Any]:
    """The settings for a run that was killed; one that has no checkpoint yet is started again."""
    if list_checkpoints(run / "checkpoints"):
        return {"resume_from_checkpoint": "latest"}
    return {"overwrite": True}


def compare(run: Path, whole: Path) -> None:
    """Raise Wrong unless two finished runs are equal in all but the wall clock."""
    a, b = ([p.name for p in list_checkpoints(r / "checkpoints")] for r in (run, whole))
    # A stop saves where it was, so an earlier checkpoint may be another than in the undisturbed run.
    _must(a[-1] == b[-1], f"the last checkpoint is {a[-1]}, undisturbed {b[-1]}")
    for name in sorted(set(a) & set(b)):
        for file in sorted((whole / "checkpoints" / name).iterdir()):
            other = run / "checkpoints" / name / file.name
            _must(other.read_bytes() == file.read_bytes(), f"{name}/{file.name} differs")
    weights = [(r / "model" / "model.safetensors").read_bytes() for r in (run, whole)]
    _must(weights[0] == weights[1], "model/model.safetensors differs")
    _must(_card(run) == _card(whole), "model/card.json differs")
    _must(records(run) == records(whole), "metrics.jsonl differs")
    left = [
        p.name for p in run.rglob("*") if ".writing" in p.name or ".removing" in p.name or p.name[:2] == ".m"
    ]
    _must(not left, f"left behind: {left}")


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock tells."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in lines]


def _card(run: Path) -> dict[str, Any]:
    card: dict[str, Any] = json.loads((run / "model" / "card.json").read_text())
    settings = card["settings"]
    card["settings"] = {
        k: v for k, v in settings.items() if k not in (*OWN, "resume_from_checkpoint", "overwrite")
    }
    return card


def _step(name: str) -> int:
    return int(name.rpartition("-")[2])


def _must(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise Wrong(otherwise)


def _errors_of(child: subprocess.Popen[str]) -> str:
    """The stderr of a process; it is killed after ten minutes."""
    try:
        return child.communicate(timeout=600)[1]
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)


def _wait_for(path: Path, child: subprocess.Popen[str], other_than: int | None = None) -> None:
    """Wait until a file is there, or another than was there before; a resumed run writes its records anew."""
    deadline = time.monotonic() + 120
    while _identity(path) in (None, other_than) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def _identity(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("kills.jsonl"), help="one line per cell")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tvit-kills")
    parser.add_argument("--random", type=int, default=40, help="random kills after the cells")
    parser.add_argument("--only", default="", help="only cells whose name contains this")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.work, may_mount=hasattr(os, "geteuid") and os.geteuid() == 0)
    plans = [*map(plan_of, covering()), *random_plans(options.random)]
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    rows = {row["cell"]: row for row in map(json.loads, lines)}
    for plan in plans:
        if options.only in plan.name and rows.get(plan.name, {}).get("result") != "same bits":
            row = _timed(bench, plan)
            rows[plan.name] = row
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{row['seconds']:5.1f} s  {plan.name}: {row['result']}", flush=True)
    good = sum(rows.get(plan.name, {}).get("result") == "same bits" for plan in plans)
    print(f"{good} of {len(plans)} ended with the same bits")


def _timed(bench: Bench, plan: Plan) -> dict[str, Any]:
    started = time.monotonic()
    row: dict[str, Any] = {"cell": plan.name, "processes": plan.processes, "workers": plan.workers}
    try:
        row |= {"source": plan.source, **run_plan(bench, plan), "result": "same bits"}
    except (Wrong, subprocess.TimeoutExpired) as error:
        row["result"] = f"WRONG: {error}"
    versions = {name: importlib.metadata.version(name) for name in ("torch", "accelerate")}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return row | {
        "seconds": round(time.monotonic() - started, 1), "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(), "python": platform.python_version(), **versions,
    }  # fmt: skip


if __name__ == "__main__":
    main()
