"""Stage 2 with the paper's numbers: align again, now training q, k and v too.

$ bash tools/dist.sh train projects/mmmamba/hovle/stage2.py 8
"""

from mmengine.config import read_base

with read_base():
    from .stage1 import *

work_dir = "work_dirs/hovle/stage2"
previous_stage = "stage1"  # its last checkpoint lies beside work_dir
lr = 5e-4  # peak

model.update(stage=2, trainable="mixers")
optim_wrapper["optimizer"].update(lr=lr)
