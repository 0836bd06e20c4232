"""Other weights under the same name never meet; the same weights elsewhere do. In the real vLLM."""

import os
import shutil
from pathlib import Path

from real.compare import assert_same
from real.models import adapter, model
from real.prompts import prompt
from real.vllm import Vllm

PROMPTS = [prompt(900 + length, length) for length in (64, 100, 700)]
LONG_AGO = 1_000_000_000


def put(source: Path, target: Path) -> None:
    """Fills a folder anew: the same names, sizes and times, whatever is in it (`rsync -t`, an image with normalised times)."""
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
        os.utime(target / file.name, ns=(LONG_AGO, LONG_AGO))


def test_another_model_under_the_same_path_is_another_one_and_a_copy_is_the_same(scene, baseline, llama, tmp_path):
    other, mount, copy = model("llama", seed=1), tmp_path / "mount", tmp_path / "copy"
    expected = {name: baseline.answers(name, PROMPTS, max_tokens=8) for name in (llama, other)}

    def serve(folder: Path, like: str, hits: bool) -> None:
        with scene.vllm(str(folder)) as vllm:
            answers = vllm.generate(PROMPTS, max_tokens=8)
            assert_same(answers, expected[like], f"{folder} with the weights of {like}")
            assert [bool(sum(answer["external"])) for answer in answers] == [hits] * len(PROMPTS)
            scene.settle(vllm)

    put(Path(llama), mount)
    serve(mount, llama, hits=False)
    put(Path(other), mount)
    serve(mount, other, hits=False)
    # Not the time of a file, and not its place: and the first one's KV is still there.
    put(Path(llama), copy)
    for file in copy.iterdir():
        file.touch()
    (copy / "notes.json").write_text("{}")
    serve(copy, llama, hits=True)


def test_a_lora_of_the_same_name_and_other_content_is_another_one(scene, zygote, llama, tmp_path):
    path = tmp_path / "adapter"
    request = ["an-adapter", 1, str(path)]
    made = {seed: adapter(tmp_path / f"adapter-{seed}", seed) for seed in (1, 2)}
    with Vllm(zygote, llama, enable_lora=True, max_lora_rank=8) as plain:
        unadapted = plain.generate(PROMPTS, max_tokens=8)
        expected = {
            seed: plain.generate(PROMPTS, max_tokens=8, lora=[f"adapter-{seed}", seed, str(folder)])
            for seed, folder in made.items()
        }
    for one, two, none in zip(expected[1], expected[2], unadapted, strict=True):
        assert one["tokens"] != two["tokens"] != none["tokens"], "the adapters do nothing"

    def serve(seed: int, hits: bool) -> None:
        put(made[seed], path)
        stored = scene.engine.counters()["shards_committed"]
        with scene.vllm(llama, enable_lora=True, max_lora_rank=8) as vllm:
            # vLLM loads the adapter for the first requests, which find and store nothing.
            for turn in range(200):
                answers = vllm.generate(PROMPTS, max_tokens=8, lora=request)
                assert_same(answers, expected[seed], f"adapter {seed}, turn {turn}")
                scene.settle(vllm)
                found = any(sum(answer["external"]) for answer in answers)
                if found or scene.engine.counters()["shards_committed"] > stored:
                    break
            assert found == hits
            assert_same(vllm.generate(PROMPTS, max_tokens=8, lora=request), expected[seed], f"adapter {seed}, again")
            assert_same(vllm.generate(PROMPTS, max_tokens=8), unadapted, "without an adapter")

    serve(1, hits=False)
    serve(2, hits=False)
    serve(1, hits=True)


def test_a_lora_that_is_replaced_in_a_running_vllm_is_not_stored_any_more(scene, zygote, llama, tmp_path):
    """Its name and path are the same as before, and the KV that vLLM computes may rest on either content."""
    path = tmp_path / "adapter"
    request, in_place = ["an-adapter", 1, str(path)], ["an-adapter", 1, str(path), None, True]
    made = {seed: adapter(tmp_path / f"adapter-{seed}", seed) for seed in (1, 2)}
    before, with_it, after = ([prompt(base + length, length) for length in (64, 300)] for base in (5000, 6000, 7000))
    with Vllm(zygote, llama, enable_lora=True, max_lora_rank=8) as plain:
        expected = plain.generate([*with_it, *after], max_tokens=8, lora=["adapter-2", 2, str(made[2])])
    put(made[1], path)
    with scene.vllm(llama, enable_lora=True, max_lora_rank=8) as vllm:
        for _ in range(200):
            vllm.generate(before, max_tokens=8, lora=request)
            scene.settle(vllm)
            if stored := scene.engine.counters()["shards_committed"]:
                break
        assert stored
        put(made[2], path)
        assert_same(vllm.generate(with_it, max_tokens=8, lora=in_place), expected[: len(with_it)], "in the step of the load")
        assert_same(vllm.generate(after, max_tokens=8, lora=request), expected[len(with_it) :], "after it")
        scene.settle(vllm)
        assert scene.engine.counters()["shards_committed"] == stored
