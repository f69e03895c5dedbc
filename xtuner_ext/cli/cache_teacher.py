"""xtuner-ext cache-teacher CONFIG --out DIR: keep a teacher's likeliest next tokens for stage 3."""

import argparse
import contextlib
import json
import sys

from ..errors import UserError
from .config_options import find_config, load_config


def parse_args(argv):
    """Parse the verb's options."""
    parser = argparse.ArgumentParser(
        prog="xtuner-ext cache-teacher",
        description="Run a stage 3 config's teacher once over the training data and keep, for every supervised token, "
        "its likeliest next tokens. Training with model.teacher_cache=DIR then does without the teacher, which pays "
        "when samples are seen more than once. An interrupted run is gone on with; a finished cache is left alone.",
        epilog="example: xtuner-ext cache-teacher projects/mmmamba/digits/stage3_linear.py "
        "--out work_dirs/digits/teacher_cache",
    )
    parser.add_argument("config", help="config of stage 3, for teacher, data and divergence")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--top-k", type=int, default=64, help="tokens to keep (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=["float16", "float32"], default="float16", help="of the kept values (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="samples per forward pass (default: %(default)s)")
    parser.add_argument("--shard-samples", type=int, default=4096, help="samples per file (default: %(default)s)")
    parser.add_argument(
        "--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="changes of the config"
    )
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")
    return parser.parse_args(argv)


def main(argv):
    """Run the verb.

    Args:
        argv (list[str]): Arguments after the verb.

    Returns:
        int: Exit status.
    """
    args = parse_args(argv)
    config = load_config(find_config(args.config), args.cfg_options)
    manifest = cache_teacher(config, args.out, args.top_k, args.dtype, args.batch_size, args.shard_samples)
    if args.json:
        sys.stdout.write(json.dumps(manifest, indent=2) + "\n")
    else:
        counts = f"{manifest['samples']:,} samples, {manifest['rows']:,} tokens in {manifest['shards']} files"
        sys.stdout.write(f"{args.out}: {counts}; train with --cfg-options model.teacher_cache={args.out}\n")
    return 0


def cache_teacher(config, out, top_k=64, dtype="float16", batch_size=16, shard_samples=4096):
    """Make a cache.

    Args:
        config (Config): Of stage 3.
        out (str): Folder to write.
        top_k (int): Tokens to keep of every supervised row; all where the vocabulary has no more.
        dtype (str): ``float16`` or ``float32``, of the kept values.
        batch_size (int): Samples per forward pass.
        shard_samples (int): Samples per file.

    Returns:
        dict: The cache's manifest.

    Raises:
        UserError: For another stage's config, a number below 1, or a folder that holds something else.
    """
    import torch
    from xtuner.registry import BUILDER

    from ..data.dataset import samples_config
    from ..distill.autocast import autocast_dtype
    from ..distill.model import DIVERGENCE
    from ..distill.teacher_cache import TeacherCache, TeacherCacheWriter, cache_settings, distinct_samples
    from .progress import progress
    from .train import prepare_data

    if config.model.get("stage") != 3:
        stage = config.model.get("stage")
        raise UserError(f"{config.filename} has model.stage {stage}, expected 3: others need no next tokens")
    for name, value in (("top-k", top_k), ("batch-size", batch_size), ("shard-samples", shard_samples)):
        if value < 1:
            raise UserError(f"--{name} is {value}, expected at least 1")
    prepare_data(config)
    dataset = BUILDER.build(samples_config(config.train_dataloader.dataset))
    teacher = BUILDER.build(config.model.llm).eval()
    divergence = {**DIVERGENCE, **(config.model.get("divergence") or {})}
    top_k = min(top_k, len(teacher.lm_head.weight))
    dtype_of_run = autocast_dtype(config.optim_wrapper)
    precision = str(dtype_of_run or "as loaded").removeprefix("torch.")
    settings = cache_settings(teacher, divergence, dataset, top_k, dtype, precision, shard_samples)
    writer = TeacherCacheWriter(out, settings)
    if writer.finished:
        return TeacherCache(out).manifest
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher.to(device)
    context = contextlib.nullcontext() if dtype_of_run is None else torch.autocast(device, dtype_of_run)
    lines = distinct_samples(dataset)
    shards = -(-len(lines) // shard_samples)
    with progress("cache-teacher", len(lines)) as advance, torch.no_grad(), context:
        for number in range(shards):
            mine = lines[number * shard_samples : (number + 1) * shard_samples]
            if not writer.has_shard(number):
                loader = _loader(dataset, mine, batch_size, config.train_dataloader.get("num_workers", 0))
                rows = [row for batch in loader for row in _targets(teacher, batch, divergence, top_k, dataset)]
                writer.write_shard(number, rows)
            advance(len(mine))
    return writer.finish(shards)


class _Encoded:
    """The samples at some positions, None where one is left out."""

    def __init__(self, dataset, positions):
        self.dataset, self.positions = dataset, positions

    def __len__(self):
        return len(self.positions)

    def __getitem__(self, number):
        return self.dataset.attempt(self.positions[number])[0]


def _loader(dataset, positions, batch_size, workers):
    from torch.utils.data import DataLoader

    return DataLoader(_Encoded(dataset, positions), batch_size, num_workers=workers, collate_fn=_collate)


def _collate(samples):
    from ..data.collate import conversation_collate

    kept = [sample for sample in samples if sample is not None]
    return conversation_collate(kept) if kept else None


def _targets(teacher, batch, divergence, top_k, dataset):
    """list[tuple]: What a shard holds of every sample of a batch."""
    import torch

    from ..distill.losses import rows_per_chunk
    from ..distill.model import supervised_rows
    from ..distill.teacher_cache import source_numbers
    from ..distill.top_k import top_k_targets

    if batch is None:
        return []
    keys = batch["data_samples"]["keys"]
    data = {name: tensor.to(teacher.device) for name, tensor in batch["data"].items()}
    rows = supervised_rows(data["input_ids"], data.pop("labels"), data["attention_mask"], divergence["tokens"])
    embeds = teacher.embed(data.pop("input_ids"), data.pop("pixel_values"))
    hidden = teacher.model(inputs_embeds=embeds, **data).last_hidden_state[rows]
    head = teacher.lm_head.weight
    chunks = [
        top_k_targets(part, head, top_k, divergence["temperature"])
        for part in hidden.split(divergence["chunk_rows"] or rows_per_chunk(head))
    ]
    columns = [torch.cat(column).cpu().split(rows.sum(1).tolist()) for column in zip(*chunks)]
    numbers = source_numbers(dataset)
    return [
        (numbers[name], line, *(column[number].numpy() for column in columns))
        for number, (name, line) in enumerate(keys)
    ]
