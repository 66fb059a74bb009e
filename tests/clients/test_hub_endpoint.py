"""huggingface_hub itself, asked by us for models of an endpoint that is a small server here."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.make.folders import save_llama

pytest.importorskip("huggingface_hub")

pytestmark = pytest.mark.clients

COMMIT = "0123abcd" * 5


class Endpoint(BaseHTTPRequestHandler):
    """What the hub answers for models that are folders of `root`: what a model has, and its files."""

    root: Path

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, *, with_body: bool) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            folder = self.root / "/".join(parts[2:4])
            return self.listing(folder) if folder.is_dir() else self.refuse()
        file = self.root / "/".join(parts[:2]) / "/".join(parts[4:])
        return self.file(file, with_body=with_body) if file.is_file() else self.refuse()

    def listing(self, folder: Path) -> None:
        files = [{"rfilename": p.name, "size": p.stat().st_size} for p in sorted(folder.iterdir())]
        body = json.dumps({"id": f"org/{folder.name}", "sha": COMMIT, "siblings": files}).encode()
        if "/tree/" in self.path:
            listed = [{"type": "file", "path": p["rfilename"], "size": p["size"], "oid": "0" * 40} for p in files]
            body = json.dumps(listed).encode()
        self.send(body, {"Content-Type": "application/json"})

    def file(self, path: Path, *, with_body: bool) -> None:
        body = path.read_bytes()
        etag = hashlib.sha256(body).hexdigest()
        self.send(body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, with_body=with_body)

    def refuse(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("X-Error-Message", "Repository not found")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, body: bytes, headers: dict[str, str], *, with_body: bool = True) -> None:
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)


@pytest.fixture
def endpoint(tmp_path):
    save_llama(tmp_path / "remote" / "org" / "tiny", 1, shards=2)
    (tmp_path / "remote" / "org" / "tiny" / "pytorch_model.bin").write_bytes(b"x")
    handler = type("Served", (Endpoint,), {"root": tmp_path / "remote"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def run(endpoint: str, folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1", **more}
    words = (sys.executable, "-m", "streammerge", *words)
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_a_model_is_fetched_from_an_endpoint_and_then_found_offline(tmp_path, endpoint):
    done = run(endpoint, tmp_path, "org/tiny", "--dtype", "bf16", "-o", "OUT")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "OUT" / "tokenizer.json").is_file()
    cached = {path.name for path in (tmp_path / "hf").rglob("snapshots/*/*")}
    assert {"config.json", "model-00002-of-00002.safetensors"} <= cached
    assert "pytorch_model.bin" not in cached
    assert f"org/tiny@{COMMIT}" in (tmp_path / "OUT" / "README.md").read_text()
    done = run(endpoint, tmp_path, "org/tiny", "-o", "AGAIN", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr


def test_a_model_that_is_not_there_is_told(tmp_path, endpoint):
    done = run(endpoint, tmp_path, "org/nothing", "-o", "OUT")
    assert done.returncode == 1
    assert "on the hub there is none of that name, or it is private" in done.stderr


def test_an_endpoint_that_is_not_there_is_told(tmp_path):
    done = run("http://127.0.0.1:9", tmp_path, "org/tiny", "-o", "OUT")
    assert done.returncode == 1
    assert "the hub can't be reached" in done.stderr
