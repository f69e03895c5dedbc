"""Handing checkpoints on, and refusing the wrong ones."""

import pytest
import torch

from tests.reference.hovle import hovle_config, random_hovle_checkpoint
from xtuner_ext.convert import load_teacher
from xtuner_ext.distill import DistillModel
from xtuner_ext.distill.stages import find_previous_checkpoint, load_previous_stage
from xtuner_ext.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hovle")
    random_hovle_checkpoint(folder, hovle_config(), seed=3)
    return folder


def build(folder, stage, **options):
    return DistillModel(llm=dict(type=load_teacher, pretrained_model_name_or_path=str(folder)), stage=stage, **options)


def save(model, path):
    torch.save({"state_dict": model.state_dict(), "meta": {"distill": model.describe()}}, path)
    return str(path)


def test_each_stage_takes_what_the_one_before_trained(folder, tmp_path):
    one = build(folder, 1)
    with torch.no_grad():
        one.llm.model.layers[2].mixer.mamba.A_log.fill_(0.25)
    two = build(folder, 2, pretrained_pth=save(one, tmp_path / "one.pth"))
    three = build(folder, 3, attention_layers=[0], pretrained_pth=save(two, tmp_path / "two.pth"))
    assert (three.llm.model.layers[2].mixer.mamba.A_log == 0.25).all()


def test_a_later_stage_is_refused(folder, tmp_path):
    path = save(build(folder, 3), tmp_path / "three.pth")
    with pytest.raises(UserError, match="comes from stage 3, stage 2 starts from one of stage 1"):
        build(folder, 2, pretrained_pth=path)


def test_another_mixer_is_refused(folder, tmp_path):
    path = save(build(folder, 1, mixer=dict(conv_kernel=4)), tmp_path / "one.pth")
    with pytest.raises(UserError, match="another mixer.*conv_kernel"):
        build(folder, 2, pretrained_pth=path)


def test_another_teacher_is_refused(folder, tmp_path):
    other = tmp_path / "other"
    random_hovle_checkpoint(other, hovle_config(num_llm_layers=3), seed=0)
    path = save(build(other, 1), tmp_path / "one.pth")
    with pytest.raises(UserError, match="another teacher.*num_hidden_layers"):
        build(folder, 2, pretrained_pth=path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None], ids=["empty", "text", "missing"])
def test_unreadable_checkpoints_are_named(folder, tmp_path, content):
    path = tmp_path / "broken.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="broken.pth"):
        build(folder, 2, pretrained_pth=str(path))


def test_a_file_of_something_else_is_named(folder, tmp_path):
    torch.save({"weights": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="holds no 'state_dict'"):
        build(folder, 2, pretrained_pth=str(tmp_path / "other.pth"))
    torch.save({"state_dict": {"llm.lm_head.weight": torch.ones(1)}}, tmp_path / "plain.pth")
    with pytest.raises(UserError, match="no distilled mixer"):
        build(folder, 2, pretrained_pth=str(tmp_path / "plain.pth"))


def test_a_checkpoint_that_runs_code_does_not_run_it(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(UserError, match="cannot be read"):
        load_previous_stage(build(folder, 2), str(tmp_path / "bomb.pth"))
    assert not (tmp_path / "ran").exists()


def test_the_previous_checkpoint_lies_beside_the_work_dir(tmp_path):
    stage = tmp_path / "stage1"
    stage.mkdir()
    (stage / "iter_9.pth").touch()
    (stage / "last_checkpoint").write_text("/moved/away/stage1/iter_9.pth")
    assert find_previous_checkpoint(tmp_path / "stage2", "stage1") == str(stage / "iter_9.pth")
    (stage / "iter_9.pth").unlink()
    with pytest.raises(UserError, match="which does not exist"):
        find_previous_checkpoint(tmp_path / "stage2", "stage1")
    with pytest.raises(UserError, match="train stage0 first"):
        find_previous_checkpoint(tmp_path / "stage2", "stage0")
