"""Records to JSON and back: one strict codec for every file that dovetail writes.

A frozen dataclass becomes an object of its fields; where a field may hold one of several
dataclasses, the object also carries ``"kind"``. Decoding checks every field against its type and
names the path of what does not fit. No code runs on load.
"""

import dataclasses
import enum
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, TypeVar

import sympy

from dovetail.ir.errors import PlanError
from dovetail.ir.expr import parse_expr

T = TypeVar("T")
LATER: Mapping[str, bool] = {"later": True}
"""Metadata of a field that was added to a record later: it is left out while it is empty, so
that files and digests from before stay as they are."""
Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


def encode(value: Any) -> Json:
    """``value`` (dataclasses, tuples, mappings, expressions, primitives) as JSON data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: encode(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if not (f.metadata.get("later") and not getattr(value, f.name))
        }
        return {"kind": type(value).__name__} | fields
    if isinstance(value, sympy.Expr):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} has no JSON form")


def canonical(value: Any) -> str:
    """The one compact text of ``value``: what digests are taken over."""
    return json.dumps(encode(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """Hex sha256 over the canonical text."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def decode(data: Json, kind: type[T], where: str = "$") -> T:
    """``data`` as a ``kind``; raises PlanError with the path of the first thing that is off."""
    return typing.cast(T, _decode(data, kind, where))


def _decode(data: Any, kind: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return data
    if origin in (typing.Union, types.UnionType):
        return _decode_union(data, args, where)
    if origin is tuple:
        return _decode_tuple(data, args, where)
    if origin in (dict, Mapping):
        _expect(data, dict, where)
        return {key: _decode(item, args[1], f"{where}.{key}") for key, item in data.items()}
    if origin is typing.Literal:
        if data not in args:
            raise PlanError(
                f"{where}: found {data!r}, expected one of {', '.join(map(repr, args))}"
            )
        return data
    if dataclasses.is_dataclass(kind):
        return _decode_record(data, kind, where)
    return _decode_primitive(data, kind, where)


def _decode_primitive(data: Any, kind: Any, where: str) -> Any:
    if isinstance(kind, type) and issubclass(kind, sympy.Expr):
        _expect(data, str, where)
        return parse_expr(data)
    if isinstance(kind, type) and issubclass(kind, enum.StrEnum):
        if data not in list(kind):
            raise PlanError(f"{where}: found {_short(data)}, expected one of {', '.join(kind)}")
        return kind(data)
    if kind is type(None):
        _expect(data, type(None), where)
        return None
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if kind is int and isinstance(data, bool):
        raise PlanError(f"{where}: found {data!r}, expected an int")
    _expect(data, kind, where)
    return data


def _decode_union(data: Any, options: tuple[Any, ...], where: str) -> Any:
    if data is None and type(None) in options:
        return None
    records = {str(o.__name__): o for o in options if isinstance(o, type) and is_dataclass(o)}
    if isinstance(data, dict) and data.get("kind") in records:
        return _decode_record(data, records[data["kind"]], where)
    problems = []
    for option in options:
        if option is type(None) or dataclasses.is_dataclass(option):
            continue
        try:
            return _decode(data, option, where)
        except PlanError as error:
            problems.append(str(error))
    expected = [getattr(o, "__name__", str(o)) for o in options]
    raise PlanError(f"{where}: found {_short(data)}, expected one of {', '.join(expected)}")


def _decode_tuple(data: Any, args: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    _expect(data, list, where)
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_decode(item, args[0], f"{where}[{i}]") for i, item in enumerate(data))
    if len(data) != len(args):
        raise PlanError(f"{where}: found {len(data)} items, expected {len(args)}")
    return tuple(
        _decode(x, a, f"{where}[{i}]") for i, (x, a) in enumerate(zip(data, args, strict=True))
    )


def _decode_record(data: Any, kind: Any, where: str) -> Any:
    _expect(data, dict, where)
    if data.get("kind", kind.__name__) != kind.__name__:
        raise PlanError(f"{where}: found a {data['kind']!r}, expected a {kind.__name__!r}")
    hints = _hints(kind)
    unknown = set(data) - set(hints) - {"kind"}
    if unknown:
        raise PlanError(f"{where}: unknown field {sorted(unknown)[0]!r} of {kind.__name__}")
    values = {}
    for field in dataclasses.fields(kind):
        if field.name in data:
            values[field.name] = _decode(
                data[field.name], hints[field.name], f"{where}.{field.name}"
            )
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise PlanError(f"{where}: field {field.name!r} of {kind.__name__} is missing")
    try:
        return kind(**values)
    except ValueError as error:
        raise PlanError(f"{where}: {error}") from None


_HINTS: dict[Any, dict[str, Any]] = {}


def _hints(kind: Any) -> dict[str, Any]:
    if kind not in _HINTS:
        _HINTS[kind] = typing.get_type_hints(kind)
    return _HINTS[kind]


def _expect(data: Any, kind: Any, where: str) -> None:
    if not isinstance(data, kind):
        expected = {dict: "an object", list: "a list"}.get(
            kind, getattr(kind, "__name__", str(kind))
        )
        raise PlanError(f"{where}: found {_short(data)}, expected {expected}")


def _short(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= 60 else text[:57] + "..."
