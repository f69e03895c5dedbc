"""xtuner-ext convert pth_to_hf CONFIG PTH DIR, convert gguf_to_hf FILE DIR: something becomes a model folder."""

import argparse
import os
import re
import sys

from ..errors import UserError


def parse_args(argv):
    """Parse the options of stock ``xtuner convert pth_to_hf``."""
    parser = argparse.ArgumentParser(
        prog="xtuner-ext convert pth_to_hf",
        description="Write a trained student as a complete Hugging Face folder, and check its logits.",
        epilog="example: xtuner-ext convert pth_to_hf projects/mmmamba/digits/stage3_linear.py "
        "work_dirs/digits/stage3_linear/iter_1000.pth work_dirs/digits/export_linear",
    )
    parser.add_argument("config", help="the config that trained the checkpoint, or its name")
    parser.add_argument("pth_model", help="checkpoint file, or the folder that DeepSpeed wrote")
    parser.add_argument("save_dir", help="folder to write")
    parser.add_argument("--fp32", action="store_true", help="store fp32 instead of bf16")
    parser.add_argument("--max-shard-size", type=shard_size, default="2GB", help="largest weight file")
    parser.add_argument("--safe-serialization", action="store_true", help="accepted; safetensors is always written")
    parser.add_argument("--save-format", default="xtuner", choices=("xtuner", "official", "huggingface"))
    parser.add_argument("--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    return parser.parse_args(argv)


def main(argv):
    """Run the verb.

    Args:
        argv (list[str]): ``pth_to_hf``, ``gguf_to_hf``, ``merge`` or ``split``, then its arguments.

    Returns:
        int: Exit status.
    """
    from .main import run_stock

    if argv[0] == "gguf_to_hf":
        return gguf_to_hf(argv[1:])
    if argv[0] == "merge":
        from .merge import stock_merge

        return stock_merge(argv[1:])
    if argv[0] != "pth_to_hf":
        return run_stock(f"convert {argv[0]}", argv[1:])
    args = parse_args(argv[1:])
    from .config_options import find_config, load_config

    path = find_config(args.config)
    config = load_config(path, args.cfg_options)
    from mmengine.utils import get_object_from_string
    from xtuner.model import LLaVAModel

    from ..distill.base import HybridModel

    # Reading the item makes a lazy config import the class; the config that a run wrote has its name.
    model_type = config.model["type"]
    if isinstance(model_type, str):
        model_type = get_object_from_string(model_type)
    if not (isinstance(model_type, type) and issubclass(model_type, (HybridModel, LLaVAModel))):
        return run_stock("convert pth_to_hf", argv[1:])
    refuse_foreign_folder(args.save_dir)
    if not os.path.exists(args.pth_model):
        raise UserError(f"checkpoint {args.pth_model} does not exist")
    if issubclass(model_type, LLaVAModel):
        from ..convert.llava_export import export_llava

        export_llava(config, args.pth_model, args.save_dir, args.save_format, args.fp32, args.max_shard_size)
        sys.stdout.write(f"written to {args.save_dir}\n")
        return 0
    pth_to_hf(config, args.pth_model, args.save_dir, args.fp32, args.max_shard_size)
    # Dumped, not copied: a copy would look for the files it inherits from.
    config.dump(os.path.join(args.save_dir, "xtuner_config.py"))
    sys.stdout.write(f"written to {args.save_dir}\n")
    return 0


def gguf_to_hf(argv):
    """Run ``convert gguf_to_hf``.

    Args:
        argv (list[str]): Its arguments.

    Returns:
        int: Exit status.
    """
    parser = argparse.ArgumentParser(
        prog="xtuner-ext convert gguf_to_hf",
        description="Unpack a GGUF file into an ordinary Hugging Face folder; a finished folder is left as it is.",
        epilog="example: xtuner-ext convert gguf_to_hf smollm2 work_dirs/smollm2/teacher",
    )
    parser.add_argument("source", help="GGUF file, or the name of a shipped model: smollm2")
    parser.add_argument("save_dir", help="folder to write")
    parser.add_argument("--torch-dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    args = parser.parse_args(argv)
    from ..convert.gguf import dequantise

    folder = dequantise(args.source, args.save_dir, args.torch_dtype)
    sys.stdout.write(f"{folder} is complete\n")
    return 0


def pth_to_hf(config, checkpoint, out, fp32=False, max_shard_size="2GB"):
    """Write a checkpoint's student.

    Args:
        config (Config): The config that trained it.
        checkpoint (str): File or DeepSpeed folder.
        out (str): Folder to write.
        fp32 (bool): Store fp32 instead of bf16.
        max_shard_size (str): Largest weight file.

    Raises:
        UserError: When the checkpoint does not fit the config, or the written folder fails its check.
    """
    import torch
    from xtuner.registry import BUILDER

    from ..distill.stages import read_checkpoint

    state, found = read_checkpoint(checkpoint)
    if "pretrained_pth" in config.model:
        # The checkpoint replaces what the stage before would give.
        config.model.pretrained_pth = None
    model = BUILDER.build(config.model)
    expected = model.state_dict()
    ours = model.describe()
    if found and found.get("stage") != ours.get("stage"):
        stages = [f"stage {d['stage']}" if "stage" in d else "fine-tuning" for d in (found, ours)]
        raise UserError(f"checkpoint {checkpoint} comes from {stages[0]}, the config is of {stages[1]}")
    for key in ("layer_types", "mixer", "teacher", "base", "lora"):
        if found and found.get(key) != ours.get(key):
            raise UserError(
                f"checkpoint {checkpoint} was trained with another {key}: {found.get(key)}, "
                f"the config has {ours.get(key)}"
            )
    missing, surplus = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    if missing or surplus:
        what = f"misses {missing[0]}" if missing else f"has the unknown {surplus[0]}"
        raise UserError(f"checkpoint {checkpoint} {what}: another config made it")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, tensor in state.items():
            parameters[name].copy_(tensor)
    model.to_hf(cfg=config, save_dir=out, fp32=fp32, save_pretrained_kwargs={"max_shard_size": max_shard_size})


def shard_size(text):
    """str: A number of bytes with its unit, as ``--max-shard-size`` takes it."""
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", text):
        raise argparse.ArgumentTypeError(f"{text} is no size such as 500MB or 2GB")
    return text


def refuse_foreign_folder(folder):
    """Raise UserError when a folder holds something other than an earlier conversion."""
    ours = ("generation_config.json", "adapter_config.json", "xtuner_config.py")
    if os.path.isdir(folder) and os.listdir(folder) and not any(os.path.isfile(os.path.join(folder, n)) for n in ours):
        raise UserError(f"{folder} is not empty and holds no earlier conversion: choose another folder")
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"{folder} is a file, expected a folder to write")


if __name__ == "__main__":
    from xtuner_ext.cli.main import run

    sys.exit(run(["convert", *sys.argv[1:]]))
