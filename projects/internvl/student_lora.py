"""LoRA on a distilled student: attention and MLPs, and the Mamba-2 mixers at a rank of their own.

$ bash tools/dist.sh train projects/internvl/student_lora.py 1
$ xtuner-ext merge work_dirs/internvl/student_lora work_dirs/internvl/student_lora_merge

total_batch_size = GPUs x batch_size x accumulation: 16 = 1 x 4 x 4.
"""

from mmengine.config import read_base

with read_base():
    from .internvl2_2b_lora import *

work_dir = "work_dirs/internvl/student_lora"
pretrained_model = "work_dirs/hovle/export_hybrid"  # what `xtuner-ext convert pth_to_hf` wrote
meta_path = "data/internvl_1_2_finetune_custom.json"
mixers_r = 8  # rank beside q, k, v, o, gate and time-step projections
mixers_alpha = 2 * mixers_r

model["llm"].update(pretrained_model_name_or_path=pretrained_model)
model["lora"].update(mixers=dict(r=mixers_r, alpha=mixers_alpha))
train_dataloader["dataset"]["processor"].update(pretrained_model_name_or_path=pretrained_model)
