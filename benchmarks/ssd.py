"""python benchmarks/ssd.py: the SSD scan, the convolution and the decode step beside transformers' own, in one process.

On a CPU, with one thread and in CPU time: our torch twins against the torch functions of transformers' Mamba-2, which
are what anyone runs there, the scan at the best of four chunk sizes; and their errors against the recurrence taken
token by token in fp64. Repetitions are interleaved and the best of each is taken.

More than half of what transformers' functions take under Linux's defaults goes into memory that they give back to the
system and ask for again. xtuner-ext's own verbs keep freed memory, which helps both, so the last table repeats the scan
that way.

With --device cuda: milliseconds of every installed kernel, of its first call, and what it is off from the twin in
fp32.
"""

import argparse
import inspect
import json
import sys
import time
from functools import partial

import torch
from training import REPOSITORY, machine
from transformers.models.mamba2 import modeling_mamba2
from transformers.utils import logging

sys.path.insert(0, str(REPOSITORY))

from tests.reference.ssd import naive_ssd  # noqa: E402
from xtuner_ext.cli.allocator import keep_freed_memory  # noqa: E402
from xtuner_ext.ops import causal_conv, ssd, ssd_step  # noqa: E402

LENGTHS = (4096, 8192)
FORWARD_BARS, TRAINING_BAR = {4096: 4.0, 8192: 3.5}, 3.0
BF16_BAR, STEP_BAR, ERROR_BAR = 1.3, 2.0, 1e-5
# On a GPU products are in bf16 or TF32.
GPU_ERROR_BAR = 0.02
CONVOLUTION_BARS = {"convolution, forward": 3.0, "convolution, forward and backward": 2.0}
PEER_CHUNKS = (32, 64, 128, 256)
CHUNK = 64
HEADS, WIDTH, STATE = 16, 128, 128
ERROR_LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1, 1000)
LONG = 131_072


def main():
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of the timed rows")
    parser.add_argument("--repeats", type=int, default=5)
    everything = ["native", "triton", "fla", "auto", "tune", "torch", "transformers"]
    parser.add_argument("--backends", nargs="+", choices=everything, default=everything, help="on a GPU")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--json", action="store_true", help="end with one line of claims as JSON")
    args = parser.parse_args()
    # transformers says in every process that its torch functions are slow.
    logging.set_verbosity_error()
    if args.device == "cuda":
        claims = on_gpu(args)
    else:
        torch.set_num_threads(1)
        claims = scan_claims(args.lengths, args.repeats) + other_claims(args.lengths, args.repeats) + error_claims()
        keep_freed_memory()
        print("\nWith freed memory kept in the process:\n")
        scan_claims(args.lengths[:1], args.repeats)
    print(f"\n{machine()}")
    if args.json:
        print(json.dumps({"machine": machine(), "claims": claims}))


def inputs(length, heads=HEADS, width=WIDTH, state=STATE, dtype=torch.float32, device="cpu", batch=1):
    """dict[str, Tensor]: Random arguments of a scan, as trained mixers see them; leaves that take gradients."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    values = {
        "x": normal(batch, length, heads, width).to(dtype),
        "dt": normal(batch, length, heads),
        "A": -torch.rand(heads, generator=generator) - 0.5,
        "B": normal(batch, length, heads, state).to(dtype) / state**0.5,
        "C": normal(batch, length, heads, state).to(dtype),
        "dt_bias": normal(heads) - 3,
    }
    return {name: value.to(device).requires_grad_() for name, value in values.items()}


def transformers_scan(x, dt, A, B, C, dt_bias, chunk_size):
    """Tensor: y by the torch function itself, also where transformers would call a kernel in its place."""
    scan = inspect.unwrap(modeling_mamba2.mamba2_chunk_scan)
    return scan(x, dt, A, B, C, chunk_size, dt_bias=dt_bias, dt_softplus=True)


def transformers_convolution(x, weight, bias):
    """Tensor: y by the torch function, (B, L, D)."""
    convolution = inspect.unwrap(modeling_mamba2.causal_conv1d_fn)
    return convolution(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)


def transformers_step(x, dt, A, B, C, dt_bias, state):
    """Tensor: y by the torch function, which updates ``state``; it takes decays and time steps by channel."""
    update = inspect.unwrap(modeling_mamba2.mamba2_selective_state_update)
    width, state_width = state.shape[2:]
    dt, A = dt[..., None].expand(-1, -1, width), A[:, None, None].expand(-1, width, state_width)
    return update(state, x, dt, A, B, C, dt_bias=dt_bias[:, None].expand(-1, width), dt_softplus=True)


def forward(call, arguments):
    """Run without gradients."""
    with torch.no_grad():
        call(**arguments)


def training(call, arguments):
    """Run forward and backward."""
    y = call(**arguments)
    torch.autograd.grad(y, list(arguments.values()), torch.ones_like(y))


def best_times(runs, repeats, clock=time.process_time):
    """dict: Least seconds of every run, in rounds over all of them after one that is not counted."""
    seconds = dict.fromkeys(runs, float("inf"))
    for number in range(repeats + 1):
        for name, run in runs.items():
            begun = clock()
            run()
            if number:
                seconds[name] = min(seconds[name], clock() - begun)
    return seconds


def claim(name, value, bar, larger=True):
    """dict: One claim; ``larger`` says on which side of the bar it holds."""
    return {"name": name, "value": value, "bar": bar, "holds": bool(value >= bar if larger else value <= bar)}


def scan_claims(lengths, repeats):
    """list[dict]: The scan against transformers' and bf16 against fp32; prints a table."""
    claims, bf16 = [], has_bf16()
    print(f"| tokens, {HEADS} heads of {WIDTH} x {STATE} | transformers, best chunk | ours, fp32 | | ours, bf16 | |")
    print("|---|---:|---:|---:|---:|---:|")
    for length in lengths:
        for what, run, bar in (
            ("forward", forward, FORWARD_BARS.get(length, 0.0)),
            ("forward and backward", training, TRAINING_BAR),
        ):
            full, half = inputs(length), inputs(length, dtype=torch.bfloat16)
            runs = {chunk: partial(run, partial(transformers_scan, chunk_size=chunk), full) for chunk in PEER_CHUNKS}
            runs["fp32"] = partial(run, partial(ssd, chunk_size=CHUNK), full)
            if bf16:
                runs["bf16"] = partial(run, partial(ssd, chunk_size=CHUNK), half)
            seconds = best_times(runs, repeats)
            chunk = min(PEER_CHUNKS, key=seconds.get)
            ratio = seconds[chunk] / seconds["fp32"]
            cells = [f"{1e3 * seconds[chunk]:.0f} ms ({chunk})", f"{1e3 * seconds['fp32']:.0f} ms", f"{ratio:.1f}x"]
            claims.append(claim(f"times faster than transformers, {length} tokens, {what}", ratio, bar))
            if bf16:
                gain = seconds["fp32"] / seconds["bf16"]
                cells += [f"{1e3 * seconds['bf16']:.0f} ms", f"{gain:.1f}x more"]
                claims.append(claim(f"times that bf16 is faster than fp32, {length} tokens, {what}", gain, BF16_BAR))
            print(f"| {length}, {what} | {' | '.join(cells)} |", flush=True)
    return claims


def other_claims(lengths, repeats):
    """list[dict]: Convolution and decode step against transformers'; prints a table."""
    claims, length, taps = [], lengths[0], 4
    channels = 3 * HEADS * WIDTH
    row = {"x": torch.randn(1, length, channels), "weight": torch.randn(channels, taps), "bias": torch.randn(channels)}
    row = {name: t.requires_grad_() for name, t in row.items()}

    token = {name: t.detach() if t.ndim == 1 else t.detach()[:, 0] for name, t in inputs(1).items()}
    states = [torch.zeros(1, HEADS, WIDTH, STATE) for _ in range(2)]

    def steps(call, state):
        for _ in range(100):
            call(**token, state=state)

    runs = {
        "convolution, forward": (partial(forward, transformers_convolution, row), partial(forward, causal_conv, row)),
        "convolution, forward and backward": (
            partial(training, transformers_convolution, row),
            partial(training, causal_conv, row),
        ),
        "100 decode steps of one row": (
            partial(steps, transformers_step, states[0]),
            partial(steps, partial(ssd_step, in_place=True), states[1]),
        ),
    }
    print(f"\n| {length} tokens, {channels} channels, {taps} taps | transformers | ours | |\n|---|---:|---:|---:|")
    for name, (theirs, ours) in runs.items():
        seconds = best_times({"theirs": theirs, "ours": ours}, repeats)
        ratio = seconds["theirs"] / seconds["ours"]
        times = " | ".join(f"{1e3 * value:.1f} ms" for value in seconds.values())
        print(f"| {name} | {times} | {ratio:.1f}x |", flush=True)
        claims.append(claim(f"times faster than transformers, {name}", ratio, CONVOLUTION_BARS.get(name, STEP_BAR)))
    return claims


def error_claims():
    """list[dict]: Largest relative errors against the recurrence in fp64; prints a table."""
    worst, worst_gradient = 0.0, 0.0
    print("\n| tokens, error against fp64 | y and final state | largest of any gradient |\n|---|---:|---:|")
    for length in ERROR_LENGTHS:
        for packed in (False, True):
            arguments = inputs(length, heads=4, width=64, state=64, batch=2)
            generator = torch.Generator().manual_seed(2)
            arguments["initial_state"] = torch.randn(2, 4, 64, 64, generator=generator).requires_grad_()
            ids = None
            if packed:
                borders = torch.tensor([[length // 3, length // 2 + 1], [1, length - 1]])
                ids = (torch.arange(length)[None, :, None] >= borders[:, None]).sum(-1)
            exact = {name: t.detach().double().requires_grad_() for name, t in arguments.items()}
            ours = with_gradients(
                partial(ssd, chunk_size=CHUNK, return_final_state=True, segment_ids=ids), arguments
            )
            truth = with_gradients(partial(naive_ssd, segment_ids=ids), exact)
            errors = {name: relative_error(value, truth[name]) for name, value in ours.items()}
            outputs = max(errors.pop("y"), errors.pop("final state"))
            name = max(errors, key=errors.get)
            worst, worst_gradient = max(worst, outputs), max(worst_gradient, errors[name])
            case = f"{length}, packed" if packed else length
            print(f"| {case} | {outputs:.1e} | {errors[name]:.1e} ({name}) |", flush=True)
    arguments = {name: t.detach() for name, t in inputs(LONG, heads=2, width=8, state=16).items()}
    with torch.no_grad():
        y, state = ssd(**arguments, chunk_size=CHUNK, return_final_state=True)
        truth = naive_ssd(**arguments, dtype=torch.float64)
    # The last tokens on their own, where an error that grows would show.
    pairs = [(y, truth[0]), (y[:, -1000:], truth[0][:, -1000:]), (state, truth[1])]
    long = max(relative_error(*pair) for pair in pairs)
    print(f"| {LONG} | {long:.1e} | |")
    return [
        claim("relative error of outputs in fp32", worst, ERROR_BAR, larger=False),
        claim("relative error of gradients in fp32", worst_gradient, ERROR_BAR, larger=False),
        claim(f"relative error of outputs in fp32, {LONG} tokens", long, ERROR_BAR, larger=False),
    ]


def with_gradients(call, arguments):
    """dict[str, Tensor]: Outputs and the gradients of one random weighting of them, by argument."""
    outputs = dict(zip(("y", "final state"), call(**arguments)))
    generator = torch.Generator().manual_seed(1)
    loss = sum((t.double() * torch.randn(t.shape, generator=generator)).sum() for t in outputs.values())
    return {**outputs, **dict(zip(arguments, torch.autograd.grad(loss, list(arguments.values()))))}


def relative_error(found, expected):
    """float: Norm of the difference as a share of the expected one."""
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def has_bf16():
    """bool: Whether the processor multiplies bf16."""
    with open("/proc/cpuinfo") as file:
        return "avx512_bf16" in file.read()


def on_gpu(args):
    """list[dict]: How far every kernel is off from the twin; prints its milliseconds and those of the first call."""
    bandwidth, claims = measure_bandwidth(), []
    head = "| tokens, dtype, backend | forward, ms | share of roofline | forward and backward, ms | first call, s | off from fp32 |"
    print(f"{head}\n|---|---:|---:|---:|---:|---:|")
    for length in args.lengths:
        exact = with_gradients_on_gpu(partial(ssd, backend="torch"), inputs(length, device="cuda"))
        for dtype in (getattr(torch, name) for name in args.dtypes):
            arguments = inputs(length, dtype=dtype, device="cuda")
            # Every input read and the output written once.
            moved = 2 * arguments["x"].nbytes + arguments["B"].nbytes + arguments["C"].nbytes
            for name, call in gpu_calls(args.backends).items():
                begun = time.perf_counter()
                try:
                    found = with_gradients_on_gpu(call, arguments)
                except (RuntimeError, ValueError) as error:
                    print(f"| {length:,}, {name} | {str(error).splitlines()[0]} | | | | |", flush=True)
                    continue
                first = time.perf_counter() - begun
                off = max(relative_error(value, exact[key].double()) for key, value in found.items())
                runs = {run: partial(waited, partial(run, call, arguments)) for run in (forward, training)}
                times = best_times(runs, args.repeats, clock=time.perf_counter)
                share = moved / bandwidth / times[forward]
                case = f"{length:,}, {str(dtype)[6:]}, {name}"
                cells = f"{1e3 * times[forward]:.3f} | {share:.0%} | {1e3 * times[training]:.3f} | {first:.1f}"
                print(f"| {case} | {cells} | {off:.1e} |", flush=True)
                claims.append(claim(f"off from torch in fp32, {case}", off, GPU_ERROR_BAR, larger=False))
    print(f"\nRoofline: inputs and output moved once at {bandwidth / 1e9:,.0f} GB/s")
    return claims


def measure_bandwidth():
    """float: Bytes a second that a GPU reads and writes, best of five copies of 1 GiB."""
    source = torch.ones(1 << 28, device="cuda")
    target = torch.empty_like(source)
    best = best_times({"copy": partial(waited, partial(target.copy_, source))}, 5, clock=time.perf_counter)["copy"]
    return 2 * source.nbytes / best


def gpu_calls(backends):
    """dict[str, Callable]: Scans by name."""
    calls = {}
    for name in backends:
        if name == "triton":
            calls |= {f"triton, chunk {chunk}": partial(ssd, backend=name, chunk_size=chunk) for chunk in (128, 256)}
        elif name == "transformers":
            calls["transformers' torch"] = partial(transformers_scan, chunk_size=256)
        else:
            calls[name] = partial(ssd, backend=name)
    return calls


def with_gradients_on_gpu(call, arguments):
    """dict[str, Tensor]: y and the gradients of its sum, by argument."""
    y = call(**arguments)
    gradients = torch.autograd.grad(y, list(arguments.values()), torch.ones_like(y))
    return {"y": y.detach(), **dict(zip(arguments, gradients))}


def waited(run):
    """Run until the GPU is done."""
    run()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
