"""Losses, metrics and scores of short runs equal the committed ones (tests/golden.py regenerates them)."""

import json

import golden
import pytest


@pytest.fixture(scope="module")
def measured():
    return golden.measure()["numbers"]


def differences(before, now, where, tolerance):
    """One line for each value that differs; floats within a relative tolerance, all else exactly."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            line
            for key in sorted({*before, *now})
            for line in differences(before.get(key), now.get(key), f"{where} {key}", tolerance)
        ]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{where} {i}", tolerance)]
    if isinstance(before, float) and isinstance(now, float):
        equal = now == pytest.approx(before, rel=tolerance, abs=1e-6)
    else:
        equal = before == now
    return [] if equal else [f"{where}: {before} -> {now}"]


@pytest.mark.parametrize(
    ("part", "tolerance"), [("train", 1e-4), ("eval", 1e-3), ("predict", 1e-3), ("timeline", 1e-3)]
)
@pytest.mark.parametrize("name", list(golden.RUNS))
def test_short_run_gives_the_golden_values(name, part, tolerance, measured):
    committed = json.loads(golden.COMMITTED.read_text(encoding="utf-8"))
    found = differences(committed[name][part], measured[name][part], part, tolerance)
    assert not found, "\n".join(found)


def test_golden_difference_is_named():
    assert differences({"a": [1.0, 2.0]}, {"a": [1.00001, 2.1]}, "train", 1e-4) == ["train a 1: 2.0 -> 2.1"]
