"""The golden checkpoint: a tiny ParScale model whose weights follow a closed formula.

The outputs that tests expect of it come from the official implementation, run in float64 on these
weights. `write_golden_checkpoint` writes the weights in the
published layout (safetensors + config.json), so that loading it tests the importer as well.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

VOCAB, WIDTH, MLP_WIDTH, DEPTH, HEADS, KV_HEADS, HEAD_WIDTH, PREFIX = 32, 16, 24, 2, 4, 2, 4, 4


def golden_config(streams: int) -> dict[str, object]:
    """The `config.json` of the golden model, in the published spelling."""
    return {
        "architectures": ["Qwen2ParScaleForCausalLM"],
        "model_type": "qwen2_parscale",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": MLP_WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": DEPTH,
        "parscale_n": streams,
        "parscale_n_tokens": PREFIX,
        "parscale_attn_smooth": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.2",
    }


def golden_shapes(streams: int) -> dict[str, tuple[int, ...]]:
    """Published tensor name -> shape: 26 tensors for one stream, 34 for more."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    for layer in range(DEPTH):
        at = f"model.layers.{layer}."
        shapes[at + "self_attn.q_proj.weight"] = (HEADS * HEAD_WIDTH, WIDTH)
        shapes[at + "self_attn.q_proj.bias"] = (HEADS * HEAD_WIDTH,)
        for part in ("k_proj", "v_proj"):
            shapes[at + f"self_attn.{part}.weight"] = (KV_HEADS * HEAD_WIDTH, WIDTH)
            shapes[at + f"self_attn.{part}.bias"] = (KV_HEADS * HEAD_WIDTH,)
        shapes[at + "self_attn.o_proj.weight"] = (WIDTH, HEADS * HEAD_WIDTH)
        shapes[at + "mlp.gate_proj.weight"] = (MLP_WIDTH, WIDTH)
        shapes[at + "mlp.up_proj.weight"] = (MLP_WIDTH, WIDTH)
        shapes[at + "mlp.down_proj.weight"] = (WIDTH, MLP_WIDTH)
        shapes[at + "input_layernorm.weight"] = (WIDTH,)
        shapes[at + "post_attention_layernorm.weight"] = (WIDTH,)
        if streams > 1:
            for part in ("prefix_k", "prefix_v"):
                shapes[at + f"self_attn.{part}"] = (streams, KV_HEADS, PREFIX, HEAD_WIDTH)
    if streams > 1:
        shapes["model.aggregate_layer.0.weight"] = (WIDTH, streams * WIDTH)
        shapes["model.aggregate_layer.0.bias"] = (WIDTH,)
        shapes["model.aggregate_layer.2.weight"] = (streams, WIDTH)
        shapes["model.aggregate_layer.2.bias"] = (streams,)
    return shapes


def golden_tensors(streams: int, dtype: type = np.float32) -> dict[str, np.ndarray]:
    """The weights, by the formula: rank t of the name in bytewise order, flat index i = 1..n."""
    tensors = {}
    shapes = golden_shapes(streams)
    for rank, name in enumerate(sorted(shapes, key=str.encode)):
        shape = shapes[name]
        i = np.arange(1, int(np.prod(shape)) + 1, dtype=np.int64)
        v = ((31 * i * i + 17 * i + 97 * (rank + 1)) % 1009) / 1009 - 0.5
        if "norm" in name:
            v = 1 + 0.2 * v
        elif name.endswith("bias"):
            v = 0.2 * v
        elif "prefix" in name:
            v = 2 * v
        tensors[name] = v.reshape(shape).astype(dtype)
    return tensors


def write_golden_checkpoint(folder: str | Path, streams: int) -> Path:
    """Writes the golden model of `streams` streams as a published folder; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(golden_tensors(streams), str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(golden_config(streams), indent=2) + "\n")
    return folder
