"""Tokens of many samples are counted as masking makes them, whatever the tokenizer and the template."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from xtuner_ext.data.counting import TokenCounter
from xtuner_ext.data.masking import encode_conversation, encode_text
from xtuner_ext.data.template_fit import fit_template

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<ref>"]
IMAGE = "<img><IMG_CONTEXT></img>"
WORDS = ["the", " cat", " sat", " on", " the", " mat", ".", ",", " 17", "3", "\n", "\n\n", "  ", "é", "漢字", " Who", "?"]
ODD = [*WORDS, "<|im_end|>", "</s>", "<", ">", "▁", "<ref>", "🙂", "\t", " <|im_start|>user"]
CORPUS = ["the cat sat on the mat. Who sat on it? the cat's mat, 17 mats", "user assistant USER ASSISTANT system"] * 20


def train(model, trainer, **parts):
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(CORPUS, trainer(special_tokens=SPECIAL, vocab_size=400, show_progress=False))
    words = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **words)


def bytes_of(**options):
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, **options)
    return train(models.BPE(), trainers.BpeTrainer, pre_tokenizer=pieces)


def sentencepiece(scheme, model=models.BPE, trainer=trainers.BpeTrainer):
    metaspace = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    options = {"unk_token": "<unk>"} if model is models.BPE else {}
    tokenizer = model(**options)
    return train(tokenizer, trainer, pre_tokenizer=metaspace, decoder=decoders.Metaspace(prepend_scheme=scheme))


def llama2():
    """No words before the merges; a space in front of every text between special tokens."""
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # Learnt from single words, as SentencePiece does.
    tokenizer = sentencepiece("always")
    tokenizer.backend_tokenizer.normalizer = spaces
    tokenizer.backend_tokenizer.pre_tokenizer = None
    return tokenizer


# How each is counted: by words, or by tokenizing every sample.
TOKENIZERS = {
    "bytes": (bytes_of, True),
    "sentencepiece": (lambda: sentencepiece("first"), True),
    "sentencepiece, always a space": (lambda: sentencepiece("always"), True),
    "llama 2": (llama2, True),
    "tokens over spaces": (lambda: bytes_of(use_regex=False), False),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    build, by_words = TOKENIZERS[request.param]
    return build(), by_words


def samples(pieces, count, seed=0):
    generator = random.Random(seed)

    def text():
        return "".join(generator.choices(pieces, k=generator.randint(0, 15))).strip()

    for _ in range(count):
        turns = [(text(), text()) for _ in range(generator.randint(1, 3))]
        images = generator.randint(0, 2)
        turns[0] = "<image>\n" * images + turns[0][0], turns[0][1]
        yield turns, generator.choice([None, None, "Be brief.", text()]), generator.random() < 0.9, [IMAGE] * images


def lengths(encoded):
    return len(encoded[1]), int((encoded[1] != -100).sum())


@pytest.mark.parametrize("name", ["internlm2-chat", "internlm2_chat", "vicuna_v1"])
def test_counts_are_those_of_masking(tokenizer, name):
    tokenizer, by_words = tokenizer
    template = fit_template(name, tokenizer)
    counter = TokenCounter(tokenizer, template)
    assert counter.by_words == by_words
    for turns, system, ended, images in [*samples(WORDS, 40), *samples(ODD, 40)]:
        expected = lengths(encode_conversation(tokenizer, template, turns, system, ended, images))
        assert counter.count(turns, system, ended, images) == expected, (turns, system, ended)
        for ended in (True, False):
            text = turns[0][0]
            assert counter.count_text(text, ended) == lengths(encode_text(tokenizer, text, ended)), text


def test_special_tokens_that_swallow_spaces(monkeypatch):
    """As those of Phi-3 do."""
    tokens = [AddedToken(word, special=True, normalized=False, rstrip=word.startswith("<|")) for word in SPECIAL]
    monkeypatch.setitem(globals(), "SPECIAL", tokens)
    tokenizer = bytes_of()
    assert len(tokenizer("<|im_end|>\n", add_special_tokens=False).input_ids) == 1
    template = fit_template("internlm2_chat", tokenizer)
    counter = TokenCounter(tokenizer, template)
    assert counter.by_words
    for turns, *rest in samples(WORDS, 40):
        assert counter.count(turns, *rest) == lengths(encode_conversation(tokenizer, template, turns, *rest))


def test_what_is_kept_is_bounded(digits_processor, monkeypatch):
    monkeypatch.setattr("xtuner_ext.data.counting.KEPT", 50)
    template = fit_template("internlm2_chat", digits_processor.tokenizer)
    counter = TokenCounter(digits_processor.tokenizer, template)
    for number in range(80):
        turns = [(f"What is number w{number}?", f"It is a{number} " + "x" * 1000)]
        expected = lengths(encode_conversation(digits_processor.tokenizer, template, turns))
        assert counter.count(turns) == expected
    assert len(counter._words) <= 50 and not any(len(word) > 200 for word in counter._words)
