"""python benchmarks/packing.py --json: how full packed rows are, how long packing takes, and that it changes no loss.

For fill and time the samples are a seeded mix like that of a vision-language data set: lognormal text, and with most
samples an image of 1 to 13 tiles of 256 tokens; only their lengths matter. Loss and gradients are those of the digits'
own stages 1 and 3 on real samples, as one padded batch and as packed rows.
"""

import argparse
import json
import logging
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
from mmengine.logging import MMLogger
from training import machine, project_file

from xtuner_ext.data.packing import PackedDataset, first_fit_decreasing
from xtuner_ext.data.samplers import LengthGroupedSampler, ResumableInfiniteSampler

TOKENS_PER_TILE = 256
FILL_BAR = 0.97
SECONDS_BAR = 60.0
# Rounding grows through the layers that stage 3 goes back through; float64 (with fp32 losses) tells it from a leak.
LOSS_BAR, GRADIENT_BARS = 1e-5, {(1, "float32"): 1e-5, (1, "float64"): 1e-5, (3, "float32"): 5e-5, (3, "float64"): 1e-5}
# Noise on the seeded weights, among which some gradients are zero.
STATES = (0.0, 0.005, 0.02)
REAL_SAMPLES, REAL_ROW = 32, 512


class Mix:
    """Samples of which only the lengths are known.

    Args:
        count (int): Samples.
        seed (int): Of the lengths.
    """

    path, max_length = "a random mix", 1 << 20
    bad, max_bad_fraction, mixture = (), None, None

    def __init__(self, count, seed=0):
        generator = np.random.default_rng(seed)
        # Question, template and answer: 180 tokens in the middle, a twentieth above 800.
        text = np.clip(generator.lognormal(5.2, 0.9, count), 24, 3000).astype(np.int64)
        tiles = generator.integers(1, 14, count) * (generator.random(count) < 0.7)
        self.lengths = text + TOKENS_PER_TILE * tiles
        self.index = np.stack([np.zeros(count, dtype=np.int64), np.arange(count)], axis=1)
        self.sources = [(None, self)]
        self.line_count = count

    def __len__(self):
        return len(self.lengths)

    def count_tokens(self, _, line):
        """int: Length of a sample."""
        return self.lengths[line]


def main():
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000, help="samples whose rows are measured")
    parser.add_argument("--large", type=int, default=1_700_000, help="samples whose packing is timed")
    parser.add_argument("--row-lengths", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--batch-size", type=int, default=8, help="samples of a padded batch")
    parser.add_argument("--json", action="store_true", help="end with one line of claims as JSON")
    args = parser.parse_args()
    MMLogger.get_current_instance().setLevel(logging.WARNING)

    mix = Mix(args.samples)
    padded = {
        "padded, in random order": ResumableInfiniteSampler(mix, seed=0),
        "padded, of like lengths": LengthGroupedSampler(mix, args.batch_size, seed=0),
    }
    size = args.batch_size
    fills = {f"{name}, {size} samples": fill(mix, sampler, size) for name, sampler in padded.items()}
    packed = {row_length: PackedDataset(mix, row_length).fill for row_length in args.row_lengths}
    fills.update({f"packed, rows of {row_length:,} tokens": value for row_length, value in packed.items()})
    print("| batches | room filled |\n|---|---:|")
    for name, value in fills.items():
        print(f"| {name} | {value:.1%} |")
    print(f"\n{args.samples:,} samples of {mix.lengths.mean():,.0f} tokens on average, at most {mix.lengths.max():,}\n")

    lengths, seconds = Mix(args.large, seed=1).lengths, {}
    print("| packing | rows | seconds |\n|---|---:|---:|")
    for row_length in args.row_lengths:
        fitting = lengths[lengths <= row_length]
        begun = time.perf_counter()
        rows = first_fit_decreasing(fitting, row_length)
        seconds[row_length] = time.perf_counter() - begun
        case = f"{len(fitting):,} samples, rows of {row_length:,} tokens"
        print(f"| {case} | {rows.max() + 1:,} | {seconds[row_length]:.1f} |")
    equal, dropped = compare_stages()
    print("\n| digits, a batch packed beside padded | loss differs by | gradients differ by |\n|---|---:|---:|")
    for (stage, precision), (loss, gradients) in equal.items():
        print(f"| stage {stage}, {precision} | {loss:.1e} | {gradients:.1e} |")
    states = f"the larger of {len(STATES)} states of the weights"
    print(f"\n{REAL_SAMPLES} samples, {states}; {dropped} of their tokens are in no row\n{machine()}")
    if args.json:
        print(json.dumps({"machine": machine(), "claims": claims(packed, seconds, args.large, equal, dropped)}))


def fill(mix, sampler, batch_size):
    """float: Share of padded batches, over one pass, that is samples."""
    order = np.fromiter(islice(sampler, len(mix) // batch_size * batch_size), dtype=np.int64)
    batches = mix.lengths[order].reshape(-1, batch_size)
    return float(batches.sum() / (batches.max(1) * batch_size).sum())


def compare_stages():
    """Train no step, but compare one on padded and on packed samples.

    Returns:
        tuple[dict[tuple[int, str], tuple[float, float]], int]: Stage and precision to the relative differences of loss
        and gradients (of the vector of them all), the largest over :data:`STATES`, and tokens that packing lost.
    """
    import torch
    from xtuner.registry import BUILDER

    from xtuner_ext.cli.config_options import load_config
    from xtuner_ext.data.collate import conversation_collate
    from xtuner_ext.data.sources.digits import make_digits

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        make_digits(Path(folder) / "data", seed=0, train=REAL_SAMPLES, test=1)
        for stage, name in ((1, "stage1"), (3, "stage3_linear")):
            config = load_config(str(project_file(f"mmmamba/digits/{name}")))
            dataset = BUILDER.build({**config.train_dataloader.dataset, "meta": f"{folder}/data/train.json"})
            packed = PackedDataset(dataset, REAL_ROW)
            batches = [
                conversation_collate([dataset[index] for index in range(len(dataset))]),
                conversation_collate([packed[row] for row in range(len(packed))]),
            ]
            padded_tokens, packed_tokens = (int(batch["data"]["attention_mask"].sum()) for batch in batches)
            for state in STATES:
                model = BUILDER.build(config.model).train()
                move(model, state)
                for precision in ("float32", "float64"):
                    model.to(getattr(torch, precision))
                    differences = compare_steps(model, *batches)
                    worst = found.get((stage, precision), (0.0, 0.0))
                    found[stage, precision] = tuple(max(pair) for pair in zip(worst, differences))
    return found, padded_tokens - packed_tokens


def compare_steps(model, padded, packed):
    """tuple[float, float]: Relative differences of the loss, and of all gradients as one vector."""
    dtype = model.llm.lm_head.weight.dtype
    for batch in (padded, packed):
        batch["data"]["pixel_values"] = batch["data"]["pixel_values"].to(dtype)
    (loss, gradients), (packed_loss, packed_gradients) = (step(model, batch) for batch in (padded, packed))
    return abs(packed_loss - loss) / loss, ((packed_gradients - gradients).norm() / gradients.norm()).item()


def move(model, distance):
    """Add noise to what trains."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(distance * torch.randn(parameter.shape, generator=generator))


def step(model, batch):
    """tuple[float, Tensor]: Loss of a batch, and all gradients as one vector."""
    import torch

    model.zero_grad()
    loss = model(**batch)["loss"]
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def claims(packed, seconds, large, equal, dropped):
    """list[dict]: ``name``, ``value``, ``bar`` and ``holds`` of each claim."""
    fill, slowest = min(packed.values()), max(seconds.values())
    timed = f"seconds to pack {large:,} samples"
    found = [
        {"name": "fill of packed rows", "value": fill, "bar": FILL_BAR, "holds": fill >= FILL_BAR},
        {"name": timed, "value": slowest, "bar": SECONDS_BAR, "holds": slowest <= SECONDS_BAR},
        {"name": "tokens that packing loses", "value": dropped, "bar": 0, "holds": dropped == 0},
    ]
    for (stage, precision), (loss, gradients) in equal.items():
        name = f"of stage {stage} in {precision}, relative difference to padded"
        bar = GRADIENT_BARS[stage, precision]
        found.append({"name": f"packed loss {name}", "value": loss, "bar": LOSS_BAR, "holds": loss <= LOSS_BAR})
        found.append({"name": f"packed gradients {name}", "value": gradients, "bar": bar, "holds": gradients <= bar})
    return found


if __name__ == "__main__":
    main()
