"""Documents cut into passages."""

import pytest

from xtuner_ext.data.masking import encode_text
from xtuner_ext.data.sources.passages import cut_passages

PARAGRAPHS = [
    " ".join(f'The miller of house {n} said: "Well, the {word} was good." He smiled.' for n in range(first, first + 9))
    for first, word in ((0, "naïve café"), (10, "harvest 🌾"), (20, "brook"), (30, "winter"))
]


@pytest.fixture
def tokenizer(digits_processor):
    return digits_processor.tokenizer


@pytest.mark.parametrize("length", [40, 97, 256])
def test_passages_have_the_length_and_begin_with_sentences(tokenizer, length):
    passages = cut_passages(PARAGRAPHS, tokenizer, length)
    whole = "\n\n".join(PARAGRAPHS)
    lengths = [len(encode_text(tokenizer, text)[0]) for text, _ in passages]
    assert lengths == [tokens for _, tokens in passages]
    assert max(lengths) == length and sum(n == length for n in lengths) >= 0.8 * (len(lengths) - 1)
    # A character of several tokens stays whole.
    assert min(lengths[:-1]) > length - 5 and lengths[-1] >= length / 4
    place = 0
    for text, _ in passages:
        assert text.startswith(("The miller", "He smiled", '"Well'))
        # In the order of the document, nothing twice.
        place = whole.index(text, place) + len(text)
    assert sum(len(text) for text, _ in passages) > (0.6 if length == 40 else 0.8) * len(whole)


def test_short_document_is_one_passage_and_a_tail_below_a_quarter_is_dropped(tokenizer):
    text = "The mill stood still."
    count = len(encode_text(tokenizer, text)[0])
    assert cut_passages([text], tokenizer, 4 * count) == [(text, count)]
    assert cut_passages([text], tokenizer, 4 * count + 1) == []
    assert cut_passages([text], tokenizer, count) == [(text, count)]


def test_sentence_longer_than_a_passage_is_cut(tokenizer):
    text = "word " * 200 + "end. The next one is here and is a sentence."
    (first, tokens), *rest = cut_passages([text], tokenizer, 30)
    assert first.startswith("word word") and tokens == 30
    assert rest[0][0].startswith("The next one")


def test_tokenizer_that_rewrites_text_is_cut_at_words(tokenizer):
    class Lowercase:
        """Reads small letters only, as normalising tokenizers do."""

        def __call__(self, text, **kwargs):
            return tokenizer(text.lower(), **kwargs)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    for text, tokens in cut_passages(PARAGRAPHS, Lowercase(), 64):
        assert tokens <= 64 and text in "\n\n".join(PARAGRAPHS)
