"""Long-sequence language models in JAX and Flax."""
