"""The operators as Triton kernels; only here is Triton imported.

Same names and signatures as ``torch_ops``; arguments are trusted in the same way, except that ids out of range are
masked here, and row lists that descend are found here (the loss becomes NaN), because a look at them would synchronise
the device.
"""
