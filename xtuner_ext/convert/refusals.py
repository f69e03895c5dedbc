"""What no key map can translate, refused by one sentence each."""

from ..errors import UserError

EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def refuse_unsupported(raw, where="config.json"):
    """Refuse architectures that one decoder of full attention and dense MLPs can not express.

    Args:
        raw (dict): Content of config.json, or of the text part of one.
        where (str): The file's name, for messages.

    Raises:
        UserError: For mixture-of-experts, sliding-window or ALiBi attention, partly rotated heads, quantised weights.
    """
    for key in EXPERT_KEYS:
        if raw.get(key):
            raise UserError(f"{where}: {key} is {raw[key]}: mixture-of-experts models are not supported")
    if quantised := raw.get("quantization_config"):
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        raise UserError(
            f"{where}: quantization_config names the method {method!r}: packed weights can not be split or trained, "
            "take the unquantised folder"
        )
    # Only Qwen2 ignores the window unless told to use it.
    slides = raw.get("use_sliding_window", raw.get("model_type") != "qwen2")
    if slides and raw.get("sliding_window") is not None:
        raise UserError(
            f"{where}: sliding_window is {raw['sliding_window']}: sliding-window attention is not supported, "
            "only full attention"
        )
    for index, word in enumerate(raw.get("layer_types") or ()):
        if word not in ("full_attention", "linear_attention"):
            raise UserError(f"{where}: layer_types[{index}] is {word!r}, only full attention is supported")
    if raw.get("alibi") or raw.get("position_embedding_type") == "alibi":
        raise UserError(f"{where}: the model uses ALiBi positions, only rotary positions are supported")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor")) if isinstance(rope, dict) else None
    if partial not in (None, 1):
        raise UserError(f"{where}: partial_rotary_factor is {partial}, only heads that rotate whole are supported")
