"""Methods that a model must be trained with: they stand in the registry with their modules."""

from mgam.methods.registry import Method, register

COMMON = {"form": "module", "phase": "training", "mass": False, "positions": ("absolute",)}

register(
    Method(
        name="linformer",
        title="Linformer: keys and values projected along the text to a fixed number of rows",
        paper="Wang et al. 2020, arXiv 2006.04768",
        module="LinformerAttention",
        causal="none",
        cover="not a cover",
        choice="none",
        needs=("training from scratch or fine-tuning, in an encoder",),
        state="none: it has no causal form",
        grows=1.0,
        **COMMON,  # type: ignore[arg-type]
    )
)
register(
    Method(
        name="reformer",
        title="Reformer: tokens that hash alike read each other; queries and keys are shared",
        paper="Kitaev et al. 2020, arXiv 2001.04451",
        module="ReformerAttention",
        causal="selection-leak(text)",
        cover="overlaps",
        choice="per head",
        needs=("training from scratch, since queries and keys are one",),
        state="K and V of every token",
        grows=1.0,
        **COMMON,  # type: ignore[arg-type]
    )
)
register(
    Method(
        name="performer",
        title="Performer: positive random features in place of the softmax",
        paper="Choromanski et al. 2021, arXiv 2009.14794",
        module="PerformerAttention",
        cover="not a cover",
        choice="none",
        needs=("training from scratch or fine-tuning",),
        state="sums over features: the same size for any text",
        grows=1.0,
        **COMMON,  # type: ignore[arg-type]
    )
)
register(
    Method(
        name="nsa",
        title="Native sparse attention: compressed blocks, selected blocks and a window, gated",
        paper="Yuan et al. 2025, arXiv 2502.11089",
        module="NativeSparseAttention",
        cover="overlaps",
        needs=("training from scratch or fine-tuning: projections, compression and gates of its own",),
        state="K and V of every token, three times",
        grows=2.0,
        **COMMON,  # type: ignore[arg-type]
    )
)
register(
    Method(
        name="cca",
        title="Core context aware attention: core tokens of the far past, the near past as it is",
        paper="Chen et al. 2025, arXiv 2412.12465",
        module="CoreContextAttention",
        needs=("fine-tuning (the paper: 1,000 steps)",),
        state="K, V and queries of every token",
        grows=2.0,
        **COMMON,  # type: ignore[arg-type]
    )
)
register(
    Method(
        name="dga",
        title="Dynamic group attention: focal tokens as they are, the others pooled in groups",
        paper="2025, arXiv 2505.22107",
        module="DynamicGroupAttention",
        needs=("fine-tuning (the paper: 1,000 steps)",),
        state="K, V and queries of every token",
        grows=2.0,
        **COMMON,  # type: ignore[arg-type]
    )
)
