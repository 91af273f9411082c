"""The parts of a LLaVA small enough to train in a test: random weights, real file layouts."""

from __future__ import annotations

from pathlib import Path

from rayllava.recipe import ModelSpec, ProcessorSpec

WORDS = "a small picture of the number digit what is shown in this image how many are there one two three four"


def make_parts(folder: Path) -> ModelSpec:
    """Write a Llama with a byte-fallback BPE tokenizer and a CLIP tower; return the spec that names them."""
    import torch
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        CLIPVisionModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(0)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder / "llm")
    llm = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(llm).save_pretrained(folder / "llm")
    clip = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
    )
    CLIPVisionModel(clip).save_pretrained(folder / "vision")
    size = {"height": 28, "width": 28}
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size).save_pretrained(folder / "vision")
    return ModelSpec(llm=str(folder / "llm"), vision=str(folder / "vision"), family="vicuna")


def assembled(parts: ModelSpec, folder: Path, *, max_length: int) -> ProcessorSpec:
    """Write the tokenizer of a LLaVA made of these parts to `folder`; return its processor."""
    from rayllava.prompt.assemble import assemble
    from rayllava.recipe import PromptSpec

    folder.mkdir(parents=True, exist_ok=True)
    prompt = PromptSpec(template="vicuna_v1", max_length=max_length)
    return assemble(
        llm_dir=Path(parts.llm), vision_dir=Path(parts.vision), model=parts, prompt=prompt, out_dir=folder
    )


def processor_spec(**changes: object) -> ProcessorSpec:
    """The processor that `make_parts` leads to, for tests of rooms that only need its numbers."""
    return ProcessorSpec(
        template="vicuna_v1",
        image_size=28,
        image_mean=(0.48145466, 0.4578275, 0.40821073),
        image_std=(0.26862954, 0.26130258, 0.27577711),
        num_image_tokens=4,
        image_token_id=330,
        pad_token_id=331,
        bos_token_id=1,
        eos_token_id=2,
        stop_token_ids=(2,),
        max_length=128,
    ).but(**changes)


def write_dialogues(folder: Path, *, num: int) -> Path:
    """Write FOLDER/images and LLaVA's conversation JSON about them, every third dialogue without a picture.

    Return the JSON file.
    """
    import json

    import numpy as np
    from PIL import Image

    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    samples = []
    for number in range(num):
        sample: dict[str, object] = {"id": str(number)}
        question = "what is shown in this image?"
        if number % 3:
            pixels = rng.integers(0, 256, size=(20 + number, 30, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
            sample["image"] = f"{number}.png"
            question = f"<image>\n{question}"
        said = [("human", question), ("gpt", f"the digit {number}"), ("human", "how many?"), ("gpt", "one")]
        sample["conversations"] = [{"from": who, "value": text} for who, text in said]
        samples.append(sample)
    path = folder / "dialogues.json"
    path.write_text(json.dumps(samples))
    return path
