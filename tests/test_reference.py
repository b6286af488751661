"""Trained models as they are and as a start: files of the reference, folders of tvit."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pages import Page
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import COLOURS, make_clips, make_pretrained, run

import tvit_cli
from tvit_cli import load_model
from tvit_cli.data.augment import eval_transform
from tvit_cli.data.video import read_clip
from tvit_cli.engine.evaluate import evaluate
from tvit_cli.engine.export import export
from tvit_cli.engine.predict import predict
from tvit_cli.engine.train.build import build
from tvit_cli.engine.trained import open_trained
from tvit_cli.errors import CheckpointError, DataError, ModelError, SettingsError
from tvit_cli.files import sha256
from tvit_cli.model.folder import load_card, save_model
from tvit_cli.model.pretrained import load_pretrained, read_config, resolve_weights
from tvit_cli.model.reference import UCF101
from tvit_cli.portable.reading import segment_indices
from tvit_cli.portable.vit import TemporalViT, ViTConfig, build_model
from tvit_cli.results import Note
from tvit_cli.settings.card import ModelCard, Preprocessing
from tvit_cli.settings.eval import EvalSettings
from tvit_cli.settings.export import ExportSettings
from tvit_cli.settings.predict import PredictSettings
from tvit_cli.settings.train import TrainSettings

WIDTH, SIZE, PATCH, BLOCKS = 24, 32, 16, 2
CONFIG: dict[str, Any] = {  # 4 patches a frame, 3 frames: time and place do not fall into step
    "model_type": "temporal-vit", "architectures": ["TemporalViTHF"], "img_wh": SIZE, "in_channels": 3,
    "patch_size": PATCH, "embd_dim": WIDTH, "patch_embd_bias": True, "n_frames": 3, "num_heads": 2,
    "use_flash_attention": True, "mlp_factor": 2, "num_blocks": BLOCKS, "num_classes": 3, "pooling": "cls",
}  # fmt: skip


def random_tensors(*, classes=3):
    """All tensors of the reference's network by its names, of numbers that make every one of them matter."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    def layer(name, *shape):
        return {f"{name}.weight": random(*shape), f"{name}.bias": random(shape[0])}

    tensors = {"cls_token": random(1, 1, WIDTH), "pos_embed": random(1, 1 + (SIZE // PATCH) ** 2, WIDTH)}
    tensors |= layer("patch_embd.conv", WIDTH, 3, PATCH, PATCH)
    for block in (f"blocks.{n}" for n in range(BLOCKS)):
        for name in ("q", "k", "v", "proj"):
            tensors |= layer(f"{block}.attn.{name}", WIDTH, WIDTH)
        tensors |= layer(f"{block}.mlp.linear1", 2 * WIDTH, WIDTH) | layer(
            f"{block}.mlp.linear2", WIDTH, 2 * WIDTH
        )
        tensors |= layer(f"{block}.norm1", WIDTH) | layer(f"{block}.norm2", WIDTH)
    return tensors | layer("norm", WIDTH) | layer("head", classes, WIDTH)


def plain_forward(tensors, clips, *, n_frames, heads, scale=None):
    """The reference's network from what is known of it, a token and a head at a time, in float64."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    clips = clips.double()

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name, x):
        centred = x - x.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return unit * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def wave(position):
        pairs = [position * math.exp(-2 * k * math.log(1e4)) for k in range(WIDTH // 2)]
        return torch.tensor([f(x) for x in pairs for f in (math.sin, math.cos)], dtype=torch.float64)

    rows = []
    kernel = weights["patch_embd.conv.weight"].flatten(1)
    for clip in clips:
        tokens = [
            kernel @ frame[:, y : y + PATCH, x : x + PATCH].flatten() + weights.get("patch_embd.conv.bias", 0)
            for frame in clip
            for y in range(0, SIZE, PATCH)
            for x in range(0, SIZE, PATCH)
        ]
        tokens.append(weights["cls_token"][0, 0])
        places = (SIZE // PATCH) ** 2
        x = torch.stack([t + wave(i % places) + wave(i % n_frames) for i, t in enumerate(tokens)])
        for block in (f"blocks.{n}" for n in range(BLOCKS)):
            seen = norm(f"{block}.norm1", x)
            q, k, v = (linear(f"{block}.attn.{name}", seen).split(WIDTH // heads, dim=1) for name in "qkv")
            factor = (WIDTH // heads) ** -0.5 if scale is None else scale
            mixed = [(a @ b.T * factor).softmax(1) @ c for a, b, c in zip(q, k, v, strict=True)]
            x = x + linear(f"{block}.attn.proj", torch.cat(mixed, dim=1))
            hidden = linear(f"{block}.mlp.linear1", norm(f"{block}.norm2", x))
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            x = x + linear(f"{block}.mlp.linear2", hidden)
        rows.append(linear("head", norm("norm", x)[-1]))
    return torch.stack(rows)


def write(folder, tensors, config=CONFIG):
    """A folder as transformers leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {f"model.{name}": tensor for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_merged(path, tensors):
    """The file that the reference's training leaves."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "hub" / "temporal-vit", random_tensors())


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp("reference") / "colours", groups=2)


def opened(path):
    return open_trained(path, working_directory=Path("runs"), device=torch.device("cpu"))


def some_clips(n_frames):
    return torch.randn(2, n_frames, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(6))


@torch.no_grad()
def assert_same_logits(trained, expected, clips):
    torch.testing.assert_close(trained.model(clips).double(), expected, atol=1e-5, rtol=0)
    assert (expected[0] - expected[1]).abs().max() > 0.01  # they depend on the clip


def test_a_published_model_gives_the_logits_of_the_reference(folder):
    clips = some_clips(3)
    expected = plain_forward(random_tensors(), clips, n_frames=3, heads=2)
    trained = opened(folder)
    assert_same_logits(trained, expected, clips)
    with torch.no_grad():
        turned = trained.model(clips.flip(1))
    assert (turned - expected).abs().max() > 1e-3  # and on the order of frames


def test_each_quirk_counts(folder):
    """Were one of them left out, the logits would not be the same: the comparison can fail."""
    clips = some_clips(3)
    expected = plain_forward(random_tensors(), clips, n_frames=3, heads=2)
    for name, value in (
        ("temporal.embedding", 0.0),
        ("positions.spatial", 0.0),
        ("positions.class_position", 0.0),
        ("positions.class_token", 0.0),
    ):
        trained = opened(folder)
        with torch.no_grad():
            trained.model.get_parameter(name).mul_(value)
            assert (trained.model(clips) - expected).abs().max() > 1e-3, name
    for changed in ({"n_frames": 4}, {"heads": 4}):
        other = plain_forward(random_tensors(), clips, **{"n_frames": 3, "heads": 2, **changed})
        assert (other - expected).abs().max() > 1e-3, changed


def test_attention_scale_biases_and_half_precision_are_of_the_config(tmp_path):
    clips = some_clips(3)
    folder = write(tmp_path / "slow", random_tensors(), {**CONFIG, "use_flash_attention": False})
    expected = plain_forward(random_tensors(), clips, n_frames=3, heads=2, scale=WIDTH**-0.5)
    assert_same_logits(opened(folder), expected, clips)
    assert (plain_forward(random_tensors(), clips, n_frames=3, heads=2) - expected).abs().max() > 1e-3
    tensors = {name: tensor.half() for name, tensor in random_tensors().items()}
    del tensors["patch_embd.conv.bias"]
    folder = write(tmp_path / "half", tensors, {**CONFIG, "patch_embd_bias": False})
    clips = some_clips(3)
    assert_same_logits(opened(folder), plain_forward(tensors, clips, n_frames=3, heads=2), clips)


@pytest.mark.parametrize("as_folder", [False, True])
def test_merged_weights_of_a_training_need_no_config(tmp_path, as_folder):
    path = write_merged(tmp_path / "checkpoints" / "checkpoint_merged.safetensors", random_tensors())
    (path.parent / "checkpoint_0").mkdir()  # what else lies there
    trained = opened(path.parent if as_folder else path)
    clips = some_clips(8)
    assert_same_logits(trained, plain_forward(random_tensors(), clips, n_frames=8, heads=12), clips)
    assert trained.card.labels == ("class 0", "class 1", "class 2")
    assert trained.card.preprocessing.n_frames == 8
    numbered, assumed = trained.notes
    assert "do not name their 3 classes: they are numbered" in numbered
    everything = '"n_frames": 8, "num_heads": 12, "use_flash_attention": true, "pooling": "cls"'
    assert f"the reference's defaults are assumed: {everything}. A" in assumed


def test_results_of_merged_weights_are_named_by_experiment_folders(tmp_path, monkeypatch):
    for experiment in ("ucf101", "hmdb51"):
        path = write_merged(
            tmp_path / experiment / "checkpoints" / "checkpoint_merged.safetensors", random_tensors()
        )
        for given in (path, path.parent):
            assert opened(given).run == Path("runs") / f"{experiment}--checkpoints"
            assert opened(given).name == f"{experiment}--checkpoints"
    monkeypatch.chdir(path.parent)
    for here in (".", path.name):
        assert opened(Path(here)).run == Path("runs/hmdb51--checkpoints")
    other = path.rename(path.with_name("best.safetensors"))
    assert opened(other).run == Path("runs/best")


def test_a_config_beside_merged_weights_says_what_they_do_not(tmp_path):
    path = write_merged(tmp_path / "checkpoint_merged.safetensors", random_tensors())
    config = {"n_frames": 5, "num_heads": 2, "use_flash_attention": True, "pooling": "cls",
            "id2label": {"0": "bend", "1": "jack", "2": "jump"}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    clips = some_clips(5)
    for given in (path, tmp_path):
        trained = opened(given)
        assert_same_logits(trained, plain_forward(random_tensors(), clips, n_frames=5, heads=2), clips)
        assert trained.card.labels == ("bend", "jack", "jump")
        assert trained.notes == ()


def test_a_frame_size_that_nothing_tells_is_assumed_and_said(tmp_path):
    tensors = random_tensors()
    del tensors["pos_embed"]
    trained = opened(write_merged(tmp_path / "run" / "checkpoint_merged.safetensors", tensors))
    assert trained.card.preprocessing.frame_size == 224
    assert '"img_wh": 224, "n_frames": 8' in trained.notes[1]
    config = {key: value for key, value in CONFIG.items() if key != "use_flash_attention"}
    notes = opened(write(tmp_path / "hub", random_tensors(), config)).notes
    assert notes[1].startswith(
        'The weights leave values open, and the reference\'s defaults are assumed: "use_flash_attention": true. A'
    )


def test_classes_without_names_are_numbered_or_those_of_ucf101(tmp_path):
    folder = write(tmp_path / "ucf", random_tensors(classes=101), {**CONFIG, "num_classes": 101})
    trained = opened(folder)
    assert trained.card.labels == UCF101 == tuple(sorted(UCF101)) and len(set(UCF101)) == 101
    assert "UCF101's are assumed" in trained.notes[0]
    data = ("HandStandPushups", "YoYo")  # a part of it, in the spelling of its file names
    assert set(data) <= set(trained.named_by(data).card.labels)
    folder = write(
        tmp_path / "two", random_tensors(), {**CONFIG, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}}
    )
    assert opened(folder).card.labels == ("class 0", "class 1", "class 2")


def test_frames_are_squashed_to_256_and_their_centre_is_taken(folder, colours):
    video = next(colours.glob("Red/*"))
    clip = read_clip(video, lambda count: segment_indices(count, 3)).frames
    preprocessing = opened(folder).card.preprocessing
    frames = torch.from_numpy(clip).permute(0, 3, 1, 2)
    (seen,) = eval_transform([frames], preprocessing=preprocessing, device=torch.device("cpu"))
    edge = (256 - SIZE) // 2
    for own, frame in zip(seen, clip, strict=True):
        picture = Image.fromarray(frame).resize((256, 256), Image.Resampling.BILINEAR)
        cut = np.asarray(picture.crop((edge, edge, edge + SIZE, edge + SIZE))) / 255
        expected = (cut - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)  # ImageNet's
        assert np.abs(own.permute(1, 2, 0).numpy() - expected).max() <= 1.01 / 255 / 0.224


def logits_of(video, trained, *, n_frames, heads):
    """The plain forward of a video, preprocessed as the test above has checked."""
    frames = torch.from_numpy(read_clip(video, lambda count: segment_indices(count, n_frames)).frames)
    preprocessing = trained.card.preprocessing
    clips = eval_transform(
        [frames.permute(0, 3, 1, 2)], preprocessing=preprocessing, device=torch.device("cpu")
    )
    return plain_forward(random_tensors(), clips, n_frames=n_frames, heads=heads)[0]


def test_predict_labels_videos_with_it(folder, colours):
    videos = sorted(colours.glob("*/*_g01_*"))
    events = []
    settings = PredictSettings(paths=tuple(videos), model=folder, top_k=3, device="cpu")
    result = predict(settings, events.append)
    for video, prediction in zip(videos, result.predictions, strict=True):
        expected = logits_of(video, opened(folder), n_frames=3, heads=2).softmax(0)
        for label, score in prediction.labels:
            assert score == pytest.approx(expected[int(label.removeprefix("class "))].item(), abs=1e-5)
    (note,) = (event for event in events if isinstance(event, Note) and event.level == "warning")
    assert "do not name their 3 classes" in note.text
    assert (
        load_model(folder, device="cpu").predict(videos[0])
        == predict(settings.model_copy(update={"paths": (str(videos[0]),)})).predictions[0]
    )


def test_eval_scores_it_on_the_classes_of_the_data(folder, colours, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    events = []
    facts = {"model": folder, "path_to_data": str(colours), "test_groups": "1", "val_groups": "none"}
    result = evaluate(
        EvalSettings.model_validate({**facts, "num_workers": 0, "device": "cpu"}), events.append
    )
    assert result.output == Path("working_directory/temporal-vit/eval/test")
    assert (result.output / "metrics.json").is_file()
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert len(result.answers) == 3
    labels = sorted(COLOURS)
    for answer in result.answers:
        expected = logits_of(answer.video.path, opened(folder), n_frames=3, heads=2).softmax(0)
        assert answer.predicted == labels[int(expected.argmax())]
        assert answer.scores == pytest.approx(expected.tolist(), abs=1e-5)
    said = " ".join(event.text for event in events if isinstance(event, Note))
    assert "classes are assumed to be the 3 of the data" in said
    assert "training videos are unknown" in said
    written = json.loads((result.output / "metrics.json").read_text())["warnings"]
    assert result.report is not None
    page = Page(result.report.read_text(encoding="utf-8")).text
    for sentence in ("do not name their 3 classes", "to be the 3 of the data", "training videos are unknown"):
        assert any(sentence in warning for warning in written) and sentence in page


def test_eval_with_other_classes_than_the_model_has_is_refused(tmp_path, colours):
    folder = write(tmp_path / "five", random_tensors(classes=5), {**CONFIG, "num_classes": 5})
    settings = EvalSettings(
        model=folder, path_to_data=str(colours), test_groups="1", val_groups="none", device="cpu"
    )
    with pytest.raises(DataError, match=r"unknown to the model .*It has 5: class 0.* all of its classes"):
        evaluate(settings)


def test_an_export_of_it_is_proved_as_any_other(folder, colours, tmp_path):
    for form in ("safetensors", "huggingface"):
        facts = {"model": folder, "format": form, "clips": colours, "output": tmp_path / form}
        result = export(ExportSettings.model_validate(facts))
        assert result.parity.passed and result.parity.max_logit_difference < 1e-5
    card = json.loads((tmp_path / "safetensors" / "card.json").read_text())
    assert card["preprocessing"]["scale_to"] == 256
    assert card["base"]["name"] == "temporal-vit" and card["base"]["sha256"] != card["weights_sha256"]
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "safetensors", again)
    once_more = {"model": again, "format": "safetensors", "clips": colours, "output": tmp_path / "once-more"}
    assert export(ExportSettings.model_validate(once_more)).parity.max_logit_difference < 1e-5
    clips = some_clips(3)
    assert_same_logits(opened(again), plain_forward(random_tensors(), clips, n_frames=3, heads=2), clips)


def without(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without("blocks.1.attn.q.weight"), r"blocks\.1\.attn\.q\.weight is missing"),
        (without("cls_token"), "cls_token is missing"),
        (put("blocks.2.norm1.weight", torch.ones(WIDTH)), r"blocks\.2\.norm1\.weight is unexpected"),
        (put("head.weight", torch.ones(4, WIDTH)), r"head\.weight has the shape \(4, 24\), not \(3,"),
        (lambda t: t["norm.weight"].fill_(math.nan), r"norm\.weight holds NaN"),
        (put("head.bias", torch.zeros(3, dtype=torch.int8)), "Use weights that are not quantised"),
        (put("blocks.0.attn.q.lora_A", torch.ones(WIDTH, 4)), r"unmerged adapters.*checkpoint_merged\.safe"),
    ],
)
def test_bad_weights_are_refused_with_reasons(tmp_path, change, sentence):
    tensors = random_tensors()
    change(tensors)
    with pytest.raises(ModelError, match=sentence):
        opened(write(tmp_path / "bad", tensors))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"pooling": "mean"}, "pooling is 'mean'; tvit supports 'cls' alone"),
        ({"in_channels": 1}, "in_channels is 1; tvit supports 3 alone"),
        ({"num_heads": 5}, "width 24 is not a multiple of num_heads 5"),
        ({"embd_dim": 23}, "embd_dim is 23; sinusoids need an even one"),
        ({"img_wh": 288}, "img_wh is 288; tvit supports up to 256"),
        ({"n_frames": "3"}, "n_frames is '3'; it must be a whole number"),
        ({"num_classes": 0}, "num_classes is 0; it must be a whole number, 1 or more"),
        ({"num_blocks": 3}, r"blocks\.2\.\S+ is missing"),
        ({"id2label": {"0": "a", "1": "b"}}, "id2label in config.json must have a different name for each"),
        ({"id2label": {"0": "a", "1": "a", "2": "b"}}, "id2label in config.json must have a different name"),
        ({"id2label": ["a", "b", "c"]}, "id2label in config.json must have"),
        (
            {"model_type": "vit"},
            "no trained video model: its model_type is 'vit'.* tvit train --hf-model-name",
        ),
    ],
)
def test_a_bad_config_is_refused_with_reasons(tmp_path, config, sentence):
    with pytest.raises(ModelError, match=sentence):
        opened(write(tmp_path / "bad", random_tensors(), {**CONFIG, **config}))


def test_bare_files_and_doubled_tensors_are_no_trained_models(tmp_path, folder):
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=r"no trained video model: its model_type is None"):
        opened(tmp_path / "other.safetensors")
    (tmp_path / "model.bin").touch()
    with pytest.raises(ModelError, match=r"not a \.safetensors file"):
        opened(tmp_path / "model.bin")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "norm.bias": tensors["model.norm.bias"].clone()}, folder / "model.safetensors")
    with pytest.raises(ModelError, match="a tensor is stored twice"):
        opened(folder)


def test_a_name_on_the_hub_is_read_from_the_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    name = Path("detker/temporal-vit-85M")
    with pytest.raises(ModelError, match=r"hub cannot be reached.*The cache \(.*cache\) holds no models"):
        opened(name)
    repository = tmp_path / "cache" / "models--detker--temporal-vit-85M"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abcd")
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / "0123abcd")
    trained = opened(name)
    assert trained.folder == name and trained.run == Path("runs/detker--temporal-vit-85M")
    base = trained.card.base
    assert base is not None
    assert (base.name, base.revision) == ("detker/temporal-vit-85M", "0123abcd")
    with pytest.raises(ModelError, match=r"The cache holds detker/temporal-vit-85M\."):
        opened(Path("detker/temporal-vit-86M"))


def a_card(config):
    return ModelCard(
        tvit_version="0.1.0", labels=("Blue", "Green", "Red"), model=config.to_dict(),
        preprocessing=Preprocessing(n_frames=2, frame_size=16), weights_sha256="",
        settings={"path_to_data": "mine", "group_pattern": r"_g(\d+)_"},
        held_out={"val": ("02",), "test": ("01",)},
    )  # fmt: skip


@pytest.fixture
def pushed(tmp_path, monkeypatch):
    """A model folder in the hub's cache as somebody/jumps, and its model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = ViTConfig(num_classes=3, frame_size=16, patch_size=8, n_frames=2, width=16, depth=1, num_heads=2)
    model = build_model(config, seed=3, from_scratch=True)
    repository = tmp_path / "cache" / "models--somebody--jumps"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abcd")
    save_model(repository / "snapshots" / "0123abcd", model.state_dict(), a_card(config))
    return repository / "snapshots" / "0123abcd", model


@pytest.mark.parametrize("config", [None, {}, {"library_name": "tvit"}], ids=["no", "empty", "any"])
def test_a_model_of_tvit_is_known_by_its_name_on_the_hub(pushed, config):
    """An export with --format safetensors is a model folder, also where it was pushed to."""
    folder, model = pushed
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    trained = opened(Path("somebody/jumps"))
    assert trained.card.labels == ("Blue", "Green", "Red") and not trained.labels_are_guessed
    assert trained.name == "somebody--jumps" and trained.run == Path("runs/somebody--jumps")
    own = trained.model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in model.state_dict().items())
    assert read_config(resolve_weights("somebody/jumps")).network["width"] == 16  # to train from


def test_what_a_model_on_the_hub_was_trained_on_is_known(pushed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_clips(Path("data", "mine"))
    for choice, known in (
        ({}, "These videos were used for model selection"),
        ({"val_groups": "03,"}, "were trained on"),
    ):
        facts = {"model": "somebody/jumps", "subset": "val", "num_workers": 0, "device": "cpu", **choice}
        said = evaluate(EvalSettings.model_validate(facts)).warnings
        assert any(known in warning for warning in said) and "unknown" not in " ".join(said)


def test_a_model_on_the_hub_is_its_card_and_no_file_beside_it(pushed):
    folder, _ = pushed
    save_file({"weight": torch.ones(2)}, folder / "other.safetensors")
    assert opened(folder / "model.safetensors").card.labels == ("Blue", "Green", "Red")
    with pytest.raises(ModelError, match=r"other\.safetensors: .* its model_type is None"):
        opened(folder / "other.safetensors")
    folder, model = pushed
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    own = opened(Path("somebody/jumps")).model.state_dict()
    assert torch.equal(own["norm.weight"], model.state_dict()["norm.weight"])
    save_file({"network.norm.weight": torch.ones(16)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match="an export of a tvit model for other programs"):
        opened(Path("somebody/jumps"))


def test_missing_local_paths_are_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    asked = []

    def unreachable(name, **how):
        asked.append(name)
        raise OSError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tvit_cli.model.weights.snapshot_download", unreachable)
    for path in ("best.safetensors", "merged/best.safetensors", str(tmp_path / "best.safetensors")):
        with pytest.raises(ModelError, match=r"best\.safetensors: no such file"):
            opened(Path(path))
    for path, runs in (
        ("nothing", "runs"),
        ("a/b/c", "runs"),
        ("runs/people", "runs"),
        ("runs/people", tmp_path / "runs"),
        ("a/runs", "a/runs"),
    ):
        with pytest.raises(ModelError, match=f"{path}: no such model folder"):
            open_trained(Path(path), working_directory=Path(runs), device=torch.device("cpu"))
    with pytest.raises(ModelError, match="working_directory/people: no such model folder"):
        load_model("working_directory/people")
    assert not asked
    with pytest.raises(ModelError, match="cannot be fetched"):
        opened(Path("owner/name"))
    assert asked == ["owner/name"]


def test_exports_and_trained_models_are_no_backbones_to_train_from(folder, tmp_path):
    with pytest.raises(ModelError, match=r"a trained video classifier, not an image ViT.* tvit eval --model"):
        read_config(resolve_weights(str(folder)))
    exported = write(tmp_path / "exported", random_tensors(), {"model_type": "tvit"})
    with pytest.raises(ModelError, match=r"exported: an export of a tvit model .* --format safetensors"):
        opened(exported)
    with pytest.raises(ModelError, match="an export of a tvit model for other programs"):
        read_config(resolve_weights(str(exported)))


@pytest.mark.parametrize("shapes", [{}, CONFIG], ids=["merged", "published"])
@pytest.mark.parametrize("name", ["head.weight", "blocks.0.mlp.linear1.weight"])
def test_a_tensor_without_dimensions_is_refused_with_its_name(tmp_path, name, shapes):
    tensors = {**random_tensors(), name: torch.tensor(1.0)}
    written = write(tmp_path / "bad", tensors, shapes) if shapes else None
    with pytest.raises(ModelError, match=rf"{name} has the shape \(\)"):
        opened(written or write_merged(tmp_path / "bad.safetensors", tensors))


SHAPE: dict[str, Any] = {
    "frame_size": 32, "patch_size": 8, "n_frames": 4, "tubelet_size": 2, "width": 16, "depth": 2, "num_heads": 2,
}  # fmt: skip
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def trained(folder, **shape):
    """A model folder, and the model in it: its parameters are random numbers, none of them at a start value."""
    config = ViTConfig(num_classes=2, **{**SHAPE, **shape})
    model = TemporalViT(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    card = ModelCard(
        tvit_version=tvit_cli.__version__,
        labels=("a", "b"),
        model=config.to_dict(),
        preprocessing=Preprocessing(
            n_frames=config.n_frames, frame_size=config.frame_size, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)
        ),
        weights_sha256="",
    )
    save_model(folder, model.state_dict(), card)
    return model


def started(folder, **shape):
    source = resolve_weights(str(folder))
    settings = {**{key: SHAPE[key] for key in ("frame_size", "n_frames", "tubelet_size")}, **shape}
    config = read_config(source).vit_config(num_classes=3, **settings)
    model = build_model(config, seed=0, from_scratch=False).eval()
    return model, load_pretrained(model, source)


@torch.no_grad()
def features(model, *, n_frames=4, size=32):
    return model.features(torch.randn(2, n_frames, 3, size, size, generator=torch.Generator().manual_seed(2)))


def rewritten(folder, **tensors):
    """Other tensors in a model folder, with their hash on the card; None leaves one out."""
    state = load_file(folder / "model.safetensors") | tensors
    save_file(
        {name: tensor for name, tensor in state.items() if tensor is not None}, folder / "model.safetensors"
    )
    card = load_card(folder).model_copy(update={"weights_sha256": sha256(folder / "model.safetensors")})
    (folder / "card.json").write_text(card.model_dump_json())


@pytest.mark.parametrize("attention", ["joint", "divided", "factorized"])
def test_same_scheme_starts_with_the_features_of_the_trained_model(tmp_path, attention):
    before = trained(tmp_path / "m", attention=attention, pool="attentive")
    model, report = started(tmp_path / "m", attention=attention, pool="attentive")
    assert torch.equal(features(model), features(before))
    assert report.new == report.unused == ("classifier.weight", "classifier.bias")
    assert model.classifier.out_features == 3


def test_other_frame_sizes_and_clip_lengths_keep_the_trained_features(tmp_path):
    before = trained(tmp_path / "m")
    model, report = started(tmp_path / "m", frame_size=48, n_frames=8)
    theirs, ours = (features(each, n_frames=8, size=48) for each in (before, model))
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert set(report.notes) == {
        "positions interpolated from 4 x 4 to 6 x 6 patches",
        "temporal embedding interpolated from 2 to 4 times",
    }


def test_tubelets_start_on_their_central_frame_or_are_refused(tmp_path):
    before = trained(tmp_path / "m", tubelet_size=1, n_frames=2)
    model, _ = started(tmp_path / "m")
    clips = torch.randn(2, 4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.features(clips), before.features(clips[:, 1::2]), **CLOSE)
    trained(tmp_path / "m")
    with pytest.raises(ModelError, match=r"tubelets are of 2 frames.*Give --tubelet-size 2\."):
        started(tmp_path / "m", tubelet_size=1)


def test_other_scheme_takes_image_weights_and_starts_the_rest_anew(tmp_path):
    before = trained(tmp_path / "m", attention="divided")
    model, report = started(tmp_path / "m", attention="joint")
    assert torch.equal(model.blocks[1].mlp.fc1.weight, before.blocks[1].mlp.fc1.weight)
    assert not model.temporal.embedding.any()  # type: ignore[operator]
    assert "temporal.embedding" in report.new
    assert "blocks.0.temporal.attention.q.weight" in report.unused
    model, report = started(tmp_path / "m", attention="factorized")
    assert torch.equal(model.blocks[1].mlp.fc1.weight, before.blocks[1].mlp.fc1.weight)


def test_temporal_weights_of_another_kind_start_anew_or_as_copies(tmp_path):
    before = trained(tmp_path / "m", temporal_index="token")
    model, report = started(tmp_path / "m")
    assert torch.equal(model.norm.weight, before.norm.weight)
    assert report.new == ("temporal.embedding", "classifier.weight", "classifier.bias")
    before = trained(tmp_path / "m")
    model, _ = started(tmp_path / "m", attention="divided")
    assert torch.equal(model.blocks[0].temporal.attention.q.weight, before.blocks[0].attention.q.weight)


def test_normalisation_hash_and_half_precision_come_from_the_folder(tmp_path):
    trained(tmp_path / "m")
    config = read_config(resolve_weights(str(tmp_path / "m")))
    assert (config.mean, config.std, config.image_size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 32)
    assert config.sha256 == sha256(tmp_path / "m" / "model.safetensors")
    before = trained(tmp_path / "m")
    rewritten(tmp_path / "m", **{name: tensor.half() for name, tensor in before.state_dict().items()})
    model, report = started(tmp_path / "m")
    assert report.notes == ("weights converted from torch.float16 to torch.float32",)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    torch.testing.assert_close(features(model), features(before), atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("name", "tensor", "sentence"),
    [
        ("norm.bias", None, "norm.bias is missing"),
        ("extra", torch.zeros(1), "extra is unexpected"),
        ("norm.bias", torch.zeros(3), r"norm.bias has the shape \(3,\), not \(16,\).* their card.json"),
        ("norm.bias", torch.full((16,), float("nan")), "norm.bias holds NaN"),
        ("classifier.bias", torch.zeros(2, dtype=torch.int8), "Use weights that are not quantised"),
    ],
)
def test_tensors_that_are_not_the_cards_are_refused(tmp_path, name, tensor, sentence):
    trained(tmp_path / "m")
    rewritten(tmp_path / "m", **{name: tensor})
    with pytest.raises(ModelError, match=sentence):
        started(tmp_path / "m")


def test_changed_weights_and_impossible_cards_are_refused(tmp_path):
    trained(tmp_path / "m")
    trained(tmp_path / "n", n_frames=8)
    (tmp_path / "n" / "model.safetensors").replace(tmp_path / "m" / "model.safetensors")
    with pytest.raises(ModelError, match="the weights are not those of the card beside them"):
        started(tmp_path / "m")
    trained(tmp_path / "m")
    card = load_card(tmp_path / "m")
    (tmp_path / "m" / "card.json").write_text(
        card.model_copy(update={"model": card.model | {"width": 15}}).model_dump_json()
    )
    with pytest.raises(ModelError, match=r"card.json: model: width 15 is not a multiple of num_heads 2"):
        started(tmp_path / "m")


def test_a_training_goes_on_from_the_model_folder_of_another(tmp_path):
    clips, how = make_clips(tmp_path / "colours", groups=4), {"working_directory": tmp_path, "epochs": 1}
    first = run(
        path_to_data=str(clips), hf_model_name=None, width=16, depth=1, num_heads=2, train="all", **how
    )
    second = run(path_to_data=str(clips), hf_model_name=str(first.model), train="classifier", **how)
    base = load_card(second.model).base
    assert base is not None
    assert (base.name, base.sha256) == (str(first.model), load_card(first.model).weights_sha256)
    assert resolve_weights(str(first.run)).folder == first.model  # a run stands for its model, as elsewhere
    before, after = (load_file(result.model / "model.safetensors") for result in (first, second))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["classifier.bias", "classifier.weight"]


def test_what_a_training_leaves_random_or_unseen_is_said_before_it_begins(tmp_path):
    weights = make_pretrained(tmp_path / "vit")
    shape = {"width": 16, "depth": 1, "num_heads": 2}

    def warned(**how):
        notes = []
        build(TrainSettings(img_size=32, **how), labels=("a", "b", "c"), report=notes.append)
        return [note.text for note in notes if note.level == "warning"]

    no_file = warned(hf_model_name=str(weights))
    assert len(no_file) == 1 and "no preprocessor_config.json" in no_file[0]
    (weights / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    assert warned(hf_model_name=None, **shape) == warned(hf_model_name=str(weights)) == []
    assert "stay random" in warned(hf_model_name=None, train="lora", **shape)[0]
    assert warned(hf_model_name=str(weights), train="last-1") == []
    assert "cannot know the order" in warned(hf_model_name=str(weights), train="classifier")[0]
    assert warned(hf_model_name=str(weights), train="classifier", attention="space", pool="attentive") == []
    ignored = "No adapter is attached: no effect of --lora-rank-pattern, --lora-bias."
    assert warned(hf_model_name=str(weights), train="all", lora_bias="all", lora_rank_pattern={"q": 3}) == [
        ignored
    ]


def test_a_run_goes_on_when_its_weights_have_moved_and_not_with_others(tmp_path):
    data, weights = make_clips(tmp_path / "colours", groups=4), make_pretrained(tmp_path / "vit")
    how = {"path_to_data": str(data), "working_directory": tmp_path / "runs", "epochs": 2}
    first = run(hf_model_name=str(weights), experiment_name="a", **how)
    moved = weights.rename(tmp_path / "moved")
    checkpoint = sorted((first.run / "checkpoints").glob("step-*"))[0]
    again = run(hf_model_name=str(moved), resume_from_checkpoint=str(checkpoint), **how)
    assert load_card(again.model).weights_sha256 == load_card(first.model).weights_sha256
    (moved / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    said = r"--hf-model-name: .*\n  base mean: 0\.485,.* -> 0\.5,0\.5,0\.5\n"
    with pytest.raises(CheckpointError, match=said):
        run(hf_model_name=str(moved), resume_from_checkpoint=str(checkpoint), **how)
    (moved / "preprocessor_config.json").unlink()
    rewritten_weights = load_file(moved / "model.safetensors")
    rewritten_weights["layernorm.bias"] += 1
    save_file(rewritten_weights, moved / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"--hf-model-name: .*\n  base weights: "):
        run(hf_model_name=str(moved), resume_from_checkpoint=str(checkpoint), **how)


def test_an_experiment_is_not_overwritten_with_weights_that_lie_in_it(tmp_path):
    how = {"path_to_data": str(make_clips(tmp_path / "colours", groups=4))}
    how |= {"working_directory": tmp_path / "runs", "epochs": 1, "experiment_name": "a"}
    first = run(hf_model_name=None, width=16, depth=1, num_heads=2, **how)
    with pytest.raises(ModelError, match="not a valid name of a hub repository"):
        run(hf_model_name="x" * 300, overwrite=True, **how)
    for base in (first.model, first.run):
        with pytest.raises(SettingsError, match=r"--overwrite: .*a holds the weights to start from"):
            run(hf_model_name=str(base), overwrite=True, **how)
    assert load_card(first.model)
