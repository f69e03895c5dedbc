"""Writing a trained ``LLaVAModel`` of XTuner in its three formats, checked by its logits.

* ``xtuner``: what was trained, in folders of its own: adapters or whole parts, and the projector.
* ``huggingface``: one model: transformers' LLaVA or, around a language model of this package, a folder of ours.
* ``official``: one model in the layout of LLaVA's authors.
"""

import dataclasses
import json
import re
from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from transformers import (
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
)
from xtuner.registry import BUILDER
from xtuner.utils import IMAGE_TOKEN_INDEX

from ..data.template_fit import fit_template
from ..data.templates import get_template
from ..distill.stages import read_checkpoint
from ..errors import UserError
from ..modeling import HybridVLConfig, HybridVLForCausalLM
from ..modeling.mixers import FP32_PARAMETERS
from ..modeling.processing import HybridVLProcessor
from .checkpoint import read_config_json, whole_folder
from .export import PARITY_TOLERANCE, check_parity, relative_difference, write_model, write_processor, write_weights
from .llava_parts import ADAPTER, PROJECTOR, TOWER, TOWER_ADAPTER, assemble, image_token, llava_processor
from .teacher import load_teacher, resolve_folder

FORMATS = ("xtuner", "huggingface", "official")
# Share of the largest logit: a sum of products beside a product of sums, in fp32.
MERGE_TOLERANCE = 1e-4
# DeepSpeed's files inside of a checkpoint's folder.
PIECE = re.compile(r"(mp_rank_\d+_model_states|zero_pp_rank_\d+_.*|.*_optim_states)\.pt")
# transformers pads vocabularies for its kernels' sake.
ROWS = 64


def export_llava(config, checkpoint, out, save_format="xtuner", fp32=False, max_shard_size="2GB"):
    """Write what a run of ``LLaVAModel`` trained.

    Adapters that were trained beside a language model that the config quantises are merged into its full weights.

    Args:
        config (Config): That trained it.
        checkpoint (str): ``.pth`` file, or the folder that DeepSpeed wrote.
        out (str): Folder to write; appears only when all checks pass.
        save_format (str): One of ``FORMATS``.
        fp32 (bool): Store fp32 instead of fp16.
        max_shard_size (str): Largest weight file.

    Raises:
        UserError: For a checkpoint that is missing, a piece of one or another config's, a model that the format can
            not hold, or logits that differ from the trained model's.
    """
    refuse_format(config, save_format)
    state = read_trained(checkpoint)
    model = build(config, structure_only=save_format == "xtuner")
    insert(model, state, checkpoint)
    dtype = torch.float32 if fp32 else torch.float16
    writers = {"xtuner": write_parts, "huggingface": write_huggingface, "official": write_official}
    writers[save_format](model, config, out, dtype, max_shard_size)


def read_trained(path):
    """Trained weights of a checkpoint, in fp32; UserError for a piece or a collection of them."""
    path = Path(path)
    if path.is_file() and PIECE.fullmatch(path.name):
        raise UserError(f"{path} is one piece of a DeepSpeed checkpoint: give the folder {path.parent} instead")
    if path.is_dir() and not any(path.glob("*_model_states.pt")):
        inside = sorted(found.name for found in path.glob("*.pth"))
        hint = f": give one of its checkpoints, {', '.join(inside)}" if inside else ""
        raise UserError(f"{path} is a folder without a DeepSpeed checkpoint{hint}")
    return read_checkpoint(str(path))[0]


def build(config, structure_only):
    """Build a config's model for conversion.

    Args:
        config (Config): Of the run; its quantisation and its earlier checkpoint are left out.
        structure_only (bool): On meta, where only what was trained is written.

    Returns:
        LLaVAModel: In fp32 unless on meta, in evaluation mode.
    """
    settings = config.model.copy()
    settings.pretrained_pth = None
    if isinstance(settings.llm, dict) and "quantization_config" in settings.llm:
        settings.llm = settings.llm.copy()
        settings.llm.pop("quantization_config")
    # Recomputing activations has hooks that want gradients.
    settings.use_activation_checkpointing = False
    if not structure_only:
        return BUILDER.build(settings).float().eval()
    with init_empty_weights():
        return BUILDER.build(settings).eval()


def insert(model, state, checkpoint):
    """Put trained weights into a model; UserError when they are another model's."""
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    missing, surplus = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    if missing or surplus:
        what = f"misses {missing[0]}" if missing else f"has {surplus[0]}, which the config's model does not train"
        raise UserError(f"checkpoint {checkpoint} {what}: another config made it")
    for key, tensor in state.items():
        if tuple(tensor.shape) != expected[key]:
            raise UserError(
                f"checkpoint {checkpoint}: {key} has shape {tuple(tensor.shape)}, the config's model {expected[key]}: "
                "another config made it"
            )
        set_module_tensor_to_device(model, key, "cpu", tensor)


def refuse_format(config, save_format):
    """Refuse a format that can not hold a config's model, before anything is read.

    Args:
        config (Config): Of the run.
        save_format (str): One of ``FORMATS``.

    Raises:
        UserError: Naming what the format can not hold.
    """
    if save_format not in FORMATS:
        raise UserError(f"--save-format is {save_format}, expected one of {', '.join(FORMATS)}")
    llm, tower = config.model.llm, config.model.visual_encoder
    folder = resolve_folder(llm.get("pretrained_model_name_or_path", "")) if isinstance(llm, dict) else None
    if save_format == "xtuner" or folder is None or not (folder / "config.json").is_file():
        return
    raw = read_config_json(folder)
    if raw.get("quantization_config"):
        raise UserError(
            f"--save-format {save_format} can not hold the language model {folder}, whose weights are quantised: use "
            "--save-format xtuner"
        )
    if config.model.get("projector_depth", 2) != 2:
        depth = config.model.projector_depth
        raise UserError(f"--save-format {save_format} can not hold a projector of {depth} layers, only of 2")
    kind = raw.get("model_type")
    if save_format == "official" and kind == HybridVLConfig.model_type:
        raise UserError(
            f"--save-format official can not hold the language model {folder}, which has Mamba-2 layers or keys of "
            f"{kind}: that format knows Llama's attention alone; use huggingface or xtuner"
        )
    tower_folder = resolve_folder(tower.get("pretrained_model_name_or_path", "")) if isinstance(tower, dict) else None
    if save_format == "official" and tower_folder is not None and (tower_folder / "config.json").is_file():
        kind = read_config_json(tower_folder).get("model_type")
        if kind not in ("clip", "clip_vision_model"):
            raise UserError(
                f"--save-format official can not hold the vision tower {tower_folder} of type {kind!r}, only CLIP"
            )


def write_parts(model, config, out, dtype, max_shard_size):
    """Write ``xtuner``'s format: see the module's docstring."""
    with whole_folder(out) as folder:
        if model.use_llm_lora:
            model.llm.to(dtype).save_pretrained(folder / ADAPTER)
        elif not model.freeze_llm:
            _write_language_model(model.llm.to(dtype), BUILDER.build(config.tokenizer), folder, max_shard_size)
        if model.use_visual_encoder_lora:
            model.visual_encoder.save_pretrained(folder / TOWER_ADAPTER)
        elif not model.freeze_visual_encoder:
            model.visual_encoder.save_pretrained(folder / TOWER, max_shard_size=max_shard_size)
            BUILDER.build(config.image_processor).save_pretrained(folder / TOWER)
        model.projector.save_pretrained(folder / PROJECTOR)
        _write_config(config, folder)


def _write_language_model(llm, tokenizer, folder, max_shard_size):
    llm.config.use_cache = True
    if isinstance(llm, HybridVLForCausalLM):
        write_weights(llm, folder, max_shard_size)
        write_processor(HybridVLProcessor(tokenizer, tokens_per_tile=0), None, folder)
    else:
        llm.save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)


def _write_config(config, folder):
    # Dumped, not copied: a copy would look for the files it inherits from.
    config.dump(str(folder / "xtuner_config.py"))


def merge_parts(model, out):
    """Merge a model's adapters, in place.

    Args:
        model (LLaVAModel): In fp32.
        out (str): Named in messages.

    Returns:
        tuple[PreTrainedModel, PreTrainedModel]: Language model and vision tower.

    Raises:
        UserError: When the merged model gives other logits.
    """
    before = probe(model)
    if model.use_llm_lora:
        model.llm = model.llm.merge_and_unload()
    if model.use_visual_encoder_lora:
        model.visual_encoder = model.visual_encoder.merge_and_unload()
    model.use_llm_lora = model.use_visual_encoder_lora = False
    model.llm.config.use_cache = True
    check_parity("the merged model", relative_difference(before, probe(model)), MERGE_TOLERANCE, out)
    return model.llm, model.visual_encoder


def probe_inputs(llm_config, tower_config):
    """tuple[Tensor, Tensor]: Ids (1, 20) with one image's placeholder, XTuner's -200, and its pixels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, llm_config.vocab_size, (1, 20), generator=generator)
    ids[0, 3] = IMAGE_TOKEN_INDEX
    size = tower_config.image_size
    return ids, torch.randn(1, tower_config.num_channels, size, size, generator=generator)


@torch.no_grad()
def probe(model):
    """What a model makes of one random text row with one random image.

    Args:
        model (LLaVAModel): In evaluation mode.

    Returns:
        Tensor: Logits in fp32, (L, V).
    """
    ids, pixels = probe_inputs(model.llm.config, model.visual_encoder.config)
    return model({"input_ids": ids, "pixel_values": pixels}, mode="tensor").logits[0].float()


@torch.no_grad()
def probe_whole(model, image, llm_config, tower_config, tokens):
    """The same of a model that finds images by a token: logits in fp32, (L, V), of the first V tokens alone."""
    ids, pixels = probe_inputs(llm_config, tower_config)
    place = (ids[0] == IMAGE_TOKEN_INDEX).nonzero().item()
    ids = torch.cat([ids[:, :place], torch.full((1, tokens), image), ids[:, place + 1 :]], dim=1)
    return model(input_ids=ids, pixel_values=pixels).logits[0, :, : llm_config.vocab_size].float()


def _tower_tokens(config):
    return (config.image_size // config.patch_size) ** 2


def _rounded(module, dtype):
    """The module with the numbers that are stored, computing in fp32; rotary frequencies are not stored."""
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[2] not in FP32_PARAMETERS:
            parameter.data = parameter.data.to(dtype).float()
    return module


def write_huggingface(model, config, out, dtype, max_shard_size):
    """Write ``huggingface``'s format: see the module's docstring."""
    llm, tower = merge_parts(model, out)
    if isinstance(llm, HybridVLForCausalLM):
        return _write_hybrid(model, config, out, dtype, max_shard_size)
    tokenizer = BUILDER.build(config.tokenizer)
    expected = probe(_rounded(model, dtype))
    image = image_token(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    clip = isinstance(tower, CLIPVisionModel)
    fields = LlavaConfig(
        text_config=_text_fields(llm),
        vision_config=tower.config.to_dict(),
        image_token_index=image,
        image_seq_length=_tower_tokens(tower.config),
        vision_feature_layer=model.visual_select_layer,
        vision_feature_select_strategy="default" if clip else "full",
    )
    # It may lie behind the vocabulary that there still is.
    fields.text_config.pad_token_id = None
    whole = _native_llava(model, fields)
    rows = max(llm.config.vocab_size, len(tokenizer))
    _add_rows(whole, -(-rows // ROWS) * ROWS)
    whole.config.pad_token_id = whole.config.text_config.pad_token_id = tokenizer.pad_token_id
    whole.generation_config = llm.generation_config
    whole.generation_config.pad_token_id = tokenizer.pad_token_id
    template = _template(config, tokenizer)[1]
    processor = LlavaProcessor(
        image_processor=_image_processor(config),
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=fields.vision_feature_select_strategy,
        num_additional_image_tokens=int(clip),
        chat_template=tokenizer.chat_template or (template and template.jinja()),
    )
    parts = llm.config, tower.config
    with whole_folder(out) as folder:
        whole.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)
        _write_config(config, folder)
        del whole
        written = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        found = probe_whole(written, image, *parts, _tower_tokens(tower.config))
        check_parity("the written model", relative_difference(expected, found), PARITY_TOLERANCE, out)


def _text_fields(llm):
    fields = llm.config.to_dict()
    if isinstance(llm, LlamaForCausalLM):
        # InternLM is one by another name, which transformers does not know.
        fields = {key: value for key, value in fields.items() if key not in ("auto_map", "bias", "rotary")}
        fields["model_type"] = LlamaForCausalLM.config_class.model_type
    return fields


def _native_llava(model, fields):
    with init_empty_weights():
        whole = LlavaForConditionalGeneration(fields)
    state = {f"model.vision_tower.{key}": value for key, value in model.visual_encoder.state_dict().items()}
    for number in (0, 2):
        for kind in ("weight", "bias"):
            theirs = f"model.multi_modal_projector.linear_{number // 2 + 1}.{kind}"
            state[theirs] = model.projector.state_dict()[f"model.{number}.{kind}"]
    for key, value in model.llm.state_dict().items():
        state[key if key.startswith("lm_head.") else key.replace("model.", "model.language_model.", 1)] = value
    try:
        whole.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        kind = type(model.llm).__name__
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"--save-format huggingface can not hold a {kind}: {reason}") from error
    whole.tie_weights()
    return whole.eval()


def _add_rows(model, rows):
    before = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
            # New tokens are drawn nowhere: they begin as what all tokens have in common.
            layer.weight[before:] = layer.weight[:before].float().mean(0).to(layer.weight.dtype)


def _image_processor(config):
    """transformers' image processor for LLaVA, which pads where the run's data set did."""
    fields = BUILDER.build(config.image_processor).to_dict()
    kept = ("size", "crop_size", "image_mean", "image_std", "resample", "do_center_crop", "rescale_factor")
    kept = {key: fields[key] for key in kept if fields.get(key) is not None}
    return LlavaImageProcessor(**kept, do_pad=_pads(config))


def _pads(config):
    return bool(_data_set(config).get("pad_image_to_square", False))


def _data_set(config):
    found = config.get("train_dataloader", {}).get("dataset", {})
    # A concatenation: all of its members are of one kind.
    return found.datasets[0] if "datasets" in found else found


def _template(config, tokenizer):
    """tuple[str | None, Template | None]: The run's template, where XTuner knows it, and its name where it fits."""
    from xtuner.utils import PROMPT_TEMPLATE

    fields = _data_set(config).get("template_map_fn", {}).get("template")
    if isinstance(fields, str):
        # From a config that was dumped.
        fields = PROMPT_TEMPLATE.get(fields.rpartition(".")[2])
    name = next((name for name, known in PROMPT_TEMPLATE.items() if fields and dict(known) == dict(fields)), None)
    if name is None:
        return None, None
    try:
        return name, fit_template(name, tokenizer)
    except UserError:
        # XTuner trains with control words that are several tokens as well.
        template = get_template(name)
        return None, dataclasses.replace(template, suffix=template.suffix or tokenizer.eos_token or "")


def _write_hybrid(model, config, out, dtype, max_shard_size):
    tokenizer = BUILDER.build(config.tokenizer)
    tokenizer.padding_side = "left"  # as answers need it
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    expected = probe(_rounded(model, dtype))
    parts = model.llm.config, model.visual_encoder.config
    whole = assemble(model.llm, model.visual_encoder, model.projector, tokenizer, model.visual_select_layer)
    found = probe_whole(whole, whole.config.image_token_id, *parts, whole.config.tokens_per_tile)
    check_parity("the assembled model", relative_difference(expected, found), MERGE_TOLERANCE, out)
    whole.config.template = _template(config, tokenizer)[0]
    folder = resolve_folder(config.image_processor.pretrained_model_name_or_path)
    processor = llava_processor(tokenizer, folder, whole.config, pad=_pads(config))
    source = config.model.llm.get("pretrained_model_name_or_path", "its parts")
    write_model(whole, processor, out, source, dtype, max_shard_size, recipe={"kind": "supervised", "model": "LLaVA"})
    _write_config(config, Path(out))


def write_official(model, config, out, dtype, max_shard_size):
    """Write ``official``'s format: see the module's docstring."""
    from huggingface_hub import save_torch_state_dict

    tuned = model.use_visual_encoder_lora or not model.freeze_visual_encoder
    llm, tower = merge_parts(model, out)
    for part, wanted in ((llm, LlamaForCausalLM), (tower, CLIPVisionModel)):
        if not isinstance(part, wanted):
            raise UserError(
                f"--save-format official can not hold a {type(part).__name__}, only a {wanted.__name__}: "
                "use huggingface"
            )
    if llm.config.attention_bias:
        raise UserError(
            f"--save-format official can not hold {type(llm).__name__}, which has attention biases: use huggingface"
        )
    for part in (llm, model.projector, *([tower] if tuned else [])):
        _rounded(part, dtype)
    expected = probe(model)
    tokenizer, image_processor = (BUILDER.build(config[key]) for key in ("tokenizer", "image_processor"))
    state = {f"model.mm_{key.replace('model.', 'projector.', 1)}": v for key, v in model.projector.state_dict().items()}
    state.update(llm.state_dict())
    if tuned:
        prefix = "model.vision_tower.vision_tower.vision_model."
        state.update({prefix + key: value for key, value in tower.state_dict().items()})
    if llm.config.tie_word_embeddings:
        del state["lm_head.weight"]
    with whole_folder(out) as folder:
        llm.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        image_processor.save_pretrained(folder)
        fields = _official_fields(llm.config, tower, model.visual_select_layer, tuned, dtype, _pads(config))
        (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        state = {key: value.to(dtype).contiguous() for key, value in state.items()}
        save_torch_state_dict(state, folder, max_shard_size=max_shard_size, metadata={"format": "pt"})
        _write_config(config, folder)
        written = load_teacher(folder, torch.float32, "sdpa")
        found = probe_whole(
            written, written.config.image_token_id, llm.config, tower.config, written.config.tokens_per_tile
        )
        check_parity("the written model", relative_difference(expected, found), PARITY_TOLERANCE, out)


def _official_fields(text, tower, select_layer, tuned, dtype, pads):
    """config.json in the words of transformers 4, which LLaVA's own code stands on."""
    newer = ("rope_parameters", "auto_map", "dtype")
    fields = {key: value for key, value in text.to_dict().items() if key not in newer}
    rope = dict(text.rope_parameters)
    kind = rope.pop("rope_type", "default")
    theta = rope.pop("rope_theta")
    return {
        **fields,
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": kind, **rope},
        "torch_dtype": str(dtype).removeprefix("torch."),
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "image_aspect_ratio": "pad" if pads else "square",
        "mm_hidden_size": tower.config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": select_layer,
        "mm_vision_tower": str(tower.config.name_or_path),
        "unfreeze_mm_vision_tower": tuned,
        "use_mm_proj": True,
        "use_cache": True,
    }
