"""The decoding step of one token as a CUDA graph: captured once, replayed for every token.

At batch size one a step is thousands of launches that each take the host longer than the GPU.
"""

import dataclasses
import logging
import weakref

import torch

from .cache import StateLayer

logger = logging.getLogger(__name__)

# Models whose step could not be captured.
_REFUSED = weakref.WeakSet()

@dataclasses.dataclass
class DecodeStep:
    """What attention needs to read and write a cache whose length only the device knows.

    Attributes:
        position (Tensor): Where the new key goes, int64 (1,).
        key_mask (Tensor | None): Boolean (B, K), False at padding.
    """

    position: torch.Tensor
    key_mask: torch.Tensor | None = None


class DecodeGraph:
    """One captured step of a model on a cache.

    Args:
        model (HybridVLForCausalLM): On one GPU.
        cache (HybridCache): Static, with at least one token in it.
        batch (int): Rows.
        masked (bool): Whether rows are padded.

    Attributes:
        weights (tuple): The :func:`addresses` that the graph reads.
    """

    def __init__(self, model, cache, batch, masked):
        # A model whose cache is kept for it would otherwise live for ever.
        self.model, self.cache, self.weights = weakref.ref(model), cache, addresses(model)
        device = model.model.embed_tokens.weight.device
        # Inference tensors could not be written to again outside of inference mode.
        with torch.inference_mode(False):
            self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
            self.position_ids = torch.zeros_like(self.token)
            self.position = torch.zeros(1, dtype=torch.long, device=device)
            self.token_mask = torch.ones(batch, 1, dtype=torch.bool, device=device) if masked else None
            self.key_mask = None
            if masked and cache.max_length is not None:
                self.key_mask = torch.zeros(batch, cache.max_length, dtype=torch.bool, device=device)
        # Dynamic scaling looks at the positions on the host, so its angles are made outside of the graph.
        self.angles = None
        self.graph = self.logits = None

    def run(self, token, position_ids, attention_mask):
        """Read one token.

        Args:
            token (Tensor): (B, 1).
            position_ids (Tensor | None): (B, 1) or (1, 1); None counts on from the tokens seen.
            attention_mask (Tensor | None): (B, seen + 1), 0 at padding.

        Returns:
            Tensor: Logits (B, 1, V).
        """
        seen = self.cache.get_seq_length()
        self.token.copy_(token)
        self.position.fill_(seen)
        if position_ids is None:
            self.position_ids.fill_(seen)
        else:
            self.position_ids.copy_(position_ids[:, -1:])
        if self.token_mask is not None:
            self.token_mask.copy_(attention_mask[:, -1:])
        if self.key_mask is not None:
            self.key_mask[:, : seen + 1].copy_(attention_mask)
        decoder = self.model().model
        if decoder.has_dynamic_positions:
            self._copy_angles(decoder.angles(decoder.embed_tokens.weight, self.position_ids))
        if self.graph is None:
            self._capture()
        self.graph.replay()
        self.cache.count(1)
        return self.logits.clone()

    def _copy_angles(self, angles):
        if self.angles is None:
            with torch.inference_mode(False):
                self.angles = [None if pair is None else tuple(torch.empty_like(t) for t in pair) for pair in angles]
        for kept, new in zip(self.angles, angles):
            for buffer, tensor in zip(kept or (), new or ()):
                buffer.copy_(tensor)

    def _capture(self):
        states = [state for layer in self.cache.layers if isinstance(layer, StateLayer) for state in layer.tensors()]
        before = [state.clone() for state in states]
        try:
            self._record()
        finally:
            # The warm-up has read the token too; keys it has only overwritten with themselves.
            for state, kept in zip(states, before):
                state.copy_(kept)

    def _record(self):
        current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            # Libraries allocate and kernels are compiled on first use, which a capture does not allow.
            for _ in range(3):
                self._step()
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Another thread may use the GPU meanwhile, such as one that loads images.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.logits = self._step()
        self.graph = graph

    def _step(self):
        model = self.model()
        hidden_states = model.model.decode(
            model.model.embed_tokens(self.token),
            self.cache,
            self.position_ids,
            self.angles,
            token_mask=self.token_mask,
            step=DecodeStep(self.position, self.key_mask),
        )
        return model.lm_head(hidden_states)


def replay(model, cache, input_ids, position_ids, attention_mask):
    """Read one token by a graph of the cache's, captured if there is none yet.

    Args:
        model (HybridVLForCausalLM): The model.
        cache (HybridCache): Updated.
        input_ids (Tensor): (B, 1).
        position_ids (Tensor, optional): (B, 1).
        attention_mask (Tensor, optional): (B, seen + 1).

    Returns:
        Tensor | None: Logits (B, 1, V); None where no graph can be captured, said once.
    """
    cache.reserve(cache.get_seq_length() + 1)
    key = (input_ids.shape[0], attention_mask is not None)
    graph = cache.graphs.get(key)
    if graph is None or graph.model() is not model:
        graph = cache.graphs[key] = DecodeGraph(model, cache, input_ids.shape[0], attention_mask is not None)
    try:
        # Kernels written in Triton are launched on the current device.
        with torch.cuda.device_of(input_ids):
            return graph.run(input_ids, position_ids, attention_mask)
    except Exception as error:
        # Whatever a library or a kernel's compiler raises: the step itself needs no graph. A captured one may not fail.
        if graph.graph is not None:
            raise
        cache.graphs.clear()
        cache.cuda_graph = False
        _REFUSED.add(model)
        refuse(f"the decoding step can not be captured as a CUDA graph ({next(iter(str(error).splitlines()), type(error).__name__)})")
        return None


def was_refused(model):
    """bool: Whether a capture has failed before."""
    return model in _REFUSED


def refuse(reason, said=set()):
    """Say once why decoding goes without graphs."""
    if reason not in said:
        said.add(reason)
        logger.warning(f"{reason}; decoding without")


def addresses(model):
    """tuple: Where a model's weights lie and in what; graphs are of no use when it changes."""
    return tuple((p.data_ptr(), p.dtype) for p in model.parameters())
