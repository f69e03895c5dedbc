"""What all tests share."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from xtuner_ext import autoload  # noqa: E402

# Before any test imports torch or mmengine, also where the package is only on PYTHONPATH.
autoload.install()


@pytest.fixture(scope="session")
def repository():
    """Path of the checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def scripts():
    """Folder of the console scripts of the interpreter that runs the tests."""
    return Path(sys.executable).parent


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Folder of a few digits samples; its ``tokenizer`` was trained on them."""
    from xtuner_ext.data.sources.digits_teacher import prepare_teacher

    out = tmp_path_factory.mktemp("data") / "digits"
    prepare_teacher(out, train=60, test=12)
    return out


@pytest.fixture(scope="session")
def digits_processor(digits):
    """Processor of the digits' tokenizer: tiles of 32 pixels, 4 tokens each, one an image."""
    from xtuner_ext.convert.processor import digits_processor

    return digits_processor(str(digits / "tokenizer"))


@pytest.fixture(scope="session")
def tiny_model(digits):
    """Builds a random three-layer decoder in fp32; takes the word of ``layer_types`` per layer."""
    from xtuner_ext.convert.init import random_digits_teacher
    from xtuner_ext.modeling import HybridVLConfig, HybridVLForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=48, heads=4, kv_heads=2, embedding_layers=1, llm_layers=2)
    teacher = random_digits_teacher(str(digits / "tokenizer"), **sizes)

    def build(*layer_types):
        import torch

        layer_types = list(layer_types) or teacher.config.layer_types
        config = HybridVLConfig.from_dict({**teacher.config.to_dict(), "layer_types": layer_types})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return HybridVLForCausalLM(config).eval()

    return build


@pytest.fixture(scope="session")
def write_text_model():
    """Function that writes a small random Llama or Qwen2 and returns transformers' own model of it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    classes = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
    sizes = dict(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        # Large enough that a mistake anywhere shows.
        initializer_range=0.3,
    )

    def write(folder, family, **changes):
        config_class, model_class = classes[family]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = model_class(config_class(**{**sizes, **changes})).eval()
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "norm" in name:
                    parameter.data += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        return model

    return write


@pytest.fixture(scope="session")
def tiny_teacher(digits, tmp_path_factory):
    """Folder of a random three-layer digits teacher in HoVLE's layout, in fp32."""
    from xtuner_ext.convert.digits_teacher import write_digits_teacher
    from xtuner_ext.convert.init import random_digits_teacher

    sizes = dict(hidden_size=32, intermediate_size=48, heads=4, kv_heads=2, embedding_layers=1, llm_layers=2)
    tokenizer, out = str(digits / "tokenizer"), tmp_path_factory.mktemp("models") / "teacher"
    write_digits_teacher(random_digits_teacher(tokenizer, **sizes), tokenizer, out, dtype="float32")
    return out


STAGE1 = """
from mmengine.config import read_base
from mmengine.hooks import LoggerHook
from mmengine.optim import OptimWrapper
from torch.optim import AdamW
from xtuner_ext.convert.teacher import load_processor, load_teacher
from xtuner_ext.data.collate import conversation_collate
from xtuner_ext.data.dataset import ConversationDataset
from xtuner_ext.data.samplers import ResumableInfiniteSampler
from xtuner_ext.distill import DistillModel
from xtuner_ext.distill.optim import TrainableParameters
from xtuner_ext.hooks import HeldOutHook, ResumableTrainLoop, SafeCheckpointHook

with read_base():
    from ._paths import *

previous_stage = None
template = "internlm2_chat"
model = dict(
    type=DistillModel,
    llm=dict(type=load_teacher, pretrained_model_name_or_path=teacher, dtype="float32"),
    stage=1,
    mixer=dict(qk_norm="l2", use_rope=True, window=4, sink=True),
    alignment=dict(scale=1.0, normalise=True),
    pretrained_pth=None,
)
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    dataset=dict(
        type=ConversationDataset,
        meta=data + "/train.json",
        processor=dict(type=load_processor, pretrained_model_name_or_path=teacher),
        template=template,
        max_length=512,
    ),
    sampler=dict(type=ResumableInfiniteSampler, shuffle=False),
    collate_fn=dict(type=conversation_collate),
)
eval_data = data + "/test.json"
optim_wrapper = dict(
    type=OptimWrapper, constructor=TrainableParameters, optimizer=dict(type=AdamW, lr=1e-2, weight_decay=0.0)
)
param_scheduler = []
train_cfg = dict(type=ResumableTrainLoop, max_iters=5)
default_hooks = dict(
    logger=dict(type=LoggerHook, log_metric_by_epoch=False, interval=1),
    checkpoint=dict(type=SafeCheckpointHook, by_epoch=False, interval=2),
)
custom_hooks = [dict(type=HeldOutHook, meta=eval_data, interval=2, limit=5, batch_size=3)]
env_cfg = dict(dist_cfg=dict(backend="nccl"))
visualizer = None
log_processor = dict(by_epoch=False)
load_from = None
resume = True
randomness = dict(seed=0)
"""
STAGE2 = """
from mmengine.config import read_base

with read_base():
    from .stage1 import *

work_dir = base + "/stage2"
previous_stage = "stage1"
model.update(stage=2)
"""
STAGE3 = """
from mmengine.config import read_base

with read_base():
    from .stage2 import *

work_dir = base + "/stage3_linear"
previous_stage = "stage2"
attention_layers = []
model.update(stage=3, attention_layers=attention_layers, trainable="mixers")
"""


@pytest.fixture
def small_project(tmp_path, monkeypatch, digits, tiny_teacher):
    """Folder of a project that distils the tiny teacher in five iterations a stage.

    It is the current directory; stage 3 is there as ``stage3_linear.py``. The mixers have a window and a sink.
    """
    folder = tmp_path / "project"
    folder.mkdir()
    work_dir = tmp_path / "work"
    paths = {"teacher": str(tiny_teacher), "data": str(digits), "base": str(work_dir)}
    (folder / "_paths.py").write_text("".join(f"{name} = {value!r}\n" for name, value in paths.items()))
    (folder / "stage1.py").write_text(STAGE1 + 'work_dir = base + "/stage1"\n')
    for name, text in (("stage2", STAGE2), ("stage3_linear", STAGE3)):
        (folder / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    # The stock tool sets LOCAL_RANK for good; set here first, it is taken back after the test.
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("LOCAL_RANK")
    return folder
