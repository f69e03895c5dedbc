"""Prompts, and a teacher's answers to them."""

import pytest

from xtuner_ext.convert.teacher import load_processor, load_teacher
from xtuner_ext.data.sources.answers import BATCH_SIZE, read_prompts, sample_answers, teacher_template
from xtuner_ext.data.sources.documents import HELD_OUT_SHARE, share
from xtuner_ext.errors import UserError

PROMPTS = [f"What is {number} plus {number + 1}?" for number in range(BATCH_SIZE + 8)]


@pytest.fixture(scope="module")
def teacher(text_teacher):
    return load_teacher(text_teacher), load_processor(text_teacher)


def test_prompts_of_the_package():
    prompts = read_prompts()
    assert len(prompts) >= 400
    assert all(prompt.isascii() and 10 < len(prompt) < 400 for prompt in prompts)
    held_out = sum(share(prompt) < HELD_OUT_SHARE for prompt in prompts)
    assert 0.1 < held_out / len(prompts) < 0.2


def test_order_of_prompts_depends_on_their_words(tmp_path):
    (tmp_path / "a.txt").write_text("One?\n\n  Two? \nThree?\nOne?\n")
    (tmp_path / "b.txt").write_text("Three?\r\nTwo?\r\nOne?")
    found = read_prompts(tmp_path / "a.txt")
    assert sorted(found) == ["One?", "Three?", "Two?"] and found == read_prompts(tmp_path / "b.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b" \n\n", "prompt file .*p.txt is empty, expected one prompt a line"),
        (b"Hello?\nSee <image>?\n", "p.txt:2: <image> stands in a prompt, expected text only"),
        (b"\xff\xfe", "prompt file .*p.txt is not a readable text"),
    ],
)
def test_bad_prompt_files_are_named(tmp_path, content, message):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / "p.txt")
    with pytest.raises(UserError, match="prompt file .*gone.txt does not exist"):
        read_prompts(tmp_path / "gone.txt")


def test_answers_are_repeatable_and_know_their_end(teacher):
    counted = []
    name = teacher_template(teacher[0], teacher[1].tokenizer)
    assert name == "internlm2_chat"
    answers = sample_answers(*teacher, name, PROMPTS, 150, seed=0, on_batch=counted.append)
    assert answers == sample_answers(*teacher, name, PROMPTS, 150, seed=0)
    assert answers != sample_answers(*teacher, name, PROMPTS, 150, seed=1)
    assert counted == [BATCH_SIZE, 8] and len(answers) == len(PROMPTS)
    ended = [text for text, end in answers if end]
    cut = [text for text, end in answers if not end]
    assert ended and cut
    # Random tokens: what runs to the limit is longer than what ends by chance.
    assert sum(map(len, ended)) / len(ended) < sum(map(len, cut)) / len(cut)
    assert not any("<|im_end|>" in text or "<pad>" in text for text, _ in answers)


def test_teacher_without_a_template_is_an_error(teacher):
    model, processor = teacher

    class Plain:
        chat_template = None

    with pytest.raises(UserError, match="names no conversation template"):
        teacher_template(model, Plain())
