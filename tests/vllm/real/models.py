"""Tiny models with real seeded weights, made once and kept."""

import array
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

from real.prompts import VOCABULARY

HERE = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("KVRING_TEST_CACHE", HERE.parent.parent / ".cache" / "vllm"))


def model(arch: str = "llama", seed: int = 0) -> str:
    """The directory of a model; `arch` is one of `make_model.CONFIGURATIONS`."""
    # Its name has a digest of `make_model.py`: a model of an earlier one is another model.
    maker = hashlib.sha256((HERE / "make_model.py").read_bytes()).hexdigest()[:8]
    path = CACHE / "models" / f"{arch}-{seed}-{maker}"
    if not (path / "done").exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, HERE / "make_model.py", path, arch, str(seed)]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
        (path / "done").touch()
    return str(path)


def spoken() -> str:
    """The directory of a llama with a tokenizer: its words are `w3`, `w4` and so on, one for each token id."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    plain = Path(model("llama"))
    path = plain.with_name(f"{plain.name}-spoken")
    if not (path / "done").exists():
        shutil.copytree(plain, path, dirs_exist_ok=True)
        words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{token}": token for token in range(3, VOCABULARY)}}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(path / "tokenizer.json"))
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (path / "tokenizer_config.json").write_text(json.dumps(about))
        (path / "done").touch()
    return str(path)


def adapter(path: Path, seed: int, rank: int = 8) -> Path:
    """Makes the folder of a LoRA adapter for the llama of `make_model.py`, which changes its KV."""
    path.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    header, data = {}, b""
    for layer in range(2):
        for projection in ("k_proj", "v_proj"):
            for part, shape in (("lora_A", (rank, 256)), ("lora_B", (128, rank))):
                values = array.array("f", (draw.gauss(0.0, 0.2) for _ in range(shape[0] * shape[1]))).tobytes()
                name = f"base_model.model.model.layers.{layer}.self_attn.{projection}.{part}.weight"
                header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
                data += values
    text = json.dumps(header).encode()
    (path / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["k_proj", "v_proj"], "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path
