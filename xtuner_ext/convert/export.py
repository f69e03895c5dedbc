"""Writing a student as a folder that anyone can load.

The folder carries its own modelling files, so ``AutoModelForCausalLM.from_pretrained(DIR,
trust_remote_code=True)`` needs nothing of this package; with the package installed it needs no remote code.
"""

import json
import re
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import GenerationConfig
from transformers.utils import logging

from ..data.template_fit import detect_template, fit_template
from ..errors import UserError
from ..modeling import HybridVLForCausalLM
from .checkpoint import whole_folder
from .teacher import load_exactly, load_processor, load_teacher

PACKAGE = Path(__file__).parent.parent
MODELLING_FILES = (
    *(f"modeling/{name}.py" for name in ("configuration", "cache", "graphs", "mixers", "vision", "vit", "modeling")),
    "modeling/processing.py",
    *(f"ops/{path.name}" for path in sorted((PACKAGE / "ops").glob("*.py")) if path.stem != "__init__"),
)
AUTO_MAP = {
    "AutoConfig": "configuration.HybridVLConfig",
    "AutoModel": "modeling.HybridVLForCausalLM",
    "AutoModelForCausalLM": "modeling.HybridVLForCausalLM",
    "AutoModelForImageTextToText": "modeling.HybridVLForCausalLM",
    "AutoProcessor": "processing.HybridVLProcessor",
}
# Shares of the largest logit: the same weights in another class, and the same weights read back.
ASSEMBLY_TOLERANCE = 1e-4
PARITY_TOLERANCE = 1e-5


def export_student(
    config, trained, teacher, out, dtype=torch.bfloat16, max_shard_size="5GB", recipe=None,
    trained_model=None, trust_remote_code=False,
):
    """Assemble a student from its trained weights and its teacher, write it, and check what was written.

    Args:
        config (HybridVLConfig): The student's configuration.
        trained (dict[str, Tensor]): Trained weights under the student's names.
        teacher (str): Folder that the other weights come from.
        out (str): Folder to write; appears only when the check passes.
        dtype (torch.dtype): Of the stored weights; decay rates and time-step biases stay fp32.
        max_shard_size (str): Largest weight file.
        recipe (dict, optional): Named in the model card.
        trained_model (HybridVLForCausalLM, optional): The model as it was trained, in fp32; the assembled
            student must give its logits.
        trust_remote_code (bool): Run the teacher folder's own tokenizer code.

    Raises:
        UserError: When a weight is missing, or the trained, the assembled and the written model do not give
            the same logits.
    """
    processor = load_processor(teacher, trust_remote_code=trust_remote_code)
    source = load_teacher(teacher)
    with init_empty_weights():
        student = HybridVLForCausalLM(config)
    state = _assemble(student, source.state_dict(), trained)
    load_exactly(student, state, "the assembled student")
    del source, state
    student.eval()
    if trained_model is not None:
        check_parity("the assembled student", logits_difference(student.float(), trained_model), ASSEMBLY_TOLERANCE, out)
    write_model(student, processor, out, teacher, dtype, max_shard_size, recipe)


def write_model(model, processor, out, source, dtype=torch.bfloat16, max_shard_size="5GB", recipe=None):
    """Write a model as a folder that needs nothing else, and compare the logits of what was written.

    Args:
        model (HybridVLForCausalLM): Complete; it is cast to ``dtype``.
        processor (HybridVLProcessor): Its processor.
        out (str): Folder to write; appears only when the check passes.
        source (str): Folder that the model comes from, named in the model card.
        dtype (torch.dtype): Of the stored weights; decay rates and time-step biases stay fp32.
        max_shard_size (str): Largest weight file.
        recipe (dict, optional): Named in the model card.

    Raises:
        UserError: When the written model does not give the same logits.
    """
    config = model.config
    config.template = config.template or detect_template(processor.tokenizer)
    template = fit_template(config.template, processor.tokenizer) if config.template else None
    model = model.to(dtype).eval()
    logging.disable_progress_bar()
    with whole_folder(out) as folder:
        write_weights(model, folder, max_shard_size)
        write_processor(processor, template, folder)
        _write_generation_config(processor, config, template, folder)
        (folder / "README.md").write_text(_model_card(config, source, dtype, recipe), encoding="utf-8")
        written = HybridVLForCausalLM.from_pretrained(folder, dtype="auto").eval()
        check_parity("the written model", logits_difference(model, written), PARITY_TOLERANCE, out)


@torch.no_grad()
def logits_difference(model, other):
    """Largest difference between two models' logits, relative to the largest logit; see :func:`probe_logits`.

    Args:
        model (HybridVLForCausalLM): One model.
        other (HybridVLForCausalLM): A model of the same shape.

    Returns:
        float: 0 where both give the same.
    """
    return relative_difference(*(probe_logits(m) for m in (model, other)))


def relative_difference(ours, theirs):
    """float: Largest difference between two tensors, as a share of the largest number of the first."""
    return ((ours - theirs).abs().max() / ours.abs().max()).item()


@torch.no_grad()
def probe_logits(model):
    """What a model makes of one random text row with, where it has an image front end, one random tile.

    Args:
        model (HybridVLForCausalLM): Any; models of one shape are asked the same.

    Returns:
        Tensor: Logits in fp32, (1, L, V).
    """
    config = model.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (1, 48), generator=generator)
    pixels = None
    if config.vision is not None:
        ids[ids == config.image_token_id] = 0
        count = config.tokens_per_tile
        ids = torch.cat([ids[:, :16], torch.full((1, count), config.image_token_id), ids[:, 16:]], dim=1)
        size = config.vision["image_size"]
        pixels = torch.randn(1, config.vision.get("num_channels", 3), size, size, generator=generator)
    return model(ids, pixel_values=pixels, use_cache=False).logits.float()


def check_parity(what, difference, tolerance, out):
    """Raise UserError when a relative difference of logits is above its tolerance, or is no number."""
    if not difference <= tolerance:
        raise UserError(
            f"export to {out} failed its check: the logits of {what} are off by {difference:.3g} of the largest one, "
            f"at most {tolerance:g} is allowed"
        )


def _assemble(student, frozen, trained):
    state = {}
    for key in student.state_dict():
        source = trained if key in trained else frozen
        if key not in source or source[key].is_meta:
            raise UserError(f"the checkpoint does not hold {key}, and the teacher has no such weight")
        state[key] = source[key]
    if surplus := sorted(set(trained) - set(state)):
        raise UserError(f"the checkpoint holds {surplus[0]}, which the student does not have: another config made it")
    return state


def write_weights(student, folder, max_shard_size):
    """Write configuration, weights and modelling files into an existing folder."""
    student.config.auto_map = AUTO_MAP
    student.config.architectures = [type(student).__name__]
    student.config.dtype = student.lm_head.weight.dtype
    student.save_pretrained(folder, max_shard_size=max_shard_size)
    for name in MODELLING_FILES:
        source = (PACKAGE / name).read_text(encoding="utf-8")
        # The package's folders become one.
        source = re.sub(r"from \.\.ops\.", "from .", source)
        (folder / Path(name).name).write_text(source, encoding="utf-8")


def write_processor(processor, template, folder):
    """Write processor and tokenizer into an existing folder, with a chat template also where the tokenizer has none."""
    processor.save_pretrained(folder)
    path = folder / processor.config_name
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]}}, indent=2))
    if processor.tokenizer.chat_template is None and template is not None:
        (folder / "chat_template.jinja").write_text(template.jinja(), encoding="utf-8")


def _write_generation_config(processor, config, template, folder):
    from ..evaluation.runner import stop_token_ids

    # Llama 3 and others name several ends, of which the tokenizer knows one.
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=sorted({*stop_token_ids(processor.tokenizer, template), *ends} - {None}),
        pad_token_id=processor.tokenizer.pad_token_id,
        do_sample=False,
    ).save_pretrained(folder)


def _model_card(config, teacher, dtype, recipe):
    kind, name = "hybrid" if "full_attention" in config.layer_types else "linear", Path(str(teacher)).name
    tuned = (recipe or {}).get("kind") == "supervised"
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text" if config.vision else "pipeline_tag: text-generation",
        "tags: [mamba2, linear-attention, distillation]" if "linear_attention" in config.layer_types else "tags: []",
        "---",
        "",
        f"# {name}, fine-tuned" if tuned else f"# A {kind} Mamba-2 student of {name}",
        "",
        *_layers_and_cache(config),
        "",
        f"Weights are {str(dtype).removeprefix('torch.')}. The licence of {name} applies.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoProcessor",
        "",
        'model = AutoModelForCausalLM.from_pretrained("DIR", trust_remote_code=True)',
        'processor = AutoProcessor.from_pretrained("DIR", trust_remote_code=True)',
        "```",
    ]
    if recipe:
        lines += ["", "## Recipe", "", "```json", json.dumps(recipe, indent=2), "```"]
    return "\n".join(lines) + "\n"


def _layers_and_cache(config):
    attention = [i for i, word in enumerate(config.layer_types) if word == "full_attention"]
    if len(attention) == config.num_hidden_layers:
        return [f"{config.num_hidden_layers} layers of attention."]
    return [
        f"{config.num_hidden_layers} layers; attention is kept in {attention or 'none'}, the others mix by Mamba-2.",
        "",
        f"One sequence's cache takes {config.cache_bytes(1024):,} bytes after 1,024 tokens and "
        f"{config.cache_bytes(65536):,} after 65,536; with attention everywhere it would take "
        f"{_teacher_cache_bytes(config, 1024):,} and {_teacher_cache_bytes(config, 65536):,}.",
    ]


def _teacher_cache_bytes(config, length):
    everywhere = type(config).from_dict({**config.to_dict(), "layer_types": ["full_attention"] * config.num_hidden_layers})
    return everywhere.cache_bytes(length)


