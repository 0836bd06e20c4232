"""Other weights under the same name never meet; the same weights elsewhere do. In the real vLLM."""

import os
import shutil
from pathlib import Path

import pytest
from real.compare import assert_same
from real.models import adapter, model
from real.prompts import prompt
from real.vllm import Vllm

PROMPTS = [prompt(900 + length, length) for length in (64, 100, 700)]
LONG_AGO = 1_000_000_000
LORA = {"enable_lora": True, "max_lora_rank": 8}


def put(source: Path, target: Path) -> Path:
    """Fills a folder anew: the same names, sizes and times, whatever is in it (`rsync -t`, an image with normalised times)."""
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
        os.utime(target / file.name, ns=(LONG_AGO, LONG_AGO))
    return target


def test_another_model_under_the_same_path_is_another_one_and_a_copy_is_the_same(scene, tmp_path):
    one, other, mount = model("llama"), model("llama", seed=1), tmp_path / "mount"

    def serve(folder: Path, like: str, hits: bool) -> None:
        with scene.vllm(str(folder)) as vllm:
            answers = vllm.generate(PROMPTS, max_tokens=8)
            assert_same(answers, scene.right(like, PROMPTS), f"{folder} with the weights of {like}")
            assert [bool(sum(answer["external"])) for answer in answers] == [hits] * len(PROMPTS)
            scene.settle(vllm)

    serve(put(Path(one), mount), one, hits=False)
    serve(put(Path(other), mount), other, hits=False)
    # A file's time and its place do not count: the first one's KV is still there.
    copy = put(Path(one), tmp_path / "copy")
    for file in copy.iterdir():
        file.touch()
    (copy / "notes.json").write_text("{}")
    serve(copy, one, hits=True)


@pytest.fixture
def adapters(tmp_path) -> dict[int, Path]:
    """The folders of two LoRA adapters, by seed."""
    return {seed: adapter(tmp_path / f"adapter-{seed}", seed) for seed in (1, 2)}


def stores_or_finds(scene, vllm, prompts, lora, expected=None) -> bool:
    """Asks until something is stored or found; was it found? (vLLM loads an adapter for the first requests, which find and store
    nothing.)"""
    before = scene.engine.counters()["shards_committed"]
    while True:
        answers = vllm.generate(prompts, max_tokens=8, lora=lora)
        assert_same(answers, expected or answers, f"with {lora}")
        if any(sum(answer["external"]) for answer in answers):
            return True
        if scene.settle(vllm)["shards_committed"] > before:
            return False


def test_a_lora_of_the_same_name_and_other_content_is_another_one(scene, zygote, adapters, tmp_path):
    request = ["an-adapter", 1, str(tmp_path / "adapter")]
    with Vllm(zygote, model(), **LORA) as plain:
        unadapted = plain.generate(PROMPTS, max_tokens=8)
        expected = {
            seed: plain.generate(PROMPTS, max_tokens=8, lora=[f"adapter-{seed}", seed, str(folder)])
            for seed, folder in adapters.items()
        }
    for one, two, none in zip(expected[1], expected[2], unadapted, strict=True):
        assert one["tokens"] != two["tokens"] != none["tokens"], "the adapters do nothing"

    for seed, hits in ((1, False), (2, False), (1, True)):
        put(adapters[seed], tmp_path / "adapter")
        with scene.vllm(**LORA) as vllm:
            assert stores_or_finds(scene, vllm, PROMPTS, request, expected[seed]) == hits
            assert_same(vllm.generate(PROMPTS, max_tokens=8, lora=request), expected[seed], f"adapter {seed}, again")
            assert_same(vllm.generate(PROMPTS, max_tokens=8), unadapted, "without an adapter")


def test_a_lora_that_is_replaced_in_a_running_vllm_is_not_stored_any_more(scene, zygote, adapters, tmp_path):
    """Its name and path are the same as before, and the KV that vLLM computes may rest on either content."""
    request = ["an-adapter", 1, str(put(adapters[1], tmp_path / "adapter"))]
    before, with_it, after = ([prompt(base + length, length) for length in (64, 300)] for base in (5000, 6000, 7000))
    with Vllm(zygote, model(), **LORA) as plain:
        expected = plain.generate([*with_it, *after], max_tokens=8, lora=["adapter-2", 2, str(adapters[2])])
    with scene.vllm(**LORA) as vllm:
        assert not stores_or_finds(scene, vllm, before, request)
        stored = scene.settle(vllm)["shards_committed"]
        put(adapters[2], tmp_path / "adapter")
        in_place = vllm.generate(with_it, max_tokens=8, lora=[*request, None, True])
        assert_same(in_place, expected[: len(with_it)], "in the step of the load")
        assert_same(vllm.generate(after, max_tokens=8, lora=request), expected[len(with_it) :], "after it")
        assert scene.settle(vllm)["shards_committed"] == stored > 0
