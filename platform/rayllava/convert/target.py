"""Where a conversion goes: free, with room, and whole or not there at all."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rayllava import durable

log = logging.getLogger(__name__)


class Target:
    """A folder that is being made, beside its place."""

    def __init__(self, dst: Path, beside: Path) -> None:
        self.dst, self.folder = dst, beside
        self.at = dst
        """Where it will be."""

    def end(self, proof: dict[str, Any], *, failed: bool) -> None:
        """Write proof.json; what failed its proof goes beside DST, which stays as it was."""
        durable.write_json(self.folder / "proof.json", _plain(proof))
        if failed:
            self.at = self.dst.with_name(f"{self.dst.name}.unproved")
            durable.take_dir(self.folder, self.at)


def free(dst: Path, sources: Iterable[Path | str], *, force: bool) -> Path:
    """Return DST as the disk knows it; ValueError when writing there would destroy something."""
    if "://" in str(dst) or str(dst).startswith(("s3:", "gs:")):
        raise ValueError(f"DST={dst} is an address; give a folder on a disk, and copy it from there")
    dst = dst.resolve()
    for source in map(str, sources):
        there = Path(source).resolve()
        if source and "://" not in source and there.exists() and dst in (there, *there.parents):
            raise ValueError(f"DST={dst} would overwrite {source}; give another folder")
    if dst.exists() and not dst.is_dir():
        raise ValueError(f"DST={dst} is a file; give a folder")
    if os.path.ismount(dst):
        raise ValueError(f"DST={dst} is a disk of its own; give a folder on it")
    if dst.is_dir() and any(dst.iterdir()) and not force:
        raise ValueError(f"DST={dst} is not empty; give another folder, or add --force to replace it")
    for left in dst.parent.glob(f".{dst.name}.*.partial"):
        if left.is_dir() and not Path(f"/proc/{left.suffixes[-2][1:]}").exists():
            log.warning("%s was left by a conversion that was killed; remove it", left)
    durable.check_writable(dst.parent)
    return dst


def check_room(dst: Path, num_bytes: float) -> None:
    """Raise ValueError unless so much fits on DST's disk."""
    room = shutil.disk_usage(dst.parent).free
    if num_bytes > room:
        raise ValueError(
            f"DST={dst}: {num_bytes / 1e9:.1f} GB are to be written, and its disk has room for {room / 1e9:.1f}; "
            "give a folder on another"
        )


@contextmanager
def making(dst: Path) -> Iterator[Target]:
    """Yield a target that is at its place when the block ends well, and vanishes otherwise.

    Raises ValueError when the disk does not take what is written.
    """
    target: Target | None = None
    try:
        with durable.new_dir(dst) as beside:
            target = Target(dst, beside)
            yield target
            if target.at != dst:
                raise _Elsewhere
    except _Elsewhere:
        return
    except OSError as error:
        raise ValueError(f"DST={dst} cannot be written ({error.strerror or error}); nothing is left of it") from error


class _Elsewhere(Exception):
    """What was made lies elsewhere already."""


def _plain(value: Any) -> Any:
    """Return a value that JSON has words for: what is infinitely apart is null."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
