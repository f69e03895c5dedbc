"""Second part of the digits teacher's training, four minutes on two cores.

$ bash tools/dist.sh train projects/mmmamba/digits/teacher.py 2

writes work_dirs/digits/teacher/export, which is what lies in xtuner_ext/assets/digits_teacher.
"""

from mmengine.config import read_base

from xtuner_ext.data.sources.digits import make_digits
from xtuner_ext.hooks import ExportTeacherHook

with read_base():
    from .teacher_warmup import *

load_from = work_dir + "/iter_6000.pth"
resume = False  # a checkpoint to start from and one to go on with can not both be given
work_dir = "work_dirs/digits/teacher"
data_dir = "work_dirs/digits/teacher_data"
max_iters = 1500  # iterations
warmup_iters = 50  # iterations
decay_begin = 400  # iteration at which the learning rate starts to fall
lr = 8e-4  # peak

prepare_data = dict(type=make_digits, out=data_dir, seed=1, train=40000, test=1200)
train_dataloader["dataset"].update(meta=data_dir + "/train.json")
optim_wrapper["optimizer"].update(lr=lr)
param_scheduler[0].update(end=warmup_iters)
param_scheduler[1].update(begin=decay_begin, end=max_iters)
train_cfg.update(max_iters=max_iters)
custom_hooks = [dict(type=ExportTeacherHook, out=work_dir + "/export", tokenizer=tokenizer_dir)]
