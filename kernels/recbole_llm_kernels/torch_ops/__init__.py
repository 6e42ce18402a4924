"""The operators in plain PyTorch: any device, and the fast path on a CPU.

The launchers of this package and of ``triton_ops`` have the same names and signatures. Their arguments are trusted:
checked, contiguous, on one device. They own the reduction, the row weights and the upstream gradient, so that each
implementation may fuse them.
"""
