"""Tune the digits teacher by LoRA on text, pictures and video in one file.

$ bash tools/dist.sh train projects/internvl/digits_lora.py 1
$ xtuner-ext merge work_dirs/internvl/digits_lora work_dirs/internvl/digits_merged

The data asks what the teacher was never asked; see xtuner_ext/data/sources/kinds.py, and README.md for the scores.
"""

from mmengine.config import read_base
from mmengine.optim import CosineAnnealingLR, LinearLR, OptimWrapper
from torch.optim import AdamW

from xtuner_ext.convert.teacher import load_processor, load_teacher
from xtuner_ext.data.collate import conversation_collate
from xtuner_ext.data.dataset import ConversationDataset
from xtuner_ext.data.samplers import ResumableInfiniteSampler
from xtuner_ext.data.sources.kinds import make_kinds
from xtuner_ext.distill.optim import TrainableParameters
from xtuner_ext.finetune import SupervisedModel
from xtuner_ext.hooks import BadSampleHook, ResumableTrainLoop

with read_base():
    from ._base_.runtime import *

#######################################################################
#                          PART 1  Settings                           #
#######################################################################
work_dir = "work_dirs/internvl/digits_lora"
base = "digits-teacher"  # the model that the package ships, or a folder
data_dir = "work_dirs/internvl/digits_data"
template = "internlm2_chat"
max_length = 512  # tokens
frames = 4  # of a video, which is all that the data's videos have
max_bad_fraction = 0.01  # share of unusable samples at which the run stops

rank = 16  # r; alpha is twice that
dropout = 0.0
total_batch_size = 32  # samples an optimizer step
batch_size = 32  # samples a process and iteration
max_iters = 300  # iterations
warmup_iters = 15  # iterations
lr = 4e-3  # peak
weight_decay = 0.0
max_norm = 1.0  # gradient clipping

prepare_data = dict(type=make_kinds, out=data_dir, seed=0, train=6000, test=600)

#######################################################################
#                           PART 2  Model                             #
#######################################################################
model = dict(
    type=SupervisedModel,
    llm=dict(type=load_teacher, pretrained_model_name_or_path=base, dtype="float32"),
    lora=dict(language=dict(r=rank), dropout=dropout),
)

#######################################################################
#                            PART 3  Data                             #
#######################################################################
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=0,
    dataset=dict(
        type=ConversationDataset,
        meta=data_dir + "/train.json",
        processor=dict(type=load_processor, pretrained_model_name_or_path=base),
        template=template,
        max_length=max_length,
        frames=dict(min_frames=frames, max_frames=frames, sampling="middle"),
        max_bad_fraction=max_bad_fraction,
    ),
    sampler=dict(type=ResumableInfiniteSampler, shuffle=True),
    collate_fn=dict(type=conversation_collate),
)

#######################################################################
#                    PART 4  Scheduler & Optimizer                    #
#######################################################################
optim_wrapper = dict(
    type=OptimWrapper,
    constructor=TrainableParameters,
    optimizer=dict(type=AdamW, lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay),
    clip_grad=dict(max_norm=max_norm, error_if_nonfinite=True),
    accumulative_counts=None,  # follows from total_batch_size
)
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-3, by_epoch=False, begin=0, end=warmup_iters),
    dict(type=CosineAnnealingLR, eta_min=0.0, by_epoch=False, begin=warmup_iters, end=max_iters),
]
train_cfg = dict(type=ResumableTrainLoop, max_iters=max_iters)

#######################################################################
#                          PART 5  Runtime                            #
#######################################################################
custom_hooks = [dict(type=BadSampleHook)]
randomness = dict(seed=0, deterministic=False)
