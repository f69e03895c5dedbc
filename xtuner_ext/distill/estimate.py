"""What a stage will need of a GPU, found without weights, data or a GPU.

Weights, gradients and optimizer states follow from the shapes of the parameters. Activations are found by running one
layer of each kind, forwards and backwards, on tensors that have a shape and no content, and counting what is alive:

    stages 1 and 2   hidden states + peak of one layer: each layer back-propagates before the next one runs
    stage 3          what autograd keeps of all layers + the larger of one layer's backward pass and the KL's chunk
    checkpointed     layer inputs + the larger of one layer's forward and backward pass and the KL's chunk

Axis letters: B batch, L length, D model width, H heads, P head width, N state width, Q chunk length.
"""

import contextlib
import weakref

import torch
from accelerate import init_empty_weights
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from xtuner.registry import BUILDER

from ..convert.teacher import read_model_config, resolve_folder
from ..data.dataset import samples_config
from ..errors import UserError
from ..ops.ssd import SSD
from .autocast import autocast_dtype
from .layer_selection import evenly_spaced
from .losses import chunked_divergence, rows_per_chunk
from .model import DistillModel

ZERO_LEVELS = (0, 1, 2, 3)
# Tokens between the states that our Triton scan writes in training.
KERNEL_CHUNK = 64
# The kernels' context, libraries and the allocator's fragments, in bytes.
OVERHEAD = 2 * 2**30
# DeepSpeed's two buffers in which gradients travel, in elements, as XTuner's configurations have them.
ZERO_BUCKETS = 2 * 500_000_000
# Parts of a checkpoint file that are not numbers, in bytes: names and headers of each tensor, and everything else.
BYTES_PER_TENSOR, BYTES_PER_FILE = 335, 16_000


def estimate_stage(config, gpus=1, memory=80.0, length=None, kernels=True):
    """Estimate one stage.

    Args:
        config (mmengine.config.Config): Of a stage.
        gpus (int): Training processes.
        memory (float): Of one GPU, GiB.
        length (int, optional): Tokens of a row; the config's longest when absent.
        kernels (bool): The scan runs as a fused kernel, as on GPUs; False counts the torch twin, which keeps more.

    Returns:
        dict: Counts, bytes by name, and ``zero``, for each ZeRO level the bytes of one GPU and whether they fit.

    Raises:
        UserError: For a config of another model, or one that cannot be built.
    """
    model = build_structure(config)
    loader, wrapper = config.train_dataloader, config.optim_wrapper
    samples = samples_config(loader.dataset)
    batch, accumulate = loader.batch_size, wrapper.get("accumulative_counts", 1)
    length = length or loader.dataset.get("row_length") or samples.max_length
    iterations = config.train_cfg.max_iters
    trained = [p for p in model.parameters() if p.requires_grad]
    activations = activation_bytes(model, batch, length, autocast_dtype(wrapper), kernels)
    report = {
        "stage": model.stage,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in trained),
        "weight_bytes": _bytes(model.parameters()),
        "gradient_bytes": _bytes(trained),
        # Two moments; torch gives them the dtype of their parameter.
        "optimizer_bytes": 2 * _bytes(trained),
        "activation_bytes": activations,
        "checkpoint_bytes": 3 * _bytes(trained) + 4 * len(trained) * BYTES_PER_TENSOR + BYTES_PER_FILE,
        "batch_size": batch,
        "length": length,
        "accumulate": accumulate,
        "gpus": gpus,
        "tokens_per_step": batch * accumulate * gpus * length,
        "steps": iterations // accumulate,
        "tokens": iterations * batch * gpus * length,
    }
    recomputes = bool(config.model.get("use_activation_checkpointing"))
    report["recomputes"] = recomputes
    taken = activations["checkpointed" if recomputes else "total"]
    report["zero"] = {str(level): _on_one_gpu(model, trained, taken, gpus, memory, level) for level in ZERO_LEVELS}
    return report


def build_structure(config):
    """Build a config's model on the meta device.

    Args:
        config (mmengine.config.Config): Of a stage.

    Returns:
        DistillModel: Shapes and dtypes, no values.

    Raises:
        UserError: For a config of another model, or one that cannot be built.
    """
    settings = config.get("model") or {}
    if settings.get("type") is not DistillModel:
        raise UserError(f"{config.filename}: model.type is no DistillModel, the stages of a distillation are expected")
    settings = {key: settings[key] for key in settings}
    layers, selection = settings.get("attention_layers"), config.get("layer_selection")
    if isinstance(layers, str) and selection:
        # Which they will be is not known before stage 2; as many anywhere need the same.
        folder = resolve_folder(settings["llm"]["pretrained_model_name_or_path"])
        settings["attention_layers"] = evenly_spaced(selection["keep"], read_model_config(folder)[1].num_hidden_layers)
    with init_empty_weights():
        model = BUILDER.build(settings)
        model.llm.tie_weights()
    return model


def activation_bytes(model, batch, length, autocast=None, kernels=True):
    """Bytes of everything that exists in a step besides weights, gradients and optimizer states.

    Args:
        model (DistillModel): On the meta device; holds contentless CPU tensors afterwards.
        batch (int): Rows, B.
        length (int): Tokens, L.
        autocast (torch.dtype, optional): Of automatic mixed precision.
        kernels (bool): See :func:`estimate_stage`.

    Returns:
        dict: ``total`` at the peak; ``kept`` by autograd at once; ``layer``, the peak inside of one; in stage 3 also
        ``divergence`` and ``checkpointed``, the total when layers are recomputed.
    """
    scan = _fused_scan() if kernels else contextlib.nullcontext()
    precision = contextlib.nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast)
    # Positions are looked at, so that these few are real ones.
    hidden = torch.empty(batch, length, model.llm.config.hidden_size, dtype=model.llm.model.embed_tokens.weight.dtype)
    words = ["full_attention"] * len(model.llm.model.layers) if model.stage < 3 else model.student_config.layer_types
    model.llm.config.layer_types = list(words)
    context = model.llm.model.layer_context(hidden)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, scan, precision:
        hidden, context = tree_map_only(torch.Tensor, mode.from_tensor, (hidden, context))
        _leave_meta(model)
        if model.stage < 3:
            return _aligned(model, hidden, context)
        return _end_to_end(model, hidden, context, "cuda" if kernels else "cpu")


def _leave_meta(model):
    # Autocast and masks are those of a device; Module.to would not keep shared weights shared.
    made = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    empty = torch.empty_like(parameter, device="cpu")
                    made[parameter] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[parameter]


def _aligned(model, hidden, context):
    kinds, count = {"text": torch.ones(hidden.shape[:2], dtype=torch.bool)}, _LiveBytes()
    with count:
        model.align_layer(model.llm.model.layers[0], hidden, context, None, kinds)
    # What goes in stays, and the gradients of one layer are handed out later.
    total = count.peak + _bytes([hidden, *_tensors(context)])
    return {"total": total, "layer": count.peak}


def _end_to_end(model, hidden, context, device):
    decoder, words = model.llm.model, model.student_config.layer_types
    kept, peaks = {}, {}
    for word in set(words):
        layer = decoder.layers[words.index(word)]
        count = _LiveBytes()
        with count:
            output = layer(hidden.detach().requires_grad_(), **context)
            peaks[word] = count.peak
            kept[word] = count.live
            output.backward(torch.empty_like(output))
            peaks[word] = max(peaks[word], count.peak)
            for parameter in layer.parameters():
                parameter.grad = None
    rows = hidden.flatten(0, 1)
    heads = (model.llm.lm_head.weight, model.teacher_head)
    chunk = _LiveBytes()
    with chunk:
        options = {key: model.divergence[key] for key in ("direction", "temperature", "chunk_rows")}
        options["chunk_rows"] = options["chunk_rows"] or rows_per_chunk(heads[0], device)
        chunked_divergence(rows.detach().requires_grad_(), heads[0], rows, heads[1], **options)
    # Embeddings, both models' last hidden states before and after the norm.
    around = _bytes(_tensors(context)) + 6 * _bytes([hidden])
    sums = sum(kept[word] for word in words)
    widest = max(peaks[word] - kept[word] for word in peaks)
    return {
        "total": around + sums + max(widest, chunk.peak),
        "kept": sums,
        "layer": max(peaks.values()),
        "divergence": chunk.peak,
        "checkpointed": around + len(words) * _bytes([hidden]) + max(*peaks.values(), chunk.peak),
    }


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside and still alive, and their highest sum."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id(t.untyped_storage()) for t in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, lambda tensor: self._add(tensor, given), result)
        return result

    def _add(self, tensor, given):
        storage = tensor.untyped_storage()
        # Views and results in place are no new memory.
        if id(storage) in given or id(storage) in self.known:
            return
        size = storage.nbytes()
        self.known.add(id(storage))
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, id(storage), size)

    def _free(self, key, size):
        self.known.discard(key)
        self.live -= size


@contextlib.contextmanager
def _fused_scan():
    # The kernels themselves run on a GPU only, and not on tensors without content.
    before, SSD.twin = SSD.twin, _kernel_like
    try:
        yield
    finally:
        SSD.twin = before


class _KernelLike(torch.autograd.Function):
    """Allocates and keeps what our Triton scan does; computes nothing."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C):
        _states(x, B)
        ctx.save_for_backward(x, dt, A, B, C)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, outer):
        x, dt, A, B, C = ctx.saved_tensors
        states = _states(x, B), _states(x, B)
        # One share of B's and C's gradients by head, summed over groups afterwards.
        shares = [x.new_empty(*x.shape[:3], t.shape[-1]) for t in (B, C)]
        gradients = [torch.empty_like(tensor) for tensor in (x, dt, A, B, C)]
        del states, shares
        return tuple(gradients)


def _states(x, B):
    batch, length, heads, width = x.shape
    size = (batch, heads, -(-length // KERNEL_CHUNK), width, B.shape[-1])
    x.new_empty(size, dtype=torch.float32)
    return x.new_empty(size)


def _kernel_like(x, dt, A, B, C, *, dt_bias, **_):
    dt = dt if dt_bias is None else dt + 0 * dt_bias
    return _KernelLike.apply(x, dt, A, B, C), None


def _on_one_gpu(model, trained, activations, gpus, memory, level):
    count = sum(parameter.numel() for parameter in trained)
    share = gpus if level else 1
    weights, gradients = _bytes(model.parameters()), _bytes(trained)
    # DeepSpeed's AdamW works on an fp32 copy of the weights.
    optimizer = 12 * count / share if level else 2 * gradients
    # Data-parallel training sums gradients in buckets of their own.
    buckets = (gradients if gpus > 1 else 0) if level == 0 else ZERO_BUCKETS * max(p.element_size() for p in trained)
    row = {
        "weights": weights / (gpus if level == 3 else 1),
        "gradients": gradients / (share if level >= 2 else 1),
        "buckets": buckets,
        "optimizer": optimizer,
        "activations": activations,
    }
    row = {key: int(value) for key, value in row.items()}
    row["total"] = sum(row.values()) + OVERHEAD
    # ZeRO-3 takes weights away that a layer-local backward pass needs.
    row["possible"] = level < 3 or model.stage == 3
    row["fits"] = row["possible"] and row["total"] <= memory * 2**30
    return row


def _tensors(tree):
    found = []
    tree_map_only(torch.Tensor, found.append, tree)
    return found


def _bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
