"""InternLM 1 for transformers 5: a Llama whose attention projections have biases, and words by SentencePiece.

The code that its folders bring was written for transformers 4 and reads a cache that is a tuple; with these classes
none of it runs.
"""

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, SentencePieceBackend


class InternLMConfig(LlamaConfig):
    """Llama's configuration, from the words of InternLM's config.json.

    Attributes:
        bias (bool): Whether the attention's projections have biases.
        rotary (dict | None): ``base`` and ``type`` (``origin`` or ``dynamic``) of the rotary positions.
    """

    model_type = "internlm"

    bias: bool = True
    rotary: dict | None = None

    def __post_init__(self, **kwargs):
        self.attention_bias = self.bias
        if self.rotary and self.rope_parameters is None:
            dynamic = self.rotary.get("type") == "dynamic"
            # Its code scales by one, which is that of the longest sequence alone.
            scaling = {"rope_type": "dynamic", "factor": 1.0} if dynamic else {"rope_type": "default"}
            self.rope_parameters = {"rope_theta": float(self.rotary.get("base", 10000)), **scaling}
        super().__post_init__(**kwargs)


class InternLMForCausalLM(LlamaForCausalLM):
    """Llama under InternLM's name."""

    config_class = InternLMConfig


class InternLMTokenizer(SentencePieceBackend):
    """Words by the folder's own tokenizer.model, so that ids are SentencePiece's.

    Args:
        vocab_file (str): tokenizer.model.
        bos_token (str): Beginning of a sequence, written in front.
        eos_token (str): End of a sequence, not written.
        unk_token (str): For what has no piece.
        **kwargs: As of transformers' tokenizers.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **kwargs):
        kwargs = {**kwargs, "special_tokens_pattern": "bos"}
        super().__init__(vocab_file=vocab_file, bos_token=bos_token, eos_token=eos_token, unk_token=unk_token, **kwargs)

    def _convert_id_to_token(self, index):
        # A model may have more rows than there are pieces, and says so while it has learnt little.
        return super()._convert_id_to_token(index) if index < self.vocab_size else self.unk_token

    def convert_tokens_to_string(self, tokens):
        """str: Text of some pieces; characters that are written as bytes are put together."""
        text, pieces, special = "", [], set(self.added_tokens_encoder)
        for token in [*tokens, None]:
            if token is not None and token not in special:
                pieces.append(token)
                continue
            text += self.sp_model.decode(pieces) + (token or "")
            pieces = []
        return text


class InternLMTokenizerOwner(PreTrainedConfig):
    """Nobody's configuration: a tokenizer that is registered by its name alone goes before remote code."""

    model_type = "internlm_tokenizer"
