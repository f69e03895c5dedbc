"""The same with the language model's frozen layers in 4 bits.

$ bash tools/dist.sh train projects/internvl/internvl2_2b_qlora.py 1
$ xtuner-ext merge work_dirs/internvl/internvl2_2b_qlora work_dirs/internvl/internvl2_2b_qlora_merge

Merging takes the base's full-precision weights; with --dequantise, the numbers that the 4 bits stand for.
total_batch_size = GPUs x batch_size x accumulation: 16 = 1 x 4 x 4.
"""

from mmengine.config import read_base

with read_base():
    from .internvl2_2b_lora import *

work_dir = "work_dirs/internvl/internvl2_2b_qlora"
bits = 4  # of a frozen weight; or 8

model.update(quantization=dict(bits=bits, type="nf4", double_quant=True))
