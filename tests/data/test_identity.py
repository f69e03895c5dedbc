"""Sources are known by what their samples follow from, wherever they lie."""

import json

import pytest
from PIL import Image

from xtuner_ext.data.dataset import ConversationDataset
from xtuner_ext.data.identity import describe_sources, fingerprint
from xtuner_ext.modeling.processing import HybridVLProcessor

LINES = [
    {"conversations": [{"from": "human", "value": f"What {n}?"}, {"from": "gpt", "value": "red"}], "image": "red.png"}
    for n in range(3)
]


@pytest.fixture
def build(tmp_path, digits_processor):
    def build(folder="a", lines=LINES, fields=(), template="internlm2_chat", dataset=(), **settings):
        folder = tmp_path / folder
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), "red").save(folder / "red.png")
        (folder / "film.mp4").write_bytes(b"read later")
        (folder / "d.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        (folder / "d.json").write_text(json.dumps({"d": {"annotation": "d.jsonl", **dict(fields)}}))
        sizes = {"image_size": 32, "tokens_per_tile": 4, **settings}
        processor = HybridVLProcessor(digits_processor.tokenizer, **sizes)
        return ConversationDataset(folder / "d.json", processor, template, **dict(dataset))

    return build


def test_a_copy_elsewhere_has_the_same_name_and_so_have_its_samples(build):
    one, other = build("a"), build("b", fields={"repeat_time": 2})
    assert one.fingerprints == other.fingerprints
    assert [other[i]["keys"] for i in range(6)] == 2 * [one[i]["keys"] for i in range(3)]
    assert one[1]["keys"] == [(one.fingerprints[0], 1)]


CHANGES = {
    "annotations": dict(lines=LINES[:2]),
    "template.default_system": dict(template="internvl2_5"),
    "processor.max_tiles": dict(max_tiles=3),
    "max_dynamic_patch": dict(fields={"max_dynamic_patch": 2}),
}


@pytest.mark.parametrize("key, change", CHANGES.items(), ids=CHANGES)
def test_whatever_changes_a_sample_changes_the_name(build, key, change):
    (before,), (after,) = describe_sources(build()), describe_sources(build("b", **change))
    assert before[key] != after[key] and fingerprint(before) != fingerprint(after)


def test_a_description_survives_json(build):
    (description,) = describe_sources(build())
    assert json.loads(json.dumps(description)) == description


FILM = [{**LINES[0], "image": None, "video": "film.mp4"}]


@pytest.mark.parametrize("change", [{"seed": 1}, {"frames": {"max_frames": 9}}], ids=["seed", "frames"])
def test_what_draws_samples_matters_where_something_is_drawn(build, change):
    def name(lines, **fields):
        return [build(lines=lines, fields=fields, dataset=settings).fingerprints for settings in ({}, change)]

    plain, films, augmented = name(LINES), name(FILM), name(LINES, data_augment=True)
    assert plain[0] == plain[1] != augmented[0] and films[0] != films[1]
    assert (augmented[0] == augmented[1]) == ("frames" in change)


def test_a_line_keeps_its_name_when_another_is_left_out(build):
    lines = [{"conversations": []}, *LINES]
    dataset = build(lines=lines, dataset={"max_bad_fraction": 0.5})
    assert [dataset[index]["keys"][0][1] for index in range(3)] == [1, 2, 3]


def test_the_same_lines_over_other_images_are_other_samples(build, tmp_path):
    build(fields={"repeat_time": 2})
    (tmp_path / "a" / "other").mkdir()
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "a" / "other" / "red.png")
    roots = {"one": ".", "two": "other", "three": "other/.."}
    meta = {name: {"annotation": "d.jsonl", "root": root} for name, root in roots.items()}
    (tmp_path / "a" / "d.json").write_text(json.dumps(meta))
    processor = build("b").processor
    one, two, three = ConversationDataset(tmp_path / "a" / "d.json", processor, "internlm2_chat").fingerprints
    assert one == three == build("b").fingerprints[0] != two
