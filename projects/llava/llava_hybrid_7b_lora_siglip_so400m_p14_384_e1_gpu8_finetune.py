"""Instruction tuning of the SigLIP LLaVA by LoRA on its language model and mixers, after the pretraining.

$ NPROC_PER_NODE=8 xtuner train llava/llava_hybrid_7b_lora_siglip_so400m_p14_384_e1_gpu8_finetune
$ xtuner-ext merge work_dirs/llava_hybrid_7b_lora_siglip_so400m_p14_384_e1_gpu8_finetune OUT
"""

from mmengine.config import read_base

with read_base():
    from .llava_hybrid_7b_siglip_so400m_p14_384_e1_gpu8_pretrain import *

#######################################################################
#                          PART 1  Settings                           #
#######################################################################
work_dir = "work_dirs/llava_hybrid_7b_lora_siglip_so400m_p14_384_e1_gpu8_finetune"
pretrained = "work_dirs/llava_hybrid_7b_siglip_so400m_p14_384_pretrained"  # `xtuner-ext convert pth_to_hf` made it
meta_path = "data/llava_data/instruct.json"
lora_rank = 128
lr = 2e-4

prepare_data = None

#######################################################################
#                           PART 2  Model                             #
#######################################################################
model["llm"].update(pretrained_model_name_or_path=pretrained)
model.update(
    lora=dict(language=dict(r=lora_rank), mixers=dict(r=lora_rank)),
    freeze=dict(vision=True, projector=False),
)

#######################################################################
#                      PART 3  Dataset & Dataloader                   #
#######################################################################
train_dataloader["dataset"]["dataset"].update(meta=meta_path)
train_dataloader["dataset"]["dataset"]["processor"].update(pretrained_model_name_or_path=pretrained)

#######################################################################
#                    PART 4  Scheduler & Optimizer                    #
#######################################################################
optim_wrapper["optimizer"].update(lr=lr)
