"""Frozen groups of knobs, and `field.path=value` words that change them."""

from __future__ import annotations

import difflib
import json
from typing import Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

S = TypeVar("S", bound="Spec")


class Spec(BaseModel):
    """A frozen group of knobs; unknown names are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shorthand: ClassVar[str | None] = None
    """The field that `name=value` means when `name` is the whole spec."""

    def but(self, **changes: Any) -> Self:
        """Return a validated copy with some fields changed."""
        return type(self).model_validate({**dict(self), **changes})


def override(spec: S, words: list[str]) -> S:
    """Return a recipe, or any other spec, with `field.path=value` words applied, left to right.

    Raises ValueError naming the field, the value and what would be right.
    """
    tree = spec.model_dump()
    values: dict[str, str] = {}
    for word in words:
        path, equals, text = word.partition("=")
        if not equals or not path:
            raise ValueError(f"{word!r} is not field.path=value")
        path = _put(type(spec), tree, path, text)
        values[path] = text
    try:
        return type(spec).model_validate(tree)
    except ValidationError as error:
        raise ValueError(_one_line(type(spec), error, values)) from error


def words(spec: Spec, base: Spec | None, *, prefix: str = "") -> list[str]:
    """Return what `override` has to apply to `base` to get `spec`; without a base, a word for every leaf."""
    found = []
    for name in type(spec).model_fields:
        mine, old = getattr(spec, name), getattr(base, name, None)
        if base is not None and mine == old:
            continue
        if isinstance(mine, Spec):
            # A group that was not there has its defaults; one of another kind may keep what both have.
            below = type(mine).model_construct() if base is not None and old is None else old
            found += words(mine, below if type(below) is type(mine) else None, prefix=f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}={_text(mine)}")
    return found


def _text(value: Any) -> str:
    """Return the shortest text that `_value` reads as the value."""
    if isinstance(value, str) and _value(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)


def _put(spec: Any, tree: dict[str, Any], path: str, text: str) -> str:
    """Set a leaf of the tree and return its full path."""
    branch = tree
    options: dict[str, Any] = {}
    *parents, leaf = path.split(".")
    for depth, key in enumerate(parents):
        options = _options(spec, key, ".".join(parents[: depth + 1]))
        spec = _spec_of(spec, key, ".".join(parents[: depth + 1]), branch)
        if not _is_spec(spec):
            raise ValueError(f"{path}={text}: {'.'.join(parents[: depth + 1])} has no fields of its own")
        if branch.get(key) is None:
            branch[key] = {}
        branch = branch[key]
    field = _spec_of(spec, leaf, path, branch)
    if _is_spec(field):
        inner = field.shorthand
        if inner is None:
            some = f"{path}.{next(iter(field.model_fields))}"
            raise ValueError(f"{path}={text}: {path} is a group of fields; set one of them, as in {some}=...")
        options = _options(spec, leaf, path)
        branch = branch[leaf]
        leaf, path = inner, f"{path}.{inner}"
    if leaf == "kind" and text in options:  # another kind of group: it keeps the fields that both have
        for key in branch.keys() - options[text].model_fields.keys():
            del branch[key]
    branch[leaf] = _value(text)
    return path


def _spec_of(spec: Any, key: str, path: str, branch: dict[str, Any]) -> Any:
    """Return the type of a field: a Spec class for a group, anything else for a leaf."""
    options = _options(spec, key, path)
    if len(options) > 1:  # a union of specs: the one that the tree holds now
        return options[branch[key]["kind"]]
    return next(iter(options.values()), spec.model_fields[key].annotation)


def _options(spec: Any, key: str, path: str) -> dict[str, Any]:
    """Return the Spec classes that a field may hold, by their kind; none for a leaf."""
    fields = spec.model_fields
    if key not in fields:
        near = difflib.get_close_matches(key, fields, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"unknown field {path}; {hint}there are: {', '.join(fields)}")
    kind = fields[key].annotation
    classes = [option for option in getattr(kind, "__args__", (kind,)) if _is_spec(option)]
    if len(classes) < 2:
        return dict.fromkeys(("",), classes[0]) if classes else {}
    return {option.model_fields["kind"].default: option for option in classes}


def _is_spec(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Spec)


def _value(text: str) -> Any:
    """Read numbers, booleans, null and lists as JSON; anything else is the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _one_line(spec: Any, error: ValidationError, values: dict[str, str]) -> str:
    first = error.errors()[0]
    path = _path(spec, first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    given = values.get(path, values.get(f"{path}.kind", first["input"]))
    return f"{path}={given}: {message}" if path else message


def _path(spec: Any, where: tuple[int | str, ...]) -> str:
    """Return the field that an error is about; pydantic names the kind of a group behind the group itself."""
    names: list[str] = []
    options: dict[str, Any] = {}
    for part in map(str, where):
        if part in options:
            spec = options[part]
            continue
        names.append(part)
        if _is_spec(spec) and part in spec.model_fields:
            options = _options(spec, part, part)
            spec = next(iter(options.values()), None)
    return ".".join(names)
