"""Requests that are none: bytes changed at random, JSON of odd values, and the classics of those who mean harm."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from typing import Any

from processes import NAME, request

PATHS = (
    "/v1/embeddings",
    "/v2/embed",
    "/embed",
    "/explore",
    "/",
    "/health",
    "/metrics",
    "/nowhere",
    "/v1/../health",
    "/%00",
    "/" + "a" * 5_000,
)
_SOUND: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/embeddings", {"model": NAME, "input": ["a claim", "x"], "steps": 1}),
    ("/v2/embed", {"model": NAME, "texts": ["a claim"], "input_type": "search_document", "steps": 1}),
    ("/embed", {"inputs": "a claim"}),
    ("/explore", {"text": "a claim", "steps": 1}),
)
_FIELDS = (
    *(
        "model",
        "input",
        "texts",
        "inputs",
        "text",
        "steps",
        "halt",
        "dimensions",
        "encoding_format",
        "truncate",
        "deadline_ms",
        "instruction",
    ),
    *("input_type", "task", "prompt_name", "embedding_types", "output_dimension", "normalize", "top", "hits", "user", "\0", "__class__"),
)
_ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2.5,
        1e308,
        -1e308,
        10**30,
        -(10**30),
        "",
        "x",
        "\0",
        "\u2028",
        "\U0001f600" * 50,
        "a" * 50_000,
        "\ud800",
    ),
    *([], {}, [[]], [None] * 3_000, ["a"] * 5_000, [""], [["a"]], [1, 2, 3], {"rule": "FixedSteps", "steps": 10**9}, {"rule": []}),
    *(
        {"rule": "ConvergeStop", "threshold": "x"},
        {"rule": "ConvergeStop", "threshold": -5},
        {"a": {"b": {"c": {}}}},
        "search_query",
        "right",
    ),
)


def mutated(rng: random.Random) -> tuple[str, bytes]:
    """Return the name of a kind, and the bytes of a request of it."""
    name = rng.choice(list(_KINDS))
    return name, _KINDS[name](rng)


def _bytes(rng: random.Random) -> bytes:
    """Change a sound request."""
    content = bytearray(request(*rng.choice(_SOUND)))
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        place = rng.randrange(len(content) or 1)
        change = rng.choice((b"\0", b"\r\n", b"\n", b" ", b":", b"\xff", b'"', b"{", rng.randbytes(1), rng.randbytes(8), b"9" * 30))
        kept = rng.choice((place, place + 1, place + 16))
        content[place:kept] = change if rng.random() < 0.8 else b""
    return bytes(content)


def _noise(rng: random.Random) -> bytes:
    return rng.randbytes(rng.randint(1, 500)) + rng.choice((b"", b"\r\n\r\n"))


def _value(rng: random.Random) -> bytes:
    """Put odd values into the fields of a sound request."""
    path, sound = rng.choice(_SOUND)
    value = dict(sound)
    for _ in range(rng.randint(1, 3)):
        value[rng.choice((*_FIELDS, *sound))] = rng.choice(_ODD)
    for name in rng.sample(list(value), rng.randint(0, 1)):
        del value[name]
    return request(path, body=json.dumps(value).encode() or b"{}")


def _literal(rng: random.Random) -> bytes:
    """Write what a JSON library would not."""
    odd = (
        b"NaN",
        b"Infinity",
        b"1e999",
        b"-0",
        b"01",
        b'"\\ud800"',
        b'"\xff"',
        b"[" * 50_000,
        b"[" * 900 + b"]" * 900,
        b'{"a":' * 900 + b"1" + b"}" * 900,
    )
    path, _ = rng.choice(_SOUND)
    field = rng.choice(("input", "texts", "inputs", "text", "steps", "halt", "model")).encode()
    return request(path, body=b'{"model": "' + NAME.encode() + b'", "' + field + b'": ' + rng.choice(odd) + b"}")


def _head(rng: random.Random) -> bytes:
    """Say something odd in the head."""
    path, sound = rng.choice(_SOUND)
    body = json.dumps(sound).encode()
    line = rng.choice(
        (
            *(
                b"Content-Length: -1",
                b"Content-Length: 5",
                b"Content-Length: 99999999999999999999",
                b"Content-Length: 0x10",
                b"Content-Length: ",
            ),
            *(b"Content-Length: %d\r\nContent-Length: 3" % len(body), b"Transfer-Encoding: chunked\r\nContent-Length: %d" % len(body)),
            *(b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: xchunked", b"Expect: 100-continue"),
            *(b"Content-Length: %d\r\nContent-Encoding: gzip" % len(body), b"Content-Length: %d\r\nContent-Type: text/plain" % len(body)),
            *(b"Content-Length: %d\r\nX: " % len(body) + b"x" * 60_000, b"Content-Length: %d\r\n" % len(body) + b"X: y\r\n" * 2_000),
            *(
                b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: eA==\r\nSec-WebSocket-Version: 13",
                b"Upgrade: h2c",
                b"\0: \0",
            ),
            *(b" folded", b"Host: a\r\nHost: b", b"Authorization: Bearer \xff\xfe", b"Cookie: " + b"a=b;" * 1_000, b"Range: bytes=0-"),
        )
    )
    verb = rng.choice((b"POST", b"POST", b"GET", b"PUT", b"DELETE", b"OPTIONS", b"CONNECT", b"TRACE", b"PATCH", b"HEAD", b"BREW", b"post"))
    version = rng.choice((b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9.9", b""))
    where = rng.choice((path, path, *PATHS)).encode()
    return b"%s %s %s\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n%s\r\n\r\n%s" % (
        verb,
        where,
        version,
        line,
        body,
    )


def _chunks(rng: random.Random) -> bytes:
    """Send chunks that lie about their length, or do not end."""
    path, sound = rng.choice(_SOUND)
    body = json.dumps(sound).encode()
    size = rng.choice((b"%x" % len(body), b"%x" % (len(body) + 5), b"-1", b"fffffffffffffffff", b"zz", b"", b"1;x=" + b"y" * 5_000))
    end = rng.choice((b"0\r\n\r\n", b"", b"0\r\nX: y\r\n\r\n", b"5\r\nab"))
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    return head + size + b"\r\n" + body + b"\r\n" + end


def _bomb(rng: random.Random) -> bytes:
    """Send much in little: compressed zeros, a long token, a long list."""
    path, _ = rng.choice(_SOUND)
    zeros = gzip.compress(bytes(1 << 20))
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\nConnection: close\r\n".encode()
    if rng.random() < 0.5:
        return head + b"Content-Length: %d\r\n\r\n%s" % (len(zeros), zeros)
    long = rng.choice(("x" * 1_000_000, "é" * 300_000, " " * 500_000))
    return request(path, {"model": NAME, "input": long, "text": long, "inputs": long, "texts": [long], "input_type": "search_document"})


_KINDS: dict[str, Callable[[random.Random], bytes]] = {
    "changed bytes": _bytes,
    "noise": _noise,
    "odd values": _value,
    "literals": _literal,
    "heads": _head,
    "chunks": _chunks,
    "bombs": _bomb,
}
