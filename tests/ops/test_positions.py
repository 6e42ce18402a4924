"""Positions that are kept between batches."""

import pytest
import torch

from recbole_llm_kernels.torch_ops.positions import LARGEST, row_of_entry, starts


@pytest.mark.parametrize(("rows", "width"), [(0, 0), (0, 3), (1, 1), (5, 3), (LARGEST + 1, 2)])
def test_positions_of_rows_of_equal_width(rows: int, width: int) -> None:
    assert starts(rows, width).tolist() == [row * width for row in range(rows + 1)]
    assert row_of_entry(rows, width).tolist() == [row for row in range(rows) for _ in range(width)]


def test_what_inference_mode_made_serves_a_gradient() -> None:
    with torch.inference_mode():
        kept = row_of_entry(7, 2)
    value = torch.ones(7, 2, requires_grad=True)
    value.index_select(0, kept).sum().backward()  # saves the positions
    assert value.grad is not None
    assert torch.equal(value.grad, torch.full((7, 2), 2.0))


def test_large_ones_are_not_kept() -> None:
    assert starts(LARGEST + 1, 2) is not starts(LARGEST + 1, 2)
    assert starts(LARGEST, 2) is starts(LARGEST, 2)


def test_a_default_device_does_not_move_them() -> None:
    with torch.device("meta"):
        assert starts(11, 13).device.type == row_of_entry(11, 13).device.type == "cpu"
