"""The `tvit` program: verbs and options made from the settings models, and errors turned into exit codes."""

from __future__ import annotations

import importlib
import inspect
import io
import os
import re
import signal
import sys
import textwrap
import threading
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, cast

import typer
from typer.core import TyperCommand, TyperGroup

import tvit_cli
from tvit_cli import commands
from tvit_cli.errors import START, Interrupted, SettingsError, TvitError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from tvit_cli.settings.base import Settings


class Verb(NamedTuple):
    """One line of help, the function in `commands`, examples (one per line), and names in other programs."""

    help: str
    run: str
    examples: str
    synonyms: tuple[str, ...]


# fmt: off
VERBS = {
    "download": Verb("Fetches a known data set; a repeated call fetches missing files only.", "download", """\
tvit download --list
tvit download motions
tvit download ucf101 --classes Archery,Bowling --clips-per-class 20
tvit download ucf101 --verify""", ("fetch", "get")),
    "extract": Verb("Decodes videos once into a frame store for repeated reads, or checks them.", "extract", """\
tvit extract --path-to-data my_videos
tvit extract --path-to-data my_videos --check
tvit extract --path-to-data motions --frames-per-video 16""", ("preprocess", "decode", "cache")),
    "train": Verb("Trains a temporal Vision Transformer on a folder of videos.", "train", """\
tvit train --preset quickstart
tvit train --path-to-data my_videos --experiment-name mine
tvit train --experiment-name mine --resume-from-checkpoint latest""", ("fit", "finetune", "fine-tune")),
    "eval": Verb("Evaluates a trained model on a subset.", "evaluate", """\
tvit eval
tvit eval working_directory/mine --subset val
tvit eval --clips-per-video 4 --crops-per-clip 3
tvit eval --compare working_directory/motions-1 working_directory/mine""", ("test", "validate", "score")),
    "predict": Verb("Labels videos with a trained model.", "predict", """\
tvit predict clip.avi
tvit predict clips --model working_directory/mine --json
tvit predict match.mp4 --window 2s --output timelines
tvit predict clip.avi --explain explanation.png""", ("infer", "inference", "classify", "label")),
    "export": Verb("Exports a trained model (Hugging Face, ONNX, PEFT, …) and checks its parity.", "export", """\
tvit export
tvit export working_directory/mine --format huggingface
tvit export --format onnx --with-preprocessing""", ("convert", "save")),
}
# fmt: on


def settings_model(verb: str) -> type[Settings]:
    """Settings model of a verb, imported late. train -> TrainSettings"""
    model = getattr(importlib.import_module(f"tvit_cli.settings.{verb}"), f"{verb.title()}Settings")
    return cast("type[Settings]", model)


class _Help:
    """Help in two columns, in which no option name is cut; a mixin for Typer's group and command."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(_help_text(ctx, every=False))


class _Verb(_Help, TyperCommand):
    pass


class _Program(_Help, TyperGroup):
    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """A verb and its arguments. Raises SettingsError for an unknown verb."""
        if args[0] not in VERBS and not ctx.resilient_parsing:
            from tvit_cli.settings.base import suggestion

            meant = [name for name, verb in VERBS.items() if args[0].lower() in verb.synonyms]
            hint = suggestion(args[0], VERBS, meant=meant) or f" Commands: {', '.join(VERBS)}."
            raise SettingsError(f"{args[0]}: unknown command.{hint}")
        return super().resolve_command(ctx, args)


def build_app(arguments: Sequence[str] | None = None) -> typer.Typer:
    """The Typer app for a command line; without arguments, all verbs have their options.

    See Note [Options of the typed verb only].
    """
    app = typer.Typer(
        name="tvit",
        cls=_Program,
        help="From a folder of videos to a trained, measured action classifier.",
        epilog=START,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={
            "help_option_names": ["-h", "--help"],
            "max_content_width": 120,
            "token_normalize_func": lambda token: token.replace("_", "-"),  # --lora_rank is --lora-rank
        },
    )
    app.callback()(_program_options)
    for name, verb in VERBS.items():
        function = _command(name) if arguments is None or name in arguments else lambda: None
        app.command(name, cls=_Verb, help=verb.help, epilog=f"EXAMPLES\n{verb.examples}")(function)
    return app


# Note [Options of the typed verb only]
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
# Importing pydantic takes longer than the rest of `tvit --help`. Therefore only verbs among the typed words get
# options from their settings models; the others have one line of help. Shell completion builds every verb.


def _help_text(context: Any, *, every: bool) -> str:
    """Help of the program or a verb; without `every`, of a verb's arguments and essential options only."""
    command, verbs = context.command, getattr(context.command, "commands", {})
    fields: dict[str, FieldInfo] = {}
    if not verbs:
        from tvit_cli.settings.base import extra

        fields = settings_model(context.info_name).model_fields
    essential = {key for key, field in fields.items() if extra(field).get("essential")}
    every = every or not essential
    sections: dict[str, list[tuple[str, str]]] = {}
    if verbs:
        sections["Commands"] = [(name, verb.help) for name, verb in verbs.items()]
    common = []
    for p in command.get_params(context):
        is_argument = p.param_type_name == "argument"
        if not every and not is_argument and p.name not in {*essential, "preset"}:
            common += [] if p.name in {*fields, "help", "help_all"} else [max(p.opts, key=len)]
            continue
        names = [p.metavar] if is_argument else [*p.opts, *(p.secondary_opts if every else [])]
        value = "" if is_argument or p.is_flag else f" {p.metavar}"
        text = p.help if every or p.name not in essential else brief(fields[p.name])
        panel = getattr(p, "rich_help_panel", None) or ("Options" if verbs else "Everywhere")
        panel = "Arguments" if is_argument else panel if every else "Essential options"
        sections.setdefault(panel, []).append((", ".join(names) + value, text))
    width, bold = context.make_formatter().width, partial(typer.style, bold=True)
    lines = [context.get_usage(), command.help]
    for title, rows in sections.items():
        lines += ["", bold(title), *_in_columns(rows, width)]
    if not every:
        text = f"Also {', '.join(common)}. All {len(fields)} settings: {context.command_path} --help-all"
        lines += ["", *textwrap.wrap(text, width, break_on_hyphens=False)]
    lines += ["", *(f"  {x}" if x.startswith("tvit ") else bold(x) for x in command.epilog.splitlines())]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _in_columns(rows: Iterable[tuple[str, str]], width: int, margin: int = 26) -> Iterator[str]:
    """Lines with names and wrapped texts; a name that is too long for its column has a line of its own."""
    for name, text in rows:
        lines = textwrap.wrap(text, width - margin, break_long_words=False, break_on_hyphens=False)
        head = f"  {name}".ljust(margin)
        first = lines.pop(0) if lines and head.endswith("  ") else ""
        yield typer.style(head.rstrip(), bold=True) + head[len(head.rstrip()) :] + first
        yield from (" " * margin + line for line in lines)


def _print_help(context: typer.Context, is_requested: bool) -> None:
    if is_requested:
        typer.echo(_help_text(context, every=True), nl=False)
        raise typer.Exit


def _print_version(is_requested: bool) -> None:
    if is_requested:
        typer.echo(f"tvit {tvit_cli.__version__}")
        raise typer.Exit


def _program_options(
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
    if "WORLD_SIZE" in os.environ:  # else DistributedDataParallel warns of what make_accelerator gives it
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
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
        sys.exit(app(arguments, prog_name="tvit", standalone_mode=False) or 0)
    except UsageError as error:
        _fail(_usage_error(error, words), 2)
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


_AGAIN = "Start again with the same command."
_AFTER_STOP = {
    "download": "Complete files are kept; the same command continues.",
    "extract": "Complete videos are kept; the same command continues.",
    "train": "Checkpoints are kept; resume from the last with --resume-from-checkpoint latest.",
}


def _stop(number: int, frame: FrameType | None) -> None:
    raise Interrupted(f"Stopped by SIGTERM. {_AGAIN}", exit_code=143)


# Note [Waiting threads sleep]
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~
# By default, OpenMP threads spin between two operations and block the decoding processes: on 2 busy cores, an
# epoch of the quickstart took 87 s spinning, 12 s sleeping (docs/negative-results.md). Torch reads it on import.


# The common class of the errors of the command line: newer versions of Typer bring their own copy of click.
UsageError = cast("type[Exception]", typer.BadParameter.__base__)


def _usage_error(error: Any, words: Sequence[str]) -> TvitError:
    """An error of the command line, worded as those of the settings are."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        sys.exit(2)
    from tvit_cli.settings.base import SYNONYMS, suggestion

    name = str(getattr(error, "option_name", ""))
    verb = next((word for word in words if word in VERBS), None)
    path, see = (f"tvit {verb}", f" See tvit {verb} --help-all.") if verb else ("tvit", " See tvit --help.")
    if name and not hasattr(error, "possibilities"):  # "Option '--epochs' requires an argument."
        return SettingsError(f"{name}: {error.message.rpartition(chr(39))[2].strip()}{see}")
    parameters = {p.name: p for p in error.ctx.command.params}

    def spell(key: str) -> str:
        p = parameters[key]
        return str(p.metavar if p.param_type_name == "argument" else max(p.opts, key=len))

    if name:
        options = [o for p in parameters.values() for o in (*p.opts, *p.secondary_opts) if o[:1] == "-"]
        known = SYNONYMS.get(name.lstrip("-").replace("-", "_").lower(), ())
        meant = [spell(key) for key in known if key in parameters]
        hint = suggestion(name, options, meant=meant) or see
        return SettingsError(f"{name}: unknown option of {path}.{hint}")
    if found := re.search(r"extra arguments? *(?:\(s\))? \((.*)\)$", error.message):
        hint = f" Did you mean --path-to-data {found[1]}?" if "path_to_data" in parameters else see
        return SettingsError(f"{found[1]}: unexpected argument of {path}.{hint}")
    return SettingsError(f"{path}: {error.format_message()}{see}")


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
    from tvit_cli.settings.base import extra, load

    model = settings_model(name)

    def body(config: str | None = None, preset: str | None = None, **given: Any) -> None:
        from tvit_cli.api import settings_beneath
        from tvit_cli.console import Console

        verbose, quiet, _ = (given.pop(name) for name in ("verbose", "quiet", "help_all"))
        if argument := given.pop("model_argument", None):
            if given["model"] is not None:
                raise SettingsError(f"MODEL {argument} and --model {given['model']}: give one of them.")
            given["model"] = argument
        flags = {key: value for key, value in given.items() if value is not None and value != []}
        file = Path(config) if config else None
        verbs, beneath = map(settings_model, VERBS), cast(Any, settings_beneath)
        loaded = load(model, flags=flags, config=file, preset=preset, verbs=verbs, beneath=beneath)
        console = Console("verbose" if verbose else "quiet" if quiet else "normal")
        try:
            getattr(commands, VERBS[name].run)(loaded, console)
        except KeyboardInterrupt:
            raise Interrupted(f"Stopped by Ctrl-C. {_AFTER_STOP.get(name, _AGAIN)}", exit_code=130) from None

    annotations = {k: _annotation(k, f, is_series=k in model.SERIES) for k, f in model.model_fields.items()}
    annotations |= _common(with_preset=name == "train")
    has_arguments = any(extra(field).get("positional") for field in model.model_fields.values())
    if "model" in model.model_fields and not has_arguments:
        argument = typer.Argument(help="The same as --model.", metavar="MODEL", show_default=False)
        annotations = {"model_argument": Annotated[str | None, argument], **annotations}
    defaults = dict.fromkeys(annotations) | dict.fromkeys(("verbose", "quiet", "help_all"), False)
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


def brief(field: FieldInfo) -> str:
    """Short help of an option: the description's first sentence, and a default that is not none or off."""
    shown = "" if default(field) in ("none", "off") else f" (default {default(field)})"
    return str(field.description).partition(". ")[0] + shown


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
    preset = _option(["--preset"], f"{', '.join(names)}.", panel, "NAME", names)
    options: dict[str, Any] = {"config": Annotated[str | None, config]}
    options |= {"verbose": Annotated[bool, verbose], "quiet": Annotated[bool, quiet]}
    every = _option(["--help-all"], "Shows all options.", panel, callback=_print_help)
    options["help_all"] = Annotated[bool, every]
    return options | ({"preset": Annotated[str | None, preset]} if with_preset else {})


def _option(
    names: Sequence[str],
    text: str,
    panel: str,
    metavar: str | None = None,
    choices: Sequence[str] = (),
    callback: Callable[..., None] | None = None,
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
        callback=callback,
        is_eager=callback is not None,
    )
