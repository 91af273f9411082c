"""The first bytes of a file of annotations, and what people download in its stead."""

from __future__ import annotations

import codecs

from rayllava.place import Place


def head(annotations: Place, *, kind: str) -> bytes:
    """Return how a file begins, a byte order mark and blanks left out; refuse what is plainly something else."""
    if not annotations.is_file():
        raise ValueError(f"annotations={annotations} is not a file; give the {kind} file itself")
    with annotations.open() as file:
        begin = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    if begin.startswith(b"<"):
        raise ValueError(
            f"annotations={annotations} is a web page, not {kind}; download the file itself "
            "(on Hugging Face the address says /resolve/, not /blob/)"
        )
    if begin.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"annotations={annotations} is a git-lfs pointer, not the data; run `git lfs pull` where it lies"
        )
    if not begin:
        raise ValueError(f"annotations={annotations} is empty; download it again")
    return begin
