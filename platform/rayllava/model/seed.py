"""Everything random in a model is drawn from a seed of its own, so there is no state of a generator to save."""

from __future__ import annotations

import hashlib
import json


def seed_of(seed: int, *place: int | str) -> int:
    """Return 63 bits that depend on the recipe's seed and on what they are for, and on nothing else.

    The first 63 bits of BLAKE2b (RFC 7693) of the arguments as a JSON list: the same in every process, on every
    machine and under every version of a library.
    """
    digest = hashlib.blake2b(json.dumps([seed, *place]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
