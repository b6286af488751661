"""Checkpoints: complete or absent, without pickles, with clear errors."""

import hashlib
import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SCRATCH, run, settings
from torch import nn

from tvit_cli.engine.train import checkpoint as module
from tvit_cli.engine.train.checkpoint import (
    State,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_optimizer,
    optimizer_tensors,
    prune_checkpoints,
    save_checkpoint,
)
from tvit_cli.engine.train.memory import reuse_batch_settings
from tvit_cli.errors import CheckpointError, RunError
from tvit_cli.model.lora import LoraSpec, set_trainable, trainable_tensors
from tvit_cli.portable.vit import TemporalViT, ViTConfig

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}


def save(folder, step, **changes):
    state = State(
        step=step, tally=(0.1, 2.0, 3.0), best={"val_loss": 1 / 3}, best_step=2, identity={"seed": 0}
    )
    facts = {"trainable": TENSORS, "optimizer": {}, "best": None, **changes}
    return save_checkpoint(folder, state=state, **facts)


def test_what_is_saved_is_read_back_bit_for_bit(tmp_path):
    read = load_checkpoint(save(tmp_path, 7, best=TENSORS))
    assert read.state == State(
        step=7, tally=(0.1, 2.0, 3.0), best={"val_loss": 1 / 3}, best_step=2, identity={"seed": 0}
    )
    for tensors in (read.trainable, read.best):
        assert tensors is not None
        assert all(torch.equal(tensors[k], v) and tensors[k].dtype == v.dtype for k, v in TENSORS.items())


def test_checkpoint_holds_the_ema_only_where_there_is_one(tmp_path):
    without, with_it = save(tmp_path, 1), save(tmp_path, 2, ema=TENSORS)
    assert {p.name for p in with_it.iterdir()} - {p.name for p in without.iterdir()} == {"ema.safetensors"}
    assert load_checkpoint(without).ema is None
    read = load_checkpoint(with_it).ema
    assert read is not None and all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path):
    for file in save(tmp_path, 1).iterdir():
        with pytest.raises((pickle.UnpicklingError, ValueError, KeyError, EOFError, IndexError)):
            pickle.loads(file.read_bytes())


def test_the_optimizers_state_goes_by_parameter_name(tmp_path):
    def trained(steps):
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


def test_only_the_latest_are_kept_and_left_overs_are_swept(tmp_path):
    for step in (1, 2, 10, 9):
        save(tmp_path, step)
    (tmp_path / ".step-000011.writing").mkdir()
    (tmp_path / ".step-000000.removing").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    prune_checkpoints(tmp_path, keep=2, newest=10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "step-000009", "step-000010"]


def test_checkpoints_of_a_course_that_was_left_go_before_any_other(tmp_path):
    for step in (1, 2, 3, 8, 9):
        save(tmp_path, step)
    prune_checkpoints(tmp_path, keep=2, newest=3)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000002", "step-000003"]


def test_latest_is_the_last_step_and_half_written_ones_are_not_seen(tmp_path):
    for step in (2, 10):
        save(tmp_path, step)
    (tmp_path / ".step-000011.writing").mkdir()
    assert find_checkpoint(tmp_path, "latest").name == "step-000010"
    assert find_checkpoint(tmp_path, "step-000002").name == "step-000002"
    assert find_checkpoint(Path("elsewhere"), str(tmp_path / "step-000002")).name == "step-000002"


def test_checkpoints_are_found_by_name_or_as_latest_or_listed(tmp_path):
    save(tmp_path, 2)
    with pytest.raises(CheckpointError, match="step-000002"):
        find_checkpoint(tmp_path, "step-000003")
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        find_checkpoint(tmp_path / "none", "latest")
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    save(tmp_path, 1)
    real_write = module._write

    def full(path, data):
        if path.name == "optimizer.safetensors":
            raise OSError(28, "No space left on device")
        real_write(path, data)

    monkeypatch.setattr(module, "_write", full)
    with pytest.raises(RunError, match=r"the disk is full\. step-000001 is still whole"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert load_checkpoint(tmp_path / "step-000001").state.step == 1


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1)
    path = save(tmp_path, 1, trainable={"c": torch.ones(1)})
    prune_checkpoints(tmp_path, keep=3, newest=1)
    assert set(load_checkpoint(path).trainable) == {"c"}
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: flip_a_bit(p / "trainable.safetensors", -1), "another sha256"),
        (lambda p: (p / "optimizer.safetensors").unlink(), "missing"),
        (lambda p: (p / "state.json").write_text("{"), "damaged"),
        (lambda p: (p / "state.json").write_text(json.dumps({"step": 1})), "damaged"),
        (lambda p: (p / "state.json").write_text("[" * 100_000), "damaged"),
        (lambda p: (p / "state.json").unlink(), "no checkpoint"),
    ],
)
def test_a_damaged_checkpoint_names_the_file(tmp_path, damage, words):
    path = save(tmp_path, 1)
    damage(path)
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(path)


def flip_a_bit(path, place, bit=0):
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def test_any_bit_that_flips_in_any_file_is_found_or_means_nothing(tmp_path):
    path = save(tmp_path, 1, best=TENSORS)
    whole = load_checkpoint(path)
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        found = 0
        places = range(0, len(content), 5)
        for place in places:
            flip_a_bit(file, place, place % 8)
            try:
                assert load_checkpoint(path).state == whole.state and file.name == "state.json"
            except CheckpointError as error:
                found += 1
                assert file.name in str(error)
            file.write_bytes(content)
        assert found > 0.7 * len(places)  # spaces and line ends of state.json mean nothing


@pytest.mark.parametrize(
    "name", ["state.json", "trainable.safetensors", "optimizer.safetensors", "best.safetensors"]
)
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_truncated_or_empty_file_is_named(tmp_path, name, share):
    path = save(tmp_path, 1, best=TENSORS)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=rf"{name}: damaged"):
        load_checkpoint(path)


class Hostile:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("hash_is_right", [False, True])
@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.safetensors", "best.safetensors"])
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_malicious_pickle_is_refused_and_never_executed(tmp_path, name, form, hash_is_right):
    path, canary = save(tmp_path, 1, best=TENSORS), tmp_path / "executed"
    hostile = pickle.dumps(Hostile(canary))
    if form == "torch":
        buffer = io.BytesIO()
        torch.save(Hostile(canary), buffer)
        hostile = buffer.getvalue()
    else:
        pickle.loads(hostile)
        assert canary.exists()  # it would
        canary.unlink()
    (path / name).write_bytes(hostile)
    if hash_is_right:
        forge(path, name)
    with pytest.raises(CheckpointError, match=f"{name}: damaged"):
        load_checkpoint(path)
    assert not canary.exists()


def forge(path, name):
    """Make the hashes of a checkpoint those of its files."""
    state = json.loads((path / "state.json").read_text())
    del state["sha256"]["state.json"]
    state["sha256"][name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    state["sha256"]["state.json"] = module._digest(state)
    (path / "state.json").write_text(json.dumps(state))


def test_a_forged_list_of_files_reads_no_other_file(tmp_path):
    path = save(tmp_path, 1)
    state = json.loads((path / "state.json").read_text())
    state["sha256"] = {"../../secret": "0" * 64}
    state["sha256"]["state.json"] = module._digest(state)
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"trainable\.safetensors: damaged"):
        load_checkpoint(path)


def forge_state(path, **changes):
    """Other values in state.json, with its hash; a dictionary is merged."""
    state = json.loads((path / "state.json").read_text())
    for name, value in changes.items():
        merges = isinstance(value, dict) and isinstance(state.get(name), dict)
        state[name] = {**state[name], **value} if merges else value
    del state["sha256"]["state.json"]
    state["sha256"]["state.json"] = module._digest(state)
    (path / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    "forged",
    [
        {"step": -1}, {"step": "3"}, {"step": True}, {"step": 3.0}, {"step": None}, {"step": 10**9},
        {"micro_batch": -4}, {"micro_batch": "4"}, {"micro_batch": 10**9},
        {"tally": [1.0]}, {"tally": ["a", "b", "c"]}, {"tally": 3}, {"tally": None},
        {"best_step": -1}, {"best_step": 10**9}, {"best_step": "x"},
        {"best": []}, {"best": {"val_loss": "low"}}, {"best": {"val_video_top1": None}},
        {"identity": []}, {"identity": None}, {"scaler": 1}, {"scaler": {"scale": []}}, {"extra": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_forged_state_is_an_error_that_names_the_file(forged, stopped):
    facts, checkpoint = stopped
    whole = (checkpoint / "state.json").read_bytes()
    forge_state(checkpoint, **forged)
    with pytest.raises(CheckpointError, match=r"state\.json: damaged \((state: )?" + next(iter(forged))):
        run(**facts)
    (checkpoint / "state.json").write_bytes(whole)


def test_a_best_epoch_without_its_metrics_is_an_error(stopped):
    facts, checkpoint = stopped
    whole = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**whole, "best": {"val_loss": 1.0}}))
    forge_state(checkpoint)
    with pytest.raises(CheckpointError, match=r"state\.json: damaged \(best"):
        run(**facts)
    (checkpoint / "state.json").write_text(json.dumps(whole))


@pytest.mark.parametrize("size", ["four", None, 0])
def test_a_forged_automatic_batch_size_is_an_error(size, tmp_path):
    before = {"per_gpu_batch_size": size, "mixed_precision": "no"}
    with pytest.raises(CheckpointError, match=f"per_gpu_batch_size {size!r}"):
        reuse_batch_settings(settings(per_gpu_batch_size="auto"), before, 1)


@pytest.fixture(scope="module")
def stopped(clips, tmp_path_factory):
    """Settings that resume from the first of two checkpoints, and its folder."""
    facts = {"path_to_data": str(clips), **SCRATCH, "working_directory": tmp_path_factory.mktemp("runs")}
    checkpoint = run(**facts).run / "checkpoints" / "step-000003"
    return {**facts, "resume_from_checkpoint": str(checkpoint)}, checkpoint


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("exp_avg/weight", torch.ones(3)),
        ("exp_avg/other", torch.ones(2)),
        ("step", torch.ones(())),
        ("step/weight", torch.ones(2, 2)),
        ("step/weight", -torch.ones(())),
        ("exp_avg/weight", torch.full((2, 2), torch.nan)),
        ("exp_avg_sq/weight", -torch.ones(2, 2)),
        ("exp_avg_sq/weight", torch.ones(2, 2, dtype=torch.int32)),
        ("momentum/weight", torch.ones(2, 2)),
        ("exp_avg_sq/weight", None),
    ],
)
def test_a_forged_optimizer_state_is_an_error_that_names_it(key, value):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    tensors = {**optimizer_tensors(optimizer, model), key: value}
    load_optimizer(optimizer, model, optimizer_tensors(optimizer, model))
    said = rf"optimizer.safetensors: damaged \({key.split('/')[-1]}|{key}"
    with pytest.raises(CheckpointError, match=said):
        load_optimizer(optimizer, model, {k: v for k, v in tensors.items() if v is not None})


def test_checkpoint_of_other_base_model_classes_or_world_size_is_refused(clips, pretrained, tmp_path):
    data, base = clips, tmp_path / "base"
    shutil.copytree(pretrained, base)
    facts = {"path_to_data": str(data), "hf_model_name": str(base), "epochs": 2}
    facts["working_directory"] = tmp_path / "runs"
    checkpoint = run(**facts).run / "checkpoints" / "step-000003"
    facts["resume_from_checkpoint"] = str(checkpoint)

    weights = (base / "model.safetensors").read_bytes()
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, "layernorm.bias": tensors["layernorm.bias"] + 1}, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"\n  base weights: \w+… -> \w+…\n"):
        run(**facts)
    (base / "model.safetensors").write_bytes(weights)

    more = tmp_path / "more"
    shutil.copytree(data, more)
    shutil.copytree(more / "Red", more / "Yellow")
    with pytest.raises(CheckpointError, match=r"classes: Blue,Green,Red -> Blue,Green,Red,Yellow"):
        run(**facts | {"path_to_data": str(more)})


def test_a_checkpoint_of_vit_b_with_rank_8_takes_less_than_12_mb(tmp_path):
    vit_b = ViTConfig(num_classes=101, n_frames=8, width=768, depth=12, num_heads=12)
    model = TemporalViT(vit_b, initialise=False)
    set_trainable(model, "lora", LoraSpec(8, 8, 0.1, False, "none", ("q", "k", "v"), ()), seed=0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.randn(parameter.shape)
    optimizer.step()
    trainable = trainable_tensors(model)
    moments = optimizer_tensors(optimizer, model)
    assert sum("lora" in name for name in trainable) == 12 * 3 * 2
    assert len(moments) == 3 * len(trainable)
    path = save(tmp_path, 1, trainable=trainable, optimizer=moments, best=trainable)
    assert 8e6 < sum(file.stat().st_size for file in path.iterdir()) < 12e6
