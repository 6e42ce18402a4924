"""The kernels of float32, by three products in TF32 and without tensor cores in the emulator; see ``emulated_cases``."""

from emulated_cases import combinations, execute


@combinations("float32", "tf32x3")
def test_against_the_oracle(mode, D, name, monkeypatch, record_property):
    execute(mode, D, name, monkeypatch, record_property)
