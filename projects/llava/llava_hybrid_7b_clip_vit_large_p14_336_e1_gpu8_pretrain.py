"""Trains a projector from CLIP to a distilled hybrid language model.

$ NPROC_PER_NODE=8 xtuner train llava/llava_hybrid_7b_clip_vit_large_p14_336_e1_gpu8_pretrain \\
    --deepspeed deepspeed_zero2
"""

from mmengine.hooks import CheckpointHook, DistSamplerSeedHook, IterTimerHook, LoggerHook, ParamSchedulerHook
from mmengine.optim import AmpOptimWrapper, CosineAnnealingLR, LinearLR
from mmengine.dataset import DefaultSampler
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessor, CLIPVisionModel
from xtuner.dataset import LLaVADataset
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.dataset.map_fns import llava_map_fn, template_map_fn_factory
from xtuner.engine.hooks import DatasetInfoHook, EvaluateChatHook
from xtuner.engine.runner import TrainLoop
from xtuner.model import LLaVAModel
from xtuner.utils import PROMPT_TEMPLATE

#######################################################################
#                          PART 1  Settings                           #
#######################################################################
work_dir = "work_dirs/llava_hybrid_7b_clip_vit_large_p14_336_e1_gpu8_pretrain"
# Model
llm_name_or_path = "pretrained/hybrid_7b"  # folder that `xtuner-ext convert pth_to_hf` made of a student
visual_encoder_name_or_path = "openai/clip-vit-large-patch14-336"
# Data
data_root = "./data/llava_data/"
data_path = data_root + "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"
image_folder = data_root + "LLaVA-Pretrain/images"
prompt_template = PROMPT_TEMPLATE.internlm2_chat  # that of the student's teacher
max_length = int(2048 - (336 / 14) ** 2)  # tokens, an image counted as one
# Scheduler & optimizer
batch_size = 32  # per device
accumulative_counts = 1
dataloader_num_workers = 4  # processes that read data
max_epochs = 1
lr = 1e-3
betas = (0.9, 0.999)
weight_decay = 0.0
max_norm = 1.0  # of the gradients
warmup_ratio = 0.03  # share of the epochs
# Save
save_steps = 500  # iterations between checkpoints
save_total_limit = 2  # newest checkpoints that stay
# Evaluation
evaluation_freq = 500  # iterations between chats
evaluation_images = "https://llava-vl.github.io/static/images/view.jpg"  # left out where it can not be fetched
evaluation_inputs = ["请描述一下这张照片", "Please describe this picture"]

#######################################################################
#            PART 2  Model & Tokenizer & Image Processor              #
#######################################################################
tokenizer = dict(
    type=AutoTokenizer.from_pretrained,
    pretrained_model_name_or_path=llm_name_or_path,
    trust_remote_code=True,
    padding_side="right",
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
        type=AutoModelForCausalLM.from_pretrained,
        pretrained_model_name_or_path=llm_name_or_path,
        dtype="bfloat16",  # decay rates stay fp32
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
    num_workers=dataloader_num_workers,
    pin_memory=True,
    dataset=dict(
        type=LLaVADataset,
        data_path=data_path,
        image_folder=image_folder,
        tokenizer=tokenizer,
        image_processor=image_processor,
        dataset_map_fn=llava_map_fn,
        template_map_fn=dict(type=template_map_fn_factory, template=prompt_template),
        max_length=max_length,
        pad_image_to_square=False,
    ),
    sampler=dict(type=DefaultSampler, shuffle=True),
    collate_fn=dict(type=default_collate_fn),
)

#######################################################################
#                    PART 4  Scheduler & Optimizer                    #
#######################################################################
optim_wrapper = dict(
    type=AmpOptimWrapper,
    optimizer=dict(type=AdamW, lr=lr, betas=betas, weight_decay=weight_decay),
    clip_grad=dict(max_norm=max_norm, error_if_nonfinite=False),
    accumulative_counts=accumulative_counts,
    loss_scale="dynamic",
    dtype="bfloat16",
)
param_scheduler = [
    dict(
        type=LinearLR,
        start_factor=1e-5,
        by_epoch=True,
        begin=0,
        end=warmup_ratio * max_epochs,
        convert_to_iter_based=True,
    ),
    dict(
        type=CosineAnnealingLR,
        eta_min=0.0,
        by_epoch=True,
        begin=warmup_ratio * max_epochs,
        end=max_epochs,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(type=TrainLoop, max_epochs=max_epochs)

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
        evaluation_inputs=evaluation_inputs,
        evaluation_images=evaluation_images,
        system="",
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
randomness = dict(seed=None, deterministic=False)
