"""Kills a saving group again and again and looks at what is left; a program, so that its children are cheap forks.

    python -m tests.checkpoint.torn FOLDER NUM_KILLS SEED    prints what it counted as JSON

A child decides an attempt and saves checkpoints on one to three ranks with a file layer that fails
(tests.checkpoint.faults), or is killed from outside at a random moment, and tells through a pipe each step whose
save has ended. After each death the real reader must find the newest of those or a newer one, with the values that
belong to it. Now and then a byte of the newest checkpoint is flipped before the next child starts.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

from rayllava.checkpoint import ledger
from rayllava.checkpoint.lease import Lease
from rayllava.checkpoint.store import MANIFEST, Store, StoreError
from rayllava.place import Place
from tests.checkpoint.faults import Faults
from tests.checkpoint.group import Group, check_content

KILLS_A_RUN = 40
SAVES = 6
"""Of a child that nothing happens to."""


def main(folder: Path, num_kills: int, seed: int) -> Counter[str]:
    draw, counts = random.Random(seed), Counter[str]()
    while counts["kills"] < num_kills:
        shutil.rmtree(folder, ignore_errors=True)
        run = Place(str(folder / "run"))
        until = min(num_kills, counts["kills"] + KILLS_A_RUN)
        with Lease(run) as lease:
            acknowledged = 0
            while counts["kills"] < until:
                acknowledged = round_(run, lease.id, draw, acknowledged, counts)
        check_ledger(run)
    return counts


def round_(run: Place, driver: str, draw: random.Random, acknowledged: int, counts: Counter[str]) -> int:
    """Let one child live and die, and check what it left; return the step that is known to be safe now."""
    reader, writer = os.pipe()
    seed, outside = draw.getrandbits(32), draw.random() < 0.4
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        code = 1
        try:
            code = child(run, driver, writer, seed=seed, faulty=not outside)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    if outside:
        time.sleep(draw.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(reader) as pipe:
        lines = [line for line in pipe.read().splitlines() if line]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        counts["kills"] += 1
    else:
        counts[{0: "undisturbed", 3: "errors"}[os.WEXITSTATUS(status)]] += 1
    counts["commits"] += len(lines)
    acknowledged = max([acknowledged, *map(int, lines)])
    store = Store(run)
    found = store.latest()
    step = found.manifest.step if found else 0
    assert step >= acknowledged, f"step {acknowledged} was saved, and {step} is what is left"
    if found is None:
        return 0
    check_content(store, found)
    counts["loads"] += 1
    if draw.random() < 0.1:
        counts["flips"] += 1
        flip(store.folder(step), draw)
        again = store.latest()
        assert again is None or again.manifest.step < step, f"a flipped byte in {found.name} was not found"
        if again:
            check_content(store, again)
        return again.manifest.step if again else 0
    return acknowledged


def flip(folder: Place, draw: random.Random) -> None:
    names = sorted(
        place.name for place in folder.files() if place.name.startswith("state-") or place.name == MANIFEST
    )
    manifest = json.loads((folder / MANIFEST).read_bytes())
    path = (folder / draw.choice([name for name in names if name in manifest["files"] or name == MANIFEST])).local
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def child(run: Place, driver: str, pipe: int, *, seed: int, faulty: bool) -> int:
    draw = random.Random(seed)
    if faulty:
        Faults(seed).install()
    try:
        group = Group(run, driver, world_size=draw.randint(1, 3), keep=draw.randint(1, 3), patience_s=1.0)
        for _ in range(SAVES):
            step = group.done + draw.randint(1, 3)
            group.save(step)
            os.write(pipe, f"{step}\n".encode())
    except (OSError, StoreError):
        return 3
    return 0


def check_ledger(run: Place) -> None:
    found = Store(run).latest()
    if found is None:
        return
    segments = reversed(list(ledger.chain(run, found.manifest.ledger)))
    steps = [entry.step for segment in segments for entry in segment.entries]
    assert steps == list(range(1, found.manifest.step + 1))


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
