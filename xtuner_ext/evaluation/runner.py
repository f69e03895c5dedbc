"""Batched, deterministic answering of annotated questions."""

import torch
from torch.nn.utils.rnn import pad_sequence

from ..data.annotation import VIDEO_PLACEHOLDER, JsonlAnnotations
from ..data.dataset import open_image
from ..data.masking import encode_conversation
from ..data.meta import read_meta
from ..data.templates import render
from ..data.video import FrameSampling, count_frames, read_frames
from ..errors import UserError
from ..modeling.processing import IMAGE_PLACEHOLDER
from .rows import result_row
from .scorers import mark_rows


def read_questions(meta, limit=None):
    """Questions of every dataset in a meta JSON; later turns bring the earlier ones with their gold answers.

    Plain text asks nothing and is passed over.

    Args:
        meta (str): Path of the meta JSON.
        limit (int, optional): Only the first n questions.

    Returns:
        list[dict]: ``id``, ``turns`` (question, answer or None), ``images``, ``video`` and ``clip``, ``max_tiles``
        of the dataset, ``gold``, ``category``, ``where``.

    Raises:
        UserError: For annotations that are broken or ask nothing.
    """
    questions = []
    for entry in read_meta(meta):
        annotations = JsonlAnnotations(entry.annotation, entry.root)
        for index in range(len(annotations)):
            record = annotations[index]
            for turn, (question, answer) in enumerate(record.turns):
                turns = [*record.turns[:turn], (question, None)]
                needed = sum(text.count(IMAGE_PLACEHOLDER) for text, _ in turns)
                shown = any(VIDEO_PLACEHOLDER in text for text, _ in turns)
                questions.append(
                    {
                        "id": record.id if len(record.turns) == 1 else f"{record.id}#{turn}",
                        "turns": turns,
                        "images": record.images[:needed],
                        "video": record.video if shown else None,
                        "clip": record.clip,
                        "max_tiles": entry.max_dynamic_patch,
                        "system": record.system,
                        "gold": answer,
                        "category": record.category,
                        "where": record.where,
                    }
                )
                if limit is not None and len(questions) == limit:
                    return questions
    if not questions:
        raise UserError(f"meta file {meta} asks no question, it names plain text only")
    return questions


def stop_token_ids(tokenizer, template, config=None):
    """list[int]: The ids that end an answer: end of sequence and, with a template, its stop words.

    A model's configuration may name further ones, as Llama 3's does.
    """
    ids = {tokenizer.eos_token_id}
    if config is not None:
        ends = config.eos_token_id
        ids.update(ends if isinstance(ends, (list, tuple)) else [ends])
    ids -= {None}
    for word in (*template.stop_words, template.suffix) if template else ():
        found = tokenizer.convert_tokens_to_ids(word) if word else None
        if found is not None and found != tokenizer.unk_token_id:
            ids.add(found)
    return sorted(ids)


def answer(model, processor, template, questions, batch_size=32, max_new_tokens=32, on_batch=None, frames=None):
    """Answer questions greedily and mark the answers by exact match.

    Args:
        model (HybridVLForCausalLM): In evaluation mode.
        processor (HybridVLProcessor): Its processor.
        template (Template): Conversation template.
        questions (list[dict]): From :func:`read_questions`.
        batch_size (int): Questions per batch.
        max_new_tokens (int): Longest answer in tokens.
        on_batch (callable, optional): Called with the number of questions finished in a batch.
        frames (FrameSampling | dict, optional): How videos are shown.

    Returns:
        list[dict]: Result rows in the order of the questions.
    """
    batches = Batches(model, processor, template, questions, batch_size, max_new_tokens, frames=frames)
    predictions = []
    for number in range(len(batches)):
        predictions.append(batches.answer(number))
        if on_batch is not None:
            on_batch(len(predictions[-1]))
    return mark_rows(batches.rows(predictions))


class Batches:
    """Questions in the batches in which a model answers them, greedily.

    What is in which batch follows from the questions and the batch size alone, so that it is the same for any number
    of processes and after any interruption. Of a video the frames in the middle of equal parts are shown.

    Args:
        model (HybridVLForCausalLM): In evaluation mode.
        processor (HybridVLProcessor): Its processor.
        template (Template): Conversation template.
        questions (list[dict]): From :func:`read_questions` or :meth:`Benchmark.read`.
        batch_size (int): Questions per batch.
        max_new_tokens (int): Longest answer in tokens.
        min_new_tokens (int, optional): Shortest answer in tokens.
        frames (FrameSampling | dict, optional): How videos are shown.

    Attributes:
        prompts (list[str]): What is asked, by question, with one placeholder an image.
        members (list[list[int]]): Positions of the questions, by batch.
    """

    def __init__(
        self, model, processor, template, questions, batch_size=32, max_new_tokens=32, min_new_tokens=None, frames=None
    ):
        self.model, self.processor, self.template, self.questions = model, processor, template, questions
        self.frames = FrameSampling(sampling="middle") if frames is None else FrameSampling.of(frames)
        self.padding = processor.tokenizer.pad_token_id or 0
        self.options = {
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "eos_token_id": stop_token_ids(processor.tokenizer, template, model.config),
            "pad_token_id": self.padding,
            **({"min_new_tokens": min_new_tokens} if min_new_tokens else {}),
        }
        self.turns = [_captioned(question, self.frames) for question in questions]
        self.prompts = [render(template, turns, asked["system"]) for turns, asked in zip(self.turns, questions)]
        # Questions of like length share a batch, which keeps padding short.
        order = sorted(
            range(len(questions)), key=lambda i: (self.prompts[i].count(IMAGE_PLACEHOLDER), len(self.prompts[i]))
        )
        self.members = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def __len__(self):
        return len(self.members)

    @torch.inference_mode()
    def answer(self, number):
        """list[str]: The answers to one batch, in the order of its members."""
        prepared = [
            _encode(self.processor, self.template, self.questions[i], self.turns[i], self.frames)
            for i in self.members[number]
        ]
        inputs = {name: tensor.to(self.model.device) for name, tensor in _batch(prepared, self.padding).items()}
        output = self.model.generate(**inputs, **self.options)
        new = output[:, inputs["input_ids"].shape[1] :]
        return self.processor.batch_decode(new, skip_special_tokens=True)

    def rows(self, predictions):
        """Bring answers into the order of the questions.

        Args:
            predictions (list[list[str]]): The answers to every batch.

        Returns:
            list[dict]: Result rows that are not marked yet.
        """
        rows = [None] * len(self.questions)
        for members, texts in zip(self.members, predictions, strict=True):
            for i, text in zip(members, texts, strict=True):
                rows[i] = result_row(self.questions[i], self.prompts[i], text)
        return rows


def _captioned(question, frames):
    if question["video"] is None:
        return question["turns"]
    count = count_frames(question["video"], question["where"], frames, question["clip"])
    return [(frames.caption(text, count), answer) for text, answer in question["turns"]]


def _encode(processor, template, question, turns, frames):
    """tuple[Tensor, list[Tensor]]: Ids of a prompt, as training reads them, and the tiles of its images."""
    if question["video"] is not None:
        images, limit = read_frames(question["video"], question["where"], frames, question["clip"]), 1
    else:
        images = (open_image(path, question["where"]) for path in question["images"])
        limit = processor.tile_limit(len(question["images"]), question.get("max_tiles"))
    # One by one, as whole videos take much memory.
    tiles = [processor.tiles(image, limit) for image in images]
    slots = [processor.expand(IMAGE_PLACEHOLDER, [len(cut)]) for cut in tiles]
    ids, _ = encode_conversation(processor.tokenizer, template, turns, question["system"], images=slots)
    return ids, tiles


def _batch(prepared, padding):
    """dict: Arguments of ``generate``, padded on the left."""
    prompts, tiles = [ids for ids, _ in prepared], [cut for _, cuts in prepared for cut in cuts]
    masks = [torch.ones_like(ids) for ids in prompts]
    inputs = {
        "input_ids": pad_sequence(prompts, batch_first=True, padding_value=padding, padding_side="left"),
        "attention_mask": pad_sequence(masks, batch_first=True, padding_side="left"),
    }
    return {**inputs, "pixel_values": torch.cat(tiles)} if tiles else inputs
