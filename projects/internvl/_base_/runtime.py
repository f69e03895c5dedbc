"""What all tuning runs share: hooks, logging, environment."""

from mmengine.hooks import DistSamplerSeedHook, IterTimerHook, LoggerHook, ParamSchedulerHook

from xtuner_ext.hooks import BadSampleHook, SafeCheckpointHook

default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, log_metric_by_epoch=False, interval=10),
    param_scheduler=dict(type=ParamSchedulerHook),
    # The interval is save_steps, in iterations.
    checkpoint=dict(type=SafeCheckpointHook, by_epoch=False, interval=-1, max_keep_ckpts=1),
    sampler_seed=dict(type=DistSamplerSeedHook),
)
custom_hooks = [dict(type=BadSampleHook)]  # writes work_dir/bad_samples.jsonl
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),  # gloo is taken where there is no GPU
)
visualizer = None  # dict(type=Visualizer, vis_backends=[dict(type=TensorboardVisBackend)])
log_level = "INFO"
log_processor = dict(by_epoch=False, window_size=10)  # iterations that a logged loss is the mean of
load_from = None
resume = True  # continue from work_dir/last_checkpoint when there is one
randomness = dict(seed=42, deterministic=False)
