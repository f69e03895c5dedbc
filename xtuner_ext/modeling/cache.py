"""Decoding cache of a hybrid decoder: keys and values where there is attention, states elsewhere.

Axis letters: B batch, L length, G key/value heads, P head width.
"""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, LinearAttentionLayer


# States of a linear layer: what the scan carries, and the last keys and values of a sliding window.
SCAN, WINDOW = 0, 1


class PreallocatedLayer(CacheLayerMixin):
    """Keys and values of one attention layer in buffers that stay where they are until they are full.

    transformers' ``StaticLayer`` returns the whole buffer, so that every step attends to all of it under a mask;
    this one returns the filled part. Growing by concatenation, as ``DynamicLayer`` does, copies all keys for
    every token.

    Args:
        room (int): Tokens to make room for; doubled whenever they do not suffice.
    """

    is_croppable = True

    def __init__(self, room):
        super().__init__()
        self.room, self.length = room, 0

    def lazy_initialization(self, key_states, value_states):
        """Allocate buffers like the first keys and values, each (B, G, L, P)."""
        self.dtype, self.device = key_states.dtype, key_states.device
        # Inference tensors could not be written to again outside of inference mode.
        with torch.inference_mode(False):
            self.keys = key_states.new_zeros(*key_states.shape[:2], self.room, key_states.shape[-1])
            self.values = value_states.new_zeros(*value_states.shape[:2], self.room, value_states.shape[-1])
        self.is_initialized = True

    def reserve(self, length):
        """Make room for ``length`` tokens in all."""
        if length <= self.room:
            return
        self.room = max(length, 2 * self.room)
        if self.is_initialized:
            before = self.filled()
            self.lazy_initialization(*before)
            for buffer, tensor in zip(self.filled(), before):
                buffer.copy_(tensor)

    def write(self, position, key, value):
        """Write the (B, G, 1, P) key and value of one token at ``position``, an int64 tensor (1,) on their device.

        Only the device knows the position, so that a CUDA graph may hold this; nothing is counted.
        """
        self.keys.index_copy_(2, position, key)
        self.values.index_copy_(2, position, value)

    def update(self, key_states, value_states, *_, **__):
        """Write (B, G, L, P) keys and values behind those that are there.

        Returns:
            tuple[Tensor, Tensor]: All keys and values so far, views of the buffers.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.reserve(self.length + key_states.shape[2])
        start, self.length = self.length, self.length + key_states.shape[2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.filled()

    def filled(self):
        """tuple[Tensor, Tensor]: Views of the keys and values seen, each (B, G, length, P)."""
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_mask_sizes(self, query_length):
        """tuple[int, int]: Key length and offset."""
        return self.length + query_length, 0

    def get_seq_length(self):
        """int: Tokens seen."""
        return self.length

    def get_max_length(self):
        """int: -1, the buffers grow."""
        return -1

    def crop(self, tokens_to_remove):
        """Forget the last ``-tokens_to_remove`` tokens."""
        self.length += tokens_to_remove

    def reset(self):
        """Forget everything; the buffers stay."""
        self.length = 0

    def reorder_cache(self, beam_idx):
        """Let row i continue what row ``beam_idx[i]`` has seen."""
        if self.is_initialized:
            for tensor in self.filled():
                tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats):
        """Give every row ``repeats`` copies."""
        if self.is_initialized:
            self.keys = self.keys.repeat_interleave(repeats, dim=0)
            self.values = self.values.repeat_interleave(repeats, dim=0)


class StateLayer(LinearAttentionLayer):
    """States of one linear layer, written in place so that their addresses last.

    transformers' layer appends new convolution inputs to old ones; the mixer's own are complete already.
    """

    def __init__(self):
        super().__init__(number_of_states=2)

    def lazy_initialization(self, conv_states=None, recurrent_states=None, state_idx=0, conv_kernel_size=None):
        """Allocate a state like the first one, contiguous: some kernels return transposed ones."""
        if recurrent_states is not None:
            recurrent_states = recurrent_states.contiguous()
        # Inference tensors could not be written to again outside of inference mode.
        with torch.inference_mode(False):
            super().lazy_initialization(conv_states, recurrent_states, state_idx, conv_kernel_size)

    def update_conv_state(self, conv_states, state_idx=0, **_):
        """Keep the inputs (B, D, W-1) before the next token."""
        if not self.is_conv_states_initialized[state_idx]:
            self.lazy_initialization(conv_states=conv_states, state_idx=state_idx)
        self.has_previous_state[state_idx] = True
        return self.conv_states[state_idx].copy_(conv_states)

    def reorder_cache(self, beam_idx):
        """Let row i continue what row ``beam_idx[i]`` has seen."""
        for state in self.tensors():
            state.copy_(state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats):
        """Give every row ``repeats`` copies."""
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                if state is not None:
                    states[index] = state.repeat_interleave(repeats, dim=0)

    def tensors(self):
        """list[Tensor]: The states that there are."""
        return [state for state in (*self.conv_states.values(), *self.recurrent_states.values()) if state is not None]


class HybridCache(Cache):
    """Cache built from one layer cache per mixer.

    transformers derives the sequence length from the first attention layer and so has none for a
    purely linear model; this class counts the tokens itself.

    Args:
        config (HybridVLConfig): Gives the mixer of every layer.
        max_length (int, optional): Make room for so many tokens at once, so that decoding neither copies nor
            moves keys; room is doubled when it does not suffice. None grows token by token and takes
            exactly the bytes of the tokens seen.

    Attributes:
        seen_tokens (int): Tokens seen so far, padding included.
        cuda_graph (bool): Replay a CUDA graph for every single token; set by ``generate``.
        graphs (dict): Those graphs, which read and write this cache's tensors.
    """

    def __init__(self, config, max_length=None):
        def attention():
            return DynamicLayer() if max_length is None else PreallocatedLayer(max_length)

        super().__init__(
            layers=[StateLayer() if kind == "linear_attention" else attention() for kind in config.layer_types]
        )
        self.seen_tokens = 0
        self.cuda_graph = False
        self.graphs = {}

    @property
    def is_static(self):
        """bool: Whether all tensors stay where they are, as a CUDA graph needs it."""
        return not any(isinstance(layer, DynamicLayer) for layer in self.layers)

    @property
    def max_length(self):
        """int | None: Tokens that there is room for; None where that is no matter."""
        return next((layer.room for layer in self.layers if isinstance(layer, PreallocatedLayer)), None)

    @property
    def rows(self):
        """int | None: Rows of the batch; None before the first token."""
        return next((tensor.shape[0] for tensor in self.tensors()), None)

    def reserve(self, length):
        """Make room for ``length`` tokens in all; graphs of the buffers before are dropped."""
        if self.max_length is not None and length > self.max_length:
            self.graphs.clear()
            for layer in self.layers:
                if isinstance(layer, PreallocatedLayer):
                    layer.reserve(length)

    def count(self, tokens):
        """Note that ``tokens`` tokens were written by a CUDA graph."""
        self.seen_tokens += tokens
        for layer in self.layers:
            if isinstance(layer, PreallocatedLayer):
                layer.length += tokens

    def get_seq_length(self, layer_idx=0):
        """int: Tokens seen so far, padding included."""
        return self.seen_tokens

    def get_mask_sizes(self, query_length, layer_idx=0):
        """tuple[int, int]: Key length and offset for a mask over the cached and the new tokens."""
        return self.seen_tokens + query_length, 0

    @property
    def is_compileable(self):
        """bool: False; transformers would otherwise compile the model around a cache that counts in Python."""
        return False

    def tensors(self):
        """list[Tensor]: Everything held, layer by layer."""
        found = []
        for layer in self.layers:
            if isinstance(layer, StateLayer):
                found += layer.tensors()
            elif layer.is_initialized:
                found += [layer.keys, layer.values]
        return found

    def nbytes(self):
        """int: Bytes held by all layers, over the whole batch; room that is not filled yet counts."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    @torch.inference_mode(False)
    def copy(self):
        """A cache that has seen the same and goes its own way, such as a question that leaves no trace in a stream.

        Returns:
            HybridCache: Of the same kind; the states of linear layers, and static keys and values, are copied.
        """
        # Inference tensors could not be written to again outside of inference mode.
        twin = object.__new__(HybridCache)
        twin.__dict__.update(self.__dict__)
        twin.graphs, twin.layers = {}, []
        for layer in self.layers:
            other = object.__new__(type(layer))
            other.__dict__.update(layer.__dict__)
            if isinstance(layer, StateLayer):
                for name, value in layer.__dict__.items():
                    if isinstance(value, dict):
                        setattr(other, name, dict(value))
                for states in (other.conv_states, other.recurrent_states):
                    states.update({index: state.clone() for index, state in states.items() if state is not None})
            elif isinstance(layer, PreallocatedLayer) and layer.is_initialized:
                # Dynamic keys are never written to, so that both may hold them.
                other.keys, other.values = layer.keys.clone(), layer.values.clone()
            twin.layers.append(other)
        return twin

    @torch.inference_mode(False)
    def batch_repeat_interleave(self, repeats):
        """Give every row ``repeats`` copies, for beams and several answers to one prompt."""
        super().batch_repeat_interleave(repeats)
        self.graphs.clear()

    def crop(self, tokens_to_remove):
        """Forget the last ``-tokens_to_remove`` tokens; what a linear layer has read stays in its state."""
        super().crop(tokens_to_remove)
        self.seen_tokens += tokens_to_remove

    def reset(self):
        """Forget everything."""
        super().reset()
        # Until transformers 5.18 keys that grow by concatenation were only zeroed.
        self.layers = [DynamicLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]
        self.seen_tokens = 0
