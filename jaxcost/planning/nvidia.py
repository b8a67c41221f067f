"""Described NVIDIA GPUs: XLA's GPU compiler needs a chip's figures and no chip.

The figures that only the compiler's choices depend on are in `nvidia.json`; memory and bandwidth are those of
`chips.json`. A topology is hosts x GPUs a host: `h100:8x8` is 64 GPUs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import pathlib
from typing import Any

from jaxcost.cost import hardware

COMPILER_OPTIONS = {"xla_gpu_autotune_level": "0"}
"""Tuning times kernels on the chip, which is not here."""
_RESERVED_SHARED_BYTES = 1024
_CUDNN = (9, 8, 0)
_TARGETS = json.loads((pathlib.Path(__file__).parent / "nvidia.json").read_text())["targets"]


def installed() -> bool:
    """Whether XLA's compiler for NVIDIA GPUs is installed."""
    return importlib.util.find_spec("jax_plugins") is not None and any(
        importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13)
    )


def describe(chip: hardware.Chip, hosts: int, gpus_per_host: int) -> list[Any]:
    """The described devices of so many hosts.

    Raises:
        ValueError: nothing is known of how to compile for the chip.
    """
    if chip.name not in _TARGETS:
        raise ValueError(f"there is no compiler target for {chip.name!r}; choose one of {', '.join(_TARGETS)}.")
    from jax.experimental import topologies

    return topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=target_config(chip),
        topology=f"1x{hosts}x{gpus_per_host}",
    ).devices


@contextlib.contextmanager
def described_cudnn():
    """Lets JAX trace cuDNN's attention where cuDNN is not: all that it asks of the library is its version.

    A described chip's attention has no workspace in the plan, since only cuDNN itself knows how much it takes.
    """
    from jax._src.cudnn import fused_attention_stablehlo as fused

    asked, major, minor, patch = fused.check_cudnn_version, *_CUDNN
    fused.check_cudnn_version = lambda: 10_000 * major + 100 * minor + patch
    try:
        yield
    finally:
        fused.check_cudnn_version = asked


def target_config(chip: hardware.Chip) -> str:
    """XLA's `GpuTargetConfigProto` of a chip, as text."""
    target = _TARGETS[chip.name]
    major, minor = target["capability"].split(".")
    # Instructions of one architecture alone, such as Hopper's asynchronous matmuls.
    extension = " feature_extension: ACCELERATED_FEATURES" if int(major) >= 9 else ""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {target["shared_bytes_per_core"]}
  shared_memory_per_block_optin: {target["shared_bytes_per_core"] - _RESERVED_SHARED_BYTES}
  threads_per_core_limit: {target["threads_per_core"]}
  core_count: {target["cores"]}
  fpus_per_core: {target["fpus_per_core"]}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {chip.hbm_bytes_per_second.value:.0f}
  l2_cache_size: {target["l2_cache_bytes"]}
  clock_rate_ghz: {target["clock_ghz"]}
  device_memory_size: {chip.hbm_bytes.value:.0f}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor}{extension} }}
  runtime_version: "12.8.0"
  driver_version: "12.8.0"
  dnn_version: "{".".join(map(str, _CUDNN))}"
}}
platform_name: "CUDA"
dnn_version_info {{ major: {_CUDNN[0]} minor: {_CUDNN[1]} }}
device_description_str: "{chip.device_kinds[0]}"
"""
