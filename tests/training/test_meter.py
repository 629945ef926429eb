"""What a step costs."""

import numpy as np
import pytest

from lsjax.families import parse_config
from lsjax.shipped.model import HF_CONFIGS
from lsjax.training.documents import Document
from lsjax.training.meter import step_flops
from lsjax.training.packing import first_tokens


def test_operations_are_those_of_weights_and_of_the_keys_that_tokens_see():
    config = parse_config(HF_CONFIGS["rotary"])
    length = 4096
    document = Document(np.zeros(length, np.int32), np.ones(length, np.float32))
    whole = first_tokens([document], 1, length)
    halves = whole.replace(begin=np.repeat([0, length // 2], length // 2)[None].astype(np.int32))
    # Each layer has queries and outputs of 128 channels, keys and values of 64, an MLP of 384.
    weights = 2 * 128 * (2 * 128 + 2 * 64 + 3 * 384) + 264 * 128
    pairs = length**2 / 2
    assert step_flops(config, whole) == pytest.approx(
        3 * (2 * length * weights + 4 * 128 * 2 * pairs), rel=1e-3
    )
    spared = step_flops(config, whole) - step_flops(config, halves)
    assert spared == pytest.approx(3 * 4 * 128 * 2 * pairs / 2, rel=1e-3)
