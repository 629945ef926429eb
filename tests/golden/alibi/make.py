"""Makes the golden ALiBi slopes, from transformers 5.23's Bloom (torch 2.13, CPU):

    python tests/golden/alibi/make.py

Writes slopes.json beside itself: number of heads -> slopes. Bloom adds slope * position to the
scores, which differs from -slope * distance by a constant for each query; its bias at position 1
is the slope.
"""

import json
import pathlib

import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

HEADS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 112, 128)


def main() -> None:
    mask = torch.ones(1, 2)
    slopes = {n: build_alibi_tensor(mask, n, torch.float32)[:, 0, 1].tolist() for n in HEADS}
    (pathlib.Path(__file__).parent / "slopes.json").write_text(json.dumps(slopes) + "\n")


if __name__ == "__main__":
    main()
