"""xtuner-ext merge IN OUT: an adapter, or a run that trained one, and its base model become one model folder.

`xtuner convert merge MODEL ADAPTER OUT`, with XTuner's own arguments, ends here too.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from ..errors import UserError
from .convert import pth_to_hf, refuse_foreign_folder, shard_size


def parse_args(argv):
    """Parse the options of ``xtuner-ext merge``."""
    parser = argparse.ArgumentParser(
        prog="xtuner-ext merge",
        description="Merge a LoRA adapter into its base model, and check the logits before, after and as written.",
        epilog="example: xtuner-ext merge work_dirs/internvl2_2b_lora work_dirs/internvl2_2b_lora/merged",
    )
    parser.add_argument("input", help="folder of an adapter, or the work_dir of a run that trained one")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--base", help="folder of the base model (default: the one that the adapter names)")
    parser.add_argument(
        "--layout",
        choices=("hybrid_vl", "original"),
        default="hybrid_vl",
        help="original: the base's own file names and code, for a base of another family",
    )
    parser.add_argument(
        "--dequantise",
        action="store_true",
        help="merge into the numbers that the quantised layers computed with, instead of the base's full precision",
    )
    parser.add_argument("--torch-dtype", choices=("bfloat16", "float16", "float32"), help="default: the base's own")
    parser.add_argument("--max-shard-size", type=shard_size, default="2GB", help="largest weight file")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the base folder's own tokenizer code")
    return parser.parse_args(argv)


def main(argv):
    """Run the verb.

    Args:
        argv (list[str]): Arguments after the verb.

    Returns:
        int: Exit status.
    """
    args = parse_args(argv)
    refuse_foreign_folder(args.output)
    if not os.path.isdir(args.input):
        raise UserError(f"{args.input} is not a folder, expected that of an adapter or of a training run")
    parent = Path(args.output).absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".adapter.") as scratch:
        adapter, remote = args.input, args.trust_remote_code
        if not (Path(args.input) / "adapter_config.json").is_file():
            adapter, trusted = adapter_of_run(Path(args.input), Path(scratch) / "adapter")
            remote = remote or trusted
        from ..convert.merge import merge_adapter

        report = merge_adapter(
            adapter,
            args.output,
            base=args.base,
            layout=args.layout,
            dequantise=args.dequantise,
            dtype=args.torch_dtype,
            max_shard_size=args.max_shard_size,
            trust_remote_code=remote,
        )
    announce(report, args.output)
    return 0


def announce(report, out):
    """Say what was merged and how exactly."""
    sys.stdout.write(
        f"merged into {report['base']}: logits differ by {report['difference']:.1e} of the largest one in fp32\n"
        f"written to {out} in {report['dtype']}\n"
    )


def adapter_of_run(work_dir, out):
    """Write the adapter of a run's last checkpoint.

    Args:
        work_dir (Path): With the config that MMEngine wrote there and ``last_checkpoint``.
        out (Path): Folder to write.

    Returns:
        tuple[str, bool]: ``out``, and whether the run's config trusts the base folder's tokenizer code.

    Raises:
        UserError: For a folder that holds no run, or one that trained no adapter.
    """
    from ..data.dataset import samples_config
    from ..distill.stages import find_previous_checkpoint
    from .config_options import load_config

    # MMEngine keeps what each start of a run was given; DeepSpeed puts scripts of its own beside the checkpoints.
    configs = sorted(work_dir.glob("*/vis_data/config.py"))
    if not configs or not (work_dir / "last_checkpoint").is_file():
        raise UserError(
            f"{work_dir} holds neither adapter_config.json nor a training run: expected a config and last_checkpoint"
        )
    config = load_config(str(configs[-1]))
    if not config.model.get("lora"):
        raise UserError(
            f"{configs[-1]} trains no adapter, so there is nothing to merge: "
            "`xtuner-ext convert pth_to_hf` writes its model folder"
        )
    checkpoint = find_previous_checkpoint(work_dir, work_dir.name)
    pth_to_hf(config, checkpoint, str(out))
    return str(out), bool(samples_config(config.train_dataloader.dataset).processor.get("trust_remote_code"))


def stock_merge(argv):
    """Run ``convert merge`` with XTuner's arguments.

    Args:
        argv (list[str]): Its arguments.

    Returns:
        int: Exit status.
    """
    parser = argparse.ArgumentParser(
        prog="xtuner-ext convert merge",
        description="Merge a PEFT adapter into a language model or, with --is-clip, into a CLIP vision tower.",
        epilog="example: xtuner convert merge pretrained/llama work_dirs/adapter work_dirs/merged",
    )
    parser.add_argument("model_name_or_path", help="folder of the base model")
    parser.add_argument("adapter_name_or_path", help="folder of the adapter")
    parser.add_argument("save_dir", help="folder to write")
    parser.add_argument("--max-shard-size", type=shard_size, default="2GB", help="largest weight file")
    parser.add_argument("--is-clip", action="store_true", help="the base is a CLIP vision tower")
    parser.add_argument("--safe-serialization", action="store_true", help="accepted; safetensors is always written")
    parser.add_argument("--device", default="cpu", choices=("cuda", "cpu", "npu", "auto"), help="ignored: a CPU merges")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the base folder's own code")
    args = parser.parse_args(argv)
    for folder in (args.model_name_or_path, args.adapter_name_or_path):
        if not os.path.isdir(folder):
            raise UserError(f"{folder} is not a folder, expected one of a model and one of its adapter")
    if not os.path.isfile(os.path.join(args.save_dir, "preprocessor_config.json")):
        refuse_foreign_folder(args.save_dir)
    options = dict(max_shard_size=args.max_shard_size, trust_remote_code=args.trust_remote_code)
    paths = (args.model_name_or_path, args.adapter_name_or_path, args.save_dir)
    announce((_merge_clip if args.is_clip else _merge_language_model)(*paths, **options), args.save_dir)
    return 0


def _merge_language_model(base, adapter, out, max_shard_size, trust_remote_code):
    import torch
    from transformers import AutoModelForCausalLM

    from ..convert.checkpoint import read_config_json
    from ..convert.merge import BASE_FILE, merge_adapter, merge_transformers
    from ..convert.teacher import read_tokenizer
    from ..modeling import HybridVLConfig

    raw = read_config_json(base)
    if raw.get("model_type") == HybridVLConfig.model_type or (Path(adapter) / BASE_FILE).is_file():
        # Ours, or an adapter that we trained beside a model in our class.
        return merge_adapter(adapter, out, base, max_shard_size=max_shard_size, trust_remote_code=trust_remote_code)

    # Before the work, which is in vain where it does not load.
    tokenizer = read_tokenizer(base, trust_remote_code)

    @torch.no_grad()
    def probe(model):
        ids = torch.randint(0, model.config.vocab_size, (1, 48), generator=torch.Generator().manual_seed(0))
        return model(input_ids=ids).logits.float()

    return merge_transformers(
        AutoModelForCausalLM,
        base,
        adapter,
        out,
        tokenizer.save_pretrained,
        probe,
        max_shard_size,
        trust_remote_code=trust_remote_code,
    )


def _merge_clip(base, adapter, out, max_shard_size, trust_remote_code):
    import torch
    from transformers import CLIPImageProcessor, CLIPVisionModel

    from ..convert.merge import merge_transformers

    @torch.no_grad()
    def probe(model):
        size = model.config.image_size
        pixels = torch.randn(1, model.config.num_channels, size, size, generator=torch.Generator().manual_seed(0))
        return model(pixels.to(model.dtype)).last_hidden_state.float()

    def write_processor(folder):
        CLIPImageProcessor.from_pretrained(base).save_pretrained(folder)

    return merge_transformers(CLIPVisionModel, base, adapter, out, write_processor, probe, max_shard_size)


if __name__ == "__main__":
    from xtuner_ext.cli.main import run

    sys.exit(run(["merge", *sys.argv[1:]]))
