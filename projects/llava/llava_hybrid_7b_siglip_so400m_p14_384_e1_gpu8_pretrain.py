"""Trains a projector from SigLIP to a distilled hybrid language model, in rows packed of several samples.

$ NPROC_PER_NODE=8 xtuner train llava/llava_hybrid_7b_siglip_so400m_p14_384_e1_gpu8_pretrain

Data are InternVL's JSONL and a meta JSON, of one image, several or none a sample; `xtuner-ext data check META` looks
them over. XTuner's LLaVAModel knows CLIP alone, so the parts are put together as one folder first.
"""

from mmengine.config import read_base
from torch.optim import AdamW

from xtuner_ext.convert.llava_folder import make_llava
from xtuner_ext.convert.teacher import load_processor, load_teacher
from xtuner_ext.data.collate import conversation_collate
from xtuner_ext.data.dataset import ConversationDataset
from xtuner_ext.data.packing import PackedDataset
from xtuner_ext.data.samplers import ResumableInfiniteSampler
from xtuner_ext.distill.autocast import Bfloat16OptimWrapper
from xtuner_ext.distill.optim import TrainableParameters
from xtuner_ext.finetune import SupervisedModel
from xtuner_ext.finetune.schedule import WarmupCosineLR
from xtuner_ext.hooks import ResumableTrainLoop

with read_base():
    from ..internvl._base_.runtime import *

#######################################################################
#                          PART 1  Settings                           #
#######################################################################
work_dir = "work_dirs/llava_hybrid_7b_siglip_so400m_p14_384_e1_gpu8_pretrain"
llm_name_or_path = "pretrained/hybrid_7b"  # folder that `xtuner-ext convert pth_to_hf` made of a student
visual_encoder_name_or_path = "google/siglip-so400m-patch14-384"
start = "work_dirs/llava_hybrid_7b_siglip_so400m_p14_384_start"  # folder that the parts are put together in
meta_path = "data/llava_data/pretrain.json"
template = "internlm2_chat"  # that of the student's teacher
total_batch_size = 64  # rows an optimizer step, over all processes
batch_size = 4  # rows a process and iteration
max_length = 4096  # tokens of a row; an image takes 729
max_epochs = 1
lr = 1e-3
weight_decay = 0.0
max_norm = 1.0  # of the gradients
warmup_ratio = 0.03  # share of the optimizer steps
save_steps = 500  # optimizer steps between checkpoints
save_total_limit = 2  # newest checkpoints that stay

prepare_data = dict(
    type=make_llava,
    out=start,
    llm=llm_name_or_path,
    visual_encoder=visual_encoder_name_or_path,
    template=template,
    trust_remote_code=True,
)

#######################################################################
#                           PART 2  Model                             #
#######################################################################
model = dict(
    type=SupervisedModel,
    llm=dict(type=load_teacher, pretrained_model_name_or_path=start, dtype="bfloat16"),
    lora=None,
    freeze=dict(language=True, mixers=True, vision=True, embeddings=True, head=True, projector=False),
    use_activation_checkpointing=True,
    trainable_dtype="float32",
)

#######################################################################
#                      PART 3  Dataset & Dataloader                   #
#######################################################################
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=4,
    dataset=dict(
        type=PackedDataset,
        dataset=dict(
            type=ConversationDataset,
            meta=meta_path,
            processor=dict(type=load_processor, pretrained_model_name_or_path=start, trust_remote_code=True),
            template=template,
            max_length=max_length,
        ),
        row_length=max_length,
        cache_dir="work_dirs/llava_lengths",
    ),
    sampler=dict(type=ResumableInfiniteSampler, shuffle=True),
    collate_fn=dict(type=conversation_collate),
)

#######################################################################
#                    PART 4  Scheduler & Optimizer                    #
#######################################################################
optim_wrapper = dict(
    type=Bfloat16OptimWrapper,
    constructor=TrainableParameters,
    optimizer=dict(type=AdamW, lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay),
    clip_grad=dict(max_norm=max_norm, error_if_nonfinite=True),
    accumulative_counts=None,  # follows from total_batch_size
)
param_scheduler = [dict(type=WarmupCosineLR, warmup_ratio=warmup_ratio, eta_min=0.0, by_epoch=False)]
train_cfg = dict(type=ResumableTrainLoop, max_epochs=max_epochs, max_iters=None)

#######################################################################
#                          PART 5  Runtime                            #
#######################################################################
default_hooks["checkpoint"].update(max_keep_ckpts=save_total_limit)
