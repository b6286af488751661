"""Settings models, read in layers: flags > environment > config file > preset > earlier run > defaults.

Settings of a preset or of --from that contradict a setting of a higher layer are left out.
"""

from __future__ import annotations

import difflib
import itertools
import json
import keyword
import os
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Generic, TypedDict, TypeVar, Unpack

from pydantic import BaseModel, Field, ValidationError
from pydantic.fields import FieldInfo

from tvit_cli.errors import SettingsError

ENVIRONMENT_PREFIX = "TVIT_"
# Variables with the prefix that are not settings: the traceback switch, and the test suite's data folder.
RESERVED_VARIABLES = frozenset({"TVIT_DEBUG", "TVIT_TEST_DATA"})
PYTHON_NAMES = {"batch_size": "per_gpu_batch_size"}  # arguments of the Python API with shorter names
MOST_BYTES = 2**20  # of a config file
# Names of layers whose settings, or those named here, yield to others that they contradict.
YIELDING: dict[str, set[str] | None] = {"weights ": {"clip_seconds"}, "from ": None, "preset ": None}
PRESETS = resources.files("tvit_cli.settings") / "presets"
# Names of other programs and the settings of the same meaning; a verb suggests those that it has.
SYNONYMS = {
    "lr": ("learning_rate",),
    **dict.fromkeys(("batch_size", "bs", "batch"), ("global_batch_size", "per_gpu_batch_size")),
    **dict.fromkeys(("model", "model_name", "backbone", "pretrained", "weights"), ("hf_model_name", "model")),
    **dict.fromkeys(("checkpoint", "ckpt"), ("resume_from_checkpoint", "from_", "model")),
    **dict.fromkeys(("continue", "init_from", "start_from", "finetune", "transfer"), ("from_",)),
    "resume": ("resume_from_checkpoint",),
    **dict.fromkeys(
        ("data", "dataset", "data_dir", "data_path", "data_root"), ("path_to_data", "paths", "name")
    ),
    **dict.fromkeys(("input", "video", "videos"), ("paths", "path_to_data", "clips")),
    **dict.fromkeys(("out", "output_dir", "out_dir", "save_dir"), ("output", "working_directory")),
    **dict.fromkeys(("name", "run_name"), ("experiment_name",)),
    **dict.fromkeys(("resolution", "image_size", "size"), ("img_size", "short_side")),
    **dict.fromkeys(("frames", "num_frames", "clip_length"), ("n_frames", "frames_per_video")),
    **dict.fromkeys(("frame_stride", "sampling_rate", "clip_duration"), ("clip_seconds",)),
    **dict.fromkeys(("workers", "jobs"), ("num_workers",)),
    **dict.fromkeys(("gpus", "num_gpus", "nproc_per_node"), ("num_processes",)),
    **dict.fromkeys(("amp", "fp16", "bf16", "precision"), ("mixed_precision",)),
    **dict.fromkeys(("gpu", "cuda", "cpu"), ("device",)),
    **dict.fromkeys(("rank", "r"), ("lora_rank",)),
    "alpha": ("lora_alpha",),
    "dropout": ("lora_dropout", "drop_path"),
    "wd": ("weight_decay",),
    "warmup": ("warmup_epochs",),
    **dict.fromkeys(("accumulation_steps", "grad_accum"), ("gradient_accumulation_steps",)),
    **dict.fromkeys(("clip_grad", "grad_clip"), ("max_grad_norm",)),
    "early_stopping": ("patience",),
    "freeze": ("train",),
    "fold": ("split",),
}

S = TypeVar("S", bound="Settings")


class Settings(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False, str_strip_whitespace=True):
    """Base of a verb's settings: frozen, closed, read by `load`.

    A setting in `SERIES` accepts several comma-separated values; the verb runs once per combination. Those in
    `NAMING` name an earlier run, whose settings `load` reads beneath the given ones.
    """

    SERIES: ClassVar[tuple[str, ...]] = ()
    NAMING: ClassVar[tuple[str, ...]] = ()


class Facts(TypedDict, total=False):
    """Properties of a setting beyond its type, default and limits."""

    reference: str  # default of the system that tvit re-implements
    why: str  # reason for another default than the reference's
    resume_safe: bool  # may differ between a checkpoint and the resumed run: the result has the same bits
    default_text: str  # default in words, where it is computed at run time
    metavar: str  # name of the value in --help
    flag: str  # option name that differs from the setting's
    short: str  # one-letter option
    positional: bool  # an argument instead of an option
    example: str  # command shown when a positional setting is missing
    resettable: bool  # True: `none` is in the metavar; False: `none` is a value of its own
    essential: bool  # shown by --help; --help-all shows all settings
    printed: bool  # changes only what the command prints: no argument of the Python API


def setting(
    default: Any,
    description: str,
    panel: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    **facts: Unpack[Facts],
) -> Any:
    """A field of a settings model; `panel` is its heading in `--help` and the docs.

    Flag, environment variable, TOML key, help and docs are derived from it.
    """
    extra: dict[str, Any] = {"panel": panel, "reference": None, "why": None, **facts}
    return Field(default, description=description, json_schema_extra=extra, ge=ge, gt=gt, le=le, lt=lt)


def extra(field: FieldInfo) -> dict[str, Any]:
    """Panel and `Facts` of a field."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


@dataclass(frozen=True)
class Layer:
    """Values of one source; `template` is the form of its keys in errors."""

    name: str
    values: Mapping[str, Any]
    template: str = "{key}"

    def spell(self, key: str) -> str:
        return self.template.format(key=key, flag=flag(key), variable=variable(key))


@dataclass(frozen=True)
class Loaded(Generic[S]):
    """Validated settings with the origin of each value ("default", "preset quickstart", "flag", …).

    `series` holds the settings of every requested run in order; `settings` is the first of them.
    """

    series: tuple[S, ...]
    origins: Mapping[str, str]

    @property
    def settings(self) -> S:
        """Settings of the only or the first run."""
        return self.series[0]


def load(
    cls: type[S],
    *,
    flags: Mapping[str, Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
    config: Path | None = None,
    preset: str | None = None,
    environ: Mapping[str, str] | None = None,
    verbs: Iterable[type[Settings]] = (),
    beneath: Callable[[Loaded[S]], Layer | None] = lambda named: None,
) -> Loaded[S]:
    """Reads a verb's settings from all layers and validates them.

    `flags` holds the typed options only, `arguments` those of the Python API. `verbs` are the other settings models
    of the program: an environment variable of none of them is an error. `beneath` gives the layer above the
    defaults, from the settings that name an earlier run. Raises SettingsError that lists all unknown keys and bad
    values.
    """
    environ = os.environ if environ is None else environ
    typed = {key: environ[variable(key)] for key in cls.model_fields if variable(key) in environ}
    layers = [] if preset is None else [_read_preset(preset)]
    layers += [] if config is None else [read_config(config)]
    layers += [Layer("environment", typed, "{variable}")]
    layers += [Layer("flag", flags or {}, "{flag}"), Layer("argument", arguments or {})]
    naming = tuple(replace(x, values={k: v for k, v in x.values.items() if k in cls.NAMING}) for x in layers)
    named: Loaded[S] | None = None
    with suppress(SettingsError):  # reported below, with all others
        named = _merge(cls, naming, [])
    if cls.NAMING and named is not None and (lowest := beneath(named)) is not None:
        layers.insert(0, lowest)
    models: list[type[Settings]] = [cls, *verbs]
    variables = {variable(key) for model in models for key in model.model_fields} | RESERVED_VARIABLES
    unknown = [
        f"{name}: unknown environment variable.{suggestion(name, variables)}"
        for name in sorted(environ)
        if name.startswith(ENVIRONMENT_PREFIX) and name not in variables
    ]
    return _merge(cls, tuple(layers), unknown)


def check_arguments(cls: type[S], required: Mapping[str, Any], **given: Any) -> S:
    """Settings from arguments of the Python API, named as such in errors. Raises SettingsError."""
    layers = [Layer("argument", {PYTHON_NAMES.get(name, name): value}, name) for name, value in given.items()]
    return _merge(cls, (Layer("required", required), *layers), []).settings


def flag(key: str) -> str:
    """Option name of a setting. lora_rank -> --lora-rank"""
    return "--" + key.rstrip("_").replace("_", "-")


def variable(key: str) -> str:
    """Environment variable of a setting. lora_rank -> TVIT_LORA_RANK"""
    return ENVIRONMENT_PREFIX + key.rstrip("_").upper()


def suggestion(word: str, names: Iterable[str], *, most: int = 1, meant: Iterable[str] = ()) -> str:
    """A question with the names that are meant, else the most similar, after a space; "" without one.

    Similar ignores case; a name that the word begins with is similar. validation -> val
    """
    by_folded, folded = {name.casefold(): name for name in names}, word.casefold()
    similar = difflib.get_close_matches(folded, by_folded, n=most)
    similar = similar or [name for name in by_folded if len(name) > 2 and folded.startswith(name)][:most]
    near = list(meant) or [by_folded[name] for name in similar]
    return f" Did you mean {' or '.join(near)}?" if near else ""


def is_optional(field: FieldInfo) -> bool:
    """Whether None is a legal value of a field."""
    return type(None) in typing.get_args(field.annotation)


def base_type(field: FieldInfo) -> Any:
    """Type of a field without `| None`."""
    arguments = [a for a in typing.get_args(field.annotation) if a is not type(None)]
    union = typing.get_origin(field.annotation) in (typing.Union, types.UnionType)
    return arguments[0] if union and len(arguments) == 1 else field.annotation


def presets() -> tuple[str, ...]:
    """Names of the shipped presets."""
    return tuple(sorted(p.name.removesuffix(".toml") for p in PRESETS.iterdir() if p.name.endswith(".toml")))


def _merge(cls: type[S], layers: tuple[Layer, ...], problems: list[str]) -> Loaded[S]:
    before = list(problems)
    values: dict[str, Any] = {}
    origins = dict.fromkeys(cls.model_fields, "default")
    spellings: dict[str, str] = {}
    for layer in layers:
        for key, value in layer.values.items():
            field = cls.model_fields.get(key)
            if field is None:
                meant = [name for name in SYNONYMS.get(key, ()) if name in cls.model_fields]
                hint = suggestion(key, cls.model_fields, meant=meant)
                problems.append(f"{layer.spell(key)}: unknown setting.{hint}")
                continue
            is_none = isinstance(value, str) and value.strip().lower() == "none"
            resets = is_none and is_optional(field) and extra(field).get("resettable") is not False
            values[key], origins[key] = None if resets else value, layer.name
            spellings[key] = layer.spell(key)
    series: list[S] = []
    for chosen in _combinations(cls, values, spellings, problems):
        own = {**values, **chosen}
        try:
            series.append(cls.model_validate(own))
        except ValidationError as error:
            found = [_describe(e, spellings, own, cls) for e in error.errors()]
            problems += [problem for problem in found if problem not in problems]
    if yielding := _yielding(problems, origins):
        with suppress(SettingsError):
            return _merge(cls, tuple(_without(layer, yielding) for layer in layers), before)
    if problems:
        raise SettingsError("\n".join(problems))
    return Loaded(tuple(series), origins)


def _yielding(problems: Iterable[str], origins: Mapping[str, str]) -> set[str]:
    """Settings of --from or a preset that contradict those of a higher layer: a problem names both flags."""
    found: set[str] = set()
    for line in itertools.chain.from_iterable(map(str.splitlines, problems)):
        words = set(re.findall(r"--[a-z][a-z0-9-]*", line))
        named = {key: origins[key] for key in origins if flag(key) in words and origins[key] != "default"}
        for kind, keys in YIELDING.items():
            lower = {k for k, name in named.items() if name.startswith(kind) and (keys is None or k in keys)}
            if lower and len(lower) < len(named):
                found |= lower
                break
    return found


def _without(layer: Layer, keys: set[str]) -> Layer:
    """A layer that yields, without some keys; other layers as they are."""
    for kind, own in YIELDING.items():
        if layer.name.startswith(kind):
            gone = keys if own is None else keys & own
            return replace(layer, values={key: v for key, v in layer.values.items() if key not in gone})
    return layer


def _combinations(
    cls: type[Settings], values: Mapping[str, Any], spellings: Mapping[str, str], problems: list[str]
) -> list[dict[str, Any]]:
    """All combinations of the values of a series. seed 0,1 split 1 -> [{seed: 0, split: 1}, …]"""
    lists = {}
    for key in cls.SERIES:
        several = value.split(",") if isinstance(value := values.get(key), str) else value
        if isinstance(several, list) and len(several) > 1:
            lists[key] = [part.strip() if isinstance(part, str) else part for part in several]
            if twice := {str(part) for part in lists[key] if lists[key].count(part) > 1}:
                problems.append(f"{spellings[key]}: {', '.join(sorted(twice))} is given twice.")
    return [dict(zip(lists, chosen, strict=True)) for chosen in itertools.product(*lists.values())]


def _read_preset(name: str) -> Layer:
    if name not in (names := presets()):
        hint = f"{suggestion(name, names)} Available: {', '.join(names)}."
        raise SettingsError(f"--preset {name}: no such preset.{hint}")
    text = (PRESETS / f"{name}.toml").read_text(encoding="utf-8")
    return Layer(f"preset {name}", _keys(tomllib.loads(text)), f"preset {name}, {{key}}")


def read_config(path: Path) -> Layer:
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise SettingsError(f"--config {path}: is no regular file. Name a TOML or JSON file.")
        if (size := path.stat().st_size) > MOST_BYTES:
            limit = f"{size:,} bytes, more than the {MOST_BYTES:,} of a config file"
            raise SettingsError(f"--config {path}: {limit}. Name a smaller one.")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SettingsError(f"--config {path}: no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {path}: cannot be read ({error}).") from error
    try:
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # the second: nested too deep
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise SettingsError(f"--config {path}: is not {kind}: {error}.") from error
    if not isinstance(values, dict):
        raise SettingsError(f"--config {path}: no table of settings.")
    return Layer(f"config {path}", _keys(values), f"{path}, {{key}}")


def _keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Field names of a file's keys. learning-rate -> learning_rate, from -> from_"""
    return {key.replace("-", "_") + "_" * keyword.iskeyword(key): value for key, value in values.items()}


def _describe(error: Any, spellings: Mapping[str, str], values: Mapping[str, Any], cls: type[S]) -> str:
    """One of pydantic's errors as a line: setting, value, limit."""
    message = str(error["msg"]).removeprefix("Value error, ")
    if not error["loc"]:
        return message[:1].upper() + message[1:]
    key = str(error["loc"][0])
    if error["type"] == "missing":
        facts = extra(cls.model_fields[key])
        return f"{facts['metavar']}: nothing given. For example: {facts['example']}"
    value = values.get(key)
    shown = ",".join(map(str, value)) if isinstance(value, list | tuple) else value
    hint = ""
    if error["type"] == "literal_error":
        hint = suggestion(str(value), map(str, typing.get_args(base_type(cls.model_fields[key]))))
    message = (message[:1].lower() + message[1:]).replace("input should", "it should")
    return f"{spellings.get(key, flag(key))}: {shown}: {message}.{hint}"
