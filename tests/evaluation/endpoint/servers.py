"""Small servers that compute with one of our models and answer in the forms of vLLM and llama.cpp."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


@dataclass
class Double:
    """A server under way, what it computes with, and how it answers."""

    model: Any
    tokenizer: Any
    form: str
    """vllm; llama.cpp; openai: echo, as roundwise has it; mute: no log probabilities at all."""
    key: str | None = None
    most: int = 20
    """Most likely tokens that a request may ask for."""
    fail_after: int = 10**9
    """Number of answers after which all requests fail."""
    seconds_per_token: float = 0.0
    url: str = ""
    bodies: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Path and body of all requests."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """Log probabilities [tokens, vocabulary] of what follows each token."""
        with self._lock:
            logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        return logits.double().log_softmax(-1)

    def models(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"id": "m", "object": "model"}
        if self.form == "vllm":
            entry |= {"root": "/served/here", "max_model_len": 512}
        if self.form == "llama.cpp":
            entry["meta"] = {"n_vocab": 4096, "n_ctx": 512}
        return {"object": "list", "data": [entry]}

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if len(self.bodies) > self.fail_after:
            return 500, {"error": {"message": "out of memory", "code": 500}}
        if path == "/completion" and self.form == "llama.cpp":
            return 200, self._completion(body)
        if path == "/v1/completions":
            return self._completions(body)
        return 404, {"error": {"message": f"there is no {path}"}}

    def _completions(self, body: dict[str, Any]) -> tuple[int, Any]:
        ids, choice = body["prompt"], {"index": 0, "text": "", "finish_reason": "length"}
        asked = body.get("prompt_logprobs") or body.get("logprobs") or 0
        if "prompt_logprobs" in body and self.form == "openai":
            return 400, {"error": {"message": "prompt_logprobs is not a field of this request"}}
        if "ignore_eos" in body and self.form == "openai":
            return 400, {"error": {"message": "ignore_eos is not a field of this request"}}
        if asked > self.most:
            return 400, {"error": {"message": f"more than {self.most} log probabilities"}}
        if body.get("echo") and self.form == "llama.cpp":
            return 400, {"error": {"message": "Only no echo is supported", "code": 400}}
        if "prompt_logprobs" in body and self.form == "vllm":
            rows, entries = self.logprobs(ids), [None]
            for row, token in zip(rows, ids[1:], strict=False):
                top = {*row.topk(asked).indices.tolist(), token}
                entries.append(
                    {str(t): {"logprob": float(row[t]), "rank": 1, "decoded_token": "x"} for t in top}
                )  # fmt: skip
            choice["prompt_logprobs"] = entries
        if body.get("echo") and self.form == "openai":
            choice["logprobs"] = self._echoed(ids, asked)
        if not {"prompt_logprobs", "echo", "stream"} & {*body}:
            new = self.greedy(ids, body["max_tokens"])
            choice["text"] = self.tokenizer.decode(new)
        return 200, {"object": "text_completion", "choices": [choice]}

    def _echoed(self, ids: list[int], asked: int) -> dict[str, Any]:
        rows, logprobs, tops = self.logprobs(ids), [None], [None]
        for row, token in zip(rows, [*ids[1:], int(rows[-1].argmax())], strict=True):
            logprobs.append(float(row[token]))
            top: dict[str, float] = {}
            for t in [*row.topk(asked).indices.tolist(), token]:
                top.setdefault(self.tokenizer.decode([t]), float(row[t]))
            tops.append(top)
        return {"token_logprobs": logprobs, "top_logprobs": tops, "tokens": [], "text_offset": []}

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        row = self.logprobs(body["prompt"])[-1]
        top = row.topk(min(body["n_probs"], len(row))).indices.tolist()
        found = [{"id": t, "token": "x", "bytes": [], "logprob": float(row[t])} for t in top]
        return {"content": "x", "completion_probabilities": [{**found[0], "top_logprobs": found}]}

    def greedy(self, ids: list[int], count: int) -> list[int]:
        new: list[int] = []
        for _ in range(count):
            new.append(int(self.logprobs([*ids, *new])[-1].argmax()))
        return new

    def events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a stream: a piece for each token, then the usage."""
        for number in range(body["max_tokens"]):
            time.sleep(self.seconds_per_token)
            yield {"choices": [{"index": 0, "text": f" {number}", "finish_reason": None}]}
        yield {"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}


class _Handler(BaseHTTPRequestHandler):
    double: Double

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        if self._may_enter():
            self._send(200, self.double.models())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.double.bodies.append((self.path, body))
        if not self._may_enter():
            return
        status, answer = self.double.answer(self.path, body)
        if status == 200 and body.get("stream"):
            self._stream(body)
        else:
            self._send(status, answer)

    def _stream(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.end_headers()
        for event in self.double.events(body):
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            self.wfile.flush()
        self.wfile.write(b": a comment\n\ndata: [DONE]\n\n")

    def _may_enter(self) -> bool:
        key = self.double.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        self._send(401, {"error": {"message": "the API key is missing or wrong"}})
        return False

    def _send(self, status: int, value: Any) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@contextmanager
def serving(double: Double) -> Iterator[Double]:
    """Context manager: the server answers on a free port."""
    handler = type("Handler", (_Handler,), {"double": double})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    double.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield double
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
