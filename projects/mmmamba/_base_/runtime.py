"""What all stages of all teachers share: hooks, logging, environment."""

from mmengine.hooks import DistSamplerSeedHook, IterTimerHook, LoggerHook, ParamSchedulerHook

from xtuner_ext.hooks import SafeCheckpointHook

save_interval = 500  # iterations between checkpoints
keep_checkpoints = 2  # newest checkpoints that stay

default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, log_metric_by_epoch=False, interval=10),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(
        type=SafeCheckpointHook, by_epoch=False, interval=save_interval, max_keep_ckpts=keep_checkpoints
    ),
    sampler_seed=dict(type=DistSamplerSeedHook),
)
custom_hooks = []
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),  # gloo is taken where there is no GPU
)
visualizer = None  # dict(type=Visualizer, vis_backends=[dict(type=TensorboardVisBackend)])
log_level = "INFO"
log_processor = dict(by_epoch=False)
load_from = None
resume = True  # continue from work_dir/last_checkpoint when there is one
randomness = dict(seed=0, deterministic=False)
