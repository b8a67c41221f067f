"""Flags of XLA with which it compiles for CPUs in a quarter of the time: without LLVM's optimizations, by its older
code generator for fusions, each program as one module of LLVM's instead of some for each core.

libtpu ends a process whose XLA_FLAGS hold one that it does not know, such as these.
"""

QUICK_TO_COMPILE = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
