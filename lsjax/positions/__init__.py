"""Token positions: rotary frequencies, their scaling, the rotation, and ALiBi."""
