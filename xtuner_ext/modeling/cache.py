"""Decoding cache of a hybrid decoder: keys and values where there is attention, states elsewhere."""

from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer


# States of a linear layer: what the scan carries, and the last keys and values of a sliding window.
SCAN, WINDOW = 0, 1


class HybridCache(Cache):
    """Cache built from transformers' own layer caches.

    transformers derives the sequence length from the first attention layer and so has none for a
    purely linear model; this class counts the tokens itself.

    Args:
        config (HybridVLConfig): Gives the mixer of every layer.
    """

    def __init__(self, config):
        super().__init__(
            layers=[
                LinearAttentionLayer(number_of_states=2) if kind == "linear_attention" else DynamicLayer()
                for kind in config.layer_types
            ]
        )
        self.seen_tokens = 0

    def get_seq_length(self, layer_idx=0):
        """int: Tokens seen so far, padding included."""
        return self.seen_tokens

    def get_mask_sizes(self, query_length, layer_idx=0):
        """tuple[int, int]: Key length and offset for a mask over the cached and the new tokens."""
        return self.seen_tokens + query_length, 0

    @property
    def is_compileable(self):
        """bool: False; the attention part grows by concatenation."""
        return False

    def nbytes(self):
        """int: Bytes held by all layers, over the whole batch."""
        tensors = []
        for layer in self.layers:
            if isinstance(layer, LinearAttentionLayer):
                tensors += [*layer.conv_states.values(), *layer.recurrent_states.values()]
            elif layer.is_initialized:
                tensors += [layer.keys, layer.values]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def batch_repeat_interleave(self, repeats):
        """Give every row ``repeats`` copies, for beams and several answers to one prompt."""
        for layer in self.layers:
            if not isinstance(layer, LinearAttentionLayer):
                layer.batch_repeat_interleave(repeats)
                continue
            for states in (layer.conv_states, layer.recurrent_states):
                for index, state in states.items():
                    if state is not None:
                        states[index] = state.repeat_interleave(repeats, dim=0)

    def reset(self):
        """Forget everything."""
        super().reset()
        self.seen_tokens = 0
