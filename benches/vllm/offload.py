"""vLLM's own OffloadingConnector on a CPU. Its scheduler's side is vLLM's, unchanged; vLLM has a worker for GPUs only, so here
a thread copies between vLLM's blocks and plain host memory.

    "spec_name": "MemcpySpec", "spec_module_path": "offload", "cpu_bytes_to_use": BYTES
"""

import concurrent.futures
from typing import Any

import numpy as np
import torch
from vllm.v1.kv_offload.base import CanonicalKVCaches, GPULoadStoreSpec, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec


class MemcpySpec(CPUOffloadingSpec):
    """vLLM's table of chunks with a worker that needs no GPU."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        assert self.blocks_per_chunk == 1, "this worker copies whole blocks"
        return Copier(kv_caches, self.num_chunks)


class Copier(OffloadingWorker):
    """One thread that copies. (Through a buffer, because torch has no operation that gathers and scatters at once.)"""

    def __init__(self, kv_caches: CanonicalKVCaches, chunks: int) -> None:
        # In words of 8 bytes: torch copies rows element by element.
        self.blocks = [cache.tensor.view(torch.int64) for cache in kv_caches.tensors]
        self.kept = [torch.empty((chunks, blocks.shape[1]), dtype=blocks.dtype) for blocks in self.blocks]
        self.thread = concurrent.futures.ThreadPoolExecutor(1)
        self.jobs: dict[int, concurrent.futures.Future[None]] = {}

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: Any) -> bool:
        assert isinstance(dst_spec, CPULoadStoreSpec)
        return self.submit(job_id, self.blocks, src_spec.block_ids, self.kept, dst_spec.block_ids)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: GPULoadStoreSpec) -> bool:
        assert isinstance(src_spec, CPULoadStoreSpec)
        return self.submit(job_id, self.kept, src_spec.block_ids, self.blocks, dst_spec.block_ids)

    def submit(
        self, job: int, source: list[torch.Tensor], origin: np.ndarray, target: list[torch.Tensor], place: np.ndarray
    ) -> bool:
        def copy() -> None:
            there, here = torch.from_numpy(origin).long(), torch.from_numpy(place).long()
            for read, written in zip(source, target, strict=True):
                written.index_copy_(0, here, read.index_select(0, there))

        self.jobs[job] = self.thread.submit(copy)
        return True

    def get_finished(self) -> list[TransferResult]:
        ended = [job for job, copying in self.jobs.items() if copying.done()]
        for job in ended:
            self.jobs.pop(job).result()  # raises what the copy has raised
        return [TransferResult(job, True) for job in ended]

    def wait(self, job_ids: set[int]) -> None:
        concurrent.futures.wait([self.jobs[job] for job in job_ids if job in self.jobs])

    def shutdown(self) -> None:
        self.thread.shutdown()
