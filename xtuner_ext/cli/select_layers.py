"""xtuner-ext select-layers CONFIG PTH --keep K: measure which layers should keep attention."""

import argparse
import io
import json
import sys
from pathlib import Path

from ..errors import UserError
from .config_options import find_config, load_config


def parse_args(argv):
    """Parse the verb's options."""
    parser = argparse.ArgumentParser(
        prog="xtuner-ext select-layers",
        description="Put attention back layer by layer into a student of stage 2, measure the divergence from the "
        "teacher on held-out samples, and choose greedily. Nothing is trained.",
        epilog="example: xtuner-ext select-layers projects/mmmamba/digits/stage2.py "
        "work_dirs/digits/stage2/iter_100.pth --keep 2",
    )
    parser.add_argument("config", help="config of the run, for teacher, mixer and data")
    parser.add_argument("checkpoint", help="checkpoint of stage 1 or 2")
    parser.add_argument("--keep", type=int, required=True, help="layers that keep attention")
    parser.add_argument("--data", help="meta JSON of held-out samples (default: eval_data of the config)")
    parser.add_argument("--limit", type=int, default=64, help="samples, spread over the data")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", help="JSON file for the result (default: attention_layers.json beside the stages)")
    parser.add_argument("--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
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
    out = args.out or str(Path(args.checkpoint).parent.parent / "attention_layers.json")
    result = select_for_config(config, args.checkpoint, args.keep, out, args.data, args.limit, args.batch_size)
    if args.json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    else:
        print_table(result)
        sys.stdout.write(f"written to {out} and {Path(out).with_suffix('.png')}\n")
    return 0


def select_for_config(config, checkpoint, keep, out, data=None, limit=64, batch_size=16):
    """Choose layers for a project and write the choice.

    Args:
        config (Config): Any of the project's stages.
        checkpoint (str): Of stage 1 or 2.
        keep (int): Layers to choose.
        out (str): JSON file; a picture of the ranking goes beside it.
        data (str, optional): Meta JSON of held-out samples; the config's ``eval_data`` when absent.
        limit (int): Samples, spread over the data.
        batch_size (int): Samples per forward pass.

    Returns:
        dict: See :func:`select_layers`, with ``checkpoint``, ``data`` and ``tokens``.

    Raises:
        UserError: For a checkpoint of another kind, or numbers that do not fit the model.
    """
    import torch

    from ..compat import replace_file
    from ..distill.layer_selection import LayerProbe, probe_count, select_layers
    from .progress import progress

    if Path(out).suffix != ".json":
        raise UserError(f"--out is {out}, expected a name that ends in .json: the picture goes beside it as .png")
    if limit < 1 or batch_size < 1:
        raise UserError(f"--limit is {limit} and --batch-size {batch_size}, expected at least 1")
    data = data or config.get("eval_data")
    if data is None:
        raise UserError(f"{config.filename} names no eval_data, give the held-out samples with --data")
    model = _load_pairs(config, checkpoint)
    layers = model.student_config.num_hidden_layers
    if not 1 <= keep < layers:
        raise UserError(f"--keep is {keep}, expected 1 to {layers - 1}: the model has {layers} layers")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    probe = LayerProbe(model.to(device), list(_batches(config, data, limit, batch_size, device)))
    with progress("select-layers", probe_count(keep, layers)) as advance:
        result = select_layers(probe, keep, on_probe=lambda: advance(1))
    result = {**result, "checkpoint": checkpoint, "data": data, "tokens": probe.tokens}
    replace_file(Path(out).with_suffix(".png"), _picture(result))
    replace_file(out, json.dumps(result, indent=2).encode())
    return result


def _load_pairs(config, checkpoint):
    from xtuner.registry import BUILDER

    from ..distill.stages import read_checkpoint

    found = read_checkpoint(checkpoint)[1]
    if found.get("stage", 2) not in (1, 2):
        raise UserError(f"checkpoint {checkpoint} comes from stage {found['stage']}, expected stage 1 or 2: later ones hold no attention")
    # The next stage loads this checkpoint; with shared frozen weights each layer holds both mixers. They run
    # side by side in the teacher's precision.
    scope = "projections" if found.get("trainable") == "projections" else "mixers"
    config.model.update(
        stage=found.get("stage", 2) + 1,
        trainable=scope,
        trainable_dtype=None,
        attention_layers=None,
        layer_types=None,
        pretrained_pth=checkpoint,
    )
    config.model.pop("_scope_", None)
    return BUILDER.build(config.model)


def _batches(config, data, limit, batch_size, device):
    from xtuner.registry import BUILDER

    from ..data.collate import conversation_collate
    from ..data.dataset import samples_config

    dataset = BUILDER.build({**samples_config(config.train_dataloader.dataset), "meta": data})
    count = min(limit, len(dataset))
    chosen = [index * len(dataset) // count for index in range(count)]
    for start in range(0, count, batch_size):
        batch = conversation_collate([dataset[index] for index in chosen[start : start + batch_size]])["data"]
        yield {key: value.to(device) for key, value in batch.items()}


def _picture(result):
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    ranking = {int(layer): value for layer, value in result["ranking"].items()}
    colours = ["tab:orange" if layer in result["attention_layers"] else "tab:blue" for layer in ranking]
    axes.bar(list(ranking), [result["linear"] - value for value in ranking.values()], color=colours)
    axes.set_xlabel("layer that alone gets attention back (orange: chosen)")
    axes.set_ylabel("KL it saves, nats per token")
    axes.axhline(0, color="black", linewidth=0.8)
    file = io.BytesIO()
    figure.savefig(file, dpi=120, format="png")
    return file.getvalue()


def print_table(result):
    """Print the chosen layers and what other placements of as many would give."""
    from rich.table import Table

    from .console import console

    table = Table(title=f"KL to the teacher over {result['tokens']:,} held-out tokens, without training")
    for column in ("attention in", "layers", "KL"):
        table.add_column(column, justify="right" if column == "KL" else "left")
    table.add_row("no layer", "", f"{result['linear']:.4f}")
    for name, row in result["placements"].items():
        table.add_row(name, " ".join(map(str, row["layers"])), f"{row['kl']:.4f}")
    console().print(table)
