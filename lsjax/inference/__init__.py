"""Inference: options, requests, compiled steps, and generation."""
