"""python benchmarks/packing.py: how full packed rows are, beside padded batches, and how long packing takes.

The samples are a seeded mix like that of a vision-language data set: lognormal text, and with most samples an image
of 1 to 13 tiles of 256 tokens. Only lengths matter here, so no model or text is needed.
"""

import argparse
import json
import logging
import time
from itertools import islice

import numpy as np
from mmengine.logging import MMLogger
from training import machine

from xtuner_ext.data.packing import PackedDataset, first_fit_decreasing
from xtuner_ext.data.samplers import LengthGroupedSampler, ResumableInfiniteSampler

TOKENS_PER_TILE = 256
FILL_BAR = 0.97
SECONDS_BAR = 60.0


class Mix:
    """Samples of which only the lengths are known.

    Args:
        count (int): Samples.
        seed (int): Of the lengths.
    """

    path, max_length = "a random mix", 1 << 20

    def __init__(self, count, seed=0):
        generator = np.random.default_rng(seed)
        # Question, template and answer: 180 tokens in the middle, a twentieth above 800.
        text = np.clip(generator.lognormal(5.2, 0.9, count), 24, 3000).astype(np.int64)
        tiles = generator.integers(1, 14, count) * (generator.random(count) < 0.7)
        self.lengths = text + TOKENS_PER_TILE * tiles
        self.index = np.stack([np.zeros(count, dtype=np.int64), np.arange(count)], axis=1)
        self.sources = [(None, self)]

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
    print(f"\n{machine()}")
    if args.json:
        print(json.dumps({"machine": machine(), "claims": claims(packed, seconds, args.large)}))


def fill(mix, sampler, batch_size):
    """float: Share of padded batches, over one pass, that is samples."""
    order = np.fromiter(islice(sampler, len(mix) // batch_size * batch_size), dtype=np.int64)
    batches = mix.lengths[order].reshape(-1, batch_size)
    return float(batches.sum() / (batches.max(1) * batch_size).sum())


def claims(packed, seconds, large):
    """list[dict]: ``name``, ``value``, ``bar`` and ``holds`` of each claim."""
    fill, slowest = min(packed.values()), max(seconds.values())
    timed = f"seconds to pack {large:,} samples"
    return [
        {"name": "fill of packed rows", "value": fill, "bar": FILL_BAR, "holds": fill >= FILL_BAR},
        {"name": timed, "value": slowest, "bar": SECONDS_BAR, "holds": slowest <= SECONDS_BAR},
    ]


if __name__ == "__main__":
    main()
