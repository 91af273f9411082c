"""A model of the Hugging Face hub, known by its commit, in a folder on this node.

    owner/name[@revision] --commit_of--> owner/name@COMMIT, which means the same for ever
                          --cached-----> where the hub's own cache holds it already
                          --fetched----> a copy (rayllava.copies), made once a node

Once a commit is here, no network is asked again.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rayllava import copies

log = logging.getLogger(__name__)

_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ALLOW = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]
_IGNORE = ["*/*", "consolidated*"]
"""What a model is read from; `consolidated` are the same weights in other projects' names."""
_ELSE = "pytorch_model*.bin"
"""Where there are no safetensors, which is so with what was published before there were any, such as Vicuna."""


def parse(reference: str) -> tuple[str, str] | None:
    """Return (owner/name, revision or "") of a hub id; None for anything else."""
    match = _ID.fullmatch(reference)
    return (match["id"], match["revision"] or "") if match else None


def wanted(names: Iterable[str]) -> list[str]:
    """Return which of a model's files it is read from; they are named from its folder."""
    names = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in _IGNORE)]
    allowed = [*_ALLOW] if any(fnmatchcase(name, "*.safetensors") for name in names) else [*_ALLOW, _ELSE]
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in allowed)]


def commit_of(id_: str, revision: str) -> str:
    """Return the commit that a revision ("": the main branch) is now; LookupError when nobody can say.

    Where the hub does not answer it is what the hub's cache on this node last knew.
    """
    from huggingface_hub import HfApi, snapshot_download

    if _COMMIT.fullmatch(revision):
        return revision
    revision = revision or "main"
    try:
        commit = HfApi().model_info(id_, revision=revision).sha
    except Exception as error:  # the hub client raises a dozen kinds; each means: not from there
        try:
            folder = snapshot_download(id_, revision=revision, local_files_only=True, allow_patterns=["config.json"])
        except OSError:
            raise LookupError(f"the hub gave nothing ({type(error).__name__})") from error
        log.warning("the hub does not answer (%s); taking what its cache here holds of %s", type(error).__name__, id_)
        return Path(folder).name
    assert commit is not None, f"the hub names no commit of {id_}"
    return commit


def cached(id_: str, commit: str) -> Path | None:
    """Return the folder of a commit in the hub's own cache on this node, which may hold a part of it only."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                id_, revision=commit, local_files_only=True, allow_patterns=_ALLOW, ignore_patterns=_IGNORE
            )
        )
    except OSError:  # not there, or known to lack a file
        return None


def fetched(id_: str, commit: str) -> Path:
    """Return a copy of a commit on this node, made of the hub where there is none; OSError when that fails."""
    return copies.copy_of(f"hub://{id_}", commit, lambda folder: _download(id_, commit, folder))


def _download(id_: str, commit: str, folder: Path) -> None:
    from huggingface_hub import HfApi, snapshot_download
    from tqdm.auto import tqdm

    class Silent(tqdm):  # type: ignore[type-arg]
        """Instead of the hub's own bars: `copies.watched` says how far it is."""

        def __init__(self, *words: Any, **more: Any) -> None:
            super().__init__(*words, **more | {"disable": True})

    listed = HfApi().model_info(id_, revision=commit, files_metadata=True).siblings or []
    files = {file.rfilename: file for file in listed}
    files = {name: files[name] for name in wanted(files)}
    with copies.watched(f"downloading {id_}", folder, num_bytes=sum(file.size or 0 for file in files.values())):
        snapshot_download(
            id_,
            revision=commit,
            local_dir=folder,
            allow_patterns=list(files),
            tqdm_class=Silent,
        )
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's notes
    for name, file in files.items():
        if file.lfs:
            with (folder / name).open("rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
            if found != file.lfs.sha256:
                raise OSError(f"{name} of {id_} does not match the hub's digest of it; it is downloaded again")
