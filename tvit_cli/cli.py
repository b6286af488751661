"""The `tvit` program: verbs and options made from the settings models, and errors turned into exit codes."""

from __future__ import annotations

import inspect
import io
import os
import signal
import sys
import threading
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import annotated_types
import typer
from pydantic.fields import FieldInfo

import tvit_cli
from tvit_cli import commands
from tvit_cli.console import Verbosity
from tvit_cli.errors import Interrupted, TvitError
from tvit_cli.settings.base import (
    Loaded,
    Settings,
    base_type,
    extra,
    flag,
    is_optional,
    load,
    presets,
)

if TYPE_CHECKING:
    from tvit_cli.console import Verbosity
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

    return command(settings, run, verbs=_all_settings, preset=preset)


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
        commands.shut_down(graceful=True)
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
# quickstart took 87 s spinning and 12 s sleeping (docs/negative-results.md). Torch reads this on import.


def _fail(error: TvitError, code: int) -> None:
    from tvit_cli.console import print_error

    print_error(error)
    commands.shut_down(graceful=isinstance(error, Interrupted))
    sys.exit(code)


SettingsT = TypeVar("SettingsT", bound=Settings)

_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}

# Note [Options are text]
# ~~~~~~~~~~~~~~~~~~~~~~~
# Every option but a switch is declared to Typer as text, and pydantic alone converts and checks it. Typed
# options would make Typer stop at the first bad value, in words of its own, and would check bounds that the
# environment and config files then escape. As text, one validation sees all layers and reports all errors.


def command(
    cls: type[SettingsT],
    run: Callable[[Loaded[SettingsT], Verbosity], None],
    *,
    verbs: Callable[[], Iterable[type[Settings]]],
    preset: bool,
) -> Callable[..., None]:
    """A function with one parameter per field of `cls`, as Typer wants it; it calls `run` with the result."""

    def body(
        config: str | None = None,
        preset: str | None = None,
        verbose: bool = False,
        quiet: bool = False,
        **given: Any,
    ) -> None:
        flags = {key: value for key, value in given.items() if value is not None and value != []}
        loaded = load(cls, flags=flags, config=Path(config) if config else None, preset=preset, verbs=verbs())
        run(loaded, "verbose" if verbose else "quiet" if quiet else "normal")

    annotations = {
        key: _annotation(key, field, is_series=key in cls.SERIES) for key, field in cls.model_fields.items()
    }
    annotations |= _common(preset)
    parameters = [
        inspect.Parameter(
            key, inspect.Parameter.KEYWORD_ONLY, default=_DEFAULTS.get(key), annotation=annotation
        )
        for key, annotation in annotations.items()
    ]
    body.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    body.__annotations__ = dict(annotations)
    return body


_DEFAULTS: dict[str, Any] = {"verbose": False, "quiet": False}


def describe(field: FieldInfo, *, is_series: bool = False) -> str:
    """A field's help: its description, its range or choices, its default."""
    limits = bounds(field)
    return f"{what(field, is_series=is_series)} ({limits + '; ' if limits else ''}default {default(field)})"


def what(field: FieldInfo, *, is_series: bool) -> str:
    """A field's description, with what a series of values does."""
    text = (field.description or "").rstrip(".")
    return f"{text}; several, as in 1,2,3, run one after the other" if is_series else text


def bounds(field: FieldInfo) -> str:
    """A field's legal values in words, or nothing."""
    kind = base_type(field)
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    parts = []
    for limit in field.metadata:
        match limit:
            case annotated_types.Ge():
                parts.append(f"at least {limit.ge}")
            case annotated_types.Gt():
                parts.append(f"above {limit.gt}")
            case annotated_types.Le():
                parts.append(f"at most {limit.le}")
            case annotated_types.Lt():
                parts.append(f"below {limit.lt}")
    return ", ".join(parts)


def default(field: FieldInfo) -> str:
    """A field's default in words."""
    words = extra(field).get("default")
    if words:
        return str(words)
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _annotation(key: str, field: FieldInfo, *, is_series: bool) -> Any:
    facts = extra(field)
    if facts.get("positional"):
        argument = typer.Argument(help=field.description, metavar=facts["metavar"], show_default=False)
        is_one = base_type(field) in (str, Path)
        return Annotated[str | None, argument] if is_one else Annotated[list[str] | None, argument]
    kind = base_type(field)
    if typing.get_origin(kind) is tuple and Ellipsis not in typing.get_args(kind):  # so many values, no more
        words = (str,) * len(typing.get_args(kind))
        option = typer.Option(
            flag(key),
            help=describe(field),
            metavar=facts["metavar"],
            rich_help_panel=facts["panel"],
            show_default=False,
        )
        return Annotated[tuple[words] | None, option]  # type: ignore[valid-type]
    if kind is bool:
        name = facts.get("flag") or f"{flag(key)}/--no-{flag(key)[2:]}"
        return Annotated[
            bool | None,
            typer.Option(name, help=describe(field), rich_help_panel=facts["panel"], show_default=False),
        ]
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    metavar = facts.get("metavar") or ("|".join(choices) if choices else _METAVARS.get(kind, "LIST"))
    metavar += ",…" if is_series else ""
    return Annotated[
        str | None,
        typer.Option(
            flag(key),
            *facts.get("short", ()),
            help=describe(field, is_series=is_series),
            metavar=f"{metavar}|none" if is_optional(field) and facts.get("resettable") else metavar,
            rich_help_panel=facts["panel"],
            show_default=False,
            autocompletion=_completer(choices) if choices else None,
        ),
    ]


def _common(preset: bool) -> dict[str, Any]:
    def option(
        *names: str, help: str, metavar: str | None = None, complete: Iterable[str] | None = None
    ) -> Any:
        return typer.Option(
            *names,
            help=help,
            metavar=metavar,
            rich_help_panel="Everywhere",
            show_default=False,
            autocompletion=_completer(complete) if complete is not None else None,
        )

    names = {
        "config": Annotated[
            str | None,
            option("--config", help="Settings from a TOML file or a run's settings.json.", metavar="FILE"),
        ],
        "verbose": Annotated[bool, option("--verbose", "-v", help="Say more.")],
        "quiet": Annotated[bool, option("--quiet", "-q", help="Say only results and errors.")],
    }
    if preset:
        text = f"A named set of settings that ships with tvit: {', '.join(presets())}."
        names["preset"] = Annotated[
            str | None, option("--preset", help=text, metavar="NAME", complete=presets())
        ]
    return names


def _completer(words: Iterable[str]) -> Callable[[str], list[str]]:
    known = list(words)

    def complete(incomplete: str) -> list[str]:
        return [word for word in known if word.startswith(incomplete)]

    return complete
