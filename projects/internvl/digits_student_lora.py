"""Tune a distilled student as its teacher is tuned in digits_lora.py: LoRA on the mixers as well.

$ bash tools/dist.sh pipeline projects/mmmamba/digits 1
$ bash tools/dist.sh train projects/internvl/digits_student_lora.py 1

The linear one lies in work_dirs/digits/export_linear; it is tuned with both keys below that name a folder set to that.
"""

from mmengine.config import read_base

with read_base():
    from .digits_lora import *

work_dir = "work_dirs/internvl/digits_student_lora"
base = "work_dirs/digits/export_hybrid"  # that the pipeline of the distillation wrote

model["llm"].update(pretrained_model_name_or_path=base)
model["lora"].update(mixers=dict(r=rank))
train_dataloader["dataset"]["processor"].update(pretrained_model_name_or_path=base)
