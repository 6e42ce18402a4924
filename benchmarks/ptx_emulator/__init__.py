"""Executes the PTX that Triton emits for sm_90 on a CPU, one program after another, and checks what a GPU would punish.

The PTX for sm_90 is executed by an emulator; ptxas, timing, hardware rounding and the driver are not covered.

- ``program`` reads PTX; ``machine`` runs it: a NumPy lane per thread, a program counter per thread.
- ``arithmetic``, ``transfers`` and ``matrix`` are the instructions.
- ``memory`` holds bytes and who touched them: accesses outside every argument, reads of what nobody wrote, races between
  warps within a program and between programs, asynchronous copies that are read before they are waited for.
- ``launch`` compiles a kernel as a launch would and executes it on CPU tensors.
- ``faults`` breaks PTX on purpose, to show that the checks see it.

Asynchrony is the worst that the instructions allow: a copy lands when it is waited for, a product of tensor cores too.
"""
