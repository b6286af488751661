"""The learning benchmark: its plan, selection and intervals."""

import pytest


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


def test_the_interval_is_over_people_and_holds_the_mean(learning):
    people = {name: [1.0] * 9 + [0.0] for name in "abcdefghi"}
    assert learning.interval(people) == (0.9, 0.9)  # all alike: nothing hangs on who is drawn
    people["a"] = [0.0] * 10
    low, high = learning.interval(people)
    assert low < 0.8 < high <= 0.9


def test_a_line_that_was_cut_is_not_read(learning, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"key": "a"}\n{"key": "b"')
    assert list(learning.read_rows(path)) == ["a"]
