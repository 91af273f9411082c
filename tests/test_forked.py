"""A forked worker is the process that was asked for: its words, outputs, life and end are those of its client."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rayllava import forked

ROOT = Path(__file__).parents[1]
TELL = """
import json, os, random, sys
print(json.dumps({
    "argv": sys.argv[1:], "cwd": os.getcwd(), "said": os.environ.get("SAID"), "parent": os.getppid(),
    "imported": "colorsys" in sys.modules, "random": random.random(), "path": sys.path[0], "main": __name__,
}))
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short one: the paths of sockets end at 107 characters."""
    path = Path(tempfile.mkdtemp(dir="/tmp", prefix="rl-forks-"))
    yield path
    shutil.rmtree(path)


def command(script: Path, *words: str) -> list[str]:
    env = forked.runtime_env(["colorsys"])
    return [*env["py_executable"].split(), str(script), *words]


def environ(folder: Path, imports: str = "colorsys", **more: str) -> dict[str, str]:
    env = forked.runtime_env([imports])["env_vars"]
    path = os.pathsep.join([str(ROOT / "platform"), str(folder)])
    return os.environ | env | {"PYTHONPATH": path, "TMPDIR": str(folder)} | more


def start(folder: Path, text: str, *words: str, imports: str = "colorsys", **more: str) -> subprocess.Popen[str]:
    script = folder / "worker.py"
    script.write_text(text)
    env = environ(folder, imports, **more)
    return subprocess.Popen(command(script, *words), env=env, cwd=folder, stdout=subprocess.PIPE, text=True)


def told(client: subprocess.Popen[str]) -> dict[str, Any]:
    said, _ = client.communicate(timeout=60)
    assert client.returncode == 0
    return json.loads(said)


def soon(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


def lives(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_fork_is_what_its_client_was_asked_to_be(folder: Path) -> None:
    clients = [start(folder, TELL, "--worker-id", str(number), SAID=str(number)) for number in (1, 2)]
    one, two = map(told, clients)
    assert (one["argv"], two["argv"]) == (["--worker-id", "1"], ["--worker-id", "2"])
    assert (one["said"], two["said"]) == ("1", "2")
    assert one["cwd"] == one["path"] == str(folder) and one["main"] == "__main__"
    assert one["imported"] and two["imported"]
    assert one["parent"] == two["parent"] != os.getpid(), "both are forks of one server"
    assert one["random"] != two["random"]


DRAW = """
import json, os, threading
import ray
drawn = []
thread = threading.Thread(target=lambda: drawn.append(ray.NodeID.from_random().hex()))
thread.start()
thread.join()
print(json.dumps({"drawn": drawn[0], "parent": os.getppid()}))
"""


def test_forks_draw_ids_of_their_own(folder: Path) -> None:
    """Ray names a task by what its caller's thread drew: two ranks that draw alike crash the actor that both call."""
    (folder / "actors.py").write_text("import ray\n@ray.remote\nclass Actor: pass\n")
    one, two = (told(start(folder, DRAW, imports="actors")) for _ in range(2))
    assert one["parent"] == two["parent"] != os.getpid(), "both are forks of one server"
    assert one["drawn"] != two["drawn"]


def test_nothing_is_forked_after_an_import_that_drew_an_id(folder: Path) -> None:
    (folder / "drawer.py").write_text("import ray\nray.NodeID.from_random()\n")
    one, two = (told(start(folder, DRAW, imports="drawer")) for _ in range(2))
    assert one["parent"] == two["parent"] == os.getpid(), "each started by itself"
    assert one["drawn"] != two["drawn"]
    (log,) = (folder / f"rayllava-{os.getuid()}" / "forks").glob("*.log")
    assert log.read_text().endswith("an import has drawn an id of Ray's, and forks would now draw the same ones\n")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("import sys; sys.exit(7)", 7),
        ("raise ValueError", 1),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
    ],
)
def test_a_client_ends_as_its_fork_does(text: str, code: int, folder: Path) -> None:
    client = start(folder, text)
    client.communicate(timeout=60)
    assert client.returncode == code


SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_fork_ends_with_its_client(number: int, folder: Path) -> None:
    client = start(folder, SLEEP)
    assert client.stdout
    child = int(client.stdout.readline())
    assert child != client.pid
    client.send_signal(number)
    soon(lambda: not lives(child))
    assert client.wait(timeout=30) == -number


def test_forks_outlive_their_server_and_the_next_client_starts_another(folder: Path) -> None:
    first = start(folder, SLEEP)
    assert first.stdout
    child = int(first.stdout.readline())
    status = Path(f"/proc/{child}/status").read_text()
    server = int(status.split("PPid:\t")[1].split()[0])
    os.kill(server, signal.SIGKILL)
    assert told(start(folder, TELL))["parent"] not in (server, os.getpid())
    assert lives(child) and first.poll() is None
    os.kill(child, signal.SIGKILL)
    first.wait(timeout=30)


def test_a_server_ends_with_its_raylet(folder: Path) -> None:
    (folder / "worker.py").write_text("import os; print(os.getppid())")
    asks = f"import subprocess; subprocess.run({command(folder / 'worker.py')!r}, check=True)"
    done = subprocess.run(
        [sys.executable, "-c", asks], env=environ(folder), capture_output=True, text=True, check=True
    )
    server = int(done.stdout)
    soon(lambda: not lives(server))
    assert not [path for path in folder.rglob("*") if path.is_socket()]


def test_what_a_raylet_that_is_gone_has_left_is_removed(folder: Path) -> None:
    told(start(folder, TELL))
    forks = folder / f"rayllava-{os.getuid()}" / "forks"
    for name in ("4194305-0.log", "4194305-0.never"):  # a higher number than any process has
        (forks / name).touch()
    told(start(folder, TELL, imports="colorsys,wave"))  # a second server
    assert len(list(forks.glob("*.log"))) == 2 and not list(forks.glob("4194305-*"))


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_client_that_finds_no_server_is_the_worker_itself(kind: str, folder: Path) -> None:
    below = folder / f"rayllava-{os.getuid()}"  # servers listen there, were it a folder, and nobody else's
    if kind == "file":
        below.touch()
    else:
        below.symlink_to(folder)
    found = told(start(folder, TELL, "--worker-id", "1"))
    assert found["parent"] == os.getpid() and not found["imported"]
    assert found["argv"] == ["--worker-id", "1"]


JOB = """
import os, sys
import ray
from rayllava import forked

ray.init(address=sys.argv[1], namespace="jobs", log_to_driver=False)

@ray.remote(runtime_env=forked.runtime_env(["ray"]))
def job() -> str:
    return ray.get_runtime_context().get_job_id()

try:
    print(ray.get(job.remote(), timeout=60) == ray.get_runtime_context().get_job_id())
    sys.stdout.flush()
finally:
    os._exit(0)  # as a driver that is killed: it says goodbye to nobody
"""


def test_a_later_job_gets_workers_of_its_own(folder: Path) -> None:
    """Ray reads the job of a process once, when it is imported; a server imports it in the first job's life."""
    from ray.cluster_utils import Cluster

    Path("/tmp/ray").mkdir(exist_ok=True)  # where Cluster leaves its address, whatever its own folder
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "temp_dir": str(folder / "ray")})
    try:
        (folder / "job.py").write_text(JOB)
        words = [sys.executable, str(folder / "job.py"), str(cluster.address)]
        for _ in range(2):
            done = subprocess.run(words, env=environ(folder), capture_output=True, text=True, timeout=120)
            assert done.stdout == "True\n", done.stderr
    finally:
        cluster.shutdown()
