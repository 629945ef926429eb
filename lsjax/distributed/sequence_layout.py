"""Layout of positions along the mesh's context axis.

The sequence is a series of blocks of consecutive positions. Each block is split into 2n chunks for
n devices, and device i holds chunks i and 2n - 1 - i (zigzag). Later queries see more keys, so this
balances the work of causal attention. On each device slots are in the order of positions.
Source: zigzag ring attention (github.com/zhuzilin/ring-flash-attention); arXiv 2404.15574.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

CAPACITY_MULTIPLE = 256  # a cache's capacity per device is a multiple of this


@dataclasses.dataclass(frozen=True)
class Zigzag:
    """Zigzag order of positions over devices.

    Attributes:
      devices: number of devices on the context axis.
      block_length: number of positions per block, a multiple of twice the devices. It has no effect
        on a single device, where slots are positions.
    """

    devices: int
    block_length: int

    def __post_init__(self):
        if self.devices > 1 and (self.block_length < 1 or self.block_length % (2 * self.devices)):
            raise ValueError(f"{self.devices} devices cannot share {self.block_length} positions")

    @property
    def piece_length(self) -> int:
        """Number of consecutive positions that a device holds at least; 0 on a single device."""
        return self.block_length // (2 * self.devices)

    def num_local_slots_before(self, device: jax.Array | int, position: jax.Array) -> jax.Array:
        """Returns how many of a device's slots hold positions before `position`.

        If the device holds `position`, that is its slot, since slots are in order.
        """
        if self.devices == 1:
            return position
        block, rest = position // self.block_length, position % self.block_length
        low = jnp.clip(rest - device * self.piece_length, 0, self.piece_length)
        high = jnp.clip(
            rest - (2 * self.devices - 1 - device) * self.piece_length, 0, self.piece_length
        )
        return block * 2 * self.piece_length + low + high

    def position(self, device: jax.Array | int, slot: jax.Array) -> jax.Array:
        """Returns the position that a device's slot holds."""
        if self.devices == 1:
            return slot
        block, rest = slot // (2 * self.piece_length), slot % (2 * self.piece_length)
        chunk = jnp.where(rest < self.piece_length, device, 2 * self.devices - 1 - device)
        return block * self.block_length + chunk * self.piece_length + rest % self.piece_length

    def device(self, position: jax.Array) -> jax.Array:
        """Returns the device that holds a position."""
        chunk = (
            position % self.block_length // self.piece_length if self.devices > 1 else 0 * position
        )
        return jnp.minimum(chunk, 2 * self.devices - 1 - chunk)

    def chunk_positions(self, start: jax.Array, batch: int, length: int) -> jax.Array:
        """Returns [batch, length] positions of a prefill chunk, in the order of `permutation`."""
        return jnp.broadcast_to(start + jnp.asarray(self.permutation(length)), (batch, length))

    def permutation(self, length: int) -> np.ndarray:
        """Returns [length] positions 0 .. length - 1 (whole blocks) in zigzag order.

        An array in this order, split evenly over the context axis, gives each device its positions.
        """
        if self.devices == 1:
            return np.arange(length)
        chunks = np.arange(length).reshape(-1, 2 * self.devices, self.piece_length)
        own = [chunks[:, [i, 2 * self.devices - 1 - i]].ravel() for i in range(self.devices)]
        return np.concatenate(own)


ONE_DEVICE = Zigzag(1, 0)


def round_up_to_blocks(chunk: int, devices: int) -> int:
    """Rounds a prefill chunk up to a length that can be sharded in zigzag order over devices."""
    return chunk if devices == 1 else -(-chunk // (2 * devices)) * 2 * devices


def zigzag_of(chunk: int, devices: int) -> Zigzag:
    """Returns the layout of a cache that is filled in prefill chunks.

    Its blocks divide both the chunk and the capacity, which is a multiple of CAPACITY_MULTIPLE per
    device.
    """
    return (
        ONE_DEVICE
        if devices == 1
        else Zigzag(devices, math.gcd(chunk, CAPACITY_MULTIPLE * devices))
    )
