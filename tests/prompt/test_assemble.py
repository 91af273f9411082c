"""A model's own tokenizer becomes ours, and transformers reads it the same way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from rayllava.families import FAMILIES
from rayllava.prompt.assemble import assemble
from rayllava.prompt.encode import Processor
from rayllava.recipe import ModelSpec, ProcessorSpec, PromptSpec
from tests.prompt.dialogues import sample, taught
from tests.prompt.vocabularies import folder

ASSETS = Path(__file__).parents[1] / "assets"
CASES = {"llava_v15": "vicuna", "xtuner_llama3": "llama3", "xtuner_phi3": "phi3", "xtuner_internlm2": "internlm2"}
TEXT = "What is  shown?\n</s>USER: é🙂 <image>\nQ"


def make(
    llm_dir: Path, out_dir: Path, family: str = "vicuna", select: str = "default", **prompt: object
) -> ProcessorSpec:
    return assemble(
        llm_dir=llm_dir,
        vision_dir=ASSETS / "llava_v15" / "vision",
        model=ModelSpec(llm="", vision="", family=family, vision_feature_select=select),  # type: ignore[arg-type]
        prompt=PromptSpec.model_validate({"template": FAMILIES[family].template, **prompt}),
        out_dir=out_dir,
    )


@pytest.mark.parametrize("asset", CASES)
def test_plain_transformers_reads_what_is_written(asset: str, tmp_path: Path) -> None:
    spec = make(ASSETS / asset / "llm", tmp_path, CASES[asset])
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs(TEXT).input_ids == ours.encode(TEXT).ids
    assert theirs.convert_tokens_to_ids("<image>") == spec.image_token_id
    assert theirs.pad_token_id == spec.pad_token_id and theirs.eos_token_id == spec.eos_token_id
    assert theirs.bos_token_id == spec.bos_token_id and theirs.padding_side == "right"


@pytest.mark.parametrize(
    ("asset", "ids", "stops"),
    [
        ("llava_v15", (512, 513, 1, 2), (2,)),
        ("xtuner_llama3", (512, 513, 496, 497), (497, 505)),
        ("xtuner_phi3", (501, 502, 1, 490), (490, 497)),
        ("xtuner_internlm2", (512, 513, 1, 2), (2, 510)),
    ],
)
def test_new_tokens_follow_the_vocabulary_and_every_way_to_stop_is_known(
    asset: str, ids: tuple[int, ...], stops: tuple[int, ...], tmp_path: Path
) -> None:
    spec = make(ASSETS / asset / "llm", tmp_path, CASES[asset])
    assert (spec.image_token_id, spec.pad_token_id, spec.bos_token_id, spec.eos_token_id) == ids
    assert spec.stop_token_ids == stops
    assert (spec.image_size, spec.num_image_tokens) == (56, 16)


def test_the_class_token_counts_when_the_tower_keeps_it(tmp_path: Path) -> None:
    assert make(ASSETS / "llava_v15" / "llm", tmp_path, select="full").num_image_tokens == 17


def test_assembling_again_changes_nothing(tmp_path: Path) -> None:
    first = make(ASSETS / "xtuner_llama3" / "llm", tmp_path / "a", "llama3")
    assert make(tmp_path / "a", tmp_path / "b", "llama3") == first
    assert (tmp_path / "a/tokenizer.json").read_text() == (tmp_path / "b/tokenizer.json").read_text()


def test_a_pad_token_of_its_own_is_kept(tmp_path: Path) -> None:
    llm = tmp_path / "llm"
    shutil.copytree(folder("pieces"), llm)
    roles = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>", "pad_token": "<pad>"}
    (llm / "special_tokens_map.json").write_text(json.dumps(roles))
    before = Tokenizer.from_file(str(llm / "tokenizer.json"))
    spec = make(llm, tmp_path / "out")
    assert spec.pad_token_id == before.token_to_id("<pad>")
    assert Tokenizer.from_file(str(tmp_path / "out/tokenizer.json")).get_vocab_size() == before.get_vocab_size()


def test_a_tokenizer_that_refuses_bos_gets_none(tmp_path: Path) -> None:
    llm = tmp_path / "llm"
    shutil.copytree(ASSETS / "llava_v15" / "llm", llm)
    config = json.loads((llm / "tokenizer_config.json").read_text())
    (llm / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": False}))
    assert make(llm, tmp_path / "out").bos_token_id is None


def test_sentencepiece_and_its_conversion_agree(tmp_path: Path) -> None:
    import sentencepiece

    llm = ASSETS / "llava_v15" / "llm"
    spec = make(llm, tmp_path)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(llm / "tokenizer.model"))
    ours = Processor(spec, tmp_path).tokenizer
    for text in ("a", "What is shown in this image?", "two  blanks  ", "é🙂\n\tx", "a" * 99, "</s", "people"):
        assert ours.encode(text).ids.tolist() == pieces.encode(text)


def test_a_chat_model_may_rename_reserved_pieces(tmp_path: Path) -> None:
    """InternLM2-chat's vocabulary calls the ids of its control tokens by other names."""
    llm = tmp_path / "llm"
    shutil.copytree(ASSETS / "llava_v15" / "llm", llm)
    config = json.loads((llm / "tokenizer_config.json").read_text())
    added = {**config["added_tokens_decoder"], "511": {"content": "<|im_end|>", "special": True}}
    (llm / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": added}))
    spec = make(llm, tmp_path / "out", "internlm2")
    assert spec.stop_token_ids == (2, 511) and spec.image_token_id == 512
    made = Processor(spec, tmp_path / "out")
    assert [span.strip() for span in taught(made, made.encode(sample("h:Q", "g:A")))] == ["A<|im_end|>"]


def test_a_tokenizer_json_keeps_its_own_way_with_blanks(tmp_path: Path) -> None:
    llm = tmp_path / "llm"
    shutil.copytree(folder("legacy"), llm)
    said = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (llm / "tokenizer_config.json").write_text(json.dumps(said))
    make(llm, tmp_path / "out")
    before = Tokenizer.from_file(str(llm / "tokenizer.json"))
    ids = before.encode(TEXT, add_special_tokens=False).ids
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT, add_special_tokens=False).input_ids == ids


def test_promised_tokens_that_tokenizer_json_lacks_are_added(tmp_path: Path) -> None:
    llm = tmp_path / "llm"
    shutil.copytree(ASSETS / "xtuner_llama3" / "llm", llm)
    (llm / "added_tokens.json").write_text('{"<|new|>": 512}')
    assert make(llm, tmp_path / "out", "llama3").image_token_id == 513
    (llm / "added_tokens.json").write_text('{"<|new|>": 600}')
    with pytest.raises(ValueError, match=r"gives <\|new\|> the id 600, its vocabulary leads to 512"):
        make(llm, tmp_path / "out", "llama3")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds neither tokenizer\.json nor tokenizer\.model"):
        make(tmp_path, tmp_path / "out")
    shutil.copy(folder("bytes") / "tokenizer.json", tmp_path)
    with pytest.raises(ValueError, match="names no eos_token"):
        make(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match=r"prompt.max_length=16 leaves no room for 16 image tokens; use at least 80"):
        make(ASSETS / "llava_v15" / "llm", tmp_path / "out", max_length=16)
    with pytest.raises(LookupError, match="no template 'nope'"):
        make(ASSETS / "llava_v15" / "llm", tmp_path / "out", template="nope")


def test_user_defined_pieces_are_tokens_of_their_own(tmp_path: Path) -> None:
    """InternLM's first tokenizer holds <eoh> and <eoa> as user-defined pieces."""
    from sentencepiece import sentencepiece_model_pb2

    llm = tmp_path / "llm"
    shutil.copytree(ASSETS / "llava_v15" / "llm", llm)
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((llm / "tokenizer.model").read_bytes())
    for text in ("<eoh>", "<eoa>"):
        proto.pieces.add(piece=text, score=0.0, type=sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED)
    (llm / "tokenizer.model").write_bytes(proto.SerializeToString())
    spec = make(llm, tmp_path / "out", "internlm")
    assert spec.stop_token_ids == (2, 513)
    ids = Processor(spec, tmp_path / "out").encode(sample("h:<eoa> Q", "g:A")).ids.tolist()
    assert ids.count(512) == ids.count(513) == 1


def tower(folder: Path, **config: object) -> Path:
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copyfile(ASSETS / "llava_v15" / "vision" / name, folder / name)
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | config))
    return folder


def seen(vision_dir: Path, out_dir: Path, **model: object) -> tuple[int, int]:
    """Return the pictures' side and the positions they take."""
    spec = ModelSpec.model_validate({"llm": "", "vision": "", "family": "vicuna", **model})
    llm, prompt = ASSETS / "llava_v15" / "llm", PromptSpec(template="vicuna_v1")
    made = assemble(llm_dir=llm, vision_dir=vision_dir, model=spec, prompt=prompt, out_dir=out_dir)
    return made.image_size, made.num_image_tokens


def test_a_recipe_may_show_the_tower_larger_pictures(tmp_path: Path) -> None:
    clip = tower(tmp_path / "clip")
    assert seen(clip, tmp_path / "out") == (56, 16)
    assert seen(clip, tmp_path / "out", image_size=84) == (84, 36)
    assert seen(clip, tmp_path / "out", image_size=84, vision_feature_select="full") == (84, 37)
    with pytest.raises(ValueError, match=r"model.image_size=60 cuts patches of 14 pixels; use 70"):
        seen(clip, tmp_path / "out", image_size=60)


def test_a_tower_without_class_token_has_none_to_drop(tmp_path: Path) -> None:
    siglip = tower(tmp_path / "siglip", model_type="siglip_vision_model")
    assert seen(siglip, tmp_path / "out", vision_feature_select="full") == (56, 16)
    with pytest.raises(ValueError, match=r"model.vision_feature_select=default drops .*siglip lacks; use full"):
        seen(siglip, tmp_path / "out")
