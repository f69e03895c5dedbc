"""How XTuner wrote conversations in training, and which chat serves a command."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from xtuner_ext.cli.chat import belongs_to_stock, open_picture, words_of_several_tokens
from xtuner_ext.cli.llava import llava_template
from xtuner_ext.errors import UserError
from xtuner_ext.modeling.processing import HybridVLProcessor


@pytest.fixture
def tokenizer(digits):
    return AutoTokenizer.from_pretrained(digits / "tokenizer")


def template_of(tokenizer, name, own=None):
    model = SimpleNamespace(config=SimpleNamespace(template=own))
    return llava_template(name, model, HybridVLProcessor(tokenizer), "folder")


def trained_ids(tokenizer, name, question, answer):
    """Ids of one turn as XTuner's data set makes them."""
    from xtuner.dataset.map_fns import template_map_fn
    from xtuner.dataset.utils import encode_fn
    from xtuner.utils import PROMPT_TEMPLATE

    conversation = [{"input": question, "output": answer}]
    mapped = template_map_fn({"conversation": conversation}, PROMPT_TEMPLATE[name])
    return encode_fn(mapped, tokenizer, 1000)["input_ids"]


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("name", ["internlm2_chat", "internlm_chat", "vicuna", "default"])
def test_a_prompt_is_what_training_began_with(tokenizer, name, adds_bos):
    if not adds_bos:
        tokenizer.backend_tokenizer.post_processor = None
        assert tokenizer("a").input_ids[0] != tokenizer.bos_token_id
    template = template_of(tokenizer, name)
    prompt = tokenizer(template.prompt("Is there a 7?", first=True)).input_ids
    assert trained_ids(tokenizer, name, "Is there a 7?", "Yes")[: len(prompt)] == prompt
    assert template.suffix


def test_the_models_own_template_or_none(tokenizer):
    assert template_of(tokenizer, None, own="internlm_chat").suffix == "<eoa>"
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="--prompt-template"):
        template_of(tokenizer, None)


def test_stop_words_of_several_tokens_are_looked_for_in_the_text(tokenizer):
    assert words_of_several_tokens(("<|im_end|>", "<eoa>", "<eoa>"), tokenizer) == ["<eoa>"]


def test_who_serves_a_llava(tmp_path):
    def command(kind, *more):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        return belongs_to_stock([str(tmp_path), "--llava", "hf", "--visual-encoder", "clip", *more])

    assert not command("llama") and not command("hybrid_vl", "--visual-select-layer", "-2")
    # Models that no key map covers, and options that only XTuner has.
    assert command("internlm") and command("phi3") and command("llama", "--bits", "4")


def test_remote_code_is_off_unless_asked(monkeypatch):
    """The parts themselves are tests/convert/test_llava_parts.py's matter."""
    from xtuner_ext.cli import llava
    from xtuner_ext.cli.chat import parse_args
    from xtuner_ext.convert import llava_parts

    asked = []
    monkeypatch.setattr(llava_parts, "load_llava", lambda *args: asked.append(args[-1]) or (torch.nn.Identity(), None))
    for option in ([], ["--trust-remote-code"]):
        llava.load_llava_model(parse_args(["llm", "--llava", "hf", *option]))
    assert asked == [False, True]


def test_a_picture_out_of_reach(monkeypatch):
    import requests

    def refuse(*args, **kwargs):
        raise requests.ConnectionError("no network")

    monkeypatch.setattr(requests, "get", refuse)
    with pytest.raises(UserError, match="--image https://example.org/a.jpg can not be fetched: no network"):
        open_picture("https://example.org/a.jpg")
    with pytest.raises(UserError, match="--image: image nowhere.png does not exist"):
        open_picture("nowhere.png")
