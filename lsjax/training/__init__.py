"""Training on long sequences: the batch, the loss and the step."""
