"""Reads the settings of a SentencePiece model that its library doesn't expose.

A model is a protocol buffer. The few fields needed are read from it directly, which avoids a
dependency on the protobuf library.
"""

from collections.abc import Iterator
from dataclasses import dataclass

# Field numbers in sentencepiece_model.proto.
_TRAINER_SPEC, _NORMALIZER_SPEC = 2, 3
_MODEL_TYPE, _WHITESPACE_AS_SUFFIX = 3, 24
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_EXTRA, _ESCAPE = 2, 3, 4, 5
_BPE = 2


@dataclass(frozen=True)
class SentencePieceSpec:
    """Settings of a SentencePiece model.

    ``add_dummy_prefix``: a space is put before every text. ``merges_plain_text``: the model is a
    byte-pair encoding of the text as it stands, without normalization.
    """

    add_dummy_prefix: bool
    merges_plain_text: bool


def read_spec(model: bytes) -> SentencePieceSpec:
    """Reads the settings of a serialized model.

    Raises ``IndexError``, ``TypeError`` or ``ValueError`` if it is not a valid protocol buffer.
    """
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(model):
        if number == _TRAINER_SPEC:
            trainer.update(_fields(value))
        elif number == _NORMALIZER_SPEC:
            normalizer.update(_fields(value))
    return SentencePieceSpec(
        add_dummy_prefix=bool(normalizer.get(_DUMMY_PREFIX, True)),
        merges_plain_text=trainer.get(_MODEL_TYPE) == _BPE
        and not trainer.get(_WHITESPACE_AS_SUFFIX)
        and not normalizer.get(_CHARSMAP)
        and not normalizer.get(_REMOVE_EXTRA, True)
        and bool(normalizer.get(_ESCAPE, True)),
    )


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields the number and value of each field in a message, in order."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        match key & 7:
            case 0:
                value, position = _varint(message, position)
            case 1:
                value, position = message[position : position + 8], position + 8
            case 2:
                length, position = _varint(message, position)
                value, position = message[position : position + length], position + length
            case 5:
                value, position = message[position : position + 4], position + 4
            case kind:
                raise ValueError(f"wire type {kind} at byte {position}")
        if position > len(message):
            raise ValueError("it ends within a field")
        yield key >> 3, value


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
