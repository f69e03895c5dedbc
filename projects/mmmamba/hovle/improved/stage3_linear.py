"""Stage 3 with the improved recipe, linear student.

$ bash tools/dist.sh train projects/mmmamba/hovle/improved/stage3_linear.py 8
"""

from mmengine.config import read_base

with read_base():
    from ..stage3_linear import *

work_dir = "work_dirs/hovle_improved/stage3_linear"
model.update(mixer=improved_mixer, seeding=improved_seeding, trainable="projections", divergence=improved_divergence)
