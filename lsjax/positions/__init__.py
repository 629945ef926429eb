"""Where a token stands: rotary frequencies, their scaling, and the rotation."""
