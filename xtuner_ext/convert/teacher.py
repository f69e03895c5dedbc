"""Teachers of any supported family as a ``HybridVLForCausalLM`` with attention everywhere."""

import importlib.util
from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from transformers import AddedToken, AutoTokenizer
from transformers.utils import logging

from ..errors import UserError
from ..modeling import HybridVLConfig, HybridVLForCausalLM
from ..modeling.processing import HybridVLProcessor
from . import hovle, internlm2, internvl2, llama, llava, qwen2
from .checkpoint import find_dtype, read_config_json, read_state
from .llama import EMBEDDING, HEAD
from .refusals import refuse_unsupported

FAMILIES = (hovle, internvl2, llava, internlm2, llama, qwen2)

# Where configs may point for the teacher that the package ships.
EMBEDDED = {"digits-teacher": Path(__file__).parent.parent / "assets" / "digits_teacher"}


def resolve_folder(path):
    """Path: A model folder, with the names of shipped models resolved."""
    return Path(EMBEDDED.get(str(path), path))


def teacher_family(folder):
    """Find the key map for a folder.

    Args:
        folder (str | Path): Model folder.

    Returns:
        module: The family's key map, or None for a folder that this package exported.

    Raises:
        UserError: For a folder that no map covers.
    """
    return _family(read_config_json(folder), Path(folder) / "config.json")


def read_model_config(folder):
    """Read and translate a folder's config.json.

    Args:
        folder (str | Path): Model folder.

    Returns:
        tuple[module, HybridVLConfig]: The family's key map, None for a folder that this package exported, and
        the model's configuration.

    Raises:
        UserError: For a folder that no map covers, an architecture that its map does not, or broken fields.
    """
    where = Path(folder) / "config.json"
    raw = read_config_json(folder)
    family = _family(raw, where)
    try:
        return family, HybridVLConfig.from_dict(raw) if family is None else family.model_config(raw, where)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    except (StrictDataclassError, AttributeError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{where} has a field of the wrong kind: {' '.join(str(error).split())}") from error


def _family(raw, where):
    if raw.get("model_type") == HybridVLConfig.model_type:
        return None
    refuse_unsupported(raw, where)
    for family in FAMILIES:
        if family.matches(raw):
            return family
    known = ", ".join(family.NAME for family in FAMILIES)
    raise UserError(
        f"{where} has model_type {raw.get('model_type')!r}, which is none of: {known}, {HybridVLConfig.model_type}"
    )


def load_teacher(pretrained_model_name_or_path, dtype=None, attn_implementation="auto"):
    """Load a teacher.

    Under accelerate's ``init_empty_weights`` only the structure is built.

    Args:
        pretrained_model_name_or_path (str): Local folder, or the name of a shipped model.
        dtype (str | torch.dtype, optional): Such as ``"bfloat16"``; the checkpoint's own when absent.
        attn_implementation (str): ``auto`` takes flash-attn where it is installed and can run, else
            ``sdpa``; or one of transformers' names.

    Returns:
        HybridVLForCausalLM: The teacher, in evaluation mode.

    Raises:
        UserError: For an unsupported or incomplete folder, or an unknown dtype.
    """
    folder = resolve_folder(pretrained_model_name_or_path)
    family, config = read_model_config(folder)
    dtype = find_dtype(dtype, "dtype of the teacher") if isinstance(dtype, str) else dtype
    config._attn_implementation = _attention(dtype) if attn_implementation == "auto" else attn_implementation
    empty = _meta_context()
    with init_empty_weights():
        model = HybridVLForCausalLM(config)
    if not empty:
        state = stored_state(folder, family)
        if family is not None:
            state = family.to_model(config, state)
        load_exactly(model, state, folder)
    if dtype is not None:
        model = model.to(dtype)
    return model.eval()


def stored_state(folder, family, structure_only=False):
    """Read all tensors of a teacher, those that lie in another folder included.

    Args:
        folder (Path): Model folder.
        family (module | None): Its key map.
        structure_only (bool): Read shapes and dtypes; the tensors are on meta.

    Returns:
        dict[str, Tensor]: Under the family's names.

    Raises:
        UserError: For a missing or damaged file.
    """
    state = read_state(folder, structure_only)
    if family is llava:
        raw = read_config_json(folder)
        state.update(llava.companion_state(raw, folder / "config.json", state, structure_only))
    return state


def load_exactly(model, state, where):
    """Load tensors and insist on every key and shape.

    A head that is the embedding may be absent; the two stay one parameter.

    Args:
        model (HybridVLForCausalLM): Receives the tensors; its parameters may be on meta.
        state (dict[str, Tensor]): Our names; ``unread.`` entries are left out.
        where (str | Path): Names the source in messages.

    Raises:
        UserError: For a missing, surplus or misshapen tensor, or a tied head that differs from the embedding.
    """
    state = {key: tensor for key, tensor in state.items() if not key.startswith("unread.")}
    if model.config.tie_word_embeddings:
        _share_head(state, where)
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    missing, surplus = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    if missing:
        raise UserError(f"{where}: {len(missing)} tensors are missing, the first is {missing[0]}")
    if surplus:
        raise UserError(f"{where}: {len(surplus)} tensors are unknown, the first is {surplus[0]}")
    for key, shape in expected.items():
        if tuple(state[key].shape) != shape:
            raise UserError(f"{where}: {key} has shape {tuple(state[key].shape)}, expected {shape}")
    model.load_state_dict(state, strict=True, assign=True)
    # Assigned tensors are parameters of their own.
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def _share_head(state, where):
    embedding, head = state.get(EMBEDDING), state.get(HEAD)
    if embedding is None or head is None:
        state.update({key: tensor for key, tensor in ((EMBEDDING, head), (HEAD, embedding)) if tensor is not None})
    elif not (embedding.is_meta or head.is_meta or torch.equal(embedding, head)):
        raise UserError(
            f"{where}: the configuration says tie_word_embeddings, but {HEAD} differs from {EMBEDDING}: "
            "set tie_word_embeddings to false in config.json"
        )


def load_processor(pretrained_model_name_or_path, max_tiles=None, trust_remote_code=False):
    """The processor of a teacher or exported folder.

    Args:
        pretrained_model_name_or_path (str): Local folder, or the name of a shipped model.
        max_tiles (int, optional): Overrides the folder's own limit.
        trust_remote_code (bool): Run the folder's own tokenizer code, as InternLM2's tokenizer needs.

    Returns:
        HybridVLProcessor: With the folder's tokenizer.

    Raises:
        UserError: When config.json or the tokenizer is missing, or the tokenizer is larger than the vocabulary.
    """
    folder = resolve_folder(pretrained_model_name_or_path)
    family, config = read_model_config(folder)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    if family is None:
        processor = HybridVLProcessor.from_pretrained(folder, tokenizer)
    else:
        settings = family.processor_settings(read_config_json(folder), folder / "config.json")
        processor = HybridVLProcessor(tokenizer, tokens_per_tile=config.tokens_per_tile, **settings)
    if config.vision is not None:
        _know_image_token(tokenizer, processor.image_context, config, folder)
    check_vocabulary(tokenizer, config, folder)
    if max_tiles is not None:
        processor.max_tiles = max_tiles
    return processor


def _know_image_token(tokenizer, token, config, folder):
    if token not in tokenizer.get_vocab():
        # LLaVA's own tokenizer lacks it; the key map keeps the id behind its vocabulary free.
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
    found = tokenizer.convert_tokens_to_ids(token)
    if found != config.image_token_id:
        raise UserError(
            f"the tokenizer of {folder} gives {token} the id {found}, config.json expects {config.image_token_id}"
        )


def read_tokenizer(folder, trust_remote_code=False, **options):
    """A folder's tokenizer, as it is.

    Args:
        folder (str | Path): Model folder.
        trust_remote_code (bool): Run the folder's own tokenizer code.
        **options: As ``from_pretrained`` takes them.

    Returns:
        PreTrainedTokenizerBase: The tokenizer.

    Raises:
        UserError: When there is none that loads.
    """
    # AutoTokenizer warns of every config.json whose model type it does not know, which says nothing here.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # A broken tokenizer.json raises that very class, and a folder's own code anything.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder} has no tokenizer that loads: {reason}{remote_hint(trust_remote_code)}") from error
    finally:
        logging.set_verbosity(verbosity)
    if tokenizer.get_vocab().keys() <= tokenizer.get_added_vocab().keys():
        # Without files some classes load with no vocabulary at all.
        raise UserError(f"{folder} has no tokenizer that loads: its files are missing")
    return tokenizer


def remote_hint(trust_remote_code):
    """str: What may help where a folder did not load, unless its own code has been allowed."""
    if trust_remote_code:
        return ""
    return "; if it needs code of its own, allow that with trust_remote_code=True in a config or by --trust-remote-code"


def load_tokenizer(folder, trust_remote_code=False):
    """A folder's tokenizer for a model of this package.

    Args:
        folder (str | Path): Model folder.
        trust_remote_code (bool): Run the folder's own tokenizer code.

    Returns:
        PreTrainedTokenizerBase: Pads on the left; with the end of sequence where it has no token for that.

    Raises:
        UserError: When there is none that loads.
    """
    tokenizer = read_tokenizer(folder, trust_remote_code, padding_side="left")
    if tokenizer.pad_token is None:
        # Llama 3 has none; padding is masked, so that any token will do that is special anyway.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_vocabulary(tokenizer, config, folder):
    """Insist that a model knows every id that its tokenizer gives.

    Args:
        tokenizer (PreTrainedTokenizerBase): Tokenizer of the folder.
        config (HybridVLConfig): Gives the size of the vocabulary.
        folder (str | Path): Named in messages.

    Raises:
        UserError: For an id outside the vocabulary.
    """
    word, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer gives {word!r} the id {largest}, but the model's vocabulary has "
            f"{config.vocab_size} tokens: tokenizer and weights do not belong together"
        )


def _attention(dtype):
    # flash-attn takes half precision only.
    flash = dtype in (torch.float16, torch.bfloat16) and torch.cuda.is_available()
    return "flash_attention_2" if flash and importlib.util.find_spec("flash_attn") else "sdpa"


def _meta_context():
    # accelerate patches parameter registration; a fresh parameter tells whether that is active.
    return torch.nn.Linear(1, 1).weight.is_meta
