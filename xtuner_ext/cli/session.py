"""A conversation that keeps the model's state between turns."""

import torch

from ..data.masking import encode_prompt
from ..evaluation.runner import stop_token_ids
from ..modeling import HybridCache
from ..modeling.processing import IMAGE_PLACEHOLDER

# Tokens that a conversation has room for at first.
ROOM = 1024


class ChatSession:
    """Asks one question after another; only new tokens are read.

    Args:
        model (HybridVLForCausalLM): In evaluation mode.
        processor (HybridVLProcessor): Its processor.
        template (Template): Conversation template.
        system (str, optional): System message.
        stop_words (tuple[str, ...]): End an answer besides the template's own.
    """

    def __init__(self, model, processor, template, system=None, stop_words=()):
        self.model, self.processor, self.template = model, processor, template
        self.system = system
        tokenizer = processor.tokenizer
        extra = {tokenizer.convert_tokens_to_ids(word) for word in stop_words} - {None, tokenizer.unk_token_id}
        self.stops = sorted({*stop_token_ids(tokenizer, template, model.config), *extra})
        self.reset()

    def reset(self):
        """Forget the conversation."""
        self.cache = HybridCache(self.model.config, max_length=ROOM)
        self.ids = torch.zeros(1, 0, dtype=torch.long)

    def ask(self, text, images=(), streamer=None, **generation):
        """Answer one question.

        Args:
            text (str): The question; ``<image>`` marks where images go, else they go in front.
            images (list[PIL.Image.Image]): New images of this turn.
            streamer (BaseStreamer, optional): Receives tokens as they come.
            **generation: As for ``generate``.

        Returns:
            str: The answer.

        Raises:
            ValueError: When placeholders and images differ in number.
        """
        if images and IMAGE_PLACEHOLDER not in text:
            text = f"{IMAGE_PLACEHOLDER}\n" * len(images) + text
        first = self.ids.shape[1] == 0
        limit = self.processor.tile_limit(len(images))
        tiles = [self.processor.tiles(image, limit) for image in images]
        slots = [self.processor.expand(IMAGE_PLACEHOLDER, [len(cut)]) for cut in tiles]
        new = encode_prompt(self.processor.tokenizer, self.template, text, self.system, slots, first)
        ids = torch.cat([self.ids, torch.tensor([new])], dim=1)
        pixels = torch.cat(tiles) if tiles else None
        try:
            output = self.model.generate(
                ids.to(self.model.device),
                pixel_values=None if pixels is None else pixels.to(self.model.device),
                past_key_values=self.cache,
                streamer=streamer,
                eos_token_id=self.stops,
                pad_token_id=self.processor.tokenizer.pad_token_id or 0,
                **generation,
            ).cpu()
        except BaseException:
            # The cache has seen part of this turn and can not be wound back.
            self.reset()
            raise
        answer = output[:, ids.shape[1] :]
        self.ids = output
        if answer.shape[1] == 0 or int(answer[0, -1]) not in self.stops:
            # Cut off by length: close the turn as the template would.
            suffix = self.processor.tokenizer(self.template.suffix, add_special_tokens=False, return_tensors="pt")
            self.ids = torch.cat([output, suffix.input_ids.long()], dim=1)
        return self.processor.decode(answer[0], skip_special_tokens=True)
