"""The only place that touches the internals of xtuner, mmengine, transformers and torch.

Each function is one repair. `xtuner_ext.autoload` calls it with the freshly imported module it
repairs; calling it twice does no harm. The docstring names the upstream line and the version
that no longer needs the repair ("none yet" where upstream has not moved).
"""

import contextlib
import functools
import io
import logging
import os
import sys
from pathlib import Path

logger = logging.getLogger(__name__)

_keep_alive = []  # torch.library.Library objects: their operators vanish with them


def add_cpu_bf16_query(torch_cpu):
    """Adds `torch.cpu.is_bf16_supported`.

    Repairs: xtuner 0.2.0 model/sft.py, model/llava.py and tools/utils.py, which ask it of
    whatever device they run on. Needed until: none yet.
    """
    if not hasattr(torch_cpu, "is_bf16_supported"):
        # Every x86-64 and ARM CPU computes bf16, if need be by emulation; fp16 is the slow type there.
        torch_cpu.is_bf16_supported = lambda: True


def define_missing_torchvision_ops(extension):
    """Declares the operators that torchvision describes even when its library did not load.

    Repairs: torchvision 0.28 _meta_registrations.py (`register_fake("torchvision::nms")`), which
    fails when a CUDA build of torchvision meets a CPU build of torch; transformers then reports
    "Could not import module ...". Needed until: torchvision is built for the same device as torch.
    """
    if extension._has_ops():
        return
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _keep_alive.append(library)


def find_packages_without_pkg_resources(package_utils):
    """Answers `is_installed` and `get_installed_path` from `importlib`.

    Repairs: mmengine 0.10.7 utils/package_utils.py:17 and :48, which import `pkg_resources`;
    setuptools 82 removed it, and with it every `read_base` import of another package's config.
    Needed until: none yet.
    """
    import importlib.metadata
    import importlib.util

    def find_module(package):
        spec = importlib.util.find_spec(package)
        if spec is not None:
            return spec
        # The distribution may carry another name than its module (mmcv-full holds mmcv).
        files = importlib.metadata.files(package) or ()
        modules = [file.parts[0] for file in files if file.name == "__init__.py" and len(file.parts) == 2]
        return importlib.util.find_spec(modules[0]) if modules else None

    def is_installed(package):
        try:
            spec = find_module(package)
        except importlib.metadata.PackageNotFoundError:
            return False
        return spec is not None and spec.origin is not None

    def get_installed_path(package):
        spec = find_module(package)
        if spec is None or spec.origin is None:
            raise RuntimeError(f"{package} has no module with a path of its own")
        return os.path.dirname(spec.origin)

    package_utils.is_installed = is_installed
    package_utils.get_installed_path = get_installed_path


def write_files_atomically(local_backend):
    """Lets checkpoints and texts appear under their name whole or not at all.

    Repairs: mmengine 0.10.7 fileio/backends/local_backend.py:77 and :101, which write in place,
    so that a killed run leaves half a checkpoint. Needed until: none yet.
    """

    def put(self, obj, filepath):
        replace_file(filepath, bytes(obj))

    def put_text(self, obj, filepath, encoding="utf-8"):
        replace_file(filepath, obj.encode(encoding))

    local_backend.LocalBackend.put = put
    local_backend.LocalBackend.put_text = put_text


def replace_file(path, content):
    """Writes `content` under `path` so that readers see the old file or the new one, never a part.

    Args:
        path (str | Path): The file; its directory is made if missing.
        content (bytes): What it shall hold.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same directory, since os.replace is atomic only inside one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name is durable once its directory is
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def init_dist_without_cuda(dist_utils):
    """Starts the process group with gloo, and without choosing a GPU, where there is no CUDA.

    Repairs: mmengine 0.10.7 dist/utils.py:123, :162 and :218, which call `torch.cuda.set_device`
    on every machine, and the `backend="nccl"` of every XTuner config. Needed until: none yet.
    """
    import torch

    original = dist_utils.init_dist

    @functools.wraps(original)
    def init_dist(launcher, backend="nccl", **kwargs):
        if torch.cuda.is_available():
            return original(launcher, backend=backend, **kwargs)
        set_device = torch.cuda.set_device
        torch.cuda.set_device = lambda device: None
        try:
            return original(launcher, backend="gloo" if backend == "nccl" else backend, **kwargs)
        finally:
            torch.cuda.set_device = set_device

    dist_utils.init_dist = init_dist


def wrap_cpu_models_without_device_ids(distributed):
    """Drops `device_ids` when the model to wrap lives on the CPU.

    Repairs: mmengine 0.10.7 runner/runner.py `wrap_model`, which always passes the local rank;
    DistributedDataParallel refuses it for CPU parameters. Needed until: none yet.
    """
    wrapper = distributed.MMDistributedDataParallel
    original = wrapper.__init__

    @functools.wraps(original)
    def __init__(self, module, *args, **kwargs):
        if all(parameter.device.type == "cpu" for parameter in module.parameters()):
            kwargs.pop("device_ids", None)
        original(self, module, *args, **kwargs)

    wrapper.__init__ = __init__


def look_for_unused_llava_layers(distributed):
    """Lets LLaVA's vision tower train on several processes without DeepSpeed.

    Repairs: xtuner 0.2.0 model/llava.py:337, which reads the tower's last layer but one, so that adapters of the last
    one never have a gradient; DistributedDataParallel stops unless it is told to look. Needed until: none yet.
    """
    wrapper = distributed.MMDistributedDataParallel
    original = wrapper.__init__

    @functools.wraps(original)
    def __init__(self, module, *args, **kwargs):
        llava = sys.modules.get("xtuner.model.llava")
        if llava is not None and isinstance(module, llava.LLaVAModel):
            if any(parameter.requires_grad for parameter in module.visual_encoder.parameters()):
                kwargs["find_unused_parameters"] = True
        original(self, module, *args, **kwargs)

    wrapper.__init__ = __init__


def train_mixed_on_cpu(amp_optimizer_wrapper):
    """Lets `AmpOptimWrapper` train without an accelerator, in the precision that it is told.

    Repairs: mmengine 0.10.7 optim/optimizer/amp_optimizer_wrapper.py:76, which refuses, :20, whose scaler knows CUDA
    alone, and runner/amp.py:133, which knows no fp16 on a CPU; every LLaVA config of XTuner asks for that.
    Needed until: none yet.
    """
    import torch

    wrapper = amp_optimizer_wrapper.AmpOptimWrapper
    original_init, original_context = wrapper.__init__, wrapper.optim_context
    accelerators = [getattr(amp_optimizer_wrapper, f"is_{name}_available") for name in ("cuda", "npu", "mlu", "musa")]

    @functools.wraps(original_init)
    def __init__(self, *args, **kwargs):
        if any(available() for available in accelerators):
            return original_init(self, *args, **kwargs)
        scaler = amp_optimizer_wrapper.GradScaler
        amp_optimizer_wrapper.is_cuda_available = lambda: True
        amp_optimizer_wrapper.GradScaler = functools.partial(torch.amp.GradScaler, "cpu")
        try:
            original_init(self, *args, **kwargs)
        finally:
            amp_optimizer_wrapper.is_cuda_available, amp_optimizer_wrapper.GradScaler = accelerators[0], scaler

    @functools.wraps(original_context)
    @contextlib.contextmanager
    def optim_context(self, model):
        if any(available() for available in accelerators):
            with original_context(self, model):
                yield
        else:
            dtype = self.cast_dtype or torch.float16
            with super(wrapper, self).optim_context(model), torch.autocast("cpu", dtype=dtype):
                yield

    wrapper.__init__, wrapper.optim_context = __init__, optim_context


def leave_out_short_warmups(param_scheduler):
    """Trains at the full learning rate from the start where a warm-up counted in epochs lasts less than two iterations.

    Repairs: mmengine 0.10.7 optim/scheduler/param_scheduler.py:784, which ends such a run with "end should be larger
    than begin" or, at one iteration, leaves it at the lowest learning rate for good. Needed until: none yet.
    """
    scheduler = param_scheduler.LinearParamScheduler
    original = scheduler.build_iter_from_epoch.__func__

    @functools.wraps(original)
    def build_iter_from_epoch(cls, *args, begin=0, end=param_scheduler.INF, epoch_length=None, **kwargs):
        first, last = (value if value == param_scheduler.INF else int(value * epoch_length) for value in (begin, end))
        if last - first >= 2:
            return original(cls, *args, begin=begin, end=end, epoch_length=epoch_length, **kwargs)
        kwargs = {**kwargs, "start_factor": kwargs.get("end_factor", 1.0), "by_epoch": False}
        return cls(*args, begin=first, end=first + 1, **kwargs)

    scheduler.build_iter_from_epoch = classmethod(build_iter_from_epoch)


def allow_checkpoint_types(module=None):
    """Lets `torch.load(weights_only=True)` read the message hub of an MMEngine checkpoint.

    Repairs: mmengine 0.10.7 runner/checkpoint.py:347 and xtuner 0.2.0 tools/utils.py:186, which
    call `torch.load` as it was before torch 2.6. The list is closed: MMEngine's history of scalars,
    the numpy types it is made of, and the dict that DeepSpeed checkpoints hold a config in.
    Needed until: mmengine 0.11.
    """
    import numpy as np
    import torch
    from mmengine.config import ConfigDict
    from mmengine.logging.history_buffer import HistoryBuffer

    multiarray = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray

    def statistics_method(owner, name):
        if owner is not HistoryBuffer or name not in ("min", "max", "current", "mean"):
            raise ValueError(f"checkpoint holds {owner}.{name}, a statistic of HistoryBuffer is expected")
        return getattr(HistoryBuffer, name)

    # Pickle writes the methods that a HistoryBuffer carries as calls of getattr. The real one would
    # open every allowed type to a hostile file, so the name leads to this narrow one.
    allowed = [HistoryBuffer, ConfigDict, np.ndarray, np.dtype, (statistics_method, "builtins.getattr")]
    for name in ("_reconstruct", "scalar"):
        # numpy 1 and numpy 2 write the same function under two names.
        allowed.append((getattr(multiarray, name), f"numpy.core.multiarray.{name}"))
        allowed.append((getattr(multiarray, name), f"numpy._core.multiarray.{name}"))
    allowed += [type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")]
    torch.serialization.add_safe_globals(allowed)


def find_readable_checkpoint(checkpoint):
    """Resumes from the newest checkpoint that exists when `last_checkpoint` names none.

    Repairs: mmengine 0.10.7 runner/checkpoint.py:807, which trusts a file that
    hooks/checkpoint_hook.py:460 writes in place and whose target line 433 may already have
    deleted when a run is killed while it saves. Needed until: none yet.
    """
    original = checkpoint.find_latest_checkpoint

    @functools.wraps(original)
    def find_latest_checkpoint(path):
        recorded = original(path)
        if recorded and os.path.exists(recorded):
            return recorded
        numbered = [
            (int(file.stem.rsplit("_", 1)[1]), str(file))
            for pattern in ("iter_*.pth", "epoch_*.pth")
            for file in Path(path).glob(pattern)
            if file.stem.rsplit("_", 1)[1].isdigit()
        ]
        return max(numbered)[1] if numbered else None

    checkpoint.find_latest_checkpoint = find_latest_checkpoint


def restore_is_safetensors_available(transformers_utils):
    """Puts back `transformers.utils.is_safetensors_available`.

    Repairs: xtuner 0.2.0 utils/handle_moe_load_and_save.py:16; transformers 5 always has
    safetensors and dropped the question. Needed until: none yet.
    """
    if not hasattr(transformers_utils, "is_safetensors_available"):
        transformers_utils.is_safetensors_available = lambda: True


def restore_no_init_weights(modeling_utils):
    """Puts back `transformers.modeling_utils.no_init_weights`.

    Repairs: xtuner 0.2.0 model/reward.py:25; transformers 5 moved it to
    `transformers.initialization`. Needed until: none yet.
    """
    if not hasattr(modeling_utils, "no_init_weights"):
        from transformers import initialization

        modeling_utils.no_init_weights = initialization.no_init_weights


def accept_load_in_bits(modeling_utils):
    """Turns the keywords `load_in_8bit` and `load_in_4bit` into a `BitsAndBytesConfig`.

    Repairs: xtuner 0.2.0 tools/chat.py:187 and tools/mmbench.py:312, which pass `load_in_8bit`
    always; transformers 5 hands it to the model class, which refuses it. Needed until: none yet.
    """
    model_class = modeling_utils.PreTrainedModel
    original = model_class.from_pretrained.__func__

    @functools.wraps(original)
    def from_pretrained(cls, *args, **kwargs):
        wanted = {key: kwargs.pop(key) for key in ("load_in_8bit", "load_in_4bit") if key in kwargs}
        if any(wanted.values()) and kwargs.get("quantization_config") is None:
            from transformers import BitsAndBytesConfig

            kwargs["quantization_config"] = BitsAndBytesConfig(**wanted)
        return original(cls, *args, **kwargs)

    model_class.from_pretrained = classmethod(from_pretrained)


def register_models(modeling_auto):
    """Registers our configuration and model classes when the Auto classes first appear.

    Lets an exported folder load without `trust_remote_code`. Not a repair of anything upstream.
    """
    try:
        import xtuner_ext.modeling  # noqa: F401
    except ImportError as error:
        # `from transformers import LlamaForCausalLM` asks for the Auto classes when that class is not there yet.
        logger.debug("xtuner_ext models are registered at their first use: %s", error)
        _register_at_first_use(sys.modules["transformers.models.auto.configuration_auto"].AutoConfig)


def _register_at_first_use(auto_config):
    original = auto_config.from_pretrained

    @functools.wraps(original.__func__)
    def from_pretrained(cls, *args, **kwargs):
        auto_config.from_pretrained = original
        import xtuner_ext.modeling  # noqa: F401

        return original(*args, **kwargs)

    auto_config.from_pretrained = classmethod(from_pretrained)


def add_configs(configs):
    """Adds our configs to `xtuner list-cfg`, `copy-cfg`, `train` and every other lookup by name.

    Repairs: xtuner 0.2.0 configs/__init__.py:5, which only walks its own folder.
    Needed until: none yet.
    """
    from xtuner_ext.cli import config_names

    configs.cfgs_name_path.update(config_names())


def encode_without_bos(dataset_utils):
    """Encodes nothing for a beginning-of-sequence token that the tokenizer does not have.

    Repairs: xtuner 0.2.0 dataset/utils.py:15, which knows "Qwen2TokenizerFast" by name, a class
    that transformers 5 calls "Qwen2Tokenizer". Needed until: none yet.
    """
    original = dataset_utils.get_bos_eos_token_ids

    @functools.wraps(original)
    def get_bos_eos_token_ids(tokenizer):
        bos, eos = original(tokenizer)
        return [] if bos is None else bos, [] if eos is None else eos

    dataset_utils.get_bos_eos_token_ids = get_bos_eos_token_ids


def map_with_as_many_processes_as_help(huggingface):
    """Tokenises with one process for each core, and small data sets in this one.

    Repairs: xtuner 0.2.0 dataset/huggingface.py:271, which forks 32 processes four times whatever the machine and the
    data set, and dataset/llava.py:63, which has no option for it. Needed until: none yet.
    """
    original = huggingface.process_hf_dataset

    @functools.wraps(original)
    def process_hf_dataset(dataset, *args, map_num_proc=32, **kwargs):
        samples = [len(part) for part in dataset.values()] if isinstance(dataset, dict) else []
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        if cores == 1 or (samples and max(samples) < 1000):
            map_num_proc = None  # forking costs seconds
        return original(dataset, *args, map_num_proc=map_num_proc and min(map_num_proc, cores), **kwargs)

    huggingface.process_hf_dataset = process_hf_dataset


def give_projector_tied_keys(modeling_projector):
    """Gives LLaVA's projector the attribute that loading a model looks for.

    Repairs: xtuner 0.2.0 model/modules/projector/modeling_projector.py:18, which does not call
    `post_init`; transformers 5 sets `all_tied_weights_keys` there. Needed until: none yet.
    """
    if not hasattr(modeling_projector.ProjectorModel, "all_tied_weights_keys"):
        modeling_projector.ProjectorModel.all_tied_weights_keys = {}


def checkpoint_projector_in_the_new_way(modeling_projector):
    """Recomputes LLaVA's projector through the function that transformers hands out.

    Repairs: xtuner 0.2.0 model/modules/projector/modeling_projector.py:41, which transformers 5 warns about each time,
    and :48, whose missing `use_reentrant` torch will refuse. Needed until: none yet.
    """
    projector = modeling_projector.ProjectorModel

    def forward(self, x):
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(self.model, x)
        return self.model(x)

    if "_set_gradient_checkpointing" in vars(projector):
        del projector._set_gradient_checkpointing
        projector.forward = forward


def chat_about_images_within_reach(evaluate_chat_hook):
    """Leaves out the evaluation images that can not be read, with a warning, instead of ending the run.

    Repairs: xtuner 0.2.0 engine/hooks/evaluate_chat_hook.py:52, which fetches an example picture from the network, for
    as long as that takes, in every LLaVA config; training machines often have none. Needed until: none yet.
    """
    hook, load = evaluate_chat_hook.EvaluateChatHook, evaluate_chat_hook.load_image
    original = hook.__init__

    @functools.lru_cache(maxsize=1)  # the same picture goes with every question
    def load_image(source):
        import requests

        try:
            if source.startswith(("http://", "https://")):
                answer = requests.get(source, timeout=10)
                answer.raise_for_status()
                source = io.BytesIO(answer.content)
                from PIL import Image

                return Image.open(source).convert("RGB")
            return load(source)
        except (requests.RequestException, OSError) as error:
            logger.warning("%s can not be read, no question is asked about it: %s", source, error)
            return None

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.evaluation_images is not None:
            pairs = [pair for pair in zip(self.evaluation_images, self.evaluation_inputs) if pair[0] is not None]
            self.evaluation_images, self.evaluation_inputs = [[pair[i] for pair in pairs] for i in (0, 1)]

    evaluate_chat_hook.load_image, hook.__init__ = load_image, __init__


def read_select_layer_as_number(argparse):
    """Lets `--visual-select-layer` be given.

    Repairs: xtuner 0.2.0 tools/chat.py:59, tools/mmbench.py:58 and tools/eval_refcoco.py:66, which give it no type, so
    that a tuple of hidden states is asked for its "-2". Needed until: none yet.
    """
    original = argparse.ArgumentParser.add_argument

    @functools.wraps(original)
    def add_argument(self, *names, **options):
        if "--visual-select-layer" in names:
            options.setdefault("type", int)
        return original(self, *names, **options)

    argparse.ArgumentParser.add_argument = add_argument


def leave_attention_to_transformers(dispatch):
    """Keeps the attention that a model was built with, flash-attn's where the config asks for it.

    Repairs: xtuner 0.2.0 model/modules/dispatch/__init__.py:182, which with flash-attn installed replaces attention by
    copies made for transformers 4.48: they do not know transformers 5's cache, so that chats in training see one token.
    Sequences split over GPUs need the copies. Needed until: none yet.
    """
    original = dispatch.dispatch_attn_forward

    @functools.wraps(original)
    def dispatch_attn_forward(model):
        from xtuner.parallel.sequence import get_sequence_parallel_world_size

        if get_sequence_parallel_world_size() > 1:
            original(model)

    dispatch.dispatch_attn_forward = dispatch_attn_forward


def replace_cli(entry_point):
    """Puts our front door behind the stock `xtuner` command.

    Repairs: xtuner 0.2.0 entry_point.py:309 and :324, which drop the status of the tool they run
    and call whatever `python` is first on PATH. Needed until: none yet.
    """

    def cli():
        from xtuner_ext.cli.main import run

        return run()

    entry_point.cli = cli
    package = sys.modules.get("xtuner")
    if hasattr(package, "cli"):
        package.cli = cli


def fill_onebit_optimizers(onebit):
    """Stands in for DeepSpeed's 1-bit optimizers, which refuse to be built.

    Repairs: mmengine 0.10.7 _strategy/deepspeed.py:44, which imports them whether or not a config
    uses them; DeepSpeed 0.19.8 removed them. Needed until: none yet.
    """

    def refuse(self, *args, **kwargs):
        raise RuntimeError(f"{type(self).__name__} is not part of the installed DeepSpeed")

    for name in ("OnebitAdam", "OnebitLamb", "ZeroOneAdam"):
        setattr(onebit, name, type(name, (), {"__init__": refuse, "__module__": onebit.__name__}))


def keep_four_bits_differentiable(bitsandbytes_modules):
    """Leaves 4-bit weights of a CPU in the layout that can be trained through.

    Repairs: bitsandbytes 0.50.2 nn/modules.py:594, which on CPUs with AVX512-bf16 rearranges weights at the first
    forward pass in evaluation mode; gradients of later training end at such a layer without a word, and layers whose
    width is no multiple of 32 fail. Needed until: none yet.
    """
    bitsandbytes_modules.has_avx512bf16 = lambda: False


def train_one_dtype_under_zero3(deepspeed_strategy):
    """Casts what trains to the precision of the run before ZeRO-3 lays it end to end.

    Repairs: xtuner 0.2.0 engine/_strategy/deepspeed.py:24, which hands fp32 adapters over beside half-precision
    weights; DeepSpeed 0.19 asserts one dtype. Needed until: none yet.
    """
    import torch

    strategy = deepspeed_strategy.DeepSpeedStrategy
    original = strategy._wrap_model

    @functools.wraps(original)
    def _wrap_model(self, model):
        enabled = {name: self.config.get(name, {}).get("enabled") is True for name in ("bf16", "fp16")}
        dtype = torch.bfloat16 if enabled["bf16"] else torch.float16 if enabled["fp16"] else None
        if dtype is not None and self.config.get("zero_optimization", {}).get("stage") == 3:
            for parameter in model.parameters():
                # Those that were read under ZeRO-3 are empty here, and have the precision of the run already.
                if parameter.requires_grad and parameter.is_floating_point() and not hasattr(parameter, "ds_id"):
                    parameter.data = parameter.data.to(dtype)
        return original(self, model)

    strategy._wrap_model = _wrap_model


def gather_mixers_under_zero3(deepspeed_strategy):
    """Tells ZeRO-3 that a mixer reads its convolution's and norms' weights itself.

    DeepSpeed learns that in training alone: a chat before the first iteration, which XTuner's hook holds, would
    meet empty weights. Not a repair of anything upstream.
    """
    strategy = deepspeed_strategy.DeepSpeedStrategy
    original = strategy._wrap_model

    @functools.wraps(original)
    def _wrap_model(self, model):
        wrapped = original(self, model)
        if self.config.get("zero_optimization", {}).get("stage") == 3:
            import torch
            from deepspeed.runtime.zero import register_external_parameter

            from xtuner_ext.modeling import Mamba2Mixer

            for mixer in (module for module in model.modules() if isinstance(module, Mamba2Mixer)):
                for part in mixer.modules():
                    for parameter in part.parameters(recurse=False):
                        if part is not mixer and not isinstance(part, torch.nn.Linear):
                            register_external_parameter(mixer, parameter)
        return wrapped

    strategy._wrap_model = _wrap_model


def keep_optimizer_under_deepspeed(train_tool):
    """Lets DeepSpeed train the groups of parameters that a config makes, and ours in the precision that it asks for.

    Repairs: xtuner 0.2.0 tools/train.py:367, which keeps the optimizer's arguments alone, and :355, which casts every
    weight to half precision; the decay rates of a mixer are none the better for it. Needed until: none yet.
    """
    check_cfg, registry, kept = train_tool.check_cfg, train_tool.RUNNERS, {}

    def check_and_remember(cfg, args):
        check_cfg(cfg, args)
        kept["wrapper"] = cfg.get("optim_wrapper") or {}

    class Runners:
        """The registry, for the one call that the tool makes of it."""

        @staticmethod
        def build(cfg):
            if cfg.optim_wrapper.get("type") == "DeepSpeedOptimWrapper":
                wrapper = kept["wrapper"]
                for key in {"constructor", "paramwise_cfg"} & set(wrapper):
                    # dict's own method, since a config that holds what its names stand for cannot be printed.
                    cfg.optim_wrapper[key] = dict.get(wrapper, key)
                _keep_precision(cfg, wrapper)
            return registry.build(cfg)

    train_tool.check_cfg, train_tool.RUNNERS = check_and_remember, Runners


def _keep_precision(cfg, wrapper):
    from xtuner_ext.distill.base import HybridModel

    model = cfg.model["type"]
    if not (isinstance(model, type) and issubclass(model, HybridModel)):
        return
    kind = getattr(wrapper["type"], "__name__", wrapper["type"])
    if kind == "AmpOptimWrapper" and wrapper.get("dtype") != "bfloat16":
        return  # fp16 needs DeepSpeed's own scaling of the loss
    settings = {"fp16": {"enabled": False}, "bf16": {"enabled": False}}
    if kind in ("AmpOptimWrapper", "Bfloat16OptimWrapper"):
        # No modules are "safe": gradients are summed in the precision of their weights.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    cfg.strategy["config"].update(settings)
