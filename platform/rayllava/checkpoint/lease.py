"""One driver a run.

    RUN/drivers/ID.json    a claim: written once, removed when its driver ends or is found dead
    RUN/drivers/ID.beat    a number that grows while the driver holds RUN; a claim without one is not yet a holder's

Whoever wants RUN writes a claim, then lists all claims, and holds RUN when no other is alive. Each writes before
it lists, so of two that come at once the one that lists last sees the other: both may step back, but both cannot
hold. That needs no lock and no conditional write, only that a finished write shows in every later listing, as it
does on POSIX file systems, S3 and Google Cloud Storage.

A claim is dead when its process is gone, or, written on another machine, when its number stands still for
DEAD_S seconds. A driver that was only asleep finds its claim gone; `check_held` tells, and what it had under way
is fenced by the next attempt.
"""

from __future__ import annotations

import logging
import os
import random
import secrets
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal, Self

from rayllava.place import Place
from rayllava.spec import Spec

log = logging.getLogger(__name__)

BEAT_S = 10.0
DEAD_S = 30.0


class Claim(Spec):
    """Who wants RUN, or holds it: RUN/drivers/ID.json."""

    id: str
    pid: int
    born: str
    """When the process started, in the kernel's ticks, since a pid is used again; empty where that is not told."""
    host: str
    home: str
    """Where the pid means something: host, boot and pid namespace."""
    since: str


class Lease:
    """Holds RUN for this process while the block runs; ValueError when somebody else trains it."""

    def __init__(self, run: Place, *, beat_s: float = BEAT_S, dead_s: float = DEAD_S) -> None:
        self.run = run
        self.id = ""
        self._dir = run / "drivers"
        self._beat_s = beat_s
        self._dead_s = dead_s
        self._watched: dict[str, tuple[bytes, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> Self:
        self.id = self._take()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        try:
            self._remove(self.id)
        except OSError as error:  # what was done under the lease is done; the next driver finds this one gone
            log.warning("a claim stays in %s: %s", self._dir, error)

    def _take(self) -> str:
        """Return the id of the claim by which RUN is held."""
        deadline = time.monotonic() + 2 * self._dead_s
        mine: list[str] = []
        try:
            while True:
                late = time.monotonic() > deadline
                try:
                    if self._try(mine, late=late):
                        return mine.pop()
                except OSError as error:  # a store that is busy, or a claim that went while it was read
                    if late:
                        raise
                    log.warning("%s: %s; asking again", self._dir, error)
                time.sleep(random.uniform(0.1, 1.0) * min(1.0, self._dead_s / 5))
        finally:
            with suppress(OSError):
                self._withdraw(mine)

    def _try(self, mine: list[str], *, late: bool) -> bool:
        """Add a claim to `mine` and return whether it holds RUN; otherwise all of them are withdrawn."""
        claim = _claim()
        mine.append(claim.id)
        self._place(claim.id, "json").write_bytes(claim.model_dump_json(indent=1).encode() + b"\n")
        others = {other.id: other for other in self._claims() if other.id not in mine}
        states = {id_: self._state(other) for id_, other in others.items()}
        if all(state == "dead" for state in states.values()):
            for other in others.values():
                log.info("%s was left by pid %d on %s, which is gone", self.run, other.pid, other.host)
                self._remove(other.id)
            self._place(claim.id, "beat").write_bytes(b"0")
            # Whoever found this process asleep between its claim and its first beat has removed the claim.
            if self._place(claim.id, "json").is_file():
                return True
        self._withdraw(mine)
        for id_, state in states.items():
            if state == "holds" or (late and state == "asks"):
                raise ValueError(
                    f"out={self.run} is being trained by pid {others[id_].pid} on {others[id_].host} since "
                    f"{others[id_].since}; wait for it, end it, or give another out"
                )
        return False

    def _withdraw(self, mine: list[str]) -> None:
        while mine:
            self._remove(mine[-1])
            mine.pop()

    def _state(self, claim: Claim) -> Literal["dead", "asks", "holds"]:
        """Judge another's claim by what is known of it so far."""
        number = b""
        with suppress(FileNotFoundError):
            number = self._place(claim.id, "beat").read_bytes()
        if claim.home == _home():
            return "dead" if not _runs(claim) else "holds" if number else "asks"
        now = time.monotonic()
        if claim.id not in self._watched:
            self._watched[claim.id] = number, now
            log.info(
                "waiting up to %.0f s to see whether pid %d on %s is still at %s",
                self._dead_s,
                claim.pid,
                claim.host,
                self.run,
            )
        before, since = self._watched[claim.id]
        if number != before:
            return "holds"
        return "dead" if now - since >= self._dead_s else "asks"

    def _claims(self) -> list[Claim]:
        found = []
        for place in self._dir.files((".json",)):
            with suppress(FileNotFoundError):  # removed since it was listed
                found.append(Claim.model_validate_json(place.read_bytes()))
        return found

    def _beat(self) -> None:
        number = 0
        while not self._stop.wait(self._beat_s):
            number += 1
            try:
                check_held(self.run, self.id)
                self._place(self.id, "beat").write_bytes(str(number).encode())
            except ValueError as error:
                log.error("%s", error)
                return
            except OSError as error:  # a store may be back at the next beat
                log.warning("no beat in %s: %s", self._dir, error)

    def _remove(self, id_: str) -> None:
        for end in ("json", "beat"):
            self._place(id_, end).remove()

    def _place(self, id_: str, end: str) -> Place:
        return self._dir / f"{id_}.{end}"


def check_held(run: Place, driver: str) -> None:
    """Raise ValueError when the driver with this id no longer holds RUN."""
    if not (run / "drivers" / f"{driver}.json").is_file():
        raise ValueError(
            f"out={run} is not held by this driver any more: it was silent for {DEAD_S:.0f} s and another took over"
        )


def _claim() -> Claim:
    return Claim(
        id=secrets.token_hex(8),
        pid=os.getpid(),
        born=_process(os.getpid())[1],
        host=socket.gethostname(),
        home=_home(),
        since=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def _home() -> str:
    boot = space = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = str(Path("/proc/self/ns/pid").readlink())
    return f"{socket.gethostname()}/{boot}/{space}"


def _runs(claim: Claim) -> bool:
    """Return whether the process of a claim that was written at home is still there."""
    try:
        os.kill(claim.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    state, born = _process(claim.pid)
    return state not in ("Z", "X") and born == claim.born  # a zombie only waits for its parent


def _process(pid: int) -> tuple[str, str]:
    """Return the state and the start time of a process, both empty where there is no /proc; see proc(5)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]
