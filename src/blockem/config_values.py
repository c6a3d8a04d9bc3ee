"""Plain values to frozen dataclasses and back: what a recipe, a YAML file and `--set` share."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Union

from blockem.errors import BlockemError

MOST_SEED = 2**32 - 1
"""NumPy's generator takes no larger one."""


def need(condition: bool, sentence: str) -> None:
    """Raise a BlockemError of one sentence where a value is wrong."""
    if not condition:
        raise BlockemError(sentence)


def need_positive(value: float, name: str) -> None:
    """Raise unless `value` is a finite number above 0."""
    need(0 < value < math.inf, f"{name} is {value:g}; it must be a positive number")


def need_finite(config: Any, stage: str) -> None:
    """Raise where a float field of a stage's dataclass, or one in a tuple, is infinite or no number.

    Comparisons let such values by (nothing is below NaN), and what they do shows only after hours of training.
    """
    for one in dataclasses.fields(config):
        value = getattr(config, one.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float):
                need(math.isfinite(number), f"{stage}{'.' if stage else ''}{one.name} is {number}; it must be a finite number")


def read_yaml(path: Path, what: str, language: str = "YAML") -> Any:
    """What a YAML file holds (safe loader). `language` is what the file is said to be; JSON is YAML too.

    Raises:
        BlockemError: the file is missing or not YAML.
    """
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BlockemError(f"{path}: no such {what}") from error
    except OSError as error:
        raise BlockemError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # beside its own errors the loader lets out what dates, numbers and tags that are none raise
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        what_is_wrong = getattr(error, "problem", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise BlockemError(f"{where}: not {language} ({what_is_wrong})") from error


def plain(value: Any) -> Any:
    """JSON-able values: tuples become lists."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def later(default: Any) -> Any:
    """A field that came after results were kept: at its default it does not count in keys (`keyed`)."""
    return dataclasses.field(default=default, metadata={"later": True})


def keyed(config: Any) -> dict[str, Any]:
    """The fields of a configuration for keys and provenance, nested ones too; later fields are left out at their default.

    So what was finished before there was such a field keeps its key.
    """
    found = {}
    for one in dataclasses.fields(config):
        value = getattr(config, one.name)
        if not (one.metadata.get("later") and value == one.default):
            found[one.name] = keyed(value) if dataclasses.is_dataclass(value) else plain(value)
    return found


def convert(value: Any, kind: Any, path: str) -> Any:
    """A value, perhaps text as typed, as the kind of the field at `path`."""
    if typing.get_origin(kind) in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "")):
            return None
        kind = next(one for one in typing.get_args(kind) if one is not type(None))
    try:
        if kind is bool:
            if isinstance(value, bool):
                return value
            return {"true": True, "false": False, "yes": True, "no": False}[str(value).lower()]
        if kind is int:
            if isinstance(value, bool) or float(value) != int(float(value)):
                raise ValueError
            return int(float(value))
        if kind is float:
            if isinstance(value, bool):
                raise ValueError
            return float(value)
        if kind is str:
            if isinstance(value, (dict, list)):
                raise ValueError
            return str(value)
        if typing.get_origin(kind) is tuple:
            if isinstance(value, dict):
                raise ValueError
            inner = typing.get_args(kind)[0]
            items = value.split(",") if isinstance(value, str) else value
            return tuple(convert(item, inner, path) for item in items if item != "")
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise BlockemError(f"{path} is {value!r}; it must be {_kind_name(kind)}") from error
    raise TypeError(f"no conversion for {kind}")


def _kind_name(kind: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if kind in names:
        return names[kind]
    return "a list, such as " + {int: "4,8", float: "0.2,0.4"}.get(typing.get_args(kind)[0], "one,two")


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean x?)` where a known name is close to a wrong one, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def build(cls: Any, values: Any, path: str) -> Any:
    """A dataclass from nested plain values; fields left out keep their defaults.

    Raises:
        BlockemError: an unknown field or a value of the wrong kind.
    """
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise BlockemError(f"recipe: {path or 'the file'} must be a mapping of fields")
    hints = typing.get_type_hints(cls)
    unknown = set(values) - set(hints)
    if unknown:
        wrong, before = sorted(map(str, unknown))[0], f"{path}." if path else ""
        raise BlockemError(f"recipe: unknown field {before + wrong!r}{nearest(wrong, hints)}; known here: {', '.join(hints)}")
    built = {}
    for name, value in values.items():
        place = f"{path}.{name}" if path else name
        built[name] = build(hints[name], value, place) if dataclasses.is_dataclass(hints[name]) else convert(value, hints[name], place)
    return cls(**built)
