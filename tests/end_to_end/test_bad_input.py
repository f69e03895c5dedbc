"""Every mistake ends in one sentence and status 2, before anything is trained."""

import json
import shutil

import pytest

from xtuner_ext.cli.main import run
from xtuner_ext.data.sources.digits import make_digits


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "data"
    make_digits(folder, train=8, test=2)
    return folder


@pytest.fixture
def train(good, tmp_path, monkeypatch, capsys):
    """Trains stage 1 or 3 on a copy of the data; returns status and the error line."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    shutil.copytree(good, data)

    def go(*options, config="mmmamba/digits/stage1"):
        always = [
            *("train_cfg.max_iters=1", "train_dataloader.batch_size=2", f"train_dataloader.dataset.meta={data}/train.json"),
            *(f"prepare_data.out={data}", "prepare_data.train=8", "prepare_data.test=2"),
        ]
        status = run(["train", config, "--work-dir", "out", "--cfg-options", *always, *options])
        return status, capsys.readouterr().err

    go.data = data
    return go


def edit(path, change):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.write_text("\n".join(json.dumps(line) if isinstance(line, dict) else line for line in lines) + "\n")


def with_image(lines):
    return next(number for number, line in enumerate(lines) if "image" in line)


def test_missing_image(train):
    number = []

    def change(lines):
        number.append(with_image(lines))
        lines[number[0]]["image"] = "images/nowhere.png"

    edit(train.data / "train.jsonl", change)
    status, message = train()
    assert status == 2 and f"train.jsonl:{number[0] + 1}: image" in message and "nowhere.png does not exist" in message


def test_image_count_other_than_placeholders(train):
    def change(lines):
        item = lines[with_image(lines)]
        item["image"] = [item["image"], item["image"]]

    edit(train.data / "train.jsonl", change)
    status, message = train()
    assert status == 2 and "2 images but 1 <image> placeholders" in message


def test_malformed_json_line(train):
    edit(train.data / "train.jsonl", lambda lines: lines.__setitem__(2, '{"id": 3, "conversations": ['))
    status, message = train()
    assert status == 2 and "train.jsonl:3: malformed JSON" in message


def test_empty_dataset(train):
    (train.data / "train.jsonl").write_text("")
    status, message = train()
    assert status == 2 and "train.jsonl is empty" in message


def test_teacher_folder_without_config(train, tmp_path):
    (tmp_path / "teacher").mkdir()
    status, message = train(f"model.llm.pretrained_model_name_or_path={tmp_path}/teacher")
    assert status == 2 and "teacher has no config.json" in message


STAGE_3 = dict(config="mmmamba/digits/stage3_linear")


def test_unknown_layer_type_word(train):
    words = ",".join(["linear_attention"] * 7 + ["mamba"])
    status, message = train("previous_stage=None", f"model.layer_types={words}", **STAGE_3)
    assert status == 2 and "layer_types[7] is 'mamba', expected full_attention or linear_attention" in message


def test_attention_layer_out_of_range(train):
    status, message = train("previous_stage=None", "model.attention_layers=0,8", **STAGE_3)
    assert status == 2 and "attention layer 8 is out of range, the model has layers 0 to 7" in message


def test_missing_checkpoint_of_the_stage_before(train):
    status, message = train(**STAGE_3)
    assert status == 2 and "train stage2 first" in message


def test_unknown_config_key(train):
    status, message = train("model.alignement.scale=2")
    assert status == 2 and "model.alignement" in message and "alignment" in message


def test_nothing_is_left_under_a_final_name(train, tmp_path):
    (train.data / "train.jsonl").write_text("")
    train()
    assert not list(tmp_path.glob("out/*.pth")) and not (tmp_path / "out" / "last_checkpoint").exists()
