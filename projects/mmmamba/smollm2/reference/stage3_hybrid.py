"""Stage 3 with mmMamba's own recipe, attention in every fourth layer.

$ bash tools/dist.sh train projects/mmmamba/smollm2/reference/stage3_hybrid.py 1
"""

from mmengine.config import read_base

with read_base():
    from .stage3_linear import *

work_dir = "work_dirs/smollm2_reference/stage3_hybrid"
model.update(attention_layers=[0, 4, 8, 12, 16, 20, 24, 28])
