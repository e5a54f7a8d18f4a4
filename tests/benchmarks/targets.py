"""Devices to compile for on a machine that has none of them. Import it before jax.

TPUs need `pip install -e ".[tpu]"`, GPUs `pip install -e ".[gpu]"` (4 GB, Linux; tried
with jax 0.11).
"""

import os
from unittest import mock

# Set before jax is imported: neither libtpu nor the plugin for CUDA must look for a machine that is not there.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}

import jax
from jax._src import xla_bridge
from jax.experimental import topologies

# Processors, GB/s, MB of second-level cache and GB of memory. All have compute capability 9.0.
HOPPER = {"H100": (132, 3352, 50, 85), "H200": (132, 4800, 60, 150)}
HOPPER_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: {} memory_bandwidth: {}000000000 l2_cache_size: {} device_memory_size: {}000000000
  fpus_per_core: 128 clock_rate_ghz: 1.98 cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA" runtime_version {{ major: 13 }} dnn_version_info {{ major: 9 minor: 12 }}
device_description_str: "NVIDIA {}"
"""


def compiled(lowered, device) -> jax.stages.Compiled:
    """Of a `jax.stages.Lowered`. What XLA:GPU chooses by timing kernels is left as it is: products are cuBLAS's."""
    untimed = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
    return lowered.compile(untimed if device.platform in ("gpu", "cuda") else None)


def devices(name: str) -> list:
    """Devices of a topology of TPUs such as "v5e:2x2", or one GPU of `HOPPER`, as `jax.sharding` takes them."""
    if name not in HOPPER:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    cores, bandwidth, cache, memory = HOPPER[name]
    config = HOPPER_CONFIG.format(cores, bandwidth, cache * 2**20, memory, name)
    # Without a GPU JAX does not know which platform "gpu" is (github.com/jax-ml/jax/issues/23971).
    known = xla_bridge.canonicalize_platform
    mock.patch.object(
        xla_bridge, "canonicalize_platform", lambda name: "cuda" if name in ("gpu", "cuda") else known(name)
    ).start()
    topology = topologies.get_topology_desc(platform="cuda", topology_name="", target_config=config, topology="1x1x1")
    return list(topology.devices)
