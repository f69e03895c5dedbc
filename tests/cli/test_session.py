"""A conversation that keeps the model's state between turns."""

import copy
import dataclasses

import pytest
import torch
from PIL import Image
from tokenizers.pre_tokenizers import Metaspace

from xtuner_ext.cli.session import ChatSession
from xtuner_ext.data.masking import encode_conversation
from xtuner_ext.data.templates import get_template

MIXERS = {
    "attention": ["full_attention"] * 3,
    "linear": ["linear_attention"] * 3,
    "hybrid": ["linear_attention", "full_attention", "linear_attention"],
}
TURNS = [("Is there a 7?", "red"), ("<image> And here?", "blue"), ("What is the sum of both?", None)]


def picture(colour):
    return Image.new("RGB", (64, 64), colour)


@pytest.fixture
def generation(digits_processor):
    # A random model may say an image token, which no trained one does.
    image = digits_processor.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    return dict(max_new_tokens=6, do_sample=False, suppress_tokens=[image])


def ask_all(session, turns, generation):
    return [session.ask(text, [picture(c)] if c else [], **generation) for text, c in turns]


def from_scratch(session, turns, generation):
    """Answers and ids when the model reads the whole history again for every question."""
    model, processor, template = session.model, session.processor, session.template
    tokenizer, ids, tiles, answers = processor.tokenizer, [], [], []
    for number, (text, colour) in enumerate(turns):
        if colour:
            tiles.append(processor.tiles(picture(colour)))
            text = text if "<image>" in text else f"<image>\n{text}"
        prompt = template.prompt(text, first=number == 0, system=session.system)
        prompt = processor.expand(prompt, [1] * bool(colour))
        ids += tokenizer(prompt, add_special_tokens=number == 0).input_ids
        settings = dict(eos_token_id=session.stops, pad_token_id=0, **generation)
        output = model.generate(torch.tensor([ids]), pixel_values=torch.cat(tiles), **settings)[0].tolist()
        answers.append(tokenizer.decode(output[len(ids) :], skip_special_tokens=True))
        ids = output
        if ids[-1] not in session.stops:
            ids = [*ids, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    return answers, ids


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("mixers", MIXERS)
def test_three_turns_equal_reading_everything_again(digits_processor, tiny_model, generation, mixers, chunk):
    model = tiny_model(*MIXERS[mixers])
    session = ChatSession(model, digits_processor, get_template("internlm2_chat"), system="Be brief.")
    answers = ask_all(session, TURNS, {**generation, "prefill_chunk_size": chunk})
    expected, ids = from_scratch(session, TURNS, generation)
    assert answers == expected
    assert session.ids[0].tolist() == ids
    text = digits_processor.tokenizer.decode(session.ids[0])
    assert text.startswith("<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<img>")
    assert text.count("<s>") == 1 and text.count("Be brief.") == 1


def test_answer_that_stops_by_itself_is_not_closed_twice(digits_processor, tiny_model, generation):
    template = get_template("internlm2-chat")
    session = ChatSession(tiny_model(*MIXERS["hybrid"]), digits_processor, template)
    session.ask(TURNS[0][0], [picture("red")], **generation)
    start = session.ids.shape[1] - 1 - generation["max_new_tokens"]
    word = digits_processor.tokenizer.convert_ids_to_tokens(int(session.ids[0, start]))
    stopped = ChatSession(session.model, digits_processor, template, stop_words=(word,))
    answers = ask_all(stopped, TURNS, generation)
    assert digits_processor.tokenizer.convert_tokens_to_ids(word) in stopped.stops
    assert (answers, stopped.ids[0].tolist()) == from_scratch(stopped, TURNS, generation)


def test_answer_cut_off_by_length_is_closed_as_the_template_does(digits_processor, tiny_model, generation):
    session = ChatSession(tiny_model(), digits_processor, get_template("internlm2_chat"))
    answer = session.ask("Is there a 7?", **generation)
    decode = digits_processor.tokenizer.decode
    question, history = "<s><|im_start|>user\nIs there a 7?<|im_end|>\n", decode(session.ids[0])
    assert history == f"{question}<|im_start|>assistant\n{answer}<|im_end|>"
    session.ask("Why?", **generation)
    assert decode(session.ids[0]).startswith(
        f"{history}\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_reset_forgets(digits_processor, tiny_model, generation):
    session = ChatSession(tiny_model(*MIXERS["linear"]), digits_processor, get_template("internlm2_chat"))
    first = ask_all(session, TURNS, generation)
    ids = session.ids
    session.reset()
    assert session.ids.shape == (1, 0) and session.cache.get_seq_length() == 0
    assert ask_all(session, TURNS, generation) == first
    assert torch.equal(session.ids, ids)


@pytest.mark.parametrize(
    ("text", "images"), [("one <image>", 2), ("<image> <image> two", 1), ("<image> none", 0)]
)
def test_images_that_do_not_match_leave_the_conversation_as_it_was(
    digits_processor, tiny_model, generation, text, images
):
    session = ChatSession(tiny_model(*MIXERS["hybrid"]), digits_processor, get_template("internlm2_chat"))
    expected = ask_all(session, TURNS, generation)
    session.reset()
    found = ask_all(session, TURNS[:2], generation)
    with pytest.raises(ValueError, match=f"{text.count('<image>')} <image> placeholders for {images} images"):
        session.ask(text, [picture("red")] * images, **generation)
    assert [*found, session.ask(TURNS[2][0], **generation)] == expected


class Interrupt:
    """A streamer that stops the program at the third token."""

    def __init__(self):
        self.left = 3

    def put(self, tokens):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def end(self):
        pass


def test_interrupted_answer_leaves_an_empty_usable_session(digits_processor, tiny_model, generation):
    session = ChatSession(tiny_model(*MIXERS["hybrid"]), digits_processor, get_template("internlm2_chat"))
    expected = ask_all(session, TURNS, generation)
    with pytest.raises(KeyboardInterrupt):
        session.ask("More?", streamer=Interrupt(), **generation)
    assert session.ids.shape == (1, 0)
    assert ask_all(session, TURNS, generation) == expected


def test_a_later_question_is_read_as_in_the_whole_conversation(digits_processor, tiny_model, generation):
    processor = copy.deepcopy(digits_processor)
    # As SentencePiece: a space in front of the start of a text, and of that alone.
    processor.tokenizer.backend_tokenizer.pre_tokenizer = Metaspace(replacement="Ġ", prepend_scheme="first")
    template = dataclasses.replace(get_template("vicuna_v1"), suffix="<|im_end|>", stop_words=("<|im_end|>",))
    session = ChatSession(tiny_model(), processor, template, system="Be brief.")
    session.ask("What is 3 plus 4?", **generation)
    before = session.ids.shape[1]
    session.ask("What is 3 plus 5?", **generation)
    whole = processor.tokenizer("<|im_end|>" + template.prompt("What is 3 plus 5?", first=False)).input_ids
    end = whole.index(session.stops[-1])
    question = whole[end + 1 :]
    assert session.ids[0, before - 1] in session.stops
    assert session.ids[0, before : before + len(question)].tolist() == question


def test_control_tokens_in_a_question_are_characters(digits_processor, tiny_model, generation):
    """As in training: they end no turn and claim no slot of an image."""
    words, template = "</s> Say <|im_end|> or <img><IMG_CONTEXT></img>", get_template("internlm2_chat")
    turns = [("Is there a 7?", "yes"), (f"<image>\n{words}", None)]
    session = ChatSession(tiny_model(), digits_processor, template)
    session.ask(words, **generation)
    first, before = session.ids[0].tolist(), session.ids.shape[1]
    expected, _ = encode_conversation(digits_processor.tokenizer, template, [(words, None)])
    assert first[: len(expected)] == expected.tolist()
    session.ask(words, [picture("red")], **generation)
    image = digits_processor.expand("<image>", [1])
    whole, _ = encode_conversation(digits_processor.tokenizer, template, turns, images=[image])
    part, _ = encode_conversation(digits_processor.tokenizer, template, turns[:1])
    question = whole[len(part) :].tolist()
    assert session.ids[0, before : before + len(question)].tolist() == question
