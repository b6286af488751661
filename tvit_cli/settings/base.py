"""Settings models, read in layers: flags > environment > config file > preset > defaults."""

from __future__ import annotations

import difflib
import itertools
import json
import os
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from tvit_cli.errors import SettingsError

ENVIRONMENT_PREFIX = "TVIT_"
# Variables with the prefix that are no settings: the traceback switch, and what the test suite reads.
RESERVED_VARIABLES = frozenset({"TVIT_DEBUG", "TVIT_TEST_DATA"})

S = TypeVar("S", bound="Settings")


class Settings(BaseModel):
    """A verb's settings: frozen, closed, read by `load`.

    A setting named in `SERIES` may be given several values, separated by commas: the verb runs once for each.
    """

    SERIES: ClassVar[tuple[str, ...]] = ()

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, str_strip_whitespace=True)


def about(
    panel: str, *, reference: str | None = None, why: str | None = None, **extra: Any
) -> dict[str, Any]:
    """What a Field says beside pydantic's own facts.

    `panel` is the heading it stands under in `--help`; `reference` the default of the system that tvit
    re-implements and `why` the reason where tvit's differs; `positional=True` makes it an argument,
    `metavar` names its value in `--help`.
    """
    return {"panel": panel, "reference": reference, "why": why, **extra}


def extra(field: FieldInfo) -> dict[str, Any]:
    """What `about` stored on a field."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


@dataclass(frozen=True)
class _Layer:
    """Values of one source; `where(key)` names the place of one of them in an error."""

    name: str
    values: Mapping[str, Any]
    form: str = "{key}"

    def where(self, key: str) -> str:
        return self.form.format(key=key, flag=flag(key), variable=variable(key))


@dataclass(frozen=True)
class Loaded(Generic[S]):
    """Settings, and where each value came from ("default", "preset quickstart", "flag" …).

    `series` holds the settings of every run that was asked for, in order; the first of them is `settings`.
    """

    series: tuple[S, ...]
    origins: Mapping[str, str]
    layers: tuple[_Layer, ...]

    @property
    def settings(self) -> S:
        """The settings of the only run, or of the first."""
        return self.series[0]

    def over(self, saved: Path) -> Loaded[S]:
        """The same layers over the settings of a run that is resumed, which replace the defaults."""
        return _merge(type(self.settings), (_config_layer(saved), *self.layers), [])


def load(
    cls: type[S],
    *,
    flags: Mapping[str, Any],
    config: Path | None = None,
    preset: str | None = None,
    environ: Mapping[str, str] | None = None,
    verbs: Iterable[type[Settings]] = (),
) -> Loaded[S]:
    """Read a verb's settings from all layers and validate them once.

    `flags` holds what was typed (absent = not typed). `verbs` are all settings models of the program: an
    environment variable that belongs to none of them is an error. Raises SettingsError that lists every
    unknown key and every bad value of every layer at once.
    """
    environ = os.environ if environ is None else environ
    layers = (
        _preset_layer(preset),
        _config_layer(config),
        _environment_layer(cls, environ),
        _Layer("flag", dict(flags), "{flag}"),
    )
    return _merge(cls, layers, _unknown_variables([cls, *verbs], environ))


def flag(key: str) -> str:
    """The option of a setting. lora_rank -> --lora-rank"""
    return "--" + key.replace("_", "-")


def variable(key: str) -> str:
    """The environment variable of a setting. lora_rank -> TVIT_LORA_RANK"""
    return ENVIRONMENT_PREFIX + key.upper()


def suggestion(word: str, known: Iterable[str], *, most: int = 1) -> str:
    """A question that names the nearest known words, case set aside, after a space; "" where none is near."""
    spelt = {name.casefold(): name for name in known}
    near = difflib.get_close_matches(word.casefold(), spelt, n=most)
    return f" Did you mean {' or '.join(spelt[name] for name in near)}?" if near else ""


def is_optional(field: FieldInfo) -> bool:
    """Whether None is a legal value of a field."""
    return type(None) in typing.get_args(field.annotation)


def base_type(field: FieldInfo) -> Any:
    """A field's type without `| None`."""
    arguments = [a for a in typing.get_args(field.annotation) if a is not type(None)]
    union = typing.get_origin(field.annotation) in (typing.Union, types.UnionType)
    return arguments[0] if union and len(arguments) == 1 else field.annotation


def presets() -> tuple[str, ...]:
    """The names of the presets that are shipped."""
    folder = resources.files("tvit_cli.settings") / "presets"
    return tuple(sorted(p.name.removesuffix(".toml") for p in folder.iterdir() if p.name.endswith(".toml")))


def _merge(cls: type[S], layers: tuple[_Layer, ...], problems: list[str]) -> Loaded[S]:
    values: dict[str, Any] = {}
    origins = dict.fromkeys(cls.model_fields, "default")
    places: dict[str, str] = {}
    for layer in layers:
        for key, value in layer.values.items():
            if key not in cls.model_fields:
                problems.append(f"{layer.where(key)}: unknown setting.{suggestion(key, cls.model_fields)}")
                continue
            values[key] = None if _resets(value, cls.model_fields[key]) else value
            origins[key] = layer.name
            places[key] = layer.where(key)
    series: list[S] = []
    for chosen in _combinations(cls, values, places, problems):
        try:
            series.append(cls.model_validate({**values, **chosen}))
        except ValidationError as error:
            found = [_describe(e, places, {**values, **chosen}, cls.model_fields) for e in error.errors()]
            problems += [problem for problem in found if problem not in problems]
    if problems:
        raise SettingsError("\n".join(problems))
    return Loaded(tuple(series), origins, layers)


def _combinations(
    cls: type[Settings], values: Mapping[str, Any], places: Mapping[str, str], problems: list[str]
) -> list[dict[str, Any]]:
    """Every choice of one value for each setting of a series. seed 0,1 split 1 -> [{seed: 0, split: 1}, …]"""
    lists = {}
    for key in cls.SERIES:
        value = values.get(key)
        several = value.split(",") if isinstance(value, str) else value
        if isinstance(several, list) and len(several) > 1:
            lists[key] = [part.strip() if isinstance(part, str) else part for part in several]
            if twice := {str(part) for part in lists[key] if lists[key].count(part) > 1}:
                problems.append(f"{places[key]}: {', '.join(sorted(twice))} is given twice.")
    return [dict(zip(lists, chosen, strict=True)) for chosen in itertools.product(*lists.values())]


def _preset_layer(name: str | None) -> _Layer:
    if name is None:
        return _Layer("preset", {})
    if name not in presets():
        raise SettingsError(
            f"--preset {name}: no such preset.{suggestion(name, presets())} Shipped: {', '.join(presets())}."
        )
    text = (resources.files("tvit_cli.settings") / "presets" / f"{name}.toml").read_text(encoding="utf-8")
    return _Layer(f"preset {name}", _keys(tomllib.loads(text)), f"preset {name}, {{key}}")


def _config_layer(path: Path | None) -> _Layer:
    if path is None:
        return _Layer("config", {})
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SettingsError(f"--config {path}: no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {path}: cannot be read ({error}).") from error
    try:
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise SettingsError(f"--config {path}: is not {kind}: {error}.") from error
    if not isinstance(values, dict):
        raise SettingsError(f"--config {path}: holds no table of settings.")
    return _Layer(f"config {path}", _keys(values), f"{path}, {{key}}")


def _environment_layer(cls: type[Settings], environ: Mapping[str, str]) -> _Layer:
    values = {key: environ[variable(key)] for key in cls.model_fields if variable(key) in environ}
    return _Layer("environment", values, "{variable}")


def _unknown_variables(models: Iterable[type[Settings]], environ: Mapping[str, str]) -> list[str]:
    known = {variable(key) for model in models for key in model.model_fields} | RESERVED_VARIABLES
    return [
        f"{name}: unknown environment variable.{suggestion(name, known)}"
        for name in sorted(environ)
        if name.startswith(ENVIRONMENT_PREFIX) and name not in known
    ]


def _keys(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace("-", "_"): value for key, value in values.items()}


def _resets(value: Any, field: FieldInfo) -> bool:
    says_none = isinstance(value, str) and value.strip().lower() == "none"
    return says_none and is_optional(field) and extra(field).get("resettable") is not False


def _describe(
    error: Any, places: Mapping[str, str], values: Mapping[str, Any], fields: Mapping[str, FieldInfo]
) -> str:
    """One line for one of pydantic's errors: the place, the value, the limit."""
    message = str(error["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if not error["loc"]:
        return message[:1].upper() + message[1:]
    key = str(error["loc"][0])
    if error["type"] == "missing":
        facts = extra(fields[key])
        return f"{facts['metavar']}: nothing given. For example: {facts['example']}"
    value = values.get(key)
    shown = ",".join(map(str, value)) if isinstance(value, list | tuple) else value
    hint = ""
    if error["type"] == "literal_error":
        hint = suggestion(str(value), map(str, typing.get_args(base_type(fields[key]))))
    return f"{places.get(key, flag(key))}: {shown}: {message.replace('input should', 'it should')}.{hint}"
