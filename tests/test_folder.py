"""Model folders: saved and loaded bit for bit, complete or absent."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import change_weights

from tvit_cli.errors import ModelError, RunError
from tvit_cli.model import folder as folder_module
from tvit_cli.model.folder import find_newest_model, load_card, load_model, save_model
from tvit_cli.portable.vit import ViTConfig, build_model
from tvit_cli.settings.card import CARD_VERSION, BaseWeights, ModelCard, Preprocessing

CONFIG = ViTConfig(num_classes=3, frame_size=16, patch_size=8, n_frames=4, width=16, depth=2, num_heads=2)
CARD = ModelCard(
    tvit_version="0.1.0", labels=("jump", "run", "walk"), model=CONFIG.to_dict(),
    preprocessing=Preprocessing(n_frames=4, frame_size=16, mean=(0.1, 0.2, 0.3)),
    base=BaseWeights(name="someone/vit", sha256="ab"), weights_sha256="", settings={"lora_rank": 8},
    metrics={"video_top1": 0.1 + 0.2},
)  # fmt: skip


def trained(seed=0):
    return build_model(CONFIG, seed=seed, from_scratch=True)


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model", trained().state_dict(), CARD)
    return tmp_path / "model"


def edit_card(folder, **changes):
    path = folder / "card.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, **changes):
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()} | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def test_a_saved_model_comes_back_bit_for_bit_and_can_be_trained_on(folder):
    model, card = load_model(folder)
    expected = trained().state_dict()
    assert list(model.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    clips = torch.randn(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(clips), trained()(clips))
    assert card == CARD.model_copy(update={"weights_sha256": card.weights_sha256})
    assert card.metrics["video_top1"] == 0.1 + 0.2
    before = torch.get_rng_state()
    load_model(folder)
    assert torch.equal(torch.get_rng_state(), before)
    model, _ = load_model(folder)
    assert not model.training
    model(torch.zeros(1, 4, 3, 16, 16)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    again, _ = load_model(folder)  # the file is mapped, never written
    assert not torch.equal(again.classifier.bias, model.classifier.bias)


def test_a_saved_folder_has_two_files_readable_alike_with_their_hash(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["card.json", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert (folder / "model.safetensors").stat().st_mode == (folder / "card.json").stat().st_mode
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert load_card(folder).weights_sha256 == digest


def test_transposed_and_frozen_tensors_are_saved_as_they_read(tmp_path):
    weights = dict(trained().named_parameters())
    state = {name: w.t().contiguous().t() if w.dim() == 2 else w for name, w in weights.items()}
    save_model(tmp_path / "model", state, CARD)
    found = load_model(tmp_path / "model")[0].state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())


def test_saving_replaces_an_older_model_alone_and_makes_parents(folder, tmp_path):
    (folder / "notes").mkdir()
    (folder / "notes" / "thesis.txt").write_text("mine")
    save_model(folder, trained(seed=1).state_dict(), CARD)
    model, _ = load_model(folder)
    assert torch.equal(model.classifier.weight, trained(seed=1).classifier.weight)
    assert sorted(path.name for path in folder.iterdir()) == ["card.json", "model.safetensors", "notes"]
    assert (folder / "notes" / "thesis.txt").read_text() == "mine"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "a" / "b" / "model", tmp_path / "empty"):
        save_model(path, trained().state_dict(), CARD)
        load_model(path)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_model_folder_is_never_replaced(tmp_path, kind):
    path = tmp_path / "thesis"
    if kind == "folder":
        path.mkdir()
        (path / "chapter.txt").write_text("years of work")
    else:
        path.write_text("years of work")
    with pytest.raises(ModelError, match="exists and is no model folder"):
        save_model(path, trained().state_dict(), CARD)
    assert (path / "chapter.txt" if kind == "folder" else path).read_text() == "years of work"


@pytest.mark.parametrize("moment", ["weights", "card", "rename"])
def test_a_full_disk_leaves_the_older_model_whole_and_nothing_beside_it(folder, monkeypatch, moment):
    full = OSError(errno.ENOSPC, "No space left on device")

    def save_half(tensors, path, **options):
        path.write_bytes(b"half")
        raise full

    def fail(self, *arguments, **options):
        raise full

    rename = Path.rename

    def rename_all_but_the_new(self, target):
        return fail(self) if self.name == "new" else rename(self, target)  # type: ignore[return-value]

    if moment == "weights":
        monkeypatch.setattr(folder_module, "save_file", save_half)
    elif moment == "card":
        monkeypatch.setattr(Path, "write_text", fail)
    else:
        monkeypatch.setattr(Path, "rename", rename_all_but_the_new)
    with pytest.raises(RunError, match=r"model: the model cannot be written \(.*No space left"):
        save_model(folder, trained(seed=1).state_dict(), CARD)
    monkeypatch.undo()
    model, _ = load_model(folder)
    assert torch.equal(model.classifier.weight, trained().classifier.weight)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def truncate(keep):
    def cut(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])

    return cut


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: folder.rename(folder.with_name("away")), "model: no such model folder"),
        *(
            (
                lambda folder, name=name: (folder / name).unlink(),
                rf"{name}: this file .* is missing\. Copy .* or train",
            )
            for name in ("card.json", "model.safetensors")
        ),
        (
            lambda folder: edit_card(folder, card_version=CARD_VERSION + 1, tvit_version="9.0", new_key=1),
            r"written by tvit 9\.0; this tvit reads up to .* --upgrade tvit",
        ),
        *(
            (write("card.json", content), r"card\.json: ")
            for content in (b"{", b"\xff\xfe\x00", b"[]", b'"card"', b"[" * 20_000)
        ),
        *(
            (truncate(keep), r"model\.safetensors: cannot be read .* truncated; copy or fetch it again")
            for keep in (0, 5, 100, -1)
        ),
    ],
)
def test_missing_or_damaged_model_folders_are_refused(folder, spoil, sentence):
    with pytest.raises(ModelError, match="no model folder, nor a finished run: card"):
        load_model(folder.parent)
    spoil(folder)
    with pytest.raises(ModelError, match=sentence):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"labels": ["jump", "run"]}, "2 labels for a classifier of 3 classes"),
        ({"labels": ["jump", "run", "run"]}, "duplicate labels"),
        ({"metrics": "good"}, "metrics: "),
        ({"card_version": "2"}, "card_version: .* valid integer"),
        (
            {"preprocessing": {"n_frames": 2, "frame_size": 32, "std": [0.2, 0, 0.2]}},
            "std.1: .* greater than 0",
        ),
        (
            {"preprocessing": {"n_frames": 2, "frame_size": 32, "mean": [0, float("nan"), 0]}},
            "mean.1: .* finite",
        ),
        ({"colour": "blue"}, "colour: Extra inputs are not permitted"),
        ({"model": {**CONFIG.to_dict(), "depth": 0}}, "model: depth is 0; it must be a whole number"),
        ({"model": {**CONFIG.to_dict(), "deepth": 2}}, "model: unknown keys 'deepth'"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(folder, changes, sentence):
    edit_card(folder, **changes)
    with pytest.raises(ModelError, match=f"card.json: .*{sentence}"):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"norm.weight": None}, "norm.weight is missing"),
        ({"extra": torch.zeros(1)}, "extra is unexpected"),
        ({"norm.weight": torch.zeros(15)}, r"norm.weight has the shape \(15,\), not \(16,\)"),
        ({f"extra{i}": torch.zeros(1) for i in range(6)}, " and 2 more. The weights do not belong to"),
    ],
)
def test_weights_that_do_not_fit_the_card_are_named(folder, changes, sentence):
    edit_weights(folder, **changes)
    with pytest.raises(ModelError, match=f"model.safetensors: .*{sentence}"):
        load_model(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_with_their_name(folder, value):
    spoilt = torch.ones(16)
    spoilt[3] = value
    edit_weights(folder, **{"norm.weight": spoilt})
    with pytest.raises(ModelError, match=r"model\.safetensors: norm\.weight holds NaN or infinite numbers"):
        load_model(folder)
    change_weights(folder, **{"norm.weight": torch.full((16,), torch.finfo(torch.float32).max)})
    load_model(folder)  # finite, though their sum is not


def test_an_export_for_other_programs_is_called_what_it_is(folder):
    said = r"model: an export of a tvit model for other programs.*Name its model folder"
    (folder / "config.json").write_text("{}")
    load_model(folder)  # what else lies there does not make it one
    weights = load_file(folder / "model.safetensors")
    save_file({f"network.{name}": tensor for name, tensor in weights.items()}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=said):
        load_model(folder)
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()
    (folder / "parity.json").write_text("{}")
    with pytest.raises(ModelError, match=said):
        load_model(folder)


def test_one_flipped_bit_in_the_weights_is_refused(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-4] ^= 1  # the lowest bit of the last number
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match=r"its hash is not the one in card\.json"):
        load_model(folder)


CLIPS = {"n_frames": 4, "frame_size": 16}


@pytest.mark.parametrize(
    ("network", "preprocessing", "sentence"),
    [
        ({"depth": 20_000}, {}, "model: 20000 blocks for .* tensors"),
        ({"attention": "factorized", "temporal_depth": 20_000}, {}, "model: 20002 blocks for"),
        ({"width": 2 * 10**12}, {}, "model: its sizes are too large"),
        ({"n_frames": 10**30}, {}, "model: its sizes are too large"),
        ({"n_frames": 10**5}, {"n_frames": 10**5}, "a clip of 100000 frames .* at most"),
        ({"frame_size": 8192}, {"frame_size": 8192}, "frames of 8192 x 8192 pixels .* at most"),
        ({}, {"scale_to": 10**6}, "frames of 1000000 x 1000000 pixels .* at most"),
        ({"n_frames": 10**5}, {}, r"temporal\.embedding has the shape \(1, 4, 1, 16\), not \(1, 100000"),
        ({}, {"frame_size": 20}, "patch_size 8 does not divide frame_size 20 of the preprocessing"),
        ({"tubelet_size": 2}, {"n_frames": 3}, "tubelet_size 2 does not divide n_frames 3"),
        ({"num_channels": 4}, {}, "num_channels is 4; frames of a video have 3"),
    ],
)
def test_hostile_sizes_are_refused_before_a_network_is_built(
    folder, network, preprocessing, sentence, monkeypatch
):
    edit_card(folder, model={**CONFIG.to_dict(), **network}, preprocessing={**CLIPS, **preprocessing})
    made = []
    build = folder_module.TemporalViT
    monkeypatch.setattr(folder_module, "TemporalViT", lambda *a, **k: made.append(build(*a, **k)) or made[0])
    with pytest.raises(ModelError, match=sentence):
        load_model(folder)
    assert all(parameter.is_meta for model in made for parameter in model.parameters())


def test_integer_weights_are_refused_by_name(folder):
    change_weights(folder, **{"norm.bias": torch.ones(16, dtype=torch.int32)})
    with pytest.raises(ModelError, match=r"norm\.bias is torch\.int32, not torch\.float32"):
        load_model(folder)


def test_the_newest_model_is_found_or_how_to_get_one_is_said(tmp_path):
    (tmp_path / "ucf101-1" / "model").mkdir(parents=True)  # without a card: no model
    with pytest.raises(ModelError, match=r"no trained model in it\. Train one .* --model"):
        find_newest_model(tmp_path)
    with pytest.raises(ModelError, match="no trained model"):
        find_newest_model(tmp_path / "nowhere")
    folders = [tmp_path / name / "model" for name in ("ucf101-1", "ucf101-2", "sweep/ucf101-3")]
    for path in folders:
        save_model(path, trained().state_dict(), CARD)
    for newest in folders:
        for path in folders:
            os.utime(path / "card.json", (1_000, 2_000 if path == newest else 1_000))
        assert find_newest_model(tmp_path) == newest


def test_leftovers_of_a_kill_are_removed_and_the_old_model_restored(folder, monkeypatch):
    def full(*arguments, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    half = folder.parent / ".model.writing"
    (half / "new").mkdir(parents=True)
    (half / "new" / "model.safetensors").write_bytes(b"half")
    folder.rename(half / "old")  # killed after it was moved aside, before the new one took its place
    monkeypatch.setattr(folder_module, "save_file", full)
    with pytest.raises(RunError):
        save_model(folder, trained().state_dict(), CARD)
    assert load_card(folder).labels == CARD.labels
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
