#!/usr/bin/env python3
"""Makes the directory of a tiny model: a configuration and seeded safetensors, no tokenizer.

The weights are real ones on purpose: with vLLM's `load_format="dummy"` (uniform within 1e-3) the output hardly depends on
the context, so wrong KV would go unnoticed. An initializer range of 0.15 makes greedy output depend on all of it.
"""

import argparse
import json
from pathlib import Path
from typing import Any


def common(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "torch_dtype": args.dtype,
        "vocab_size": args.vocab,
        "hidden_size": args.hidden,
        "intermediate_size": args.hidden * 2,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden // args.head_dim,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "max_position_embeddings": args.max_len,
        "initializer_range": args.init,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def llama(args: argparse.Namespace) -> dict[str, Any]:
    return {
        **common(args),
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "attention_bias": False,
        "mlp_bias": False,
    }


def swa(args: argparse.Namespace) -> dict[str, Any]:
    """A text-only Gemma-3: sliding and full attention in turn, so two KV cache groups."""
    kinds = ["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(args.layers)]
    return {
        **common(args),
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "sliding_window": args.window,
        "query_pre_attn_scalar": args.head_dim,
        "layer_types": kinds,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "tie_word_embeddings": True,
        "pad_token_id": 0,
    }


def mistral(args: argparse.Namespace) -> dict[str, Any]:
    """A Mistral 7B v0.1: sliding attention in every layer, so the only KV cache group is one of a window."""
    return {
        **common(args),
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": args.window,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


ARCHITECTURES = {"llama": llama, "swa": swa, "mistral": mistral}


def write_weights(path: Path, args: argparse.Namespace) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(args.seed)
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=getattr(torch, args.dtype))
    if args.arch == "swa":
        # Gemma ties its embeddings: without this it only repeats the last token.
        with torch.no_grad():
            made.model.embed_tokens.weight.mul_(0.05)
            made.model.norm.weight.fill_(30.0)
    made.save_pretrained(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--arch", choices=ARCHITECTURES, default="llama")
    numbers = {"layers": 2, "hidden": 256, "vocab": 2048, "kv-heads": 2, "head-dim": 64, "max-len": 16384, "seed": 0}
    for name, default in {**numbers, "window": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--init", type=float, default=0.15)
    args = parser.parse_args()

    args.path.mkdir(parents=True, exist_ok=True)
    config = json.dumps(ARCHITECTURES[args.arch](args), indent=1)
    (args.path / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    (args.path / "config.json").write_text(config)
    write_weights(args.path, args)
    # transformers wrote its own: vLLM is to see ours.
    (args.path / "config.json").write_text(config)


if __name__ == "__main__":
    main()
