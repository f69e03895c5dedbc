"""Stage 2 with mmMamba's own recipe, for as many steps as the improved one.

$ bash tools/dist.sh train projects/mmmamba/digits/reference/stage2.py 1
"""

from mmengine.config import read_base

with read_base():
    from ..stage2 import *

work_dir = "work_dirs/digits_reference/stage2"
model.update(
    mixer=reference_mixer, seeding=reference_seeding, alignment=reference_alignment, trainable="mixers"
)
optim_wrapper["optimizer"].update(lr=5e-4, weight_decay=0.05)
