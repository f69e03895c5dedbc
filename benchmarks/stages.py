"""python benchmarks/stages.py --device cuda --shape hovle: training tokens a second of every stage, random weights.

A step is a forward pass, a backward pass and AdamW on fp32 weights, with 40 % of the tokens supervised. "Reference" is
mmMamba's formulation with our classes: eager attention with an L x L mask, the graphs of all layers kept until one
backward pass, and in stage 3 a teacher of its own and full logits. Times are medians; the peak is of all the step takes.
"""

import argparse
import contextlib
import statistics
import time

import torch
import torch.nn.functional as F
from training import machine

from xtuner_ext import autoload

autoload.install()

from xtuner_ext.distill import DistillModel  # noqa: E402
from xtuner_ext.distill import model as distill_model  # noqa: E402
from xtuner_ext.modeling import HybridVLConfig, HybridVLForCausalLM  # noqa: E402

SHAPES = {
    "hovle": dict(
        num_hidden_layers=32, hidden_size=2048, num_attention_heads=16, num_key_value_heads=8, intermediate_size=8192,
        vocab_size=92553,
    ),
    "smollm2": dict(
        num_hidden_layers=30, hidden_size=576, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
        vocab_size=49152, tie_word_embeddings=True,
    ),
    # For the tests.
    "tiny": dict(
        num_hidden_layers=3, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=128,
    ),
}
MIXERS = {"state": dict(use_rope=True), "state and window": dict(use_rope=True, window=64, sink=True)}
# Name, keywords of the model, keys of MIXERS, and whether the formulation is mmMamba's.
CASES = (
    ("1", dict(stage=1), "state", False),
    ("1, reference", dict(stage=1), "state", True),
    ("2", dict(stage=2), "state", False),
    ("3", dict(stage=3), "state", False),
    ("3, recomputing activations", dict(stage=3, use_activation_checkpointing=True), "state", False),
    ("3, with a window", dict(stage=3), "state and window", False),
    ("3, hybrid", dict(stage=3, attention_layers="every fourth"), "state", False),
    ("3, reference", dict(stage=3), "state", True),
)
SUPERVISED = 0.4
LOCAL = distill_model.local_backward


def main():
    """Time every case that fits and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=[name for name, *_ in CASES], help="all by default")
    args = parser.parse_args()
    print("| stage | step, ms | tokens a second | peak memory, GiB |\n|---|---:|---:|---:|", flush=True)
    for name, model, mixer, reference in CASES:
        if args.cases and name not in args.cases:
            continue
        try:
            seconds, peak = measure(args, dict(model), MIXERS[mixer], reference)
        except torch.OutOfMemoryError:
            print(f"| {name} | out of memory | | |", flush=True)
            continue
        speed = args.batch * args.length / seconds
        memory = f"{peak / 2**30:.1f}" if peak else ""
        print(f"| {name} | {1e3 * seconds:,.0f} | {speed:,.0f} | {memory} |", flush=True)
    print(f"\n{args.shape}, {args.batch} rows of {args.length:,} tokens, bf16, {machine()}")


def measure(args, options, mixer, reference):
    """Time a case.

    Args:
        args (argparse.Namespace): See :func:`main`.
        options (dict): Of ``DistillModel``.
        mixer (dict): Fields of ``MixerConfig``.
        reference (bool): Whether the formulation is mmMamba's.

    Returns:
        tuple[float, int]: Seconds of a step, and the peak of allocated GPU memory in bytes (0 on a CPU).
    """
    config = HybridVLConfig(**SHAPES[args.shape])
    if options.get("attention_layers") == "every fourth":
        options["attention_layers"] = list(range(0, config.num_hidden_layers, 4))
    step, parameters = make_step(args, config, options, mixer, reference)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    times = []
    for _ in range(2 + args.repeats):
        synchronize(args.device)
        begun = time.perf_counter()
        step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(args.device)
        times.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else 0
    return statistics.median(times[2:]), peak


def make_step(args, config, options, mixer, reference):
    """tuple[callable, list[Parameter]]: Runs a forward and a backward pass, and what trains."""
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    model = DistillModel(make_llm(config, args.device), mixer=mixer, trainable_dtype="float32", **options).train()
    model = model.to(args.device)
    model.llm.config._attn_implementation = "eager" if reference else "sdpa"
    distill_model.local_backward = (lambda compute, parameters: compute()) if reference else LOCAL
    ids = torch.randint(config.vocab_size, (args.batch, args.length), device=args.device)
    labels = ids.clone()
    labels[:, : int(args.length * (1 - SUPERVISED))] = -100
    teacher = make_llm(config, args.device).eval() if reference and options["stage"] == 3 else None

    def step():
        with torch.autocast(args.device, dtype=torch.bfloat16):
            loss = model.compute_loss(ids, labels)["loss"] if teacher is None else full_logits(model, teacher, ids)
        loss.backward()

    return step, [p for p in model.parameters() if p.requires_grad]


def full_logits(model, teacher, ids):
    """mmMamba's loss of stage 3: all tokens, two models, all logits."""
    with torch.no_grad():
        target = F.softmax(teacher(ids, use_cache=False).logits, -1)
    model._activate("linear_attention")
    return F.kl_div(F.log_softmax(model.llm(ids, use_cache=False).logits, -1), target, reduction="batchmean")


def make_llm(config, device):
    """HybridVLForCausalLM: A teacher with random weights in bf16, made on its device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_default_dtype, before)
        stack.enter_context(torch.device(device))
        return HybridVLForCausalLM(HybridVLConfig.from_dict(config.to_dict()))


def synchronize(device):
    """Wait for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
