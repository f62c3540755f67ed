"""Kernels: torch references with twins in Triton for GPUs and in C for CPUs."""

# Whether `lang` takes Triton where it is installed. It costs 0.08 s and 50 MB, for nothing where no GPU is used.
use_triton = True
