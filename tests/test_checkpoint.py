"""A checkpoint is complete or absent, holds no pickle, and says what is wrong with it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tvit_cli.engine import checkpoint as module
from tvit_cli.engine.checkpoint import (
    State,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_optimizer,
    optimizer_tensors,
    prune_checkpoints,
    save_checkpoint,
)
from tvit_cli.errors import CheckpointError, RunError

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}


def save(folder: Path, step: int, **changes: Any) -> Path:
    state = State(
        step=step, tally=(0.1, 2.0, 3.0), best={"val_loss": 1 / 3}, best_step=2, identity={"seed": 0}
    )
    facts: dict[str, Any] = {"trainable": TENSORS, "optimizer": {}, "best": None, **changes}
    return save_checkpoint(folder, state=state, **facts)


def test_what_is_saved_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    read = load_checkpoint(save(tmp_path, 7, best=TENSORS))
    assert read.state == State(
        step=7, tally=(0.1, 2.0, 3.0), best={"val_loss": 1 / 3}, best_step=2, identity={"seed": 0}
    )
    for tensors in (read.trainable, read.best):
        assert tensors is not None
        assert all(torch.equal(tensors[k], v) and tensors[k].dtype == v.dtype for k, v in TENSORS.items())


def test_the_average_is_saved_where_there_is_one_and_costs_nothing_where_there_is_none(
    tmp_path: Path,
) -> None:
    without, with_it = save(tmp_path, 1), save(tmp_path, 2, ema=TENSORS)
    assert {p.name for p in with_it.iterdir()} - {p.name for p in without.iterdir()} == {"ema.safetensors"}
    assert load_checkpoint(without).ema is None
    read = load_checkpoint(with_it).ema
    assert read is not None and all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    for file in save(tmp_path, 1).iterdir():
        with pytest.raises((pickle.UnpicklingError, ValueError, KeyError, EOFError, IndexError)):
            pickle.loads(file.read_bytes())


def test_the_optimizers_state_goes_by_parameter_name(tmp_path: Path) -> None:
    def trained(steps: int) -> tuple[nn.Module, torch.optim.AdamW]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(steps):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        return model, optimizer

    model, optimizer = trained(3)
    path = save(
        tmp_path, 3, optimizer=optimizer_tensors(optimizer, model), trainable=dict(model.named_parameters())
    )
    again, fresh = trained(0)
    read = load_checkpoint(path)
    again.load_state_dict(read.trainable)
    load_optimizer(fresh, again, read.optimizer)
    for each, opt in ((model, optimizer), (again, fresh)):
        opt.zero_grad()
        each(torch.ones(1, 3)).sum().backward()
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_only_the_latest_are_kept_and_left_overs_are_swept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 9):
        save(tmp_path, step)
    (tmp_path / ".step-000011.writing").mkdir()
    (tmp_path / ".step-000000.removing").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    prune_checkpoints(tmp_path, keep=2, newest=10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "step-000009", "step-000010"]


def test_checkpoints_of_a_course_that_was_left_go_before_any_other(tmp_path: Path) -> None:
    for step in (1, 2, 3, 8, 9):
        save(tmp_path, step)
    prune_checkpoints(tmp_path, keep=2, newest=3)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000002", "step-000003"]


def test_latest_is_the_last_step_and_half_written_ones_are_not_seen(tmp_path: Path) -> None:
    for step in (2, 10):
        save(tmp_path, step)
    (tmp_path / ".step-000011.writing").mkdir()
    assert find_checkpoint(tmp_path, "latest").name == "step-000010"
    assert find_checkpoint(tmp_path, "step-000002").name == "step-000002"
    assert find_checkpoint(Path("elsewhere"), str(tmp_path / "step-000002")).name == "step-000002"


def test_a_name_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    save(tmp_path, 2)
    with pytest.raises(CheckpointError, match="step-000002"):
        find_checkpoint(tmp_path, "step-000003")
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        find_checkpoint(tmp_path / "none", "latest")


def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    real_write = module._write

    def full(path: Path, data: bytes) -> None:
        if path.name == "optimizer.safetensors":
            raise OSError(28, "No space left on device")
        real_write(path, data)

    monkeypatch.setattr(module, "_write", full)
    with pytest.raises(RunError, match=r"the disk is full\. step-000001 is still whole"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert load_checkpoint(tmp_path / "step-000001").state.step == 1


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 1, trainable={"c": torch.ones(1)})
    prune_checkpoints(tmp_path, keep=3, newest=1)
    assert set(load_checkpoint(path).trainable) == {"c"}
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: flip_a_bit(p / "trainable.safetensors"), "another sha256"),
        (lambda p: (p / "trainable.safetensors").write_bytes(b""), "0 bytes"),
        (lambda p: (p / "optimizer.safetensors").unlink(), "missing"),
        (lambda p: (p / "state.json").write_text("{"), "damaged"),
        (lambda p: (p / "state.json").write_text(json.dumps({"step": 1})), "damaged"),
        (lambda p: (p / "state.json").unlink(), "no checkpoint"),
    ],
)
def test_a_damaged_checkpoint_names_the_file(tmp_path: Path, damage: Any, words: str) -> None:
    path = save(tmp_path, 1)
    damage(path)
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(path)


def test_list_of_a_folder_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "nowhere") == []
