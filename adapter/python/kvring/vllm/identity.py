"""Identifies the weights that compute the KV, and everything that prepares their inputs, *by content or by the instance; never by
a time, never by a guess*.

Stored KV may be found for weeks, by any vLLM whose namespace has the same name. So the name is made of the content of the files
that decide the bytes (`content`), wherever they lie. Where that cannot be known (weights that do not come from files, ids that
count up), functions here raise, and the name is made of this very vLLM: its processes share KV among themselves and with nobody
else. A version given by the user may stand in for the content of the weights' files, and for nothing else. Files that decide
nothing do not count: copies of a checkpoint share KV, and so does one with other files beside it.

The files that vLLM 0.32 reads were looked up in its loaders, configurations and models. Those that a later one reads as well have
to be added.
"""

from __future__ import annotations

import json
import os
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import content
from .content import Unknown

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

_FROM_FILES = {
    "auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "mistral", "npcache", "pt",
    "runai_streamer", "runai_streamer_sharded", "sharded_state",
}  # fmt: skip
"""The load formats that read only files of the model's folder. Not: tensorizer, modelexpress, ipc_cache, plugins' own."""

_WEIGHTS = (".safetensors", ".bin", ".pt")
_OF_A_TRAINING = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
"""Files of a training, which vLLM does not load (`filter_files_not_needed_for_inference`)."""
_CONFIGURATIONS = ("config.json", "params.json", ".index.json")
"""Configurations of models, quantizations, sparse attention, processors of images and sound; and the lists of a checkpoint's
files."""
_NOT_OF_KV = ("generation_config.json", "tokenizer_config.json")

_SAME_AT_ANY_LENGTH = {
    "default", "linear", "ntk", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling", "mrope", "mllama4",
    "proportional", "openpangu", "bailing_mrope",
}  # fmt: skip
"""Rotary embeddings that turn a position by the same angle whatever the longest one is (`get_rope`). Not: longrope, dynamic."""


def instance(vllm_config: VllmConfig) -> list[str]:
    """Names this very vLLM: the same in all of its processes, and in none of another vLLM."""
    transfer = vllm_config.kv_transfer_config
    # `instance_id` is a time, `engine_id` random unless a user sets it.
    return [vllm_config.instance_id, str(transfer.engine_id if transfer is not None else "")]


def weights(vllm_config: VllmConfig, version: str | None) -> list[Any]:
    """Identifies the weights, and the files beside them that make a model of them."""
    model = vllm_config.model_config
    if getattr(vllm_config, "weight_transfer_config", None) is not None:
        raise Unknown("its weights are pushed into it while it runs (weight_transfer_config)")
    if str(vllm_config.load_config.load_format) == "dummy":
        raise Unknown("with --load-format dummy it has no weights, or they are pushed into it while it runs")
    others, parts = _others(vllm_config)
    found: dict[str, Path] = {}
    try:
        found = _weights(vllm_config, parts)
        known = ["content", content.digest(found, others)]
    except Exception as error:
        if version is None:
            raise Unknown(
                f"its weights cannot be told ({error}); kvring.weights_version would tell them: a name that you change whenever "
                "the weights change"
            ) from error
        known = ["version", version, str(model.model_weights or model.model), content.digest({}, others)]
    # The time at which vLLM's configuration was made, the same in all of its processes. It is used only to notice that a file
    # may have changed since it was loaded.
    started = vllm_config.instance_id
    changed = content.changed_since([*found.values(), *others.values()], int(started) / 1e9) if started.isdigit() else None
    if changed is not None:
        raise Unknown(f"{changed} has changed since this vLLM was started, which may have loaded what was there before")
    return known


def media(vllm_config: VllmConfig) -> dict[str, Any] | None:
    """The options that decide how images, sound and video are prepared for the model; `None` for a model that takes none. (The
    processors' own configurations are among the model's files.)"""
    config = vllm_config.model_config.multimodal_config
    if config is None:
        return None
    scales = config.mm_encoder_fp8_scale_path
    if config.mm_processor_cache_gb == 0 and not vllm_config.cache_config.enable_prefix_caching:
        # See `BaseRenderer._process_mm_uuids`.
        raise Unknown(
            "with --mm-processor-cache-gb 0 and --no-enable-prefix-caching vLLM counts images instead of looking at them"
        )
    if config.mm_encoder_attn_dtype is not None and scales is None:
        raise Unknown(
            "with --mm-encoder-attn-dtype and no --mm-encoder-fp8-scale-path vLLM calibrates itself by the images that come"
        )
    return {
        "processor": plain(config.mm_processor_kwargs),
        "io": plain(config.media_io_kwargs),
        "normalized_on_device": config.mm_device_do_normalize,
        "text_only": config.language_model_only,
        "encoder": [str(config.mm_encoder_attn_backend), str(config.mm_encoder_tp_mode), str(config.mm_encoder_attn_dtype)],
        "encoder_scales": content.digest({}, {"scales": Path(scales)}) if scales is not None else None,
        "pruning": [config.video_pruning_rate, str(config.video_pruning_method)],
        "video_loader": os.environ.get("VLLM_VIDEO_LOADER_BACKEND"),
    }


def length(model: ModelConfig) -> str | None:
    """The longest context that the model was built for, if the values at *every* position depend on it; else `None`.
    A length that vLLM finds itself (`--max-model-len auto`, or nothing) follows from the configuration when the model is built;
    that vLLM may shorten it later, for lack of memory, changes no values."""
    if _is_same_at_any_length(model):
        return None
    given = getattr(model, "original_max_model_len", model.max_model_len)
    return "derived" if given in (None, -1) else str(given)


def _is_same_at_any_length(model: ModelConfig) -> bool:
    """Does the length not matter, by the configuration's file? In memory, models write into it while they are built."""
    if callable(model.hf_overrides) or is_llama4(model) or model.hf_config.model_type.startswith("phi"):
        # Phi's own name for a long rope is that of another kind elsewhere.
        return False
    if type(model.hf_config).__module__.startswith("transformers_modules"):
        # The configuration is read by code from elsewhere, and may mean anything.
        return False
    try:
        folder = _folder(model.hf_config_path or model.model, getattr(model, "_hf_config_revision", None) or model.revision)
        files = [file for name in ("config.json", "params.json") if (file := folder / name).is_file()]
        said = [model.hf_overrides, *(json.loads(file.read_bytes()) for file in files)]
        return bool(files) and all(kind in _SAME_AT_ANY_LENGTH for one in said for kind in _ropes(one))
    except Exception:
        return False


def adapter(folder: Path) -> str:
    """A LoRA adapter's content. Raises `OSError` where it cannot be read, or there is none."""
    files = {name: folder / f"adapter_model{name}" for name in (".safetensors", ".bin", ".pt")}
    # The first that exists, in the order of `LoRAModel.from_local_checkpoint`.
    name, path = next(((name, path) for name, path in files.items() if path.is_file()), (".pt", files[".pt"]))
    return content.digest({name: path}, {"config": folder / "adapter_config.json"})


def plain(value: Any) -> str:
    """A value as text that is the same in every process. Raises for one that has no such text: an object that is told apart by
    its address only."""
    from vllm.config.utils import normalize_value

    return json.dumps(normalize_value(value), sort_keys=True)


def _ropes(config: Any, *, inside: bool = False) -> Iterator[str]:
    """The kinds of rotary embedding that a configuration names, at any depth."""
    if not isinstance(config, dict):
        return
    kind = config.get("rope_type", config.get("type")) if inside else None
    if kind is not None:
        yield str(kind)
    for name, value in config.items():
        yield from _ropes(value, inside=inside or name.startswith("rope_"))


def is_llama4(model: ModelConfig) -> bool:
    """Is this a Llama 4? It tunes its attention's temperature where more than 32768 tokens fit, unless its generation config says
    whether to."""
    return any(
        str(getattr(config, "model_type", None)).startswith("llama4") for config in (model.hf_config, model.hf_text_config)
    )


def _others(vllm_config: VllmConfig) -> tuple[dict[str, Path], dict[str, Path]]:
    """All files beside the weights that decide what is computed; and the folders of a composite model's parts."""
    model = vllm_config.model_config
    if callable(model.hf_overrides):
        raise Unknown("hf_overrides is a function, which may do anything")
    if getattr(vllm_config, "engram_config", None) is not None:
        raise Unknown("its tokenizer is a part of the model")
    folder = _folder(model.model, model.revision)
    others = _configuring(model, folder)
    if model.hf_config_path:
        there = _folder(model.hf_config_path, getattr(model, "_hf_config_revision", None))
        others |= {f"hf_config_path/{name}": path for name, path in _configuring(model, there).items()}
    if file := model.hf_overrides.get("quantization_config_file"):
        others["quantization_config_file"] = Path(file)
    if is_llama4(model):
        given = folder if model.generation_config in ("auto", "vllm") else Path(model.generation_config)
        if (file := given / "generation_config.json").is_file():
            others["generation_config"] = file
    parts: dict[str, Path] = {}
    for path in [path for name, path in others.items() if name.endswith("config.json")]:
        _add_named(model, path, others, parts)
    return others, parts


def _configuring(model: ModelConfig, folder: Path) -> dict[str, Path]:
    """A folder's configurations, and its code where vLLM may run it."""
    return {
        name: path
        for name, path in content.look(folder).items()
        if (name.endswith(_CONFIGURATIONS) and not name.endswith(_NOT_OF_KV))
        or (model.trust_remote_code and name.endswith(".py"))
    }


def _add_named(model: ModelConfig, path: Path, others: dict[str, Path], parts: dict[str, Path]) -> None:
    """Adds the files that a configuration takes from other repositories: code (`auto_map`), and the parts of an Ultravox."""
    try:
        config = json.loads(path.read_bytes())
    except ValueError:
        return
    if not isinstance(config, dict):
        return
    if model.trust_remote_code:
        for repository in set(re.findall(r'"([^"]+?)--', json.dumps(config.get("auto_map")))):
            there = content.look(_folder(repository, model.code_revision))
            others |= {f"{repository}/{name}": path for name, path in there.items() if name.endswith(".py")}
    for key in ("audio_model_id", "text_model_id"):
        if repository := config.get(key):
            parts[key] = _folder(str(repository), None)
            others |= {f"{key}/{name}": path for name, path in _configuring(model, parts[key]).items()}


def _weights(vllm_config: VllmConfig, parts: dict[str, Path]) -> dict[str, Path]:
    """The files of weights that may be loaded."""
    model, load = vllm_config.model_config, vllm_config.load_config
    load_format = str(load.load_format)
    if load_format not in _FROM_FILES:
        raise Unknown(f"with --load-format {load_format} they may come from anywhere")
    if model.model_weights:
        raise Unknown(f"{model.model_weights} is no folder")
    folder = _folder(model.model, model.revision, load.download_dir)
    files = content.look(folder)
    found = _of_weights(files) | _by_pattern(folder, load.model_loader_extra_config)
    if load_format == "npcache":
        # vLLM writes these files at its first start and reads them at all others; they are named like tensors.
        found |= {name: path for name, path in files.items() if name.startswith("np/")}
    if not found:
        raise Unknown(f"{folder} has none")
    for key, there in parts.items():
        found |= {f"{key}/{name}": path for name, path in _of_weights(content.look(there)).items()}
    return found


def _of_weights(files: dict[str, Path]) -> dict[str, Path]:
    return {name: path for name, path in files.items() if name.endswith(_WEIGHTS) and not name.endswith(_OF_A_TRAINING)}


def _by_pattern(folder: Path, extra: Any) -> dict[str, Path]:
    """The files that `ShardedStateLoader` reads by a pattern given by the user, which may lead anywhere."""
    pattern = extra.get("pattern") if isinstance(extra, dict) else None
    if pattern is None:
        return {}
    try:
        fields = {field for _, field, _, _ in string.Formatter().parse(pattern) if field is not None}
        files = sorted(folder.glob(pattern.format(**dict.fromkeys(fields, "*"))))
    except (ValueError, NotImplementedError, IndexError) as error:
        raise Unknown(f"no files can be found by the pattern {pattern!r}: {error}") from error
    return {f"pattern/{os.path.relpath(path, folder)}": path for path in files}


def _folder(name: str, revision: str | None, cache: str | None = None) -> Path:
    """The folder of a model's files: the model's own, or the one into which vLLM has fetched them from Hugging Face."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from vllm import envs

    if folder.exists() or "://" in name or envs.VLLM_USE_MODELSCOPE:
        raise Unknown(f"{name} is no folder")
    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=cache, local_files_only=True))
    except Exception as error:
        # The folder may lack files of the repository: vLLM fetches only those that it loads.
        if part := getattr(error, "snapshot_path", None):
            return Path(part)
        raise Unknown(f"{name} is not in Hugging Face's cache") from error
