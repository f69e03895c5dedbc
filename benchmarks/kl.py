"""python benchmarks/kl.py: stage 3's divergence beside the loss over full logits, in memory, time and gradients.

"Full logits" is what mmMamba's stage 3 does, with a mask added: both models' logits of all tokens, softmax and
log-softmax in fp32, their product, and one backward pass. Ours is chunked_divergence over the supervised tokens.
Peak memory is what a fresh process needs more (on CUDA: what torch allocates); times are the best of interleaved
repetitions, in processor seconds of one thread (on CUDA: seconds), and proportional to the tokens, of which a CPU
gets fewer. "Error" is the gradients' distance from full logits' in fp64, on 96 tokens: in fp32 the products and the
sums over a large vocabulary round by some 1e-6, and two orders of summing differ by as much. Liger's and fla's fused
losses join in on CUDA.
"""

import argparse
import importlib.util
import json

import torch
import torch.nn.functional as F
from measuring import MIB, in_fresh_process, peak_growth, seconds
from training import machine

from xtuner_ext.cli.allocator import keep_freed_memory
from xtuner_ext.distill.losses import chunked_divergence

MEMORY_BAR, GRADIENT_BAR, ERROR_BAR, TIME_BAR, ALL_TIME_BAR = 1 / 6, 1e-6, 1.1, 0.6, 1.1
EXACT_TOKENS = 96


def full(student, head, teacher, teacher_head, mask):
    """Tensor: The mean over masked tokens, from the logits of all."""
    log_q, p = student @ head.T, (teacher @ teacher_head.T).detach()
    if log_q.dtype == torch.bfloat16:
        log_q, p = log_q.float(), p.float()
    log_q, p = F.log_softmax(log_q, dim=-1), F.softmax(p, dim=-1)
    return F.kl_div(log_q, p, reduction="none").sum(-1)[mask].sum() / mask.sum()


def chunked(backend):
    """Function that takes what ``full`` takes and returns the same mean."""

    def loss(student, head, teacher, teacher_head, mask):
        student, teacher = student[mask], teacher[mask]
        scale = 1 / len(student)
        return chunked_divergence(student, head, teacher, teacher_head, scale=scale, backend=backend)[0]

    return loss


LOSSES = {"full logits": full, "ours": chunked("torch"), "liger": chunked("liger"), "fla": chunked("fla")}
PACKAGES = {"liger": "liger_kernel", "fla": "fla"}


def make_inputs(args, tokens, share, train_head):
    """tuple[Tensor, ...]: Student's and teacher's hidden states and heads, and the mask."""
    generator = torch.Generator(args.device).manual_seed(0)
    options = dict(generator=generator, device=args.device, dtype=getattr(torch, args.dtype))
    student = torch.randn(tokens, args.width, **options)
    teacher = torch.randn(tokens, args.width, **options).mul_(0.3).add_(student)
    head = torch.randn(args.vocabulary, args.width, **options).mul_(3 / args.width**0.5)
    mask = torch.rand(tokens, generator=generator, device=args.device) < share
    # A head that trains is no longer the teacher's.
    teacher_head = head.clone() if train_head else head
    return student.requires_grad_(), head.requires_grad_(train_head), teacher, teacher_head, mask


def step(loss, inputs):
    """tuple[Tensor, ...]: Gradients of the student's hidden states and, if it trains, of its head."""
    return torch.autograd.grad(loss(*inputs), [tensor for tensor in inputs[:2] if tensor.requires_grad])


def memory_of_step(args, name, share, train_head):
    """int: Bytes by which the peak grows in one step."""
    student, head, teacher, teacher_head, mask = inputs = make_inputs(args, args.tokens, share, train_head)
    # What libraries allocate once, for themselves.
    few = student[:8].detach().requires_grad_(), head, teacher[:8], teacher_head, torch.ones_like(mask[:8])
    step(LOSSES[name], few)
    return peak_growth(args.device, lambda: step(LOSSES[name], inputs))


def distance(ours, theirs):
    """float: Norm of the difference over the norm, the largest of all tensors'."""
    return max(float((one - other).norm() / other.norm()) for one, other in zip(ours, theirs))


def compare(args, names, share, train_head):
    """dict[str, dict]: By loss, ``seconds``, ``bytes``, and gradients' ``difference`` beside full logits' and ``error``
    beside those of full logits in fp64."""
    found = {name: {"seconds": float("inf")} for name in names}
    options = ["--device", args.device, "--dtype", args.dtype]
    for key in ("threads", "vocabulary", "tokens", "width"):
        options += [f"--{key}", getattr(args, key)]
    for name in names:
        if args.device == "cuda":
            # torch's own count starts anew at any time.
            found[name]["bytes"] = memory_of_step(args, name, share, train_head)
        else:
            found[name]["bytes"] = in_fresh_process(__file__, *options, "--memory-of", name, share, int(train_head))
    inputs = make_inputs(args, args.timed_tokens, share, train_head)
    *few, mask = make_inputs(args, EXACT_TOKENS, share, train_head)
    double = [*(tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in few), mask]
    few = [*few, mask]
    truth, exact = step(full, inputs), step(full, double)
    for name in names:
        found[name]["difference"] = distance(step(LOSSES[name], inputs), truth)
        found[name]["error"] = distance(step(LOSSES[name], few), exact)
    found["ours"]["exact difference"] = distance(step(LOSSES["ours"], double), exact)
    del truth, exact, double
    for _ in range(args.repeat):
        for name in names:
            taken = seconds(args.device, lambda name=name: step(LOSSES[name], inputs))
            found[name]["seconds"] = min(found[name]["seconds"], taken)
    return found


def main():
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=92553)
    parser.add_argument("--tokens", type=int, default=4096, help="whose memory is measured")
    parser.add_argument("--timed-tokens", type=int, help="whose time and gradients are; 1,024 on a CPU, else the same")
    parser.add_argument("--width", type=int, default=1024, help="of the hidden states; HoVLE's is 2048")
    parser.add_argument("--share", type=float, default=0.4, help="of tokens that are supervised")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", action="store_true", help="end with one line of claims as JSON")
    parser.add_argument("--memory-of", nargs=3, metavar=("LOSS", "SHARE", "HEAD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        name, share, train_head = args.memory_of
        print(memory_of_step(args, name, float(share), bool(int(train_head))))
        return
    args.timed_tokens = args.timed_tokens or (1024 if args.device == "cpu" else args.tokens)
    if args.device == "cpu":
        # As training does.
        keep_freed_memory()
    names = ["full logits", "ours"]
    if args.device == "cuda":
        names += [name for name, package in PACKAGES.items() if importlib.util.find_spec(package)]
    cases = {
        f"{args.share:.0%} of tokens supervised": (args.share, False),
        "all tokens supervised": (1.0, False),
        f"{args.share:.0%} supervised, the head trains": (args.share, True),
    }
    print("| case | loss | peak MiB | of full | seconds | of full | tokens/s | gradient difference | error |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    results = {}
    for case, options in cases.items():
        results[case] = found = compare(args, names, *options)
        whole = found["full logits"]
        for name, row in found.items():
            numbers = f"{row['bytes'] / MIB:,.0f} | {row['bytes'] / whole['bytes']:.3f} | {row['seconds']:.3g}"
            speed = f"{row['seconds'] / whole['seconds']:.2f} | {args.timed_tokens / row['seconds']:,.0f}"
            rounding = f"{row['difference']:.1e} | {row['error']:.1e}"
            print(f"| {case} | {name} | {numbers} | {speed} | {rounding} |", flush=True)
    sizes = f"{args.tokens:,} tokens (for time {args.timed_tokens:,}) of width {args.width:,}"
    print(f"\n{sizes}, vocabulary {args.vocabulary:,}, {args.dtype}; {machine()}")
    if args.json:
        print(json.dumps({"machine": machine(), "claims": claims(args, results)}))


def claims(args, results):
    """list[dict]: ``name``, ``value``, ``bar`` and ``holds`` of each claim."""
    part, everything, _ = results.values()

    def ratio(rows, key):
        return rows["ours"][key] / rows["full logits"][key]

    share = f"{args.share:.0%} of tokens supervised"
    found = [
        (f"peak memory of the divergence, of full logits', {share}", ratio(part, "bytes"), MEMORY_BAR),
        (f"time of the divergence, of full logits', {share}", ratio(part, "seconds"), TIME_BAR),
        ("time of the divergence, of full logits', all tokens supervised", ratio(everything, "seconds"), ALL_TIME_BAR),
    ]
    difference = max(rows["ours"]["difference"] for rows in results.values())
    error = max(rows["ours"]["error"] / rows["full logits"]["error"] for rows in results.values())
    found.append(("gradients' distance from fp64's, of that of full logits", error, ERROR_BAR))
    exact = max(rows["ours"]["exact difference"] for rows in results.values())
    found.append(("relative difference of gradients from full logits', both in fp64", exact, GRADIENT_BAR))
    if args.dtype == "float32":
        found.append(("relative difference of gradients from full logits', both in fp32", difference, GRADIENT_BAR))
    return [{"name": name, "value": value, "bar": bar, "holds": value <= bar} for name, value, bar in found]


if __name__ == "__main__":
    main()
