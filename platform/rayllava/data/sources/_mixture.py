"""What the files that list portions have in common: paths that are relative to where the file lies."""

from __future__ import annotations

from pathlib import Path

from rayllava.place import Place


def beside(mixture: Place, path: str) -> Place:
    """Return a path as seen from the folder of a mixture file; an absolute path or an address stays as it is."""
    if "://" in path or Path(path).is_absolute():
        return Place(path)
    if not mixture.remote:
        return Place(str((mixture.local.parent / path).absolute()))
    address, mark, options = mixture.text.partition("?")
    return Place(address.rpartition("/")[0] + mark + options) / path
