"""One loader in a process of its own: JPEG files -> uint8 (N, 3, 336, 336), the same squares from all of them.

    ours-*         parquet shards -> threads of this process, or Ray Data; also reads and encodes the dialogues
    torch-hf       files          -> torch DataLoader + transformers' processor
    webdataset     tars           -> webdataset's loader + transformers' processor
    streaming      MDS            -> mosaicml-streaming's loader + transformers' processor
    ray-webdataset tars           -> ray.data.read_webdataset + transformers' processor in map_batches; `-default`
                                     leaves decoding to Ray's own default, the other keeps the bytes until then

Started by benchmarks/data.py; prints one line of JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = PATHS = [str(ROOT / "platform"), str(ROOT), str(Path(__file__).resolve().parent)]

from pictures import SIZE, files, import_streaming  # noqa: E402
from reference import processor, square, squares  # noqa: E402

BATCH = 16
"""Pictures of a batch; of an atom, in our words."""

Batches = Generator[np.ndarray]


@dataclass(frozen=True)
class Job:
    """What a loader is asked for."""

    folder: Path
    step: int
    """Pictures of an optimizer step: what has to be there before a trainer can begin."""
    start: int
    """Pictures that were seen before; a multiple of `step`."""
    workers: int
    epochs: int = 1
    """Ours go from one to the next; ray.data.read_webdataset starts anew. The others take one."""


def ours(job: Job, *, pixels: str, ray: bool) -> Batches:
    from rayllava.data.stream import feed, rows, stream

    spec = _stream_spec(job, pixels)
    steps = feed(rows(spec).iterator(), spec, rank=0) if ray else stream(spec, rank=0, threads=job.workers)
    for step in steps:
        assert not step.rejected, step.rejected[0]
        for atom in step.atoms:
            yield atom.pixels


def torch_hf(job: Job) -> Batches:
    """A map-style dataset. Resumed as accelerate's skip_first_batches does: the sampler skips, nothing is decoded."""
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler

    paths = files(job.folder)
    batches = list(BatchSampler(RandomSampler(paths), BATCH, drop_last=False))[job.start // BATCH :]  # type: ignore[arg-type]
    yield from _numpy(DataLoader(_Files(paths), batch_sampler=batches, **_loading(job)))


def webdataset(job: Job) -> Batches:
    """An iterable dataset. It keeps no place: what was seen is read again from the tars, though not decoded."""
    import webdataset as wds

    urls = [str(path) for path in sorted((job.folder / "tars").glob("*.tar"))]
    raw = wds.WebDataset(urls, shardshuffle=len(urls), workersplitter=wds.split_by_worker, empty_check=False)
    raw = raw.slice(job.start // job.workers, sys.maxsize).shuffle(256) if job.start else raw.shuffle(256)
    made = raw.map(lambda sample: square(sample["jpg"])).batched(BATCH, collation_fn=np.stack)
    yield from _numpy(wds.WebLoader(made, batch_size=None, **_loading(job)))


def streaming(job: Job) -> Batches:
    """Resumed by its own state_dict."""
    library = import_streaming()

    class Squares(library.StreamingDataset):
        def __getitem__(self, at: Any) -> np.ndarray:
            return square(super().__getitem__(at)["jpg"])

    dataset = Squares(local=str(job.folder / "mds"), shuffle=True, batch_size=BATCH)
    if job.start:
        dataset.load_state_dict(
            {
                "epoch": 0,
                "sample_in_epoch": job.start,
                "num_canonical_nodes": 64,
                "shuffle_seed": 9176,
                "initial_physical_nodes": 1,
            }
        )
    yield from _numpy(library.StreamingDataLoader(dataset, batch_size=BATCH, collate_fn=np.stack, **_loading(job)))


def ray_webdataset(job: Job, *, decoder: bool | None) -> Batches:
    """It keeps no place either, and has no step between reading and decoding at which to skip."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    paths = [str(path) for path in sorted((job.folder / "tars").glob("*.tar"))]
    dataset = ray.data.read_webdataset(paths, decoder=decoder, override_num_blocks=len(paths))
    dataset = dataset.map_batches(squares, batch_size=BATCH, zero_copy_batch=True)
    skip = job.start // BATCH
    for _ in range(job.epochs):
        for batch in dataset.iter_batches(batch_size=BATCH, prefetch_batches=4, batch_format="numpy"):
            if skip:
                skip -= 1
                continue
            yield batch["pixels"]


CONTENDERS: dict[str, Callable[[Job], Batches]] = {
    "ours-exact": partial(ours, pixels="exact", ray=False),
    "ours-fast": partial(ours, pixels="fast", ray=False),
    "ours-exact-ray": partial(ours, pixels="exact", ray=True),
    "ours-fast-ray": partial(ours, pixels="fast", ray=True),
    "torch-hf": torch_hf,
    "webdataset": webdataset,
    "streaming": streaming,
    "ray-webdataset": partial(ray_webdataset, decoder=None),
    "ray-webdataset-default": partial(ray_webdataset, decoder=True),
}


class _Files:
    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> np.ndarray:
        return square(self.paths[number].read_bytes())


def _loading(job: Job) -> dict[str, Any]:
    """Return the options of torch's DataLoader, which three of the peers are built on."""
    return {"num_workers": job.workers, "prefetch_factor": 4, "multiprocessing_context": "fork"}


def _numpy(loader: Any) -> Batches:
    for batch in loader:
        yield np.asarray(batch)


def _stream_spec(job: Job, pixels: str) -> Any:
    from rayllava.data.shards import ShardManifest
    from rayllava.data.stream import StreamSpec
    from rayllava.recipe import DataSpec, ProcessorSpec

    shards = str(job.folder / "shards")
    assembled = ProcessorSpec.model_validate_json((job.folder / "processor.json").read_text())
    return StreamSpec(
        shards=shards,
        shards_digest=ShardManifest.load(shards).digest,
        data=DataSpec(global_batch=job.step, atom=BATCH, epochs=job.epochs),
        seed=0,
        processor=assembled.but(pixels=pixels),
        tokenizer_dir=str(job.folder / "tokenizer"),
        cursor=job.start // job.step,
        decoders=job.workers,
    )


def _cluster(name: str, workers: int) -> AbstractContextManager[None]:
    """Return a cluster of logical CPUs; more of them than cores keep these busy between two tasks."""
    if "ray" not in name:
        return nullcontext()
    from rayllava import driver

    os.environ["PYTHONPATH"] = os.pathsep.join(PATHS)  # workers too
    return driver.connect("local", num_cpus=workers)


def _import(name: str) -> None:
    """Import what a process of this loader has imported before it is asked for anything."""
    if name.startswith("ours"):
        import rayllava.data.stream
        import rayllava.prompt.encode  # noqa: F401

        return
    processor()
    if name == "streaming":
        import_streaming()
    if name == "webdataset":
        import webdataset  # noqa: F401


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--stop", type=int, help="pictures to take; without it and `seconds` all, and each digested")
    parser.add_argument("--warm", type=int, default=0, help="pictures before the clock starts")
    parser.add_argument("--seconds", type=float, help="how long the clock runs")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--launched", type=float, required=True, help="time.monotonic() of the one who started this")
    args = parser.parse_args()
    job = Job(args.folder, args.step, args.start, args.workers, args.epochs)
    _import(args.name)
    with _cluster(args.name, args.workers):
        ready = time.monotonic()
        batches = CONTENDERS[args.name](job)
        digest = args.stop is None and args.seconds is None
        found = _digest(batches) if digest else _time(batches, args, ready)
        batches.close()  # and with it the loader's processes
        for thread in threading.enumerate():  # Ray Data's, which would call a cluster that is gone
            if thread is not threading.main_thread():
                thread.join(timeout=2)
    print(json.dumps(found), flush=True)
    os._exit(0)  # some loaders' threads would hold the process back


def _digest(batches: Batches) -> dict[str, Any]:
    digests = sorted(hashlib.sha256(square.tobytes()).hexdigest() for batch in batches for square in batch)
    return {"num": len(digests), "digest": hashlib.sha256("".join(digests).encode()).hexdigest()}


def _time(batches: Batches, args: argparse.Namespace, ready: float) -> dict[str, Any]:
    """Return when the first step was there, and the rate and cost of what came after `warm` pictures.

    The rate is the slope of a line through all arrivals: batches of some loaders come in bursts.
    """
    arrivals: list[tuple[float, int]] = []
    num, first, busy = 0, 0.0, 0.0
    for batch in batches:
        assert batch.dtype == np.uint8 and batch.shape[1:] == (3, SIZE, SIZE)
        num += len(batch)
        now = time.monotonic()
        first = first or (now if num >= args.step else 0.0)
        if num >= args.warm:
            busy = busy or _cpu_s()
            arrivals.append((now, num))
        if args.stop is not None and num >= args.stop:
            break
        if args.seconds is not None and arrivals and now - arrivals[0][0] >= args.seconds:
            break
    times, counts = np.array(arrivals).T
    return {
        "rate": float(np.polyfit(times, counts, 1)[0]) if len(times) > 2 else 0.0,
        "cpu_ms": (_cpu_s() - busy) / max(1, counts[-1] - counts[0]) * 1e3,
        "first_s": first - args.launched,
        "resume_s": first - ready,
    }


def _cpu_s() -> float:
    """Return the CPU seconds of this process and all below it."""
    import psutil

    me, total = psutil.Process(), 0.0
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


if __name__ == "__main__":
    main()
