"""Inputs that are none, made from right ones: for tests, for ``benchmarks/attacks.py``, and for the fuzzer of ``coverage.py``.

A module of this package turns right bytes into wrong ones, and says what became of them: "loaded", or "refused" with the
error that is promised. Any other error is a fault and is not caught.
"""
