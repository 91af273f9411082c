"""Every noun that travels between the rooms of the house. Read this file first.

Sample --encode--> Example --collate--> Batch --> loss                 (training)
Question --> Request --engine--> Delta, Delta, ... --> Prediction      (evaluation, serving)
[Prediction] --score--> Score                                          (evaluation)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # numpy stays out of the light modules
    import numpy as np
    from numpy.typing import NDArray

Role = Literal["system", "user", "assistant"]
Finish = Literal["stop", "length", "abort"]

IMAGE_MARK = "<image>"
"""Where a picture stands in the text of a user turn."""

IGNORE = -100
"""Label of a position that carries no loss."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One utterance of a dialogue. A user turn marks the place of each of its pictures with `<image>`."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Sample:
    """A dialogue about any number of pictures, as stored in a shard."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[bytes, ...] = ()
    """Encoded image files (PNG, JPEG, ...) in the order of their marks."""
    key: str = ""
    """`source:line`, and `#copy` behind it for a repeat: where the row of a shard came from, which is what a ledger
    and the audit know it by. Empty for what is in no shard. An id is not unique; the seven questions that are made
    of one RefCOCO row share a key."""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A sample in the model's own terms."""

    id: str
    """The sample's key, or its id where it has none."""
    ids: NDArray[np.int32]
    """(T,) token ids; a picture is a run of image token ids."""
    labels: NDArray[np.int32]
    """(T,) the id itself where the assistant speaks, -100 elsewhere. Not shifted."""
    pixels: NDArray[np.uint8]
    """(N, 3, S, S) pictures at the model's resolution, not yet normalised."""
    cut: bool = False
    """True when turns or the end of an answer did not fit into the length limit."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Examples that go through the model together: one atom of a step.

    They stand in rows of their own, padded on the right, or packed end to end in one row without padding.
    """

    ids: NDArray[np.int32]
    """(B, T)"""
    labels: NDArray[np.int32]
    """(B, T), -100 on padding"""
    positions: NDArray[np.int32]
    """(B, T) place of every id in its own example: 0, 1, 2, ... and 0 again where a packed row's next one begins.
    Padding counts on."""
    lengths: NDArray[np.int32]
    """(B,) positions of each row that are not padding"""
    pixels: NDArray[np.uint8]
    """(N, 3, S, S) pictures of all rows in textual order"""
    sample_ids: tuple[str, ...]
    """One id an example, which is its key; empty for a dummy, which weighs nothing and keeps the ranks in step."""
    packed: bool
    """Whether the examples share one row."""
    index: int
    """0-based place of the atom in its step, -1 for a dummy: what is random in its pass depends on it."""

    @property
    def num_targets(self) -> int:
        """Number of positions whose next token carries loss."""
        return int((self.labels[:, 1:] != IGNORE).sum())


@dataclass(frozen=True, slots=True)
class Question:
    """One item of a benchmark: what is asked, never what is right."""

    id: str
    """Unique within its benchmark."""
    text: str
    """The complete user text, instruction suffix included, without image marks."""
    images: tuple[bytes, ...] = ()
    max_new_tokens: int = 128
    group: str = ""
    """Questions of one group are scored together and never split between workers."""


@dataclass(frozen=True, slots=True)
class Request:
    """What an engine is asked to continue."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[bytes, ...] = ()
    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer. Concatenated texts are the answer; `finish` is set on the last piece alone."""

    id: str
    """Of the request."""
    text: str
    num_tokens: int
    """Tokens generated for this request so far."""
    num_prompt_tokens: int
    """Prompt length in tokens, image tokens included."""
    finish: Finish | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """A complete answer to a question: a line of predictions.jsonl."""

    id: str
    text: str
    finish: Finish
    num_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Score:
    """What a benchmark made of a set of predictions: the content of score.json."""

    benchmark: str
    profile: str
    """Prompt, decoding and scorer that the number belongs to; never compare across profiles."""
    primary: tuple[str, float]
    """Name and value of the headline metric."""
    metrics: dict[str, float]
    num: int
    num_failed: int = 0
    """Questions without an answer; they count as wrong."""
    model: str = ""
    decoding: dict[str, Any] = field(default_factory=dict)
