"""The verb `cache-teacher` and training on what it wrote."""

import json
import shutil

import numpy as np
import pytest
import torch
from xtuner.registry import BUILDER

from xtuner_ext.cli.config_options import load_config
from xtuner_ext.cli.main import run
from xtuner_ext.data.collate import conversation_collate
from xtuner_ext.data.packing import PackedDataset
from xtuner_ext.distill.stages import read_checkpoint
from xtuner_ext.distill.teacher_cache import TeacherCache, TeacherCacheWriter
from xtuner_ext.errors import UserError
from xtuner_ext.modeling.mixers import Attention

EVERYTHING = 1_000_000
STAGE3 = """
previous_stage = None
custom_hooks = []
model.update(teacher_cache=None, divergence=dict(direction="forward", temperature=1.0, tokens="answer"))
train_dataloader["sampler"].update(shuffle=True)
"""


@pytest.fixture
def config(small_project):
    """Path of a stage 3 config that starts from seeding, shuffles, and measures nothing besides."""
    path = small_project / "stage3_linear.py"
    path.write_text(path.read_text() + STAGE3)
    return path


def write(config, out, *argv):
    return run(["cache-teacher", str(config), "--out", str(out), *map(str, argv)])


def train(config, work_dir, *options):
    extra = ["--cfg-options", *options] if options else []
    assert run(["train", str(config), "--work-dir", str(work_dir), *extra]) == 0
    return read_checkpoint(str(work_dir / "iter_5.pth"))[0]


def furthest(found, expected):
    assert found.keys() == expected.keys()
    return max(((found[key] - expected[key]).norm() / (expected[key].norm() + 1e-9)).item() for key in expected)


def build(config, *options):
    config = load_config(str(config), options)
    return BUILDER.build(config.model), BUILDER.build(config.train_dataloader.dataset)


@pytest.mark.parametrize("tokens", ["answer", "all"])
def test_with_every_token_a_cached_run_ends_where_one_with_the_teacher_does(config, tmp_path, tokens):
    option = f"model.divergence.tokens={tokens}"
    cache = tmp_path / "cache"
    assert write(config, cache, "--top-k", EVERYTHING, "--dtype", "float32", "--cfg-options", option) == 0
    online = train(config, tmp_path / "online", option)
    cached = train(config, tmp_path / "cached", option, f"model.teacher_cache={cache}")
    start = build(config)[0].state_dict()
    assert furthest(cached, online) < 1e-4 < 1e-2 < furthest(start, online)


def test_the_teacher_does_not_run(config, tmp_path, monkeypatch):
    assert write(config, tmp_path / "cache") == 0
    calls, forward = [], Attention.forward
    monkeypatch.setattr(Attention, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    train(config, tmp_path / "cached", f"model.teacher_cache={tmp_path / 'cache'}")
    # Once a layer, for the first token that sinks start from.
    assert len(calls) == 3
    train(config, tmp_path / "online")
    assert len(calls) == 3 + 3 + 5 * 3


@pytest.mark.parametrize("trainable", ["mixers", "projections", "all"])
def test_loss_and_gradients_by_key_whatever_the_order(config, tmp_path, trainable):
    """One cache serves samples in any order, as a batch and as packed rows."""
    cache = tmp_path / "cache"
    sizes = ["--batch-size", 3, "--shard-samples", 7]
    assert write(config, cache, "--top-k", EVERYTHING, "--dtype", "float32", *sizes) == 0
    options = ["model.trainable=" + trainable, "model.attention_layers=[1]"]
    model, dataset = build(config, *options)
    dataset.index = dataset.index[[17, 3, 3, 29, 8, 0]]
    packed = PackedDataset(dataset, 200, seed=1)
    batches = [conversation_collate([dataset[i] for i in range(6)])]
    batches.append(conversation_collate([packed[row] for row in range(len(packed))]))
    assert len(packed) > 1
    for batch in batches:
        found = []
        for folder in (None, str(cache)):
            model.teacher_cache = folder
            if folder is not None:
                model.teacher_digest = TeacherCache(folder).manifest["teacher"]
            model.zero_grad()
            losses = model(**batch)
            losses["loss"].backward()
            found.append((losses, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        (online, gradients), (cached, ours) = found
        for key in online:
            torch.testing.assert_close(cached[key], online[key], rtol=1e-5, atol=1e-6, msg=key)
        assert len(ours) == len(gradients)
        for one, other in zip(ours, gradients):
            assert (one - other).norm() <= 1e-4 * other.norm() + 1e-7


def test_workers_and_an_interruption_change_nothing(config, tmp_path):
    assert write(config, tmp_path / "cache", "--top-k", 4, "--shard-samples", 16) == 0
    options = [f"model.teacher_cache={tmp_path / 'cache'}", "train_dataloader.num_workers=2"]
    whole = train(config, tmp_path / "whole", *options)
    train(config, tmp_path / "cut", *options)
    (tmp_path / "cut" / "iter_5.pth").unlink()
    assert furthest(train(config, tmp_path / "cut", *options), whole) == 0


def test_what_is_written(config, tmp_path, capsys):
    cache = tmp_path / "cache"
    assert write(config, cache, "--top-k", 4, "--shard-samples", 16, "--json") == 0
    manifest = json.loads(capsys.readouterr().out)
    assert json.loads((cache / "teacher_cache.json").read_text()) == manifest
    _, dataset = build(config)
    rows = [int((dataset[i]["labels"][1:] != -100).sum()) for i in range(60)]
    assert (manifest["samples"], manifest["rows"], manifest["shards"]) == (60, sum(rows), 4)
    names = sorted(path.name for path in cache.iterdir())
    assert names == [*(f"shard_{n:05d}.safetensors" for n in range(4)), "teacher_cache.json"]
    size = sum((cache / name).stat().st_size for name in names[:-1])
    # Two bytes a value, two an id, four for the rest; and for every sample three numbers.
    assert 0 <= size - sum(rows) * (4 * 4 + 4) - 60 * 24 < 4 * 600
    values, ids, rest = TeacherCache(cache).targets([(dataset.fingerprints[0], 7)], "cpu")
    assert values.shape == ids.shape == (rows[7], 4) and rest.shape == (rows[7],)
    torch.testing.assert_close(values.exp().sum(-1) + rest.exp(), torch.ones(rows[7]), rtol=0, atol=2e-3)


def test_an_interrupted_cache_is_gone_on_with_and_a_finished_one_left_alone(config, tmp_path, monkeypatch):
    cache, written, write_shard = tmp_path / "cache", [], TeacherCacheWriter.write_shard

    def fail_at_two(self, number, samples):
        if number == 2:
            raise KeyboardInterrupt
        written.append(number)
        write_shard(self, number, samples)

    monkeypatch.setattr(TeacherCacheWriter, "write_shard", fail_at_two)
    assert write(config, cache, "--shard-samples", 16) == 130
    assert not cache.exists()
    with pytest.raises(UserError, match="cache is not there: unfinished"):
        TeacherCache(cache)
    monkeypatch.setattr(TeacherCacheWriter, "write_shard", lambda *args: written.append(args[1]) or write_shard(*args))
    assert write(config, cache, "--shard-samples", 16) == 0
    assert written == [0, 1, 2, 3] and not cache.with_name("cache.partial").exists()
    assert write(config, cache, "--shard-samples", 16) == 0
    assert written == [0, 1, 2, 3]
    whole = tmp_path / "whole"
    assert write(config, whole, "--shard-samples", 16) == 0
    for path in whole.iterdir():
        assert path.read_bytes() == (cache / path.name).read_bytes()


def test_repeated_lines_are_kept_once(config, tmp_path, digits):
    meta = json.loads((digits / "train.json").read_text())
    (name, entry), *_ = meta.items()
    entry = {**entry, "root": str(digits), "annotation": str(digits / entry["annotation"]), "repeat_time": 1.5}
    (tmp_path / "twice.json").write_text(json.dumps({name: entry, "again": {**entry, "repeat_time": 2}}))
    option = f"train_dataloader.dataset.meta={tmp_path / 'twice.json'}"
    assert write(config, tmp_path / "cache", "--cfg-options", option) == 0
    assert TeacherCache(tmp_path / "cache").manifest["samples"] == 60
    train(config, tmp_path / "run", option, f"model.teacher_cache={tmp_path / 'cache'}")


REFUSED = {
    "temperature": ("model.divergence.temperature=2.0", "made with temperature 1.0, this run has temperature 2.0"),
    "tokens": ("model.divergence.tokens=all", 'made with tokens "answer", this run has tokens "all"'),
    "template": ("train_dataloader.dataset.template=internvl2_5", "train.jsonl with template.default_system"),
    "data": ("train_dataloader.dataset.meta={data}/test.json", "test.jsonl with annotations"),
}


@pytest.mark.parametrize("option, message", REFUSED.values(), ids=REFUSED)
def test_a_cache_of_other_targets_is_refused(config, tmp_path, digits, capsys, option, message):
    assert write(config, tmp_path / "cache") == 0
    argv = ["train", str(config), "--work-dir", str(tmp_path / "run"), "--cfg-options", option.format(data=digits)]
    assert run([*argv, f"model.teacher_cache={tmp_path / 'cache'}"]) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*.pth"))


def test_a_cache_of_another_teacher_is_refused(config, tmp_path, tiny_teacher, capsys):
    """One whose head is the same and whose last layer is not."""
    from safetensors.torch import load_file, save_file

    assert write(config, tmp_path / "cache") == 0
    other = tmp_path / "other"
    shutil.copytree(tiny_teacher, other)
    (path,) = other.glob("*.safetensors")
    weights = load_file(path)
    name = [name for name in weights if name.endswith("w2.weight")][-1]
    save_file({**weights, name: weights[name] + 1}, path, metadata={"format": "pt"})
    argv = ["train", str(config), "--work-dir", str(tmp_path / "run"), "--cfg-options"]
    options = [f"model.llm.pretrained_model_name_or_path={other}", f"model.teacher_cache={tmp_path / 'cache'}"]
    assert run([*argv, *options]) == 2
    assert "was made with teacher" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--top-k", "0"], "--top-k is 0, expected at least 1"),
        (["--cfg-options", "model.stage=2"], "has model.stage 2, expected 3"),
    ],
)
def test_what_cannot_be_cached_is_named(config, tmp_path, capsys, argv, message):
    assert write(config, tmp_path / "cache", *argv) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "cache.partial").exists()


def test_another_folder_or_a_cache_of_other_settings_is_not_overwritten(config, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    assert write(config, tmp_path / "mine") == 2
    assert "is no teacher cache" in capsys.readouterr().err
    assert write(config, tmp_path / "cache") == 0
    assert write(config, tmp_path / "cache", "--top-k", "3") == 2
    assert "was made with top_k 64, expected top_k 3" in capsys.readouterr().err


def test_other_stages_take_no_cache(config, tmp_path):
    with pytest.raises(UserError, match="only stage 3 compares next tokens"):
        build(config, "model.stage=2", "model.teacher_cache=somewhere")


def test_a_changed_image_count_does_not_go_unnoticed(config, tmp_path):
    """Images are known by their names; one that now makes other rows is found by their number."""
    cache = tmp_path / "cache"
    assert write(config, cache, "--cfg-options", "model.divergence.tokens=all") == 0
    model, dataset = build(config, "model.divergence.tokens=all", f"model.teacher_cache={cache}")
    batch = conversation_collate([dataset[0]])
    for key in ("input_ids", "labels", "attention_mask"):
        batch["data"][key] = batch["data"][key][:, :-1]
    with pytest.raises(UserError, match="rows for a batch of .*: its data have changed since"):
        model(**batch)


def test_samples_without_supervised_rows_may_end_a_shard(tmp_path):
    row = [np.zeros((1, 2)), np.zeros((1, 2), np.int64), np.zeros(1)]
    none = [column[:0] for column in row]
    settings = {"vocab_size": 9, "top_k": 2, "dtype": "float16", "sources": [{"fingerprint": "a", "annotation": "a"}]}
    writer = TeacherCacheWriter(tmp_path / "cache", settings)
    writer.write_shard(0, [(0, 0, *none), (0, 1, *row), (0, 2, *none)])
    writer.write_shard(1, [(0, 3, *none)])
    writer.finish(2)
    cache = TeacherCache(tmp_path / "cache")
    for lines, count in (([0, 1, 2], 1), ([2], 0), ([3, 1], 1), ([3], 0)):
        values, ids, rest = cache.targets([("a", line) for line in lines], "cpu")
        assert (values.shape, ids.shape, rest.shape) == ((count, 2), (count, 2), (count,))
        assert (values.dtype, ids.dtype, rest.dtype) == (torch.float32, torch.int64, torch.float32)


def test_samples_that_were_too_long_for_the_cache_are_found_before_training(config, tmp_path, capsys):
    _, dataset = build(config)
    longest = sorted(dataset.count_tokens(*dataset.index[i]) for i in range(60))[30]
    shorter = f"train_dataloader.dataset.max_length={longest}"
    assert write(config, tmp_path / "cache", "--cfg-options", shorter) == 0
    option = f"model.teacher_cache={tmp_path / 'cache'}"
    model, dataset = build(config, option, shorter)
    model.check_data(dataset)
    argv = ["train", str(config), "--work-dir", str(tmp_path / "run"), "--cfg-options", option]
    assert run(argv) == 2
    assert f"it was made with max_length {longest} and 60 lines" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*.pth"))


def test_bad_samples_that_may_be_left_out_are_in_no_cache(config, tmp_path, digits):
    lines = (digits / "train.jsonl").read_text().splitlines()
    (tmp_path / "torn.png").write_bytes(next((digits / "images").iterdir()).read_bytes()[:60])
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]
    lines[4] = json.dumps({"image": str(tmp_path / "torn.png"), "conversations": turns})
    lines[9] = "{"
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    (tmp_path / "bad.json").write_text(json.dumps({"d": {"annotation": "bad.jsonl", "root": str(digits)}}))
    options = [f"train_dataloader.dataset.meta={tmp_path / 'bad.json'}"]
    config.write_text(config.read_text() + 'train_dataloader["dataset"]["max_bad_fraction"] = 0.1\n')
    assert write(config, tmp_path / "cache", "--cfg-options", *options) == 0
    assert json.loads((tmp_path / "cache" / "teacher_cache.json").read_text())["samples"] == 58
    train(config, tmp_path / "run", *options, f"model.teacher_cache={tmp_path / 'cache'}")
