"""Stage 3: the same with attention in a quarter of the layers, those that measure as most needed.

$ xtuner-ext select-layers projects/mmmamba/smollm2/stage2.py work_dirs/smollm2/stage2/iter_50.pth --keep 8 --limit 8
$ bash tools/dist.sh train projects/mmmamba/smollm2/stage3_hybrid.py 1
"""

from mmengine.config import read_base

with read_base():
    from .stage3_linear import *

work_dir = "work_dirs/smollm2/stage3_hybrid"
attention_layers = "work_dirs/smollm2/attention_layers.json"  # or a list of layers
layer_selection = dict(keep=8, limit=8, batch_size=8)  # the pipeline writes that file when it is missing
model.update(attention_layers=attention_layers)
