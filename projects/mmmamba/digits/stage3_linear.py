"""Stage 3: match the teacher's answers with a linear student.

$ bash tools/dist.sh train projects/mmmamba/digits/stage3_linear.py 1
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
work_dir = "work_dirs/digits/stage3_linear"
previous_stage = "stage2"  # its last checkpoint lies beside work_dir
attention_layers = []  # layers that keep attention

max_iters = 300  # iterations
warmup_iters = 15  # iterations
decay_begin = 100  # iteration at which the learning rate starts to fall
lr = 1.5e-3  # peak
weight_decay = 0.0
max_norm = 1.0  # gradient clipping

#######################################################################
#                           PART 2  Model                             #
#######################################################################
model = dict(
    type=DistillModel,
    llm=dict(type=load_teacher, pretrained_model_name_or_path=teacher, dtype="float32"),
    stage=3,
    mixer=improved_mixer,
    seeding=improved_seeding,
    attention_layers=attention_layers,
    layer_types=None,  # one word per layer, instead of attention_layers
    trainable="projections",
    divergence=improved_divergence,
    use_activation_checkpointing=False,  # recompute activations in the backward pass; this student fits without
    pretrained_pth=None,
    teacher_cache=None,  # folder that `xtuner-ext cache-teacher` wrote: the teacher then does not run
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
    paramwise_cfg=dict(rest_lr_mult=1.0),  # learning rate outside the mixers, as a share of theirs; with trainable="all"
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
