"""What tests of attention share."""

import helpers.cudnn
import pytest

from lsjax.attention import cudnn, dispatch
from lsjax.cache import sharded


@pytest.fixture
def gpu(monkeypatch):
    """Dispatches as on a GPU, with a stand-in for cuDNN that sees pieces of 24 slots."""
    monkeypatch.setattr(cudnn, "dot_product_attention", helpers.cudnn.dot_product_attention)
    monkeypatch.setattr(cudnn, "PIECE", 24)
    monkeypatch.setattr(dispatch, "_GPU_DECODE_QUERIES", 0)
    monkeypatch.setattr(dispatch, "takes_blocks", lambda _: True)
    monkeypatch.setattr(sharded, "_WINDOW_QUERIES", 8)
    attend = dispatch.attend
    monkeypatch.setattr(dispatch, "attend", lambda _, *args: attend("gpu", *args))
