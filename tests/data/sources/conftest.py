"""Folders of documents and a teacher that answers at random."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

NOUNS = "mill brook valley church house garden bridge river forest meadow harbor tower".split()


def prose(number, sentences=8):
    """A paragraph of English that no other number gives."""
    first, second = NOUNS[number % 12], NOUNS[number // 12 % 12]
    return " ".join(
        f"The {first} of village {number} is on the way to the {second}, and it has been there for {place} years."
        for place in range(sentences)
    )


@pytest.fixture
def write_documents(tmp_path):
    """Function that fills a folder with documents, of two paragraphs each."""

    def write(name="docs", count=24, first=0):
        folder = tmp_path / name
        for number in range(first, first + count):
            path = folder / f"part{number % 3}" / f"{number}.html"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"<h1>{number}</h1><p>{prose(2 * number)}</p>\n<p>{prose(2 * number + 1)}")
        return folder

    return write


@pytest.fixture(scope="session")
def text_teacher(digits, tmp_path_factory):
    """Folder of a tiny random Llama with the digits' tokenizer, as transformers writes it."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "llama"
    tokenizer = AutoTokenizer.from_pretrained(digits / "tokenizer")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def read_lines(path):
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
