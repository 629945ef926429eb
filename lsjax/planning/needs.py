"""What a program takes of each device."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Needs:
    """Of a program, in bytes a device.

    Attributes:
      weights: the parameters, and the little else that is there throughout.
      cache: keys and values.
      temporaries: everything else, while it runs.
    """

    weights: int
    cache: int
    temporaries: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.temporaries
