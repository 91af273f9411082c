"""Pages that carry everything themselves: no script, no address, nothing beside the file."""

from __future__ import annotations

import base64
import html
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def page(title: str, body: str) -> str:
    """Return a whole HTML page."""
    return _PAGE.replace("TITLE", html.escape(title)).replace("BODY", body)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table of cells that are HTML already."""
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return "<table>" + "\n".join(lines) + "</table>"


def data_url(content: bytes, kind: str) -> str:
    """Return a picture as an address that holds it; `kind` as in image/KIND."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def drawing(figure: Figure, alt: str) -> str:
    """Return a matplotlib figure as an image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f'<img class="curves" alt="{html.escape(alt)}" src="{data_url(buffer.getvalue(), "png")}">'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>TITLE</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; } th, td { padding: .2em 1em .2em 0; text-align: left; vertical-align: top; }
th { border-bottom: 1px solid #999; } tr + tr td { border-top: 1px solid #eee; }
.curves { max-width: 100%; } pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; }
.wall { display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: 1em; }
figure { margin: 0; font-size: 13px; } figure img { width: 100%; border-radius: 4px; }
.asked { display: grid; grid-template-columns: 200px 1fr; gap: 1.5em; margin: 1.5em 0; font-size: 14px; }
.good { color: #17702f; } .bad { color: #b3261e; }
</style></head><body>
BODY
</body></html>
"""
