"""The KV cache: what each layer keeps of its tokens, which turns queries into a Partial.

`protocol` says what a layer's cache does. Caches of one kind wrap or group others: FloatTail keeps
the current block of a quantized cache in floats, HeadGroups gives groups of heads their own,
SharedPrefix puts a document before the tokens of each row. SparseCache has prefill attend to the
blocks that matter.
"""

from lsjax.cache.compensation_token import CompensationToken
from lsjax.cache.float_tail import BLOCK, FloatBlock, FloatTail
from lsjax.cache.full import FullCache
from lsjax.cache.head_groups import HeadGroups, HeadSplit, compress
from lsjax.cache.protocol import KVCache, LayerCache, Step
from lsjax.cache.recurrent import (
    RecurrentState,
    States,
    empty_state,
    from_snapshot,
    snapshot,
    snapshot_bytes,
    states_of,
    with_states,
)
from lsjax.cache.rolling import RollingCache
from lsjax.cache.sharded import update_and_attend
from lsjax.cache.shared_prefix import (
    DocumentCache,
    attach,
    cache_after,
    detach,
    shared_layers,
    with_layers,
    without_tails,
)
from lsjax.cache.sparse import SparseCache
from lsjax.cache.spec import (
    CACHE_DTYPES,
    CachePolicy,
    CacheSpec,
    cache_shapes,
    empty_cache,
    empty_entry,
    empty_layer,
    layer_bytes,
)
from lsjax.cache.token_slices import TokenSlice, from_slices, take_tokens
from lsjax.cache.window import WindowCache, WindowSpec

__all__ = [
    "BLOCK",
    "CACHE_DTYPES",
    "CachePolicy",
    "CacheSpec",
    "CompensationToken",
    "DocumentCache",
    "FloatBlock",
    "FloatTail",
    "FullCache",
    "HeadGroups",
    "HeadSplit",
    "KVCache",
    "LayerCache",
    "RecurrentState",
    "RollingCache",
    "SparseCache",
    "States",
    "Step",
    "TokenSlice",
    "WindowCache",
    "WindowSpec",
    "attach",
    "cache_after",
    "cache_shapes",
    "compress",
    "detach",
    "empty_cache",
    "empty_entry",
    "empty_layer",
    "empty_state",
    "from_slices",
    "from_snapshot",
    "layer_bytes",
    "shared_layers",
    "snapshot",
    "snapshot_bytes",
    "states_of",
    "take_tokens",
    "update_and_attend",
    "with_layers",
    "with_states",
    "without_tails",
]
