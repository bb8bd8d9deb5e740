"""The measuring part of a text comparison, run in one worker process while nothing else runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from regard.bench.cost import Timing, interleave, parameters
from regard.models.language._decoder import DecoderCache, DecoderLM
from regard.train.language import Predict
from regard.train.text_run import TextRun


def text_costs(
    report: Callable[[dict[str, Any]], None], *, runs: list[dict[str, Any]], rounds: int, budget: float
) -> dict[str, dict[str, Any]]:
    """Parameters, tokens a second in training and in cached decoding, and cache bytes a token, by layer.

    A training step is forward, backward and update on a batch of windows; decoding adds one token to a full context less
    one, for one sequence. A layer that cannot decode with a cache has no figures for it.
    """
    torch.set_num_threads(1)
    these = [TextRun.read(run) for run in runs]
    first = these[0]
    networks = {run.layer: run.network() for run in these}
    text = torch.randint(128, (4096,), generator=torch.Generator().manual_seed(0))
    task = Predict(text, text, first.recipe, first.context)
    steps = {name: training_step(network, task, first) for name, network in networks.items()}
    trained = interleave(steps, rounds=rounds, budget=budget)
    report({"done": 1, "of": 2})
    caches = {name: filled(network.eval(), text[None, : first.context - 1]) for name, network in networks.items()}
    decode = {
        name: decoding_step(networks[name], cache, text[None, first.context :][:, :1])
        for name, cache in caches.items()
        if cache is not None
    }
    decoded = interleave(decode, rounds=4 * rounds, budget=budget) if decode else {}
    report({"done": 2, "of": 2})
    tokens = first.context * first.recipe.batch_size
    return {
        name: {
            "parameters": parameters(network),
            "training": _rate(trained[name], tokens),
            "decoding": _rate(decoded[name], 1) if name in decoded else None,
            "cache_bytes": cache_bytes(network, first.context),
        }
        for name, network in networks.items()
    }


def _rate(time: Timing, tokens: int) -> dict[str, float]:
    """Tokens a second: the median and the quartiles around it."""
    return asdict(Timing(*(1000 * tokens / t for t in (time.median, time.high, time.low))))


def training_step(network: DecoderLM, task: Predict, run: TextRun) -> Callable[[], object]:
    optimizer, batch = run.recipe.optimizer(network), task.batch(0, 0)

    def call() -> None:
        network.train()
        optimizer.zero_grad()
        task.loss(network, batch).backward()
        optimizer.step()

    return call


def _held(network: DecoderLM, tokens: int) -> DecoderCache | None:
    if not all(hasattr(block.attn, "new_cache") for block in (*network.blocks, network.last)):
        return None
    return network.new_cache(1, tokens)


@torch.no_grad()
def filled(network: DecoderLM, tokens: Tensor) -> DecoderCache | None:
    """A cache that holds ``tokens`` (1, n) and has room for one more."""
    cache = _held(network, tokens.shape[1] + 1)
    if cache is not None:
        network(tokens, cache=cache)
    return cache


def decoding_step(network: DecoderLM, cache: DecoderCache, token: Tensor) -> Callable[[], object]:
    """One more token; the cache is as full before every call."""

    def call() -> object:
        held = DecoderCache([[copy.copy(c) for c in block] for block in cache.blocks], cache.length)
        with torch.no_grad():
            return network(token, cache=held)

    return call


def cache_bytes(network: DecoderLM, context: int) -> float | None:
    """What one more token of context adds to the memory of one sequence's cache, up to ``context``."""
    sizes = []
    for tokens in (context // 2, context):
        cache = _held(network, tokens)
        if cache is None:
            return None
        held = [c for block in cache.blocks for c in block]
        sizes.append(sum(v.nbytes for c in held for v in vars(c).values() if isinstance(v, Tensor)))
    return (sizes[1] - sizes[0]) / (context - context // 2)
