"""Trains the projector of a small LLaVA; a CPU needs half a minute.

$ xtuner train projects/llava/photographs/pretrain.py
"""

from mmengine.config import read_base
from mmengine.optim import CosineAnnealingLR, LinearLR, OptimWrapper
from torch.optim import AdamW
from xtuner.engine.runner import TrainLoop

with read_base():
    from ._base_ import *

#######################################################################
#                    PART 4  Scheduler & Optimizer                    #
#######################################################################
work_dir = "work_dirs/llava_photographs/pretrain"
max_iters = 100  # iterations
lr = 1e-3  # XTuner's for projectors
warmup = 5  # iterations
max_norm = 1.0  # of the gradients

optim_wrapper = dict(
    type=OptimWrapper,
    optimizer=dict(type=AdamW, lr=lr, betas=(0.9, 0.999), weight_decay=0.0),
    clip_grad=dict(max_norm=max_norm, error_if_nonfinite=False),
    accumulative_counts=1,
)
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-5, by_epoch=False, begin=0, end=warmup),
    dict(type=CosineAnnealingLR, eta_min=0.0, by_epoch=False, begin=warmup, end=max_iters),
]
train_cfg = dict(type=TrainLoop, max_iters=max_iters)
