"""Documents cut into passages of equal length."""

import bisect
import re

from ..masking import encode_text

SENTENCE_END = re.compile(r"(?<=[.!?:])([\"'”’)\]]*) +(?=[\"'“‘(\[]*[A-Z0-9])")
SHORTEST_TAIL = 0.25  # of a passage


def cut_passages(paragraphs, tokenizer, length):
    """Cut a document.

    A passage begins with a sentence and has as many tokens as are asked for, so batches need no padding; the
    rest of the sentence that it breaks off in is left out. The last one is shorter, and dropped below a quarter.

    Args:
        paragraphs (list[str]): The document.
        tokenizer (PreTrainedTokenizerBase): Counts tokens, its own leading ones included.
        length (int): Tokens of a passage.

    Returns:
        list[tuple[str, int]]: Passages and their tokens, never more than ``length``.
    """

    def count(text):
        return len(encode_text(tokenizer, text)[0])

    sentences = [
        (sentence, "\n\n" if number == 0 else " ")
        for paragraph in paragraphs
        for number, sentence in enumerate(SENTENCE_END.sub(r"\1\n", paragraph).split("\n"))
    ]
    passages, first = [], 0
    while first < len(sentences):
        text, starts, tokens = "", [], 0
        for sentence, gap in sentences[first:]:
            if tokens > length:
                break
            text += gap if text else ""
            starts.append(len(text))
            text += sentence
            # Counting from anew each time would be slow; only the last count has to be right.
            tokens += count(sentence)
            tokens = count(text) if tokens > length else tokens
        tokens = count(text)
        if tokens > length:
            text = _shorten(text, tokenizer, length, count)
            tokens = count(text)
        if tokens >= SHORTEST_TAIL * length:
            passages.append((text, tokens))
        first += max(1, bisect.bisect_left(starts, len(text)))
    return passages


def _shorten(text, tokenizer, length, count):
    ids = encode_text(tokenizer, text)[0]
    # Read back, a text cut within a word or character may have another number of tokens.
    for kept in range(length, max(0, length - 8), -1):
        start = tokenizer.decode(ids[:kept], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if text.startswith(start) and count(start) <= length:
            return start
    # A tokenizer that rewrites what it reads gives another text back.
    ends = [0, *(match.end() for match in re.finditer(r"\S+", text))]
    return text[: ends[bisect.bisect_right(ends, length, key=lambda end: count(text[:end])) - 1]]
