"""Every malformed input is named where none is allowed, and counted for its reason where some are."""

import pytest

from xtuner_ext.data.dataset import ConversationDataset
from xtuner_ext.data.ledger import REASONS
from xtuner_ext.data.meta import read_meta
from xtuner_ext.errors import BadSample, UserError

from .malformed import GOOD, LINE, LINE_CASES, META_CASES, write

SETTINGS = {"max_length": 4096, "frames": {"min_frames": 2, "max_frames": 4}}


def name(case):
    return case.name


@pytest.fixture
def build(digits_processor):
    def build(meta, **kwargs):
        return ConversationDataset(meta, digits_processor, "internlm2_chat", **SETTINGS, **kwargs)

    return build


def test_the_list_is_long_and_covers_every_reason():
    names = [case.name for case in META_CASES + LINE_CASES]
    assert len(names) == len(set(names)) >= 30
    # Of a model without an image front end the dataset's tests tell.
    assert {case.reason for case in LINE_CASES} == set(REASONS) - {"no_images_allowed"}


@pytest.mark.parametrize("case", META_CASES, ids=name)
@pytest.mark.parametrize("share", [None, 1.0])
def test_meta_mistakes_are_named_whatever_is_allowed(build, tmp_path, case, share):
    meta, fragments, _ = write(tmp_path, case)
    with pytest.raises(UserError) as caught:
        build(meta, max_bad_fraction=share)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("case", LINE_CASES, ids=name)
def test_bad_lines_are_named(build, tmp_path, case):
    meta, fragments, reason = write(tmp_path, case)
    with pytest.raises(BadSample) as caught:
        dataset = build(meta)
        assert case.late
        dataset.encode(1)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value
    assert str(caught.value).startswith(f"{tmp_path / 'd.jsonl'}:{LINE}: ")
    assert caught.value.reason == reason


@pytest.mark.parametrize("case", LINE_CASES, ids=name)
def test_bad_lines_are_left_out_and_counted(build, tmp_path, case):
    meta, fragments, reason = write(tmp_path, case)
    dataset = build(meta, max_bad_fraction=0.5)
    samples = [dataset[index] for index in range(len(dataset))]
    skipped = dataset.bad + [entry for sample in samples for entry in sample["skipped"]]
    assert [entry[:4] for entry in skipped] == [("d", str(tmp_path / "d.jsonl"), LINE, reason)]
    assert all(fragment in skipped[0].message for fragment in fragments), skipped
    # In the place of one that is bad when it is read comes the next.
    assert len(dataset) == len(GOOD) + case.late
    lines = [sample["keys"][0][1] for sample in samples]
    assert lines == ([0, 2, 2, 3, 4] if case.late else [0, 2, 3, 4])
    looked_at = [place for sample in samples for place in sample["looked_at"]]
    assert sorted(set(looked_at)) == [(0, line) for line in ([0, 1, 2, 3, 4] if case.late else [0, 2, 3, 4])]


def test_the_good_lines_are_good(build, tmp_path):
    write(tmp_path, LINE_CASES[0])
    path = tmp_path / "d.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join(lines[: LINE - 1] + lines[LINE:]))
    dataset = build(tmp_path / "meta.json")
    assert [dataset.record(index).kind for index in range(len(dataset))] == ["text", "image", "text", "video"]
    assert [entry.name for entry in read_meta(tmp_path / "meta.json")] == ["d"]
    assert all(len(dataset[index]["input_ids"]) for index in range(len(dataset)))
