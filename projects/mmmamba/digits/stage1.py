"""Stage 1: align new mixers with the digits teacher's attention.

$ bash tools/dist.sh train projects/mmmamba/digits/stage1.py 1
"""

from mmengine.config import read_base
from mmengine.optim import CosineAnnealingLR, LinearLR, OptimWrapper
from torch.optim import AdamW

from xtuner_ext.convert.teacher import load_teacher
from xtuner_ext.distill import DistillModel
from xtuner_ext.distill.optim import TrainableParameters
from xtuner_ext.hooks import ResumableTrainLoop

with read_base():
    from .._base_.recipes import *
    from .._base_.runtime import *
    from ._base_ import *

#######################################################################
#                          PART 1  Settings                           #
#######################################################################
work_dir = "work_dirs/digits/stage1"
previous_stage = None

max_iters = 100  # iterations
warmup_iters = 10  # iterations
decay_begin = 35  # iteration at which the learning rate starts to fall
lr = 4e-3  # peak
weight_decay = 0.0
max_norm = 5.0  # gradient clipping

#######################################################################
#                           PART 2  Model                             #
#######################################################################
model = dict(
    type=DistillModel,
    llm=dict(type=load_teacher, pretrained_model_name_or_path=teacher, dtype="float32"),
    stage=1,
    trainable="new",
    mixer=improved_mixer,
    seeding=improved_seeding,
    alignment=improved_alignment,
    pretrained_pth=None,
    seed=0,
)

#######################################################################
#                            PART 3  Data                             #
#######################################################################
# From _base_.

#######################################################################
#                    PART 4  Scheduler & Optimizer                    #
#######################################################################
optim_wrapper = dict(
    type=OptimWrapper,
    constructor=TrainableParameters,
    optimizer=dict(type=AdamW, lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay),
    clip_grad=dict(max_norm=max_norm, error_if_nonfinite=True),
    accumulative_counts=1,
)
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-3, by_epoch=False, begin=0, end=warmup_iters),
    dict(type=CosineAnnealingLR, eta_min=0.0, by_epoch=False, begin=decay_begin, end=max_iters),
]
train_cfg = dict(type=ResumableTrainLoop, max_iters=max_iters)

#######################################################################
#                          PART 5  Runtime                            #
#######################################################################
# From _base_.
