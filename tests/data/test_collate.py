"""Samples to a padded batch."""

import torch

from xtuner_ext.data.collate import conversation_collate


def sample(ids, labels, tiles):
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "pixel_values": torch.full((tiles, 3, 4, 4), float(len(ids))),
    }


def test_pads_on_the_right_and_masks_only_padding():
    # Token 0 is an ordinary one here, and equal to the padding.
    batch = conversation_collate([sample([5, 0, 7], [-100, 0, 7], 2), sample([0], [-100], 1)])
    assert batch["data_samples"] is None
    data = batch["data"]
    assert data["input_ids"].tolist() == [[5, 0, 7], [0, 0, 0]]
    assert data["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert data["labels"].tolist() == [[-100, 0, 7], [-100, -100, -100]]


def test_tiles_are_joined_in_the_order_of_samples():
    batch = conversation_collate(
        [sample([1, 2], [1, 2], 2), sample([3], [3], 0), sample([4], [4], 1)], pad_token_id=9
    )
    assert batch["data"]["pixel_values"][:, 0, 0, 0].tolist() == [2.0, 2.0, 1.0]
    assert batch["data"]["input_ids"].tolist() == [[1, 2], [3, 9], [4, 9]]


def test_what_goes_along_is_listed_in_reading_order():
    facts = ({"keys": [("a", 3)], "skipped": ["s"]}, {"keys": [("a", 1), ("b", 0)], "looked_at": [(0, 1)]})
    one, two = ({**sample([1], [1], 0), **fact} for fact in facts)
    expected = {"keys": [("a", 1), ("b", 0), ("a", 3)], "looked_at": [(0, 1)], "skipped": ["s"]}
    assert conversation_collate([two, one])["data_samples"] == expected


def test_batch_of_text_has_no_tiles():
    assert conversation_collate([sample([1], [1], 0)] * 2)["data"]["pixel_values"].shape == (0, 3, 4, 4)
