"""A model hub on this machine that speaks the real protocol to an unmodified huggingface_hub.

Repositories with branches and commits, regular and LFS files, tokens, and faults on demand::

    with Hub() as hub:
        hub.fault("commit", status=500)          # the next commit fails once
        subprocess.run(..., env=hub.env(home))   # HF_ENDPOINT and a cache of its own
        hub.repo("alice/net").head()             # {"config.json": b"...", ...}

Files ending in ``.safetensors`` or ``.bin`` are LFS files and come from another host (port), to
which no token may be sent. Calls are named as in `CALLS`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_ENDINGS = (".safetensors", ".bin")
REPO = r"(?P<repo>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
CALLS = {
    "whoami": ("GET", "/api/whoami-v2"),
    "create": ("POST", "/api/repos/create"),
    "validate-yaml": ("POST", "/api/validate-yaml"),
    "info": ("GET", f"/api/models/{REPO}(?:/revision/{REVISION})?"),
    "branch": ("POST", f"/api/models/{REPO}/branch/{REVISION}"),
    "preupload": ("POST", f"/api/models/{REPO}/preupload/{REVISION}"),
    "commit": ("POST", f"/api/models/{REPO}/commit/{REVISION}"),
    "lfs-batch": ("POST", rf"/{REPO}\.git/info/lfs/objects/batch"),
    "lfs-verify": ("POST", "/lfs/verify"),
    "lfs-put": ("PUT", r"/lfs/(?P<oid>\w+)"),
    "lfs-get": ("GET", r"/lfs/(?P<oid>\w+)"),
    "head": ("HEAD", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)"),
    "get": ("GET", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)"),
}
PUSH_CALLS = (
    "create", "info", "head", "validate-yaml", "preupload", "lfs-batch", "lfs-put", "lfs-verify",
    "commit",
)  # fmt: skip


class Refusal(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, code: str = "", **body: Any) -> None:
        super().__init__(message)
        self.status, self.code, self.body = status, code, {"error": message, **body}


@dataclass
class Fault:
    """What goes wrong at the calls named `call`.

    A `status` is answered in place of the result, after the call was carried out if `after`; or
    the `body` of the answer is "cut" (the connection ends in the middle of it), "short" (whole,
    but of fewer bytes) or "corrupt" (one byte differs); or the call takes `seconds` longer.
    """

    call: str
    status: int = 0
    body: str = ""
    times: float = 1
    repo: str | None = None
    path: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    after: bool = False
    seconds: float = 0.0
    meanwhile: Callable[[], object] = lambda: None


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    history: list[tuple[str, str]] = field(default_factory=list)  # (branch, summary)

    def commit(self, branch: str, files: dict[str, bytes], summary: str) -> str:
        contents = sorted((path, git_oid(content)) for path, content in files.items())
        seed = repr((branch, summary, len(self.commits), contents))
        sha = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.history.append((branch, summary))
        return sha

    def sha(self, revision: str) -> str:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def head(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.sha(revision)]


class Hub:
    """The server, its repositories and its faults; `tokens` are by user, who may write below its
    own name, and `hf_reader` may not write at all."""

    def __init__(self) -> None:
        self.tokens = {"hf_alice": "alice", "hf_bob": "bob", "hf_reader": "alice"}
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.calls: list[tuple[str, str]] = []  # (call, repository or '')
        self.lock = threading.RLock()
        self.servers = [_server(self), _server(self)]
        ports = [server.server_port for server in self.servers]
        self.url, self.lfs_url = f"http://127.0.0.1:{ports[0]}", f"http://localhost:{ports[1]}"

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """From here on connections are refused."""
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def env(self, home: Path, token: str | None = "hf_alice") -> dict[str, str]:
        """The environment of a client with its cache in the folder `home`."""
        foreign = ("HF_", "HUGGING_FACE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        settings = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return {**kept, **settings, **({"HF_TOKEN": token} if token else {})}

    def fault(self, call: str, status: int = 0, **settings: Any) -> Fault:
        assert call in CALLS, call
        fault = Fault(call, status, **settings)
        with self.lock:
            self.faults.append(fault)
        return fault

    def repo(self, repo_id: str) -> Repo:
        return self.repos[repo_id]

    def add(self, repo_id: str, files: Mapping[str, bytes], private: bool = False) -> Repo:
        """A repository that is there already."""
        repo = self.repos[repo_id] = Repo(private)
        repo.commit("main", {".gitattributes": b""}, "initial commit")
        if files:
            repo.commit("main", dict(files), "files")
        return repo

    def due(self, call: str, repo: str, path: str) -> Iterator[Fault]:
        with self.lock:
            self.calls.append((call, repo))
            for fault in self.faults:
                wanted = fault.repo in (None, repo) and fault.path in (None, path)
                if fault.call == call and fault.times > 0 and wanted:
                    fault.times -= 1
                    yield fault

    # the calls: keywords come from the address, the result is JSON or an `Answer`

    def whoami(self, user: str | None, **_: Any) -> Any:
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        return {"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}}

    def create(self, user: str | None, body: Any, may_write: bool, **_: Any) -> Any:
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        repo_id = f"{body.get('organization') or user}/{body['name']}"
        url = f"{self.url}/{repo_id}"
        if not (may_write and repo_id.startswith(f"{user}/")):
            raise Refusal(403, f"You don't have the rights to create a model under {repo_id}")
        if repo_id in self.repos:
            raise Refusal(409, "You already created this model repo", url=url)
        self.add(repo_id, {}, body.get("private") or body.get("visibility") == "private")
        return {"url": url, "name": repo_id, "id": repo_id}

    def validate_yaml(self, body: Any, **_: Any) -> Any:
        if "license:" not in body["content"]:
            errors = [{"message": '"license" is required'}]
            raise Refusal(400, "Invalid metadata", errors=errors)
        return {"errors": [], "warnings": []}

    def info(self, repo: Repo, repo_id: str, revision: str | None, **_: Any) -> Any:
        sha = repo.sha(revision or "main")
        siblings = []
        for path, content in repo.commits[sha].items():
            sibling = {"rfilename": path, "size": len(content), "blobId": git_oid(content)}
            if is_lfs(path):
                oid = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"sha256": oid, "size": len(content), "pointerSize": 130}
            siblings.append(sibling)
        about = {"id": repo_id, "modelId": repo_id, "sha": sha, "private": repo.private}
        return {**about, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}

    def branch(self, repo: Repo, revision: str, **_: Any) -> Any:
        if revision in repo.branches:
            raise Refusal(409, "Reference already exists")
        repo.branches[revision] = repo.branches["main"]
        return {}

    def preupload(self, repo: Repo, revision: str, body: Any, **_: Any) -> Any:
        files = repo.head(revision)
        answers = []
        for file in body["files"]:
            path = file["path"]
            mode = "lfs" if is_lfs(path) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
            if path in files:
                sha256 = hashlib.sha256(files[path]).hexdigest()
                answers[-1]["oid"] = sha256 if mode == "lfs" else git_oid(files[path])
        return {"files": answers}

    def lfs_batch(self, body: Any, **_: Any) -> Any:
        objects = []
        for wanted in body["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.lfs:
                upload = {"href": f"{self.lfs_url}/lfs/{wanted['oid']}"}
                answer["actions"] = {
                    "upload": upload,
                    "verify": {"href": f"{self.url}/lfs/verify"},
                }
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str, data: bytes, token: str, **_: Any) -> Any:
        assert not token, "the token was sent to another host"
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refusal(400, "BadDigest")
        self.lfs[oid] = data
        return {}

    def lfs_verify(self, body: Any, **_: Any) -> Any:
        if len(self.lfs.get(body["oid"], b"")) != body["size"]:
            raise Refusal(404, "Object does not exist")
        return {}

    def lfs_get(self, oid: str, token: str, **_: Any) -> Any:
        assert not token, "the token was sent to another host"
        return Answer(self.content_of(oid))

    def content_of(self, oid: str) -> bytes:
        for repo in self.repos.values():
            for files in repo.commits.values():
                for path, content in files.items():
                    if is_lfs(path) and hashlib.sha256(content).hexdigest() == oid:
                        return content
        raise Refusal(404, "Object does not exist")

    def commit(self, repo: Repo, repo_id: str, revision: str, data: bytes, **_: Any) -> Any:
        if revision not in repo.branches:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files, header = dict(repo.head(revision)), {}
        for line in data.decode().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                header = value
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.lfs:
                    raise Refusal(400, f"LFS pointer to a missing object: {value['path']}")
                files[value["path"]] = self.lfs[value["oid"]]
            else:
                raise Refusal(400, f"Unknown operation {operation['key']}")
        if header.get("parentCommit", repo.branches[revision]) != repo.branches[revision]:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        sha = repo.commit(revision, files, header["summary"])
        return {
            "success": True,
            "commitOid": sha,
            "commitUrl": f"{self.url}/{repo_id}/commit/{sha}",
        }

    def get(self, repo: Repo, revision: str, path: str, **_: Any) -> Any:
        sha = repo.sha(revision)
        commit = {"X-Repo-Commit": sha}
        if path not in repo.commits[sha]:
            refusal = Refusal(404, "Entry not found", "EntryNotFound")
            return Answer(json.dumps(refusal.body).encode(), commit | _error(refusal), 404)
        content = repo.commits[sha][path]
        if not is_lfs(path):
            return Answer(content, {**commit, "ETag": f'"{git_oid(content)}"'})
        oid = hashlib.sha256(content).hexdigest()
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        location = {"Location": f"{self.lfs_url}/lfs/{oid}", "ETag": f'"{sha}"'}
        return Answer(b"", {**commit, **linked, **location}, 302)

    head = get


@dataclass
class Answer:
    content: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    status: int = 200


def is_lfs(path: str) -> bool:
    return path.endswith(LFS_ENDINGS)


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _error(refusal: Refusal) -> dict[str, str]:
    return {"X-Error-Message": refusal.body["error"], "X-Error-Code": refusal.code}


def _server(hub: Hub) -> ThreadingHTTPServer:
    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # the client was killed
            self.close_connection = True

    def answer(self) -> None:
        data = self.read_body()
        path = urlsplit(self.path).path
        found = [
            (call, match)
            for call, (method, pattern) in CALLS.items()
            if method == self.command and (match := re.fullmatch(pattern, path))
        ]
        if not found:
            return self.send(Answer(b"unknown call", status=404))
        call, match = found[0]
        named = {key: unquote(text) for key, text in match.groupdict(None).items() if text}
        path = named.get("path", named.get("oid", ""))
        faults = list(self.hub.due(call, named.get("repo", ""), path))
        for fault in faults:
            time.sleep(fault.seconds)
            fault.meanwhile()
            if fault.status and not fault.after:
                refusal = Refusal(fault.status, f"injected {fault.status}")
                return self.refuse(refusal, fault.headers)
        try:
            answer = self.carry_out(call, named, data)
        except Refusal as refusal:
            return self.refuse(refusal)
        for fault in faults:
            if fault.status:
                return self.refuse(Refusal(fault.status, f"injected {fault.status}"))
        self.send(answer, "".join(fault.body for fault in faults))

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def carry_out(self, call: str, named: dict[str, str], data: bytes) -> Answer:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        user = self.hub.tokens.get(token)
        if token and user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        given: dict[str, Any] = {"user": user, "may_write": token != "hf_reader", "token": token}
        given |= {"revision": None, **named, "data": data}
        if "json" in self.headers.get("Content-Type", "") and call != "commit":
            given["body"] = json.loads(data)
        with self.hub.lock:
            if "repo" in named:
                given |= {"repo_id": named["repo"], "repo": self.find_repo(call, named, given)}
            result = getattr(self.hub, call.replace("-", "_"))(**given)
        is_answer = isinstance(result, Answer)
        return result if is_answer else Answer(json.dumps(result).encode())

    def find_repo(self, call: str, named: dict[str, str], given: Mapping[str, Any]) -> Repo:
        repo, owner = self.hub.repos.get(named["repo"]), named["repo"].split("/")[0]
        if repo is None or (repo.private and owner != given["user"]):
            status = 404 if given["user"] else 401
            raise Refusal(status, "Repository not found", "RepoNotFound")
        writes = call in ("branch", "preupload", "commit", "lfs-batch")
        if writes and not (given["may_write"] and owner == given["user"]):
            raise Refusal(403, "You don't have the rights to write to this repository")
        return repo

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def refuse(self, refusal: Refusal, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(refusal.body).encode()
        self.send(Answer(body, _error(refusal) | dict(headers or {}), refusal.status))

    def send(self, answer: Answer, damage: str = "") -> None:
        content = answer.content
        if damage == "short":
            content = content[: len(content) // 2]
        elif damage == "corrupt":
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        headers, status = dict(answer.headers), answer.status
        if start and status == 200:
            headers["Content-Range"] = f"bytes {start[1]}-{len(content) - 1}/{len(content)}"
            content, status = content[int(start[1]) :], 206
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if damage == "cut":
            content = content[: len(content) // 2]
            self.close_connection = True
        self.wfile.write(content)
