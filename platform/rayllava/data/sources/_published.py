"""How many records the well-known files have, as their makers state it: a download that broke off has fewer."""

from __future__ import annotations

PUBLISHED_ROWS = {
    "blip_laion_cc_sbu_558k": 558_128,
    "llava_v1_5_mix665k": 665_298,
    "sharegpt4v_instruct_gpt4-vision_cap100k": 102_025,
    "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k": 665_058,
    "llava_instruct_150k_zh": 157_712,
    "dvqa_train_200k": 200_000,
    "chartqa_train_18k": 18_317,
    "ai2d_train_12k": 12_413,
    "docvqa_train_10k": 10_211,
    "geoqa+": 72_318,
    "synthdog_en": 29_765,
}
"""By file name, without .json or .jsonl."""


def expected(name: str) -> int | None:
    """Return the published number of records of a file name; None of one that nobody published."""
    return PUBLISHED_ROWS.get(name.removesuffix(".jsonl").removesuffix(".json"))
