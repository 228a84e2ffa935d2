"""How fast the explorer's page draws and answers in a real Chromium.

    python benchmarks/explorer.py

One page holds a search of 8 prefixes of 4,096 tokens with a joint after each, and 500 problems. The
table has milliseconds from an action to the second frame after it: the median and the worst of some
runs. "open" is from the navigation to the first frame with the tree.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import statistics
import tempfile
from typing import Any

import numpy as np

from zip_rc_jax.explorer.page import page_text
from zip_rc_jax.explorer.record import packed, packed_joint
from zip_rc_jax.explorer.searches import ResultFile, results_page
from zip_rc_jax.runtime.errors import UsageError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
EDGES = [0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]
CENTRES = [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0]
ACTIONS = {
    "scrub to another decision": "r.value = k;r.dispatchEvent(new Event('input', {bubbles: true}))",
    "select another prefix": "names[k % names.length].click()",
    "point at another token": "document.querySelectorAll('.t')[40 + k]"
    ".dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))",
    "color by remaining length": "by('remaining').click()",
    "color by P(correct)": "by('P(correct)', 1).click()",
    "P(correct) as height": "by('P(correct)').click()",
    "open the evaluation": "document.getElementById('tab-evaluation').click()",
    "sort 500 problems": "document.querySelectorAll('th button')[3].click()",
    "back to the search": "document.getElementById('tab-search').click()",
}
TIMER = """async (k) => {
  const frame = () => new Promise(go => requestAnimationFrame(
    () => requestAnimationFrame(() => setTimeout(go))));
  const r = document.querySelector('input[type=range]');
  const by = (name, n = 0) => [...document.querySelectorAll('button')]
    .filter(b => b.textContent == name)[n];
  const names = document.querySelectorAll('button.name');
  await frame();
  const begun = performance.now();
  %s;
  await frame();
  return performance.now() - begun;
}"""
DRAWN = """new MutationObserver(() => {
  if (window.drawn || !document.querySelector('.tree svg')) return;
  window.drawn = -1;
  requestAnimationFrame(() => setTimeout(() => window.drawn = performance.now()));
}).observe(document, {childList: true, subtree: true})"""


def row(tokens: int, prefixes: int, interval: int, number: int, introspected: bool) -> dict:
    """A result of random numbers."""
    rng = np.random.default_rng(number)
    words, count = [" the", " value", " of", " x", " 4", "2", "\n"], tokens // interval + 1

    def along() -> dict[str, Any]:
        cells = rng.dirichlet(np.ones(56), tokens).reshape(tokens, 7, 8)
        return {
            "pieces": [words[i] for i in rng.integers(len(words), size=tokens)],
            "p_correct": packed(rng.random(tokens), "<f4"),
            "remaining": packed(np.linspace(tokens, 1, tokens), "<f4"),
            "joint": packed_joint(cells),
        }

    def actions() -> dict[str, Any]:
        numbers = {name: [0.9] * 40 for name in ("value", "compute", "latency", "utility")}
        copies = rng.integers(0, 2, (40, prefixes)).tolist()
        rest = {"planned_pause_bin": [-1] * 40, "compared": [1] * 40, "count": 65}
        return numbers | rest | {"multiplicity": copies, "normalizer": 99.0}

    def prefix(k: int) -> dict[str, Any]:
        ids = {"id": k, "parent": -1, "fork_position": 0, "token_ids": list(range(tokens))}
        end = {"text": "42", "state": "finished", "finish_reason": "stop"}
        return ids | end | {"expected_reward": 0.8, "expected_remaining": 0.0}

    def decision(d: int) -> dict[str, Any]:
        step = d * interval
        return {
            "step": step,
            "prefix_ids": list(range(prefixes)),
            "multiplicity": [1] * prefixes,
            "planned_pause_bin": -1,
            "utility": 0.9,
            "expected_reward": rng.random(prefixes).tolist(),
            "expected_remaining": [float(tokens - step)] * prefixes,
            "tokens": [step] * prefixes,
            "finished": [d == count - 1] * prefixes,
        }

    usage = {
        "prompt_tokens": 9,
        "tokens": tokens * prefixes,
        "serial_steps": tokens,
        "seconds": 1.0,
    }
    found = {
        "prompt": f"problem {number}",
        "text": "42",
        "prefix_id": 0,
        "finish_reason": "stop",
        "expected_reward": 0.9,
        "answer": "42",
        "correct": float(rng.random() < 0.8),
        "usage": usage,
        "prefixes": [prefix(k) for k in range(prefixes)],
        "trace": [decision(d) for d in range(count)],
    }
    if introspected:
        found["introspection"] = {
            "settings": {"alpha": 0.1, "beta": 0.02, "n": prefixes},
            "grid": {"reward_centres": CENTRES, "length_edges": EDGES},
            "decisions": [actions() for _ in range(count)],
            "root": None,
            "prefixes": [along() for _ in range(prefixes)],
        }
    return found


def chromium() -> str:
    found = os.environ.get("ZIP_RC_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        reason = "none of its names is on the path"
        raise UsageError("Chromium", reason, "apt-get install chromium, or set ZIP_RC_CHROMIUM")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096, help="of a prefix")
    parser.add_argument("--prefixes", type=int, default=8)
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    path = chromium()
    from playwright.sync_api import sync_playwright

    large = row(given.tokens, given.prefixes, 64, 0, True)
    rows = (large, *(row(64, 4, 32, i, False) for i in range(1, given.problems)))
    text = page_text(results_page("Large", [ResultFile("large", rows)]))
    times: dict[str, list[float]] = {"open": []} | {name: [] for name in ACTIONS}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_file = pathlib.Path(folder, "large.html")
        page_file.write_text(text)
        flags = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        version = browser.version
        for run in range(given.runs):
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.add_init_script(DRAWN)
            page.goto(page_file.as_uri())
            page.wait_for_selector(".tree svg")
            page.wait_for_timeout(500)
            times["open"].append(page.evaluate("window.drawn"))
            page.locator(".texts").scroll_into_view_if_needed()
            page.wait_for_selector(".t", state="attached")
            for name, action in ACTIONS.items():
                times[name].append(page.evaluate(TIMER % action, 10 + run))
            page.close()
        browser.close()
    print(f"{len(text) / 1e6:.1f} MB, Chromium {version}, {given.runs} runs")
    print("| action | median, ms | worst, ms |\n|---|---|---|")
    for name, values in times.items():
        print(f"| {name} | {statistics.median(values):.0f} | {max(values):.0f} |")


if __name__ == "__main__":
    main()
