"""Attention without parameters: kernels that compute partial results, and how these merge."""
