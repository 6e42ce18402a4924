"""The kernels of bfloat16 in the emulator; see ``emulated_cases``."""

from emulated_cases import combinations, execute


@combinations("bfloat16")
def test_against_the_oracle(mode, D, name, monkeypatch, record_property):
    execute(mode, D, name, monkeypatch, record_property)
