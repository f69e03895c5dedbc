"""Stage 3: match the teacher's next-token distributions with a student whose cache never grows.

$ bash tools/dist.sh train projects/mmmamba/smollm2/stage3_linear.py 1
"""

from mmengine.config import read_base

with read_base():
    from .stage1 import *

work_dir = "work_dirs/smollm2/stage3_linear"
previous_stage = "stage2"  # its last checkpoint lies beside work_dir
attention_layers = []  # layers that keep attention
max_iters = 120  # iterations
warmup_iters = 12  # iterations
decay_begin = 40  # iteration at which the learning rate starts to fall
lr = 2e-4  # peak
max_norm = 1.0  # gradient clipping

model.pop("alignment")
model.update(
    stage=3,
    attention_layers=attention_layers,
    layer_types=None,  # one word per layer, instead of attention_layers
    trainable="mixers",
    divergence=improved_divergence,
    teacher_cache=None,  # folder that `xtuner-ext cache-teacher` wrote: the teacher then does not run
    use_activation_checkpointing=False,  # recompute activations in the backward pass; rows of 512 tokens fit without
)
optim_wrapper["optimizer"].update(lr=lr)
optim_wrapper["clip_grad"].update(max_norm=max_norm)
optim_wrapper.update(paramwise_cfg=dict(rest_lr_mult=1.0))  # learning rate outside the mixers, relative to theirs
param_scheduler[0].update(end=warmup_iters)
param_scheduler[1].update(begin=decay_begin, end=max_iters)
train_cfg.update(max_iters=max_iters)
