"""Lengths of very many samples, in tokens, without tokenizing the same words again and again."""

import random
import re
from types import SimpleNamespace

from ..modeling.processing import IMAGE_PLACEHOLDER
from . import masking
from .masking import encode_conversation, encode_text

# Between two words no token of an ordinary tokenizer runs on, so that each can be counted alone. The classes leave out
# what special tokens end with, as some swallow the space that follows.
ENDS, STARTS = "A-Za-z0-9.,;:!?)'", "A-Za-z"
SPACE = re.compile(f"(?<=[{ENDS}]) (?=[{STARTS}])")
TOKEN_RUNS_ON = re.compile(f"[{ENDS}][ Ġ▁]")
TOKEN_HAS_SPACE = re.compile(f"(^|[{ENDS}]) ($|[{STARTS}])")
# Stands before a word that is counted alone, as some tokenizers treat the start of a text otherwise.
ANCHOR = "x"
# Counts that are kept, and the longest text of one; a longer one hardly comes twice.
KEPT, LONGEST = 100_000, 200
PROBES = 200
PROBED = (
    *("word", " word", "Word", " ", "  ", "\n", "\n\n", "\t", "7", "3.5", ",", ". ", "'s"),
    *("é", "漢字", "🙂", "▁", "_", "<", ">"),
)


class TokenCounter:
    """Counts the tokens of samples, and those that are trained, exactly as ``masking`` makes them.

    Words are counted one by one, and their counts are kept. Whether that gives the right sum is told from the
    tokenizer's vocabulary and then tried on random texts; where it does not, ``masking`` tokenizes every sample.

    Args:
        tokenizer (PreTrainedTokenizerBase): Tokenizer of the model.
        template (Template): From :func:`~xtuner_ext.data.template_fit.fit_template`.

    Attributes:
        lead (int): Tokens that the tokenizer puts in front of every sample.
        by_words (bool): Whether words are counted one by one.
    """

    def __init__(self, tokenizer, template):
        self.template = template
        self._tokenizer = _Direct(tokenizer) if tokenizer.is_fast else tokenizer
        self._control = masking.special_words(self._tokenizer, len(tokenizer))
        # Hardly any text has one of these; only then is it worth to look closely.
        starts = {str(token)[0] for token in tokenizer.added_tokens_decoder.values() if token.special} | {masking.BREAK}
        self._suspect = re.compile(f"[{re.escape(''.join(starts))}]")
        self.lead = len(encode_text(self._tokenizer, "")[0])
        self._repeated = len(self._ids(template.suffix))
        self._end = template.suffix if tokenizer.is_fast and _stands_alone(template.suffix, tokenizer) else None
        self._openings = _Counts(self._ids)
        self._after_end = _Counts(self._ids, self._end or "")
        self._words = _Counts(self._ids, ANCHOR, " ")
        self._text_openings = _Counts(self._text_ids)
        self._text_words = _Counts(self._text_ids, ANCHOR, " ")
        self.by_words = tokenizer.is_fast and _words_stand_alone(tokenizer) and self._is_right(tokenizer)

    def count(self, turns, system=None, ended=True, images=()):
        """Count a conversation.

        Args:
            turns (list[tuple[str, str]]): Questions and answers.
            system (str, optional): System message.
            ended (bool): Whether the last answer gets its suffix.
            images (list[str]): What takes the place of each ``<image>``.

        Returns:
            tuple[int, int]: Tokens and trained tokens that
            :func:`~xtuner_ext.data.masking.encode_conversation` gives.
        """
        counts = self._by_words(turns, system, ended, images) if self.by_words else None
        return counts or _lengths(encode_conversation(self._tokenizer, self.template, turns, system, ended, images))

    def count_text(self, text, ended=False):
        """tuple[int, int]: Tokens and trained tokens that :func:`~xtuner_ext.data.masking.encode_text` gives."""
        counts = self._text_by_words(text, ended) if self.by_words else None
        return counts or _lengths(encode_text(self._tokenizer, text, ended))

    def _text_by_words(self, text, ended):
        first, *words = SPACE.split(text)
        trained = self._text_openings[first] + sum(map(self._text_words.__getitem__, words)) + ended
        return self.lead + trained, trained

    def _by_words(self, turns, system, ended, images):
        """tuple[int, int] | None: Tokens and trained tokens.

        None where an answer merges with its question, or somebody's words look like a special token.
        """
        template, total, trained, images = self.template, self.lead, 0, iter(images)
        if system and not self._is_ordinary(system):
            return None
        for number, (question, answer) in enumerate(turns):
            parts = question.split(IMAGE_PLACEHOLDER)
            if not all(map(self._is_ordinary, parts)) or not self._is_ordinary(answer):
                return None
            question = parts[0] + "".join(next(images) + part for part in parts[1:])
            prompt = template.prompt(question, first=number == 0, system=system)
            if number:
                # As in `masking`, which takes its tokens away again.
                prompt, total = template.suffix + prompt, total - self._repeated
            # 1. The question block but for its last word, with which the answer may merge.
            *parts, last = self._parts(prompt)
            first = self._after_end if parts else self._openings
            *words, joint = SPACE.split(last)
            total += self._sum(parts, self._openings) + len(parts)
            if words:
                total += first[words[0]] + self._sum_words(words[1:])
                first = self._words
            # 2. That word with the answer.
            last, *parts = self._parts(joint + template.answer(answer, ended=ended or number < len(turns) - 1))
            merged, *words = SPACE.split(last)
            if not first.opens(joint, merged):
                return None
            tokens = first[merged] + self._sum_words(words) + self._sum(parts, self._after_end) + len(parts)
            total, trained = total + tokens, trained + tokens - first[joint]
        return total, trained

    def _is_ordinary(self, text):
        return not self._suspect.search(text) or masking.BREAK not in text and not self._control.search(text)

    def _parts(self, text):
        """list[str]: What stands between end tokens."""
        return text.split(self._end) if self._end else [text]

    def _sum(self, parts, first):
        total = 0
        for part in parts:
            opening, *words = SPACE.split(part)
            total += first[opening] + self._sum_words(words)
            first = self._after_end
        return total

    def _sum_words(self, words):
        return sum(map(self._words.__getitem__, words))

    def _ids(self, text):
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def _text_ids(self, text):
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def _is_right(self, tokenizer):
        """Whether random samples are counted as ``masking`` tokenizes them."""
        generator, template = random.Random(0), self.template
        pieces = [*PROBED * 3, template.suffix, template.instruction, *tokenizer.all_special_tokens[:5]]

        def text():
            return "".join(generator.choices(pieces, k=generator.randint(0, 12)))

        for _ in range(PROBES):
            turns = [(text(), text()) for _ in range(generator.randint(1, 3))]
            system, ended = generator.choice((None, None, "Be brief.", text())), generator.random() < 0.8
            counts = self._by_words(turns, system, ended, ())
            right = _lengths(encode_conversation(tokenizer, template, turns, system, ended))
            if counts not in (None, right):
                return False
            if self._text_by_words(turns[0][0], False) != _lengths(encode_text(tokenizer, turns[0][0])):
                return False
        return True


def _lengths(encoded):
    return len(encoded[1]), int((encoded[1] >= 0).sum())


def _words_stand_alone(tokenizer):
    """Whether no token reaches over the space between two words."""
    if tokenizer.split_special_tokens or any(TOKEN_RUNS_ON.search(token) for token in tokenizer.get_vocab()):
        return False
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    return not any(
        TOKEN_HAS_SPACE.search(token.content)
        or token.lstrip and re.match(f"[{STARTS}]", token.content)
        or token.rstrip and re.search(f"[{ENDS}]$", token.content)
        for token in added
    )


def _stands_alone(word, tokenizer):
    """Whether a special token is found wherever it is written, and changes nothing around it."""
    added = {token.content: token for token in tokenizer.backend_tokenizer.get_added_tokens_decoder().values()}
    token = added.pop(word, None)
    if token is None or token.normalized or token.lstrip or token.rstrip or token.single_word or SPACE.search(word):
        return False
    cuts = range(1, len(word))
    overlaps = tuple(word[:cut] for cut in cuts), tuple(word[cut:] for cut in cuts)
    return not any(word in other or other.endswith(overlaps[0]) or other.startswith(overlaps[1]) for other in added)


class _Counts(dict):
    """Tokens of texts, found when they are first asked for.

    Args:
        tokenize (callable): Text to ids.
        lead (str): What stands before the text and is not counted.
        glue (str): What stands between the two and is counted.
    """

    def __init__(self, tokenize, lead="", glue=""):
        super().__init__()
        self._tokenize, self._before = tokenize, lead + glue
        self._uncounted = len(tokenize(lead)) if lead else 0
        self._pairs = {}

    def __missing__(self, text):
        count = len(self._tokenize(self._before + text)) - self._uncounted
        return _keep(self, text, count)

    def opens(self, text, longer):
        """bool: Whether the ids of a text begin those of a longer one."""
        if text == longer:
            return True
        found = self._pairs.get((text, longer))
        if found is None:
            ids = self._tokenize(self._before + text)
            found = longer.startswith(text) and self._tokenize(self._before + longer)[: len(ids)] == ids
            _keep(self._pairs, (text, longer), found)
        return found


def _keep(known, key, value):
    if len(known) >= KEPT:
        known.clear()
    if len(key) <= LONGEST:
        known[key] = value
    return value


class _Direct:
    """A fast tokenizer as ``masking`` calls it, without what transformers does around every call."""

    def __init__(self, tokenizer):
        self.eos_token_id, self.added_tokens_decoder = tokenizer.eos_token_id, tokenizer.added_tokens_decoder
        self._backend, self._size = tokenizer.backend_tokenizer, len(tokenizer)
        self._split = tokenizer.split_special_tokens

    def __len__(self):
        return self._size

    def __call__(self, text, add_special_tokens=True, split_special_tokens=None):
        # The tokenizer itself sets these three again before it is used.
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = self._split if split_special_tokens is None else split_special_tokens
        return SimpleNamespace(input_ids=self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
