"""Token ids and labels of conversations, turn by turn, and of plain text."""

import functools
import re

import torch

from ..modeling.processing import IMAGE_PLACEHOLDER

IGNORE_INDEX = -100
# Grounding data writes these on purpose; they neither end a turn nor claim an image slot.
GROUNDING = {"<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"}
# A noncharacter of Unicode, which no text holds.
BREAK = "\ufdd0"


def encode_conversation(tokenizer, template, turns, system=None, ended=True, images=()):
    """Tokenize a conversation and mark what is trained.

    Every turn is tokenized on its own, as question block plus answer, so no re-tokenized substring has to
    be matched against the whole; all templates end a turn with a token that nothing merges with.

    What looks like a special token in the words of either side is read as the characters it is made of: it neither
    ends a turn nor claims an image slot. InternVL's marks of grounding (``<ref>``, ``<box>``, ``<quad>``) stay tokens.

    Args:
        tokenizer (PreTrainedTokenizerBase): Its own leading tokens (such as a beginning-of-sequence token)
            are kept.
        template (Template): Conversation template.
        turns (list[tuple[str, str | None]]): Questions and answers; the last answer is None where it is wanted.
        system (str, optional): System message.
        ended (bool): Whether the last answer gets its suffix; one that was cut off does not.
        images (list[str]): What takes the place of each ``<image>`` of the questions, in reading order.

    Returns:
        tuple[Tensor, Tensor]: ``input_ids`` and ``labels`` (L,); labels are -100 outside the answers.

    Raises:
        ValueError: When placeholders and images differ in number.
    """
    _check_places([question for question, _ in turns], images)
    words, images, ids = special_words(tokenizer, len(tokenizer)), iter(images), _leading_ids(tokenizer)
    labels = [IGNORE_INDEX] * len(ids)
    for number, (question, answer) in enumerate(turns):
        own = [next(images) for _ in range(question.count(IMAGE_PLACEHOLDER))]
        prompt, before = _prompt(words, template, question, system, own, number == 0)
        turn_ids = prompt_ids = _pieces_ids(tokenizer, before, prompt, template.suffix)
        if answer is not None:
            answer = template.answer(_broken(words, answer), ended=ended or number < len(turns) - 1)
            turn_ids = _pieces_ids(tokenizer, before, prompt + answer, template.suffix)
            if turn_ids[: len(prompt_ids)] != prompt_ids:
                # The answer merges with the prompt's end; generation starts from the prompt's own tokens.
                turn_ids = prompt_ids + _pieces_ids(tokenizer, "", answer, template.suffix)
        ids += turn_ids
        labels += [IGNORE_INDEX] * len(prompt_ids) + turn_ids[len(prompt_ids) :]
    return torch.tensor(ids), torch.tensor(labels)


def encode_prompt(tokenizer, template, question, system=None, images=(), first=True):
    """Tokenize one question as :func:`encode_conversation` does, up to where its answer begins.

    Args:
        tokenizer (PreTrainedTokenizerBase): Tokenizer.
        template (Template): Conversation template.
        question (str): The user's words.
        system (str, optional): System message.
        images (list[str]): What takes the place of each ``<image>``.
        first (bool): Whether this opens the conversation; a later question follows the end of a turn.

    Returns:
        list[int]: Ids, with the tokenizer's own leading tokens in front of the first question.

    Raises:
        ValueError: When placeholders and images differ in number.
    """
    _check_places([question], images)
    words = special_words(tokenizer, len(tokenizer))
    prompt, before = _prompt(words, template, question, system, images, first)
    return (_leading_ids(tokenizer) if first else []) + _pieces_ids(tokenizer, before, prompt, template.suffix)


def _check_places(questions, images):
    places = sum(question.count(IMAGE_PLACEHOLDER) for question in questions)
    if places != len(images):
        raise ValueError(f"the questions have {places} {IMAGE_PLACEHOLDER} placeholders for {len(images)} images")


def _prompt(words, template, question, system, images, first):
    """tuple[str, str]: A question block, with a ``BREAK`` wherever a special token is none, and what it follows."""
    start, *rest = (_broken(words, part) for part in question.split(IMAGE_PLACEHOLDER))
    question = start + "".join(image + part for image, part in zip(images, rest))
    prompt = template.prompt(question, first=first, system=system and _broken(words, system))
    return prompt, "" if first else template.suffix


def ids_after(tokenizer, before, text):
    """Tokenize a text that follows another.

    SentencePiece puts a space in front of what it takes for the start of a text.

    Args:
        tokenizer (PreTrainedTokenizerBase): Tokenizer.
        before (str): What precedes, such as the end of the turn before; nothing merges with it.
        text (str): What is wanted.

    Returns:
        list[int]: Ids of ``text`` alone.
    """
    skipped = len(tokenizer(before, add_special_tokens=False).input_ids) if before else 0
    return tokenizer(before + text, add_special_tokens=False).input_ids[skipped:]


@functools.lru_cache(maxsize=16)
def special_words(tokenizer, size):
    """re.Pattern: Finds where a text looks like a special token; ``size`` is the tokenizer's."""
    # The size is part of the key: tokens may be added to a tokenizer.
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special} - GROUNDING
    # At every place where a word begins, also within another, and after its first character.
    return re.compile(f"(?={'|'.join(map(re.escape, special))})." if special else "(?!)", re.DOTALL)


def _broken(words, text):
    return words.sub(lambda found: found[0] + BREAK, text)


def _pieces_ids(tokenizer, before, text, mark):
    """Tokenize a text whose pieces are not to be read across a ``BREAK``; a special ``mark`` stands for it."""
    ids = []
    for piece in text.split(BREAK):
        ids += ids_after(tokenizer, before, piece)
        before = mark
    return ids


def next_token_rows(labels):
    """Positions whose prediction is supervised: those before a supervised token.

    Args:
        labels (Tensor): (B, L), -100 where nothing is supervised.

    Returns:
        Tensor: Boolean (B, L).
    """
    rows = torch.zeros_like(labels, dtype=torch.bool)
    rows[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    return rows


def encode_text(tokenizer, text, ended=False):
    """Tokenize plain text and train all of it.

    What looks like a special token in the text is read as the characters it is made of: a document that
    mentions ``<image>`` or an end token neither claims an image slot nor ends.

    Args:
        tokenizer (PreTrainedTokenizerBase): Its own leading tokens (such as a beginning-of-sequence token)
            are put in front, untrained.
        text (str): Any text.
        ended (bool): Append the end-of-sequence token, which the tokenizer must have.

    Returns:
        tuple[Tensor, Tensor]: ``input_ids`` and ``labels`` (L,).
    """
    lead = _leading_ids(tokenizer)
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    if ended:
        ids = [*ids, tokenizer.eos_token_id]
    return torch.tensor(lead + ids), torch.tensor([IGNORE_INDEX] * len(lead) + ids)


def _leading_ids(tokenizer):
    ids = list(tokenizer("").input_ids)
    ends = ids and tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id
    return ids[:-1] if ends else ids
