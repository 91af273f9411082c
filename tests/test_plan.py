"""The plan of the house: who may import whom, what stays light, and that nothing shipped is merely written."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rayllava import recipe
from rayllava.shelf import Shelf

ROOT = Path(__file__).resolve().parents[1]
HOUSE = ROOT / "platform" / "rayllava"

LAYERS = [
    ["jobs"],
    ["demo", "driver", "serving"],
    ["evals", "convert"],
    ["train", "generate"],
    ["data", "model"],
    ["checkpoint", "prompt", "recipes"],
    ["copies"],
    ["families", "fetch", "place", "forked"],
    ["records", "recipe", "shelf", "log", "durable", "page", "progress"],
    ["spec"],
]
"""Import to a later line only, never from a neighbour on the same line."""

FREE = {("recipe", "recipes")}
"""recipe.load names the package of recipes, whose functions it calls; importlib, not an import statement."""

LIGHT = [
    "records",
    "spec",
    "recipe",
    "recipes",
    "families",
    "shelf",
    "log",
    "durable",
    "progress",
    "driver",
    "forked",
    "prompt.chat",
]

RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}

SOURCES = sorted(path for folder in (HOUSE, ROOT / "jobs", ROOT / "serving") for path in folder.rglob("*.py"))


def room_of(path: Path) -> str:
    if HOUSE in path.parents:
        return path.relative_to(HOUSE).parts[0].removesuffix(".py")
    return path.relative_to(ROOT).parts[0]


def imported_rooms(path: Path) -> set[str]:
    """Return the rooms that a file imports, at its top or inside its functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            if node.module == "rayllava":
                names |= {f"rayllava.{alias.name}" for alias in node.names}
            else:
                names.add(node.module)
    rooms = {name.split(".")[1] for name in names if name.startswith("rayllava.")} & RANK.keys()
    return rooms | {name.split(".")[0] for name in names if name.split(".")[0] in ("jobs", "serving")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_to_the_right_only(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    for other in imported_rooms(path) - {room}:
        assert RANK[room] < RANK[other] or (room, other) in FREE, f"{room} must not import {other}"


def test_every_room_is_in_the_plan() -> None:
    rooms = {p.name.removesuffix(".py") for p in HOUSE.iterdir() if p.name not in ("__init__.py", "__pycache__")}
    assert rooms | {"jobs", "serving"} == set(RANK)


def test_modules_import_each_other_without_a_cycle() -> None:
    modules = {}
    for path in SOURCES:
        base = HOUSE.parent if HOUSE in path.parents else ROOT
        name = ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")
        modules[name] = path
    graph = {name: _top_imports(path, modules) - {name} for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join((*trail[trail.index(name) :], name))}"
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def _top_imports(path: Path, modules: dict[str, Path]) -> set[str]:
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & modules.keys()
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & modules.keys()
            found |= submodules or ({node.module} & modules.keys())
    return found


def test_no_module_is_named_like_the_standard_library() -> None:
    names = {path.stem for path in SOURCES} | {path.parent.name for path in SOURCES} - {"platform"}
    assert not (names - {"__init__"}) & set(sys.stdlib_module_names)


def test_the_source_root_is_no_package() -> None:
    assert [p.name for p in (ROOT / "platform").iterdir() if p.name != "__pycache__"] == ["rayllava"]


def test_light_modules_leave_torch_and_ray_out() -> None:
    imports = "; ".join(f"import rayllava.{name}" for name in LIGHT)
    heavy = "[name for name in ('torch', 'ray', 'transformers') if name in sys.modules]"
    code = f"import sys; {imports}; assert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(HOUSE.parent)})


@pytest.mark.parametrize("name", recipe.recipe_names())
def test_every_recipe_loads_and_round_trips(name: str) -> None:
    made = recipe.load(name)
    assert recipe.Recipe.model_validate_json(made.model_dump_json()) == made
    assert made.name == name


def test_every_plug_loads() -> None:
    from rayllava.checkpoint.layouts import LAYOUTS
    from rayllava.data.sources import SOURCES as sources
    from rayllava.evals.benchmark import BENCHMARKS
    from rayllava.families import FAMILIES
    from rayllava.prompt.chat import TEMPLATES
    from rayllava.train.tracks import TRACKERS

    shelves: list[Shelf] = [LAYOUTS, sources, BENCHMARKS, FAMILIES, TRACKERS]
    for shelf in shelves:
        assert len(shelf) >= 1
        for key in shelf:
            assert isinstance(shelf[key], shelf.kind)
    for family in FAMILIES.values():
        assert family.template in TEMPLATES


JOBS = sorted((ROOT / "jobs").glob("*.py"))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_job_says_what_it_does_without_torch(path: Path) -> None:
    code = (
        "import sys, runpy; sys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules and 'ray' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(path)]
    told = subprocess.run(command, check=True, capture_output=True, text=True, env=_env(), timeout=30)
    assert "usage:" in told.stdout and "--address" in told.stdout


def _env() -> dict[str, str]:
    return {"PYTHONPATH": str(HOUSE.parent), "PATH": "/usr/bin:/bin"}


def test_the_map_in_the_readme_equals_the_tree() -> None:
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"## The map\n.*?```\n(.*?)```", readme, re.DOTALL)
    assert block, "README.md has no map"
    told: set[str] = set()
    stack: list[tuple[int, str]] = []
    for line in block[1].splitlines():
        indent, entry = len(line) - len(line.lstrip()), line.split()[0]
        while stack and stack[-1][0] >= indent:
            stack.pop()
        path = (stack[-1][1] if stack else "") + entry
        told.add(path)
        if entry.endswith("/"):
            stack.append((indent, path))
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    tracked = set(listed.splitlines())
    folders = {f"{parent}/" for path in tracked for parent in map(str, Path(path).parents) if parent != "."}
    assert not told - tracked - folders, f"the map names what is not there: {told - tracked - folders}"
    top = {path.split("/")[0] + ("/" if "/" in path else "") for path in tracked}
    rooms = {f"platform/rayllava/{p.name}{'/' if p.is_dir() else ''}" for p in HOUSE.iterdir() if p.name[0] != "_"}
    jobs = {f"jobs/{path.name}" for path in JOBS}
    missing = (top | rooms | jobs) - told - {".gitignore", ".rayignore"}
    assert not missing, f"the map leaves out {missing}"


def test_files_are_short_and_well_named() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in listed.splitlines():
        assert not re.search(r"(^|/)(utils|helpers|common|misc)[^/]*(\.py|/)", name), name
        if name.endswith(".py") and (ROOT / name).exists():
            assert len((ROOT / name).read_text().splitlines()) <= 360, f"{name} is too long"


def test_nothing_points_outside_the_project() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    forbidden = re.compile(r"\.\./shared|/work/main|/root/|" + "pypi" + r"\.org|files\." + "pythonhosted")
    for name in listed.splitlines():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".yaml", ".txt", ".json") and path.is_file():
            found = forbidden.search(path.read_text())
            assert found is None or name == "tests/test_plan.py", f"{name} says {found and found[0]}"
