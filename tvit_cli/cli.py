"""The `tvit` program: verbs and options made from the settings models, and errors turned into exit codes."""

from __future__ import annotations

import importlib
import inspect
import io
import os
import signal
import sys
import threading
import typing
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, cast

import typer

import tvit_cli
from tvit_cli import commands
from tvit_cli.errors import Interrupted, TvitError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from tvit_cli.settings.base import Settings


class Verb(NamedTuple):
    """One line of help, the name of the function in `commands`, and examples, one per line."""

    help: str
    run: str
    examples: str


# fmt: off
VERBS = {
    "download": Verb("Fetches a known data set; a repeated call fetches missing files only.", "download", """\
tvit download --list
tvit download motions
tvit download ucf101 --classes Archery,Bowling --clips-per-class 20
tvit download ucf101 --verify"""),
    "extract": Verb("Decodes videos once into a frame store for repeated reads, or checks them.", "extract", """\
tvit extract --path-to-data my_videos
tvit extract --path-to-data my_videos --check
tvit extract --path-to-data motions --frames-per-video 16"""),
    "train": Verb("Trains a temporal Vision Transformer on a folder of videos.", "train", """\
tvit train --preset quickstart
tvit train --path-to-data my_videos --experiment-name mine
tvit train --experiment-name mine --resume-from-checkpoint latest
tvit train --preset quickstart --seed 0,1,2"""),
    "eval": Verb("Evaluates a trained model on a subset.", "evaluate", """\
tvit eval
tvit eval --model working_directory/mine --subset val
tvit eval --clips-per-video 4 --crops-per-clip 3
tvit eval --compare working_directory/motions-1 working_directory/mine"""),
    "predict": Verb("Labels videos with a trained model.", "predict", """\
tvit predict clip.avi
tvit predict clips --model working_directory/mine --json
tvit predict match.mp4 --window 2s --output timelines
tvit predict clip.avi --explain explanation.png"""),
    "export": Verb("Exports a trained model (Hugging Face, ONNX, PEFT, …) and checks its parity.", "export", """\
tvit export
tvit export working_directory/mine --format huggingface
tvit export --format onnx --with-preprocessing"""),
}
# fmt: on


def settings_model(verb: str) -> type[Settings]:
    """Settings model of a verb, imported late. train -> TrainSettings"""
    model = getattr(importlib.import_module(f"tvit_cli.settings.{verb}"), f"{verb.title()}Settings")
    return cast("type[Settings]", model)


def build_app(arguments: Sequence[str] | None = None) -> typer.Typer:
    """The Typer app for a command line; without arguments, all verbs have their options.

    See Note [Options of the typed verb only].
    """
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
        function = _command(name) if arguments is None or name in arguments else lambda: None
        # Blank lines, because Typer joins lines that no blank line separates.
        epilog = "\n\n".join(["[bold]EXAMPLES[/]", *verb.examples.splitlines()])
        app.command(name, help=verb.help, epilog=epilog)(function)
    return app


# Note [Options of the typed verb only]
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
# Importing pydantic takes longer than the rest of `tvit --help`. Therefore only verbs among the typed words get
# options from their settings models; the others have one line of help. Shell completion builds every verb.


def _print_version(is_requested: bool) -> None:
    if is_requested:
        typer.echo(f"tvit {tvit_cli.__version__}")
        raise typer.Exit


def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Prints the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str] | None = None) -> None:
    """Runs the program and exits: 0, a TvitError's exit code, 130 or 143 after a signal, 1 for internal errors.

    TVIT_DEBUG=1 shows tracebacks.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # See Note [Waiting threads sleep]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # characters outside the terminal's encoding
    words = sys.argv[1:] if arguments is None else arguments
    app = build_app(None if "_TVIT_COMPLETE" in os.environ else words)
    if os.environ.get("TVIT_DEBUG") == "1":
        app(arguments, prog_name="tvit")
    is_main = threading.current_thread() is threading.main_thread()
    # PID 1 of a container ignores SIGTERM by default.
    before = signal.signal(signal.SIGTERM, _stop) if is_main else None
    try:
        app(arguments, prog_name="tvit")
    except SystemExit:
        commands.shut_down(graceful=True)
        raise
    except TvitError as error:
        _fail(error, error.exit_code)
    except OSError as error:
        _fail(TvitError(f"{error.filename or 'a file'}: {error.strerror or error}."), 1)
    except MemoryError as error:
        _fail(TvitError(f"Out of memory{f' ({error})' if str(error) else ''}."), 1)
    except Exception as error:  # noqa: BLE001  # the last resort: one sentence instead of a traceback
        text = f"{type(error).__name__}: {error}\nThis is a bug in tvit; TVIT_DEBUG=1 shows the traceback."
        _fail(TvitError(text), 1)
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Interrupted("Stopped by SIGTERM. Start again with the same command.", exit_code=143)


# Note [Waiting threads sleep]
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~
# By default, OpenMP threads spin between two operations and block the decoding processes: on 2 busy cores, an
# epoch of the quickstart took 87 s spinning, 12 s sleeping (docs/negative-results.md). Torch reads it on import.


def _fail(error: TvitError, code: int) -> None:
    from tvit_cli.console import print_error

    print_error(error)
    commands.shut_down(graceful=isinstance(error, Interrupted))
    sys.exit(code)


_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}

# Note [Options are text]
# ~~~~~~~~~~~~~~~~~~~~~~~
# Typer receives every option but a switch as text; pydantic alone converts and checks it. Its one validation sees
# all layers and reports all errors; Typer would stop at the first, and not check variables and config files.


def _command(name: str) -> Callable[..., None]:
    """A function with one parameter per setting of a verb, in the form that Typer reads."""
    from tvit_cli.settings.base import load

    model = settings_model(name)

    def body(config: str | None = None, preset: str | None = None, **given: Any) -> None:
        from tvit_cli.console import Console

        verbose, quiet = given.pop("verbose"), given.pop("quiet")
        flags = {key: value for key, value in given.items() if value is not None and value != []}
        file = Path(config) if config else None
        loaded = load(model, flags=flags, config=file, preset=preset, verbs=map(settings_model, VERBS))
        console = Console("verbose" if verbose else "quiet" if quiet else "normal")
        getattr(commands, VERBS[name].run)(loaded, console)

    annotations = {k: _annotation(k, f, is_series=k in model.SERIES) for k, f in model.model_fields.items()}
    annotations |= _common(with_preset=name == "train")
    defaults = dict.fromkeys(annotations) | {"verbose": False, "quiet": False}
    parameter = partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY)
    parameters = [parameter(k, default=defaults[k], annotation=a) for k, a in annotations.items()]
    body.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    body.__annotations__ = dict(annotations)
    return body


def describe(field: FieldInfo, *, is_series: bool = False) -> str:
    """Help of an option: description, range and default. Choices are in the metavar."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    limits = ", ".join(f"{words[w]} {getattr(m, w)}" for m in field.metadata for w in words if hasattr(m, w))
    series = "; several, as in 1,2,3, run one after the other" if is_series else ""
    return f"{field.description}{series} ({limits}{'; ' if limits else ''}default {default(field)})"


def default(field: FieldInfo) -> str:
    """Default of a field in words."""
    from tvit_cli.settings.base import extra

    if words := extra(field).get("default_text"):
        return str(words)
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None or isinstance(value, bool):
        return {None: "none", True: "on", False: "off"}[value]
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _annotation(key: str, field: FieldInfo, *, is_series: bool) -> Any:
    from tvit_cli.settings.base import base_type, extra, flag, is_optional

    facts = extra(field)
    kind = base_type(field)
    metavar: str | None = facts.get("metavar")
    if facts.get("positional"):
        argument = typer.Argument(help=field.description, metavar=metavar, show_default=False)
        return Annotated[str | None if kind in (str, Path) else list[str] | None, argument]
    names = [facts.get("flag") or flag(key), *([facts["short"]] if "short" in facts else [])]
    text: Any = str
    choices: tuple[str, ...] = ()
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and Ellipsis not in arguments:
        text = tuple[(str,) * len(arguments)]  # type: ignore[misc]
    elif kind is bool:
        text = bool
        names = names if "flag" in facts else [f"{flag(key)}/--no-{flag(key)[2:]}"]
    else:
        choices = arguments if origin is Literal else ()
        metavar = metavar or "|".join(choices) or _METAVARS.get(kind, "LIST")
        metavar += ",…" if is_series else ""
        metavar += "|none" if is_optional(field) and facts.get("resettable") else ""
    help_text = describe(field, is_series=is_series)
    return Annotated[text | None, _option(names, help_text, facts["panel"], metavar, choices)]


def _common(*, with_preset: bool) -> dict[str, Any]:
    from tvit_cli.settings.base import presets

    panel, names = "Everywhere", presets()
    config = _option(["--config"], "Settings from a TOML file or a run's settings.json.", panel, "FILE")
    verbose = _option(["--verbose", "-v"], "Prints details.", panel)
    quiet = _option(["--quiet", "-q"], "Prints results, warnings and errors only.", panel)
    preset = _option(["--preset"], f"Named set of settings: {', '.join(names)}.", panel, "NAME", names)
    options: dict[str, Any] = {"config": Annotated[str | None, config]}
    options |= {"verbose": Annotated[bool, verbose], "quiet": Annotated[bool, quiet]}
    return options | ({"preset": Annotated[str | None, preset]} if with_preset else {})


def _option(
    names: Sequence[str], text: str, panel: str, metavar: str | None = None, choices: Sequence[str] = ()
) -> Any:
    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return typer.Option(
        *names,
        help=text,
        metavar=metavar,
        rich_help_panel=panel,
        show_default=False,
        autocompletion=complete if choices else None,
    )
