"""The recipes, as values that stage configs pick from; all name the same fields, as updating a config merges them.

``reference`` is mmMamba's (arXiv 2502.13145 and its code); ``improved`` keeps the attention's rotary positions,
starts the mixers as near-perfect memories, aligns what the output projection makes of them, weighs layers alike, and
matches the answers in stage 3, where output projections train too.
"""

reference_mixer = dict(
    conv_kernel=2, conv_activation="silu", qk_norm=None, use_rope=False, gate=True, gate_bias=False, window=0, sink=False
)
reference_seeding = dict(A_log=1.0, dt_spacing="random", dt_min=1e-3, dt_max=1e-1, gate="xavier")
reference_alignment = dict(scale=1000.0, normalise=False, after_projection=False)
reference_divergence = dict(
    direction="forward", temperature=1.0, tokens="all", reduction="batchmean", chunk_rows=None, backend="auto"
)

improved_mixer = dict(
    conv_kernel=2, conv_activation="silu", qk_norm=None, use_rope=True, gate=True, gate_bias=True, window=0, sink=False
)
improved_seeding = dict(A_log=0.0, dt_spacing="log", dt_min=1e-3, dt_max=1e-1, gate="xavier")
improved_alignment = dict(scale=1.0, normalise=True, after_projection=True)
improved_divergence = dict(
    direction="forward", temperature=1.0, tokens="answer", reduction="mean", chunk_rows=None, backend="auto"
)

# For teachers whose attention looks mostly at the last tokens and at the first one, as language models' does.
windowed_mixer = dict(
    conv_kernel=2, conv_activation="silu", qk_norm="l2", use_rope=True, gate=True, gate_bias=True, window=64, sink=True
)
windowed_seeding = improved_seeding
windowed_alignment = dict(scale=1.0, normalise=True, after_projection=False)
