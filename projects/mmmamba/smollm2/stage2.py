"""Stage 2: align the mixers again, now training q, k and v too.

$ bash tools/dist.sh train projects/mmmamba/smollm2/stage2.py 1
"""

from mmengine.config import read_base

with read_base():
    from .stage1 import *

work_dir = "work_dirs/smollm2/stage2"
previous_stage = "stage1"  # its last checkpoint lies beside work_dir
max_iters = 50  # iterations
lr = 1e-3  # peak

model.update(stage=2, trainable="mixers")
optim_wrapper["optimizer"].update(lr=lr)
param_scheduler[1].update(end=max_iters)
train_cfg.update(max_iters=max_iters)
