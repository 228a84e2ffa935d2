"""A server under load: requests and tokens per second, and time to first token, against the engine
alone.

    python benchmarks/serve.py [--requests 128] [--concurrency 32] [--model embedded:chain_sum_zip]
    python benchmarks/serve.py --model models/SmolLM2-135M-Instruct.Q4_1.gguf --requests 24 \
        --concurrency 24 --n 4 --max-tokens 32 --runs 3

The engine alone decodes the same prompts with the same seeds in one call of `Decoder`, so both
generate the same tokens. Over HTTP, `--concurrency` clients each send one request after the other,
half of them streamed. They run in a process of their own, as users' clients do, on the same cores.
Both take turns; medians of `--runs` runs in which nothing was compiled (arrivals differ from run to
run, and so do the shapes). The engine alone has all prompts from the start, and the server has
`--concurrency` at a time: a full pool on both sides needs more than max_num_seqs / n clients. A
model without a head gets one that says nothing, and n full samples.
"""

from __future__ import annotations

from zip_rc_jax.runtime.malloc import keep_freed_memory

keep_freed_memory()  # before other imports start threads

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

import httpx2
from jax import monitoring

from machine import description
from zip_rc_jax import Decoder, Grid, Request, load
from zip_rc_jax.inference.api import resolve
from zip_rc_jax.serving.server import ServeConfig, Server

TASK = "State the final answer to the following arithmetic problem: "


def prompts(count: int) -> list[str]:
    """Sums of four numbers, no two alike."""
    return [
        f"{TASK}{1 + i % 9} + {1 + i // 9 % 9} - {1 + i // 81 % 9} + {1 + i % 7} ="
        for i in range(count)
    ]


async def one(client: httpx2.AsyncClient, name: str, prompt: str, streamed: bool) -> Any:
    """Sends a request. Returns its tokens, and the seconds until the first text of a stream."""
    body = {"model": name, "prompt": prompt, "seed": 0, "stream": streamed}
    started = time.perf_counter()
    if not streamed:
        answer = (await client.post("/v1/completions", json=body)).json()
        return answer["usage"]["completion_tokens"], None
    first, tokens = None, 0
    async with client.stream("POST", "/v1/completions", json=body) as lines:
        async for line in lines.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if first is None and chunk["choices"][0]["text"]:
                first = time.perf_counter() - started
            tokens = chunk["zip_rc"].get("tokens", 0)
    return tokens, first


async def load_test(url: str, name: str, count: int, concurrency: int) -> dict[str, float]:
    """Seconds, tokens and median time to first token of `count` requests."""
    waiting = list(enumerate(prompts(count)))
    found = []
    async with httpx2.AsyncClient(base_url=url, timeout=600) as client:

        async def user() -> None:
            while waiting:
                number, prompt = waiting.pop()
                found.append(await one(client, name, prompt, number % 2 == 0))

        started = time.perf_counter()
        await asyncio.gather(*(user() for _ in range(concurrency)))
        seconds = time.perf_counter() - started
    first = [value for _, value in found if value is not None]
    tokens = sum(value for value, _ in found)
    return {"seconds": seconds, "tokens": tokens, "first": statistics.median(first)}


def from_another_process(server: Server, name: str, arguments: Any) -> dict[str, float]:
    """`load_test`, by this script in another process."""
    numbers = "--requests", str(arguments.requests), "--concurrency", str(arguments.concurrency)
    command = [sys.executable, __file__, *numbers, "--url", server.url, "--name", name]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def compilations() -> list[str]:
    """A list that every compilation from now on is noted in."""
    noted: list[str] = []

    def note(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            noted.append(event)

    monitoring.register_event_duration_secs_listener(note)
    return noted


def alone(decoder: Decoder, count: int) -> dict[str, float]:
    requests = [Request(prompt, seed=0) for prompt in prompts(count)]
    started = time.perf_counter()
    results = decoder(requests)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "tokens": sum(result.usage.tokens for result in results)}


def measure(arguments: Any) -> None:
    lm = load(arguments.model)
    options = {"n": arguments.n, "max_num_seqs": arguments.rows}
    if arguments.max_tokens:
        options["max_tokens"] = arguments.max_tokens
    if lm.head is None:
        lm, options["strategy"] = lm.with_head(Grid.authors("correct"), "correct"), "fixed"
    config, compiled = resolve(None, options, lm.head), compilations()
    name, decoder = "model", Decoder(lm, config)
    server = Server(lm, config, ServeConfig(name, port=0))
    server.config.access_log = False
    server.config.log_level = "warning"
    server.config.configure_logging()
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.url:
        time.sleep(0.01)
    served, bare = [], []
    for _ in range(3 * arguments.runs + 3):
        compiled.clear()
        pair = from_another_process(server, name, arguments), alone(decoder, arguments.requests)
        assert pair[0]["tokens"] == pair[1]["tokens"], "the server decodes something else"
        if not compiled:
            served.append(pair[0])
            bare.append(pair[1])
        if len(served) == arguments.runs:
            break
    server.should_exit = True
    thread.join()

    def middle(runs: list[dict[str, float]], value: Any) -> float:
        return statistics.median(map(value, runs))

    print(description())
    print(
        "| | requests/s | tokens/s | first text, ms | of the engine alone |\n|---|---|---|---|---|"
    )
    rate = middle(bare, lambda x: x["tokens"] / x["seconds"])
    for what, runs in (("engine alone", bare), ("server", served)):
        requests = middle(runs, lambda x: arguments.requests / x["seconds"])
        tokens = middle(runs, lambda x: x["tokens"] / x["seconds"])
        first = f"{1000 * middle(runs, lambda x: x['first']):.0f}" if "first" in runs[0] else "-"
        print(f"| {what} | {requests:.1f} | {tokens:.0f} | {first} | {tokens / rate:.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded:chain_sum_zip", help="a model with a head")
    parser.add_argument("--requests", type=int, default=128, help="of each run")
    parser.add_argument("--concurrency", type=int, default=32, help="clients at a time")
    parser.add_argument("--n", type=int, default=8, help="most prefixes of a request")
    parser.add_argument("--rows", type=int, default=64, help="max_num_seqs")
    parser.add_argument("--max-tokens", type=int, default=0, help="0 takes the head's")
    parser.add_argument("--runs", type=int, default=5, help="measured runs")
    parser.add_argument("--url", help=argparse.SUPPRESS)  # of the other process
    parser.add_argument("--name", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.url:
        given = arguments.url, arguments.name, arguments.requests, arguments.concurrency
        print(json.dumps(asyncio.run(load_test(*given))))
    else:
        measure(arguments)


if __name__ == "__main__":
    main()
