"""`tvit export`: a trained model in another format, checked for parity, and its upload to the hub."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch
from safetensors import SafetensorError

import tvit_cli
from tvit_cli.engine.export import adapter, huggingface, onnx, pytorch
from tvit_cli.engine.export.formats import Format, Job
from tvit_cli.engine.export.model_card import README_FILE, readme
from tvit_cli.engine.export.parity import Parity, check_parity, reference
from tvit_cli.engine.trained import open_trained
from tvit_cli.errors import RunError, SettingsError, shorten
from tvit_cli.files import file_lock, files_below, foreign_files, sha256, write_json
from tvit_cli.model.folder import PARITY_FILE, own_files, replace_folder
from tvit_cli.results import Note, Report, silent, working
from tvit_cli.settings.export import ExportFormat, ExportSettings

LOGIN = "Log in with a token that may write (https://huggingface.co/settings/tokens): hf auth login"

FORMATS: dict[ExportFormat, Format] = {
    "safetensors": pytorch.SAFETENSORS,
    "huggingface": huggingface.FORMAT,
    "onnx": onnx.FORMAT,
    "torch": pytorch.PROGRAM,
    "adapter": adapter.FORMAT,
}


@dataclass(frozen=True)
class ExportResult:
    """Folder and size of an export, its parity, and the address of its upload."""

    output: Path
    bytes: int
    parity: Parity
    url: str | None


def export(settings: ExportSettings, report: Report = silent) -> ExportResult:
    """Writes a model folder in another format, whole or not at all, after a parity check on clips.

    Raises ModelError for the model or a missing package, SettingsError where another file is in the way,
    RunError when the parity check fails (nothing is written then), the disk is full, the hub refuses, or another
    export is writing the folder.
    """
    trained = open_trained(
        settings.model, working_directory=settings.working_directory, device=torch.device("cpu")
    )
    report(Note(f"Model: {trained.folder}"))
    for note in trained.notes:
        report(Note(note, "warning"))
    job = Job(trained, settings, report)
    output = settings.output or trained.run / "export" / settings.format
    _check_output(output, settings)
    FORMATS[settings.format].check(job)
    if settings.push_to_hub is not None:
        check_login()
    busy = f"{output}: another export is writing this folder. Wait for it to end, or name another --output."
    with file_lock(output.parent / f".{output.name}.lock", busy, stays=False):
        _check_output(output, settings)  # another export may have ended meanwhile
        parity, url = _write(job, output)
    size = sum((output / name).stat().st_size for name in files_below(output))
    return ExportResult(output, size, parity, url)


def _write(job: Job, output: Path) -> tuple[Parity, str | None]:
    """Writes and checks an export, and uploads it with --push-to-hub; returns its parity and its address."""
    settings, form = job.settings, FORMATS[job.settings.format]
    with reference(job) as expected:
        try:
            with replace_folder(output) as folder:
                with working(f"writing {settings.format}", job.report):
                    form.write(job, folder)
                parity = check_parity(form, folder, expected, job)
                (folder / README_FILE).write_text(readme(job, form, parity), encoding="utf-8")
                record = {
                    **settings.model_dump(include={"format", "with_preprocessing", "int8"}),
                    **asdict(parity),
                    "passed": parity.passed,
                    "weights_sha256": job.trained.card.weights_sha256,
                    "tvit": tvit_cli.__version__,
                    "python": platform.python_version(),
                    "machine": platform.machine(),
                    "packages": {name: metadata.version(name) for name in form.packages},
                    "files": {name: sha256(folder / name) for name in files_below(folder)},
                }
                write_json(folder / PARITY_FILE, record, indent=2)
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"{output}: the export cannot be written ({error}). Free some space, or choose another --output."
            ) from error
    url = None
    if settings.push_to_hub is not None:
        with working(f"uploading to {settings.push_to_hub}", job.report):
            url = publish(output, settings.push_to_hub, private=settings.private)
    return parity, url


def _check_output(output: Path, settings: ExportSettings) -> None:
    if output.resolve() == Path.cwd():
        reason = "is the current directory. Name a folder in it."
    elif not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    elif not (output / PARITY_FILE).is_file():
        reason = "exists and is no export. Name another folder with --output."
    elif output.is_symlink():
        reason = "is a link. Name its target, or another folder, with --output."
    elif foreign := foreign_files(output, own_files(output)):
        reason = f"has files that tvit did not write: {shorten(foreign)}. Move them away, or name another --output."
    elif not settings.overwrite:
        reason = "an export is there already. Replace it with --overwrite, or name another --output."
    else:
        return
    raise SettingsError(f"{output}: {reason}")


def check_login() -> None:
    """Raises RunError without a valid login, or where the hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        HfApi().whoami()
    except Exception as error:  # the hub's HTTP client, and so its errors, differ between hub versions
        if isinstance(error, LocalTokenNotFoundError):
            reason = f"not logged in to the Hugging Face hub. {LOGIN}"
        elif _is_refused(error):
            reason = f"the Hugging Face hub refuses this login. {LOGIN}"
        else:
            failed = "answers with an error" if isinstance(error, HfHubHTTPError) else "cannot be reached"
            reason = f"the Hugging Face hub {failed} ({_one_line(error)}). Try later."
        raise RunError(f"--push-to-hub: {reason}") from error


def publish(folder: Path, repository: str, *, private: bool) -> str:
    """Uploads a folder, creating the repository if needed, and returns the repository's address.

    Raises RunError where the hub refuses or the upload breaks off, and with `private` for an existing public
    repository, which the hub would leave public.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        is_public = private and not api.repo_info(repository).private
        if not is_public:
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload a tvit export")
    except Exception as error:  # as above
        if _is_refused(error):
            reason = f"this login has no write access ({_one_line(error)}). {LOGIN}"
        else:
            command = f"hf upload {'--private ' if private else ''}{repository} {folder}"
            reason = f"the upload broke off ({_one_line(error)}). Continue with: {command}"
        raise RunError(
            f"--push-to-hub {repository}: {reason}. The export is complete in {folder}."
        ) from error
    if is_public:
        raise RunError(
            f"--private: {repository} is a public repository, so nothing was uploaded. The export is complete in "
            f"{folder}. Make the repository private on its page, name another, or leave out --private."
        )
    return str(url)


def _is_refused(error: Exception) -> bool:
    return getattr(getattr(error, "response", None), "status_code", None) in (401, 403)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
