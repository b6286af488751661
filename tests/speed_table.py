"""Speed tables of README.md and docs/benchmarks.md, made from tests/bench/results.jsonl. As a program, it rewrites both."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "tests" / "bench" / "results.jsonl"
BLOCK = re.compile(r"(?<=<!-- speed -->\n).*?(?=<!-- /speed -->)", re.DOTALL)
CASE = "vitb12_t8, dropout 0.1"  # the README's setting: a whole ViT-B, 8 frames, the default dropout
Record = dict[str, Any]
Records = dict[str, Record]


def read_records(path: Path = RESULTS) -> Records:
    """The newest record of each group: group -> record."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {record["group"]: record for record in map(json.loads, lines)}


def updated(text: str, made: str) -> str:
    """A page with a fresh table; without one, the block is emptied."""
    return BLOCK.sub(lambda match: f"\n{made}\n" if made else "", text)


def readme_table(records: Records) -> str:
    """Markdown: five figures of one model and one setting, by the clock; empty while one is missing."""
    if not {"step", "memory", "infer"} <= records.keys():
        return ""
    step, memory = records["step"]["results"].get(CASE), records["memory"]["results"].get(CASE)
    infer = records["infer"]
    if step is None or memory is None:
        return ""
    rows = [
        ("training step, against a naive LoRA (A·B formed)", f"{step['naive_wall']:.2f} × faster"),
        ("training step, against PEFT's layers", f"{step['peft_wall']:.2f} × faster"),
        ("memory of a training step, against the naive LoRA", f"{memory['tvit_rss']:.2f} ×"),
        ("share of the machine's matmul rate in a training step", f"{step['share']:.0%}"),
        (
            "`tvit predict clip.avi`, whole process, against `import torch` and a forward pass",
            f"{infer['seconds']:.1f} s, {infer['floor_seconds']:.1f} s",
        ),
    ]
    return _table("speed|figure", rows)


def benchmark_tables(records: Records) -> str:
    """Markdown: a heading and a table for each group that was measured, then the sources."""
    measured = {group: records[group] for group in GROUPS if group in records}
    parts = [
        f"### {title} (`{g}`)\n\n{tabulate(measured[g])}\n"
        for g, (title, tabulate) in GROUPS.items()
        if g in measured
    ]
    return "".join(parts) + _sources(measured) + "\n" if measured else ""


def _pair(row: Record, key: str) -> str:
    """A ratio of CPU time, with that of wall time in brackets; empty where it was not measured."""
    return f"{row[key]:.2f} ({row[f'{key}_wall']:.2f})" if key in row else ""


def _step(record: Record) -> str:
    rows = [
        (
            *_case(name),
            *(_pair(row, key) for key in ("naive", "peft", "plain_naive", "plain_peft")),
            f"{row['share']:.2f}",
        )
        for name, row in _whole(record).items()
    ]
    return _table("model|T|dropout|× naive|× PEFT|plain, × naive|plain, × PEFT|of matmul rate", rows)


def _memory(record: Record) -> str:
    keys = ("tvit_saved", "tvit_rss", "tvit_whole", "tvit_rss_plain", "peft_rss")
    rows = [
        (*_case(name), *(f"{row[key]:.2f}" if key in row else "" for key in keys))
        for name, row in _whole(record).items()
    ]
    return _table("model|T|dropout|kept by autograd|growth|process|growth, plain ViT|PEFT's growth", rows)


def _peers(record: Record) -> str:
    rows = [
        (*name.split(", dropout "), _pair(row, "times_faster"), f"{row['memory_ratio']:.2f}")
        for name, row in record["results"].items()
    ]
    return _table("transformers model|dropout|× faster|memory ratio", rows)


def _schemes(record: Record) -> str:
    cases = record["results"]
    rows = [
        (name, *(_pair(found.get(name, {}), "times_faster") for found in cases.values()))
        for name in next(iter(cases.values()))
    ]
    return _table("|".join(["scheme", *(f"{_case(c)[0]}, {_case(c)[1]} frames" for c in cases)]), rows)


def _epoch(record: Record) -> str:
    rows = [
        (name, f"{row['wall_ratio']:.2f} ({row['cpu_ratio']:.2f})", f"{row['data_wait']:.1%}")
        for name, row in record["results"].items()
    ]
    return _table("frames from|× its steps alone, by the clock (CPU time)|waiting for data", rows)


def _data(record: Record) -> str:
    ratios = record["ratios"]
    rows = [
        (kind, *(f"{ratios[f'{source}, {kind}']:.1f}" for source in ("video", "store")))
        for kind in ("0 workers", "1 workers", "2 workers", "augmented as well")
        if f"store, {kind}" in ratios
    ]
    return _table("|video, × baseline|frame store, × baseline", rows)


def _infer(record: Record) -> str:
    rows = [
        ("float32", f"{record['seconds']:.2f} s", f"{record['ratio']:.2f}", f"{record['megabytes']:.0f} MB")
    ]
    if record.get("int8_is_fast"):
        ratio = record["int8_seconds"] / record["floor_seconds"]
        size = f"{record['int8_megabytes']:.0f} MB"
        rows.append(("`--int8`", f"{record['int8_seconds']:.2f} s", f"{ratio:.2f}", size))
    return _table("|whole process|× `import torch` and a forward pass|peak memory", rows)


def _startup(record: Record) -> str:
    misspelt = {"tvit train --lora-rnk 8": "an unknown option"}
    rows = [
        (misspelt.get(name, f"`{name}`"), f"{row['wall']:.2f}") for name, row in record["results"].items()
    ]
    return _table("command|seconds", rows)


GROUPS: dict[str, tuple[str, Callable[[Record], str]]] = {
    "step": ("Training step", _step),
    "memory": ("Memory of a training step", _memory),
    "peers": ("Beside transformers' video models with PEFT", _peers),
    "schemes": ("Attention schemes at 18 frames", _schemes),
    "epoch": ("A whole epoch", _epoch),
    "data": ("Reading clips", _data),
    "infer": ("Predicting one clip", _infer),
    "startup": ("Start-up", _startup),
}


def _whole(record: Record) -> dict[str, Record]:
    """The rows of whole models; those of slices of a few layers where there are no others."""
    rows: dict[str, Record] = record["results"]
    return {name: row for name, row in rows.items() if "12_t" in name} or rows


def _case(name: str) -> tuple[str, ...]:
    """vitb2_t18, dropout 0.1 -> ViT-B, 2 layers · 18 · 0.1"""
    shape, _, rest = name.partition("_t")
    frames, _, dropout = rest.partition(", dropout ")
    kind = shape.rstrip("0123456789")
    model = f"ViT-{kind.removeprefix('vit').capitalize()}, {shape.removeprefix(kind)} layers"
    return (model, frames, dropout) if dropout else (model, frames)


def _table(heads: str, rows: Sequence[Sequence[str]]) -> str:
    head = heads.split("|")
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _sources(records: Records) -> str:
    """Commit, date, machine and torch of each group; groups of one run together."""
    groups: dict[str, list[str]] = {}
    for group, record in records.items():
        facts = [
            f"commit {record['commit']}",
            record["date"],
            f"{record['cores']} cores of {record['processor']}",
        ]
        if "torch" in record:
            facts.append(f"torch {record['torch']}")
        if record.get("others"):
            facts.append(f"other processes used up to {record['others']:g} cores")
        groups.setdefault(", ".join(facts), []).append(f"`{group}`")
    return " ".join(f"{', '.join(names)}: {facts}." for facts, names in groups.items())


if __name__ == "__main__":
    records = read_records()
    for page, made in ((README, readme_table(records)), (BENCHMARKS, benchmark_tables(records))):
        page.write_text(updated(page.read_text(encoding="utf-8"), made), encoding="utf-8")
