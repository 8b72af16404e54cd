"""The server as a process: told to stop, it finishes what it has accepted, takes nothing new, and ends."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest


@contextmanager
def started(model: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start a server on a free port; give its process and address."""
    command = [sys.executable, "-m", "genembed.cli", "serve", str(model), "--served-model-name", "tiny", "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = process.stderr.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+", said)
            assert found, said + process.stderr.read()
            yield process, found[0]
        finally:
            process.kill()


def posted(url: str, texts: int) -> tuple[threading.Thread, list[httpx.Response | httpx.HTTPError]]:
    """Send a request in the background; give its thread, and a list that will hold the answer."""
    answers: list[httpx.Response | httpx.HTTPError] = []

    def post() -> None:
        body = {"model": "tiny", "input": [f"text number {n}" for n in range(texts)], "steps": 20}
        try:
            answers.append(httpx.post(f"{url}/v1/embeddings", json=body, timeout=60))
        except httpx.HTTPError as error:
            answers.append(error)

    thread = threading.Thread(target=post)
    thread.start()
    return thread, answers


def under_way(url: str) -> bool:
    """Tell whether the engine works on a text."""
    return bool(re.search(r"^genembed_rows [1-9]", httpx.get(f"{url}/metrics").text, re.MULTILINE))


def test_told_to_stop_it_answers_what_it_has_accepted_and_takes_nothing_new(folder_of: Callable[[str], Path]) -> None:
    with started(folder_of("qwen2"), "--grace", "60") as (process, url):
        thread, answers = posted(url, 1_000)
        while not under_way(url):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert thread.is_alive()  # or the rest says nothing
        with pytest.raises(httpx.TransportError):
            httpx.post(f"{url}/v1/embeddings", json={"model": "tiny", "input": "late"})
        thread.join(60)
        [answer] = answers
        assert isinstance(answer, httpx.Response)
        assert (answer.status_code, len(answer.json()["data"])) == (200, 1_000)
        process.wait(10)


@pytest.mark.slow
def test_what_is_not_done_within_the_grace_is_given_up(folder_of: Callable[[str], Path]) -> None:
    with started(folder_of("qwen2"), "--grace", "0", "--max-queue-tokens", "1000000", "--max-client-batch", "100000") as (process, url):
        thread, answers = posted(url, 20_000)
        while not under_way(url):
            time.sleep(0.01)
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        assert time.monotonic() - begin < 10
        thread.join(20)
        [answer] = answers
        assert isinstance(answer, httpx.Response)
        assert answer.status_code == 503
        assert "stopped before this text" in answer.json()["error"]["message"]
