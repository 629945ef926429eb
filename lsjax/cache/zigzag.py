"""Where positions lie along the mesh's context axis.

A stripe of consecutive positions is cut into two pieces for each device, and device i takes the
pieces i and 2n - 1 - i: as later queries see more keys, that gives every device the same work in
causal attention. Stripe follows stripe; on each device slots are in the order of positions.
Source: zigzag ring attention (github.com/zhuzilin/ring-flash-attention); arXiv 2404.15574.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

GRANULE = 256  # a cache's capacity on each device is a multiple of it


@dataclasses.dataclass(frozen=True)
class Zigzag:
    """Positions dealt out to devices.

    Attributes:
      devices: along the context axis.
      stripe: positions dealt out together, a multiple of twice the devices. Of no account on a
        single device, where slots are positions.
    """

    devices: int
    stripe: int

    def __post_init__(self):
        if self.devices > 1 and (self.stripe < 1 or self.stripe % (2 * self.devices)):
            raise ValueError(f"{self.devices} devices cannot share {self.stripe} positions")

    @property
    def _piece(self) -> int:
        return self.stripe // (2 * self.devices)

    def slots_before(self, device: jax.Array | int, position: jax.Array) -> jax.Array:
        """How many of a device's slots stand at positions before `position`.

        As slots are in order, that is the slot of `position` itself where the device holds it.
        """
        if self.devices == 1:
            return position
        stripe, rest = position // self.stripe, position % self.stripe
        low = jnp.clip(rest - device * self._piece, 0, self._piece)
        high = jnp.clip(rest - (2 * self.devices - 1 - device) * self._piece, 0, self._piece)
        return stripe * 2 * self._piece + low + high

    def position(self, device: jax.Array | int, slot: jax.Array) -> jax.Array:
        """The position that a device's slot stands at."""
        if self.devices == 1:
            return slot
        stripe, rest = slot // (2 * self._piece), slot % (2 * self._piece)
        piece = jnp.where(rest < self._piece, device, 2 * self.devices - 1 - device)
        return stripe * self.stripe + piece * self._piece + rest % self._piece

    def device(self, position: jax.Array) -> jax.Array:
        """The device that holds a position."""
        piece = position % self.stripe // self._piece if self.devices > 1 else 0 * position
        return jnp.minimum(piece, 2 * self.devices - 1 - piece)

    def chunk_positions(self, start: jax.Array, batch: int, length: int) -> jax.Array:
        """[batch, length] positions from `start` on, in the order of `order`."""
        return jnp.broadcast_to(start + jnp.asarray(self.order(length)), (batch, length))

    def order(self, length: int) -> np.ndarray:
        """[length] positions 0 .. length - 1 (whole stripes) device after device.

        An array in this order, split evenly along the context axis, gives each device its own.
        """
        if self.devices == 1:
            return np.arange(length)
        pieces = np.arange(length).reshape(-1, 2 * self.devices, self._piece)
        own = [pieces[:, [i, 2 * self.devices - 1 - i]].ravel() for i in range(self.devices)]
        return np.concatenate(own)


def whole_stripes(chunk: int, devices: int) -> int:
    """The least chunk from `chunk` up that can be dealt out to devices."""
    return chunk if devices == 1 else -(-chunk // (2 * devices)) * 2 * devices


def stripe_of(chunk: int, devices: int) -> int:
    """The stripe of caches that are filled in such chunks: it divides both of them.

    A cache's capacity is a multiple of GRANULE for each device.
    """
    return 0 if devices == 1 else math.gcd(chunk, GRANULE * devices)
