"""Choosing the layers that keep attention, by measurement on an aligned student.

After stage 2 every layer holds both mixers. Putting attention back in one layer and measuring the
divergence from the teacher ranks the layers without training (KL-guided selection, arXiv 2512.20569, with
the short training of each probe left out); doing so again after every choice accounts for layers that
help only together.
"""

import json
from pathlib import Path

import torch

from ..data.masking import next_token_rows
from ..errors import UserError
from .losses import chunked_divergence


class LayerProbe:
    """Measures the divergence of a student that keeps attention in given layers.

    Hidden states before the first layer that two placements differ in are computed once.

    Args:
        model (DistillModel): Of stage 1 or 2, so that every layer holds both mixers.
        batches (list[dict]): ``input_ids``, ``labels``, ``attention_mask`` and ``pixel_values``.
    """

    def __init__(self, model, batches):
        self.model = model.eval()
        self.layers = model.llm.model.layers
        self.batches = [self._prepare(batch) for batch in batches]
        self.tokens = sum(int(batch["rows"].sum()) for batch in self.batches)

    @torch.no_grad()
    def _prepare(self, batch):
        llm, inputs = self.model.llm, {"attention_mask": batch["attention_mask"]}
        embeds = llm.embed(batch["input_ids"], batch.get("pixel_values") if llm.config.vision else None)
        # Made for attention everywhere; the mixers take their own part of it.
        context = llm.model.layer_context(embeds, **inputs)
        rows = next_token_rows(batch["labels"])
        prepared = {"embeds": embeds, "context": context, "rows": rows}
        return {**prepared, "target": self._run(prepared, embeds, ["full_attention"] * len(self.layers), 0)[-1][rows]}

    def _run(self, batch, hidden, layer_types, start):
        states = []
        for layer, word in list(zip(self.layers, layer_types))[start:]:
            states.append(hidden)
            layer.mixer.active = word
            hidden = layer(hidden, **batch["context"])
        return [*states, self.model.llm.model.norm(hidden)]

    def _divergence(self, batch, hidden):
        head = self.model.llm.lm_head.weight
        return chunked_divergence(hidden[batch["rows"]], head, batch["target"], head)[0].item()

    @torch.no_grad()
    def divergence(self, attention_layers):
        """float: KL(teacher || student) per supervised token with attention in the given layers, in nats."""
        words = _words(attention_layers, len(self.layers))
        total = sum(self._divergence(batch, self._run(batch, batch["embeds"], words, 0)[-1]) for batch in self.batches)
        return total / self.tokens

    @torch.no_grad()
    def additions(self, attention_layers, on_probe=None):
        """Divergence after giving attention back to one more layer, for each that has none.

        Args:
            attention_layers (list[int]): Layers that have it already.
            on_probe (callable, optional): Called after each measured layer.

        Returns:
            dict[int, float]: Layer to divergence per supervised token.
        """
        base = _words(attention_layers, len(self.layers))
        states = [self._run(batch, batch["embeds"], base, 0) for batch in self.batches]
        found = {}
        for index, word in enumerate(base):
            if word == "full_attention":
                continue
            words = _words([*attention_layers, index], len(self.layers))
            total = sum(
                self._divergence(batch, self._run(batch, before[index], words, index)[-1])
                for batch, before in zip(self.batches, states)
            )
            found[index] = total / self.tokens
            if on_probe is not None:
                on_probe()
        return found


def select_layers(probe, keep, on_probe=None):
    """Choose layers greedily.

    Args:
        probe (LayerProbe): Measures placements.
        keep (int): Layers to choose.
        on_probe (callable, optional): Called after each measured placement.

    Returns:
        dict: ``attention_layers`` (sorted), ``order`` (as chosen), ``greedy`` (divergence after each choice),
        ``linear`` (with no attention), ``ranking`` (layer to divergence when it alone gets attention back)
        and ``placements``, the divergence of every-fourth-like, first and last layers of the same number.
    """
    count, chosen, divergences, ranking = len(probe.layers), [], [], None
    for _ in range(keep):
        found = probe.additions(chosen, on_probe)
        ranking = ranking or found
        best = min(found, key=found.get)
        chosen.append(best)
        divergences.append(found[best])
    rivals = {
        "evenly spaced": evenly_spaced(keep, count),
        "first": list(range(keep)),
        "last": list(range(count - keep, count)),
    }
    return {
        "attention_layers": sorted(chosen),
        "order": chosen,
        "greedy": divergences,
        "linear": probe.divergence([]),
        "ranking": ranking,
        "placements": {
            "selected": {"layers": sorted(chosen), "kl": divergences[-1]},
            **{name: {"layers": layers, "kl": probe.divergence(layers)} for name, layers in rivals.items()},
        },
    }


def read_selection(path):
    """Read what ``xtuner-ext select-layers`` wrote.

    Args:
        path (str): JSON file.

    Returns:
        list[int]: The layers that keep attention.

    Raises:
        UserError: For a file that is missing or something else.
    """
    if not Path(path).is_file():
        raise UserError(
            f"attention_layers names {path}, which does not exist: write it with xtuner-ext select-layers CONFIG "
            f"STAGE2_CHECKPOINT --keep K --out {path}, or name the layers"
        )
    try:
        layers = json.loads(Path(path).read_text(encoding="utf-8"))["attention_layers"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a file of xtuner-ext select-layers: it has no 'attention_layers'") from error
    return layers


def probe_count(keep, layers):
    """int: Placements that the greedy choice measures."""
    return sum(layers - chosen for chosen in range(keep))


def evenly_spaced(keep, layers):
    """list[int]: The first of every ``layers / keep`` layers; every fourth for a quarter of them."""
    return [index * layers // keep for index in range(keep)]


def _words(attention_layers, count):
    return ["full_attention" if i in set(attention_layers) else "linear_attention" for i in range(count)]
