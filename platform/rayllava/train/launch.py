"""Driver and worker of a training run on Ray Train.

driver   resolve the model, write RUN/manifest.json, start the TorchTrainer, show progress, export
group    every time a worker group starts: decide once (attempt, checkpoint, cursor, W), build its rows
worker   read that decision, assert that the first row belongs to it, run the loop
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig

from rayllava import copies, versions
from rayllava import log as log_
from rayllava.checkpoint import resolve
from rayllava.checkpoint import run as runs
from rayllava.checkpoint.lease import Lease
from rayllava.checkpoint.run import LENGTHS, Origin, RunManifest
from rayllava.data import stream
from rayllava.data.measure import measure
from rayllava.data.plan import Plan
from rayllava.data.shards import ShardManifest
from rayllava.place import Place
from rayllava.prompt.assemble import assemble
from rayllava.prompt.encode import Processor
from rayllava.recipe import ModelSpec, Recipe, load
from rayllava.train import elastic, report, tracks, warm, watch
from rayllava.train.feed import Feed, stream_spec
from rayllava.train.reporter import Reporter

log = logging.getLogger(__name__)

_RAY = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # rayllava.train.elastic looks itself
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
}
"""How Ray Train's controller works under our policies."""

_FREE_TO_CHANGE = ("scale", "save", "watch", "track", "fresh", "name", "after")
"""Parts of a recipe that a continued run may state differently: they do not change what is computed."""


def prepare(recipe: Recipe) -> RunManifest:
    """Open RUN: check all that can be checked before a cluster is used, then write its manifest and tokenizer.

    A run that `out` holds already is continued as it began. Raises ValueError with the field and the cure, and
    leaves `out` as it was.
    """
    from rayllava.model.build import check_start

    recipe, origin = _with_model(recipe)
    assert recipe.model is not None
    shards = ShardManifest.load(recipe.data.shards)
    packs = recipe.data.max_tokens is not None
    plan = Plan.of(shards, recipe.data.but(max_tokens=None), seed=recipe.seed)
    if not packs:  # how many atoms a packed step has is known once the lengths are measured
        plan.check_workers(recipe.scale.max_workers)
    tracks.check(recipe.track)
    run = Place(recipe.out)
    run.check_writable()
    begun = (run / "manifest.json").exists()
    if begun and not recipe.fresh:
        manifest = _continued(recipe, shards, run, origin)
        resolve.check(recipe.model, manifest.parts)
        return manifest
    parts = resolve.here(recipe.model)
    with run.scratch() as folder:
        processor = assemble(
            llm_dir=Path(parts.llm),
            vision_dir=Path(parts.vision),
            model=recipe.model,
            prompt=recipe.prompt,
            out_dir=folder / "tokenizer",
        )
        if origin:
            check_start(origin, parts, processor)
        watch.check(recipe.watch, Processor(processor, folder / "tokenizer"))
        if begun:
            _clear(run)
        (run / "tokenizer").take_dir(folder / "tokenizer", last="tokenizer_config.json")
    manifest = RunManifest(
        recipe=recipe,
        processor=processor,
        parts={name: resolve.digests(getattr(recipe.model, name), field=f"model.{name}") for name in resolve.PARTS},
        shards_digest=shards.digest,
        num_steps=plan.num_steps,
        origin=origin,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        versions=versions(),
    )
    runs.write_run(run, manifest)
    return manifest


def train(manifest: RunManifest) -> RunManifest:
    """Run a prepared run to its end on the connected cluster; ValueError when another driver trains it."""
    run = Place(manifest.recipe.out)
    if manifest.finished:
        log.info("%s is finished (%d steps); fresh=true starts it over", run, manifest.num_steps)
        return manifest
    with Lease(run) as lease:
        return _train(manifest, driver=lease.id)


def _train(manifest: RunManifest, *, driver: str) -> RunManifest:
    recipe = manifest.recipe
    run = Place(recipe.out)
    use_gpu = _use_gpu(recipe)
    scale = recipe.scale
    if recipe.data.max_tokens is not None:
        shards = ShardManifest.load(recipe.data.shards)
        measure(shards, manifest.processor, run / "tokenizer", run / LENGTHS)
        stream.Desk.open(stream_spec(manifest)).plan.check_workers(scale.max_workers)
    os.environ.update(_RAY)
    worker_env = warm.worker_env(recipe.tuning, use_gpu=use_gpu)
    resources = scale.resources | ({"GPU": 1.0} if use_gpu else {}) if scale.resources else None
    nodes = warm.Warm(worker_env)  # which import while the controller starts
    nodes.prepare(node.id for node in elastic.nodes(resources or {"GPU" if use_gpu else "CPU": 1.0}) if node.workers)
    with tempfile.TemporaryDirectory(prefix="rayllava-") as unused:
        trainer = elastic.ElasticTrainer(
            _worker,
            scale=scale,
            run=run,
            train_loop_config={"run": run.text, "driver": driver},
            # A hang is for our own watchdog to name, before the process group gives up without a name.
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=int(2 * scale.hang_s) + 60),
            scaling_config=ScalingConfig(
                num_workers=(scale.min_workers, scale.max_workers),  # type: ignore[arg-type]  # as above
                use_gpu=use_gpu,
                resources_per_worker=resources,
            ),
            # Ray Train's own notion of checkpoints is never used: it keeps its marker where this driver runs.
            run_config=RunConfig(
                name=f"driver-{time.time_ns()}",
                storage_path=unused,
                failure_config=FailureConfig(max_failures=-1),  # rayllava.train.elastic decides
                callbacks=[Feed(run, driver)],  # type: ignore[list-item]  # as above
                worker_runtime_env=worker_env,  # type: ignore[call-arg]  # as above
            ),
        )
        runs.write_run(run, manifest)  # workers read the recipe there, and a continued run may state another scale
        report.write_recipe(run, recipe)
        with Reporter(run, manifest):
            trainer.fit()
    ray.get(ray.remote(_export).remote(run.text))
    manifest = manifest.but(finished=True)
    runs.write_run(run, manifest)
    log.info("finished %d steps; the model is in %s", manifest.num_steps, run / "export")
    return manifest


def _worker(config: dict[str, Any]) -> None:
    born = time.time()
    from rayllava.train import loop

    context = ray.train.get_context()
    rank = context.get_world_rank()
    log_.start(rank=rank)
    run = Place(config["run"])
    manifest = runs.read_run(run)
    shard = ray.train.get_dataset_shard("train")
    decision = runs.read_decision(run, runs.newest_attempt(run))
    assert decision.driver == config["driver"], "the decision is another driver's"
    assert decision.world_size == context.get_world_size(), "the decision is for another world size"
    assert manifest.recipe.model is not None, "resolved recipes name their model parts"
    resolve.check(manifest.recipe.model, manifest.parts)  # fetched here, before any rank waits for another
    spec = stream_spec(manifest, decision)
    loop.run(
        manifest,
        decision,
        stream.feed(shard, spec, rank=rank),
        device=loop.worker_device(manifest.recipe.scale.device),
        largest=stream.open_plan(spec).largest(),
        born=born,
    )
    ray.train.report({"step": manifest.num_steps})


def _export(run: str) -> None:
    from rayllava.train.export import export

    log_.start()
    export(Place(run))


def _with_model(recipe: Recipe) -> tuple[Recipe, Origin | None]:
    """Return the recipe with its model parts, its own or those of what it starts from, and what that is if no run."""
    from rayllava.model.build import final_checkpoint
    from rayllava.model.foreign import is_foreign, origin_of, whole_model

    model, origin = recipe.model, None
    if recipe.init_from and is_foreign(recipe.init_from):
        origin = origin_of(recipe.init_from)
        model = model or whole_model(recipe)
    elif recipe.init_from:
        before = runs.read_run(Place(recipe.init_from), field="init_from")
        final_checkpoint(Place(recipe.init_from))
        if model is not None and model != before.recipe.model:
            raise ValueError(
                f"model differs from that of init_from={recipe.init_from}; leave model out to take it over"
            )
        model = before.recipe.model
        assert model is not None, "resolved recipes name their model parts"
        resolve.check(model, before.parts)
    if model is None:
        raise ValueError(f"{recipe.name} starts from an earlier run; add init_from=DIR, {_out_of(recipe.after)}")
    return recipe.but(model=resolve.pinned(model, before=_before(recipe))), origin


def _before(recipe: Recipe) -> ModelSpec | None:
    """Return the model of the run that is continued, if there is one; what is wrong with `out` is said later."""
    try:
        return None if recipe.fresh else runs.read_run(Place(recipe.out)).recipe.model
    except (ValueError, OSError):
        return None


def _out_of(after: str) -> str:
    """Say which folder `init_from` wants: the one that a recipe's command writes."""
    if not after:
        return "the out folder of its first stage"
    job = "pretrain" if load(after).tuning.kind == "projector" else "finetune"
    return f"the out folder of `python jobs/{job}.py {after} data=DIR out=DIR`"


def _continued(recipe: Recipe, shards: ShardManifest, run: Place, origin: Origin | None) -> RunManifest:
    """Return the manifest to go on with; ValueError when `out` holds a run that computes something else."""
    before = runs.read_run(run, field="out")
    old, new = (flat(r.model_dump(exclude=set(_FREE_TO_CHANGE))) for r in (before.recipe, recipe))
    cure = "give another out, or fresh=true to start over"
    for path in sorted(old.keys() | new.keys()):
        if old.get(path) != new.get(path):
            raise ValueError(f"{path}={new.get(path)}, but out={run} holds a run with {old.get(path)}; {cure}")
    if before.shards_digest != shards.digest:
        raise ValueError(f"data={recipe.data.shards} changed since out={run} began; {cure}")
    if before.origin != origin:
        raise ValueError(f"init_from={recipe.init_from} changed since out={run} began; {cure}")
    watch.check(recipe.watch, Processor(before.processor, copies.local(run / "tokenizer")))
    return before.but(recipe=recipe)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"field.path": value} of nested dictionaries."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _clear(run: Place) -> None:
    """Remove what a run wrote, and nothing else that may lie in its folder; ValueError while somebody trains it."""
    folders = ("attempts", "checkpoints", "export", "ledger", "tokenizer", "waits", *tracks.TRACKERS)
    files = ("goodput.json", "ledger.jsonl", "metrics.jsonl", LENGTHS, "recipe.json", "report.html", watch.FILE)
    with Lease(run):
        for name in (*folders, *files, "manifest.json"):
            (run / name).remove()


def _use_gpu(recipe: Recipe) -> bool:
    if recipe.scale.device == "auto":
        return ray.cluster_resources().get("GPU", 0) > 0
    return recipe.scale.device == "cuda"
