"""LoRA on InternVL2-2B's language model, with the numbers of InternVL's internvl2_2b_..._2nd_finetune_lora.sh.

$ bash tools/dist.sh train projects/internvl/internvl2_2b_lora.py 2 --deepspeed deepspeed_zero1
$ xtuner-ext merge work_dirs/internvl/internvl2_2b_lora work_dirs/internvl/internvl2_2b_lora_merge

Needs pretrained/InternVL2-2B and a meta file of your data; `xtuner-ext data check META` looks it over.

total_batch_size = GPUs x batch_size x accumulation: 16 = 2 x 4 x 2, or 1 x 4 x 4 on one GPU. The accumulation is set
when training starts, and a number of GPUs that does not divide the total is refused.
"""

from mmengine.config import read_base
from torch.optim import AdamW

from xtuner_ext.convert.teacher import load_processor, load_teacher
from xtuner_ext.data.collate import conversation_collate
from xtuner_ext.data.dataset import ConversationDataset
from xtuner_ext.data.samplers import LengthGroupedSampler
from xtuner_ext.distill.autocast import Bfloat16OptimWrapper
from xtuner_ext.distill.optim import TrainableParameters
from xtuner_ext.finetune import SupervisedModel
from xtuner_ext.finetune.schedule import WarmupCosineLR
from xtuner_ext.hooks import ResumableTrainLoop

with read_base():
    from ._base_.runtime import *

#######################################################################
#                          PART 1  Settings                           #
#######################################################################
work_dir = "work_dirs/internvl/internvl2_2b_lora"
pretrained_model = "pretrained/InternVL2-2B"
meta_path = "data/internvl_1_2_finetune_custom.json"
template = "internlm2-chat"  # --conv_style

total_batch_size = 16  # samples an optimizer step, BATCH_SIZE
batch_size = 4  # samples a process and iteration, PER_DEVICE_BATCH_SIZE
num_workers = 4  # processes that read data, for each training process
max_seq_length = 4096  # tokens; longer samples are left out and counted
max_bad_fraction = 0.01  # share of samples left out, of any reason, above which the run stops
max_dynamic_patch = 6  # tiles an image, thumbnail not counted

lora_r = 16  # rank, --use_llm_lora
lora_alpha = 2 * lora_r
lora_dropout = 0.05

max_epochs = 1  # --num_train_epochs
lr = 4e-5  # peak
weight_decay = 0.01
warmup_ratio = 0.03  # share of the optimizer steps
max_norm = 1.0  # gradient clipping
save_steps = 200  # optimizer steps between checkpoints
save_total_limit = 1  # newest checkpoints that stay

#######################################################################
#                           PART 2  Model                             #
#######################################################################
model = dict(
    type=SupervisedModel,
    llm=dict(type=load_teacher, pretrained_model_name_or_path=pretrained_model, dtype="bfloat16"),
    lora=dict(language=dict(r=lora_r, alpha=lora_alpha), dropout=lora_dropout),
    # What trains as a whole gets False; of the tower, its last layers may.
    freeze=dict(
        language=True, mixers=True, vision=True, projector=True, embeddings=True, head=True, unfreeze_vit_layers=0
    ),
    quantization=None,  # internvl2_2b_qlora.py has four bits
    loss_reduction="token",
    use_activation_checkpointing=True,  # --grad_checkpoint
    trainable_dtype="float32",
)

#######################################################################
#                            PART 3  Data                             #
#######################################################################
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=num_workers,
    dataset=dict(
        type=ConversationDataset,
        meta=meta_path,
        processor=dict(
            type=load_processor,
            pretrained_model_name_or_path=pretrained_model,
            max_tiles=max_dynamic_patch,
            trust_remote_code=True,  # InternLM2's tokenizer is code in the folder
        ),
        template=template,
        max_length=max_seq_length,
        max_bad_fraction=max_bad_fraction,
    ),
    # --group_by_length
    sampler=dict(
        type=LengthGroupedSampler,
        batch_size=batch_size,
        total_batch_size=total_batch_size,
        cache_dir="work_dirs/internvl/lengths",
    ),
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
