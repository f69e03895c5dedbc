"""Answers of a teacher to a list of prompts."""

import hashlib
from pathlib import Path

import torch

from ...errors import UserError
from ...modeling.processing import IMAGE_PLACEHOLDER
from ..template_fit import detect_template, fit_template

PROMPTS = Path(__file__).parent.parent.parent / "assets" / "prompts.txt"
BATCH_SIZE = 32  # prompts
TEMPERATURE, TOP_P = 0.7, 0.9


def read_prompts(path=None):
    """Read a list of prompts.

    Args:
        path (str | Path, optional): Text file with one prompt a line; the list of this package when absent.

    Returns:
        list[str]: Different prompts, in an order that only depends on their words.

    Raises:
        UserError: For a missing, unreadable or empty file, or a prompt that asks about an image.
    """
    path = Path(path or PROMPTS)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except FileNotFoundError as error:
        raise UserError(f"prompt file {path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt file {path} is not a readable text: {error}") from error
    for number, line in enumerate(lines, start=1):
        if IMAGE_PLACEHOLDER in line:
            raise UserError(f"{path}:{number}: {IMAGE_PLACEHOLDER} stands in a prompt, expected text only")
    if not any(lines):
        raise UserError(f"prompt file {path} is empty, expected one prompt a line")
    return sorted({line for line in lines if line}, key=lambda line: hashlib.sha256(line.encode()).digest())


@torch.inference_mode()
def sample_answers(model, processor, template, prompts, max_new_tokens, seed, on_batch=None):
    """Let a teacher answer, with a little chance.

    Args:
        model (HybridVLForCausalLM): The teacher.
        processor (HybridVLProcessor): Its processor.
        template (str): Name of its conversation template.
        prompts (list[str]): Questions.
        max_new_tokens (int): Longest answer in tokens.
        seed (int): Seed of the sampling.
        on_batch (callable, optional): Called with the number of prompts finished in a batch.

    Returns:
        list[tuple[str, bool]]: In the order of the prompts, the answer and whether the teacher ended it.
    """
    # Imported here: only answers need what is above this room.
    from ...evaluation.runner import stop_token_ids

    tokenizer = processor.tokenizer
    template = fit_template(template, tokenizer)
    stops = stop_token_ids(tokenizer, template, model.config)
    # Prompts of like length share a batch, which keeps padding short.
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    answers = [None] * len(prompts)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(order), BATCH_SIZE):
            batch = order[start : start + BATCH_SIZE]
            inputs = processor([template.prompt(prompts[index]) for index in batch]).to(model.device)
            output = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=True,
                temperature=TEMPERATURE,
                top_p=TOP_P,
                top_k=0,
                eos_token_id=stops,
                pad_token_id=tokenizer.pad_token_id or 0,
            )
            for index, ids in zip(batch, output[:, inputs["input_ids"].shape[1] :].tolist()):
                end = next((place for place, token in enumerate(ids) if token in stops), None)
                text = tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
                # The limit may fall within a character.
                answers[index] = (text.strip().rstrip("\ufffd"), end is not None)
            if on_batch is not None:
                on_batch(len(batch))
    return answers


def teacher_template(model, tokenizer):
    """Find how a teacher wants to be asked.

    Args:
        model (HybridVLForCausalLM): The teacher.
        tokenizer (PreTrainedTokenizerBase): Its tokenizer.

    Returns:
        str: Name of the template that its configuration names, or that its chat template equals.

    Raises:
        UserError: When there is neither.
    """
    name = model.config.template or detect_template(tokenizer)
    if name is None:
        raise UserError(
            "the teacher's config.json names no conversation template and its tokenizer's chat template is none "
            "that is known, expected one of the two"
        )
    return name
