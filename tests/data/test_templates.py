"""Rendered text of the templates."""

import pytest

from xtuner_ext.data.templates import INTERNVL2_5_SYSTEM, TEMPLATES, get_template
from xtuner_ext.errors import UserError
from xtuner_ext.evaluation.runner import render

SYSTEM = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
TURNS = [("Q1", "A1"), ("Q2", None)]


@pytest.mark.parametrize("name", ["internlm2-chat", "Hermes-2"])
def test_internvl_puts_no_newline_between_turns(name):
    assert render(get_template(name), TURNS) == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>"
        "<|im_start|>user\nQ1<|im_end|><|im_start|>assistant\nA1<|im_end|>"
        "<|im_start|>user\nQ2<|im_end|><|im_start|>assistant\n"
    )


def test_phi3_chat():
    assert render(get_template("phi3-chat"), TURNS) == (
        f"<|system|>\n{SYSTEM}<|end|>"
        "<|user|>\nQ1<|end|><|assistant|>\nA1<|end|><|user|>\nQ2<|end|><|assistant|>\n"
    )


@pytest.mark.parametrize(("system", "head"), [(None, " "), ("", " "), ("Be brief.", "Be brief. ")])
def test_internvl_zh_sets_a_space_before_the_first_question(system, head):
    assert render(get_template("internvl_zh"), TURNS, system) == f"{head}<human>: Q1 <bot>: A1</s><human>: Q2 <bot>:"


def test_vicuna_v1_is_that_of_LLaVA():
    """As LLaVA's conversation code renders it, an answer's leading space included."""
    assert render(get_template("vicuna_v1"), TURNS) == (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        "USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:"
    )


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("internvl2_5", f"<|im_start|>system\n{INTERNVL2_5_SYSTEM}<|im_end|>\n"),
        ("internlm2_chat", ""),
        ("qwen_chat", ""),
    ],
)
def test_newline_between_turns(name, head):
    assert render(get_template(name), TURNS) == (
        f"{head}<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_own_system_message_replaces_the_default_and_an_empty_one_removes_it(name):
    template = get_template(name)
    prompt = template.prompt("Q", system="{Be} brief.")
    assert "{Be} brief." in prompt and SYSTEM not in prompt and INTERNVL2_5_SYSTEM not in prompt
    assert template.prompt("Q", system="") == template.opening + template.instruction.replace("{input}", "Q")
    assert "Be brief." not in template.prompt("Q", first=False, system="Be brief.")


@pytest.mark.parametrize("system", [None, "Be 'brief'."])
@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_template_renders_the_same(name, system, digits_processor):
    messages = [{"role": "system", "content": system}] if system else []
    messages += [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q1"}]},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "Q2"},
    ]
    template = get_template(name)
    text = digits_processor.apply_chat_template(
        messages, chat_template=template.jinja(), tokenize=False, add_generation_prompt=True
    )
    assert text == render(template, [("<image>\nQ1", "A1"), ("Q2", None)], system)


def test_braces_in_a_question_are_kept():
    assert '{"a": {input}}' in get_template("internlm2-chat").prompt('{"a": {input}}')


def test_every_template_of_xtuner_resolves():
    from xtuner.utils import PROMPT_TEMPLATE

    for name in PROMPT_TEMPLATE:
        assert "Hello" in get_template(name).prompt("Hello")
    vicuna = get_template("vicuna")
    assert vicuna.prompt("Q") == "USER: Q ASSISTANT:"
    assert vicuna.prompt("Q", first=False) == "\nUSER: Q ASSISTANT:"
    assert get_template("llama3_chat").suffix == "<|eot_id|>"
    for name in ("internlm2_chat", "qwen_chat"):
        ours, theirs = get_template(name), PROMPT_TEMPLATE[name]
        fields = (ours.system, ours.instruction, ours.suffix, ours.sep)
        assert fields == tuple(theirs[key] for key in ("SYSTEM", "INSTRUCTION", "SUFFIX", "SEP"))


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match="template 'internlm3', expected one of .*internlm2-chat.*vicuna"):
        get_template("internlm3")
