"""The table of speed of README.md, made from what the benchmarks wrote. Run as a program, it rewrites the README."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"
RESULTS = Path(__file__).parent / "bench" / "results.jsonl"
BLOCK = re.compile(r"(?<=<!-- speed -->\n).*?(?=<!-- /speed -->)", re.DOTALL)

Record = dict[str, Any]
Row = tuple[str, str]  # what was measured, and the figure


def read_records(path: Path = RESULTS) -> dict[str, Record]:
    """The newest record of each group: group -> record."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {record["group"]: record for record in map(json.loads, lines)}


def table(records: dict[str, Record]) -> str:
    """Markdown: a line per figure, and below it where they were measured; empty without records."""
    rows = [
        (group, row) for group, rows_of in ROWS.items() if group in records for row in rows_of(records[group])
    ]
    if not rows:
        return ""
    lines = ["| speed | figure | `python tests/bench` |", "|---|---|---|"]
    lines += [f"| {what} | {figure} | `{group}` |" for group, (what, figure) in rows]
    return "\n".join(lines) + "\n\n" + _sources([records[group] for group in ROWS if group in records]) + "\n"


def updated(text: str, records: dict[str, Record]) -> str:
    """README text with a fresh table."""
    made = table(records)
    return BLOCK.sub(lambda match: f"\n{made}\n" if made else "", text)


def _step(record: Record) -> list[Row]:
    rows: list[Row] = []
    for dropout in _dropouts(record):
        cases = _cases(record, dropout)
        of = list(cases.values())
        where = f"dropout {dropout}" if rows else f"{_models(cases)}, dropout {dropout}"
        rows += [
            (
                f"a training step against a naive LoRA (A@B formed), by processor: {where}",
                _times(of, "naive", "naive_wall"),
            ),
            (f"against PEFT's own layers: dropout {dropout}", _times(of, "peft", "peft_wall")),
            *_plain(cases, dropout),
            (f"share of the machine's matmul rate: dropout {dropout}", _middle([row["share"] for row in of])),
        ]
    return rows


def _plain(cases: dict[str, Record], dropout: str) -> list[Row]:
    """Whole models beside plain ViTs, whose last block is a twelfth; in a slice of two layers it would be half."""
    whole = {case: row for case, row in cases.items() if f"{WHOLE}_t" in case}
    rows = list(whole.values())
    figures = [_times(rows, f"plain_{kind}", f"plain_{kind}_wall") for kind in ("naive", "peft") if rows]
    where = f"{_models(whole)}, dropout {dropout}"
    what = f"the same beside plain ViTs, all of whose tokens pass the last block; naive, PEFT: {where}"
    return [(what, "; ".join(figures))] if rows else []


def _memory(record: Record) -> list[Row]:
    rows: list[Row] = []
    for dropout in _dropouts(record):
        cases = _cases(record, dropout)
        held, grows, whole = (
            _range(row[f"tvit_{kind}"] for row in cases.values()) for kind in ("saved", "rss", "whole")
        )
        where = f"dropout {dropout}" if rows else f"{_models(cases)}, dropout {dropout}"
        what = f"memory of a step against the naive LoRA: {where}"
        plain = [row["tvit_rss_plain"] for row in cases.values() if "tvit_rss_plain" in row]
        beside = f" ({_range(plain)} beside a plain ViT's)" if plain else ""
        rows.append((what, f"held {held}; what a process grows by {grows}{beside}; a whole process {whole}"))
    return rows


def _peers(record: Record) -> list[Row]:
    same = f"equal width and tokens, {record['depth']} layers"
    return [
        (
            f"a step against transformers' {name.partition(',')[0]} with PEFT, {same},{name.partition(',')[2]}; memory held",
            f"× {row['times_faster']:.2f} (by the clock {row['times_faster_wall']:.2f}); {row['memory_ratio']:.2f}",
        )
        for name, row in record["results"].items()
    ]


def _schemes(record: Record) -> list[Row]:
    rows = []
    for case, found in record["results"].items():
        for base, name in (
            ("joint", "joint attention over single frames"),
            ("joint, naive LoRA", "the same, naive LoRA"),
        ):
            faster = ", ".join(
                f"{kind} × {row['times_faster'] / found[base]['times_faster']:.2f}"
                for kind, row in found.items()
                if kind not in ("joint", "joint, naive LoRA")
            )
            rows.append(
                (f"a step at {case.partition('_t')[2]} frames, {_model(case)}, against {name}", faster)
            )
    return rows


WHOLE = 12  # layers of ViT-B and ViT-S


def _epoch(record: Record) -> list[Row]:
    rows = record["results"]
    clips = f"{record['clips']} clips, {record['data']}"
    what = (
        f"a whole epoch against the sum of its steps (ViT-S, 98 px; {clips}): from a frame store, from videos"
    )
    return [
        (
            what,
            f"× {rows['store']['wall_ratio']:.2f}, × {rows['videos']['wall_ratio']:.2f} "
            f"(processor × {rows['store']['cpu_ratio']:.2f}, × {rows['videos']['cpu_ratio']:.2f})",
        )
    ]


def _data(record: Record) -> list[Row]:
    ratios = record["ratios"]

    def both(kind: str) -> str:
        return f"× {ratios[f'video, {kind}']:.1f}, × {ratios[f'store, {kind}']:.1f}"

    base = "against decoding all frames and augmenting PIL images"
    return [
        (
            f"reading a training clip (18 frames, 224 px) from a video, and from the frame store, {base}: "
            "tvit augments on the GPU",
            both("0 workers"),
        ),
        ("the same where tvit augments on the same core", both("augmented as well")),
        ("augmenting alone", f"× {ratios['augmentation']:.1f}"),
    ]


def _infer(record: Record) -> list[Row]:
    what = f"`tvit predict clip.avi`, ViT-{record['size']}, whole process, against `import torch` and a forward pass"
    eight = f"with `--int8`, against without (ViT-{record['size']})"
    rows = [(what, f"{record['seconds']:.2f} s, × {record['ratio']:.2f}")]
    if record["int8_is_fast"]:
        rows.append((eight, f"{record['int8_seconds']:.2f} s, × {record['int8_ratio']:.2f}"))
    return rows


def _startup(record: Record) -> list[Row]:
    bare = record["results"][BARE]["wall"]
    return [
        (f"`{name}`, and Python that does nothing", f"{row['wall']:.2f} s, {bare:.3f} s")
        for name, row in record["results"].items()
        if name != BARE
    ]


BARE = "python -c pass"


ROWS: dict[str, Callable[[Record], list[Row]]] = {
    "step": _step,
    "memory": _memory,
    "peers": _peers,
    "schemes": _schemes,
    "epoch": _epoch,
    "data": _data,
    "infer": _infer,
    "startup": _startup,
}


def _dropouts(record: Record) -> list[str]:
    return list(dict.fromkeys(name.rpartition("dropout ")[2] for name in record["results"]))


def _cases(record: Record, dropout: str) -> dict[str, Record]:
    """The rows of one dropout by case."""
    named = ((name.partition(", dropout "), row) for name, row in record["results"].items())
    return {case: row for (case, _, of), row in named if of == dropout}


def _models(cases: Iterable[str]) -> str:
    """vitb2_t8, vitb2_t18 -> ViT-B, 2 layers (8, 18 frames)"""
    frames: dict[str, list[str]] = {}
    for case in cases:
        frames.setdefault(_model(case), []).append(case.partition("_t")[2])
    return "; ".join(f"{model} ({', '.join(own)} frames)" for model, own in frames.items())


def _model(case: str) -> str:
    """vitb2_t18 -> ViT-B, 2 layers"""
    shape = case.partition("_t")[0]
    name = shape.rstrip("0123456789")
    return f"ViT-{name.removeprefix('vit').capitalize()}, {shape.removeprefix(name)} layers"


def _times(cases: list[Record], by_processor: str, by_clock: str) -> str:
    return f"× {_range(row[by_processor] for row in cases)} (by the clock {_range(row[by_clock] for row in cases)})"


def _range(values: Iterable[float]) -> str:
    """The least and the most of several, once where they look the same."""
    numbers = sorted(values)
    low, high = f"{numbers[0]:.2f}", f"{numbers[-1]:.2f}"
    return low if low == high else f"{low}–{high}"


def _middle(values: list[float]) -> str:
    """The median, which one reading of a machine that was slow for a moment does not move, and the least."""
    return f"{statistics.median(values):.2f} in the median, {min(values):.2f} at least"


def _sources(records: list[Record]) -> str:
    """Where and when: one sentence per commit, date, machine and torch."""
    places: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        machine = f"{record['cores']} cores of {record['processor']}"
        key = (
            record["commit"],
            record["date"],
            machine,
            f"torch {record['torch']}" if "torch" in record else "",
        )
        places.setdefault(key, []).append(record)
    sentences = []
    for (commit, date, machine, torch), own in places.items():
        groups = ", ".join(f"`{record['group']}`" for record in own)
        facts = ", ".join(filter(None, [f"commit {commit}", date, machine, torch]))
        others = max((record["others"] or 0 for record in own), default=0)
        busy = f", others keeping {others:g} of them busy at most" if others else ""
        sentences.append(f"{groups}: {facts}{busy}.")
    return " ".join(sentences)


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8"), read_records()), encoding="utf-8")
