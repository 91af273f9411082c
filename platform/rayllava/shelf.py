"""Plugs by file name: a package in which every module offers one constant `PLUG`.

The file's name is the key. Plugs are found by listing the folder and imported by name on first use, so a
worker process needs no registration step and an unused plug costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class Shelf(Mapping[str, T]):
    """A read-only mapping from file name to the `PLUG` in that file."""

    def __init__(self, package: str, kind: type[T]) -> None:
        self.package = package
        self.kind = kind

    def __getitem__(self, key: str) -> T:
        names = self.names()
        if key not in names:
            raise LookupError(f"no {self.kind.__name__.lower()} {key!r}; there are: {', '.join(names)}")
        plug = import_module(f"{self.package}.{key}").PLUG
        assert isinstance(plug, self.kind), f"{self.package}.{key}.PLUG is a {type(plug).__name__}"
        return plug

    def __contains__(self, key: object) -> bool:
        return key in self.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def names(self) -> list[str]:
        """Return the keys in alphabetical order."""
        folder = import_module(self.package).__path__[0]
        return sorted(path.stem for path in Path(folder).glob("*.py") if not path.stem.startswith("_"))
