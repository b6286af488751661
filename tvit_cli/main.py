"""The `tvit` program: a table of contents, and how errors end it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import tvit_cli
from tvit_cli import commands, options
from tvit_cli.errors import TvitError
from tvit_cli.settings.eval import EvalSettings
from tvit_cli.settings.predict import PredictSettings
from tvit_cli.settings.train import TrainSettings

VERBS = (TrainSettings, EvalSettings, PredictSettings)


def build_app() -> typer.Typer:
    """The Typer app with all verbs."""
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
    app.command("train")(options.command(TrainSettings, commands.train, verbs=VERBS, preset=True))
    app.command("eval")(options.command(EvalSettings, commands.evaluate, verbs=VERBS, preset=False))
    app.command("predict")(options.command(PredictSettings, commands.predict, verbs=VERBS, preset=False))
    return app


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
    """Run the program and exit: 0, the exit code of a TvitError, 130 after Ctrl-C, 1 for our own mistakes.

    TVIT_DEBUG=1 shows tracebacks.
    """
    app = build_app()
    if os.environ.get("TVIT_DEBUG") == "1":
        app(arguments, prog_name="tvit")
    try:
        app(arguments, prog_name="tvit")
    except TvitError as error:
        _fail(error, error.exit_code)
    except KeyboardInterrupt:
        _fail(TvitError("interrupted"), 130)
    except BrokenPipeError:
        # The reader of our stdout is gone (`tvit … | head`): nothing is left to say, and closing would raise.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:  # noqa: BLE001  # the last resort: one sentence instead of a traceback
        text = f"{type(error).__name__}: {error}\nThis is a mistake in tvit itself; TVIT_DEBUG=1 shows where."
        _fail(TvitError(text), 1)


def _fail(error: TvitError, code: int) -> None:
    from tvit_cli.console import print_error

    print_error(error)
    sys.exit(code)
