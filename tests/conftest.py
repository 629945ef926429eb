"""Eight CPU devices, so that every mesh can be tested; set before JAX is imported."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
