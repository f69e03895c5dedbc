"""Stage 3: match the teacher's answers with a student that keeps attention in every fourth layer.

$ bash tools/dist.sh train projects/mmmamba/digits/stage3_hybrid.py 1
"""

from mmengine.config import read_base

with read_base():
    from .stage3_linear import *

work_dir = "work_dirs/digits/stage3_hybrid"
attention_layers = [0, 4]  # the first of every four, mmMamba's best placement
model.update(attention_layers=attention_layers)
