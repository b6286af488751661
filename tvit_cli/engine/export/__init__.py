"""`tvit export`: a trained model in another format, proved equal, and its upload to the hub."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

import tvit_cli
from tvit_cli.engine.export import adapter, huggingface, onnx, plain, program
from tvit_cli.engine.export.formats import Format, Job
from tvit_cli.engine.export.model_card import README_FILE, readme
from tvit_cli.engine.export.parity import Parity, Reference, compare, reference
from tvit_cli.engine.trained import open_trained
from tvit_cli.errors import RunError, SettingsError, shorten
from tvit_cli.files import foreign_files
from tvit_cli.model.folder import PARITY_FILE, own_files, replace_folder, sha256
from tvit_cli.results import Note, Report, silent
from tvit_cli.settings.export import ExportFormat, ExportSettings

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

LOGIN = "Log in with a token that may write (https://huggingface.co/settings/tokens): hf auth login"


REFUSED = (401, 403)  # HTTP: who are you; you may not


def check_login() -> None:
    """Raise RunError where nobody is logged in, or the hub does not answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise RunError(f"--push-to-hub: not logged in to the Hugging Face hub. {LOGIN}") from error
    except HfHubHTTPError as error:
        if _is_refused(error):
            raise RunError(
                f"--push-to-hub: the Hugging Face hub does not take this login. {LOGIN}"
            ) from error
        raise RunError(
            f"--push-to-hub: the Hugging Face hub answers with an error ({_said(error)}). Try later."
        ) from error
    except Exception as error:  # the hub's HTTP client, and so its errors, differ between hub versions
        raise RunError(
            f"--push-to-hub: the Hugging Face hub cannot be reached ({_said(error)}). Try later."
        ) from error


def publish(folder: Path, repository: str, *, private: bool) -> str:
    """Upload a folder and return the address of its repository, which is made if it is new.

    Raises RunError where the hub refuses or breaks off, and where a private repository is asked for and a public
    one is there: the hub leaves it public.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        is_open = private and not api.repo_info(repository).private
        if not is_open:
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload a tvit export")
    except Exception as error:  # as above
        if isinstance(error, HfHubHTTPError) and _is_refused(error):
            raise RunError(
                f"--push-to-hub {repository}: this login may not write there ({_said(error)}). The export is whole "
                f"in {folder}. {LOGIN}"
            ) from error
        again = f"hf upload {'--private ' if private else ''}{repository} {folder}"  # it makes the repository, too
        raise RunError(
            f"--push-to-hub {repository}: the upload broke off ({_said(error)}). The export is whole in {folder}; "
            f"go on with: {again}"
        ) from error
    if is_open:
        raise RunError(
            f"--private: {repository} is there and public, so nothing was uploaded. The export is whole in "
            f"{folder}. Make the repository private on its page (Settings), name another, or leave out --private."
        )
    return str(url)


def _is_refused(error: HfHubHTTPError) -> bool:
    return error.response is not None and error.response.status_code in REFUSED


def _said(error: Exception) -> str:
    """An error's text in one line: the hub's have several."""
    return " ".join(str(error).split())


FORMATS: dict[ExportFormat, Format] = {
    "safetensors": plain.FORMAT,
    "huggingface": huggingface.FORMAT,
    "onnx": onnx.FORMAT,
    "torch": program.FORMAT,
    "adapter": adapter.FORMAT,
}


@dataclass(frozen=True)
class ExportResult:
    """Where the export is, how large, what the proof found, and where it was uploaded."""

    output: Path
    bytes: int
    parity: Parity
    url: str | None


def export(settings: ExportSettings, report: Report = silent) -> ExportResult:
    """Write a model folder in another format, whole or not at all, and prove it on clips.

    Raises ModelError for the model or a package that is missing, SettingsError where something is in the way,
    RunError when the proof fails (nothing is written then), the disk is full, or the hub refuses.
    """
    trained = open_trained(
        settings.model, working_directory=settings.working_directory, device=torch.device("cpu"), verify=True
    )
    report(Note(f"Model: {trained.folder}"))
    for note in trained.notes:
        report(Note(note, "warning"))
    job = Job(trained, settings, report)
    output = settings.output or job.run / "export" / settings.format
    _check_free(output, settings)
    form = FORMATS[settings.format]
    form.check(job)
    if settings.push_to_hub is not None:
        check_login()
    with reference(job) as expected:
        try:
            with replace_folder(output) as folder:
                form.write(job, folder)
                parity = _proved(form, folder, expected, settings)
                (folder / README_FILE).write_text(readme(job, form, parity), encoding="utf-8")
                record = _record(job, parity, folder, form.packages)
                (folder / PARITY_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"{output}: the export cannot be written ({error}). Free some space, or choose another --output."
            ) from error
    url = None
    if settings.push_to_hub is not None:
        report(Note(f"Uploading to {settings.push_to_hub}"))
        url = publish(output, settings.push_to_hub, private=settings.private)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    return ExportResult(output, size, parity, url)


def _check_free(output: Path, settings: ExportSettings) -> None:
    if output.resolve() == Path.cwd():
        raise SettingsError(f"--output {output}: is the folder that you are in. Name one in it.")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / PARITY_FILE).is_file():
        raise SettingsError(f"{output}: exists and is no export. Name another folder with --output.")
    if output.is_symlink():
        raise SettingsError(
            f"{output}: is a link. Name the folder that it leads to, or another one, with --output."
        )
    if foreign := foreign_files(output, own_files(output)):
        raise SettingsError(
            f"{output}: holds files that tvit did not write: {shorten(foreign)}. Move them away, or name another "
            "folder with --output."
        )
    if not settings.overwrite:
        raise SettingsError(
            f"{output}: an export is there already. Replace it with --overwrite, or name another --output."
        )


def _proved(form: Format, folder: Path, expected: Reference, settings: ExportSettings) -> Parity:
    """How an export answers, read anew.

    Raises RunError where it does not answer as the model does, or it or a clip cannot be read.
    """
    try:
        with form.opened(folder) as answer:
            parity = compare(expected, answer, settings)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"--format {settings.format}: the proof broke off, so nothing was written: a file cannot be read "
            f"({error})."
        ) from error
    if parity.passed:
        return parity
    limit = "" if parity.logit_limit is None else f" (at most {parity.logit_limit:g})"
    raise RunError(
        f"--format {settings.format}: the export does not answer as the model does, so nothing was written. On "
        f"{parity.videos} clips ({parity.clips}): largest difference of a logit "
        f"{parity.max_logit_difference:.2g}{limit}, top-1 agreement {parity.top1_agreement:.3f} (at least "
        f"{parity.agreement_limit:g})." + (" Export without --int8." if settings.int8 else "")
    )


def _record(job: Job, parity: Parity, folder: Path, packages: tuple[str, ...]) -> dict[str, object]:
    """What parity.json holds: the proof, what it was made with, and the hash of every file."""
    settings = job.settings
    return {
        "format": settings.format,
        "with_preprocessing": settings.with_preprocessing,
        "int8": settings.int8,
        **parity.to_dict(),
        "weights_sha256": job.trained.card.weights_sha256,
        "tvit": tvit_cli.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": {name: metadata.version(name) for name in packages},
        "files": {
            path.relative_to(folder).as_posix(): sha256(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        },
    }
