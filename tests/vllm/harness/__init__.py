"""A harness that judges a KV connector: vLLM's real scheduler, fake workers with real memory, and an oracle.

vLLM's scheduler decides who gets which block and when; nothing here imitates it. What is faked is the model: it writes
bytes that say which tokens they stand for, so that wrong KV cannot go unnoticed (see `model.py`), and it follows the
order of a worker's calls exactly (`worker.py`). The oracle (`ledger.py`, `calls.py`) checks the obligations P0-P5.

Nothing here needs a GPU, an engine or the compiled package: `toy.py` is a connector in a few lines of Python, with
mistakes that can be switched on, to prove that each of them is caught.
"""
