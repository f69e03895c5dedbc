"""The same on one's own Habitat data.

$ bash tools/dist.sh train projects/internvl/habitat_lora.py 1
$ xtuner-ext merge work_dirs/internvl/habitat_lora work_dirs/internvl/habitat_lora_merge

The fork that this comes from publishes the command, GPUS=1 PER_DEVICE_BATCH_SIZE=4, and not its script; the other
numbers are those of the script that it names as its origin. total_batch_size = GPUs x batch_size x accumulation:
16 = 1 x 4 x 4.
"""

from mmengine.config import read_base

with read_base():
    from .internvl2_2b_lora import *

work_dir = "work_dirs/internvl/habitat_lora"
meta_path = "data/habitat/meta.json"

train_dataloader["dataset"].update(meta=meta_path)
