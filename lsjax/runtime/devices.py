"""Peak rates of accelerators, as their vendors state them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Rates:
    """Peak rates of a device, as its vendor states them.

    Attributes:
      flops: bfloat16 matrix multiplication, in operations per second.
      bandwidth: memory bandwidth, in bytes per second.
      link: bandwidth of all links to neighbors together, in bytes per second each way.
    """

    flops: float
    bandwidth: float
    link: float


# Bytes of memory per chip that programs can use, and rates. Source: cloud.google.com/tpu/docs.
TPUS = {
    "v5e": (15.75 * 2**30, Rates(197e12, 819e9, 200e9)),
    "v6e": (31.25 * 2**30, Rates(918e12, 1640e9, 448e9)),
    "v5p": (95.74 * 2**30, Rates(459e12, 2765e9, 600e9)),
}


# Source: NVIDIA's data sheets, without sparsity. Links are NVLink, or PCIe for the L40S.
GPUS = {
    "h100-80gb": Rates(989e12, 3350e9, 450e9),
    "h200": Rates(989e12, 4800e9, 450e9),
    "a100-80gb": Rates(312e12, 2039e9, 300e9),
    "l40s": Rates(362e12, 864e9, 32e9),
}


# Substring of JAX's device_kind -> rates.
BY_DEVICE_KIND = {
    "H100": GPUS["h100-80gb"],
    "H200": GPUS["h200"],
    "A100": GPUS["a100-80gb"],
    "L40S": GPUS["l40s"],
    "v5 lite": TPUS["v5e"][1],
    "v6 lite": TPUS["v6e"][1],
    "v5p": TPUS["v5p"][1],
}


def peak_rates(device_kind: str) -> Rates | None:
    """Returns the rates of a device by JAX's device_kind, or None if they are unknown."""
    return next((rates for word, rates in BY_DEVICE_KIND.items() if word in device_kind), None)
