"""From plain mappings to frozen dataclasses: every unknown key, wrong type or bound gets the same one-line error."""

import dataclasses
import functools
import inspect
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from common.config.errors import LARGEST, ConfigError, OutOfBounds, nearest, shown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance  # which a type checker alone knows

T = TypeVar("T", bound="DataclassInstance")


def typed(cls: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """`mapping` as the dataclass `cls`; `where` is the section (`file`, `file: section`) and begins the errors.

    A field's annotation says its type and, with `Annotated[…, bound]`, what it allows (`common.config.bounds`); a
    class's `__post_init__` says by a ValueError what its fields have to do with each other.
    """
    return typed_section(cls, mapping, where, f"{where}.")


def typed_section(cls: type[T], mapping: Mapping[str, Any], where: str, prefix: str) -> T:
    """`typed` with the text that goes before a key: that of a section ends in a dot, that of a file in a colon."""
    _require_mapping(mapping, where)
    hints = get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    _refuse_unknown(mapping, fields, where)

    missing = [
        name for name, field in fields.items() if name not in mapping and _required(field)
    ]
    if missing:
        raise ConfigError(f"{where}: missing key {missing[0]!r}")

    values = {
        key: convert(hints[key], value, f"{prefix}{key}") for key, value in mapping.items()
    }

    try:
        return cls(**values)
    except ValueError as error:  # of `__post_init__`, which begins with the key
        raise ConfigError(f"{prefix}{error}") from error


def typed_keywords(
    function: Callable, mapping: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """`mapping` as the keyword-only arguments of a function or class, by the same rules as `typed`."""
    _require_mapping(mapping, where)
    inner = function.func if isinstance(function, functools.partial) else function
    # The checker fears that `__init__` is a subclass's: it is the one that is going to be called.
    annotated = inner.__init__ if isinstance(inner, type) else inner  # type: ignore[misc]
    hints = get_type_hints(annotated, include_extras=True)
    parameters = inspect.signature(inner).parameters.values()
    known = [
        parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY
    ]
    _refuse_unknown(mapping, known, where)

    return {key: convert(hints[key], value, f"{where}.{key}") for key, value in mapping.items()}


def _require_mapping(mapping: Any, where: str) -> None:
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where}: expected a section, got {shown(mapping)}")


def _refuse_unknown(mapping: Mapping[str, Any], known: Any, where: str) -> None:
    for key in mapping:
        if key not in known:
            raise ConfigError(
                f"{where}: unknown key {shown(key)}; {nearest(str(key)[:100], known)}"
            )


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotation `hint` wants it, or a ConfigError that begins with `where`."""
    origin = get_origin(hint)
    args = get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        return _convert_bounded(args[0], args[1:], value, where)
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is Literal:
        return _convert_literal(args, value, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else typed(hint, value, where)
    if origin is tuple:
        return _convert_tuple(args, value, where)

    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a mapping, got {shown(value)}")
        return {
            convert(args[0], str(key), where): convert(
                args[1], item, f"{where}.{str(key)[:60]}"
            )
            for key, item in value.items()
        }

    if origin is not None and issubclass(origin, Sequence):
        return _convert_tuple((args[0], ...), value, where)

    return _convert_scalar(hint, value, where)


def _convert_bounded(hint: Any, bounds: Sequence[Any], value: Any, where: str) -> Any:
    value = convert(hint, value, where)
    for bound in bounds:
        complaint = bound.complaint(value)
        if complaint is not None:
            raise OutOfBounds(f"{where}: {shown(value)} {complaint}")

    return value


def _convert_literal(allowed: Sequence[Any], value: Any, where: str) -> Any:
    for item in allowed:
        if type(value) is type(item) and value == item:  # 1 is neither true nor 1.0
            return value
    raise ConfigError(f"{where}: {shown(value)} is not one of {', '.join(map(str, allowed))}")


def _convert_scalar(hint: type, value: Any, where: str) -> Any:
    if type(value) is int and hint in (int, float) and abs(value) > LARGEST:
        raise OutOfBounds(f"{where}: {shown(value)}: an integer beyond 64 bits")
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{where}: expected {hint.__name__}, got {shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise OutOfBounds(f"{where}: {value} is not finite")

    return value


def _convert_tuple(args: Sequence[Any], value: Any, where: str) -> tuple:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{where}: expected a list, got {shown(value)}")

    hints = [args[0]] * len(value) if args[-1] is Ellipsis else args
    if len(hints) != len(value):
        raise ConfigError(f"{where}: expected {len(hints)} values, got {shown(value)}")

    items = []
    for i, (hint, item) in enumerate(zip(hints, value, strict=True)):
        items.append(convert(hint, item, f"{where}[{i}]"))
    return tuple(items)


def _convert_union(args: Sequence[Any], value: Any, where: str) -> Any:
    if value is None and type(None) in args:
        return None

    members = [arg for arg in args if arg is not type(None)]

    for arg in members:
        try:
            return convert(arg, value, where)
        except OutOfBounds:  # of the right type
            raise
        except ConfigError:
            if len(members) == 1:
                raise

    names = " or ".join(_name(arg) for arg in members)
    raise ConfigError(f"{where}: expected {names}, got {shown(value)}")


def _name(hint: Any) -> str:
    """An annotation as a message says it."""
    origin = get_origin(hint)
    args = get_args(hint)
    if origin is Annotated:
        return _name(args[0])
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin is tuple:
        return "a list"

    return hint.__name__
