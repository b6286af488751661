"""A settings model becomes the options of a Typer command."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import annotated_types
import typer
from pydantic.fields import FieldInfo

from tvit_cli.settings.base import Loaded, Settings, base_type, extra, flag, is_optional, load, presets

S = TypeVar("S", bound=Settings)

_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}

# Note [Options are text]
# ~~~~~~~~~~~~~~~~~~~~~~~
# Every option but a switch is declared to Typer as text, and pydantic alone converts and checks it. Typed
# options would make Typer stop at the first bad value, in words of its own, and would check bounds that the
# environment and config files then escape. As text, one validation sees all layers and reports all errors.


def command(
    cls: type[S],
    run: Callable[[Loaded[S], Verbosity], None],
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


Verbosity = Literal["quiet", "normal", "verbose"]
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
