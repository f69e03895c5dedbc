"""python benchmarks/decode.py: time per token and cache bytes against context length, teacher, hybrid and linear.

Random weights of a real shape; the caches are filled with random keys, values and states instead of by reading a
context, which changes no time. Peers in the same run: transformers' own Llama of the teacher's shape with its default
growing cache, and the teacher with a static cache, on a GPU also as a CUDA graph, which is the strong baseline:

    python benchmarks/decode.py --device cuda --shape hovle --contexts 1024 8192 32768 65536 105472 131072
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from training import machine
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from xtuner_ext.modeling import HybridCache, HybridVLConfig, HybridVLForCausalLM, layer_types_from_attention
from xtuner_ext.modeling.cache import PreallocatedLayer

WINDOWED = dict(qk_norm="l2", use_rope=True, gate=True, gate_bias=True, window=64, sink=True)
SHAPES = {
    "smollm2": dict(
        num_hidden_layers=30, hidden_size=576, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
        vocab_size=49152, tie_word_embeddings=True, mixer=WINDOWED,
    ),
    "hovle": dict(
        num_hidden_layers=32, hidden_size=2048, num_attention_heads=16, num_key_value_heads=8, intermediate_size=8192,
        vocab_size=92553, tie_word_embeddings=False, mixer=dict(use_rope=True, gate=True, gate_bias=True),
    ),
    # For the tests.
    "tiny": dict(
        num_hidden_layers=4, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
        vocab_size=256, tie_word_embeddings=True, mixer=WINDOWED,
    ),
}
FLAT_BAR = 1.10
LINEAR_BAR = 1.10


def parse_args():
    """argparse.Namespace: The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 65536, 131072])
    parser.add_argument("--repeats", type=int, default=15, help="steps of every row, interleaved; medians are shown")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 where the processor multiplies it")
    parser.add_argument("--bandwidth", type=float, help="GB/s of memory, for the roofline; measured when absent")
    parser.add_argument("--max-batch", type=int, metavar="CONTEXT", help="also the largest batch that fits there; GPU")
    parser.add_argument("--prefill", type=int, nargs="*", default=[16384, 65536], help="lengths to read; none: skip")
    parser.add_argument("--prefill-layers", type=int, default=4, help="layers of the model that reads them, on a CPU")
    parser.add_argument("--rows", help="file for one JSON object a row")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--read", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    """Time every model at every context, print the tables."""
    args = parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    dtype = getattr(torch, args.dtype) if args.dtype else default_dtype(args.device)
    if args.read:
        print(json.dumps(read(args, dtype)))
        return
    bandwidth = args.bandwidth or measure_bandwidth(args.device)
    runners = make_runners(args, dtype, max(args.contexts))
    rows = time_steps(runners, args, bandwidth)
    print_steps(rows, args, dtype, bandwidth)
    if args.max_batch:
        print_batches(runners, args, dtype)
    del runners
    prefill = {length: [] for length in args.prefill}
    for _ in range(2):
        for length in prefill:
            prefill[length].append(read_apart(args, length))
    if prefill:
        print_prefill(prefill, args)
    print(f"\n{machine()}, {str(dtype).removeprefix('torch.')}")
    if args.rows:
        with open(args.rows, "w") as file:
            json.dump(rows, file, indent=1)
    if args.json:
        print(json.dumps({"machine": machine(), "claims": claims(rows, prefill)}))


# ---------------------------------------------------------------- models


def make_config(shape, kind):
    """HybridVLConfig: Of the ``teacher``, ``hybrid`` (the first of every four layers attends) or ``linear`` model."""
    layers = SHAPES[shape]["num_hidden_layers"]
    attention = {"teacher": range(layers), "hybrid": range(0, layers, 4), "linear": ()}[kind]
    return HybridVLConfig(
        **SHAPES[shape], layer_types=layer_types_from_attention(list(attention), layers), eos_token_id=None,
        max_position_embeddings=1 << 18,
    )


def build(make, device, dtype):
    """nn.Module: A model with random weights, made on its device in its own precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            return make().eval()
    finally:
        torch.set_default_dtype(before)


def default_dtype(device):
    """torch.dtype: bf16 where it is multiplied in hardware."""
    return torch.bfloat16 if device == "cuda" or torch.cpu._is_avx512_bf16_supported() else torch.float32


def random_like(tensor):
    """Fill a tensor with random numbers, of which 4,096 tokens' worth repeat."""
    flat = tensor.view(-1)
    block = torch.randn(min(flat.numel(), 1 << 22), device=tensor.device).mul_(0.1).to(tensor.dtype)
    for part in flat.split(block.numel()):
        part.copy_(block[: part.numel()])


class Runner:
    """One model with one kind of cache, whose context can be set to any length.

    Args:
        model (nn.Module): The model.
        config (HybridVLConfig): Its configuration.
        name (str): ``teacher``, ``hybrid`` or ``linear``.
        path (str): How it decodes, for the table.
        room (int): Longest context.
        batch (int): Rows.
        graph (bool): Whether single tokens are read by a CUDA graph.
    """

    def __init__(self, model, config, name, path, room, batch, graph=False):
        self.model, self.config, self.name, self.path = model, config, name, path
        self.token = torch.full((batch, 1), 7, device=model.device)
        self.cache = HybridCache(config, max_length=room + 1)
        with torch.no_grad():
            model(self.token, past_key_values=self.cache)
        for tensor in self.cache.tensors():
            random_like(tensor)
        self.cache.cuda_graph = graph

    def step(self, context):
        """Read one token after ``context`` others."""
        self.cache.seen_tokens = context
        for layer in self.cache.layers:
            if isinstance(layer, PreallocatedLayer):
                layer.length = context
        return self.model(self.token, past_key_values=self.cache, use_cache=True)

    def cache_bytes(self, context):
        """int: Bytes of a cache that has room for ``context`` tokens, allocated for it."""
        cache = HybridCache(self.config, max_length=context)
        with torch.no_grad():
            self.model(self.token, past_key_values=cache)
        return cache.nbytes()


class Growing(Runner):
    """transformers' own Llama and default cache; its keys are views of another runner's buffers.

    Args:
        model (LlamaForCausalLM): The model.
        static (Runner): The teacher with a static cache of as many rows.
    """

    def __init__(self, model, static):
        self.model, self.config, self.static = model, static.config, static
        self.name, self.path, self.token = "teacher", "growing cache (transformers)", static.token
        self.cache = static.cache

    def step(self, context):
        """Read one token after ``context`` others."""
        cache = DynamicCache(config=self.model.config)
        for layer, static in zip(cache.layers, self.static.cache.layers):
            layer.lazy_initialization(static.keys, static.values)
            layer.keys, layer.values = static.keys[:, :, :context], static.values[:, :, :context]
        return self.model(self.token, past_key_values=cache, use_cache=True)

    def cache_bytes(self, context):
        """int: Bytes of the cache after a step that makes ``context`` tokens."""
        layers = self.step(context - 1).past_key_values.layers
        return sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values))


def make_llama(config):
    """LlamaForCausalLM: transformers' own model of the teacher's shape."""
    names = (
        "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size",
        "vocab_size", "tie_word_embeddings", "max_position_embeddings",
    )
    return LlamaForCausalLM(LlamaConfig(**{name: getattr(config, name) for name in names}))


def make_runners(args, dtype, room, batch=None):
    """list[Runner]: The baselines, then the students."""
    batch, runners, cuda = batch or args.batch, [], args.device == "cuda"
    for kind in ("teacher", "hybrid", "linear"):
        config = make_config(args.shape, kind)
        model = build(functools.partial(HybridVLForCausalLM, config), args.device, dtype)
        static = Runner(model, config, kind, "static cache" if kind != "linear" else "states", room, batch)
        if kind == "teacher":
            llama = build(functools.partial(make_llama, config), args.device, dtype)
            runners.append(Growing(llama, static))
        runners.append(static)
        if cuda:
            runners.append(graphed(static))
    return runners


def graphed(static):
    """Runner: The same model and cache, its steps replayed as a CUDA graph."""
    runner = object.__new__(Runner)
    runner.__dict__.update(static.__dict__, path="CUDA graph")
    runner.cache = object.__new__(HybridCache)
    runner.cache.__dict__.update(static.cache.__dict__, graphs={}, cuda_graph=True)
    return runner


# ---------------------------------------------------------------- measuring


def synchronize(device):
    """Wait for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def clock(device):
    """float: Seconds; of this process on a CPU, which others may share."""
    return time.perf_counter() if device == "cuda" else time.process_time()


def measure_bandwidth(device):
    """float: GB/s at which memory is read and written, best of five copies of 512 MiB."""
    source = torch.ones(1 << 27, device=device)
    target, best = torch.empty_like(source), 0.0
    for _ in range(6):
        synchronize(device)
        begun = clock(device)
        target.copy_(source)
        synchronize(device)
        best = max(best, 2 * source.numel() * 4 / (clock(device) - begun) / 1e9)
    return best


def weight_bytes(model):
    """int: Bytes of weights that one token reads; of an input embedding that is not the head too, a row."""
    rest = set(model.parameters()) - ({model.get_input_embeddings().weight} - {model.lm_head.weight})
    return sum(p.numel() * p.element_size() for p in rest)


@torch.no_grad()
def time_steps(runners, args, bandwidth):
    """list[dict]: One row per model, kind of cache and context."""
    seconds, peak = {}, {}
    for repeat in range(args.repeats + 2):
        for context in args.contexts:
            for runner in runners:
                key = (runner.name, runner.path, context)
                if args.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                synchronize(args.device)
                begun = clock(args.device)
                runner.step(context)
                synchronize(args.device)
                taken = clock(args.device) - begun
                if args.device == "cuda":
                    peak[key] = torch.cuda.max_memory_allocated()
                # The first steps compile, capture and allocate.
                if repeat >= 2:
                    seconds.setdefault(key, []).append(taken)
    rows = []
    for runner in runners:
        for context in args.contexts:
            key = (runner.name, runner.path, context)
            cache, weights = runner.cache_bytes(context), weight_bytes(runner.model)
            median = statistics.median(seconds[key])
            rows.append({
                "shape": args.shape, "model": runner.name, "path": runner.path, "context": context,
                "batch": args.batch, "seconds": median, "tokens_per_second": args.batch / median,
                "cache_bytes": cache, "predicted_bytes": args.batch * predicted(runner, context),
                "weight_bytes": weights, "roofline_seconds": (weights + cache) / bandwidth / 1e9,
                "max_memory_allocated": peak.get(key), "device": args.device,
            })
    return rows


def predicted(runner, context):
    """int: Bytes of one sequence's cache by the configuration."""
    size = next(runner.model.parameters()).element_size()
    return runner.config.cache_bytes(context, dtype_bytes=size)


def print_steps(rows, args, dtype, bandwidth):
    """Print milliseconds a token, cache and roofline against context."""
    tokens = " | ".join(f"{context:,}" for context in args.contexts)
    head = f"|---|---|{'---:|' * len(args.contexts)}"
    paths = dict.fromkeys((row["model"], row["path"]) for row in rows)

    def table(title, cell):
        print(f"\n{title}\n\n| model | decoding | {tokens} |\n{head}")
        for path in paths:
            cells = [cell(row) for row in rows if (row["model"], row["path"]) == path]
            print(f"| {path[0]} | {path[1]} | {' | '.join(cells)} |")

    print(f"{args.shape}, batch {args.batch}, {str(dtype).removeprefix('torch.')}, by tokens of context")
    table("Milliseconds a token (median)", lambda row: f"{1e3 * row['seconds']:.2f}")
    table("Tokens a second", lambda row: f"{row['tokens_per_second']:.1f}")
    table("Cache, MiB", lambda row: f"{row['cache_bytes'] / 2**20:.1f}")
    roofline = f"Roofline, ms: weights and cache read once at {bandwidth:.0f} GB/s"
    table(roofline, lambda row: f"{1e3 * row['roofline_seconds']:.2f}")
    if args.device == "cuda":
        title = "Peak of allocated GPU memory during the step, GiB (all models and caches of this run are loaded)"
        table(title, lambda row: f"{row['max_memory_allocated'] / 2**30:.2f}")


@torch.no_grad()
def print_batches(runners, args, dtype):
    """Print the largest batch, doubled until memory ends, and its tokens a second."""
    print(f"\nLargest batch (a power of two; the weights of all models are loaded) at {args.max_batch:,} tokens\n")
    print("| model | batch | tokens a second |\n|---|---:|---:|")
    models = {runner.name: (runner.model, runner.config) for runner in runners if not isinstance(runner, Growing)}
    for runner in runners:
        runner.cache = runner.static = None
    torch.cuda.empty_cache()
    for name, (model, config) in models.items():
        batch, found = 1, None
        while batch <= 4096:
            runner = None
            try:
                runner = Runner(model, config, name, "CUDA graph", args.max_batch, batch, graph=True)
                times = []
                for _ in range(6):
                    synchronize("cuda")
                    begun = time.perf_counter()
                    runner.step(args.max_batch)
                    synchronize("cuda")
                    times.append(time.perf_counter() - begun)
                found = batch, batch / statistics.median(times[2:])
            except torch.cuda.OutOfMemoryError:
                break
            finally:
                del runner
                torch.cuda.empty_cache()
            batch *= 2
        print(f"| {name} | {found[0]} | {found[1]:,.0f} |" if found else f"| {name} | none | |")


# ---------------------------------------------------------------- reading a prompt


def read(args, dtype):
    """dict: Seconds, and peak bytes above the loaded model, of reading ``args.read`` tokens into the linear one."""
    config = make_config(args.shape, "linear")
    if args.device == "cpu":
        config.num_hidden_layers = min(args.prefill_layers, config.num_hidden_layers)
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    model = build(functools.partial(HybridVLForCausalLM, config), args.device, dtype)
    ids = torch.randint(0, config.vocab_size, (1, args.read), device=args.device)
    # Kernels are compiled, libraries allocate on first use.
    model.prefill(ids[:, :64])
    before = restart_peak(args.device)
    synchronize(args.device)
    begun = clock(args.device)
    model.prefill(ids)
    synchronize(args.device)
    return {"seconds": clock(args.device) - begun, "peak_bytes": peak_bytes(args.device) - before}


def restart_peak(device):
    """int: Bytes that are taken now, from which the peak is counted anew."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak_bytes(device):
    """int: Most bytes taken since :func:`restart_peak`, of the GPU or by this process."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")


def resident(name):
    """int: Bytes of one line of Linux's account of this process' memory."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def read_apart(args, length):
    """dict: What :func:`read` gives, of a process of its own, since a process' peak never falls."""
    command = [sys.executable, __file__, "--read", length, "--device", args.device, "--shape", args.shape]
    command += ["--prefill-layers", args.prefill_layers, *(["--dtype", args.dtype] if args.dtype else [])]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=os.environ)
    if done.returncode:
        sys.exit(f"reading {length} tokens failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def print_prefill(prefill, args):
    """Print seconds and peak memory of reading prompts."""
    layers = "all" if args.device == "cuda" else min(args.prefill_layers, SHAPES[args.shape]["num_hidden_layers"])
    print(f"\nReading a prompt into the linear model, {layers} layers (best of two)\n")
    print("| tokens | seconds | memory above the loaded model, MiB |\n|---:|---:|---:|")
    for length, runs in prefill.items():
        best = min(run["seconds"] for run in runs)
        print(f"| {length:,} | {best:.2f} | {min(run['peak_bytes'] for run in runs) / 2**20:.0f} |")


def claims(rows, prefill):
    """list[dict]: ``name``, ``value``, ``bar`` and ``holds`` of each claim."""
    last = {row["path"] for row in rows if row["model"] == "linear"}
    found = []
    for path in sorted(last):
        times = [row["seconds"] for row in rows if row["model"] == "linear" and row["path"] == path]
        name = f"linear, {path}: slowest over fastest time a token, whatever the context"
        found.append(_claim(name, max(times) / min(times), FLAT_BAR))
    wrong = sum(row["cache_bytes"] != row["predicted_bytes"] for row in rows)
    found.append(_claim("rows whose cache takes other bytes than the configuration says", wrong, 0))
    if len(prefill) > 1:
        short, long = min(prefill), max(prefill)
        seconds = {length: min(run["seconds"] for run in prefill[length]) for length in (short, long)}
        peak = {length: min(run["peak_bytes"] for run in prefill[length]) for length in (short, long)}
        name = f"reading {long:,} tokens over reading {short:,}, by tokens"
        found.append(_claim(name, seconds[long] / seconds[short] / (long / short), LINEAR_BAR))
        name = f"memory for reading {long:,} tokens over that for {short:,}"
        found.append(_claim(name, peak[long] / max(peak[short], 1), FLAT_BAR))
    return found


def _claim(name, value, bar):
    return {"name": name, "value": value, "bar": bar, "holds": value <= bar}


if __name__ == "__main__":
    main()
