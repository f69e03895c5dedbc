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


class TestImagesOutOfReach:
    """XTuner's hook, with a picture that is there and one that is not."""

    def hook(self, tmp_path, images, inputs):
        from PIL import Image
        from xtuner.engine.hooks import EvaluateChatHook

        Image.new("RGB", (4, 4)).save(tmp_path / "there.png")
        tokenizer = dict(type=lambda: SimpleNamespace(eos_token_id=2, pad_token_id=0))
        return EvaluateChatHook(tokenizer, evaluation_inputs=inputs, evaluation_images=images)

    def test_their_questions_are_left_out(self, tmp_path, monkeypatch):
        import requests

        def refuse(*args, **kwargs):
            raise requests.ConnectionError("no network")

        monkeypatch.setattr(requests, "get", refuse)
        images = [str(tmp_path / "there.png"), "https://example.org/view.jpg"]
        hook = self.hook(tmp_path, images, ["one?", "two?"])
        assert hook.evaluation_inputs == ["one?"] and len(hook.evaluation_images) == 1

    def test_one_picture_goes_with_every_question(self, tmp_path):
        hook = self.hook(tmp_path, str(tmp_path / "there.png"), ["one?", "two?"])
        assert hook.evaluation_inputs == ["one?", "two?"] and len(hook.evaluation_images) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_precision_trains_on_a_cpu(dtype):
    from mmengine.optim import AmpOptimWrapper

    model = torch.nn.Linear(8, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapper = AmpOptimWrapper(loss_scale=dict(init_scale=1024.0), dtype=dtype, optimizer=optimizer)
    with wrapper.optim_context(model):
        output = model(torch.ones(4, 8))
        assert output.dtype == getattr(torch, dtype)
        loss = output.float().mean()
    wrapper.update_params(loss)
    torch.testing.assert_close(model.weight, before - 0.1, rtol=1e-2, atol=1e-2)


class TestWarmup:
    def rates(self, iterations, epoch_length, end=0.03):
        from mmengine.optim import CosineAnnealingLR, LinearLR

        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        common = dict(by_epoch=True, epoch_length=epoch_length)
        schedulers = [
            LinearLR.build_iter_from_epoch(optimizer, start_factor=1e-5, begin=0, end=end, **common),
            CosineAnnealingLR.build_iter_from_epoch(optimizer, eta_min=0.0, begin=end, end=1, **common),
        ]
        rates = []
        for _ in range(iterations):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step()
        return rates

    @pytest.mark.parametrize("length", [3, 33, 34, 66])
    def test_one_of_less_than_two_iterations_is_left_out(self, length):
        rates = self.rates(length, length)
        assert rates[0] == pytest.approx(1.0) and rates[-1] < 0.9

    def test_a_longer_one_stays(self):
        rates = self.rates(100, 100)
        assert rates[0] == pytest.approx(1e-5) and rates[2] == pytest.approx(1.0) and rates[-1] < 0.01


@pytest.mark.parametrize("trains, asked", [(True, False), (False, True), (False, False)])
def test_unused_layers_are_looked_for_where_a_tower_trains_or_it_is_asked(trains, asked):
    from xtuner.model import LLaVAModel

    class Wrapper:
        def __init__(self, module, **kwargs):
            self.kwargs = kwargs

    compat.look_for_unused_llava_layers(SimpleNamespace(MMDistributedDataParallel=Wrapper))
    model = LLaVAModel.__new__(LLaVAModel)
    torch.nn.Module.__init__(model)
    model.visual_encoder = torch.nn.Linear(2, 2).requires_grad_(trains)
    assert Wrapper(model, find_unused_parameters=asked).kwargs["find_unused_parameters"] is (trains or asked)


def test_small_data_sets_are_tokenised_without_forks():
    calls = []
    module = SimpleNamespace(process_hf_dataset=lambda dataset, **kwargs: calls.append(kwargs["map_num_proc"]))
    compat.map_with_as_many_processes_as_help(module)
    module.process_hf_dataset({"train": range(10)})
    module.process_hf_dataset({"train": range(100_000)})
    assert calls[0] is None and calls[1] in (None, *range(2, 33))


def test_the_projector_recomputes_and_has_gradients():
    import warnings

    from xtuner.model.modules import ProjectorConfig, ProjectorModel

    projector = ProjectorModel(ProjectorConfig(visual_hidden_size=4, llm_hidden_size=6))
    plain = projector(torch.ones(2, 4)).sum()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*old version of the checkpointing.*|.*use_reentrant.*")
        projector.gradient_checkpointing_enable()
        projector.train()
        # Nothing in front of it trains, and yet it must.
        loss = projector(torch.ones(2, 4)).sum()
        loss.backward()
    assert loss.item() == pytest.approx(plain.item())
    assert all(parameter.grad is not None for parameter in projector.parameters())


def test_gradients_pass_four_bit_layers_after_an_evaluation():
    bitsandbytes = pytest.importorskip("bitsandbytes")

    layer = bitsandbytes.nn.Linear4bit(64, 48, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    x = torch.randn(3, 64, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    layer.eval()
    with torch.no_grad():
        layer(x)
    layer.train()
    (found,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(found, expected)


class TestOneDtypeUnderZero3:
    def wrap(self, stage, **precision):
        model = torch.nn.ModuleDict({"adapter": torch.nn.Linear(2, 2), "frozen": torch.nn.Linear(2, 2)})
        model["frozen"].requires_grad_(False)
        strategy = type("DeepSpeedStrategy", (), {"_wrap_model": lambda self, model: model})
        module = SimpleNamespace(DeepSpeedStrategy=strategy)
        compat.train_one_dtype_under_zero3(module)
        strategy = module.DeepSpeedStrategy()
        strategy.config = {"zero_optimization": {"stage": stage}, **precision}
        return strategy._wrap_model(model)

    def test_what_trains_takes_the_runs(self):
        model = self.wrap(3, bf16={"enabled": True}, fp16={"enabled": False})
        assert model["adapter"].weight.dtype == torch.bfloat16 and model["frozen"].weight.dtype == torch.float32

    @pytest.mark.parametrize("stage, enabled", [(2, True), (3, False)])
    def test_else_nothing_changes(self, stage, enabled):
        assert self.wrap(stage, bf16={"enabled": enabled})["adapter"].weight.dtype == torch.float32


def test_the_select_layer_is_a_number():
    import argparse

    module = SimpleNamespace(ArgumentParser=type("ArgumentParser", (argparse.ArgumentParser,), {}))
    compat.read_select_layer_as_number(module)
    parser = module.ArgumentParser()
    parser.add_argument("--visual-select-layer", default=-2)
    parser.add_argument("--visual-encoder")
    args = parser.parse_args(["--visual-select-layer", "-3", "--visual-encoder", "7"])
    assert args.visual_select_layer == -3 and args.visual_encoder == "7"


def test_attention_stays_transformers_own(monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM
    from xtuner.model.modules import dispatch

    # As where flash-attn is installed.
    monkeypatch.setattr(dispatch, "SUPPORT_FLASH2", True)
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=16)
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    dispatch.dispatch_modules(model)
    assert "forward" not in vars(model.model.layers[0].self_attn)


def test_ours_is_registered_where_a_model_is_imported_first(tmp_path):
    import subprocess
    import sys

    (tmp_path / "config.json").write_text('{"model_type": "hybrid_vl"}')
    code = (
        "from xtuner_ext import autoload; autoload.install(); from transformers import LlamaForCausalLM, AutoConfig; "
        f"print(type(AutoConfig.from_pretrained({str(tmp_path)!r})).__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "HybridVLConfig", result.stderr[-1000:]
