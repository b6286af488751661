"""The command line compared with a committed list: verbs, options, defaults, limits, variables, presets, public names.

Removing or renaming one of them breaks users' scripts, so it is a decision and not an accident. Help texts are not
compared. After a deliberate change, regenerate the list and commit it with the change:

    python tests/test_frozen.py
"""

import dataclasses
import importlib
import inspect
import json
import pkgutil
import tomllib
import typing
from pathlib import Path

import annotated_types
import pytest
import typer
from entry import program, tvit
from pydantic import BaseModel

import tvit_cli
import tvit_cli.settings
from tvit_cli.settings.base import variable

LIST = Path(__file__).parent / "frozen" / "options.json"
LIMITS = {
    annotated_types.Ge: "ge", annotated_types.Gt: "gt", annotated_types.Le: "le", annotated_types.Lt: "lt",
}  # fmt: skip


def settings_models():
    """The settings model of each verb: train -> TrainSettings, wherever below tvit_cli.settings it is defined."""
    found = {}
    for module in pkgutil.walk_packages(tvit_cli.settings.__path__, "tvit_cli.settings."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, type) and issubclass(value, BaseModel) and name.endswith("Settings"):
                found[name.removesuffix("Settings").lower()] = value
    return found


def literals(annotation):
    """The values of every Literal within a type."""
    if typing.get_origin(annotation) is typing.Literal:
        yield from map(str, typing.get_args(annotation))
    else:
        for part in typing.get_args(annotation):
            yield from literals(part)


def setting(model, key):
    """Default, limits, choices and environment variable of one setting."""
    field = model.model_fields[key]
    series = getattr(model, "SERIES", ())
    default = field.get_default(call_default_factory=True, validated_data={})
    return {
        "default": "required" if field.is_required() else json.loads(json.dumps(default, default=str)),
        "none": type(None) in typing.get_args(field.annotation),
        "limits": sorted(
            f"{LIMITS[type(m)]} {getattr(m, LIMITS[type(m)])}" for m in field.metadata if type(m) in LIMITS
        ),
        "choices": sorted(literals(field.annotation)),
        "variable": variable(key),
        "series": key in series,
    }


def parameter(option):
    """Spellings and shape of one parameter on the command line."""
    return {
        "names": sorted(option.opts) if option.param_type_name == "option" else "argument",
        "off": sorted(option.secondary_opts),
        "metavar": option.metavar,
        "nargs": option.nargs,
        "multiple": bool(getattr(option, "multiple", False)),
        "switch": bool(getattr(option, "is_flag", False)),
    }


def command_rows(name, command, context, model):
    """One row per parameter of a verb, under "verb key"."""
    rows = {}
    for option in command.get_params(context):
        key = option.name
        known = model is not None and key in model.model_fields
        rows[f"{name} {key}"] = parameter(option) | (setting(model, key) if known else {})
    missing = set(model.model_fields if model else ()) - {option.name for option in command.params}
    return rows | {f"{name} {key}": {"names": None} | setting(model, key) for key in missing}


def public_names():
    """Public names: parameters of functions (settings of verbs are options), fields and public names of classes."""
    rows = {}
    for name in sorted(tvit_cli.__all__):
        value = getattr(tvit_cli, name)
        if inspect.isfunction(value):
            rows[name] = parameters(value)
        elif dataclasses.is_dataclass(value) or value is tvit_cli.Model:
            fields = [f.name for f in dataclasses.fields(value)] if value is not tvit_cli.Model else []
            rows[name] = ", ".join(fields + sorted(k for k in vars(value) if k[0] != "_" and k not in fields))
            methods = {k: v for k, v in vars(value).items() if inspect.isfunction(v) and k[0] != "_"}
            rows |= {f"{name}.{k}": parameters(v) for k, v in sorted(methods.items())}
        else:
            rows[name] = True
    return rows


def parameters(function):
    """The parameters of a function with their defaults; those without an annotation are settings."""
    given = inspect.signature(function).parameters.values()
    own = [p for p in given if p.name != "self" and p.annotation is not p.empty]
    named = [
        p.replace(
            default=p.default.__name__ if inspect.isfunction(p.default) else p.default, annotation=p.empty
        )
        for p in own
    ]
    return ", ".join(str(p) for p in named)


def today():
    """All that the list holds, read from the code."""
    group = typer.main.get_command(program().build_app())
    context = group.context_class(group, info_name="tvit", **group.context_settings)
    models = settings_models()
    rows = command_rows("tvit", group, context, None)
    for name, verb in group.commands.items():
        inner = verb.context_class(verb, info_name=name, parent=context, **verb.context_settings)
        rows |= command_rows(name, verb, inner, models[name])
    presets = {
        path.stem: tomllib.loads(path.read_text(encoding="utf-8"))
        for path in Path(next(iter(tvit_cli.__path__))).rglob("presets/*.toml")
    }
    return {
        "verbs": dict.fromkeys(sorted(group.commands), True),
        "public": public_names(),
        "presets": {
            f"{name} {key}": value
            for name, values in sorted(presets.items())
            for key, value in values.items()
        },
        "options": dict(sorted(rows.items())),
    }


def differences(before, now):
    """One line for each name that was removed, added or changed."""
    lines = []
    for name in sorted({*before, *now}):
        if name not in now:
            lines.append(f"removed: {name} (was {before[name]})")
        elif name not in before:
            lines.append(f"added: {name} ({now[name]})")
        elif before[name] != now[name] and isinstance(now[name], dict):
            lines += [
                f"changed: {name}, {k}: {before[name].get(k)} -> {now[name].get(k)}"
                for k in sorted({*before[name], *now[name]})
                if before[name].get(k) != now[name].get(k)
            ]
        elif before[name] != now[name]:
            lines.append(f"changed: {name}: {before[name]} -> {now[name]}")
    return lines


def frozen():
    return json.loads(LIST.read_text(encoding="utf-8"))


@pytest.mark.parametrize("part", ["verbs", "public", "presets", "options"])
def test_command_line_equals_the_frozen_list(part):
    found = differences(frozen()[part], json.loads(json.dumps(today()))[part])
    assert not found, "\n".join([*found, "If this is meant: python tests/test_frozen.py"])


def test_differences_name_removed_added_and_changed():
    before = {"a": {"default": 1}, "b": True, "c": True}
    now = {"a": {"default": 2}, "b": True, "d": True}
    assert differences(before, now) == [
        "changed: a, default: 1 -> 2",
        "removed: c (was True)",
        "added: d (True)",
    ]


def test_frozen_variables_are_known_and_public_names_can_be_had(monkeypatch):
    variables = {row["variable"] for row in frozen()["options"].values() if "variable" in row}
    for name in variables:
        monkeypatch.setenv(name, "~")
    monkeypatch.setenv("TVIT_NOT_A_SETTING", "1")
    refused = tvit("train", "--show-settings")
    assert refused.code == 2
    assert refused.err.count("unknown environment variable") == 1 and "TVIT_NOT_A_SETTING" in refused.err
    assert all(hasattr(tvit_cli, name.partition(".")[0]) for name in frozen()["public"])


@pytest.mark.parametrize("name", ["TvitError", "SettingsError", "DataError", "ModelError"])
def test_error_classes_are_importable(name):
    assert issubclass(getattr(importlib.import_module("tvit_cli.errors"), name), Exception)


def write_list():
    """Write the list, one row per line."""
    parts = [
        f'"{part}": {{\n'
        + ",\n".join(f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in rows.items())
        + "\n}"
        for part, rows in today().items()
    ]
    LIST.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    write_list()
