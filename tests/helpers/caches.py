"""What a model's cache takes."""

import jax

from lsjax.inference.request import batches


def cache_bytes(lm, length):
    """Bytes of the arrays that hold a prompt of up to so many tokens, and a few more."""
    options = {"max_input_length": length, "allow_untrained_length": True}
    (request,) = batches(lm.options, [(1, 2, 3)], 4, **options)
    spec = request.cache_spec(lm.options)
    return sum(x.nbytes for x in jax.tree.leaves(lm.engine.new_cache(spec)))
