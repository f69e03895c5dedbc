"""What the stages share: small parts with random weights, eight photographs, hooks."""

from mmengine.dataset import InfiniteSampler
from mmengine.hooks import CheckpointHook, DistSamplerSeedHook, IterTimerHook, LoggerHook, ParamSchedulerHook
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessor, CLIPVisionModel
from xtuner.dataset import LLaVADataset
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.dataset.map_fns import llava_map_fn, template_map_fn_factory
from xtuner.engine.hooks import DatasetInfoHook, EvaluateChatHook
from xtuner.model import LLaVAModel
from xtuner.utils import PROMPT_TEMPLATE

from xtuner_ext.convert.small_llava import make_small_parts
from xtuner_ext.data.sources.photographs import make_photographs

#######################################################################
#                          PART 1  Settings                           #
#######################################################################
data_dir = "work_dirs/llava_photographs/data"
parts = "work_dirs/llava_photographs/parts"
llm_name_or_path = parts + "/llm"
visual_encoder_name_or_path = parts + "/clip"
prompt_template = PROMPT_TEMPLATE.internlm_chat
max_length = 256  # tokens, an image counted as one
batch_size = 16  # per device
num_workers = 0  # processes that read data
save_steps = 100  # iterations between checkpoints
save_total_limit = 2  # newest checkpoints that stay
evaluation_freq = 100  # iterations between chats

prepare_data = [
    dict(type=make_photographs, out=data_dir, seed=0, views=4, choices=16),
    dict(type=make_small_parts, out=parts, data=data_dir, seed=0, width=128, layers=2, image_size=56),
]

#######################################################################
#            PART 2  Model & Tokenizer & Image Processor              #
#######################################################################
tokenizer = dict(
    type=AutoTokenizer.from_pretrained, pretrained_model_name_or_path=llm_name_or_path, padding_side="right"
)
image_processor = dict(
    type=CLIPImageProcessor.from_pretrained, pretrained_model_name_or_path=visual_encoder_name_or_path
)
model = dict(
    type=LLaVAModel,
    freeze_llm=True,
    freeze_visual_encoder=True,
    pretrained_pth=None,
    llm=dict(
        type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path=llm_name_or_path, dtype="float32"
    ),
    visual_encoder=dict(
        type=CLIPVisionModel.from_pretrained, pretrained_model_name_or_path=visual_encoder_name_or_path
    ),
)

#######################################################################
#                      PART 3  Dataset & Dataloader                   #
#######################################################################
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=num_workers,
    dataset=dict(
        type=LLaVADataset,
        data_path=data_dir + "/llava.json",
        image_folder=data_dir + "/images",
        tokenizer=tokenizer,
        image_processor=image_processor,
        dataset_map_fn=llava_map_fn,
        template_map_fn=dict(type=template_map_fn_factory, template=prompt_template),
        max_length=max_length,
        pad_image_to_square=True,
    ),
    sampler=dict(type=InfiniteSampler, shuffle=True),
    collate_fn=dict(type=default_collate_fn),
)

#######################################################################
#                           PART 5  Runtime                           #
#######################################################################
custom_hooks = [
    dict(type=DatasetInfoHook, tokenizer=tokenizer),
    dict(
        type=EvaluateChatHook,
        tokenizer=tokenizer,
        image_processor=image_processor,
        every_n_iters=evaluation_freq,
        evaluation_inputs=["What is in the picture?"],
        evaluation_images=data_dir + "/images/coffee_0.png",
        max_new_tokens=16,
        prompt_template=prompt_template,
    ),
]
default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, log_metric_by_epoch=False, interval=10),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(type=CheckpointHook, by_epoch=False, interval=save_steps, max_keep_ckpts=save_total_limit),
    sampler_seed=dict(type=DistSamplerSeedHook),
)
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),  # gloo is taken where there is no GPU
)
visualizer = None
log_level = "INFO"
log_processor = dict(by_epoch=False)
load_from = None
resume = False
randomness = dict(seed=0, deterministic=False)
