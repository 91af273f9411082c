"""A little annotated folder to cut into shards."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


class Folder:
    """ROOT/a.json and ROOT/images: record n has picture n.png, every fifth has none, record 7 has two."""

    def __init__(self, root: Path, num_records: int) -> None:
        self.annotations = root / "a.json"
        self.images = root / "images"
        self.images.mkdir(parents=True)
        rng = np.random.default_rng(0)
        self.rows: list[dict[str, Any]] = []
        for n in range(num_records):
            names = [] if n % 5 == 0 else [f"{n}.png"] if n != 7 else ["7.png", "6.png"]
            if names:
                file = io.BytesIO()
                noise = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(noise).save(file, "PNG")
                (self.images / names[0]).write_bytes(file.getvalue())
            question = "".join("<image>\n" for _ in names) + f"Question {n}?"
            talk = [{"from": "human", "value": question}, {"from": "gpt", "value": f"Ünswer {n}."}]
            self.rows.append({"id": n, "conversations": talk} | ({"image": names} if names else {}))
        self.write()

    def write(self) -> None:
        self.annotations.write_text(json.dumps(self.rows))

    def pictures(self, n: int) -> tuple[bytes, ...]:
        return tuple((self.images / name).read_bytes() for name in self.rows[n].get("image", []))
