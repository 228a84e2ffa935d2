"""Some searches of an evaluation once more, with what their decisions were weighed against."""

from __future__ import annotations

import dataclasses
from typing import Any

from zip_rc_jax.config import DecodeConfig
from zip_rc_jax.data.prompts import prompt_texts
from zip_rc_jax.explorer.record import introspections
from zip_rc_jax.inference.engine import Engine, ResultEvent
from zip_rc_jax.inference.outputs import Result
from zip_rc_jax.inference.requests import TokenizedRequest
from zip_rc_jax.models.io.digests import json_digest
from zip_rc_jax.models.language_model import LanguageModel
from zip_rc_jax.pipeline.evaluation.pool import online_run
from zip_rc_jax.pipeline.evaluation.runner import (
    Decoded,
    EvaluationRunner,
    read_stored,
    stored_path,
)
from zip_rc_jax.pipeline.seeds import try_seed, with_own_samples
from zip_rc_jax.runtime.storage import plain, with_digest, write_json
from zip_rc_jax.runtime.working_copy import publish

MOST_TOKENS = 65536  # of all prefixes: about 110 bytes each in a file


def introspected(
    bench: EvaluationRunner, lm: LanguageModel, decode: DecodeConfig, decoded: Decoded, title: str
) -> dict[int, dict[str, Any]]:
    """Of up to `evaluate.introspect` problems what `zip-rc decode --introspect` records, by number.

    Reads what an earlier call recorded of the same searches.

    Args:
      title: of the decode; names the file.
    """
    chosen = _chosen(bench, decode, decoded)
    if not chosen:
        return {}
    searches = json_digest([_told(decoded.results[i]) for i in chosen])
    key = plain({"decode": decoded.key, "problems": chosen, "searches": searches})
    path = stored_path(bench.partial, f"{title} introspection")
    stored = read_stored(path)
    if stored.get("key") != key:
        told = _recorded(bench, lm, decode, decoded, chosen)
        stored = plain({"key": key, "told": [[i, one] for i, one in told.items()]})
        publish(write_json(path, with_digest(stored)))
    return dict(stored["told"])


def _recorded(
    bench: EvaluationRunner,
    lm: LanguageModel,
    decode: DecodeConfig,
    decoded: Decoded,
    chosen: list[int],
) -> dict[int, dict[str, Any]]:
    """The same seeds give the same searches again.

    On an accelerator another batch may round otherwise. A search that comes out differently is left
    out, for it is not the one that was graded.
    """
    seed = try_seed(bench.config, bench.number)
    engine = Engine(lm, decode, seed)
    requests = with_own_samples(prompt_texts(bench.problems, bench.config, lm.tokenizer), seed)
    jobs = [
        dataclasses.replace(job, joints=True)
        for job in engine.processor.tokenize([requests[i] for i in chosen], "result")
        if isinstance(job, TokenizedRequest)
    ]
    again = {
        chosen[event.prompt_index]: event.result
        for event in engine.decode(jobs, stream=False)
        if isinstance(event, ResultEvent)
    }
    same = [i for i in chosen if i in again and _told(again[i]) == _told(decoded.results[i])]
    told = introspections(lm, [again[i] for i in same], decode)
    return dict(zip(same, told, strict=True))


def _chosen(bench: EvaluationRunner, decode: DecodeConfig, decoded: Decoded) -> list[int]:
    """Those that went wrong, then those with most paused prefixes; together `MOST_TOKENS`."""
    answer = decode.answer if decode.answer in ("value", "vote") else "value"
    right = online_run("", decode, decoded).correct(answer)

    def order(i: int) -> tuple[float, int, int]:
        prefixes = decoded.results[i].prefixes
        return right[i], -sum(p.state == "paused" and bool(p.token_ids) for p in prefixes), i

    chosen, tokens = list[int](), 0
    for i in sorted(range(len(right)), key=order)[: bench.config.evaluate.introspect]:
        tokens += sum(len(prefix.token_ids) for prefix in decoded.results[i].prefixes)
        if tokens <= MOST_TOKENS:
            chosen.append(i)
    return chosen


def _told(result: Result) -> tuple[Any, Any]:
    """What tells a search from another: its tokens and its decisions."""
    tokens = [prefix.token_ids for prefix in result.prefixes]
    return tokens, [decision.multiplicity for decision in result.trace]
