"""Flags of XLA with which it compiles for CPUs in a third of the time: without LLVM's optimizations, by its older code
generator for fusions.

libtpu ends a process whose XLA_FLAGS hold one that it does not know, such as these.
"""

QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
