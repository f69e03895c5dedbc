"""Stage 2 with the improved recipe.

$ bash tools/dist.sh train projects/mmmamba/hovle/improved/stage2.py 8
"""

from mmengine.config import read_base

with read_base():
    from ..stage2 import *

work_dir = "work_dirs/hovle_improved/stage2"
model.update(
    mixer=improved_mixer, seeding=improved_seeding, alignment=improved_alignment, trainable="projections"
)
