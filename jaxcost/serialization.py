"""Frozen dataclasses as JSON and back, so that a folder of results says what made it."""

from __future__ import annotations

import dataclasses
import importlib
import json
from typing import Any

_TYPE = "type"


def to_json(value: Any) -> Any:
    """Dataclasses of jaxcost as dicts with their `type`, tuples as lists, plain values as they are."""
    if dataclasses.is_dataclass(value):
        name = f"{type(value).__module__}:{type(value).__qualname__}"
        return {_TYPE: name} | {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


def from_json(value: Any) -> Any:
    """The inverse of `to_json`; ValueError for a type that is not a dataclass of jaxcost, or not its fields."""
    if isinstance(value, dict):
        module, _, name = value[_TYPE].partition(":")
        if module.partition(".")[0] != "jaxcost":
            raise ValueError(f"{value[_TYPE]!r} is not a type of jaxcost.")
        found = getattr(importlib.import_module(module), name, None)
        if not dataclasses.is_dataclass(found):
            raise ValueError(f"This version of jaxcost has no {value[_TYPE]!r}.")
        fields = {key: from_json(item) for key, item in value.items() if key != _TYPE}
        try:
            return found(**fields)
        except TypeError as error:
            raise ValueError(f"{value[_TYPE]!r} was written by another version of jaxcost: {error}") from None
    if isinstance(value, list):
        return tuple(from_json(item) for item in value)
    return value


def to_python(value: Any) -> str:
    """The Python that makes a dataclass, what is left at its default left out: for command lines."""
    if isinstance(value, tuple):
        return f"({''.join(to_python(item) + ', ' for item in value).removesuffix(' ')})"
    if isinstance(value, str):
        return json.dumps(value)  # in double quotes, which a shell leaves alone between single ones
    if not dataclasses.is_dataclass(value):
        return repr(value)
    fields = [field for field in dataclasses.fields(value) if getattr(value, field.name) != field.default]
    said = ", ".join(f"{field.name}={to_python(getattr(value, field.name))}" for field in fields)
    return f"{type(value).__name__}({said})"


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """The paths at which two dataclasses differ, such as 'training.steps'."""
    if dataclasses.is_dataclass(one) and type(one) is type(other):
        found = []
        for field in dataclasses.fields(one):
            inner = f"{path}.{field.name}" if path else field.name
            found += differences(getattr(one, field.name), getattr(other, field.name), inner)
        return found
    return [] if one == other else [path]
