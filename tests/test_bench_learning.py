"""The learning benchmark's plan and statistics: nothing is selected on the people it is scored on."""

from typing import Any

import pytest

from tvit_cli.report.drawing import LABEL_SIZE, text_width


@pytest.fixture(scope="module")
def learning(load_bench):
    return load_bench("learning")


def test_steps_are_timed_in_turn_and_the_first_round_warms_up(load_bench):
    ran = []
    times = load_bench("step").in_turn({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, 2)
    assert ran == ["a", "b"] * 3 and {key: len(took) for key, took in times.items()} == {"a": 2, "b": 2}


def row(job: Any, top1: float, loss: float = 1.0) -> dict[str, Any]:
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


def test_a_method_is_one_point_over_the_folds_that_all_methods_have(learning):
    def scored(method, fold, right, gigaflops):
        facts = {"part": "test", "method": method, "fold": fold, "flops": gigaflops * 1e9, "cpu_minutes": 2.0}
        facts["recipe"] = learning.RECIPE
        return {**facts, "right": {f"p_{n}": answer for n, answer in enumerate(right)}}

    rows = [scored("joint", 1, [1, 1, 0, 0], 18), scored("joint", 2, [1, 1, 1, 1], 18)]
    rows.append(scored("space", 1, [1, 0, 0, 0], 15))

    def found(rows):
        kept = learning.on_common_folds(rows)
        marks = learning.points(kept, lambda group: learning.mean(group, "flops") / 1e9)
        return [(point.name, point.x, point.y) for point in marks]

    assert found(rows) == [("joint", 18.0, 0.5), ("space", 15.0, 0.25)]
    assert found(rows[:2]) == [("joint", 18.0, 0.75)]
    assert found(rows[1:]) == found([]) == []
    before = {**rows[0], "recipe": "base", "right": {"p_0": 1}}
    assert found([rows[0], before]) == [("joint", 18.0, 0.5), ("joint, base", 18.0, 1.0)]


def test_scatter_plot_labels_each_method_without_overlap(learning):
    rows = {}
    for number, method in enumerate(learning.METHODS):  # all as good, and nearly as costly
        facts = {
            "part": "test",
            "method": method,
            "recipe": learning.recipe_of(method),
            "seed": 0,
            "fold": 1,
            "flops": 1e9 * (20 + number / 50),
            "cpu_minutes": 9 + number / 50,
        }
        rows[method] = {**facts, "right": {"p_bend": 1, "p_run": 0}}
    drawing = learning.picture(rows)
    dots = [shape for shape in drawing.shapes if hasattr(shape, "radius")]
    assert len(dots) == 2 * len(learning.METHODS)  # operations, and seconds
    labels = [shape for shape in drawing.shapes if getattr(shape, "text", None) in learning.METHODS]
    assert len(labels) == 2 * len(learning.METHODS)
    boxes = []
    for label in labels:
        width = text_width(label.text, label.size)
        left = label.at[0] - (width if label.anchor == "end" else 0)
        boxes.append((left, left + width, label.at[1]))
    for one in boxes:
        for other in boxes:
            beside = one[1] <= other[0] + 0.01 or other[1] <= one[0] + 0.01
            assert one is other or beside or abs(one[2] - other[2]) >= LABEL_SIZE
    assert learning.picture({}) is None
