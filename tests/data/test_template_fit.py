"""Templates found by a tokenizer's chat template, and templates that a tokenizer refuses."""

import copy
import json

import pytest
from xtuner.utils import PROMPT_TEMPLATE

from xtuner_ext.data.dataset import ConversationDataset
from xtuner_ext.data.masking import IGNORE_INDEX, encode_conversation
from xtuner_ext.data.template_fit import check_template, detect_template, fit_template
from xtuner_ext.data.templates import TEMPLATES, get_template, render
from xtuner_ext.errors import UserError
from xtuner_ext.modeling.processing import HybridVLProcessor

# As the tokenizers of SmolLM2, Qwen2.5 (tools left out), Llama 3 and zephyr write it.
CHAT_TEMPLATES = {
    "smollm2": """{% for message in messages %}"""
    """{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}""",
    "qwen2_5": """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role != "system" or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}""",
    "llama3_chat": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "zephyr": "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
}


@pytest.fixture
def tokenizer(digits_processor):
    return copy.deepcopy(digits_processor.tokenizer)


@pytest.mark.parametrize(("name", "chat_template"), CHAT_TEMPLATES.items(), ids=CHAT_TEMPLATES)
def test_published_chat_templates_are_found(tokenizer, name, chat_template):
    tokenizer.chat_template = chat_template
    assert detect_template(tokenizer) == name


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_own_template_is_found_or_an_equal_one(tokenizer, name):
    tokenizer.chat_template = get_template(name).jinja()
    found = get_template(detect_template(tokenizer))
    turns = [("Q1", "A1"), ("Q2", None)]
    for system in (None, "Be brief."):
        assert render(found, turns, system) == render(get_template(name), turns, system)


def test_a_chat_template_that_refuses_system_messages_is_found_by_the_rest(tokenizer):
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refuse + get_template("smollm2").jinja()
    assert detect_template(tokenizer) == "smollm2"


@pytest.mark.parametrize("chat_template", [None, "{{ messages[0]['content'] }}", "{{ raise_exception('never') }}"])
def test_nothing_is_guessed(tokenizer, chat_template):
    tokenizer.chat_template = chat_template
    assert detect_template(tokenizer) is None


def test_smollm2_is_written_as_published(tokenizer):
    assert render(get_template("smollm2"), [("Q1", "A1"), ("Q2", None)]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n"
    )


# ---------------------------------------------------------------- fit


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama3_chat", r"'llama3_chat' does not fit the tokenizer: its end of an answer <\|eot_id\|> is \d+ tokens"),
        ("internlm_chat", "its end of an answer <eoa> is"),
        ("moss_sft", "its end of an answer <eoc> is"),
        ("zephyr", r"its marker <\|system\|> is \d+ tokens there, expected a single one"),
        ("phi3-chat", r"<\|end\|> is"),
    ],
)
def test_control_tokens_that_fall_apart_are_named(tokenizer, name, message):
    with pytest.raises(UserError, match=message):
        fit_template(name, tokenizer)


def test_known_control_tokens_and_the_tokenizers_own_markers_are_right(tokenizer):
    check_template(get_template("internlm2_chat"), tokenizer)
    # Markers as plain text, as zephyr has them.
    tokenizer.chat_template = CHAT_TEMPLATES["zephyr"] + "{# <|user|> <|system|> #}"
    check_template(fit_template("zephyr", tokenizer), tokenizer)
    tokenizer.add_tokens(["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"], special_tokens=True)
    assert fit_template("llama3_chat", tokenizer).suffix == "<|eot_id|>"
    tokenizer.unk_token = "<|endoftext|>"
    tokenizer.add_tokens(["<|endoftext|>"], special_tokens=True)
    fit_template("minicpm3", tokenizer)


def test_a_template_without_any_end_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="'vicuna' names no end of an answer"):
        fit_template("vicuna", tokenizer)


@pytest.mark.parametrize("name", [name for name, fields in PROMPT_TEMPLATE.items() if not fields.get("SUFFIX")])
def test_the_last_trained_token_is_the_end_of_sequence(tokenizer, name):
    fields = PROMPT_TEMPLATE[name]
    words = [*fields.get("STOP_WORDS", ()), *(f"<|{word}|>" for word in ("System", "User", "Bot", "Human"))]
    tokenizer.add_tokens([*words, "<|system|>", "<|user|>", "<|assistant|>"], special_tokens=True)
    template = fit_template(name, tokenizer)
    ids, labels = encode_conversation(tokenizer, template, [("Q1", "A1"), ("Q2", "A2")])
    assert ids[-1] == labels[-1] == tokenizer.eos_token_id
    trained = labels[labels != IGNORE_INDEX].tolist()
    assert trained.count(tokenizer.eos_token_id) == 2 and labels[0] == IGNORE_INDEX


# ---------------------------------------------------------------- data sets


@pytest.fixture
def write(tmp_path):
    """Function that writes one conversation and returns its meta file."""

    def write(**fields):
        turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]
        (tmp_path / "d.jsonl").write_text(json.dumps({"conversations": turns, **fields}))
        (tmp_path / "d.json").write_text(json.dumps({"d": {"annotation": "d.jsonl"}}))
        return tmp_path / "d.json"

    return write


def test_text_samples_of_a_text_model_end_with_eos(write, tokenizer):
    sample = ConversationDataset(write(), HybridVLProcessor(tokenizer, tokens_per_tile=0), "vicuna")[0]
    assert tokenizer.decode(sample["input_ids"]) == f"<s>USER: What? ASSISTANT:red{tokenizer.eos_token}"
    assert sample["labels"][-1] == tokenizer.eos_token_id and sample["pixel_values"].shape[0] == 0


def test_a_data_set_refuses_a_template_of_another_tokenizer(write, tokenizer):
    with pytest.raises(UserError, match="'phi3-chat' does not fit the tokenizer"):
        ConversationDataset(write(), HybridVLProcessor(tokenizer), "phi3-chat")


def test_images_for_a_text_model_are_named(write, tokenizer, tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    dataset = ConversationDataset(
        write(image="x.png", conversations=turns), HybridVLProcessor(tokenizer, tokens_per_tile=0), "internlm2_chat"
    )
    with pytest.raises(UserError, match="d.jsonl:1: names an image, but the model has no image front end"):
        dataset[0]
