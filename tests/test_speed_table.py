"""Benchmarks: speed tables, the plan of the learning benchmark, the GPU benchmark on a CPU."""

import json
import subprocess
import sys
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


def test_tables_show_the_newest_record_of_whole_models_with_its_source(tmp_path):
    old = {"group": "step", "results": {"vitb2_t8, dropout 0.1": {**STEP, "naive": 9.0}}}
    new = {"group": "step", "torch": "2.13", "results": {"vitb2_t8, dropout 0.1": STEP}}
    made = benchmark_tables(read_records(write(tmp_path / "r.jsonl", old, new)))
    assert "| ViT-B, 2 layers | 8 | 0.1 | 1.51 (1.55) | 1.08 (1.11) |  |  | 0.77 |" in made
    assert "9.00" not in made
    source = "`step`: commit abc1234, 2026-11-22, 2 cores of EPYC, torch 2.13"
    assert f"{source}, other processes used up to 0.1 cores." in made
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


@pytest.fixture(scope="module")
def learning(load_bench):
    return load_bench("learning")


def test_steps_are_timed_in_turn_and_the_first_round_warms_up(load_bench):
    ran = []
    times = load_bench("step").in_turn({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, 2)
    assert ran == ["a", "b"] * 3 and {key: len(took) for key, took in times.items()} == {"a": 2, "b": 2}


def row(job, top1, loss=1.0):
    facts = {"part": job.part, "method": job.method, "recipe": job.recipe, "seed": job.seed, "fold": job.fold}
    return {**facts, "top1": top1, "loss": loss}


def test_every_person_is_left_out_once_and_selection_never_sees_them(learning):
    plan = list(learning.jobs({}))
    assert len({job.key for job in plan}) == len(plan)
    folds = {job.fold: set(job.test_people) for job in plan if job.part == "test"}
    assert sorted(person for people in folds.values() for person in people) == sorted(
        person for people in learning.FOLDS for person in people
    )
    for job in plan:
        assert not set(job.train_people) & set(job.test_people)
        if job.part == "select":
            assert not (set(job.train_people) | set(job.test_people)) & folds[job.fold]
            assert len(job.train_people) == 4 and len(job.test_people) == 2
        if job.part == "test":
            assert len(job.train_people) == 6


def test_the_most_telling_runs_come_first_and_the_finals_last(learning):
    rows = {}
    assert [job.part for job in learning.jobs(rows)][-1] == "select"
    for job in learning.jobs(rows):
        rows[job.key] = row(job, {"divided": 0.9, "space": 0.8, "joint": 0.7}.get(job.method, 0.1))
    rows = {
        key: {**row, "top1": 0.95} if "select" in key and "/space/base" in key else row
        for key, row in rows.items()
    }
    plan = list(learning.jobs(rows))
    parts = [job.part for job in plan]
    assert parts[0] == "test" and plan[0].fold == 1 and parts[-1] == "test"
    further = {(j.method, j.recipe) for j in plan if j.part == "select" and j.recipe != learning.RECIPE}
    assert further == {("divided", "base"), ("space", "base")}
    finals = plan[max(number for number, part in enumerate(parts) if part == "select") + 1 :]
    seeds = {(job.method, job.recipe): [] for job in finals}
    for job in finals:
        seeds[job.method, job.recipe].append(job.seed)
    assert seeds == {("space", "base"): [0, 0, 0, 1, 1, 1, 2, 2, 2], ("divided", "half"): [1, 1, 1, 2, 2, 2]}
    assert len({job.key for job in plan}) == len(plan)


def test_a_recipe_is_selected_by_accuracy_over_all_folds_then_by_loss(learning):
    rows = {j.key: row(j, 0.5) for j in learning.jobs({}) if j.part == "select"}
    more = [j for j in learning.jobs(rows) if j.part == "select" and j.key not in rows]
    first = more[0].method
    for job in more:
        rows[job.key] = row(job, 0.5, loss=0.9 if (job.method, job.recipe) == (first, "base") else 1.1)
    assert learning.selected(rows, range(1, 4))[0] == (first, "base")
    del rows[next(key for key in rows if f"/{first}/base/" in key)]  # no longer tried on all folds
    assert learning.selected(rows, range(1, 4))[0][1] == "half"


def test_the_interval_is_over_people_and_cut_lines_are_not_read(learning, tmp_path):
    people = {name: [1.0] * 9 + [0.0] for name in "abcdefghi"}
    assert learning.interval(people) == (0.9, 0.9)  # all alike: nothing hangs on who is drawn
    people["a"] = [0.0] * 10
    low, high = learning.interval(people)
    assert low < 0.8 < high <= 0.9
    path = tmp_path / "rows.jsonl"
    path.write_text('{"key": "a"}\n{"key": "b"')
    assert list(learning.read_rows(path)) == ["a"]


BENCH = Path(__file__).parent / "bench"


def test_check_of_a_gpu_runs_on_a_cpu(tmp_path):
    sections = ["facts", "parity", "pixels", "waits", "fed", "trace"]
    command = [
        sys.executable,
        str(BENCH),
        "gpu-check",
        "--",
        "--device",
        "cpu",
        "--tiny",
        "--only",
        ",".join(sections),
    ]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "lines")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert list(dict.fromkeys(line["section"] for line in lines)) == sections
    checks = [line for line in lines if "check" in line]
    assert len(checks) == 4 * 3 + 3 + 1 and all(line["ok"] for line in checks)
    assert next(line for line in lines if line["section"] == "fed")["clips_per_second"] > 0


def test_section_of_the_check_that_fails_does_not_end_the_others(load_bench, monkeypatch, capsys):
    def fail(check):
        raise ValueError("no kernel")

    gpu = load_bench("gpu")
    monkeypatch.setitem(gpu.SECTIONS, "facts", fail)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--tiny", "--only", "facts,pixels"])
    assert gpu.main() == 1
    said = capsys.readouterr().out
    assert "no kernel" in said and "section pixels" in said and json.loads(said.splitlines()[-1])["bad"]
