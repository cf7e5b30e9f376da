"""A Tesla T4, as XLA's compiler and an estimate need it: nobody has to have one.

The numbers are of NVIDIA's data sheet and of the CUDA programming guide for compute capability 7.5.
"""

from __future__ import annotations

from dataclasses import dataclass

TARGET = """
gpu_device_info {
  cuda_compute_capability { major: 7 minor: 5 }
  core_count: 40
  fpus_per_core: 64
  clock_rate_ghz: 1.59
  memory_bandwidth: 320000000000
  device_memory_size: 15655829504
  l2_cache_size: 4194304
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 1024
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 65536
  shared_memory_per_core: 65536
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "Tesla T4"
"""
FLOPS = {"fp16": 65e12, "fp32": 8.1e12}  # operations a second
BYTES = 320e9  # a second, through memory
KERNEL = 5e-6  # seconds from the start of a kernel to that of the next, at least; a guess from other cards


@dataclass(frozen=True)
class Bounds:
    """Seconds that a T4 takes at least for the matrix products, the bytes and the kernels of some work.

    Attributes:
      products, memory, launches: of each of the three, the others taking no time.
    """

    products: float
    memory: float
    launches: float

    @classmethod
    def of(cls, precision: str, flops: float, moved: float, kernels: float) -> Bounds:
        """Of work that is counted: operations, bytes, kernels one after the other."""
        return cls(flops / FLOPS[precision], moved / BYTES, kernels * KERNEL)

    @property
    def least(self) -> float:
        """The longest of the three."""
        return max(self.products, self.memory, self.launches)

    @property
    def total(self) -> float:
        """Their sum: nothing overlaps, but everything runs at the rates of the data sheet."""
        return self.products + self.memory + self.launches
