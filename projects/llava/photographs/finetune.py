"""Trains language model and projector of a small LLaVA, after ``pretrain.py``; a CPU needs a minute.

$ xtuner train projects/llava/photographs/finetune.py
"""

from mmengine.config import read_base
from mmengine.optim import CosineAnnealingLR, LinearLR

with read_base():
    from .pretrain import *

work_dir = "work_dirs/llava_photographs/finetune"
previous_stage = "pretrain"
max_iters = 300  # iterations
lr = 2e-3  # weights that were random need more than published ones

model.update(freeze_llm=False)
optim_wrapper["optimizer"].update(lr=lr)
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-5, by_epoch=False, begin=0, end=10),
    dict(type=CosineAnnealingLR, eta_min=0.0, by_epoch=False, begin=10, end=max_iters),
]
train_cfg.update(max_iters=max_iters)
