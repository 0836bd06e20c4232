"""Drives the real vLLM, on a CPU, from tests.

`zygote` imports vLLM once and forks; `serve` is what a fork does: one `LLM`, driven step by step over a pair of pipes;
`vllm` is the tests' end of it. `tap` stands between vLLM and the connector under test and writes down what it sees;
`broken` holds connectors that are wrong on purpose. `compare` says whether two answers are the same.
"""
