"""torchrun --nproc_per_node 2 tests/distill/steps.py KIND STAGE FOLDER: train with and without local backward.

KIND is ``ddp``, ``zero1`` or ``zero2``. Prints, as JSON, how many weights trained and the largest difference
between the two runs' weights, over all processes.
"""

import json
import sys

import torch
from mmengine.dist import init_dist
from mmengine.registry import MODEL_WRAPPERS
from torch import distributed

from xtuner_ext import autoload
from xtuner_ext.convert import load_teacher
from xtuner_ext.distill import DistillModel, model
from xtuner_ext.distill.autocast import Bfloat16OptimWrapper

LOCAL = model.local_backward
STEPS = 3


def keep_graphs(compute, parameters):
    """What ``local_backward`` replaces."""
    return compute()


def train(kind, stage, folder, backward):
    """dict[str, Tensor]: Trained weights after a few steps."""
    model.local_backward = backward
    # DeepSpeed casts the model to one dtype.
    dtype = "bfloat16" if kind == "ddp" else "float32"
    distiller = DistillModel(
        llm=dict(type=load_teacher, pretrained_model_name_or_path=folder, dtype=dtype),
        stage=stage,
        mixer=dict(qk_norm="l2", use_rope=True, window=4, sink=True),
        alignment=dict(scale=1.0, normalise=True),
        trainable_dtype="float32",
    ).train()
    trained = {name: p for name, p in distiller.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    generator = torch.Generator().manual_seed(distributed.get_rank())
    vocabulary = distiller.student_config.image_token_id
    batches = [torch.randint(3, vocabulary, (2, 12), generator=generator) for _ in range(STEPS)]
    if kind == "ddp":
        wrapper = Bfloat16OptimWrapper(optimizer)
        wrapped = MODEL_WRAPPERS.build(
            dict(type="MMDistributedDataParallel", module=distiller, device_ids=[0], broadcast_buffers=False)
        )
        for ids in batches:
            wrapped.train_step({"data": dict(input_ids=ids, labels=ids), "data_samples": None}, wrapper)
    else:
        import deepspeed

        config = dict(train_micro_batch_size_per_gpu=2, gradient_clipping=5.0, zero_allow_untested_optimizer=True)
        config["zero_optimization"] = dict(stage=int(kind.removeprefix("zero")))
        engine, *_ = deepspeed.initialize(model=distiller, optimizer=optimizer, config=config)
        for ids in batches:
            engine.backward(engine(dict(input_ids=ids, labels=ids))["loss"])
            engine.step()
    assert not any(torch.equal(parameter, before[name]) for name, parameter in trained.items())
    return {name: parameter.detach().clone() for name, parameter in trained.items()}


def main():
    """Run both and compare."""
    autoload.install()
    torch.set_num_threads(1)
    kind, stage, folder = sys.argv[1:]
    init_dist("pytorch", "gloo", init_backend="torch" if kind == "ddp" else "deepspeed")
    ours, theirs = (train(kind, int(stage), folder, backward) for backward in (LOCAL, keep_graphs))
    difference = torch.stack([(ours[name] - theirs[name]).abs().max() for name in ours]).max()
    distributed.all_reduce(difference, op=distributed.ReduceOp.MAX)
    if distributed.get_rank() == 0:
        print(json.dumps({"weights": len(ours), "difference": difference.item()}))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
