"""Stage 3 with the paper's numbers: attention is kept in the first of every four layers.

$ bash tools/dist.sh train projects/mmmamba/hovle/stage3_hybrid.py 8
"""

from mmengine.config import read_base

with read_base():
    from .stage3_linear import *

work_dir = "work_dirs/hovle/stage3_hybrid"
attention_layers = [0, 4, 8, 12, 16, 20, 24, 28]  # "head-interleaved", Table 6
model.update(attention_layers=attention_layers)
