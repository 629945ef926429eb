"""What a device computes and how fast: checks against float64, then times. A process a phase."""
