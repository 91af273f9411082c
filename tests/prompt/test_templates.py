"""What is written around a dialogue, and what of it is learned: the golden cases, string for string."""

from __future__ import annotations

import pytest

from rayllava.prompt.chat import TEMPLATES, template_of
from rayllava.prompt.encode import SampleError
from tests.prompt.dialogues import sample, taught, text
from tests.prompt.vocabularies import KINDS, LOSSLESS, processor

ONE = ("h:<image>\nQ1", "g:A1")
TWO = (*ONE, "h:Q2", "g:A2")

ASK = "A chat between a curious {0} and an artificial intelligence assistant. The assistant gives helpful, detailed, "
ASK += "and polite answers to the {0}'s questions."
MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)

WRITTEN = {
    "vicuna_v1": f"<s>{ASK.format('user')} USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>",
    "llava_v1": f"<s>{ASK.format('human')} USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>",
    "llava_llama_2": (
        f"<s>[INST] <<SYS>>\n{LLAMA_2}\n<</SYS>>\n\n<image>\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST] A2 </s>"
    ),
    "mpt": (
        f"<|im_start|>system\n{MPT}<|im_end|><|im_start|>user\n<image>\nQ1<|im_end|><|im_start|>assistant\nA1<|im_end|>"
        "<|im_start|>user\nQ2<|im_end|><|im_start|>assistant\nA2<|im_end|>"
    ),
    "chatml_direct": (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nQ1<|im_end|>"
        "<|im_start|>assistant\nA1<|im_end|><|im_start|>user\nQ2<|im_end|><|im_start|>assistant\nA2<|im_end|>"
    ),
    "vicuna": "<s>USER: <image>\nQ1 ASSISTANT:A1</s>\n<s>USER: Q2 ASSISTANT:A2</s>\n",
    "internlm_chat": "<s><|User|>:<image>\nQ1<eoh>\n<|Bot|>:A1<eoa>\n<|User|>:Q2<eoh>\n<|Bot|>:A2<eoa>\n",
    "internlm2_chat": (
        "<s><|im_start|>user\n<image>\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n"
    ),
    "qwen_chat": (
        "<|im_start|>user\n<image>\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n"
    ),
    "llama3_chat": (
        "<s><|start_header_id|>user<|end_header_id|>\n\n<image>\nQ1<|eot_id|><|start_header_id|>assistant"
        "<|end_header_id|>\n\nA1<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA2<|eot_id|>"
    ),
    "phi3_chat": (
        "<s><|user|>\n<image>\nQ1<|end|>\n<|assistant|>\nA1<|end|>\n<|user|>\nQ2<|end|>\n<|assistant|>\nA2<|end|>\n"
    ),
}

TAUGHT = {
    "vicuna_v1": [" A1</s>", " A2</s>"],
    "llava_v1": [" A1</s>", " A2</s>"],
    "llava_llama_2": [" A1 </s>", " A2 </s>"],
    "mpt": ["A1<|im_end|>", "A2<|im_end|>"],
    "chatml_direct": ["A1<|im_end|>", "A2<|im_end|>"],
    "vicuna": ["A1</s>", "A2</s>"],
    "internlm_chat": ["A1<eoa>", "A2<eoa>"],
    "internlm2_chat": ["A1<|im_end|>", "A2<|im_end|>"],
    "qwen_chat": ["A1<|im_end|>", "A2<|im_end|>"],
    "llama3_chat": ["A1<|eot_id|>", "A2<|eot_id|>"],
    "phi3_chat": ["A1<|end|>", "A2<|end|>"],
}


def test_every_template_has_a_golden() -> None:
    assert {*WRITTEN, "plain"} == {*TAUGHT, "plain"} == set(TEMPLATES)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_dialogue_is_written_as_its_project_writes_it(name: str) -> None:
    made = processor("bytes", name)
    assert text(made, made.encode(sample(*TWO, images=1))) == WRITTEN[name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TAUGHT)
def test_answers_and_their_stops_carry_loss_and_nothing_else(kind: str, name: str) -> None:  # G3-G8
    made = processor(kind, name)
    spans = taught(made, made.encode(sample(*TWO, images=1)))
    if kind in ("pieces", "legacy") and not made.template.joined:
        spans = [span.removeprefix(" ") for span in spans]  # the blank before a piece of its own
    if kind == "legacy" and name in ("mpt", "chatml_direct"):
        spans = [span.removeprefix(" ") for span in spans]
    assert spans == TAUGHT[name]


@pytest.mark.parametrize(("name", "count"), [("vicuna_v1", 1), ("vicuna", 2), ("llama3_chat", 1), ("mpt", 0)])
def test_bos_stands_where_the_template_wants_it(name: str, count: int) -> None:  # G4-G6
    made = processor("pieces", name)
    ids = made.encode(sample(*TWO, images=1)).ids.tolist()
    assert ids.count(made.spec.bos_token_id) == count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("question", ["<image>\nDescribe.", "Describe.\n<image>"])
def test_plain_drops_the_question_and_teaches_the_caption_with_its_newline(kind: str, question: str) -> None:  # G1 G2
    made = processor(kind, "plain")
    example = made.encode(sample(f"h:{question}", "g:a cat", images=1))
    assert text(made, example).replace("<image> ", "<image>") == "<s><image>a cat\n"
    assert [span.removeprefix(" ") for span in taught(made, example)] == ["a cat\n"]
    assert made.spec.eos_token_id not in example.ids


@pytest.mark.parametrize("turns", [("h:Q1", "g:A1"), TWO])
def test_plain_wants_one_question_with_a_picture(turns: tuple[str, ...]) -> None:
    with pytest.raises(SampleError, match="template plain takes one question with a picture and one answer"):
        processor("bytes", "plain").encode(sample(*turns, images=int("<image>" in turns[0])))


def test_a_dialogue_without_a_picture_has_no_slot_for_one() -> None:  # G9; the zero image is the model's business
    made = processor("pieces", "vicuna_v1")
    example = made.encode(sample("h:Q1", "g:A1"))
    assert made.spec.image_token_id not in example.ids
    assert example.pixels.shape == (0, 3, 28, 28)
    assert taught(made, example) == [" A1</s>"]


SYSTEM = {  # G17
    "vicuna_v1": "<s>Be brief. USER: Q1 ASSISTANT: A1</s>",
    "llava_llama_2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nQ1 [/INST] A1 </s>",
    "mpt": "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nQ1<|im_end|><|im_start|>assistant\nA1<|im_end|>",
    "vicuna": f"<s>{ASK.format('user')} Be brief.\n USER: Q1 ASSISTANT:A1</s>\n",
    "internlm_chat": "<s><|System|>:Be brief.\n<|User|>:Q1<eoh>\n<|Bot|>:A1<eoa>\n",
    "internlm2_chat": (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n"
        "<|im_start|>assistant\nA1<|im_end|>\n"
    ),
    "llama3_chat": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>"
        "\n\nQ1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|>"
    ),
    "phi3_chat": "<s><|system|>\nBe brief.<|end|>\n<|user|>\nQ1<|end|>\n<|assistant|>\nA1<|end|>\n",
}


@pytest.mark.parametrize("name", SYSTEM)
def test_a_system_turn_stands_once_at_the_front_without_loss(name: str) -> None:
    made = processor("bytes", name)
    example = made.encode(sample("s:Be brief.", "h:Q1", "g:A1"))
    assert text(made, example) == SYSTEM[name]
    assert taught(made, example) == TAUGHT[name][:1]


def test_an_empty_system_turn_leaves_the_system_out() -> None:
    made = processor("bytes", "vicuna_v1")
    assert text(made, made.encode(sample("s:", "h:Q1", "g:A1"))) == "<s>USER: Q1 ASSISTANT: A1</s>"


def test_a_late_system_turn_is_refused() -> None:
    with pytest.raises(SampleError, match="a system turn stands after the dialogue began"):
        processor("bytes", "vicuna_v1").encode(sample("h:Q1", "s:Be brief.", "g:A1"))


def test_a_tokenizer_without_bos_gets_none() -> None:
    made = processor("bytes", "llava_llama_2", bos_token_id=None)
    assert "<s>" not in text(made, made.encode(sample(*TWO, images=1)))


def test_an_unknown_template_is_named_beside_those_there_are() -> None:
    with pytest.raises(LookupError, match="no template 'alpaca'; there are: chatml_direct, "):
        template_of("alpaca")


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("name", WRITTEN)
def test_decoding_an_answer_returns_its_text(kind: str, name: str) -> None:
    made = processor(kind, name)
    example = made.encode(sample("h:Q1", "g:a cat\n\n🙂"))
    answer = made.decode(example.labels[example.labels != -100])
    assert answer.strip(" ") == "a cat\n\n🙂"
