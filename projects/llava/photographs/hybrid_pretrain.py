"""``pretrain.py`` with a language model whose last layer is Mamba-2.

$ xtuner train projects/llava/photographs/hybrid_pretrain.py
"""

from mmengine.config import read_base

with read_base():
    from .pretrain import *

work_dir = "work_dirs/llava_photographs/hybrid_pretrain"
llm_name_or_path = parts + "/hybrid_llm"
model["llm"].update(pretrained_model_name_or_path=llm_name_or_path)
