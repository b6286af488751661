"""Memory of training, batch sizes, compiled models and dry runs."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tiny import last_weights, make_clips, records, same, settings
from torch import nn
from torch.distributed import DistError

from tvit_cli import cli
from tvit_cli.engine.launch import make_accelerator
from tvit_cli.engine.train import memory, train
from tvit_cli.engine.train.build import Built, compile_model
from tvit_cli.engine.train.checkpoint import list_checkpoints, load_checkpoint
from tvit_cli.engine.train.dryrun import dry_run
from tvit_cli.engine.train.memory import (
    Attempt,
    Probe,
    free_host_bytes,
    global_batch,
    is_out_of_memory,
    largest_that_fits,
    memory_model,
    peak_bytes,
)
from tvit_cli.errors import RunError, SettingsError
from tvit_cli.model import lora
from tvit_cli.model.lora import set_trainable, trainable_report
from tvit_cli.portable.layers import recompute_block
from tvit_cli.portable.vit import TemporalViT, ViTConfig, build_model
from tvit_cli.results import MemoryModel, Note, TrainingStarts
from tvit_cli.settings.card import Preprocessing

pytestmark = pytest.mark.usefixtures("no_pictures")
CPU = torch.device("cpu")
FRAMES = 4
SIZE = 32
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def model(*, train="lora", dropout=0.3, checkpointing=False, depth=4):
    config = ViTConfig(
        num_classes=5, frame_size=SIZE, patch_size=8, n_frames=FRAMES, width=32, depth=depth, num_heads=4
    )
    vit = build_model(config, seed=0, from_scratch=True)
    spec = lora.LoraSpec(4, 4, dropout, False, "none", ("q", "k", "v"), ())
    set_trainable(vit, train, spec, seed=0)  # type: ignore[arg-type]
    if checkpointing:
        vit.run_block = recompute_block
    return vit.train()


def step(vit, clips=2):
    """The gradients of a step with seeded dropout."""
    generator = torch.Generator().manual_seed(1)
    batch = torch.randn(clips, FRAMES, 3, SIZE, SIZE, generator=generator)
    torch.manual_seed(7)
    vit.zero_grad()
    vit(batch).square().sum().backward()
    return {name: p.grad for name, p in vit.named_parameters() if p.grad is not None}


def probe(vit):
    shape = Preprocessing(n_frames=FRAMES, frame_size=SIZE)
    return Probe(Built(vit, vit.config, shape, None), vit, Accelerator(cpu=True))


def kept_bytes(vit, clips):
    """Bytes that a forward pass keeps for the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in vit.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        vit(torch.randn(clips, FRAMES, 3, SIZE, SIZE)).sum()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("train_what", ["lora", "all", "classifier"])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradient_checkpointing_changes_no_bit_of_a_gradient(train_what, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = step(model(train=train_what))
        checkpointed = step(model(train=train_what, checkpointing=True))
    assert plain and same(plain, checkpointed)


def test_gradient_checkpointing_keeps_a_fraction_of_the_bytes():
    plain, checkpointed = kept_bytes(model(), 2), kept_bytes(model(checkpointing=True), 2)
    tokens = 2 * (1 + FRAMES * 16) * 32 * 4  # bytes of (B, N, D), all that is kept of a block
    assert checkpointed < 4 * tokens + 40_000 < plain / 3


def test_gradient_checkpointing_has_the_same_bits_with_less_memory(trained, monkeypatch):
    calls = []
    real = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        "tvit_cli.portable.layers.checkpoint", lambda *a, **k: (calls.append("block"), real(*a, **k))[1]
    )
    plain = trained(lora_dropout=0.3)
    assert not calls
    checkpointed = trained(lora_dropout=0.3, gradient_checkpointing=True)
    assert calls and same(last_weights(plain), last_weights(checkpointed))
    # It is one of the settings that a run may be gone on with when memory has run out.
    shutil.rmtree(list_checkpoints(plain.run / "checkpoints")[-1])
    shutil.rmtree(plain.model)
    before = str(plain.run / "checkpoints" / "step-000003")
    again = trained(lora_dropout=0.3, gradient_checkpointing=True, resume_from_checkpoint=before)
    assert same(last_weights(again), last_weights(checkpointed))


@pytest.mark.parametrize("train_what", ["lora", "all"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_memory_model_foretells_the_peak_of_larger_batches(train_what, checkpointing):
    vit = model(train=train_what, checkpointing=checkpointing)
    terms = probe(vit).memory_model()
    trainable, total = trainable_report(vit)
    assert (terms.weights, terms.gradients, terms.moments) == (4 * total, 4 * trainable, 8 * trainable)
    probe(vit).run(vit, 1)  # gradients are there
    measured = peak_bytes(lambda: probe(vit).run(vit, 16), CPU)
    assert terms.workspace + 16 * terms.activations_per_clip == pytest.approx(measured, rel=0.03)
    assert measured >= kept_bytes(vit, 16)


def test_memory_is_the_sum_of_named_terms():
    terms = MemoryModel(
        weights=1000, gradients=100, moments=200, average=100, workspace=30, activations_per_clip=7
    )
    assert terms.needed(10) == 1500
    tensor = nn.Linear(10, 10, bias=False)
    measured = memory_model(tensor, lambda clips: 50 + 9 * clips)
    assert measured == MemoryModel(400, 400, 800, 0, workspace=50, activations_per_clip=9)
    assert memory_model(tensor, lambda clips: clips, averages=True).average == 400


def test_the_peak_counts_tensors_while_they_live():
    def work():
        a = torch.ones(1000)  # 4,000 bytes
        b = a.view(10, 100) + 1  # 8,000
        del a
        c = b * 2  # 8,000
        del b, c
        torch.ones(500)

    assert peak_bytes(work, CPU) == 8000


def test_free_memory_ends_where_the_jobs_or_the_containers_does(tmp_path):
    own, groups = tmp_path / "cgroup", tmp_path / "fs"
    job = groups / "slurm" / "job_1"
    job.mkdir(parents=True)
    own.write_text("0::/slurm/job_1\n")
    everything = free_host_bytes(groups, own)
    assert everything > 10**8

    def limit(folder, most, used, cache):
        (folder / "memory.max").write_text(most + "\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\n")

    limit(job, "max", 10, 0)
    assert free_host_bytes(groups, own) > 10**8
    limit(job.parent, "5000", 4000, 300)
    assert free_host_bytes(groups, own) == 1300
    assert free_host_bytes(groups, tmp_path / "none") > 10**8


def test_a_probe_that_finds_no_memory_says_so_and_leaves_no_gradients(monkeypatch):
    vit = model()
    small_card(monkeypatch, 4)
    own = probe(vit)
    assert [own.fits(clips) for clips in (8, 4)] == [False, True]
    assert all(p.grad is None for p in vit.parameters())


def small_card(monkeypatch, most, *, error=None, since=0):
    """From the `since`-th training pass on, no more than `most` clips find memory; returns the passes' sizes."""
    real, sizes = TemporalViT.features, []

    def features(self, clips):
        features = real(self, clips)
        if self.training:
            sizes.append(len(clips))
            if len(clips) > most and len(sizes) > since:
                raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return features

    monkeypatch.setattr(TemporalViT, "features", features)
    return sizes


CPU_SENTENCE = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error code 12"


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError(CPU_SENTENCE), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_that_mean_no_memory_are_told_from_others(error, is_it):
    assert is_out_of_memory(error) is is_it


def test_running_out_of_memory_is_told_from_mistakes():
    attempt = Attempt()
    assert attempt.run(torch.empty, 2**55) is None
    assert attempt.failed and attempt.run(torch.ones, 1) is None
    with pytest.raises(RuntimeError, match="shapes"):
        Attempt().run(torch.ones(2, 3).matmul, torch.ones(2, 3))


@pytest.mark.parametrize("error", [None, RuntimeError(CPU_SENTENCE)])
def test_out_of_memory_halves_the_micro_batch(trained, inputs, tmp_path, monkeypatch, error):
    smaller = trained(per_gpu_batch_size=2, gradient_accumulation_steps=2, lora_dropout=0.3)
    small_card(monkeypatch, 2, error=error)
    events = []
    own = settings(
        **inputs, working_directory=tmp_path, per_gpu_batch_size=4, lora_dropout=0.3, num_workers=1
    )
    halved = train(own, events.append)
    assert same(last_weights(halved), last_weights(smaller))  # dropout included
    assert records(halved, "") == records(smaller, "")
    said = [e.text for e in events if isinstance(e, Note) and "out of memory" in e.text]
    assert said == [
        "Step 1: out of memory with 4 clips per forward pass. From here on there are 2, and updates are the same: "
        "global batch 4 = 1 process × 2 clips × 2 accumulation."
    ]


def test_a_resumed_run_takes_the_micro_batch_that_had_been_found_to_fit(trained, monkeypatch):
    what = {"per_gpu_batch_size": 6, "lora_dropout": 0.3, "epochs": 3, "experiment_name": "mine"}
    with monkeypatch.context() as patched:
        sizes = small_card(patched, 3, since=3)  # in the second of the second epoch's two steps
        whole = trained(**{**what, "experiment_name": "whole"})
    assert sizes == [6, 6, 6, 6, *[3] * 6]
    with monkeypatch.context() as patched:
        small_card(patched, 3, since=3)
        first = trained(**what)
    shutil.rmtree(first.model)
    *_, left, last = list_checkpoints(first.run / "checkpoints")
    shutil.rmtree(last)
    assert load_checkpoint(left).state.micro_batch == 3
    sizes = small_card(monkeypatch, 6)
    again = trained(**what)
    assert set(sizes) == {3}
    assert same(last_weights(again), last_weights(whole)) and records(again, "") == records(whole, "")


def test_out_of_memory_with_one_clip_ends_with_advice(trained, monkeypatch):
    small_card(monkeypatch, 0)
    words = (
        "out of memory with 1 clip per forward pass.*--gradient-checkpointing.*--n-frames 4.*--img-size 32"
    )
    with pytest.raises(RunError, match=words):
        trained()


def test_out_of_memory_elsewhere_ends_with_advice(trained, monkeypatch):
    def fails(*arguments, **keywords):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nmore")

    monkeypatch.setattr("tvit_cli.engine.train.state.score", fails)
    said = r"Out of memory: CUDA out of memory. Tried to allocate 1 GiB. To need less"
    with pytest.raises(RunError, match=said):
        trained(gradient_checkpointing=True, train="all")


def test_smallest_recorded_micro_batch_counts_and_is_reported_once(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    assert memory.micro_batch_limit(checkpoints) == math.inf
    for clips in (4, 2):
        memory.limit_micro_batch(checkpoints, clips)
    with pytest.raises(DistError):  # on which a process waits for its launcher to end it
        memory.limit_micro_batch(checkpoints, 4)
    (checkpoints / ".micro-batch-0").touch()
    assert memory.micro_batch_limit(checkpoints) == 2


def test_named_run_without_checkpoint_begins_again_with_recorded_size(trained, mine):
    for name in ("model", "checkpoints", "plots"):
        shutil.rmtree(mine.run / name)
    (mine.run / "report.html").unlink()
    memory.limit_micro_batch(mine.run / "checkpoints", 3)
    again = trained(experiment_name="mine", per_gpu_batch_size=6)
    assert load_checkpoint(list_checkpoints(again.run / "checkpoints")[-1]).state.micro_batch == 3


@needs_gpu
def test_gpu_memory_model_predicts_the_peak_and_auto_batch_trains(trained):
    gpu = torch.device("cuda")
    vit = model(train="all").to(gpu)
    shape = Preprocessing(n_frames=FRAMES, frame_size=SIZE)
    own = Probe(
        Built(vit, vit.config, shape, None), vit, make_accelerator(device="cuda", mixed_precision="no")
    )
    terms = own.memory_model()
    own.run(vit, 1)
    measured = peak_bytes(lambda: own.run(vit, 64), gpu)
    assert terms.workspace + 64 * terms.activations_per_clip == pytest.approx(measured, rel=0.2)
    trained(device="cuda", per_gpu_batch_size="auto", global_batch_size=8)


@needs_gpu
def test_on_a_gpu_running_out_of_memory_is_survived(trained):
    free, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (total - free + 60e6) / total))
    try:
        trained(device="cuda", per_gpu_batch_size=12, img_size=224, mixed_precision="no")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_on_a_cpu_a_process_may_take_its_share_of_half_of_what_is_free(monkeypatch):
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 8_000)
    assert [memory.free_bytes(torch.device("cpu"), count) for count in (1, 2)] == [4_000, 2_000]


def test_auto_micro_batch_is_the_largest_fitting_divisor():
    terms = MemoryModel(
        weights=1000, gradients=10, moments=20, average=0, workspace=0, activations_per_clip=100
    )
    tried = []

    def fits(clips):
        tried.append(clips)
        return clips <= 3

    assert largest_that_fits(12, terms, free=700, fits=fits) == 3
    assert tried == [6, 4, 3]  # 12 is too much by the model, the weights being there already
    assert largest_that_fits(12, terms, free=100, fits=fits) is None


@pytest.mark.parametrize(
    ("changes", "processes", "expected"),
    [
        ({}, 1, 4),
        ({"gradient_accumulation_steps": 3}, 2, 24),
        ({"per_gpu_batch_size": "auto"}, 2, 16),
        ({"per_gpu_batch_size": "auto", "gradient_accumulation_steps": 2}, 1, 16),
        ({"global_batch_size": 24}, 2, 24),
        ({"per_gpu_batch_size": "auto", "global_batch_size": 6}, 2, 6),
    ],
)
def test_the_global_batch_is_what_was_given_or_what_the_default_comes_to(changes, processes, expected):
    assert global_batch(settings(**changes), processes) == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"global_batch_size": 10}, r"--global-batch-size 10: .* 2 × --per-gpu-batch-size 4. Take 8 or 16"),
        ({"global_batch_size": 1, "per_gpu_batch_size": "auto"}, r"no multiple of 2 processes. Take 2"),
    ],
)
def test_a_global_batch_that_cannot_be_cut_evenly_is_refused(changes, words):
    with pytest.raises(SettingsError, match=words):
        global_batch(settings(**changes), 2)


def test_a_global_batch_is_accumulated_over_passes_and_says_so(trained):
    with pytest.raises(ValueError, match="--gradient-accumulation-steps 2: --global-batch-size sets it"):
        settings(global_batch_size=8, gradient_accumulation_steps=2)
    cut = trained(per_gpu_batch_size=4, global_batch_size=8, epochs=1)
    assert same(
        last_weights(cut),
        last_weights(trained(per_gpu_batch_size=4, gradient_accumulation_steps=2, epochs=1)),
    )


def test_an_automatic_micro_batch_keeps_the_update_and_is_found_once(trained, inputs, tmp_path, monkeypatch):
    events = []
    own = settings(
        **inputs, working_directory=tmp_path, per_gpu_batch_size="auto", global_batch_size=8,
        experiment_name="auto", epochs=4,
    )  # fmt: skip
    per_clip = Probe.memory_model

    def as_if(self):
        return dataclasses.replace(
            per_clip(self), workspace=0, activations_per_clip=1000, moments=0, gradients=0
        )

    monkeypatch.setattr(Probe, "memory_model", as_if)
    monkeypatch.setattr(memory, "free_bytes", lambda device, processes: 2999)
    found = train(own, events.append)
    plan = next(e.facts["batch"] for e in events if isinstance(e, TrainingStarts))
    assert plan == "global batch 8 = 1 process × 2 clips × 4 accumulation"
    typed = trained(per_gpu_batch_size=2, global_batch_size=8, epochs=4)
    assert same(last_weights(found), last_weights(typed))
    written = json.loads((found.run / "settings.json").read_text())
    assert (written["per_gpu_batch_size"], written["global_batch_size"]) == (2, 8)

    def never(self):
        raise AssertionError("it is looked for twice")

    monkeypatch.setattr(Probe, "memory_model", never)
    shutil.rmtree(list_checkpoints(found.run / "checkpoints")[-1])
    shutil.rmtree(found.model)
    again = train(own)  # the same command: the named experiment goes on
    assert again.run == found.run and same(last_weights(again), last_weights(typed))


def test_without_room_for_one_clip_an_automatic_micro_batch_gives_advice(trained, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "free_bytes", lambda device, processes: 10)
    with pytest.raises(RunError, match=r"not even one clip fits.*--gradient-checkpointing.*--img-size 32"):
        trained(per_gpu_batch_size="auto")
    assert not list(tmp_path.iterdir())


def counting(monkeypatch):
    """torch.compile with a back end that notes down the shapes of the graphs that it runs as they are."""
    shapes = []
    real = torch.compile

    def backend(graph, inputs):
        shapes.append(next(tuple(i.shape) for i in inputs if i.dim() == 5))
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model, **how: real(model, backend=backend, **how))
    return shapes


def test_compiled_run_compiles_each_size_once_and_keeps_names(trained, monkeypatch):
    what = {"per_gpu_batch_size": 5, "lora_dropout": 0.0, "gradient_checkpointing": True}
    plain = trained(**what)
    torch.compiler.reset()
    shapes = counting(monkeypatch)
    compiled = trained(**what, compile=True)
    assert [shape[0] for shape in shapes] == [5, 2]  # 12 clips: 5, 5, 2, in each of two epochs
    a, b = last_weights(plain), last_weights(compiled)
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own, while it loads
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiler_gives_the_numbers_of_the_plain_module():
    torch.compiler.reset()
    plain = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    fast = compile_model(plain, CPU)
    clips = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fast(clips), plain(clips))
    assert type(fast) is not nn.Sequential


def test_without_a_compiler_compilation_is_refused_in_a_sentence(trained, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    said = r"--compile: PyTorch needs a C\+\+ compiler; no-such-compiler is missing"
    with pytest.raises(SettingsError, match=said):
        trained(compile=True)
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_compiled_ends_with_a_sentence(trained, monkeypatch):
    torch.compiler.reset()
    real = torch.compile

    def backend(graph, inputs):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(torch, "compile", lambda model, **how: real(model, backend=backend, **how))
    said = r"--compile: PyTorch could not compile the model: .*no such instruction"
    with pytest.raises(RunError, match=said):
        trained(compile=True)


def test_a_dry_run_says_what_a_training_takes_and_writes_nothing(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = settings(**inputs, working_directory=tmp_path)
    words = [f"--{k.replace('_', '-')}={getattr(own, k)}" for k in own.model_fields_set - {"device"}]
    cli.build_app()(["train", "--dry-run", "--device", "cpu", *words], standalone_mode=False)
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["batch"].strip() == "global batch 4 = 1 process × 4 clips × 1 accumulation"
    assert shown["steps"].strip() == "2 epochs of 3 steps"
    assert not list(tmp_path.iterdir())


def test_a_dry_run_counts_what_frozen_weights_spare(inputs, tmp_path):
    def plan(**changes):
        return dry_run(settings(**inputs, working_directory=tmp_path, **changes))

    lora, everything, classifier = plan(lora_rank=1), plan(train="all"), plan(train="classifier")
    forward = everything.forward_flops
    embedding = 2 * (FRAMES * 4) * (3 * 16 * 16) * 16  # its input, the frames, gets no gradient
    assert everything.pass_flops == pytest.approx(3 * forward - embedding, rel=0.02)
    assert classifier.pass_flops == pytest.approx(forward, rel=0.02)
    assert lora.pass_flops == pytest.approx(2 * forward - embedding, rel=0.1)
    again = plan(lora_rank=1, gradient_checkpointing=True)
    assert again.pass_flops == pytest.approx(3 * forward - 2 * embedding, rel=0.1)
    assert lora.trainable < lora.parameters == 4 * lora.memory.weights // 16
    assert lora.seconds_per_epoch == pytest.approx(3 * lora.seconds_per_step + lora.validation_seconds)
    assert 0 < lora.data_wait < 1 and lora.validation_seconds > 0
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_the_demo_makes_its_data_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clips = make_clips(tmp_path / "clips")
    monkeypatch.setattr(
        "tvit_cli.engine.train.dryrun.make_demo_data", lambda root, report: shutil.copytree(clips, root)
    )
    notes = []
    plan = dry_run(
        settings(path_to_data="motions", hf_model_name=None, width=16, depth=1, num_heads=2), notes.append
    )
    assert plan.folder == Path("working_directory/motions-1") and "motions: 3 classes" in plan.data
    assert any("temporary folder" in e.text for e in notes if isinstance(e, Note))
    assert [p.name for p in tmp_path.iterdir()] == ["clips"]
