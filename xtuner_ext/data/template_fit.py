"""Matching conversation templates with tokenizers."""

import dataclasses
import re

from jinja2.exceptions import TemplateError

from ..errors import UserError
from .templates import TEMPLATES, get_template, render

MARKER = re.compile(r"<\|[^|<>\s]+\|>")
TURNS = [("First question?", "First answer."), ("Second question?", None)]
SYSTEM = "Be brief."


def detect_template(tokenizer):
    """Find the template that writes conversations as the tokenizer's own chat template does.

    Args:
        tokenizer (PreTrainedTokenizerBase): Tokenizer, with a chat template or without.

    Returns:
        str | None: Name of the first exact fit, with a system message and without; None when nothing fits.
    """
    if not tokenizer.chat_template:
        return None
    # Imported here: XTuner's package takes seconds to load.
    from xtuner.utils import PROMPT_TEMPLATE

    wanted = {system: _render_own(tokenizer, system) for system in (None, SYSTEM)}
    if wanted[None] is None:
        return None
    for name in dict.fromkeys((*TEMPLATES, *PROMPT_TEMPLATE)):
        template = _with_end(get_template(name), tokenizer)
        if all(_same(text, render(template, TURNS, system), tokenizer) for system, text in wanted.items()):
            return name
    return None


def fit_template(name, tokenizer):
    """Get a template ready for a tokenizer.

    Args:
        name (str): Name of the template.
        tokenizer (PreTrainedTokenizerBase): Tokenizer of the model.

    Returns:
        Template: Its answers end with the tokenizer's end-of-sequence token where the template names no end.

    Raises:
        UserError: For an unknown name or a template that does not fit the tokenizer.
    """
    template = _with_end(get_template(name), tokenizer)
    if not template.suffix:
        raise UserError(
            f"prompt template {name!r} names no end of an answer and the tokenizer has no end-of-sequence token: "
            "an answer would never end"
        )
    check_template(template, tokenizer, name)
    return template


def check_template(template, tokenizer, name="given"):
    """Insist that every control token of a template is one token of the tokenizer.

    Markers that the tokenizer's own chat template spells the same way are right however they are split.

    Args:
        template (Template): Conversation template.
        tokenizer (PreTrainedTokenizerBase): Tokenizer of the model.
        name (str): The template's name, for messages.

    Raises:
        UserError: For a control token that the tokenizer splits or does not know.
    """
    own = str(tokenizer.chat_template or "")
    markers = MARKER.findall(template.system + template.instruction)
    control = {word: "its end of an answer" for word in (template.suffix, *template.stop_words) if word}
    control.update({word: "its marker" for word in markers if word not in own and word not in control})
    for word, role in control.items():
        ids = tokenizer(word, add_special_tokens=False).input_ids
        # The unknown token may itself be a control token.
        unknown = tokenizer.unk_token_id in ids and word != tokenizer.unk_token
        if len(ids) != 1 or unknown:
            raise UserError(
                f"prompt template {name!r} does not fit the tokenizer: {role} {word} is {len(ids)} tokens there, "
                "expected a single one"
            )


def _with_end(template, tokenizer):
    # XTuner leaves the end of such an answer to the data pipeline.
    return template if template.suffix else dataclasses.replace(template, suffix=tokenizer.eos_token or "")


def _render_own(tokenizer, system):
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in TURNS:
        messages.append({"role": "user", "content": question})
        messages += [{"role": "assistant", "content": answer}] if answer else []
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError):
        # Some chat templates refuse a system message, some read content as a list of parts.
        return None


def _same(text, rendered, tokenizer):
    # A leading beginning-of-sequence token is the tokenizer's matter.
    return text is None or rendered in (text, text.removeprefix(tokenizer.bos_token or ""))
