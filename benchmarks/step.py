"""python benchmarks/step.py: a step of stage 1 or 2 on SmolLM2's shape, beside kept graphs and beside mmMamba's way.

"Local" is ours: every layer's backward pass runs inside the forward pass. "Kept" is the same with all layers' graphs
kept until one backward pass. "Reference" is mmMamba's formulation with our classes: graphs kept, eager attention with
an L x L mask, and the language head on all tokens, whose logits no loss reads. Weights are random, the mixer is
mmMamba's. Peak memory is what a fresh process needs more in one step, gradients included (on CUDA: what torch
allocates); saved bytes are those that autograd holds at the most, gradients and weights left out. The claim is about
the former. Times are the best of interleaved repetitions, in processor seconds of one thread (on CUDA: seconds).
"""

import argparse
import contextlib
import json
import weakref

import torch
from measuring import MIB, in_fresh_process, peak_growth, seconds
from training import machine

from xtuner_ext import autoload
from xtuner_ext.cli.allocator import keep_freed_memory

autoload.install()

from xtuner_ext.distill import DistillModel  # noqa: E402
from xtuner_ext.distill import model as distill_model  # noqa: E402
from xtuner_ext.modeling import HybridVLConfig, HybridVLForCausalLM  # noqa: E402

MEMORY_BAR, KEPT_TIME_BAR, REFERENCE_TIME_BAR = 1 / 6, 1.05, 0.7
LAYERS = 30
SMOLLM2 = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_attention_heads=9,
    num_key_value_heads=3,
    rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    tie_word_embeddings=True,
)
MIXER = dict(conv_kernel=2, conv_activation="silu", gate=True)
LOCAL = distill_model.local_backward


def build(args, layers):
    """DistillModel: With random weights."""
    torch.manual_seed(0)
    llm = HybridVLForCausalLM(HybridVLConfig(num_hidden_layers=layers, **SMOLLM2)).to(getattr(torch, args.dtype))
    return DistillModel(llm=llm, stage=args.stage, mixer=MIXER, trainable_dtype="float32").to(args.device).train()


def keep_graphs(compute, parameters):
    """What ``local_backward`` replaces."""
    return compute()


def step(model, ids, variant, head=True):
    """One forward and backward pass; leaves gradients in the parameters."""
    distill_model.local_backward = LOCAL if variant == "local" else keep_graphs
    model.llm.config._attn_implementation = "eager" if variant == "reference" else "sdpa"
    model.zero_grad(set_to_none=True)
    mixed = contextlib.nullcontext()
    if next(model.llm.parameters()).dtype != torch.float32:
        mixed = torch.autocast(ids.device.type, dtype=torch.bfloat16)
    with mixed:
        loss = model.compute_loss(input_ids=ids, labels=ids)["loss"]
        if variant == "reference":
            # On the embeddings: the work is that on the last layer's output, which alignment has no use for.
            with torch.no_grad():
                hidden = model.llm.model.layers[-1].mlp(model.llm.embed(ids))
                if head:
                    model.llm.lm_head(model.llm.model.norm(hidden)).float()
    loss.backward()


def tokens(args, length):
    """Tensor: Token ids, (1, L)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(SMOLLM2["vocab_size"], (1, length), generator=generator).to(args.device)


class Saved:
    """Most bytes that autograd held at a time, each storage once and weights left out.

    Args:
        model (nn.Module): Its parameters are left out.
    """

    class _Holder:
        def __init__(self, tensor):
            self.tensor = tensor

    def __init__(self, model):
        self.left_out = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.holders, self.bytes, self.peak = {}, 0, 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda holder: holder.tensor)

    def _pack(self, tensor):
        holder, storage = self._Holder(tensor), tensor.untyped_storage()
        where, size = storage.data_ptr(), storage.nbytes()
        if where not in self.left_out:
            if not self.holders.get(where):
                self.bytes += size
                self.peak = max(self.peak, self.bytes)
            self.holders[where] = self.holders.get(where, 0) + 1
            weakref.finalize(holder, self._drop, where, size)
        return holder

    def _drop(self, where, size):
        self.holders[where] -= 1
        if not self.holders[where]:
            self.bytes -= size


def memory_of_step(args, variant, layers, length):
    """list[int]: Peak growth and saved bytes of one step."""
    model, ids = build(args, layers), tokens(args, length)
    # What libraries allocate once, for themselves.
    step(model, ids[:, :64], variant)
    model.zero_grad(set_to_none=True)
    grown = peak_growth(args.device, lambda: step(model, ids, variant))
    saved = Saved(model)
    with saved.hooks:
        step(model, ids, variant)
    return [grown, saved.peak]


def difference(args, layers, length):
    """float: Largest difference between the gradients of ``local`` and ``kept``."""
    model, ids, found = build(args, layers), tokens(args, length), []
    for variant in ("local", "kept"):
        step(model, ids, variant)
        found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad])
    return max(float((ours - theirs).abs().max()) for ours, theirs in zip(*found))


def times(args, variants, layers, length, repeat, head):
    """dict[str, float]: Seconds of a step by variant."""
    model, ids = build(args, layers), tokens(args, length)
    best = dict.fromkeys(variants, float("inf"))
    for variant in variants:
        step(model, ids[:, :64], variant)
    for _ in range(repeat):
        for variant in variants:
            taken = seconds(args.device, lambda variant=variant: step(model, ids, variant, head))
            best[variant] = min(best[variant], taken)
    return best


def main():
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=[1, 2], default=1)
    parser.add_argument("--length", type=int, default=2048, help="tokens of the one row")
    parser.add_argument("--long", type=int, default=8192, help="tokens of the longer row; 0 leaves it out")
    parser.add_argument("--long-layers", type=int, help="its layers; 5 on a CPU, for its memory, else 30")
    parser.add_argument("--depths", type=int, nargs="+", default=[5, 10, 20, LAYERS], help="layers of the memory rows")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of products")
    parser.add_argument("--rows", help="file for memory against depth, as a JSON list")
    parser.add_argument("--json", action="store_true", help="end with one line of claims as JSON")
    parser.add_argument("--memory-of", nargs=3, metavar=("VARIANT", "LAYERS", "LENGTH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        variant, layers, length = args.memory_of
        print(json.dumps(memory_of_step(args, variant, int(layers), int(length))))
        return
    memory = [row for layers in args.depths for row in memory_rows(args, layers)]
    print("| layers | backward | peak MiB | saved MiB |\n|---:|---|---:|---:|")
    for row in memory:
        peak, saved = row["peak_bytes"] / MIB, row["saved_bytes"] / MIB
        print(f"| {row['layers']} | {row['variant']} | {peak:,.0f} | {saved:,.0f} |")
    if args.rows:
        with open(args.rows, "w", encoding="utf-8") as file:
            json.dump(memory, file, indent=1)
    if args.device == "cpu":
        # As training does.
        keep_freed_memory()
    apart = difference(args, LAYERS, 256)
    print(f"\nLargest difference of gradients, local beside kept, {LAYERS} layers: {apart}\n", flush=True)
    print("| tokens | layers | step | seconds | of reference | tokens/s |\n|---:|---:|---|---:|---:|---:|")
    short = times(args, ("local", "kept", "reference"), LAYERS, args.length, args.repeat, head=True)
    print_times(short, args.length, LAYERS)
    if args.long:
        layers = args.long_layers or (5 if args.device == "cpu" else LAYERS)
        # A few layers would give the head more weight than it has.
        long = times(args, ("local", "reference"), layers, args.long, 1, head=layers == LAYERS)
        print_times(long, args.long, layers)
    print(f"\nStage {args.stage}, {args.dtype}; {machine()}")
    if args.json:
        print(json.dumps({"machine": machine(), "claims": claims(args, memory, apart, short)}))


def memory_rows(args, layers):
    """Iterator[dict]: ``layers``, ``tokens``, ``variant``, ``peak_bytes`` and ``saved_bytes``."""
    for variant in ("local", "kept"):
        options = ["--stage", args.stage, "--device", args.device, "--dtype", args.dtype, "--threads", args.threads]
        peak, saved = in_fresh_process(__file__, *options, "--memory-of", variant, layers, args.length)
        yield {"layers": layers, "tokens": args.length, "variant": variant, "peak_bytes": peak, "saved_bytes": saved}


def print_times(found, length, layers):
    """Print the rows of a table."""
    for variant, taken in found.items():
        ratio, speed = taken / found["reference"], length / taken
        print(f"| {length:,} | {layers} | {variant} | {taken:.3g} | {ratio:.2f} | {speed:,.0f} |", flush=True)


def claims(args, memory, apart, short):
    """list[dict]: ``name``, ``value``, ``bar`` and ``holds`` of each claim."""
    deepest = {row["variant"]: row["peak_bytes"] for row in memory if row["layers"] == max(args.depths)}
    peak, where = deepest["local"] / deepest["kept"], f"stage {args.stage}, {args.length:,} tokens"
    kept, reference = (short["local"] / short[name] for name in ("kept", "reference"))
    found = [
        (f"peak memory of a step, local backward's of kept graphs', {where}", peak, MEMORY_BAR),
        ("largest difference of gradients, local backward's from kept graphs'", apart, 0.0),
        (f"time of a step, local backward's of kept graphs', {where}", kept, KEPT_TIME_BAR),
        (f"time of a step, ours of mmMamba's formulation, {where}", reference, REFERENCE_TIME_BAR),
    ]
    return [{"name": name, "value": value, "bar": bar, "holds": value <= bar} for name, value, bar in found]


if __name__ == "__main__":
    main()
