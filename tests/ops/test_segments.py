"""Segments of packed rows."""

import torch

from xtuner_ext.ops.segments import flat_segments, number_segments


def test_ids_that_come_back_and_that_are_any_number_are_counted_by_row():
    ids = torch.tensor([[5, 5, 2, 5, 5], [9, 9, 9, 9, 9]])
    assert number_segments(ids).tolist() == [[0, 0, 1, 2, 2], [0, 0, 0, 0, 0]]


def test_rows_end_to_end():
    ids = torch.tensor([[0, 0, 1, 2, 2], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]])
    borders, first, last = flat_segments(ids)
    assert borders.tolist() == [0, 2, 3, 5, 10, 11, 15] and borders.dtype == torch.int32
    assert first.tolist() == [0, 3, 4] and last.tolist() == [2, 3, 5]
