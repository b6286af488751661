"""The folder of a run: its name, its lock, its settings, and the checkpoint to resume from."""

from __future__ import annotations

import json
import re
import shlex
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from socket import gethostname
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING

from tvit_cli.engine.dataset import data_name, find_data
from tvit_cli.engine.evaluate.files import METRICS_FILE
from tvit_cli.engine.train.checkpoint import CHECKPOINT_FILES, find_checkpoint, list_checkpoints
from tvit_cli.engine.train.trackers import FILES as TRACKER_FILES
from tvit_cli.engine.trained import is_series_run
from tvit_cli.errors import CheckpointError, ModelError, RunError, SettingsError, shorten
from tvit_cli.files import file_lock, files_below, foreign_files, remove_files
from tvit_cli.model.folder import BASE_FOLDER, MODEL_FOLDER, SETTINGS_FILE, load_card, own_files
from tvit_cli.settings.train import TrainSettings
from tvit_cli.settings.types import RUNS

if TYPE_CHECKING:
    from tvit_cli.engine.launch import ProcessGroup

LOCK_FILE = ".lock"
TEST = Path("eval", "test")  # evaluation of the test subset
# Entries that a training writes into its folder before its first checkpoint.
_FIRST_FILES = {SETTINGS_FILE, LOCK_FILE, BASE_FOLDER, f".{BASE_FOLDER}.writing", *TRACKER_FILES}
_TAKEN = "another training has just taken this name. Start again, or set another name with --experiment-name."
_PAGE = r"""(report|comparison)\.(html|writing)
    |plots/(loss|accuracy|learning_rate|confusion|per_class|reliability|confidence|coverage
        |gradient_norm|throughput|data_wait|changed_classes|runs)\.png"""
_OWN_FILES = rf"""(?x)
    \.lock|settings\.(json|writing)|(metrics|val_per_class)\.(jsonl|writing)
    |wandb-id|wandb/(latest-run|wandb-resume\.json|debug[^/]*\.log|(offline-)?run-[^/]+(/.+)?)
    |tensorboard/(.+/)?events\.out\.[^/]+
    |{_PAGE}
    |CHECKPOINTS/\.micro-batch-\d+
    |CHECKPOINTS/\.?step-\d{{6,}}(\.writing|\.removing)?/({CHECKPOINT_FILES.pattern})
    |export/\.[^/]+\.lock
    |(model|base|\.(model|base)\.writing/(new|old))/(card\.json|model\.safetensors)
    |eval/(.+/)?((metrics|comparison|summary)\.json|(scores|confusion)\.csv|{_PAGE})"""


@dataclass(frozen=True)
class Run:
    """A run's folder, its folder of checkpoints, and the checkpoint to resume from, if any."""

    folder: Path
    checkpoints: Path
    resume_from: Path | None
    begins_again: bool = False  # in the folder of a training that ended before its first checkpoint

    @property
    def model(self) -> Path:
        """The model folder of the run."""
        return self.folder / MODEL_FOLDER


def choose_run(settings: TrainSettings) -> Run:
    """Chooses the folder that a training writes to; `write_settings` makes it later.

    A named experiment that is not finished and scored is resumed; without a checkpoint it begins again. Raises
    SettingsError if it is finished or no run, unless --overwrite is set, CheckpointError for a missing checkpoint.
    """
    if settings.resume_from_checkpoint is not None:
        return find_run(settings)
    name = experiment_name(settings)
    folder = settings.working_directory / name
    checkpoints = folder / settings.checkpoint_dir
    if _is_new(folder) or settings.overwrite:
        check_replaceable(folder, settings)
        return Run(folder, checkpoints, None)
    if settings.experiment_name is not None and _has_no_checkpoint(folder):
        return Run(folder, checkpoints, None, begins_again=True)
    found = list_checkpoints(checkpoints)
    is_scored = not settings.test_at_end or (folder / TEST / METRICS_FILE).is_file()
    is_finished = (folder / MODEL_FOLDER).exists() and (is_scored or not found)
    if is_finished or not found:
        reason = f"{folder} is finished" if is_finished else f"{checkpoints} holds no checkpoint"
        further = train_further(folder, settings) if is_finished else ""
        raise SettingsError(f"--experiment-name {name}: {reason}. {choices_beside(folder)}{further}")
    return Run(folder, checkpoints, found[-1])


def train_further(folder: Path, settings: TrainSettings) -> str:
    """Advice for more epochs of a finished run, on lines of its own; "" without its model."""
    try:
        done = load_card(folder / MODEL_FOLDER).settings.get("epochs", 0)
    except ModelError:
        return ""
    of_series = is_series_run(folder.name)
    root, name = (folder.parent.parent, folder.parent.name) if of_series else (folder.parent, folder.name)
    more = settings.epochs - done if settings.epochs > done else settings.epochs
    new = next_name(root, re.sub(r"-\d+$", "", name), first=2)
    if folder.is_relative_to(Path.cwd()):
        folder, root = folder.relative_to(Path.cwd()), root.relative_to(Path.cwd())
    words = ["tvit", "train", "--from", str(folder), "--epochs", str(more), "--experiment-name", new]
    words += [] if root == RUNS else ["--working-directory", str(root)]
    return f"\nTo train it for {more} more {'epoch' if more == 1 else 'epochs'}:\n  {shlex.join(words)}"


def check_shared(folder: Path, group: ProcessGroup) -> None:
    """Raises RunError on all ranks unless all see the files of rank 0 in the working directory."""
    if group.processes == 1:
        return
    paths = (folder.absolute(), *folder.absolute().parents)
    depth = next(i for i, path in enumerate(paths) if path.is_dir())
    with ExitStack() as stack:
        marker = ""
        if group.is_main:
            with suppress(OSError):  # a folder that cannot be written is named later
                marker = Path(
                    stack.enter_context(NamedTemporaryFile(prefix=".tvit-", dir=paths[depth])).name
                ).name
        depth, marker = group.gather((depth, marker))[0]
        sees = not marker or (depth < len(paths) and (paths[depth] / marker).exists())
        for rank, (machine, its, sees_it) in enumerate(group.gather((gethostname(), str(paths[0]), sees))):
            if not sees_it:
                raise RunError(
                    f"--working-directory {its}: process {rank}, on {machine}, does not see the files of process 0 "
                    "there. All processes read checkpoints and models: name a folder that all machines share.",
                    by_all=True,
                )


def claim(run: Run, settings: TrainSettings) -> Run:
    """The run, or with the next free name if another unnamed training has just taken its folder.

    Makes the folder of an unnamed run.
    """
    if run.resume_from is not None or settings.experiment_name is not None:
        return run
    while True:
        try:
            run.folder.mkdir(parents=True)
        except FileExistsError:
            folder = settings.working_directory / experiment_name(settings)
            run = replace(run, folder=folder, checkpoints=folder / settings.checkpoint_dir)
        except OSError:
            return run  # `run_lock` names the reason
        else:
            return run


def choices_beside(*folders: Path) -> str:
    """Advice for a taken name; names --overwrite only if it would be accepted for all folders."""
    overwrite = "" if any(map(why_not_replaced, folders)) else ", or replace it with --overwrite"
    return f"Take another name with --experiment-name{overwrite}."


def why_not_replaced(folder: Path) -> str:
    """The reason why --overwrite must not remove a folder; "" for an empty folder, or a run with own files only.

    A run is recognised by its settings file. Links are not followed.
    """
    if folder.is_symlink():
        return f"{folder} is a link, and links are not followed"
    if _is_new(folder):
        return ""
    if (own := _own_files(folder)) is None:
        return f"{folder} is not the folder of a run, and holds {shorten(files_below(folder)) or 'other folders'}"
    foreign = foreign_files(folder, own)
    return f"{folder} holds files that tvit did not write: {shorten(foreign)}" if foreign else ""


def check_replaceable(folder: Path, settings: TrainSettings) -> None:
    """Raises SettingsError if the folder may not be overwritten, or holds the weights to start from."""
    if settings.overwrite and (reason := why_not_replaced(folder)):
        raise SettingsError(f"--overwrite: {reason}. Take another --experiment-name, or move them away.")
    for option, name in (("--hf-model-name", settings.hf_model_name), ("--from", settings.from_)):
        paths = named_paths(settings, name) if name else ()
        if any(path.absolute().resolve().is_relative_to(folder.absolute().resolve()) for path in paths):
            reason = f"{folder} holds the weights to start from, {option} {name}"
            raise SettingsError(f"--overwrite: {reason}. Take another --experiment-name.")


def named_paths(settings: TrainSettings, name: str) -> tuple[Path, ...]:
    """Possible paths of the value of --from: the path itself, and a run's below the working directory."""
    root = settings.working_directory
    if is_series_run(settings.experiment_name or ""):
        root = root.parent
    return Path(name).expanduser(), root / name


def experiment_name(settings: TrainSettings) -> str:
    """The value of --experiment-name, or the first free name for the data set."""
    if settings.experiment_name is not None:
        return settings.experiment_name
    return next_name(settings.working_directory, data_name(find_data(settings.path_to_data)))


def next_name(root: Path, data: str, *, first: int = 1) -> str:
    """The first free name of a run on a data set. ucf101-1, ucf101-2 taken -> ucf101-3"""
    pattern = re.compile(re.escape(data) + r"-(\d+)")
    names = [path.name for path in root.iterdir()] if root.is_dir() else []
    taken = [int(match[1]) for name in names if (match := pattern.fullmatch(name))]
    return f"{data}-{max([first - 1, *taken]) + 1}"


def find_run(settings: TrainSettings) -> Run:
    """The run of `--resume-from-checkpoint`: a run folder, at a path, of the named experiment, or the newest.

    Raises CheckpointError if there is none.
    """
    which = settings.resume_from_checkpoint
    assert which is not None
    path, root = Path(which), settings.working_directory
    if (path / SETTINGS_FILE).is_file():
        checkpoints = path.absolute() / settings.checkpoint_dir
        return Run(checkpoints.parent, checkpoints, find_checkpoint(checkpoints, "latest"))
    if path.is_dir() and len(path.parts) > 1:
        checkpoints = path.absolute().parent
        return Run(checkpoints.parent, checkpoints, find_checkpoint(checkpoints, path.name))
    if settings.experiment_name is not None:
        folder = root / settings.experiment_name
        if not folder.is_dir():
            raise CheckpointError(f"--experiment-name {settings.experiment_name}: no such run in {root}.")
    else:
        folders = [*root.glob("*/"), *root.glob("*/*/")]  # the second are runs of a series
        latest = {p: found[-1] for p in folders if (found := list_checkpoints(p / settings.checkpoint_dir))}
        if not latest:
            text = f"{root}: no run with a checkpoint to resume from. Leave --resume-from-checkpoint out."
            raise CheckpointError(text)
        folder = max(latest, key=lambda path: latest[path].stat().st_mtime)
    checkpoints = folder / settings.checkpoint_dir
    return Run(folder, checkpoints, find_checkpoint(checkpoints, which))


def saved_settings(run: Run) -> Path:
    """The settings file of a resumed run. Raises CheckpointError if it is missing."""
    path = run.folder / SETTINGS_FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, so the run cannot be resumed with its own settings.")
    return path


def write_settings(run: Run, settings: TrainSettings, *, is_alone: bool) -> None:
    """Writes the run's settings, which --config can read; `is_alone`: the run is locked (`run_lock`).

    Raises SettingsError if another training has taken the name, or may be busy in a run that begins again; RunError
    if the folder cannot be written.
    """
    if run.begins_again and not is_alone and not settings.overwrite:
        reason = "there are no locks here to exclude that another training is busy in it"
        advice = "Take another --experiment-name, or replace it with --overwrite."
        raise SettingsError(f"{run.folder} has no checkpoint, and {reason}. {advice}")
    excluded = {"resume_from_checkpoint", "overwrite", "show_settings"}
    text = settings.model_dump_json(exclude=excluded, indent=1) + "\n"
    path = run.folder / SETTINGS_FILE
    try:
        if run.resume_from is None:
            if settings.overwrite or (run.begins_again and _has_no_checkpoint(run.folder)):
                check_replaceable(run.folder, settings)
                _remove_own_files(run.folder)
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        else:
            temporary = path.with_suffix(".writing")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
    except FileExistsError:
        raise SettingsError(f"{run.folder}: {_TAKEN}") from None
    except OSError as error:
        advice = "Free some space, or set --working-directory."
        raise RunError(f"{run.folder}: cannot be written ({error.strerror}). {advice}") from error


def run_lock(run: Run) -> AbstractContextManager[bool]:
    """Makes the run's folder and locks it; yields whether the file system has locks.

    Loader workers do not inherit the lock: they may outlive a killed process by seconds. Raises RunError if another
    process holds it, or if the folder cannot be made.
    """
    busy = "another training is busy in it. Wait for it to end." if run.resume_from else _TAKEN
    return file_lock(run.folder / LOCK_FILE, f"{run.folder}: {busy}", inherited=False)


def _is_new(folder: Path) -> bool:
    return not folder.is_dir() or all(path.name == LOCK_FILE for path in folder.iterdir())


def _has_no_checkpoint(folder: Path) -> bool:
    """Whether the training of a folder was killed before its first checkpoint and left nothing of value."""
    others = [path for path in folder.iterdir() if path.name not in _FIRST_FILES]
    return not why_not_replaced(folder) and all(
        path.is_dir() and all(inside.name.startswith(".") for inside in path.iterdir()) for path in others
    )


def _own_files(folder: Path) -> re.Pattern[str] | None:
    """A pattern of the relative paths of files that tvit writes into a run; None if the folder is no run."""
    try:
        text = (folder / SETTINGS_FILE).read_text(encoding="utf-8")
        saved = json.loads(text) if text else {"path_to_data": "", "checkpoint_dir": "checkpoints"}
        saved["path_to_data"]  # every run has it
        pattern = _OWN_FILES.replace("CHECKPOINTS", re.escape(saved["checkpoint_dir"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    for export in (folder / "export").glob("*/"):
        if not export.is_symlink():
            pattern += rf"|export/{re.escape(export.name)}/({own_files(export).pattern})"
    return re.compile(pattern)


def _remove_own_files(folder: Path) -> None:
    """Removes a run's files except its lock; its settings last, so that a half-removed run is still a run."""
    own = _own_files(folder)
    if own is not None and not folder.is_symlink():
        names = [name for name in files_below(folder) if own.fullmatch(name) and name != LOCK_FILE]
        remove_files(folder, sorted(names, key=lambda name: name == SETTINGS_FILE))
