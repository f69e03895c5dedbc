"""One test per repair, of what it is for."""

import io
import os
import pickle
from types import SimpleNamespace

import pytest
import torch

from xtuner_ext import compat


@pytest.fixture
def backend():
    from mmengine.fileio import LocalBackend

    return LocalBackend()


def test_put_writes_and_makes_folders(tmp_path, backend):
    backend.put(b"weights", tmp_path / "new" / "iter_1.pth")
    backend.put_text("né", tmp_path / "new" / "note.txt")
    assert (tmp_path / "new" / "iter_1.pth").read_bytes() == b"weights"
    assert (tmp_path / "new" / "note.txt").read_text(encoding="utf-8") == "né"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_interrupted_put_leaves_the_old_file(tmp_path, backend, monkeypatch, step):
    path = tmp_path / "iter_1.pth"
    backend.put(b"old", path)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        backend.put(b"new", path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["iter_1.pth"]


def test_latest_checkpoint_survives_a_kill_while_saving(tmp_path):
    from mmengine.runner.checkpoint import find_latest_checkpoint

    assert find_latest_checkpoint(str(tmp_path)) is None
    for name in ("iter_9.pth", "iter_10.pth", "iter_x.pth"):
        (tmp_path / name).touch()
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_9.pth"))
    assert find_latest_checkpoint(str(tmp_path)) == str(tmp_path / "iter_9.pth")
    for torn in ("", str(tmp_path / "iter_8.pth")):
        (tmp_path / "last_checkpoint").write_text(torn)
        assert find_latest_checkpoint(str(tmp_path)) == str(tmp_path / "iter_10.pth")


def _saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def test_message_hub_loads_with_weights_only():
    import mmengine.runner.checkpoint  # noqa: F401  (importing it is what allows the types)
    from mmengine.logging import HistoryBuffer

    history = HistoryBuffer([1.0, 3.0], [1, 1])
    loaded = torch.load(_saved({"message_hub": {"loss": history}}), weights_only=True)
    assert loaded["message_hub"]["loss"].mean() == 2.0


class _Hostile:
    def __reduce__(self):
        from mmengine.logging import HistoryBuffer

        return getattr, (HistoryBuffer, "__init__")


def test_weights_only_still_refuses_other_attributes():
    import mmengine.runner.checkpoint  # noqa: F401

    with pytest.raises((pickle.UnpicklingError, ValueError), match="statistic of HistoryBuffer"):
        torch.load(_saved(_Hostile()), weights_only=True)


def test_packages_are_found_without_pkg_resources():
    from mmengine.utils import get_installed_path, is_installed

    assert is_installed("mmengine") and not is_installed("no_such_package")
    assert get_installed_path("mmengine") == os.path.dirname(__import__("mmengine").__file__)
    assert get_installed_path("scikit-learn").endswith("sklearn")


def test_cpu_and_transformers_names_are_back():
    import transformers.modeling_utils
    import transformers.utils

    assert torch.cpu.is_bf16_supported()
    assert transformers.utils.is_safetensors_available()
    with transformers.modeling_utils.no_init_weights():
        pass


def test_torchvision_imports():
    import torchvision.ops  # noqa: F401


def test_load_in_8bit_false_is_accepted(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, load_in_8bit=False, quantization_config=None)
    assert model.config.vocab_size == 16


def test_load_in_8bit_true_becomes_a_quantization_config():
    class PreTrainedModel:
        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            return cls, kwargs

    class Model(PreTrainedModel):
        pass

    compat.accept_load_in_bits(SimpleNamespace(PreTrainedModel=PreTrainedModel))
    cls, kwargs = Model.from_pretrained("folder", load_in_8bit=True)
    assert cls is Model and kwargs["quantization_config"].load_in_8bit
    assert "load_in_8bit" not in kwargs


def test_missing_bos_encodes_to_nothing():
    module = SimpleNamespace(get_bos_eos_token_ids=lambda tokenizer: (None, [2]))
    compat.encode_without_bos(module)
    assert module.get_bos_eos_token_ids(None) == ([], [2])


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_process_group_and_ddp_work_without_cuda(monkeypatch, tmp_path):
    from mmengine.dist import init_dist
    from mmengine.model import MMDistributedDataParallel

    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    store = f"file://{tmp_path / 'store'}"
    init_dist("pytorch", backend="nccl", init_method=store, rank=0, world_size=1)
    try:
        assert torch.distributed.get_backend() == "gloo"
        MMDistributedDataParallel(torch.nn.Linear(2, 2), device_ids=[0])
    finally:
        torch.distributed.destroy_process_group()


class TestOptimizerUnderDeepSpeed:
    """The stock tool's part is played by a function that does to a config what it does."""

    def build(self, wrapper, model):
        from mmengine.config import Config

        built = []
        tool = SimpleNamespace(check_cfg=lambda cfg, args: None, RUNNERS=SimpleNamespace(build=built.append))
        compat.keep_optimizer_under_deepspeed(tool)
        cfg = Config(dict(model=model, optim_wrapper=wrapper))
        tool.check_cfg(cfg, None)
        if "optimizer" in wrapper:
            cfg.strategy = dict(config=dict(bf16=dict(enabled=True)))
            cfg.optim_wrapper = dict(type="DeepSpeedOptimWrapper", optimizer=cfg.optim_wrapper.optimizer)
        tool.RUNNERS.build(cfg)
        return built[0]

    def test_groups_and_precision_are_the_configs_own(self):
        from xtuner_ext.distill import DistillModel

        groups = dict(constructor="TrainableParameters", paramwise_cfg=dict(rest_lr_mult=0.1))
        wrapper = dict(**groups, optimizer=dict(type="AdamW"))
        cfg = self.build({"type": "AmpOptimWrapper", "dtype": "bfloat16", **wrapper}, dict(type=DistillModel))
        assert cfg.optim_wrapper.constructor == "TrainableParameters"
        assert cfg.optim_wrapper.paramwise_cfg == {"rest_lr_mult": 0.1} and "dtype" not in cfg.optim_wrapper
        settings = cfg.strategy.config
        assert not settings.bf16.enabled and settings.torch_autocast.dtype == "bfloat16"
        cfg = self.build({"type": "OptimWrapper", **wrapper}, dict(type=DistillModel))
        assert not cfg.strategy.config.bf16.enabled and "torch_autocast" not in cfg.strategy.config

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_other_models_and_half_precision_are_deepspeeds_matter(self, dtype):
        from xtuner_ext.distill import DistillModel

        model = dict(type=DistillModel if dtype == "float16" else "SupervisedFinetune")
        cfg = self.build(dict(type="AmpOptimWrapper", dtype=dtype, optimizer=dict(type="AdamW")), model)
        assert cfg.strategy.config == {"bf16": {"enabled": True}}
