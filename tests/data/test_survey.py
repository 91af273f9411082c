"""A survey finds what sharding would meet, and writes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayllava.data.ingest import ShardSpec
from rayllava.data.survey import survey
from rayllava.place import Place
from tests.data.annotated import Folder

pytestmark = pytest.mark.usefixtures("ray_local")


def test_a_survey_counts_the_good_and_names_the_bad(tmp_path: Path) -> None:
    folder = Folder(tmp_path, 100)
    for n in (1, 2, 3, 4):
        (folder.images / f"{n}.png").unlink()
    (folder.images / "6.png").write_bytes(b"<html>")
    folder.rows[8]["conversations"].insert(0, {"from": "gpt", "value": "Hello."})
    folder.write()
    before = sorted(tmp_path.rglob("*"))
    found = survey("llava", Place(str(folder.annotations)), spec=ShardSpec(images=str(folder.images)))
    assert sorted(tmp_path.rglob("*")) == before
    # 7 names two pictures, one of them 6.png
    assert found.counts == {
        "samples": 94,
        "images": 74,
        "text_only": 20,
        "picture_bytes": found.counts["picture_bytes"],
    }
    assert found.reasons == {"image is missing": 4, "image: not an image: unknown format": 2}
    text = found.text()
    assert "100 records: 94 good" in text and "6 bad" in text
    assert "mended: answer before the first question dropped in 1 records" in text
    assert "record 2 of a.json (id '1'): image 1.png is missing" in text
    with pytest.raises(ValueError, match=r"record 2 of a.json .* policy=skip"):
        found.judge(ShardSpec())
    with pytest.raises(ValueError, match=r"6 of 100 records are rejected already, budget \(0.05\) allows 5"):
        found.judge(ShardSpec(policy="skip", budget=0.05))
    found.judge(ShardSpec(policy="skip", budget=0.06))
