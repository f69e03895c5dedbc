"""HoVLE and its data, shared by all stages.

Needs pretrained/HoVLE (the checkpoint's folder), data/vlm_sft/meta.json, which names one or more datasets
in InternVL's format, and data/vlm_sft/held_out.json, which names the questions to score.
"""

from xtuner_ext.convert.teacher import load_processor
from xtuner_ext.data.collate import conversation_collate
from xtuner_ext.data.dataset import ConversationDataset
from xtuner_ext.data.samplers import ResumableInfiniteSampler

teacher = "pretrained/HoVLE"
train_data = "data/vlm_sft/meta.json"
eval_data = "data/vlm_sft/held_out.json"
template = "internlm2-chat"
max_length = 8192  # tokens; longer samples are skipped
max_tiles = 12  # tiles an image, thumbnail not counted
batch_size = 2  # samples a process
num_workers = 4  # processes that read data, for each training process

train_dataloader = dict(
    batch_size=batch_size,
    num_workers=num_workers,
    dataset=dict(
        type=ConversationDataset,
        meta=train_data,
        processor=dict(
            type=load_processor,
            pretrained_model_name_or_path=teacher,
            max_tiles=max_tiles,
            trust_remote_code=True,  # InternLM2's tokenizer is code in the folder
        ),
        template=template,
        max_length=max_length,
    ),
    sampler=dict(type=ResumableInfiniteSampler, shuffle=True),
    collate_fn=dict(type=conversation_collate),
)
