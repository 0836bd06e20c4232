#!/usr/bin/env python3
"""Makes the directory of a tiny model: a configuration and seeded safetensors, no tokenizer.

    make_model.py PATH ARCHITECTURE SEED

The weights are real ones on purpose: with vLLM's `load_format="dummy"` (uniform within 1e-3) the output hardly depends on
the context, so wrong KV would go unnoticed. An initializer range of 0.15 makes greedy output depend on all of it.
"""

import json
import sys
from pathlib import Path
from typing import Any

WINDOW = 64
"""Tokens of the sliding windows: two blocks, so that short prompts leave them."""

COMMON = {
    "torch_dtype": "float32",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 16384,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OF_LLAMA = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "use_cache": True}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "llama": {**COMMON, **OF_LLAMA, "architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    # A text-only Gemma-3: sliding and full attention in turn, so two KV cache groups.
    "swa": {
        **COMMON,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "num_hidden_layers": 4,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": COMMON["head_dim"],
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"full_attention": {**ROPE, "rope_theta": 1000000.0}, "sliding_attention": ROPE},
        "tie_word_embeddings": True,
        "pad_token_id": 0,
    },
    # A Mistral 7B v0.1: sliding attention in every layer, so the only KV cache group is one of a window.
    "mistral": {
        **COMMON,
        **OF_LLAMA,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": WINDOW,
    },
}


def write_weights(path: Path, seed: int) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.float32)
    if made.config.tie_word_embeddings:
        # With tied embeddings it would only repeat the last token.
        with torch.no_grad():
            made.model.embed_tokens.weight.mul_(0.05)
            made.model.norm.weight.fill_(30.0)
    made.save_pretrained(path)


def main() -> None:
    path, config = Path(sys.argv[1]), json.dumps(CONFIGURATIONS[sys.argv[2]], indent=1)
    path.mkdir(parents=True, exist_ok=True)
    (path / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    (path / "config.json").write_text(config)
    write_weights(path, int(sys.argv[3]))
    # transformers wrote its own: vLLM is to see ours.
    (path / "config.json").write_text(config)


if __name__ == "__main__":
    main()
