"""Names of what the backward pass recomputes; `hackle.layers.stack` carries them out."""

REMAT: dict[str, str] = {
    "none": "keep all activations: fastest, most memory",
    "dots": "keep the results of matrix products, recompute what lies between them",
    "full": "keep only what passes from block to block, recompute each block",
}
