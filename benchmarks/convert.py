"""What a conversion takes, beside a plain load-and-save of the same files: make bench-convert, or

    python benchmarks/convert.py [--gigabytes 2] [--shard-megabytes 500] [--repetitions 5] [--proofs 1]

A random LLaVA of that size in float16, in the Hugging Face layout. Every conversion is a process of its own, whose
peak of resident memory is what the system says when it ends, and whose seconds count from its start:

    load-and-save      from_pretrained and save_pretrained of transformers, in the type of the files
    ours, no proof     jobs/convert.py --no-proof
    ours               jobs/convert.py, both sides compared
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT / "platform"), str(ROOT), str(HERE)]

from report import keep, machine, say, table, versions  # noqa: E402

WORK = ROOT / "runs" / "bench-convert"
TARGETS = ("hf", "llava", "xtuner", "gguf")
SPARE = 500e6
"""Bytes that a conversion may take beside its share of the largest file."""
SHARE = 1.3

PLAIN = """
import sys
from transformers import LlavaForConditionalGeneration
model = LlavaForConditionalGeneration.from_pretrained(sys.argv[1], dtype="auto")
model.save_pretrained(sys.argv[2])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--shard-megabytes", type=int, default=500)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--proofs", type=int, default=1, help="of conversions that are proved, which take minutes")
    words = parser.parse_args()
    shutil.rmtree(WORK, ignore_errors=True)
    source = WORK / "source"
    # In a process of its own: what ours has in memory would count in those that it starts.
    maker = multiprocessing.get_context("spawn").Process(
        target=make, args=(source, words.gigabytes, words.shard_megabytes)
    )
    maker.start()
    maker.join()
    files = sorted(path.stat().st_size for path in source.glob("*.safetensors"))
    python = sys.executable
    commands = {"load-and-save": [python, "-c", PLAIN, str(source), str(WORK / "out")]}
    for to in TARGETS:
        command = [python, str(ROOT / "jobs" / "convert.py"), str(source), str(WORK / "out"), "--to", to, "--force"]
        commands |= {f"to {to}, no proof": [*command, "--no-proof"]}
        commands |= {f"to {to}": command} if to != "xtuner" else {}
    commands["to gguf, q8_0, no proof"] = [*command, "--dtype", "q8_0", "--no-proof"]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for number in range(words.repetitions):
        for name, command in commands.items():
            if number >= words.proofs and name.startswith("to ") and "no proof" not in name:
                continue
            shutil.rmtree(WORK / "out", ignore_errors=True)
            found[name].append(run(command))
            last = found[name][-1]
            say(f"round {number + 1} {name}: {last['seconds']:.1f} s, {last['peak'] / 1e6:.0f} MB")
    shutil.rmtree(WORK)
    report: dict[str, Any] = {
        "date": str(date.today()),
        "machine": machine(),
        "versions": versions("torch", "transformers", "safetensors", "gguf"),
        "bytes": sum(files),
        "largest": files[-1],
        "runs": found,
    }
    text = render(report)
    print(text)
    keep(f"convert-{report['date']}", report, text)


def make(folder: Path, gigabytes: float, megabytes: int) -> None:
    """Write a random model of about that size whose largest file has about so many megabytes."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from rayllava.checkpoint import shards
    from rayllava.checkpoint.layouts import StoredModel, write
    from rayllava.checkpoint.manifest import ModelManifest
    from rayllava.checkpoint.weights import Computed
    from tests.tiny import assembled, make_parts

    # A tokenizer of SentencePiece's, as real ones are: GGUF has no words for others.
    parts = make_parts(folder.parent / "parts").but(llm=str(ROOT / "tests" / "assets" / "llava_v15" / "llm"))
    spec = assembled(parts, folder.parent / "tokenizer", max_length=2048)
    hidden, wide, rows = 2048, 5632, 32000
    layer = 2 * (4 * hidden * hidden + 3 * hidden * wide)
    num_layers = round((gigabytes * 1e9 - 4 * rows * hidden - 0.6e9) / layer)
    text = LlamaConfig(
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=2048,
    )
    tower = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    spec = spec.but(image_size=336, num_image_tokens=576)
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=spec.image_token_id,
        image_seq_length=576,
        pad_token_id=spec.pad_token_id,
    )
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in LlavaForConditionalGeneration(config).state_dict().items()}

    def random(name: str, shape: tuple[int, ...]) -> Computed:
        def draw() -> torch.Tensor:
            generator = torch.Generator().manual_seed(len(name) * 1009 + sum(map(ord, name)))
            drawn = torch.randn(shape, generator=generator) * 0.02
            return (drawn + 1 if "norm" in name and name.endswith("weight") else drawn).half()

        return Computed(shape, torch.float16, draw)

    weights = {name: random(name, shape) for name, shape in shapes.items()}
    stored = StoredModel(config, weights, folder.parent / "tokenizer", torch.float16, rows)
    shards.MAX_SHARD_BYTES = megabytes * 1_000_000
    write("hf", folder, stored, ModelManifest(processor=spec, family="vicuna", source="random"))


def run(command: list[str]) -> dict[str, float]:
    """Return the seconds and the peak of resident bytes of a process."""
    env = os.environ | {"PYTHONPATH": str(ROOT / "platform")}
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed: {said[-2000:]}")
    return {"seconds": time.perf_counter() - began, "peak": usage.ru_maxrss * 1024}


def render(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    told = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    most = SHARE * report["largest"] + SPARE
    lines = [f"# Conversion, {report['date']}", "", f"{report['machine']}; {told}", ""]
    lines += [
        f"{report['bytes'] / 1e9:.2f} GB in float16, the largest file {report['largest'] / 1e6:.0f} MB; "
        f"medians of {len(report['runs']['load-and-save'])} processes, {len(report['runs']['to hf'])} where proved.",
        "",
    ]
    middle = {
        name: {key: statistics.median(one[key] for one in ones) for key in ones[0]}
        for name, ones in report["runs"].items()
    }
    base = middle["load-and-save"]["seconds"]
    rows = [
        [name, f"{one['seconds']:.1f}", f"{one['seconds'] / base:.2f}", f"{one['peak'] / 1e6:.0f}"]
        for name, one in middle.items()
    ]
    lines += table(["", "seconds", "of load-and-save", "peak, MB"], rows)
    peaks = {
        name: max(one["peak"] for one in ones) for name, ones in report["runs"].items() if name != "load-and-save"
    }
    worst = max(peaks, key=lambda name: peaks[name])
    peak = peaks[worst]
    word = "PASS" if peak <= most else "MISS"
    target = f"target {SHARE} x the largest file + {SPARE / 1e6:.0f} MB = {most / 1e6:.0f} MB"
    lines += ["", f"- {word} peak {peak / 1e6:.0f} MB ({worst}), {target}"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
