"""A teacher and its students side by side on annotated samples."""

import torch

from ..data.collate import conversation_collate
from ..data.masking import next_token_rows
from ..distill.losses import alignment_error
from ..errors import UserError
from .fidelity import Tally, tally_rows


def check_comparable(teacher, student, name):
    """Insist that two models score the same tokens.

    Args:
        teacher (HybridVLConfig): What is compared with.
        student (HybridVLConfig): What is compared.
        name (str): The student's folder, for the message.

    Raises:
        UserError: When they do not share vocabulary or front end.
    """
    if teacher.vocab_size != student.vocab_size:
        raise UserError(f"{name} has {student.vocab_size} words, its teacher {teacher.vocab_size}: not comparable")
    if (teacher.vision is None) != (student.vision is None):
        blind, seeing = (name, "its teacher") if student.vision is None else ("the teacher", name)
        raise UserError(f"{seeing} sees images and {blind} does not: not comparable")


@torch.inference_mode()
def compare(teacher, student, dataset, batch_size=8, limit=None, on_batch=None):
    """Measure how far a student's distributions are from its teacher's.

    Args:
        teacher (HybridVLForCausalLM): In evaluation mode.
        student (HybridVLForCausalLM): In evaluation mode, on the same device; brought to the teacher's precision.
        dataset (ConversationDataset): Held-out samples.
        batch_size (int): Samples per forward pass.
        limit (int, optional): Samples, spread evenly over the dataset.
        on_batch (callable, optional): Called with the number of samples finished.

    Returns:
        dict: The measures of :meth:`Tally.measures`, the same by category under ``by_category``, and under
        ``alignment`` the relative error of the student's mixers fed with the teacher's hidden states
        (``text``, ``image``, ``layers``), None when the two do not have the same layers.
    """
    count = len(dataset) if limit is None else min(limit, len(dataset))
    chosen = [index * len(dataset) // count for index in range(count)]
    student.to(teacher.dtype)
    total, by_category, errors = Tally(), {}, _AlignmentErrors()
    aligned = _same_layers(teacher.config, student.config)
    for start in range(0, count, batch_size):
        batch, records = zip(*(dataset.sample(index) for index in chosen[start : start + batch_size]))
        data = {key: value.to(teacher.device) for key, value in conversation_collate(batch)["data"].items()}
        labels = data.pop("labels")
        inputs = {"attention_mask": data["attention_mask"]}
        embeds = teacher.embed(data["input_ids"], data["pixel_values"] if teacher.config.vision else None)
        target = teacher.model(inputs_embeds=embeds, **inputs).last_hidden_state
        own = student.embed(data["input_ids"], data["pixel_values"] if student.config.vision else None)
        hidden = student.model(inputs_embeds=own, **inputs).last_hidden_state
        rows = next_token_rows(labels)
        targets = labels.roll(-1, 1)[rows]
        owner = torch.arange(len(batch), device=labels.device)[:, None].expand_as(labels)[rows]
        for position, record in enumerate(records):
            mine = owner == position
            tally = tally_rows(
                hidden[rows][mine], student.lm_head.weight, target[rows][mine], teacher.lm_head.weight, targets[mine]
            )
            total.add(tally)
            by_category.setdefault(record.category, Tally()).add(tally)
        if aligned:
            errors.add(teacher, student, data["input_ids"], embeds, inputs)
        if on_batch is not None:
            on_batch(len(batch))
    return {
        **total.measures(),
        "by_category": {name: tally.measures() for name, tally in sorted(by_category.items())},
        "alignment": errors.measures() if aligned else None,
    }


class _AlignmentErrors:
    """Relative errors of every mixer, by layer and kind of token, averaged over batches by token."""

    def __init__(self):
        self.sums, self.counts = {}, {}

    def add(self, teacher, student, input_ids, embeds, inputs):
        context = teacher.model.layer_context(embeds, **inputs)
        real = inputs["attention_mask"].bool()
        image = (input_ids == teacher.config.image_token_id) & real
        hidden = embeds
        for index, (ours, theirs) in enumerate(zip(student.model.layers, teacher.model.layers)):
            target = theirs.mixer(theirs.input_layernorm(hidden), **theirs.mixer_context(context))
            mixed = ours.mixer(ours.input_layernorm(hidden), **ours.mixer_context(context))
            for kind, mask in (("image", image), ("text", real & ~image)):
                if count := int(mask.sum()):
                    error = alignment_error(mixed[:, :, None], target[:, :, None], mask, normalise=True).item()
                    self.sums[index, kind] = self.sums.get((index, kind), 0.0) + error * count
                    self.counts[index, kind] = self.counts.get((index, kind), 0) + count
            hidden = hidden + target
            hidden = hidden + theirs.mlp(theirs.post_attention_layernorm(hidden))

    def measures(self):
        means = {key: self.sums[key] / self.counts[key] for key in self.sums}
        layers = [
            {kind: means[layer, kind] for kind in ("text", "image") if (layer, kind) in means}
            for layer in sorted({layer for layer, _ in means})
        ]
        kinds = {kind: [layer[kind] for layer in layers if kind in layer] for kind in ("text", "image")}
        return {**{kind: sum(v) / len(v) if v else None for kind, v in kinds.items()}, "layers": layers}


def _same_layers(one, other):
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    return all(getattr(one, key) == getattr(other, key) for key in keys)
