"""The same on COCO captions, with the numbers of InternVL's internvl2_2b_..._2nd_finetune_lora_coco.sh.

$ bash tools/dist.sh train projects/internvl/internvl2_2b_lora_coco.py 8 --deepspeed deepspeed_zero1
$ xtuner-ext merge work_dirs/internvl/internvl2_2b_lora_coco work_dirs/internvl/internvl2_2b_lora_coco_merge

total_batch_size = GPUs x batch_size x accumulation: 512 = 8 x 4 x 16, or 1 x 4 x 128 on one GPU, whose 128 batches of
an optimizer step wait in memory.
"""

from mmengine.config import read_base

with read_base():
    from .internvl2_2b_lora import *

work_dir = "work_dirs/internvl/internvl2_2b_lora_coco"
meta_path = "data/coco_caption.json"
total_batch_size = 512  # samples an optimizer step, BATCH_SIZE
lora_r = 128  # rank, --use_llm_lora
lora_alpha = 2 * lora_r

model["lora"]["language"].update(r=lora_r, alpha=lora_alpha)
train_dataloader["dataset"].update(meta=meta_path)
train_dataloader["sampler"].update(total_batch_size=total_batch_size)
