"""`tvit export`: a trained model in another form, with the proof that it answers the same."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from safetensors import SafetensorError

import tvit_cli
from tvit_cli.engine.events import Note, Report, silent
from tvit_cli.engine.export import adapter, huggingface, onnx, plain, program
from tvit_cli.engine.export.job import Format, Job
from tvit_cli.engine.export.parity import Parity, Reference, compare, reference
from tvit_cli.engine.export.publish import check_login, publish
from tvit_cli.engine.export.readme import README_FILE, readme
from tvit_cli.engine.trained import open_trained
from tvit_cli.errors import RunError, SettingsError
from tvit_cli.model.folder import PARITY_FILE, own_files, replacing, sha256
from tvit_cli.removal import foreign_files, some
from tvit_cli.settings.export import ExportFormat, ExportSettings

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
            with replacing(output) as folder:
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
            f"{output}: holds files that tvit did not write: {some(foreign)}. Move them away, or name another "
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
