"""The folder of a run: its name, its lock, its settings, and the checkpoint to resume from."""

from __future__ import annotations

import json
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from tvit_cli.engine.dataset import data_name, find_data
from tvit_cli.engine.evaluate.files import METRICS_FILE
from tvit_cli.engine.train.checkpoint import CHECKPOINT_FILES, find_checkpoint, list_checkpoints
from tvit_cli.engine.train.trackers import METRICS_FILE as RECORDS_FILE
from tvit_cli.engine.train.trackers import PER_CLASS_FILE, TENSORBOARD_FOLDER
from tvit_cli.errors import CheckpointError, RunError, SettingsError, shorten
from tvit_cli.files import file_lock, files_below, foreign_files, remove_files
from tvit_cli.model.folder import MODEL_FOLDER, SETTINGS_FILE, own_files
from tvit_cli.settings.train import TrainSettings

LOCK_FILE = ".lock"
# What a training writes into its folder before its first checkpoint.
_BEGUN = {SETTINGS_FILE, LOCK_FILE, RECORDS_FILE, PER_CLASS_FILE, TENSORBOARD_FOLDER, "wandb", "wandb-id"}
_BUSY = "another training is busy in it. Wait for it to end."
_TAKEN = (
    "another training has just taken this name. Start again, or give this one a name with --experiment-name."
)
# Names of the drawings that reports leave in plots/.
_DRAWINGS = (
    *("loss", "accuracy", "learning_rate", "confusion", "per_class", "reliability", "confidence", "coverage"),
    *("gradient_norm", "throughput", "data_wait", "changed_classes", "runs"),
)
TEST = Path("eval", "test")  # where the test subset's evaluation is written, beside the model


@dataclass(frozen=True)
class Run:
    """A run's folder, its folder of checkpoints, and the checkpoint to go on from, if any.

    One that `begins_again` was begun by a training that ended before its first checkpoint.
    """

    folder: Path
    checkpoints: Path
    resume_from: Path | None
    begins_again: bool = False

    @property
    def model(self) -> Path:
        """Where the trained model goes."""
        return self.folder / MODEL_FOLDER


def choose_run(settings: TrainSettings) -> Run:
    """Choose the folder that a training writes to; `write_settings` makes it, once all else was found good.

    A named experiment that is not finished, or is yet to be scored on the test subset, is gone on with; one that
    ended before its first checkpoint begins again. Raises SettingsError where it is finished, or is no training's,
    unless it is to be overwritten; CheckpointError where there is nothing to resume from.
    """
    if settings.resume_from_checkpoint is not None:
        return find_run(settings)
    name = experiment_name(settings)
    folder = settings.working_directory / name
    checkpoints = folder / settings.checkpoint_dir
    if _is_new(folder) or settings.overwrite:
        check_replaceable(folder, settings)
        return Run(folder, checkpoints, None)
    if settings.experiment_name is not None and _has_nothing(folder):
        return Run(folder, checkpoints, None, begins_again=True)
    choices = choices_beside(folder)
    known = list_checkpoints(checkpoints)
    is_scored = not settings.test_at_end or (folder / TEST / METRICS_FILE).is_file()
    if (folder / MODEL_FOLDER).exists() and (is_scored or not known):
        raise SettingsError(f"--experiment-name {name}: {folder} is finished. {choices}")
    if not known:
        raise SettingsError(f"--experiment-name {name}: {checkpoints} holds no checkpoint. {choices}")
    return Run(folder, checkpoints, known[-1])


def choices_beside(*folders: Path) -> str:
    """Advice where an experiment's name is taken; --overwrite only where it would be accepted for all folders."""
    if any(why_not_replaced(folder) for folder in folders):
        return "Take another name with --experiment-name."
    return "Take another name with --experiment-name, or replace it with --overwrite."


def why_not_replaced(folder: Path) -> str:
    """Why a folder is not a run that --overwrite may remove, "" where it is one or is empty.

    It has to be a run by its settings file, and hold no file that tvit did not write. Links are not followed.
    """
    if _is_new(folder) and not folder.is_symlink():
        return ""
    if folder.is_symlink():
        return f"{folder} is a link, and links are not followed"
    own = _own_files(folder)
    if own is None:
        return f"{folder} is not the folder of a run, and holds {shorten(files_below(folder)) or 'other folders'}"
    foreign = foreign_files(folder, own)
    return f"{folder} holds files that tvit did not write: {shorten(foreign)}" if foreign else ""


def check_replaceable(folder: Path, settings: TrainSettings) -> None:
    """Raise SettingsError where --overwrite must not remove a folder: it is no run of its own, holds other
    files, or the weights to begin with.
    """
    if settings.overwrite and (reason := why_not_replaced(folder)):
        raise SettingsError(f"--overwrite: {reason}. Take another --experiment-name, or move them away.")
    name = settings.hf_model_name
    if name and Path(name).expanduser().absolute().resolve().is_relative_to(folder.absolute().resolve()):
        raise SettingsError(
            f"--overwrite: {folder} holds the weights to begin with, --hf-model-name {name}. Take another "
            "--experiment-name."
        )


def experiment_name(settings: TrainSettings) -> str:
    """The name that was given, or the first free one on the data set."""
    if settings.experiment_name is not None:
        return settings.experiment_name
    return next_name(settings.working_directory, data_name(find_data(settings.path_to_data)))


def find_run(settings: TrainSettings) -> Run:
    """The run that `--resume-from-checkpoint` means: of the named experiment, at a path, or the newest."""
    which = settings.resume_from_checkpoint
    assert which is not None
    path = Path(which)
    if path.is_dir() and len(path.parts) > 1:
        checkpoints = path.absolute().parent
        return Run(checkpoints.parent, checkpoints, find_checkpoint(checkpoints, path.name))
    root = settings.working_directory
    if settings.experiment_name is not None:
        folder = root / settings.experiment_name
        if not folder.is_dir():
            raise CheckpointError(
                f"--experiment-name {settings.experiment_name}: there is no such run in {root}."
            )
    else:
        folders = [*root.glob("*/"), *root.glob("*/*/")]  # the second are runs of a series
        runs = [p for p in folders if list_checkpoints(p / settings.checkpoint_dir)]
        if not runs:
            raise CheckpointError(
                f"{root}: no run with a checkpoint to resume from. Leave --resume-from-checkpoint out."
            )
        folder = max(runs, key=lambda p: list_checkpoints(p / settings.checkpoint_dir)[-1].stat().st_mtime)
    checkpoints = folder / settings.checkpoint_dir
    return Run(folder, checkpoints, find_checkpoint(checkpoints, which))


def next_name(root: Path, data: str) -> str:
    """The first free name of a run on a data set. ucf101-1, ucf101-2 taken -> ucf101-3"""
    pattern = re.compile(re.escape(data) + r"-(\d+)")
    taken = (
        [int(m[1]) for p in root.glob(f"{data}-*") if (m := pattern.fullmatch(p.name))]
        if root.is_dir()
        else []
    )
    return f"{data}-{max(taken, default=0) + 1}"


def saved_settings(run: Run) -> Path:
    """The settings file of a run that is resumed."""
    path = run.folder / SETTINGS_FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: missing, so the run cannot be resumed with its own settings.")
    return path


def write_settings(run: Run, settings: TrainSettings, *, is_alone: bool) -> None:
    """Make the run's folder and store what the run was told, as --config reads it.

    `is_alone` says that `held` has a lock on it. Raises SettingsError where another training took a new run's
    name meanwhile, or may be busy in one that begins again.
    """
    if run.begins_again and not is_alone and not settings.overwrite:
        raise SettingsError(
            f"{run.folder}: was begun and has no checkpoint, and there are no locks here that would tell whether "
            "another training is busy in it. Take another --experiment-name, or replace it with --overwrite."
        )
    text = (
        settings.model_dump_json(exclude={"resume_from_checkpoint", "overwrite", "show_settings"}, indent=1)
        + "\n"
    )
    path = run.folder / SETTINGS_FILE
    try:
        if run.resume_from is None:
            if settings.overwrite or (run.begins_again and _has_nothing(run.folder)):
                check_replaceable(run.folder, settings)
                _remove_own_files(run.folder)
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        else:
            beside = path.with_suffix(".writing")
            beside.write_text(text, encoding="utf-8")
            beside.replace(path)
    except FileExistsError:
        raise SettingsError(f"{run.folder}: {_TAKEN}") from None
    except OSError as error:
        raise RunError(
            f"{run.folder}: cannot be written ({error.strerror}). Make room, or choose another --working-directory."
        ) from error


def run_lock(run: Run) -> AbstractContextManager[bool]:
    """Makes the run's folder and locks it; yields whether the file system has locks.

    Loader workers do not inherit the lock: they may outlive a killed process by seconds. Raises RunError if another
    process holds it, or if the folder cannot be made.
    """
    busy = f"{run.folder}: {_BUSY if run.resume_from else _TAKEN}"
    return file_lock(run.folder / LOCK_FILE, busy, inherited=False)


def _is_new(folder: Path) -> bool:
    return not folder.is_dir() or all(path.name == LOCK_FILE for path in folder.iterdir())


def _has_nothing(folder: Path) -> bool:
    """Whether a training began in a folder and was killed before there was anything to go on from, or to lose.

    So there is its settings file, and beside it nothing but its records and what it had not finished writing.
    """
    return not why_not_replaced(folder) and all(
        path.name in _BEGUN or _holds_nothing(path) for path in folder.iterdir()
    )


def _holds_nothing(path: Path) -> bool:
    return path.is_dir() and all(inside.name.startswith(".") for inside in path.iterdir())


def _own_files(folder: Path) -> re.Pattern[str] | None:
    """A pattern of the files that tvit writes into a run, by their relative paths; None where it is no run."""
    try:
        text = (folder / SETTINGS_FILE).read_text(encoding="utf-8")
        told = json.loads(text) if text else {"path_to_data": "", "checkpoint_dir": "checkpoints"}
        checkpoints = re.escape(told["checkpoint_dir"])
        told["path_to_data"]  # every run has it
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    page = rf"(report|comparison)\.(html|writing)|plots/({'|'.join(_DRAWINGS)})\.png"
    patterns = [
        r"\.lock|settings\.(json|writing)|(metrics|val_per_class)\.(jsonl|writing)|wandb-id",
        r"wandb/(latest-run|wandb-resume\.json|debug[^/]*\.log|(offline-)?run-[^/]+(/.+)?)|tensorboard/(.+/)?events\.out\.[^/]+",
        page,
        rf"{checkpoints}/\.?step-\d{{6,}}(\.writing|\.removing)?/({CHECKPOINT_FILES.pattern})",
        r"model/(card\.json|model\.safetensors)|\.model\.writing/(new|old)/(card\.json|model\.safetensors)",
        rf"eval/(.+/)?((metrics|comparison|summary)\.json|(scores|confusion)\.csv|{page})",
    ]
    exports = [path for path in (folder / "export").glob("*/") if not path.is_symlink()]
    patterns += [rf"export/{re.escape(path.name)}/({own_files(path).pattern})" for path in exports]
    return re.compile("|".join(f"({pattern})" for pattern in patterns))


def _remove_own_files(folder: Path) -> None:
    """Remove a run's files but its lock; settings go last: half removed, it is still known as a run."""
    own = _own_files(folder)
    if own is None or folder.is_symlink():
        return
    names = [name for name in files_below(folder) if own.fullmatch(name) and name != LOCK_FILE]
    remove_files(folder, sorted(names, key=lambda name: name == SETTINGS_FILE))
