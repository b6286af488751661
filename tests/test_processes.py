"""Devices, precision and several processes: launchers, equal losses, errors of a rank."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import entry
import pytest
import torch
from fuse import sitecustomize
from tiny import last_weights, make_clips, make_pretrained, records, run, run_in, settings

from tvit_cli import cli
from tvit_cli.data.layout import read_layout
from tvit_cli.engine import launch
from tvit_cli.engine.dataset import unreadable_videos
from tvit_cli.engine.distributed import default_worker_count, local_processes
from tvit_cli.engine.evaluate import scoring
from tvit_cli.engine.launch import SHARDING, make_accelerator
from tvit_cli.engine.train import batches, train
from tvit_cli.engine.train.checkpoint import list_checkpoints, load_checkpoint
from tvit_cli.errors import CheckpointError, ModelError, SettingsError
from tvit_cli.results import Note
from tvit_cli.settings.types import GROUP_PATTERN

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """24 clips to train on, three steps of 8 in each of four epochs, and no dropout."""
    root = tmp_path_factory.mktemp("processes")
    return {
        "path_to_data": str(make_clips(root / "colours", groups=10)),
        "hf_model_name": str(make_pretrained(root / "tiny-vit")),
        "epochs": 4,
        "lora_dropout": 0.0,
        "experiment_name": "mine",
    }


@pytest.fixture
def taken_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def start(words, cwd=None, **variables):
    path = os.pathsep.join([str(ROOT / "tests" / "fuse"), str(ROOT)])
    first = () if str(words[0]).endswith(".py") else ("-m",)
    return entry.start(*first, *words, cwd=cwd, **{"PYTHONPATH": path, **variables})


def start_ranks(*words, cwds=(None, None)):
    """Starts `python WORDS` in a process per folder, of one group, as SLURM does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    place = {"WORLD_SIZE": str(len(cwds)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start(words, cwd=cwd, **place, RANK=str(rank), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
        for rank, cwd in enumerate(cwds)
    ]


def in_float64(monkeypatch):
    """Makes this process compute in float64, as FLOAT64 does a child process."""
    for module, name in ((batches, "train_transform"), (scoring, "eval_transform")):
        monkeypatch.setattr(module, name, getattr(module, name))
    sitecustomize.float64_in_inputs(batches)
    sitecustomize.float64_in_scoring(scoring)


def losses(runs):
    lines = map(json.loads, (runs / "mine" / "metrics.jsonl").read_text().splitlines())
    return [line["train_loss"] for line in lines if line["kind"] == "step"]


@pytest.mark.parametrize("ending", ["well", "refused"])
def test_processes_part_before_they_end(facts, tmp_path, ending):
    """gloo's threads, left running, now and then abort a process that has done its work, which then has failed."""
    own = settings(**{**facts, "epochs": 1, "working_directory": tmp_path})
    if ending == "refused":
        own = own.model_copy(update={"path_to_data": str(tmp_path / "nothing")})
    (tmp_path / "own.json").write_text(own.model_dump_json())
    (tmp_path / "program.py").write_text(
        "import atexit\n"
        "from torch import distributed\n"
        "from tvit_cli.cli import run\n"
        "atexit.register(lambda: print('together' if distributed.is_initialized() else 'parted', flush=True))\n"
        f"run(['train', '--config', {str(tmp_path / 'own.json')!r}, '-q'])\n"
    )
    words = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "program.py")]
    output, errors = start(words).communicate(timeout=120)
    assert output.count("parted") >= 1 and "together" not in output, errors


def test_adapters_have_one_process_gradients_under_ddp_and_fsdp(tmp_path):
    """The layers alone, as in loops of others."""
    program = str(ROOT / "tests" / "wrapped.py")
    child = start(["torch.distributed.run", "--standalone", "--nproc-per-node", "2", program, str(tmp_path)])
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["DDP 0", "DDP 1", "FSDP 0", "FSDP 1"]


CUTS = [(4, 1), (2, 2), (3, 3)]  # micro-batch and accumulation of one of two processes


def test_losses_in_float64_do_not_depend_on_the_world_size(facts, tmp_path, monkeypatch, taken_port):
    """Two processes are started by --num-processes, which finds a free port of its own."""
    changes = {"num_processes": 2, "epochs": 2}
    children = []
    for micro, passes in CUTS:
        batch = {"per_gpu_batch_size": micro, "gradient_accumulation_steps": passes}
        own = settings(**{**facts, **changes, **batch}, working_directory=tmp_path / f"two {passes}")
        (tmp_path / f"{passes}.json").write_text(own.model_dump_json())
        words = ["tvit_cli", "train", "--config", str(tmp_path / f"{passes}.json")]
        children.append(start(words, FLOAT64="1", MASTER_PORT=str(taken_port), OMP_NUM_THREADS="1"))
    facts = {**facts, "epochs": 2}
    run(**facts, working_directory=tmp_path / "float32", per_gpu_batch_size=8)
    try:
        in_float64(monkeypatch)
        run(**facts, working_directory=tmp_path / "one 1", per_gpu_batch_size=8)
        run(
            **facts, working_directory=tmp_path / "one 2", per_gpu_batch_size=4, gradient_accumulation_steps=2
        )
        run(**facts, working_directory=tmp_path / "one 3", per_gpu_batch_size=18)
    finally:
        torch.set_default_dtype(torch.float32)
    for child in children:
        _, errors = child.communicate(timeout=200)
        assert child.returncode == 0, errors
    one = losses(tmp_path / "one 1")
    assert len(one) == 6
    for a, b in (("one 1", "one 2"), *((f"one {passes}", f"two {passes}") for _, passes in CUTS)):
        pairs = zip(losses(tmp_path / a), losses(tmp_path / b), strict=True)
        assert max(abs(a - b) for a, b in pairs) < 1e-9
    # It is float64 that was tested: in float32 the losses differ by more.
    assert max(abs(a - b) for a, b in zip(one, losses(tmp_path / "float32"), strict=True)) > 1e-9


def test_out_of_memory_in_a_process_is_resumed_with_smaller_batches(facts, tmp_path, monkeypatch):
    """Resumed by as many processes, and by one, it has the weights of a run that was not interrupted."""
    facts = {**facts, "epochs": 2, "per_gpu_batch_size": 4}
    own = settings(**facts, working_directory=tmp_path / "two", num_processes=2)
    (tmp_path / "c.json").write_text(own.model_dump_json())
    fuse = {"phase": "pass", "nth": 5, "how": "out of memory", "target": "self", "rank": 1}
    fuse |= {"marker": str(tmp_path / "marker"), "folder": str(tmp_path / "two"), "filler": None}
    words = ["tvit_cli", "train", "--config", str(tmp_path / "c.json")]
    child = start(words, FLOAT64="1", FUSE=json.dumps(fuse), OMP_NUM_THREADS="1")
    _, errors = child.communicate(timeout=200)
    assert child.returncode == 75, errors
    message = (
        "Step 5: process 1 is out of memory with 4 clips per forward pass. With 2, updates are the same."
    )
    assert errors.count(message) == errors.count("error:") == 1, errors
    command = re.search(r"tvit (train --resume-from-checkpoint \S+)", errors)[1].split()
    shutil.copytree(tmp_path / "two", tmp_path / "alone")
    child = start(["tvit_cli", *command], FLOAT64="1", OMP_NUM_THREADS="1")
    try:
        in_float64(monkeypatch)
        whole = run(**{**facts, "per_gpu_batch_size": 8}, working_directory=tmp_path / "one")
        events = []
        own = settings(**facts, resume_from_checkpoint="latest", working_directory=tmp_path / "alone")
        alone = train(own, events.append)
    finally:
        torch.set_default_dtype(torch.float32)
    _, errors = child.communicate(timeout=200)
    assert child.returncode == 0 and "Memory ran out with more than 2 clips" in errors, errors
    said = [event.text for event in events if isinstance(event, Note) and event.level == "warning"]
    assert any("written by 2 processes, and this is 1: updates are the same up to" in text for text in said)
    right = last_weights(whole)
    for resumed in (run_in(tmp_path / "two" / "mine"), alone):
        found, state = (
            last_weights(resumed),
            load_checkpoint(list_checkpoints(resumed.run / "checkpoints")[-1]).state,
        )
        assert all(torch.allclose(found[name], right[name], atol=1e-6, rtol=0) for name in right)
        assert (state.micro_batch, state.global_batch) == (2, 8)


def test_accelerate_launch_starts_it_as_it_stands(facts, tmp_path):
    """`accelerate launch --cpu` starts one process whatever --num_processes says, so --multi_gpu and --device cpu."""
    common = {**facts, "epochs": 2, "per_gpu_batch_size": 4}
    own = settings(**common, working_directory=tmp_path / "two")
    (tmp_path / "c.json").write_text(own.model_dump_json())
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = str(server.getsockname()[1])
    launcher = [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", free,
    ]  # fmt: skip
    child = start(
        [*launcher, "-m", "tvit_cli", "train", "--config", str(tmp_path / "c.json"), "--device", "cpu"]
    )
    run(**common, working_directory=tmp_path / "one", gradient_accumulation_steps=2)
    out, errors = child.communicate(timeout=200)
    assert child.returncode == 0 and "cpu:0 × 2" in errors, errors
    assert out.count("The model is in") == 1
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_a_port_that_is_taken_is_named(facts, tmp_path, taken_port):
    own = settings(**facts, working_directory=tmp_path / "runs")
    (tmp_path / "c.json").write_text(own.model_dump_json())
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    child = start(
        ["tvit_cli", "train", "--config", str(tmp_path / "c.json")], **place, MASTER_PORT=str(taken_port)
    )
    _, errors = child.communicate(timeout=100)
    assert child.returncode == 1
    assert f"127.0.0.1, port {taken_port}: the port is in use. Set MASTER_PORT" in errors
    assert "Traceback" not in errors and not (tmp_path / "runs").exists()


FAKES = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1; exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$FAKE_LOG"; fi',
    "tvit": f'exec {shlex.quote(sys.executable)} -m tvit_cli "$@"',
}


@pytest.fixture
def slurm(tmp_path):
    """Variables of a job, and a PATH on which SLURM's commands are ours: they start one process, and note requeues."""
    for name, text in FAKES.items():
        fake = tmp_path / "bin" / name
        fake.parent.mkdir(exist_ok=True)
        fake.write_text(f"#!/usr/bin/env bash\n{text}\n")
        fake.chmod(0o755)
    environ = {k: v for k, v in os.environ.items() if not k.startswith("TVIT_")}
    with socket.create_server(("127.0.0.1", 0)) as server:
        job = server.getsockname()[1]
    return {
        **environ, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{environ['PATH']}", "PYTHONPATH": str(ROOT),
        "SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": "nodes", "FAKE_LOG": str(tmp_path / "scontrol.log"),
        "TVIT_WORKING_DIRECTORY": str(tmp_path / "runs"),
    }  # fmt: skip


def test_the_slurm_script_saves_on_sigusr1_is_queued_again_and_goes_on(facts, tmp_path, slurm):
    script = ROOT / "examples" / "slurm.sh"
    own = settings(**{**facts, "experiment_name": None, "epochs": 12})
    (tmp_path / "c.json").write_text(own.model_dump_json(exclude={"working_directory"}))
    words = ["bash", str(script), "mine", "--config", str(tmp_path / "c.json")]
    whole = tmp_path / "runs" / "mine"
    whole.mkdir(parents=True)
    (whole / "settings.json").touch()  # begun, and killed before its first checkpoint
    job = subprocess.Popen(words, env=slurm, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (whole / "metrics.jsonl").exists() and job.poll() is None:
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    _, errors = job.communicate(timeout=100)
    assert job.returncode == 75 and "Stopped by SIGUSR1 after step" in errors, errors
    assert (tmp_path / "scontrol.log").read_text().split() == ["requeue", slurm["SLURM_JOB_ID"]]
    again = subprocess.run(words, env=slurm, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0 and "Resuming from step-" in again.stderr, again.stderr
    assert (whole / "model" / "card.json").is_file()
    assert (tmp_path / "scontrol.log").read_text().count("requeue") == 1
    (tmp_path / "bin" / "tvit").write_text("#!/usr/bin/env bash\necho $TVIT_NUM_WORKERS $@\n")
    shutil.rmtree(whole / "checkpoints")
    third = subprocess.run(words, env=slurm, capture_output=True, text=True, timeout=100)
    assert third.stdout.split() == ["7", "train", "--experiment-name", "mine", "--config", words[-1]]


def test_the_slurm_script_is_sound_and_asks_for_what_its_header_says():
    script = ROOT / "examples" / "slurm.sh"
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).stderr == b""
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", script.read_text(), re.MULTILINE))
    assert asked["signal"] == "B:USR1@120" and "requeue" in asked
    # every process sees all GPUs, and takes its own
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]


@pytest.mark.parametrize(
    ("variables", "count"),
    [({}, 1), ({"WORLD_SIZE": "8"}, 8), ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, 4)],
)
def test_cores_are_shared_by_the_processes_of_this_machine(monkeypatch, variables, count):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(32)), raising=False)
    assert local_processes() == count
    assert default_worker_count() == min(16, 32 // count - 1)


def test_processes_started_by_slurm_know_their_world_size(tmp_path):
    code = (
        "import os\nfrom tvit_cli.engine.launch import SHARDING, make_accelerator\n"
        "from tvit_cli.engine.distributed import local_processes\n"
        "for _ in range(2): make_accelerator(device='cpu', mixed_precision='no')\n"
        "print(local_processes(), flush=True)\n"
        "from tvit_cli.engine.distributed import shutdown\nshutdown(graceful=True)"
    )
    (tmp_path / "told.py").write_text(code)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    facts = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("TVIT_", "LOCAL_"))} | facts
    both = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "told.py")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**environ, "PYTHONPATH": str(ROOT), "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in "01"
    ]  # fmt: skip
    for process in both:
        out, errors = process.communicate(timeout=100)
        assert process.returncode == 0 and out.split() == ["2"], errors


def test_a_clip_that_another_process_could_not_read_is_named(facts, tmp_path):
    data = tmp_path / "data" / "colours"
    shutil.copytree(facts["path_to_data"], data)
    layout = read_layout(data, group_pattern=GROUP_PATTERN, val_groups="none", test_groups="none")
    unreadable_videos(layout.videos, data, workers=1)
    for path in sorted(data.glob("*/*.avi"))[::3]:  # spoilt since they were found good
        facts_before = path.stat()
        path.write_bytes(bytes(facts_before.st_size))
        os.utime(path, ns=(facts_before.st_atime_ns, facts_before.st_mtime_ns))
    own = settings(**{**facts, "path_to_data": str(data), "epochs": 1, "num_workers": 0, "max_bad": "100%"})
    (tmp_path / "c.json").write_text(own.model_dump_json(exclude={"working_directory"}))
    words = ["train", "--config", str(tmp_path / "c.json"), "--working-directory", str(tmp_path / "runs")]
    child = start(["tvit_cli", *words, "--experiment-name", "by2", "--num-processes", "2"])
    outputs = [entry.tvit(*words, "--experiment-name", "by1").err, child.communicate(timeout=100)[1]]
    one, two = (sorted(re.findall(r"left out: (\S+):", text)) for text in outputs)
    assert one and one == two, outputs


def test_cpu_ranks_finish_where_there_are_fewer_gpus_than_ranks(facts, tmp_path):
    """Accelerate's barrier allocates on GPU number LOCAL_RANK, whatever device the processes use."""
    own = settings(**{**facts, "epochs": 1, "working_directory": tmp_path})
    store = {"path_to_data": facts["path_to_data"], "output": str(tmp_path / "store"), "num_workers": 0}
    (tmp_path / "program.py").write_text(
        "import torch, tvit_cli\n"
        "from tvit_cli.engine.distributed import shutdown\n"
        "from tvit_cli.engine.train import train\n"
        "from tvit_cli.settings.train import TrainSettings\n"
        "torch._C._get_accelerator = lambda *check: torch.device('cuda')\n"
        f"tvit_cli.extract(**{store!r})\n"
        f"train(TrainSettings.model_validate_json({own.model_dump_json()!r}))\n"
        "shutdown(graceful=True)\n"
    )
    for child in start_ranks(tmp_path / "program.py"):
        _, errors = child.communicate(timeout=100)
        assert child.returncode == 0, errors
    assert (tmp_path / "store" / "index.frames").is_file() and (tmp_path / "mine/model/card.json").is_file()


@pytest.mark.parametrize("changes", [{}, {"resume_from_checkpoint": "latest"}], ids=["new", "resumed"])
def test_machines_without_a_shared_folder_are_told_so_before_a_step(facts, mine, tmp_path, changes):
    """Two machines: each process starts in a folder of its own."""
    own = settings(**{**facts, "experiment_name": None, **changes}, working_directory="runs")
    (tmp_path / "c.json").write_text(own.model_dump_json(exclude_unset=True))
    (tmp_path / "0" / "runs").mkdir(parents=True)
    (tmp_path / "1" / "runs").mkdir(parents=True)
    mine.run.rename(tmp_path / "0" / "runs" / "mine")
    words = ["tvit_cli", "train", "--config", str(tmp_path / "c.json")]
    both = start_ranks(*words, cwds=[tmp_path / "0", tmp_path / "1"])
    errors = both[bool(changes)].communicate(timeout=100)[1]
    both[0].kill()  # its launcher would: one that resumes waits for the other
    for child in both:
        child.communicate(timeout=100)
    assert both[1].returncode, errors
    assert re.search(
        r"rocess 1, on .*All processes read checkpoints.*that all machines share\.$", errors, re.M
    ), errors
    assert "Traceback" not in errors and len(list((tmp_path / "0" / "runs").iterdir())) == 1


def test_ranks_exchange_numbers_over_gloo_and_join_within_minutes(monkeypatch):
    """Over NCCL each number would wait for all work of a GPU; collectives get longer than the start."""
    made, limits = [], []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.Accelerator", lambda **options: made.extend(options["kwargs_handlers"]))
    monkeypatch.setattr("accelerate.state.AcceleratorState._reset_state", lambda **options: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(launch, "pick_device", lambda name: torch.device(name))
    monkeypatch.setattr(launch, "resolve_precision", lambda *given: "no")
    monkeypatch.setattr(launch, "set_timeout", limits.append)
    for device in ("cpu", "cuda"):
        make_accelerator(device=device, mixed_precision="no")
    assert [group.backend for group in made[::2]] == ["gloo", "cpu:gloo,cuda:nccl"]
    assert {group.timeout for group in made[::2]} == {timedelta(minutes=10)}
    assert limits == [timedelta(hours=1)] * 2


def test_unreachable_first_process_is_named_before_data_is_read(facts, tmp_path):
    (tmp_path / "program.py").write_text(
        "import datetime\n"
        "from tvit_cli.cli import run\n"
        "from tvit_cli.engine import launch\n"
        "launch.JOIN_TIMEOUT = datetime.timedelta(seconds=1)\n"
        "run(['train', '--path-to-data', 'nothing'])\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    place = {
        "WORLD_SIZE": "2",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    with start([tmp_path / "program.py"], **place) as child:
        _, errors = child.communicate(timeout=50)
    assert child.returncode == 1 and "Traceback" not in errors, errors
    assert re.search(rf"could not connect at 127.0.0.1, port {port}: .* Check MASTER_ADDR", errors), errors


def test_second_training_in_a_process_uses_its_own_device(monkeypatch):
    mps = torch.device("mps")
    assert make_accelerator(device="cpu", mixed_precision="no").device.type == "cpu"
    monkeypatch.setattr(launch, "pick_device", lambda name: mps)
    monkeypatch.setattr("accelerate.PartialState.default_device", mps)
    assert make_accelerator(device="mps", mixed_precision="no").device == mps
    monkeypatch.undo()
    assert make_accelerator(device="cpu", mixed_precision="no").device.type == "cpu"


def test_gradients_are_not_divided_by_accelerates_accumulation(trained, monkeypatch, tmp_path):
    norms = []
    for steps in ("1", "4"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
        result = trained(epochs=1, working_directory=tmp_path / steps)
        norms.append([record["grad_norm"] for record in records(result)])
    assert norms[0] == norms[1]


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


def test_hidden_gpus_are_told_from_missing_ones(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ModelError, match=r"--device cuda: no GPU .* CUDA_VISIBLE_DEVICES=''\. Unset it"):
        launch.pick_device("cuda")


def test_precision_without_hardware_for_it_is_refused_or_kept_exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert launch.resolve_precision("no", torch.device("cuda")) == "no"
    assert not torch.backends.cudnn.allow_tf32
    assert launch.resolve_precision("fp16", torch.device("cuda")) == "fp16"
    with pytest.raises(SettingsError, match=r"--mixed-precision fp16: not supported on a CPU\."):
        launch.resolve_precision("fp16", torch.device("cpu"))


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


def test_auto_precision_is_recorded_and_resumed_as_resolved(trained):
    first = trained(mixed_precision="auto")
    assert json.loads((first.run / "settings.json").read_text())["mixed_precision"] == "no"
    path = str(first.run / "checkpoints" / "step-000003")
    trained(resume_from_checkpoint=path, mixed_precision="no")
    with pytest.raises(CheckpointError, match="--mixed-precision: no -> bf16"):
        trained(resume_from_checkpoint=path, mixed_precision="bf16")


@pytest.mark.parametrize("variable", SHARDING)
def test_a_model_split_between_processes_is_refused_with_the_reason(trained, monkeypatch, tmp_path, variable):
    monkeypatch.setenv(variable, "true")
    said = f"{variable}=true: .*not supported: Accelerate silently ignores it on a CPU"
    with pytest.raises(SettingsError, match=said):
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
