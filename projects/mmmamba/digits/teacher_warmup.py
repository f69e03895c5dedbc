"""First part of the digits teacher's training, a quarter of an hour on two cores.

$ bash tools/dist.sh train projects/mmmamba/digits/teacher_warmup.py 2

One kind of question still names a digit ("Is there a 7 in the top row?"), which models of this size do not
learn in that time; teacher.py goes on from here with the questions that students are scored on.
"""

from mmengine.config import read_base
from mmengine.optim import CosineAnnealingLR, LinearLR, OptimWrapper
from torch.optim import AdamW

from xtuner_ext.convert.init import random_digits_teacher
from xtuner_ext.convert.processor import digits_processor
from xtuner_ext.data.collate import conversation_collate
from xtuner_ext.data.dataset import ConversationDataset
from xtuner_ext.data.samplers import ResumableInfiniteSampler
from xtuner_ext.data.sources.digits_teacher import prepare_teacher
from xtuner_ext.finetune import SupervisedModel
from xtuner_ext.hooks import ResumableTrainLoop

with read_base():
    from .._base_.runtime import *

#######################################################################
#                          PART 1  Settings                           #
#######################################################################
work_dir = "work_dirs/digits/teacher_warmup"
data_dir = "work_dirs/digits/teacher_warmup_data"
tokenizer_dir = data_dir + "/tokenizer"
template = "internlm2_chat"

sizes = dict(
    hidden_size=96,  # D
    intermediate_size=256,
    heads=4,  # H, of 24 channels
    kv_heads=2,  # G
    embedding_layers=2,
    llm_layers=6,
)
max_iters = 6000  # iterations
warmup_iters = 200  # iterations
decay_begin = 3000  # iteration at which the learning rate starts to fall
batch_size = 16  # samples a process, of two
lr = 1.5e-3  # peak
weight_decay = 0.05
max_norm = 1.0  # gradient clipping

prepare_data = dict(
    type=prepare_teacher, out=data_dir, seed=1, train=40000, test=1200, template=template, named_presence=True
)

#######################################################################
#                           PART 2  Model                             #
#######################################################################
model = dict(
    type=SupervisedModel,
    llm=dict(type=random_digits_teacher, tokenizer=tokenizer_dir, seed=0, **sizes),
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
        processor=dict(type=digits_processor, tokenizer=tokenizer_dir),
        template=template,
        max_length=512,  # tokens
    ),
    sampler=dict(type=ResumableInfiniteSampler, shuffle=True),
    collate_fn=dict(type=conversation_collate),
)

#######################################################################
#                    PART 4  Scheduler & Optimizer                    #
#######################################################################
optim_wrapper = dict(
    type=OptimWrapper,
    optimizer=dict(type=AdamW, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay),
    clip_grad=dict(max_norm=max_norm, error_if_nonfinite=True),
    accumulative_counts=1,
)
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-3, by_epoch=False, begin=0, end=warmup_iters),
    dict(type=CosineAnnealingLR, eta_min=lr * 0.01, by_epoch=False, begin=decay_begin, end=max_iters),
]
train_cfg = dict(type=ResumableTrainLoop, max_iters=max_iters)

#######################################################################
#                          PART 5  Runtime                            #
#######################################################################
# From _base_.
