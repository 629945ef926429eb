"""Training on long sequences: data, loss, training step and run."""
