"""Tunes what XTuner's LLaVAModel can not hold: rows packed of several samples, in a model folder of one piece.

$ xtuner train projects/llava/photographs/hybrid_pretrain.py
$ xtuner train projects/llava/photographs/packed_finetune.py
"""

from mmengine.config import read_base
from mmengine.optim import CosineAnnealingLR, LinearLR, OptimWrapper
from torch.optim import AdamW

from xtuner_ext.convert.llava_folder import make_llava
from xtuner_ext.convert.small_llava import make_small_parts
from xtuner_ext.convert.teacher import load_processor, load_teacher
from xtuner_ext.data.collate import conversation_collate
from xtuner_ext.data.dataset import ConversationDataset
from xtuner_ext.data.packing import PackedDataset
from xtuner_ext.data.samplers import ResumableInfiniteSampler
from xtuner_ext.data.sources.photographs import make_photographs
from xtuner_ext.distill.optim import TrainableParameters
from xtuner_ext.finetune import SupervisedModel
from xtuner_ext.hooks import ResumableTrainLoop

with read_base():
    from ...internvl._base_.runtime import *

#######################################################################
#                          PART 1  Settings                           #
#######################################################################
work_dir = "work_dirs/llava_photographs/packed_finetune"
data_dir = "work_dirs/llava_photographs/data"
parts = "work_dirs/llava_photographs/parts"
start = "work_dirs/llava_photographs/hybrid_start"  # folder that the parts are put together in
template = "internlm_chat"
max_length = 512  # tokens of a row; a picture takes 16
batch_size = 4  # rows a process
max_iters = 300  # iterations
lr = 2e-3  # weights that were random need more than published ones

prepare_data = [
    dict(type=make_photographs, out=data_dir, seed=0, views=4, choices=16),
    dict(type=make_small_parts, out=parts, data=data_dir, seed=0, width=128, layers=2, image_size=56),
    dict(
        type=make_llava,
        out=start,
        llm=parts + "/hybrid_llm",  # a teacher or a distilled student
        visual_encoder=parts + "/clip",  # CLIP or SigLIP
        projector="work_dirs/llava_photographs/hybrid_pretrain/iter_100.pth",  # None begins with a new one
        template=template,
    ),
]

#######################################################################
#                           PART 2  Model                             #
#######################################################################
model = dict(
    type=SupervisedModel,
    llm=dict(type=load_teacher, pretrained_model_name_or_path=start, dtype="float32"),
    lora=None,
    freeze=dict(vision=True),
)

#######################################################################
#                      PART 3  Dataset & Dataloader                   #
#######################################################################
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=0,
    dataset=dict(
        type=PackedDataset,
        dataset=dict(
            type=ConversationDataset,
            meta=data_dir + "/train.json",
            processor=dict(type=load_processor, pretrained_model_name_or_path=start),
            template=template,
            max_length=max_length,
        ),
        row_length=max_length,
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
    optimizer=dict(type=AdamW, lr=lr, betas=(0.9, 0.999), weight_decay=0.0),
    clip_grad=dict(max_norm=1.0, error_if_nonfinite=True),
)
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-5, by_epoch=False, begin=0, end=10),
    dict(type=CosineAnnealingLR, eta_min=0.0, by_epoch=False, begin=10, end=max_iters),
]
train_cfg = dict(type=ResumableTrainLoop, max_iters=max_iters)

#######################################################################
#                           PART 5  Runtime                           #
#######################################################################
default_hooks["checkpoint"].update(interval=100, max_keep_ckpts=2)
