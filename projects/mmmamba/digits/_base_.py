"""The digits' teacher and data, shared by all stages."""

from xtuner_ext.convert.teacher import load_processor
from xtuner_ext.data.collate import conversation_collate
from xtuner_ext.data.dataset import ConversationDataset
from xtuner_ext.data.samplers import ResumableInfiniteSampler
from xtuner_ext.data.sources.digits import make_digits
from xtuner_ext.hooks import HeldOutHook

teacher = "digits-teacher"  # the model that the package ships, or a folder
data_dir = "work_dirs/digits/data"
eval_data = data_dir + "/test.json"
template = "internlm2_chat"
max_length = 512  # tokens
batch_size = 32  # samples a process
num_workers = 0  # processes that read data

prepare_data = dict(type=make_digits, out=data_dir, seed=0, train=12000, test=1200)

train_dataloader = dict(
    batch_size=batch_size,
    num_workers=num_workers,
    dataset=dict(
        type=ConversationDataset,
        meta=data_dir + "/train.json",
        processor=dict(type=load_processor, pretrained_model_name_or_path=teacher),
        template=template,
        max_length=max_length,
    ),
    sampler=dict(type=ResumableInfiniteSampler, shuffle=True),
    collate_fn=dict(type=conversation_collate),
)
custom_hooks = [dict(type=HeldOutHook, meta=eval_data, interval=100, limit=120, batch_size=60)]
