"""The `tvit` program: a table of contents, and how errors end it."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

import tvit_cli
from tvit_cli import commands
from tvit_cli.errors import Interrupted, TvitError

if TYPE_CHECKING:
    from tvit_cli.options import Verbosity
    from tvit_cli.settings.base import Loaded, Settings

S = TypeVar("S", bound="Settings")
Command = Callable[..., None]


def _download() -> Command:
    """Bring a known data set into a tidy folder; run again, it does what is missing and nothing else."""
    from tvit_cli.settings.download import DownloadSettings

    return _command(DownloadSettings, commands.download)


def _train() -> Command:
    """Train a temporal Vision Transformer on a folder of videos."""
    from tvit_cli.settings.train import TrainSettings

    return _command(TrainSettings, commands.train, preset=True)


def _eval() -> Command:
    """Score a trained model on a subset, from one deterministic view of each video."""
    from tvit_cli.settings.eval import EvalSettings

    return _command(EvalSettings, commands.evaluate)


def _predict() -> Command:
    """Label videos with a trained model."""
    from tvit_cli.settings.predict import PredictSettings

    return _command(PredictSettings, commands.predict)


def _extract() -> Command:
    """Decode videos once into a frame store that is read many times, or check them."""
    from tvit_cli.settings.extract import ExtractSettings

    return _command(ExtractSettings, commands.extract)


def _export() -> Command:
    """Bring a trained model elsewhere (Hugging Face, ONNX, torch.export, PEFT) and prove it the same."""
    from tvit_cli.settings.export import ExportSettings

    return _command(ExportSettings, commands.export)


VERBS: dict[str, Callable[[], Command]] = {
    "download": _download,
    "extract": _extract,
    "train": _train,
    "eval": _eval,
    "predict": _predict,
    "export": _export,
}


def build_app(arguments: Sequence[str] | None = None) -> typer.Typer:
    """The Typer app for a command line.

    See Note [Only the verb that is typed]. Without arguments, all verbs get their options.
    """
    typed = None if arguments is None else {word for word in arguments if word in VERBS}
    app = typer.Typer(
        name="tvit",
        help="From a folder of videos to a trained, measured action classifier.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={
            "help_option_names": ["-h", "--help"],
            "token_normalize_func": lambda token: token.replace("_", "-"),  # --lora_rank is --lora-rank
        },
    )
    app.callback()(_program)
    for name, verb in VERBS.items():
        has_options = typed is None or name in typed
        app.command(name, help=verb.__doc__)(verb() if has_options else lambda: None)
    return app


# Note [Only the verb that is typed]
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
# A verb's options are made from its pydantic model, and importing pydantic takes longer than all the rest of
# `tvit --help`. So a verb gets its options only when its name is among the words typed; the others are listed
# with their sentence, which is all that --help shows of them. Shell completion builds every verb.


def _command(
    settings: type[S], run: Callable[[Loaded[S], Verbosity], None], *, preset: bool = False
) -> Command:
    from tvit_cli import options

    return options.command(settings, run, verbs=_all_settings, preset=preset)


def _all_settings() -> tuple[type[Settings], ...]:
    from tvit_cli.settings.download import DownloadSettings
    from tvit_cli.settings.eval import EvalSettings
    from tvit_cli.settings.export import ExportSettings
    from tvit_cli.settings.extract import ExtractSettings
    from tvit_cli.settings.predict import PredictSettings
    from tvit_cli.settings.train import TrainSettings

    return DownloadSettings, ExtractSettings, TrainSettings, EvalSettings, PredictSettings, ExportSettings


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"tvit {tvit_cli.__version__}")
        raise typer.Exit


def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the program and exit: 0, the exit code of a TvitError, 130 or 143 after a signal, 1 for our own mistakes.

    TVIT_DEBUG=1 shows tracebacks.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # See Note [Threads that wait must sleep]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # a name that a screen has no letters for ends nothing
    words = sys.argv[1:] if arguments is None else arguments
    app = build_app(None if "_TVIT_COMPLETE" in os.environ else words)
    if os.environ.get("TVIT_DEBUG") == "1":
        app(arguments, prog_name="tvit")
    is_main = threading.current_thread() is threading.main_thread()
    before = (
        signal.signal(signal.SIGTERM, _stop) if is_main else None
    )  # the first process of a container ignores it
    try:
        app(arguments, prog_name="tvit")
    except SystemExit:
        commands.part(well=True)
        raise
    except TvitError as error:
        _fail(error, error.exit_code)
    except OSError as error:
        _fail(TvitError(f"{error.filename or 'a file'}: {error.strerror or error}."), 1)
    except MemoryError as error:
        _fail(TvitError(f"Memory ran out{f' ({error})' if str(error) else ''}."), 1)
    except Exception as error:  # noqa: BLE001  # the last resort: one sentence instead of a traceback
        text = f"{type(error).__name__}: {error}\nThis is a mistake in tvit itself; TVIT_DEBUG=1 shows where."
        _fail(TvitError(text), 1)
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Interrupted("Stopped by SIGTERM. Start again with the same command.", exit_code=143)


# Note [Threads that wait must sleep]
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
# Between two operations, OpenMP's threads spin on their cores by default. Beside a process that decodes
# videos they then take the very core that the thread they wait for needs: on 2 busy cores, an epoch of the
# quickstart took 87 s spinning and 12 s sleeping (tests/bench/RESULTS.md). Torch reads this on import.


def _fail(error: TvitError, code: int) -> None:
    from tvit_cli.console import print_error

    print_error(error)
    commands.part(well=isinstance(error, Interrupted))
    sys.exit(code)
