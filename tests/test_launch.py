"""Devices, precision and what Accelerate cannot do."""

import json

import pytest
import torch

from tvit_cli import cli
from tvit_cli.engine import launch
from tvit_cli.engine.launch import make_accelerator
from tvit_cli.errors import CheckpointError, ModelError, SettingsError


@pytest.mark.parametrize(
    ("kind", "gpus", "variables", "refused"),
    [
        ("cuda", 2, {"LOCAL_WORLD_SIZE": "4"}, "4 processes on a machine with 2 GPUs"),
        ("cuda", 1, {"LOCAL_WORLD_SIZE": "2"}, r"with 1 GPU: .* --num-processes 1, or --device cpu"),
        ("cuda", 1, {"LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "1"}, None),
        ("cuda", 8, {"LOCAL_WORLD_SIZE": "8"}, None),
        ("cuda", 1, {"WORLD_SIZE": "8"}, None),  # one on each of eight machines
        ("mps", 0, {"WORLD_SIZE": "2"}, "2 processes on a machine with 1 GPU"),
        ("cpu", 0, {"LOCAL_WORLD_SIZE": "4"}, None),
    ],
)
def test_more_processes_than_gpus_are_refused(kind, gpus, variables, refused, monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if refused is None:
        launch._refuse_shared_gpus(torch.device(kind))
        return
    with pytest.raises(SettingsError, match=refused):
        launch._refuse_shared_gpus(torch.device(kind))


def test_what_accelerate_cannot_start_on_is_said_in_its_words(monkeypatch):
    def refuse(**options):
        raise NotImplementedError("Using RTX 4000 series doesn't support faster communication")

    monkeypatch.setattr("accelerate.Accelerator", refuse)
    with pytest.raises(SettingsError, match="Accelerate will not start here: Using RTX 4000"):
        make_accelerator(device="cpu", mixed_precision="no")


def test_float32_convolutions_are_not_tf32_on_cuda(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert launch.resolve_precision("no", torch.device("cuda")) == "no"
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("device", "capability", "expected"),
    [
        ("cpu", None, "no"),
        ("mps", None, "no"),
        ("cuda", (7, 5), "no"),
        ("cuda", (8, 0), "bf16"),
        ("cuda", (9, 0), "bf16"),
    ],
)
def test_automatic_precision_is_bf16_where_the_hardware_has_it(monkeypatch, device, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert launch.resolve_precision("auto", torch.device(device)) == expected
    assert launch.resolve_precision("bf16", torch.device(device)) == "bf16"


def test_fp16_is_refused_where_it_would_do_nothing():
    assert launch.resolve_precision("fp16", torch.device("cuda")) == "fp16"
    with pytest.raises(SettingsError, match=r"--mixed-precision fp16: not supported on a CPU\."):
        launch.resolve_precision("fp16", torch.device("cpu"))


def test_auto_precision_is_recorded_and_resumed_as_resolved(trained):
    first = trained(mixed_precision="auto")
    assert json.loads((first.run / "settings.json").read_text())["mixed_precision"] == "no"
    path = str(first.run / "checkpoints" / "step-000003")
    trained(resume_from_checkpoint=path, mixed_precision="no")
    with pytest.raises(CheckpointError, match="--mixed-precision: no -> bf16"):
        trained(resume_from_checkpoint=path, mixed_precision="bf16")


@pytest.mark.parametrize(
    "variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"]
)
def test_a_model_split_between_processes_is_refused_with_the_reason(trained, monkeypatch, tmp_path, variable):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(
        SettingsError,
        match=f"{variable}=true: .*not supported: Accelerate silently ignores it on a CPU",
    ):
        trained()
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv(variable, "false")
    make_accelerator(device="cpu", mixed_precision="no")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_ends_with_exit_code_2(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.run(["train", "--device", "cuda", "--path-to-data", inputs["path_to_data"]])
    assert stop.value.code == ModelError.exit_code == 2
    assert "--device cuda: this machine has none" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
