"""Stage 2: align the mixers again, now training q, k, v and the output projection too.

$ bash tools/dist.sh train projects/mmmamba/digits/stage2.py 1
"""

from mmengine.config import read_base

with read_base():
    from .stage1 import *

work_dir = "work_dirs/digits/stage2"
previous_stage = "stage1"  # its last checkpoint lies beside work_dir
lr = 2e-3  # peak

model.update(stage=2, trainable="projections")
optim_wrapper["optimizer"].update(lr=lr)
