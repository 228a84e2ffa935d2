"""The command as a process of its own, ended as schedulers end it."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys

import openai
import pytest


@pytest.mark.slow  # a process of its own
def test_sigterm_ends_the_command_after_the_answers(tmp_path):
    root = pathlib.Path(__file__).parents[2]
    command = [sys.executable, "-m", "zip_rc_jax", "serve", "embedded:chain_sum_zip", "--port", "0"]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    with subprocess.Popen(
        [*command, "n=2"],
        cwd=root,
        env=environment | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        line = process.stdout.readline()
        assert line.startswith("serving chain_sum_zip on http://127.0.0.1:")
        ask = openai.OpenAI(base_url=line.split(" on ")[1].strip(), api_key="none", timeout=300)
        prompt = "State the final answer to the following arithmetic problem: 4 + 3 ="
        stream = ask.completions.create(model="chain_sum_zip", prompt=prompt, stream=True, seed=0)
        chunks = [next(iter(stream))]
        process.send_signal(signal.SIGTERM)
        chunks += list(stream)
        _, said = process.communicate(timeout=60)
    assert "Answer:" in "".join(chunk.choices[0].text for chunk in chunks)
    assert process.returncode == 0, said
    assert "done in" in said
