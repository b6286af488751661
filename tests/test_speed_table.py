"""Speed tables of README.md and docs/benchmarks.md."""

import json
from pathlib import Path

import pytest
from speed_table import (
    BENCHMARKS,
    BLOCK,
    CASE,
    GROUPS,
    README,
    benchmark_tables,
    read_records,
    readme_table,
    updated,
)

PLACE = {"commit": "abc1234", "date": "2026-11-22", "processor": "EPYC", "cores": 2, "others": 0.1}
STEP = {"naive": 1.51, "naive_wall": 1.55, "peft": 1.08, "peft_wall": 1.11, "share": 0.77}
STARTUP = {"python -c pass": {"wall": 0.015, "cpu": 0.01}, "tvit --help": {"wall": 0.2, "cpu": 0.1}}
MEMORY = {"tvit_saved": 0.42, "tvit_rss": 0.37, "tvit_whole": 0.5}
INFER = {"seconds": 3.43, "floor_seconds": 3.04, "ratio": 1.13, "megabytes": 725.0}


@pytest.fixture(scope="module")
def bench(load_bench):
    return load_bench("__main__")


def write(path, *records):
    path.write_text("".join(json.dumps({**PLACE, **record}) + "\n" for record in records))
    return path


@pytest.mark.parametrize(("page", "make"), [(README, readme_table), (BENCHMARKS, benchmark_tables)])
def test_pages_have_the_tables_of_the_stored_results(page, make):
    text = page.read_text(encoding="utf-8")
    assert BLOCK.search(text)
    assert updated(text, make(read_records())) == text, "run: python tests/speed_table.py"


def test_without_results_there_is_no_table(tmp_path):
    assert read_records(tmp_path / "none.jsonl") == {}
    text = "before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n"
    assert updated(text, readme_table({})) == "before\n<!-- speed -->\n<!-- /speed -->\nafter\n"
    assert updated(text, benchmark_tables({})) == "before\n<!-- speed -->\n<!-- /speed -->\nafter\n"


def test_tables_show_the_newest_record_and_its_source(tmp_path):
    old = {"group": "step", "results": {"vitb2_t8, dropout 0.1": {**STEP, "naive": 9.0}}}
    new = {"group": "step", "torch": "2.13", "results": {"vitb2_t8, dropout 0.1": STEP}}
    made = benchmark_tables(read_records(write(tmp_path / "r.jsonl", old, new)))
    assert "| ViT-B, 2 layers | 8 | 0.1 | 1.51 (1.55) | 1.08 (1.11) |  |  | 0.77 |" in made
    assert "9.00" not in made
    source = "`step`: commit abc1234, 2026-11-22, 2 cores of EPYC, torch 2.13"
    assert f"{source}, other processes used up to 0.1 cores." in made


def test_whole_models_take_the_place_of_slices(tmp_path):
    rows = {"vitb2_t8, dropout 0.1": STEP, "vits12_t18, dropout 0": STEP}
    made = benchmark_tables(read_records(write(tmp_path / "r.jsonl", {"group": "step", "results": rows})))
    assert "| ViT-S, 12 layers | 18 | 0 |" in made and "2 layers" not in made.replace("12 layers", "")


def test_readme_has_five_figures_of_one_model_and_setting(tmp_path):
    step, memory = {"group": "step", "results": {CASE: STEP}}, {"group": "memory", "results": {CASE: MEMORY}}
    made = readme_table(read_records(write(tmp_path / "r.jsonl", step, memory, {"group": "infer", **INFER})))
    figures = [line.split(" | ")[-1].rstrip(" |") for line in made.splitlines()[2:]]
    assert figures == ["1.55 × faster", "1.11 × faster", "0.37 ×", "77%", "3.4 s, 3.0 s"]
    assert readme_table(read_records(write(tmp_path / "s.jsonl", step, memory))) == ""


def test_every_group_of_the_tables_is_a_benchmark(bench):
    assert set(GROUPS) <= set(bench.GROUPS)
    for _, (program, *_) in bench.GROUPS.values():
        assert (Path(__file__).parent / "bench" / program).is_file()


def test_results_are_appended_with_commit_date_and_machine(bench, tmp_path, monkeypatch, capfd):
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
