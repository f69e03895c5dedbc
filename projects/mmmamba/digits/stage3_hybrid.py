"""Stage 3: match the teacher's answers with a student that keeps attention where it measures as most needed.

$ xtuner-ext select-layers projects/mmmamba/digits/stage2.py work_dirs/digits/stage2/iter_100.pth --keep 2
$ bash tools/dist.sh train projects/mmmamba/digits/stage3_hybrid.py 1
"""

from mmengine.config import read_base

with read_base():
    from .stage3_linear import *

work_dir = "work_dirs/digits/stage3_hybrid"
attention_layers = "work_dirs/digits/attention_layers.json"  # or a list of layers
layer_selection = dict(keep=2, limit=240, batch_size=60)  # the pipeline writes that file when it is missing
model.update(attention_layers=attention_layers)
