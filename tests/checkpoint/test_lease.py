"""A run has one driver: the living are left alone, the dead are found out, and of many at once one gets it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rayllava.checkpoint import lease as lease_
from rayllava.checkpoint.lease import Claim, Lease, check_held
from rayllava.place import Place

ROOT = Path(__file__).resolve().parents[2]
HELD = r"out=.* is being trained by pid {pid} on \S+ since \d{{4}}-\d\d-\d\dT[\d:]+Z; wait for it, end it, or give"


def files(run: Place) -> list[str]:
    return [place.name for place in (run / "drivers").files()]


def write(run: Place, claim: Claim, beat: bytes | None) -> None:
    (run / "drivers" / f"{claim.id}.json").write_bytes(claim.model_dump_json().encode())
    if beat is not None:
        (run / "drivers" / f"{claim.id}.beat").write_bytes(beat)


def test_a_second_driver_is_refused_by_name_and_the_lease_leaves_nothing(run: Place) -> None:
    with Lease(run) as lease:
        check_held(run, lease.id)
        with pytest.raises(ValueError, match=HELD.format(pid=os.getpid())), Lease(run):
            pass
        check_held(run, lease.id)
    assert files(run) == []
    with Lease(run) as lease:
        check_held(run, lease.id)


def test_a_killed_driver_is_found_out_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; from rayllava.checkpoint.lease import Lease; from rayllava.place import Place\n"
        "with Lease(Place(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(ROOT / "platform")}
    holder = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "held\n"
    run = Place(str(tmp_path))
    with pytest.raises(ValueError, match=HELD.format(pid=holder.pid)), Lease(run):
        pass
    holder.send_signal(signal.SIGSTOP)  # a sleeping driver is no dead one
    with pytest.raises(ValueError, match=HELD.format(pid=holder.pid)), Lease(run):
        pass
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # not reaped: a zombie is a dead one
    began = time.monotonic()
    with Lease(run):
        assert time.monotonic() - began < 5
    holder.communicate()


def test_a_pid_that_another_process_has_now_holds_nothing(run: Place) -> None:
    mine = lease_._claim()
    assert mine.born.isdigit() and lease_._runs(mine)
    write(run, mine.but(id="old", born=str(int(mine.born) - 1)), b"7")
    with Lease(run) as lease:
        assert not [name for name in files(run) if name.startswith("old")]
        check_held(run, lease.id)


def test_a_claim_of_another_machine_lives_as_long_as_it_beats(run: Place) -> None:
    theirs = lease_._claim().but(id="theirs", home="elsewhere", host="elsewhere", pid=7)
    write(run, theirs, b"1")
    ended = threading.Event()

    def beat() -> None:
        number = 1
        while not ended.wait(0.1):
            number += 1
            write(run, theirs, str(number).encode())

    with ThreadPoolExecutor(1) as pool:
        beating = pool.submit(beat)
        with pytest.raises(ValueError, match=r"is being trained by pid 7 on elsewhere since"), Lease(run, dead_s=2.0):
            pass
        ended.set()
        beating.result()
    began = time.monotonic()
    with Lease(run, dead_s=1.0):
        assert 1.0 <= time.monotonic() - began < 10
        assert "theirs.json" not in files(run)


def test_a_driver_that_slept_too_long_finds_its_lease_gone_and_does_not_take_it_back(run: Place) -> None:
    with Lease(run, beat_s=0.05) as lease:
        for name in files(run):
            (run / "drivers" / name).remove()
        time.sleep(0.3)
        assert f"{lease.id}.json" not in files(run)
        with pytest.raises(ValueError, match="silent for 30 s and another took over"):
            check_held(run, lease.id)


@pytest.mark.parametrize("home", ["one machine", "many machines"])
def test_of_many_at_once_one_at_a_time_holds(run: Place, home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if home == "many machines":
        monkeypatch.setattr(lease_, "_home", lambda: threading.current_thread().name)
    lock = threading.Lock()
    holding, most, times = 0, 0, 0
    errors: list[BaseException] = []

    def contend(number: int) -> None:
        nonlocal holding, most, times
        draw = random.Random(number)
        for _ in range(3):
            time.sleep(draw.random() / 20)
            try:
                with Lease(run, beat_s=0.1, dead_s=3.0):
                    with lock:
                        holding, times = holding + 1, times + 1
                        most = max(most, holding)
                    time.sleep(draw.random() / 5)
                    with lock:
                        holding -= 1
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=contend, args=(number,), name=f"host-{number}") for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and times >= 1
    assert not [error for error in errors if "is being trained by" not in str(error)]
    assert files(run) == []
