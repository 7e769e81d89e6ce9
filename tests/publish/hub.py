"""A local server that speaks as much of the Hugging Face hub's API as pushing a model needs."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_local"


class Hub:
    """What the server was sent: repositories and their files."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.refuses_commits = False


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *arguments: Any) -> None:
        pass

    def _answer(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_PUT(self) -> None:
        data, oid = self._body(), self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.objects[oid] = data
        self._answer(200, {})

    def do_GET(self) -> None:
        self._answer(404, {"error": f"nothing at {self.path}"})

    def do_POST(self) -> None:
        hub, body = self.hub, self._body()
        hub.requests.append(self.path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted['organization']}/{wanted['name']}"
            if repo in hub.files:
                self._answer(409, {"error": "exists", "url": f"{hub.endpoint}/{repo}"})
                return
            # The library writes one or the other, by its version.
            hidden = wanted.get("private", False) or wanted.get("visibility") == "private"
            hub.private[repo], hub.files[repo] = hidden, {}
            self._answer(200, {"url": f"{hub.endpoint}/{repo}", "name": repo})
        elif self.path == "/api/validate-yaml":
            metadata = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            is_card = isinstance(metadata, dict) and "library_name" in metadata
            errors = [] if is_card else [{"message": "not the metadata of a model"}]
            self._answer(400 if errors else 200, {"errors": errors, "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {
                    "path": file["path"], "shouldIgnore": False,
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                }
                for file in json.loads(body)["files"]
            ]  # fmt: skip
            self._answer(200, {"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": each["oid"], "size": each["size"],
                    "actions": {"upload": {"href": f"{hub.endpoint}/lfs/{each['oid']}"}},
                }
                for each in json.loads(body)["objects"]
            ]  # fmt: skip
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            self._commit(match[1], body)
        else:
            self._answer(404, {"error": f"nothing at {self.path}"})

    def _commit(self, repo: str, body: bytes) -> None:
        hub = self.hub
        if hub.refuses_commits:
            self._answer(403, {"error": "You have no space left on the hub."})
            return
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                hub.messages.append(value["summary"])
            elif entry["key"] == "file":
                hub.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                hub.files[repo][value["path"]] = hub.objects[value["oid"]]
        address = f"{hub.endpoint}/{repo}/commit/{'0' * 40}"
        self._answer(200, {"success": True, "commitOid": "0" * 40, "commitUrl": address})


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Context manager: a server on a free port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass = type("Handler", (_Handler,), {"hub": hub})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
