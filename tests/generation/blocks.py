"""The block of positions that a quantised cache keeps in floats: shorter here, as prompts are."""

BLOCK = 256
