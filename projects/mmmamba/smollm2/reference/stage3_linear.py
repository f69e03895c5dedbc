"""Stage 3 with mmMamba's own recipe, linear student.

$ bash tools/dist.sh train projects/mmmamba/smollm2/reference/stage3_linear.py 1
"""

from mmengine.config import read_base

with read_base():
    from ..stage3_linear import *

work_dir = "work_dirs/smollm2_reference/stage3_linear"
model.update(
    mixer=reference_mixer, seeding=reference_seeding, trainable="mixers", divergence=reference_divergence
)
optim_wrapper["optimizer"].update(lr=5e-5, weight_decay=0.05)
optim_wrapper["clip_grad"].update(max_norm=5.0)
