"""`tvit export`: parity of every format, also without tvit installed."""

import ast
import dataclasses
import hashlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, get_args

import numpy as np
import pytest
import torch
from entry import run_python
from loopback import serving
from safetensors.torch import load_file, save_file
from tiny import make_clips, make_pretrained, run

from tvit_cli import cli
from tvit_cli.data.video import read_clip
from tvit_cli.engine import export as engine
from tvit_cli.engine.evaluate.files import read_metrics
from tvit_cli.engine.export import check_login, publish
from tvit_cli.engine.export import onnx as onnx_format
from tvit_cli.engine.export.formats import PORTABLE, PreprocessingGraph, copy_source, import_source
from tvit_cli.engine.export.parity import CLIPS, Parity
from tvit_cli.engine.predict import predict
from tvit_cli.errors import DataError, ModelError, RunError, SettingsError
from tvit_cli.model.folder import load_model
from tvit_cli.portable.preprocessing import frames_to_input
from tvit_cli.portable.reading import segment_indices
from tvit_cli.results import Progress, silent
from tvit_cli.settings.base import load
from tvit_cli.settings.card import Preprocessing
from tvit_cli.settings.export import ExportFormat, ExportSettings
from tvit_cli.settings.predict import PredictSettings

ROOT = Path(__file__).parents[1]
NEEDS_ONNX = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in onnx_format.PACKAGES),
    reason='needs the extra: pip install "tvit[onnx]"',
)
BLOCKED = """
import re, runpy, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tvit_cli":
            raise ImportError(f"{name} must not be needed")

sys.meta_path.insert(0, Blocked())
sys.argv = sys.argv[1:]
script, folder, clip = sys.argv[:3]
runpy.run_path(script, run_name="__main__")
readme = open(f"{folder}/README.md").read()
exec(re.search(r"```python\\n(.*?)```", readme, re.DOTALL)[1].replace("FOLDER", folder).replace("clip.avi", clip), {})
sys.argv[2:] = ["nothing.avi"]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as ended:
    print(ended.code)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with adapters, a bias and a layer trained in full, blocks that see time, tubelets, standardised features."""
    root = tmp_path_factory.mktemp("export")
    return run(
        path_to_data=str(make_clips(root / "colours")), working_directory=root / "working_directory",
        hf_model_name=str(make_pretrained(root / "pretrained")), epochs=3, attention="divided",
        tubelet_size=2, lora_rank=2, lora_bias="all", feature_norm=True,
        lora_exclude_modules="blocks.0.attention.v",
    )  # fmt: skip


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the run to spoil."""
    return Path(shutil.copytree(trained.run, tmp_path / "run", ignore=shutil.ignore_patterns("export")))


@pytest.fixture
def clips(trained):
    return sorted(trained.run.parents[1].glob("colours/*/*_g0[12]_*"))


def export(trained, output, report=silent, **settings):
    facts = {"model": trained.run, "output": output, **settings}
    return engine.export(ExportSettings.model_validate(facts), report)


def example(name, folder, clips):
    """An example, the code of the export's own README, and the example with a video that is not there: in a process
    that cannot import tvit."""
    variables = {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return run_python("-c", BLOCKED, ROOT / "examples" / name, folder, *clips, cwd=folder.parent, **variables)


def check_example(trained, name, folder, clips, tolerance=1e-5):
    """Its labels and scores, from the video files on, are those of `tvit predict`."""
    result = example(name, folder, clips)
    assert result.code == 0, result.err
    *lines, shown_by_readme, ended_with = result.out.splitlines()
    said = [line.split("\t") for line in lines]
    assert said[0][1] in shown_by_readme
    predictions = predict(PredictSettings(paths=tuple(clips), model=trained.model, top_k=1)).predictions
    assert [row[:2] for row in said] == [[p.video, p.labels[0][0]] for p in predictions]
    for row, prediction in zip(said, predictions, strict=True):
        assert float(row[2]) == pytest.approx(prediction.labels[0][1], abs=tolerance)
    assert ended_with == "2" and "Traceback" not in result.err
    refused = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert refused == ["error: nothing.avi: cannot be read as a video (No such file or directory)."]


def check_folder(result, *files):
    """Checks the files of an export, their hashes and its parity record."""
    record = json.loads((result.output / "parity.json").read_text())
    there = {p.relative_to(result.output).as_posix() for p in result.output.rglob("*") if p.is_file()}
    assert {"README.md", "card.json", *files} <= there
    assert len({(result.output / name).stat().st_mode for name in there}) == 1  # one may be read as any other
    assert record["files"].keys() == there - {"parity.json"}
    for name, expected in record["files"].items():
        assert hashlib.sha256((result.output / name).read_bytes()).hexdigest() == expected
    assert record["max_logit_difference"] == result.parity.max_logit_difference
    assert record["videos"] == 3 and record["passed"]
    assert (result.output / "README.md").read_text().startswith("---\nlibrary_name: ")
    return record


def test_safetensors_with_the_networks_own_files_label_clips(trained, tmp_path, clips):
    events = []
    result = export(trained, tmp_path / "plain", events.append)
    steps = [(e.task, e.done, e.total) for e in events if isinstance(e, Progress)]
    scored, proven = ([(name, n, 3) for n in range(4)] for name in ("scoring clips", "proving parity"))
    assert steps == [*scored[1:], ("writing safetensors", 0, None), ("writing safetensors", 1, 1), *proven]
    check_folder(result, "model.safetensors", "source/vit.py", "source/reading.py")
    assert result.parity.max_logit_difference == 0
    check_example(trained, "use_safetensors.py", result.output, clips)


def test_a_hugging_face_folder_loads_with_auto_classes_and_the_pipeline(trained, tmp_path, clips):
    from transformers import AutoConfig, AutoModel, AutoModelForVideoClassification
    from transformers.models.auto.video_processing_auto import AutoVideoProcessor

    result = export(trained, tmp_path / "hf-export", format="huggingface")
    check_folder(result, "model.safetensors", "config.json", "video_preprocessor_config.json")
    assert result.parity.max_logit_difference <= 1e-6
    check_example(trained, "use_huggingface.py", result.output, clips)
    with pytest.raises(ModelError, match="hf-export: an export of a tvit model for other programs"):
        engine.export(ExportSettings(model=result.output, output=tmp_path / "again"))

    model, card = load_model(trained.model)
    there = {"pretrained_model_name_or_path": str(result.output), "trust_remote_code": True}
    config = AutoConfig.from_pretrained(**there)
    assert [config.id2label[i] for i in range(3)] == list(card.labels)
    assert (config.num_frames, config.image_size, config.hidden_size) == (4, 32, 16)
    processor = AutoVideoProcessor.from_pretrained(**there)
    whole = read_clip(clips[0], lambda count: range(count), short_side=32).frames
    pixels = processor(str(clips[0]), return_tensors="pt")["pixel_values"]
    for frames in (whole, list(whole), [whole]):
        assert torch.equal(processor(frames)["pixel_values"], pixels)
    with pytest.raises(ValueError, match="frames must be uint8"):
        processor(whole / 255)
    with torch.inference_mode():
        backbone = AutoModel.from_pretrained(**there)
        torch.testing.assert_close(backbone(pixels).pooler_output, model.features(pixels))
        classifier = AutoModelForVideoClassification.from_pretrained(**there)
        answer = classifier(pixels, labels=torch.tensor([1]))
        torch.testing.assert_close(answer.logits, model(pixels))
        assert answer.loss == torch.nn.functional.cross_entropy(answer.logits, torch.tensor([1]))

        five = AutoModelForVideoClassification.from_pretrained(
            **there, num_labels=5, ignore_mismatched_sizes=True
        )
        assert five(pixels).logits.shape == (1, 5) and five.network.classifier.weight.any()
        assert torch.equal(five.network.norm.weight, model.norm.weight)
        fresh = AutoModelForVideoClassification.from_config(config, trust_remote_code=True)
        assert all(bool(p.isfinite().all()) for p in fresh.parameters())

    classifier.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    again = AutoModelForVideoClassification.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(again(pixels).logits, classifier(pixels).logits)
    reloaded = AutoVideoProcessor.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(reloaded(whole)["pixel_values"], pixels)


@NEEDS_ONNX
def test_onnx_has_dynamic_batch_labels_and_an_int8_cost(trained, tmp_path, clips, monkeypatch):
    import onnx
    import onnxruntime

    result = export(trained, tmp_path / "graph", format="onnx")
    check_folder(result, "model.onnx", "preprocessing.onnx", "source/reading.py")
    check_example(trained, "use_onnx.py", result.output, clips)

    session = onnxruntime.InferenceSession(result.output / "model.onnx")
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["labels"]) == ["Blue", "Green", "Red"]
    assert json.loads(metadata["preprocessing"])["n_frames"] == 4 and "middle" in metadata["sampling"]
    pixels = np.random.default_rng(0).normal(size=(5, 4, 3, 32, 32)).astype(np.float32)
    together = session.run(None, {"pixel_values": pixels})[0]
    alone = np.concatenate([session.run(None, {"pixel_values": p[None]})[0] for p in pixels])
    np.testing.assert_allclose(together, alone, atol=1e-6)

    def traced_already(graph, path):  # tracing takes seconds, and gives the same
        shutil.copyfile(result.output / path.name, path)

    monkeypatch.setattr(onnx_format, "_trace", traced_already)
    small = export(trained, tmp_path / "small", format="onnx", int8=True)
    record = check_folder(small, "model.onnx", "preprocessing.onnx")
    assert 0 < small.parity.max_logit_difference < 0.05  # with the whole range 0.14 without VNNI
    assert (record["logit_limit"], record["agreement_limit"]) == (None, 0.95)
    weights = [t.data_type for t in onnx.load(small.output / "model.onnx").graph.initializer]
    assert weights.count(onnx.TensorProto.INT8) >= 13
    check_example(trained, "use_onnx.py", small.output, clips, tolerance=0.01)

    content = bytearray((result.output / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (result.output / "model.onnx").write_bytes(content)
    refused = example("use_onnx.py", result.output, clips)
    assert refused.code == 1 and not refused.out
    assert "model.onnx: its hash is not the one in parity.json" in refused.err


def test_a_torch_program_runs_without_model_code(trained, tmp_path, clips):
    result = export(trained, tmp_path / "program", format="torch")
    check_folder(result, "model.pt2", "preprocessing.pt2", "source/reading.py")
    assert result.parity.max_logit_difference <= 1e-6
    check_example(trained, "use_torch.py", result.output, clips)


LIMITED = """
import resource, sys, torch
from pathlib import Path
from tvit_cli.engine.export.pytorch import save_program

resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
program = torch.export.export(torch.nn.Linear(64, 64), (torch.zeros(2, 64),))
try:
    save_program(program, Path(sys.argv[1]))
except OSError as error:
    print(error)
"""


def test_torch_export_on_a_full_disk_is_an_error_not_an_abort(tmp_path):
    ended = run_python("-c", LIMITED, tmp_path / "model.pt2")
    assert (ended.code, ended.out) == (0, "[Errno 27] File too large\n"), ended.err


def test_preprocessing_inside_makes_one_graph_of_frames_to_scores(trained, tmp_path):
    result = export(trained, tmp_path / "one", format="torch", with_preprocessing=True)
    check_folder(result, "model.pt2", "source/reading.py")
    assert not (result.output / "preprocessing.pt2").exists()
    model = torch.export.load(result.output / "model.pt2").module()
    for n_clips, height, width in ((1, 20, 90), (3, 60, 40)):
        frames = torch.randint(0, 256, (n_clips, 4, height, width, 3), dtype=torch.uint8)
        torch.testing.assert_close(model(frames).sum(1), torch.ones(n_clips))


def test_an_adapter_goes_onto_the_bare_backbone_beside_it(trained, tmp_path, clips):
    result = export(trained, tmp_path / "learnt", format="adapter")
    check_folder(result, "adapter_config.json", "adapter_model.safetensors", "backbone/config.json")
    assert result.parity.max_logit_difference <= 1e-5
    check_example(trained, "use_adapter.py", result.output, clips)

    backbone = load_file(result.output / "backbone" / "model.safetensors")
    pretrained = load_file(trained.run.parents[1] / "pretrained" / "model.safetensors")
    name = "blocks.1.attention.q"
    assert torch.equal(
        backbone[f"network.{name}.weight"], pretrained["encoder.layer.1.attention.attention.query.weight"]
    )
    adapter = load_file(result.output / "adapter_model.safetensors")
    assert adapter[f"base_model.model.network.{name}.lora_A.weight"].shape == (2, 16)
    trained_classifier = load_file(trained.model / "model.safetensors")["classifier.weight"]
    assert torch.equal(adapter["base_model.model.network.classifier.weight"], trained_classifier)
    assert not torch.equal(backbone["network.classifier.weight"], trained_classifier)
    assert "base_model.model.network.blocks.0.temporal.scale.gate" in adapter


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train": "all"}, "trained with --train all, so there is no adapter"),
        ({"lora_rank": 0}, "trained with --lora-rank 0, so there is no adapter"),
        (
            {"checkpoint_dir": "elsewhere"},
            "elsewhere: no checkpoint there. .* is in the checkpoints of its run",
        ),
        ({"colour": "blue"}, r"settings\.json, colour: unknown setting"),
        (None, r"settings\.json: missing\. .* Name the run's folder"),
    ],
)
def test_missing_adapter_is_reported_before_computing(copied, changes, sentence):
    path = copied / "settings.json"
    if changes is None:
        path.unlink()
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises((ModelError, SettingsError), match=sentence):
        engine.export(ExportSettings(model=copied, format="adapter"))
    assert not (copied / "export").exists()


def test_an_adapter_needs_the_weights_it_was_trained_on(trained, copied):
    other = copied.parent / "other"
    shutil.copytree(trained.run.parents[1] / "pretrained", other)
    weights = load_file(other / "model.safetensors")
    save_file({**weights, "layernorm.bias": weights["layernorm.bias"] + 1}, other / "model.safetensors")
    path = copied / "settings.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hf_model_name": str(other)}))
    with pytest.raises(ModelError, match="these are not the weights that the model was trained on"):
        engine.export(ExportSettings(model=copied, format="adapter"))


def spoil(monkeypatch):
    form = engine.FORMATS["safetensors"]

    def write_other_weights(job, folder):
        form.write(job, folder)
        weights = load_file(folder / "model.safetensors")
        weights["classifier.bias"][0] += 1
        save_file(weights, folder / "model.safetensors")

    spoiled = dataclasses.replace(form, write=write_other_weights)
    monkeypatch.setitem(engine.FORMATS, "safetensors", spoiled)


def test_export_without_parity_is_not_written(trained, tmp_path, monkeypatch, capsys):
    kept = export(trained, tmp_path / "plain").output / "parity.json"
    before = kept.read_bytes()
    spoil(monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        cli.run(["export", str(trained.run), "--output", str(tmp_path / "plain"), "--overwrite"])
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert "largest difference of a logit 1 (at most 0.0001)" in said and "On 3 clips" in said
    assert kept.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["plain"]


def test_a_second_export_to_a_folder_leaves_the_first_whole(trained, tmp_path, monkeypatch):
    output, form = tmp_path / "plain", engine.FORMATS["safetensors"]

    def write_meanwhile(job, folder):
        monkeypatch.setitem(engine.FORMATS, "safetensors", form)
        with pytest.raises(RunError, match=r"plain: another export is writing this folder\. Wait"):
            export(trained, output)
        form.write(job, folder)

    meanwhile = dataclasses.replace(form, write=write_meanwhile)
    monkeypatch.setitem(engine.FORMATS, "safetensors", meanwhile)
    export(trained, output)
    assert (output / "parity.json").is_file() and [p.name for p in tmp_path.iterdir()] == ["plain"]

    def lock(*arguments, **keywords):  # another export ends just before
        monkeypatch.undo()
        export(trained, tmp_path / "late")
        return engine.file_lock(*arguments, **keywords)

    monkeypatch.setattr(engine, "file_lock", lock)
    with pytest.raises(SettingsError, match="late: an export is there already"):
        export(trained, tmp_path / "late")


@pytest.mark.parametrize("where", ["the clips", "the proof", "the writing"])
def test_a_file_that_cannot_be_read_is_not_called_a_full_disk(where, trained, tmp_path, monkeypatch):
    def fails(*arguments, **keywords):
        raise OSError(5, "Input/output error", "disk.avi")

    output = tmp_path / "out"
    if where == "the clips":
        monkeypatch.setattr("tvit_cli.engine.export.parity.read_layout", fails)
        with pytest.raises(OSError, match=r"disk\.avi"):  # which is one sentence, as it is, on the terminal
            export(trained, output)
    elif where == "the proof":
        broken = dataclasses.replace(engine.FORMATS["safetensors"], load=fails)
        monkeypatch.setitem(engine.FORMATS, "safetensors", broken)
        with pytest.raises(
            RunError, match=r"the parity check broke off, .* cannot be read .*disk\.avi"
        ) as raised:
            export(trained, output)
        assert "space" not in str(raised.value)
    else:
        broken = dataclasses.replace(engine.FORMATS["safetensors"], write=fails)
        monkeypatch.setitem(engine.FORMATS, "safetensors", broken)
        with pytest.raises(RunError, match=r"out: the export cannot be written .* Free some space"):
            export(trained, output)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["", '{"metrics"', "[]", '{"metrics": [0.5]}', '{"metrics": {"videos": "many"}}']
)
def test_an_evaluation_that_cannot_be_read_is_named(text, tmp_path):
    (tmp_path / "metrics.json").write_text(text)
    said = r"metrics\.json: no metrics can be read .* Run the evaluation again, or remove"
    with pytest.raises(DataError, match=said):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("difference", "agreement", "int8", "passed"),
    [
        (1e-4, 1.0, False, True),
        (1.1e-4, 1.0, False, False),
        (float("nan"), 1.0, False, False),
        (1e-5, 0.95, False, False),
        (9.0, 0.95, True, True),
        (0.0, 0.94, True, False),
    ],
)
def test_a_proof_has_limits(difference, agreement, int8, passed):
    parity = Parity("", 20, difference, agreement, None if int8 else 1e-4, 0.95 if int8 else 1.0)
    assert parity.passed == passed


def test_what_is_there_is_replaced_only_when_told_to(trained, tmp_path):
    first = export(trained, tmp_path / "plain")
    with pytest.raises(SettingsError, match=r"an export is there already\. Replace it with --overwrite"):
        export(trained, tmp_path / "plain")
    export(trained, tmp_path / "plain", overwrite=True)
    (first.output / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(SettingsError, match=r"tvit did not write: notes\.txt\. Move them away, or name"):
            export(trained, tmp_path / "plain", overwrite=overwrite)
    assert (first.output / "notes.txt").read_text() == "mine" and (first.output / "parity.json").is_file()
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(SettingsError, match="is the current directory"),
    ):
        (tmp_path / "here").mkdir()
        patch.chdir(tmp_path / "here")
        export(trained, Path())
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").touch()
    with pytest.raises(SettingsError, match="thesis: exists and is no export"):
        export(trained, tmp_path / "thesis", overwrite=True)


def test_the_command_says_what_the_proof_found_and_where_the_export_is(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained.run.parents[1])
    cli.build_app()(["export", "-f", "safetensors"], standalone_mode=False)  # the newest model
    said = capsys.readouterr().out
    folder = Path("working_directory", trained.run.name, "export", "safetensors")
    assert "largest logit difference  0.0e+00  at most 0.0001" in said and f"Written to {folder}" in said
    assert (folder / "parity.json").is_file()


def test_parity_uses_given_clips_or_noise(trained, copied, tmp_path):
    blue = trained.run.parents[1] / "colours" / "Blue"
    named = export(trained, tmp_path / "named", clips=blue).parity
    assert (named.clips, named.videos) == ("Blue", 6)
    path = copied / "model" / "card.json"
    card = json.loads(path.read_text())
    path.write_text(json.dumps({**card, "settings": {**card["settings"], "path_to_data": "moved/away"}}))
    notes = []
    made_up = engine.export(ExportSettings(model=copied / "model"), notes.append)
    assert (made_up.parity.clips, made_up.parity.videos) == ("seeded noise", 8)
    assert made_up.output == copied / "export" / "safetensors"
    assert any(
        "The parity check uses generated clips: --path-to-data moved/away" in note.text for note in notes
    )
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.avi").write_text("not a video")
    with pytest.raises(RunError, match=r"none of the 1 clips can be read\. Name others with --clips"):
        export(trained, tmp_path / "unproved", clips=tmp_path / "broken")


def test_many_clips_are_taken_evenly():
    from tvit_cli.engine.export.parity import _spread

    paths = [Path(str(i)) for i in range(100)]
    assert [int(p.name) for p in _spread(paths)] == list(range(2, 100, 5)) and CLIPS == 20
    assert _spread(paths[:3]) == paths[:3]


def test_weights_that_were_changed_are_not_exported(trained, copied):
    path = copied / "model" / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "classifier.bias": weights["classifier.bias"] + 1}, path)
    with pytest.raises(ModelError, match=r"its hash is not the one in card\.json"):
        engine.export(ExportSettings(model=copied))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/home/ada/secret/vit-tuned", "vit-tuned"),
        ("../secret/vit-tuned", "vit-tuned"),
        ("home/ada/secret/vit-tuned/", "vit-tuned"),
        ("C:\\ada\\secret\\vit-tuned", "vit-tuned"),
        ("google/vit-base-patch16-224", "google/vit-base-patch16-224"),
    ],
)
def test_no_folder_of_this_machine_leaves_with_an_export(trained, copied, tmp_path, name, shown):
    path = copied / "model" / "card.json"
    card = json.loads(path.read_text())
    card["base"]["name"] = name
    card["settings"] |= {
        "path_to_data": "/mnt/secret/colours",
        "hf_model_name": name,
        "resume_from_checkpoint": "/mnt/secret/checkpoint",
        "working_directory": "/mnt/secret",
    }
    path.write_text(json.dumps(card))
    clips = trained.run.parents[1] / "colours" / "Blue"
    output = engine.export(
        ExportSettings(model=copied / "model", clips=clips, output=tmp_path / "out")
    ).output
    written = json.loads((output / "card.json").read_text())
    assert written["base"]["name"] == written["settings"]["hf_model_name"] == shown
    assert written["settings"]["path_to_data"] == "colours"
    assert ("\nbase_model: " in (output / "README.md").read_text()) == ("/" in shown)
    for file in output.rglob("*"):
        assert file.is_dir() or b"secret" not in file.read_bytes(), file


def test_missing_and_older_packages_are_named(trained, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "onnxruntime" else find_spec(name, *a)
    )
    with pytest.raises(ModelError, match=r'needs onnxruntime, which .* install "tvit\[onnx\]"'):
        export(trained, tmp_path / "graph", format="onnx")
    assert not (tmp_path / "graph").exists()
    from tvit_cli.engine.export import huggingface

    monkeypatch.setattr(huggingface, "metadata", SimpleNamespace(version=lambda name: "4.57.1"))
    with pytest.raises(ModelError, match=r"needs transformers 5 or newer, and 4\.57\.1 is installed"):
        export(trained, tmp_path / "hf", format="huggingface")


def test_every_format_has_its_facts_its_page_and_its_options():
    assert set(engine.FORMATS) == set(get_args(ExportFormat))
    pages = Path(engine.__file__).parent / "use"
    assert {page.stem for page in pages.iterdir()} == set(engine.FORMATS)
    for name, form in engine.FORMATS.items():
        page = (pages / f"{name}.md").read_text()
        assert bool(form.suffix) == bool(form.preprocess) == ("${preprocess}" in page) == ("$inputs" in page)
        try:
            ExportSettings(format=name, with_preprocessing=True)
        except ValueError:
            assert not form.suffix, name
        else:
            assert form.suffix, name


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"format": "onxx"}, "--format: onxx: it should be .* Did you mean onnx?"),
        ({"format": "torch", "int8": True}, "--int8 needs --format onnx, not torch"),
        (
            {"format": "adapter", "with_preprocessing": True},
            "--with-preprocessing needs --format onnx or torch",
        ),
        ({"push_to_hub": "ada"}, "--push-to-hub: ada: it should be USER/NAME"),
        ({"private": True}, "--private needs --push-to-hub"),
    ],
)
def test_options_that_cannot_be_used_are_refused(flags, sentence):
    with pytest.raises(SettingsError, match=sentence):
        load(ExportSettings, flags=flags, environ={})


class Hub:
    """Stands in for huggingface_hub.HfApi; `error` is raised at the method named `fails_at`."""

    def __init__(self, fails_at: str = "", error: Exception | None = None, *, private: bool = True) -> None:
        self.private = private
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.fails_at, self.error = fails_at, error

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*names: str, **facts: Any) -> Any:
            self.calls.append((name, {**facts, "names": names}))
            if name == self.fails_at:
                assert self.error is not None
                raise self.error
            if name == "repo_info":
                return SimpleNamespace(private=self.private)
            return "https://huggingface.co/ada/colours"

        return call


def test_an_export_is_uploaded_whole(trained, tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    result = export(trained, tmp_path / "plain", push_to_hub="ada/colours", private=True)
    assert result.url == "https://huggingface.co/ada/colours"
    assert [name for name, _ in hub.calls] == ["whoami", "create_repo", "repo_info", "upload_folder"]
    assert hub.calls[1][1] == {"names": ("ada/colours",), "private": True, "exist_ok": True}
    assert hub.calls[3][1]["repo_id"] == "ada/colours"
    assert (hub.calls[3][1]["folder_path"] / "parity.json").is_file()


def test_nothing_private_is_uploaded_to_a_repository_that_is_public(tmp_path, monkeypatch):
    hub = Hub(private=False)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    said = r"--private: ada/colours is a public repository, so nothing was uploaded"
    with pytest.raises(RunError, match=said):
        publish(tmp_path, "ada/colours", private=True)
    assert [(name, facts["names"]) for name, facts in hub.calls] == [
        ("create_repo", ("ada/colours",)),
        ("repo_info", ("ada/colours",)),
    ]
    assert publish(tmp_path, "ada/colours", private=False)
    assert hub.calls[-1][0] == "upload_folder"


def test_who_is_not_logged_in_is_told_how_before_anything_is_written(trained, tmp_path, monkeypatch):
    from huggingface_hub.errors import LocalTokenNotFoundError

    monkeypatch.setattr("huggingface_hub.HfApi", lambda: Hub("whoami", LocalTokenNotFoundError("no token")))
    with pytest.raises(RunError, match=r"not logged in to the Hugging Face hub\. .* hf auth login"):
        export(trained, tmp_path / "plain", push_to_hub="ada/colours")
    assert not (tmp_path / "plain").exists()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: Hub("upload_folder", OSError("cut off")))
    said = r"the upload broke off \(cut off\). Continue with: .* The export is complete in .*plain"
    with pytest.raises(RunError, match=said):
        export(trained, tmp_path / "plain", push_to_hub="ada/colours")
    assert (tmp_path / "plain" / "parity.json").is_file()


class Answer:
    """An HTTP response as huggingface_hub's errors hold it."""

    headers: ClassVar[dict[str, str]] = {}
    request = None

    def __init__(self, status_code: int) -> None:
        self.status_code = status_code


@pytest.mark.parametrize(
    ("status", "asked", "uploaded"),
    [
        (401, "refuses this login. Log in with", "has no write access .* hf auth login"),
        (403, "refuses this login. Log in with", "has no write access .* hf auth login"),
        (
            429,
            r"answers with an error \(429 of the hub\)\. Try later\.$",
            "broke off .* Continue with: hf upload",
        ),
        (
            503,
            r"answers with an error \(503 of the hub\)\. Try later\.$",
            "broke off .* Continue with: hf upload",
        ),
    ],
)
def test_only_who_is_refused_by_the_hub_is_told_to_log_in(status, asked, uploaded, tmp_path, monkeypatch):
    from huggingface_hub.errors import HfHubHTTPError

    answer = Answer(status)
    error = HfHubHTTPError(f"{status}\n\nof the hub", response=answer)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: Hub("whoami", error))
    with pytest.raises(RunError, match=asked):
        check_login()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: Hub("create_repo", error))
    with pytest.raises(RunError, match=uploaded) as raised:
        publish(tmp_path, "ada/colours", private=True)
    assert ("hf upload --private ada/colours" in str(raised.value)) == (status not in (401, 403))


@pytest.mark.parametrize("extra", [0, 5])
@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_the_graph_of_preprocessing_gives_the_same_bits(resize, extra):
    generator = torch.Generator().manual_seed(3)
    for height, width, size in [
        *((48, 64, 32), (32, 32, 32), (7, 9, 32), (90, 31, 32), (300, 84, 80), (33, 100, 32), (61, 61, 96)),
        *(
            (h, w, s)
            for h, w, s in torch.randint(9, 90, (12, 3), generator=generator).tolist()
            if max(h, w) <= 4 * min(h, w)
        ),
    ]:
        facts = Preprocessing(
            n_frames=2, frame_size=size, scale_to=size + extra, resize=resize, mean=(0.4, 0.5, 0.6)
        )
        frames = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8, generator=generator)
        expected = frames_to_input(
            frames.permute(0, 3, 1, 2), frame_size=size, scale_to=size + extra, resize=resize,
            mean=facts.mean, std=facts.std,
        )  # fmt: skip
        assert torch.equal(PreprocessingGraph(facts)(frames[None])[0], expected), (height, width, size)


@pytest.mark.parametrize("grid", [None, 5])
def test_the_shipped_reader_gives_the_frames_that_tvit_reads(tmp_path, make_video, packed_xvid, grid):
    def choose(count):
        return segment_indices(count, 4, grid=grid)

    copy_source(tmp_path)
    videos = [packed_xvid, make_video(tmp_path / "a.avi", 11), make_video(tmp_path / "b.mp4", 2)]
    damaged = bytearray(videos[1].read_bytes())
    damaged[len(damaged) // 2 : len(damaged) // 2 + 200] = bytes(200)
    (tmp_path / "damaged.avi").write_bytes(damaged)
    with import_source(tmp_path) as module:
        for video in [*videos, tmp_path / "damaged.avi"]:
            for short_side in (32, 200):
                expected = read_clip(video, choose, short_side=short_side).frames
                frames = module("reading").read_clip(
                    video, n_frames=4, short_side=short_side, frame_grid=grid
                )
                assert np.array_equal(frames, expected), (video, short_side)
        (tmp_path / "text.avi").write_text("not a video")
        for name, reason in (("text", "Invalid data"), ("nothing", "No such file or directory")):
            video = tmp_path / f"{name}.avi"
            with pytest.raises(OSError, match=rf"{name}\.avi: cannot be read as a video \({reason}"):
                module("reading").read_clip(video, n_frames=4, short_side=32)
    assert not [name for name in sys.modules if name.startswith("_tvit_export_")]


def test_shipped_reader_reads_files_of_any_name_and_content(tmp_path, make_video):
    copy_source(tmp_path)
    video = make_video(tmp_path / "plain.avi", 5)
    named = shutil.copyfile(video, tmp_path / "x:y.avi")
    facts = {"n_frames": 2, "short_side": 32}
    with import_source(tmp_path) as module, serving() as server:
        read = module("reading").read_clip
        assert np.array_equal(read(named, **facts), read(video, **facts))
        assert np.array_equal(read(f"file://{video}", **facts), read(video, **facts))
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            assert np.array_equal(read("x:y.avi", **facts), read(video, **facts))
        playlist = tmp_path / "list.m3u8"
        address = server.add("/part.avi", video.read_bytes())
        playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{address}\n#EXT-X-ENDLIST\n")
        with pytest.raises((OSError, ValueError), match=r"list\.m3u8"):
            read(playlist, **facts)
        assert not server.requests


def test_portable_imports_itself_and_four_packages():
    allowed = {"torch", "numpy", "av", "transformers", *sys.stdlib_module_names}
    files = {path.stem: path for path in PORTABLE.glob("*.py")}
    assert {"vit", "layers", "config", "preprocessing", "reading"} <= files.keys()
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in allowed for alias in node.names), name
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in files, name
            elif isinstance(node, ast.ImportFrom):
                assert str(node.module).split(".")[0] in allowed, name


@pytest.mark.parametrize("name", ["use_onnx.py", "use_torch.py", "use_safetensors.py"])
def test_an_example_without_arguments_shows_its_usage(name):
    ended = run_python(ROOT / "examples" / name)
    assert (ended.code, ended.out, ended.err) == (2, "", f"usage: python {name} EXPORT VIDEO...\n")
