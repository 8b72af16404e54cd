"""`--set FIELD=VALUE`: dotted fields of nested frozen dataclasses, each value checked against the type of its field."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from genembed.errors import ConfigurationError

Settings = TypeVar("Settings")

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", NoneType: "null"}


def overridden(settings: Settings, assignments: Sequence[str]) -> Settings:
    """Return settings with some fields changed; the combination is checked once, when all of them are.

    Args:
        settings: A frozen dataclass whose fields may be dataclasses in turn.
        assignments: `field=value` or `field.field=value`, each value as JSON, or else taken as a string.

    Raises:
        ConfigurationError: If a field is unknown or given twice, a value has another type than its field, or the result cannot work.
    """
    draft = _Draft.of(settings)
    given: list[str] = []
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigurationError(f"--set {assignment}: a value is missing; write it as FIELD=VALUE.")
        twice = next((other for other in given if f"{other}.".startswith(f"{path}.")), None)
        if twice is not None:
            raise ConfigurationError(f"--set {assignment}: {twice} was set before and would be lost; leave one of them out.")
        given.append(path)
        draft.set(path.split("."), _parsed(text), f"--set {assignment}")
    result: Settings = draft.build()
    return result


class _Draft:
    """A dataclass whose fields can still be changed, without the checks that a half-changed one might fail."""

    def __init__(self, kind: type, values: dict[str, Any]) -> None:
        self.kind, self.values = kind, values
        self.hints = get_type_hints(kind)

    @classmethod
    def of(cls, value: Any) -> Any:
        """Make a draft of a dataclass; any other value stays as it is."""
        if not is_dataclass(value):
            return value
        return cls(type(value), {field.name: cls.of(getattr(value, field.name)) for field in fields(value)})

    @classmethod
    def read(cls, kind: type, value: Mapping[str, Any], place: str) -> _Draft:
        """Make a draft of a JSON object; fields that it leaves out have their defaults."""
        draft = cls(kind, {})
        for name, own in value.items():
            draft._check_name(name, place)
            draft.values[name] = _converted(own, draft.hints[name], f"{place}: {name}")
        missing = [field.name for field in fields(kind) if field.name not in value and _is_required(field)]
        if missing:
            raise ConfigurationError(f"{place}: {', '.join(missing)} must be given.")
        return draft

    def set(self, path: Sequence[str], value: Any, place: str) -> None:
        """Change the field at a path."""
        name, *rest = path
        self._check_name(name, place)
        if not rest:
            self.values[name] = _converted(value, self.hints[name], place)
            return
        inner = self._inner(name)
        if not isinstance(inner, _Draft):
            raise ConfigurationError(f"{place}: {name} is {_shown(inner)}, which has no fields.{self._way_out(path, value)}")
        inner.set(rest, value, place)

    def build(self) -> Any:
        """Make the dataclass; it checks itself."""
        return self.kind(**{name: _built(value) for name, value in self.values.items()})

    def _inner(self, name: str) -> Any:
        """Return a field's value; where it was left out, a draft of its default, so that fields of it can be set."""
        if name not in self.values:
            field = next(field for field in fields(self.kind) if field.name == name)
            self.values[name] = _Draft.of(field.default if field.default_factory is MISSING else field.default_factory())
        return self.values[name]

    def _check_name(self, name: str, place: str) -> None:
        known = [field.name for field in fields(self.kind)]
        if name not in known:
            raise ConfigurationError(f"{place}: {self.kind.__name__} has no field {name!r}; known: {', '.join(known)}.")

    def _way_out(self, path: Sequence[str], value: Any) -> str:
        """Say how a field that is None becomes settings of which all but one have their defaults."""
        if self.values[path[0]] is not None or not any(map(is_dataclass, _alternatives(self.hints[path[0]]))):
            return ""
        for part in reversed(path[1:]):
            value = {part: value}
        return f" Set it as a whole: --set '{path[0]}={json.dumps(value, ensure_ascii=False)}', the other fields have their defaults then."


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _built(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_built(item) for item in value)
    return value.build() if isinstance(value, _Draft) else value


def _shown(value: Any) -> str:
    return f"{json.dumps(value, ensure_ascii=False, default=repr):.80}"


def _parsed(text: str) -> Any:
    """Read a value as JSON; what is none is a string, also NaN and Infinity, which JSON does not know."""

    def refuse(constant: str) -> Any:
        raise ValueError(constant)

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return text


def _converted(value: Any, hint: Any, place: str) -> Any:
    """Return a JSON value as its field wants it: lists as tuples, whole numbers as floats, objects as drafts."""
    accepted = [kind for kind in _alternatives(hint) if _accepts(kind, value)]
    if not accepted:
        raise ConfigurationError(f"{place}: {_described(hint)} is needed, not {_shown(value)}.")
    kind = accepted[0]
    if isinstance(value, list):
        return tuple(_converted(item, item_hint, place) for item, item_hint in zip(value, _item_hints(kind, len(value)), strict=True))
    if isinstance(value, dict):
        # Of several kinds of settings the one that has all these fields.
        best = next((option for option in accepted if set(value) <= {field.name for field in fields(option)}), kind)
        return _Draft.read(best, value, place)
    return float(value) if kind is float else value


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, an annotation's other kinds alone."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _accepts(kind: Any, value: Any) -> bool:
    """Whether a JSON value is of a kind; the items of a list and the fields of an object are looked at later."""
    origin = get_origin(kind)
    if origin is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if origin is tuple:
        return isinstance(value, list) and len(_item_hints(kind, len(value))) == len(value)
    if is_dataclass(kind):
        return isinstance(value, dict)
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    return isinstance(value, kind)


def _item_hints(kind: Any, count: int) -> Sequence[Any]:
    hints = get_args(kind)
    return hints[:1] * count if hints[-1] is Ellipsis else hints


def _described(hint: Any) -> str:
    return " or ".join(_described_one(kind) for kind in _alternatives(hint))


def _described_one(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if origin is tuple:
        hints = get_args(kind)
        count = "" if hints[-1] is Ellipsis else f"of {len(hints)} "
        return f"a list {count}in brackets, each {_described(hints[0])}"
    return f"an object of {', '.join(field.name for field in fields(kind))}" if is_dataclass(kind) else _WORDS[kind]
