"""Making one model folder of a language model and a vision tower, which every verb of this package can then train.

XTuner's own ``LLaVAModel`` takes CLIP, and one image a turn in rows of one sample. A folder from here is tuned by
``SupervisedModel`` instead: with SigLIP, several images, packed rows, video.
"""

from pathlib import Path

import torch

from ..data.sources.folder import is_made, new_folder
from ..errors import UserError
from .export import write_model
from .llava_export import read_trained
from .llava_parts import assemble, llava_processor, load_projector, load_tower, local_folder, make_projector
from .teacher import load_teacher, load_tokenizer

# What a projector is called in checkpoints of XTuner's LLaVAModel and of ours.
PREFIXES = ("projector.model.", "llm.vision.projector.")


def make_llava(
    llm, visual_encoder, out, projector=None, select_layer=-2, template=None, pad=True, seed=0, trust_remote_code=False
):
    """Write a LLaVA, in the precision of its language model.

    Args:
        llm (str): Folder of a teacher or of a distilled student; an image front end of its own is left behind.
        visual_encoder (str): Folder of CLIP or SigLIP.
        out (str | Path): Folder to create; it appears whole or not at all. When it was made with the same
            arguments it is left alone.
        projector (str, optional): Folder that XTuner wrote, or a checkpoint that holds one; new weights when absent.
        select_layer (int): Layer of the tower whose output is taken.
        template (str, optional): Conversation template, the language model's own when absent.
        pad (bool): Pad images to squares; else their middle is cut out.
        seed (int): Seed of a new projector.
        trust_remote_code (bool): Run the tokenizer's own code.

    Returns:
        Path: The folder.

    Raises:
        UserError: For parts that are missing or do not fit each other, or a folder that holds something else.
    """
    settings = {
        **{"llm": str(llm), "visual_encoder": str(visual_encoder), "projector": projector and str(projector)},
        **{"select_layer": select_layer, "template": template, "pad": pad, "seed": seed},
    }
    if is_made(out, settings, "make_llava"):
        return Path(out)
    llm_folder, tower_folder = local_folder(llm, "llm"), local_folder(visual_encoder, "visual_encoder")
    language, tower = load_teacher(llm_folder, attn_implementation="sdpa"), load_tower(tower_folder)
    dtype = language.lm_head.weight.dtype
    tokenizer = load_tokenizer(llm_folder, trust_remote_code)
    front = _projector(projector, tower.config.hidden_size, language.config.hidden_size, seed)
    model = assemble(language, tower, front, tokenizer, select_layer)
    model.config.template = template or model.config.template
    processor = llava_processor(tokenizer, tower_folder, model.config, pad)
    with new_folder(out, settings) as work:
        write_model(model, processor, work, llm, dtype)
    return Path(out)


def _projector(source, wide, width, seed):
    if source is not None and (Path(source) / "config.json").is_file():
        return load_projector(Path(source))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        projector = make_projector(wide, width)
    if source is not None:
        state = read_trained(source)
        found = {key.removeprefix(p): value for p in PREFIXES for key, value in state.items() if key.startswith(p)}
        try:
            projector.load_state_dict(found)
        except RuntimeError as error:
            raise UserError(f"checkpoint {source} holds no projector from width {wide} to {width}") from error
    return projector
