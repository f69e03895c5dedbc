"""xtuner-ext inspect DIR [--json]: what a model folder holds, and what students of it would be."""

import argparse
import json
import sys

LENGTHS = (1024, 16384, 65536, 131072)
# The hybrid that is shown keeps attention in one of so many layers.
HYBRID_INTERVAL = 4


def parse_args(argv):
    """Parse the verb's options."""
    parser = argparse.ArgumentParser(
        prog="xtuner-ext inspect",
        description="Describe a model folder from its config.json and the headers of its weight files; no weight is "
        "read. An unsupported or incomplete folder ends with the reason and status 2.",
        epilog="example: xtuner-ext inspect work_dirs/smollm2/teacher",
    )
    parser.add_argument("model", help="model folder, or the name of a shipped model")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the folder's own tokenizer code")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


def main(argv):
    """Run the verb.

    Args:
        argv (list[str]): Arguments after the verb.

    Returns:
        int: Exit status.
    """
    args = parse_args(argv)
    report = inspect_folder(args.model, args.trust_remote_code)
    if args.json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        print_tables(report)
    return 0


def inspect_folder(model, trust_remote_code=False):
    """Describe a model folder without reading its weights.

    Args:
        model (str): Model folder, or the name of a shipped model.
        trust_remote_code (bool): Run the folder's own tokenizer code.

    Returns:
        dict: Shape of the model, and under ``models`` the folder's own and others of the same shape, with
        parameters and cache bytes by length in tokens. Students of a teacher have the default mixer.

    Raises:
        UserError: For a folder that is unsupported, incomplete, or whose tokenizer is of another model.
    """
    from ..convert.teacher import load_exactly, read_model_config, resolve_folder, stored_state
    from ..modeling import layer_types_from_attention

    folder = resolve_folder(model)
    family, config = read_model_config(folder)
    stored = stored_state(folder, family, structure_only=True)
    network = _structure(config)
    load_exactly(network, stored if family is None else family.to_model(config, stored), folder)
    template, remark = _template(folder, config, trust_remote_code)
    count = config.num_hidden_layers
    attention = [i for i, word in enumerate(config.layer_types) if word == "full_attention"]
    shapes = {"this student": attention, "all attention": list(range(count))}
    if family is not None:
        shapes = {
            "this teacher": attention,
            "linear student": [],
            f"hybrid student 1:{HYBRID_INTERVAL - 1}": list(range(0, count, HYBRID_INTERVAL)),
        }
    return {
        "folder": str(folder),
        "family": family.NAME if family else "exported student",
        "layers": count,
        "attention_layers": attention,
        "attention_heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_width": config.head_dim,
        "hidden_size": config.hidden_size,
        "vocabulary": config.vocab_size,
        "image_front_end": config.vision["front_end"] if config.vision else None,
        "template": template,
        "template_remark": remark,
        "context_length": config.max_position_embeddings,
        "stored_parameters": sum(tensor.numel() for tensor in stored.values()),
        "weight_dtypes": _dtypes(stored),
        "cache_bytes_per_token": config.cache_bytes(2) - config.cache_bytes(1),
        "models": [
            _student(config, name, layer_types_from_attention(layers, count)) for name, layers in shapes.items()
        ],
    }


def _structure(config):
    from accelerate import init_empty_weights

    from ..modeling import HybridVLForCausalLM

    with init_empty_weights():
        return HybridVLForCausalLM(config)


def _student(config, name, layer_types):
    from .loading import count_parameters

    config = type(config).from_dict({**config.to_dict(), "layer_types": layer_types})
    network = _structure(config)
    network.tie_weights()
    return {
        "name": name,
        "attention_layers": [i for i, word in enumerate(layer_types) if word == "full_attention"],
        "parameters": count_parameters(network),
        "cache_bytes": {str(length): config.cache_bytes(length) for length in LENGTHS},
    }


def _template(folder, config, trust_remote_code):
    from ..convert.teacher import check_vocabulary, load_tokenizer
    from ..data.template_fit import detect_template, fit_template
    from ..errors import UserError

    try:
        tokenizer = load_tokenizer(folder, trust_remote_code)
    except UserError as error:
        return config.template, str(error)
    check_vocabulary(tokenizer, config, folder)
    name = config.template or detect_template(tokenizer)
    if name is None:
        remark = "has no chat template" if not tokenizer.chat_template else "has a chat template that is none known"
        return None, f"the tokenizer {remark}: chat and eval need --prompt-template"
    try:
        fit_template(name, tokenizer)
    except UserError as error:
        return name, str(error)
    return name, None


def _dtypes(state):
    counts = {}
    for tensor in state.values():
        word = str(tensor.dtype).removeprefix("torch.")
        counts[word] = counts.get(word, 0) + tensor.numel()
    return counts


def print_tables(report):
    """Print what a folder holds and what students of it would be.

    Args:
        report (dict): From :func:`inspect_folder`.
    """
    from rich.table import Table

    from .console import console

    screen = console()
    facts = Table(title=report["folder"], show_header=False)
    facts.add_column(style="bold")
    facts.add_column()
    attention = report["attention_layers"]
    everywhere = len(attention) == report["layers"]
    kept = "attention everywhere" if everywhere else f"attention in {', '.join(map(str, attention)) or 'none'}"
    template = report["template"] or "none"
    rows = {
        "family": report["family"],
        "layers": f"{report['layers']}, {kept}",
        "heads": f"{report['attention_heads']}, {report['kv_heads']} for keys and values",
        "head width": f"{report['head_width']}",
        "hidden size": f"{report['hidden_size']:,}",
        "vocabulary": f"{report['vocabulary']:,}",
        "image front end": report["image_front_end"] or "none",
        "template": template if report["template_remark"] is None else f"{template} ({report['template_remark']})",
        "context length": f"{report['context_length']:,} tokens",
        "stored weights": f"{report['stored_parameters']:,}: "
        + ", ".join(f"{word} {count:,}" for word, count in report["weight_dtypes"].items()),
        "cache per token": _bytes(report["cache_bytes_per_token"]),
    }
    for name, text in rows.items():
        facts.add_row(name, text)
    screen.print(facts)
    students = Table(title="Cache of one sequence after so many tokens, in bf16, states in fp32")
    students.add_column("model", no_wrap=True)
    for name in ("parameters", *(f"{length // 1024}K" for length in LENGTHS)):
        students.add_column(name, justify="right", no_wrap=True)
    for model in report["models"]:
        students.add_row(model["name"], f"{model['parameters']:,}", *map(_bytes, model["cache_bytes"].values()))
    screen.print(students)


def _bytes(count):
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
