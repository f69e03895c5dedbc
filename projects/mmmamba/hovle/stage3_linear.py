"""Stage 3 with the paper's numbers: match HoVLE's distributions with a linear student.

$ bash tools/dist.sh train projects/mmmamba/hovle/stage3_linear.py 8
"""

from mmengine.config import read_base
from mmengine.optim import AmpOptimWrapper, CosineAnnealingLR, LinearLR
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
work_dir = "work_dirs/hovle/stage3_linear"
previous_stage = "stage2"  # its last checkpoint lies beside work_dir
attention_layers = []  # layers that keep attention
accumulate = 8  # iterations per optimizer step; 1 sample x 8 processes x 8 = 64
max_iters = 20000 * accumulate  # iterations; the paper's 20,000 steps
warmup_iters = 2000 * accumulate  # iterations
decay_begin = 18000 * accumulate  # iteration at which the learning rate starts to fall
lr = 5e-5
weight_decay = 0.05
max_norm = 5.0  # gradient clipping

#######################################################################
#                           PART 2  Model                             #
#######################################################################
model = dict(
    type=DistillModel,
    llm=dict(type=load_teacher, pretrained_model_name_or_path=teacher, dtype="bfloat16"),
    stage=3,
    mixer=reference_mixer,
    seeding=reference_seeding,
    attention_layers=attention_layers,
    layer_types=None,  # one word per layer, instead of attention_layers
    trainable="mixers",
    divergence=reference_divergence,
    use_activation_checkpointing=True,  # recompute in the backward pass: one layer's are kept, for a third more time
    trainable_dtype="float32",
    pretrained_pth=None,
    teacher_cache=None,  # folder that `xtuner-ext cache-teacher` wrote: the teacher then does not run
    seed=0,
)

#######################################################################
#                            PART 3  Data                             #
#######################################################################
train_dataloader.update(batch_size=1)

#######################################################################
#                    PART 4  Scheduler & Optimizer                    #
#######################################################################
optim_wrapper = dict(
    type=AmpOptimWrapper,
    constructor=TrainableParameters,
    optimizer=dict(type=AdamW, lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay),
    clip_grad=dict(max_norm=max_norm, error_if_nonfinite=True),
    accumulative_counts=accumulate,
    dtype="bfloat16",
)
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-3, by_epoch=False, begin=0, end=warmup_iters),
    dict(type=CosineAnnealingLR, eta_min=0.0, by_epoch=False, begin=decay_begin, end=max_iters),
]
train_cfg = dict(type=ResumableTrainLoop, max_iters=max_iters)

#######################################################################
#                          PART 5  Runtime                            #
#######################################################################
default_hooks["checkpoint"].update(interval=500 * accumulate)
