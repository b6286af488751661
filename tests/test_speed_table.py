"""The README's table of speed: made of what the benchmarks wrote, the newest of each, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from speed_table import BLOCK, README, ROWS, read_records, table, updated

PLACE = {
    "commit": "abc1234",
    "date": "2026-11-22",
    "processor": "EPYC",
    "cores": 2,
    "others": 0.1,
    "torch": "2.13",
}
STEP = {"naive": 1.51, "naive_wall": 1.55, "peft": 1.08, "peft_wall": 1.11, "share": 0.77}
STEP |= {"plain_naive": 1.7, "plain_naive_wall": 1.8, "plain_peft": 1.2, "plain_peft_wall": 1.3}
STARTUP = {"python -c pass": {"wall": 0.015, "cpu": 0.01}, "tvit --help": {"wall": 0.2, "cpu": 0.1}}
MEMORY = {"tvit_saved": 0.42, "tvit_rss": 0.37, "tvit_whole": 0.5}


@pytest.fixture(scope="module")
def bench(load_bench: Callable[[str], ModuleType]) -> ModuleType:
    return load_bench("__main__")


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps({**PLACE, **record}) + "\n" for record in records))
    return path


def test_the_table_in_the_readme_is_the_one_that_the_results_make() -> None:
    text = README.read_text(encoding="utf-8")
    assert BLOCK.search(text)
    assert updated(text, read_records()) == text, "run: python tests/speed_table.py"


def test_without_results_there_is_no_table_and_a_second_run_changes_nothing(tmp_path: Path) -> None:
    assert read_records(tmp_path / "none.jsonl") == {}
    text = "before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n"
    assert updated(text, {}) == "before\n<!-- speed -->\n<!-- /speed -->\nafter\n"
    records = {"startup": {**PLACE, "group": "startup", "results": STARTUP}}
    once = updated(text, records)
    assert "| `tvit --help`, and Python that does nothing | 0.20 s, 0.015 s | `startup` |" in once
    assert updated(once, records) == once


def test_a_row_spans_all_cases_of_the_newest_run_and_says_where_it_was_measured(tmp_path: Path) -> None:
    old = {"group": "step", "results": {"vitb2_t8, dropout 0.1": {**STEP, "naive": 9.0}}}
    cases = {"vitb2_t8, dropout 0.1": {**STEP, "naive": 1.85}, "vitb4_t18, dropout 0.1": STEP}
    whole = {"vits12_t8, dropout 0.1": {**STEP, "plain_peft": 1.25}}
    held = {"group": "memory", "commit": "def5678", "others": 1.5, "results": {"vitb2_t8, dropout 0": MEMORY}}
    made = table(read_records(write(tmp_path / "r.jsonl", old, {"group": "step", "results": cases}, held)))
    where = "ViT-B, 2 layers (8 frames); ViT-B, 4 layers (18 frames), dropout 0.1"
    assert f"{where} | × 1.51–1.85 (by the clock 1.55) |" in made
    assert "× 1.08 (by the clock 1.11)" in made and "9.0" not in made
    assert "plain ViTs" not in made
    of_whole = table(read_records(write(tmp_path / "w.jsonl", {"group": "step", "results": cases | whole})))
    row = next(line for line in of_whole.splitlines() if "plain ViTs" in line)
    assert "naive, PEFT: ViT-S, 12 layers (8 frames), dropout 0.1" in row
    assert "× 1.70 (by the clock 1.80); × 1.25 (by the clock 1.30)" in row
    assert "| 0.77 in the median, 0.77 at least |" in made
    assert "dropout 0 | held 0.42; what a process grows by 0.37; a whole process 0.50 | `memory` |" in made
    assert (
        "`step`: commit abc1234, 2026-11-22, 2 cores of EPYC, torch 2.13, others keeping 0.1 of them busy"
        in made
    )
    assert (
        "`memory`: commit def5678, 2026-11-22, 2 cores of EPYC, torch 2.13, others keeping 1.5 of them"
        in made
    )


def test_schemes_stand_beside_joint_attention_and_beside_its_naive_lora(tmp_path: Path) -> None:
    rows = {
        name: {"times_faster": times}
        for name, times in (("joint", 1.0), ("factorized", 2.0), ("joint, naive LoRA", 0.5))
    }
    made = table(
        read_records(write(tmp_path / "r.jsonl", {"group": "schemes", "results": {"vitb2_t18": rows}}))
    )
    assert "against joint attention over single frames | factorized × 2.00 |" in made
    assert "against the same, naive LoRA | factorized × 4.00 |" in made


def test_every_group_of_the_table_is_a_benchmark_that_can_be_run(bench: ModuleType) -> None:
    assert set(ROWS) <= set(bench.GROUPS)
    for _, (program, *_) in bench.GROUPS.values():
        assert (Path(__file__).parent / "bench" / program).is_file()


def test_what_a_benchmark_found_is_appended_with_where_and_when(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "tiny.py"
    program.write_text(
        "import sys\nprint('x 2.0')\nprint('{\"benchmark\": \"tiny\", \"rounds\": ' + sys.argv[2] + '}')"
    )
    failing = tmp_path / "failing.py"
    failing.write_text("print('{}')\nraise SystemExit(3)")
    groups = {"tiny": ("tiny things", [str(program), "--rounds"]), "failing": ("", [str(failing)])}
    monkeypatch.setattr(bench, "GROUPS", groups)
    target = write(tmp_path / "r.jsonl", {"group": "before"})
    assert bench.main(["tiny", "failing", "--json", str(target), "--", "5"]) == 3
    assert "x 2.0" in capfd.readouterr().out
    before, record = map(json.loads, target.read_text().splitlines())
    assert before["group"] == "before"
    assert (record["group"], record["benchmark"], record["rounds"]) == ("tiny", "tiny", 5)
    assert {"commit", "date", "processor", "cores", "others"} <= set(record)
    assert 0 <= record["others"] <= record["cores"]
    with pytest.raises(SystemExit, match="2"):
        bench.main(["steps"])
    assert "no such group: steps; there are tiny" in capfd.readouterr().err
