"""Stage 1 with mmMamba's own recipe, for as many tokens as the improved one.

$ bash tools/dist.sh train projects/mmmamba/smollm2/reference/stage1.py 1
"""

from mmengine.config import read_base

with read_base():
    from ..stage1 import *

work_dir = "work_dirs/smollm2_reference/stage1"
model.update(mixer=reference_mixer, seeding=reference_seeding, alignment=reference_alignment)
optim_wrapper["optimizer"].update(lr=1e-3, weight_decay=0.05)
