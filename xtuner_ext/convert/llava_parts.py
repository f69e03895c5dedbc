"""A LLaVA made of parts: a language model, a vision tower and XTuner's projector become one ``HybridVLForCausalLM``.

The parts are the folders that ``xtuner convert pth_to_hf`` writes: ``llm_adapter``, ``visual_encoder`` or
``visual_encoder_adapter``, and ``projector``.
"""

from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AddedToken, AutoModelForCausalLM, CLIPVisionModel, SiglipVisionModel

from ..errors import UserError
from ..modeling import HybridVLConfig, HybridVLForCausalLM
from ..modeling.processing import IMAGE_PLACEHOLDER, HybridVLProcessor
from ..modeling.vit import CLASS_TOKEN
from . import llama, qwen2
from .checkpoint import read_config_json, read_state
from .llama import EMBEDDING, HEAD
from .llava import TOWER_FIELDS, find_normalisation, read_image_processor
from .merge import attach, read_adapter
from .teacher import load_exactly, load_teacher, load_tokenizer, read_model_config, resolve_folder
from .vision_language import mark_unread

# Families whose model transformers has under names that our key maps know, which XTuner's adapters are for.
NATIVE = {"llama": llama, "qwen2": qwen2}
TOWER_CLASSES = {
    "clip": ("clip", CLIPVisionModel),
    "clip_vision_model": ("clip", CLIPVisionModel),
    "siglip": ("siglip", SiglipVisionModel),
    "siglip_vision_model": ("siglip", SiglipVisionModel),
}
ADAPTER, TOWER, TOWER_ADAPTER, PROJECTOR = "llm_adapter", "visual_encoder", "visual_encoder_adapter", "projector"


def local_folder(name, option):
    """The folder of a model that may be named as on a hub.

    Args:
        name (str): Folder, or an id such as ``xtuner/llava-internlm-7b``.
        option (str): Names the argument in messages.

    Returns:
        Path: An existing folder.

    Raises:
        UserError: When it is neither here nor to be had.
    """
    folder = resolve_folder(name)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name))
    except Exception as error:  # The hub's client raises a dozen types, for names, networks and rights.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{option} {name} is not a folder and can not be downloaded: {reason}") from error


def load_tower(folder, dtype=None):
    """Load a vision tower of transformers.

    Args:
        folder (str | Path): Of a CLIP or SigLIP model, or of its vision part alone.
        dtype (torch.dtype, optional): The folder's own when absent.

    Returns:
        CLIPVisionModel | SiglipVisionModel: In evaluation mode.

    Raises:
        UserError: For another kind of model.
    """
    kind = read_config_json(folder).get("model_type")
    if kind not in TOWER_CLASSES:
        raise UserError(f"{folder} has model_type {kind!r}, expected a vision tower: {', '.join(TOWER_CLASSES)}")
    return TOWER_CLASSES[kind][1].from_pretrained(folder, dtype=dtype or "auto").eval()


def as_decoder(llm):
    """A language model as the class of this package, without an image front end.

    Args:
        llm (PreTrainedModel): Ours, or transformers' Llama or Qwen2.

    Returns:
        HybridVLForCausalLM: With the same tensors.

    Raises:
        UserError: For another class.
    """
    if isinstance(llm, HybridVLForCausalLM):
        fields, state = llm.config.to_dict(), llm.state_dict()
        config = HybridVLConfig.from_dict({**fields, "vision": None, "image_token_id": None})
        state = {key: tensor for key, tensor in state.items() if not key.startswith("vision.")}
    else:
        family = NATIVE.get(llm.config.model_type)
        if family is None:
            raise UserError(
                f"the language model is a {type(llm).__name__}, expected a Llama, a Qwen2 or a model of this package"
            )
        config = family.model_config(llm.config.to_dict(), llm.name_or_path)
        state = family.to_model(config, llm.state_dict())
    config._attn_implementation = "sdpa"
    with init_empty_weights():
        decoder = HybridVLForCausalLM(config)
    load_exactly(decoder, state, "the language model")
    return decoder.eval()


def assemble(llm, tower, projector, tokenizer, select_layer=-2):
    """Put a tower and a projector in front of a language model.

    The vocabulary gets a token for images where the tokenizer has none; its row is the mean of the others.

    Args:
        llm (PreTrainedModel): See :func:`as_decoder`.
        tower (CLIPVisionModel | SiglipVisionModel): The vision tower.
        projector (nn.Module): Linear, GELU, linear: a ``Sequential``, or XTuner's ``ProjectorModel``.
        tokenizer (PreTrainedTokenizerBase): Gets ``<image>``.
        select_layer (int): Layer of the tower whose output is taken.

    Returns:
        HybridVLForCausalLM: In evaluation mode; weights keep their precision.

    Raises:
        UserError: For parts that do not fit each other.
    """
    decoder = as_decoder(llm)
    config = decoder.config
    kind = TOWER_CLASSES[tower.config.model_type][0]
    weights = {key.removeprefix("model."): tensor for key, tensor in projector.state_dict().items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    wide, width = tower.config.hidden_size, config.hidden_size
    expected = {"0.weight": (width, wide), "0.bias": (width,), "2.weight": (width, width), "2.bias": (width,)}
    if shapes != expected:
        raise UserError(
            f"the projector has weights of the shapes {shapes}, expected {expected} for a tower of width {wide} and "
            f"a language model of width {width}"
        )
    config.image_token_id = image_token(tokenizer)
    rows = max(config.vocab_size, config.image_token_id + 1)
    config.vision = {
        "front_end": "vit",
        "tower": kind,
        "tower_config": {key: getattr(tower.config, key) for key in TOWER_FIELDS},
        "image_size": tower.config.image_size,
        "patch_size": tower.config.patch_size,
        "num_channels": tower.config.num_channels,
        "downsample_ratio": 1.0,
        "select_layer": select_layer,
        "projector": "mlp2x_gelu",
    }
    if kind == "siglip":
        config.vision["tower_config"]["vision_use_head"] = False
    try:
        kept = {key: tensor for key, tensor in tower.state_dict().items() if not key.startswith("head.")}
        vision = mark_unread(config.vision, {f"vision.tower.{key}": tensor for key, tensor in kept.items()})
    except ValueError as error:
        raise UserError(str(error)) from error
    state = {**decoder.state_dict(), **vision, **{f"vision.projector.{key}": tensor for key, tensor in weights.items()}}
    for key in (EMBEDDING, HEAD):
        new = rows - config.vocab_size
        mean = state[key].float().mean(0, keepdim=True).to(state[key].dtype)
        state[key] = torch.cat([state[key], mean.expand(new, -1)]) if new else state[key]
    config.vocab_size = rows
    with init_empty_weights():
        model = HybridVLForCausalLM(config)
    load_exactly(model, state, "the assembled LLaVA")
    return model.eval()


def image_token(tokenizer):
    """int: Id of ``<image>``, which the tokenizer gets where it has none."""
    if IMAGE_PLACEHOLDER not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE_PLACEHOLDER, special=True, normalized=False)], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)


def llava_processor(tokenizer, tower_folder, config, pad=True):
    """The processor of an assembled model.

    Args:
        tokenizer (PreTrainedTokenizerBase): With ``<image>``.
        tower_folder (str | Path): Its preprocessor_config.json names the normalisation.
        config (HybridVLConfig): Of the model.
        pad (bool): Pad images to squares; else their middle is cut out.

    Returns:
        HybridVLProcessor: One tile an image, which ``<image>`` itself stands for.

    Raises:
        UserError: For an unknown normalisation.
    """
    fields, file = read_image_processor(Path(tower_folder))
    default = "clip" if config.vision["tower"] in CLASS_TOKEN else "siglip"
    return HybridVLProcessor(
        tokenizer,
        tokens_per_tile=config.tokens_per_tile,
        image_size=config.vision["image_size"],
        max_tiles=1,
        use_thumbnail=False,
        normalisation=find_normalisation(fields, file) if fields.get("image_mean") else default,
        fit="pad" if pad else "crop",
        image_start="",
        image_context=IMAGE_PLACEHOLDER,
        image_end="",
    )


def load_llava(llm, llava, visual_encoder=None, select_layer=-2, dtype=torch.float32, trust_remote_code=False):
    """Load what XTuner's ``chat`` is given as one model.

    Args:
        llm (str): Folder of the language model: a Llama, a Qwen2, a teacher, or a distilled student.
        llava (str): Folder that ``xtuner convert pth_to_hf`` wrote, or its name on a hub.
        visual_encoder (str, optional): Folder of the vision tower, unless ``llava`` holds it.
        select_layer (int): Layer of the tower whose output is taken.
        dtype (torch.dtype): Of the weights; decay rates stay fp32.
        trust_remote_code (bool): Run the tokenizer's own code.

    Returns:
        tuple[HybridVLForCausalLM, HybridVLProcessor]: Ready to generate.

    Raises:
        UserError: For folders that are missing, or do not belong together.
    """
    folder = local_folder(llava, "--llava")
    if not (folder / PROJECTOR).is_dir():
        raise UserError(f"--llava {llava} has no folder {PROJECTOR}, expected what `xtuner convert pth_to_hf` writes")
    llm_folder = local_folder(llm, "LLM")
    if (folder / "config.json").is_file() and not folder.samefile(llm_folder):
        raise UserError(f"--llava {llava} holds the tuned language model itself: give it in the place of {llm} too")
    if (folder / TOWER).is_dir():
        if visual_encoder is not None:
            raise UserError(f"--llava {llava} holds its own vision tower: leave --visual-encoder out")
        visual_encoder = folder / TOWER
    if visual_encoder is None:
        raise UserError(f"--llava {llava} holds no vision tower: name the one of the training by --visual-encoder")
    tower_folder = local_folder(visual_encoder, "--visual-encoder")
    tower = load_tower(tower_folder, dtype)
    if (folder / TOWER_ADAPTER).is_dir():
        tower = with_adapter(tower, folder / TOWER_ADAPTER)
    language = _load_language_model(llm_folder, folder / ADAPTER, dtype)
    tokenizer = load_tokenizer(llm_folder, trust_remote_code)
    model = assemble(language, tower, load_projector(folder / PROJECTOR), tokenizer, select_layer).to(dtype)
    return model, llava_processor(tokenizer, tower_folder, model.config)


def load_projector(folder):
    """nn.Sequential: A projector that XTuner wrote; one without GELU or biases is refused by UserError."""
    raw = read_config_json(folder)
    found = {key: raw.get(key) for key in ("depth", "hidden_act", "bias")}
    if found != {"depth": 2, "hidden_act": "gelu", "bias": True}:
        raise UserError(f"{folder} holds a projector with {found}, expected two layers with GELU and biases")
    wide, width = raw["visual_hidden_size"], raw["llm_hidden_size"]
    projector = make_projector(wide, width)
    state = {key.removeprefix("model."): tensor for key, tensor in read_state(folder).items()}
    projector.load_state_dict(state)
    return projector


def make_projector(wide, width):
    """nn.Sequential: Of new weights, from a tower's width to a language model's."""
    return torch.nn.Sequential(torch.nn.Linear(wide, width), torch.nn.GELU(), torch.nn.Linear(width, width))


def _load_language_model(folder, adapter, dtype):
    state = read_adapter(adapter)[1] if adapter.is_dir() else {}
    family, _ = read_model_config(folder)
    if family in NATIVE.values() and not any(".mixer." in key for key in state):
        # Adapters name transformers' layers.
        llm = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    else:
        llm = load_teacher(folder, dtype, "sdpa")
    return with_adapter(llm, adapter) if state else llm


def with_adapter(model, folder):
    """Merge an adapter's folder into a model; UserError when it belongs to another one."""
    config, state, _ = read_adapter(folder)
    return attach(model, config, state, folder).merge_and_unload()
