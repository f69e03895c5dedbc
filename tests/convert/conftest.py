"""Inputs and checks of the text families."""

import pytest
import torch


@pytest.fixture
def left_padded():
    """Token ids (2, 13) and their mask; the second row starts with five paddings."""
    ids = torch.randint(1, 96, (2, 13), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return ids, mask


@pytest.fixture
def is_tied():
    """Function that tells whether a model's head and embedding are one parameter."""
    return lambda model: model.lm_head.weight is model.model.embed_tokens.weight
