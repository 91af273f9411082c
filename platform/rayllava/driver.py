"""What every job does first: read its words, speak, connect to Ray by address, and fail in one line.

Light on purpose: `--help` of a job imports neither torch nor ray.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from rayllava import log as log_
from rayllava import recipe as recipes
from rayllava.recipe import Recipe

log = logging.getLogger(__name__)


def job(main: Callable[[list[str]], None]) -> None:
    """Run a job's main; a failure ends the process with one line on stderr and a non-zero code.

    A mistake of the person (ValueError, LookupError, OSError) is that line alone; anything else is a bug of
    ours and shows its traceback before it.
    """
    log_.start()
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("error: interrupted; the same command continues")
    except Exception as error:
        cause = _cause(error)
        if not isinstance(cause, ValueError | LookupError | OSError):
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.exit(f"error: {_sentence(cause)}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the words in one line, as any other failure."""
        self.exit(2, f"error: {message}; --help says more\n")


def parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser with the flags that every job has."""
    lines = doc.strip().splitlines()
    made = _Parser(
        description=lines[0],
        epilog="\n".join(lines[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--address",
        default=os.environ.get("RAY_ADDRESS", "local"),
        help="Ray cluster to run on (default: the one this job was submitted to, else a local one)",
    )
    made.add_argument("--dry-run", action="store_true", help="print what would be done and stop")
    return made


def recipe_words(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the words of a training job: RECIPE [field.path=value ...]."""
    named = "module.function, e.g. tiny.finetune, or an upstream file, see docs/recipes.md"
    made.add_argument("recipe", metavar="RECIPE", help=named)
    made.add_argument("fields", nargs="*", metavar="field.path=value", help="data=DIR out=DIR init_from=DIR ...")
    return made


def read_recipe(name: str, fields: list[str]) -> Recipe:
    """Return the named recipe with the words applied and its folders made absolute.

    Workers run in folders of their own, so a relative path must not leave the driver.
    """
    recipe = recipes.override(recipes.load(name), fields)
    for field in ("data", "out"):
        value = recipe.data.shards if field == "data" else recipe.out
        if not value:
            raise ValueError(f"{field} is not set; add {field}=DIR")
    watch = recipe.watch
    return recipe.but(
        out=absolute(recipe.out),
        init_from=_absolute(recipe.init_from),
        data=recipe.data.but(shards=absolute(recipe.data.shards)),
        watch=watch.but(
            shards=_absolute(watch.shards),
            questions=[(_absolute(picture), question) for picture, question in watch.questions],
        ),
    )


def absolute(folder: str) -> str:
    """Return a path that means the same in every process; addresses with a scheme stay as they are."""
    return folder if "://" in folder else str(Path(folder).absolute())


def _absolute(path: str) -> str:
    return absolute(path) if path else ""


def train(doc: str | None, argv: list[str]) -> None:
    """Run a training job from its words."""
    words = recipe_words(parser(doc or "")).parse_intermixed_args(argv)
    recipe = read_recipe(words.recipe, words.fields)
    if words.dry_run:
        print(show(recipe))
        return
    from rayllava.train import launch, warm

    manifest = launch.prepare(recipe)
    num_cpus = recipe.scale.max_workers + recipe.scale.decoders + 1
    cluster = connect(words.address, num_cpus=num_cpus, runtime_env=warm.job_env())
    with contextlib.nullcontext() if manifest.finished else cluster:
        launch.train(manifest)


def show(recipe: Recipe) -> str:
    return json.dumps(recipe.model_dump(), indent=1, ensure_ascii=False)


@contextlib.contextmanager
def connect(address: str, *, num_cpus: int = 2, runtime_env: dict[str, Any] | None = None) -> Iterator[None]:
    """Be connected to a Ray cluster inside the block.

    `local` starts one for this process alone, with `num_cpus` logical CPUs, and takes it down afterwards; any
    other address is joined. `runtime_env` is what all processes of the job start in.
    """
    local = address == "local"
    os.environ.setdefault("RAY_AUTH_MODE", "disabled" if local else "token")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    options: dict[str, Any] = {
        "runtime_env": runtime_env,
        "address": address,
        "logging_level": logging.WARNING,
        "log_to_driver": True,
    }
    temp_dir = None
    if local:
        temp_dir = tempfile.mkdtemp(prefix="rayllava-")  # short: unix socket paths end at 107 characters
        options |= {"num_cpus": num_cpus, "include_dashboard": False, "_temp_dir": temp_dir}
        env = {"PYTHONPATH": _python_path(), "TRANSFORMERS_VERBOSITY": "error"}
        if runtime_env is None:
            options["runtime_env"] = {"env_vars": env, "worker_process_setup_hook": "rayllava.log.quiet_workers"}
        else:
            options["runtime_env"] = runtime_env | {"env_vars": env | runtime_env["env_vars"]}
    ray.init(**options)
    try:
        yield
    finally:
        ray.shutdown()
        if temp_dir:
            shutil.rmtree(temp_dir, ignore_errors=True)


def _python_path() -> str:
    """The source root first, so that workers import the code this driver runs."""
    root = str(Path(__file__).resolve().parents[1])
    return os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])


def _cause(error: BaseException) -> BaseException:
    """Unwrap what Ray wrapped around an error that was raised in a worker."""
    while True:
        inner = getattr(error, "cause", None) or getattr(error, "controller_failure", None)
        if not isinstance(inner, BaseException):
            failures = getattr(error, "worker_failures", None)
            inner = next(iter(failures.values()), None) if isinstance(failures, dict) else None
        if not isinstance(inner, BaseException):
            return error
        error = inner


def _sentence(error: BaseException) -> str:
    text = str(error.args[0]) if isinstance(error, LookupError) and error.args else str(error)
    line = " ".join(text.split())
    return line if isinstance(error, ValueError | LookupError) else f"{type(error).__name__}: {line}"
