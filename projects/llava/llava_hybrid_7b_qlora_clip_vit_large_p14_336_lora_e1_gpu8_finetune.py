"""Instruction tuning of a distilled hybrid in 4 bits with adapters on it and on CLIP, after the pretraining.

$ NPROC_PER_NODE=8 xtuner train llava/llava_hybrid_7b_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune \\
    --deepspeed deepspeed_zero2
"""

from mmengine.config import read_base
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from xtuner.dataset.samplers import LengthGroupedSampler

with read_base():
    from .llava_hybrid_7b_clip_vit_large_p14_336_e1_gpu8_pretrain import *

#######################################################################
#                          PART 1  Settings                           #
#######################################################################
work_dir = "work_dirs/llava_hybrid_7b_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune"
previous_stage = "llava_hybrid_7b_clip_vit_large_p14_336_e1_gpu8_pretrain"  # whose last checkpoint is taken
data_path = data_root + "LLaVA-Instruct-150K/llava_v1_5_mix665k.json"
image_folder = data_root + "llava_images"
batch_size = 16  # per device
lr = 2e-4
llm_rank, llm_alpha = 512, 256
tower_rank, tower_alpha = 64, 16
dropout = 0.05

#######################################################################
#            PART 2  Model & Tokenizer & Image Processor              #
#######################################################################
model["llm"].update(
    quantization_config=dict(
        type=BitsAndBytesConfig,
        load_in_4bit=True,
        bnb_4bit_compute_dtype="bfloat16",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        # Time steps come from a few numbers a head: nothing is saved, and decays are sensitive.
        llm_int8_skip_modules=["lm_head", "dt_proj", "share_proj"],
    )
)
model.update(
    llm_lora=dict(
        type=LoraConfig,
        r=llm_rank,
        lora_alpha=llm_alpha,
        lora_dropout=dropout,
        bias="none",
        task_type="CAUSAL_LM",
        # Attention's and the mixers', then the MLPs'.
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "g_proj", "gate_proj", "up_proj", "down_proj"],
    ),
    visual_encoder_lora=dict(type=LoraConfig, r=tower_rank, lora_alpha=tower_alpha, lora_dropout=dropout, bias="none"),
)

#######################################################################
#                      PART 3  Dataset & Dataloader                   #
#######################################################################
train_dataloader["dataset"].update(data_path=data_path, image_folder=image_folder, pad_image_to_square=True)
train_dataloader["batch_size"] = batch_size
# Replaced as a whole: an update would keep the other sampler's options.
train_dataloader["sampler"] = dict(
    type=LengthGroupedSampler,
    length_property="modality_length",
    per_device_batch_size=batch_size * accumulative_counts,
)

#######################################################################
#                    PART 4  Scheduler & Optimizer                    #
#######################################################################
optim_wrapper["optimizer"].update(lr=lr)
