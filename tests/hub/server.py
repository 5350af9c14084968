"""A Hub on loopback for the tests: what the real `huggingface_hub` client asks of one, with repositories on disk.

It knows models alone: creating, branches, commits, pull requests, listings, downloads with ranges, files by LFS,
private repositories, and faults on demand. Files with the endings in `LFS` go the way of large files: uploaded beside
the commit, downloaded by a redirect.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS = (".safetensors", ".ckpt", ".bin")
TOKENS = {"hf_ada": "ada", "hf_bob": "bob"}  # who may write: ada to "ada/...", bob to "bob/..."


@dataclass
class Fault:
    """What goes wrong the next `times` times that a request's "METHOD /path" matches `pattern`.

    `kind` is a status, or "cut" (half of the answer, then the connection closes), or "drop" (no answer at all).
    """

    pattern: str
    kind: int | str
    times: int = 1


class Refused(Exception):
    """An answer that is no success: a status and the Hub's error code."""

    def __init__(self, status: int, code: str = "", message: str = ""):
        super().__init__(f"{status} {code} {message}")
        self.status, self.code, self.message = status, code, message


class Hub:
    """The repositories: `root/blobs/<sha256>` and `root/<owner>/<name>.json`; what was asked is in `log`."""

    def __init__(self, root: Path):
        self.root, self.url = root, ""
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.lock = threading.RLock()
        (root / "blobs").mkdir(parents=True)

    @property
    def storage(self) -> str:
        """Where large files are: as with the real Hub, another host, which must not see a token."""
        return self.url.replace("127.0.0.1", "localhost")

    # --- repositories ---

    def path(self, repo: str) -> Path:
        return self.root / f"{repo}.json"

    def repo(self, repo: str, user: str | None) -> dict[str, Any]:
        """The repository, if it exists and the user may know of it."""
        found = json.loads(self.path(repo).read_text()) if self.path(repo).is_file() else None
        if found is None or (found["private"] and user != repo.split("/")[0]):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        return found

    def save(self, repo: str, state: dict[str, Any]) -> None:
        self.path(repo).parent.mkdir(exist_ok=True)
        self.path(repo).write_text(json.dumps(state))

    def create(self, repo: str, private: bool = False) -> None:
        first = {"parent": None, "title": "initial commit", "description": "", "files": {}}
        sha = hashlib.sha1(repo.encode()).hexdigest()
        state = {"private": private, "refs": {"main": sha}, "commits": {sha: first}, "pulls": 0}
        self.save(repo, state)

    def revision(self, state: dict[str, Any], name: str) -> str:
        sha = state["refs"].get(name, name)
        if sha not in state["commits"]:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {name}")
        return sha

    def commit(self, state: dict[str, Any], ref: str, changes: dict[str, str | None], title: str, text: str) -> str:
        """Add a commit onto `ref`: `changes` maps paths to blobs, None deletes."""
        parent = state["refs"][ref]
        files = {**state["commits"][parent]["files"], **changes}
        made = {
            "parent": parent,
            "title": title,
            "description": text,
            "files": {path: blob for path, blob in files.items() if blob is not None},
        }
        sha = hashlib.sha1(json.dumps([made, len(state["commits"])]).encode()).hexdigest()
        state["commits"][sha] = made
        state["refs"][ref] = sha
        return sha

    # --- files ---

    def store(self, data: bytes) -> str:
        oid = hashlib.sha256(data).hexdigest()
        (self.root / "blobs" / oid).write_bytes(data)
        return oid

    def blob(self, oid: str) -> bytes:
        return (self.root / "blobs" / oid).read_bytes()

    def files(self, repo: str, ref: str = "main") -> dict[str, bytes]:
        """What is in a repository, for the tests to look at."""
        state = json.loads(self.path(repo).read_text())
        return {path: self.blob(oid) for path, oid in state["commits"][state["refs"][ref]]["files"].items()}

    def put(self, repo: str, files: dict[str, bytes], ref: str = "main") -> None:
        """Commit files as if by another client."""
        state = json.loads(self.path(repo).read_text())
        self.commit(state, ref, {path: self.store(data) for path, data in files.items()}, "by another", "")
        self.save(repo, state)

    def last(self, repo: str, ref: str = "main") -> dict[str, Any]:
        """The newest commit of a branch."""
        state = json.loads(self.path(repo).read_text())
        return state["commits"][state["refs"][ref]]


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.1 over a `Hub`; ROUTES says who answers what."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self.serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def serve(self) -> None:
        body = self._body()  # always: what is left unread would be taken for the next request
        split = urlsplit(self.path)
        line = f"{self.command} {split.path}"
        self.query = {key: values[0] for key, values in parse_qs(split.query).items()}
        self.user = None
        with self.hub.lock:
            self.hub.log.append(line)
            fault = next((f for f in self.hub.faults if f.times > 0 and re.search(f.pattern, line)), None)
            if fault is not None:
                fault.times -= 1
            try:
                if fault is not None and fault.kind == "drop":
                    self.close_connection = True
                    return
                if fault is not None and isinstance(fault.kind, int):
                    raise Refused(fault.kind, "", "by order of the test")
                self._authenticate()
                status, headers, data = self._route(line, body)
            except Refused as no:
                status, data = no.status, json.dumps({"error": no.message}).encode()
                headers = {"X-Error-Code": no.code, "X-Error-Message": no.message, "Content-Type": "application/json"}
        self._answer(status, headers, data, cut=fault is not None and fault.kind == "cut")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _authenticate(self) -> None:
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if given and given not in TOKENS:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        self.user = TOKENS.get(given)

    def _route(self, line: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        for pattern, name in ROUTES:
            match = re.fullmatch(pattern, line)
            if match:
                groups = {key: unquote(value or "") for key, value in match.groupdict().items()}
                answer = getattr(self, name)(body, **groups)
                if isinstance(answer, tuple):
                    return answer
                return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()
        raise Refused(404, "", f"this Hub has no {line}")

    def _answer(self, status: int, headers: dict[str, str], data: bytes, cut: bool) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(ConnectionError):
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True

    def _may_write(self, repo: str) -> None:
        if self.user is None:
            raise Refused(401, "", "Invalid username or password.")
        if self.user != repo.split("/")[0]:
            raise Refused(403, "", f"You don't have the rights to write to {repo}")

    # --- answers ---

    def whoami(self, body: bytes) -> Any:
        if self.user is None:
            raise Refused(401, "", "Invalid username or password.")
        return {"name": self.user, "type": "user", "orgs": []}

    def validate(self, body: bytes) -> Any:
        """As the Hub does: a `base_model` that is no model's id is refused."""
        base = re.search(r"^base_model: (.*)$", json.loads(body)["content"], re.MULTILINE)
        bad = base is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base[1])
        text = f'"base_model" with value "{base[1] if base else ""}" is not valid. Use a model id.'
        errors = [{"message": text}] if bad else []
        return (400 if bad else 200), {}, json.dumps({"errors": errors, "warnings": []}).encode()

    def new_repo(self, body: bytes) -> Any:
        asked = json.loads(body)
        if self.user is None:
            raise Refused(401, "", "Invalid username or password.")
        repo = f"{asked.get('organization') or self.user}/{asked['name']}"
        self._may_write(repo)
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        exists = self.hub.path(repo).is_file()
        if not exists:
            self.hub.create(repo, private)
        url = json.dumps({"url": f"{self.hub.url}/{repo}", "name": repo}).encode()
        return (409 if exists else 200), {"Content-Type": "application/json"}, url

    def new_branch(self, body: bytes, repo: str, ref: str) -> Any:
        state = self.hub.repo(repo, self.user)
        self._may_write(repo)
        if ref in state["refs"]:
            raise Refused(409, "", f"Reference already exists: {ref}")
        start = json.loads(body or b"{}").get("startingPoint") or "main"
        state["refs"][ref] = self.hub.revision(state, start)
        self.hub.save(repo, state)
        return {}

    def preupload(self, body: bytes, repo: str, ref: str) -> Any:
        self.hub.revision(self.hub.repo(repo, self.user), ref)
        modes = [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular"}
            for file in json.loads(body)["files"]
        ]
        return {"files": [{**file, "shouldIgnore": False} for file in modes]}

    def lfs_batch(self, body: bytes, repo: str) -> Any:
        self._may_write_or_propose(repo)
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}", "header": {}}}}
            for item in json.loads(body)["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, body: bytes, oid: str) -> Any:
        if self.hub.store(body) != oid:
            raise Refused(400, "", "the content is not what its name says")
        return {}

    def _may_write_or_propose(self, repo: str) -> None:
        self.hub.repo(repo, self.user)
        if self.user is None:
            raise Refused(401, "", "Invalid username or password.")

    def new_commit(self, body: bytes, repo: str, ref: str) -> Any:
        state = self.hub.repo(repo, self.user)
        proposal = self.query.get("create_pr") == "1"
        self._may_write_or_propose(repo) if proposal else self._may_write(repo)
        lines = [json.loads(line) for line in body.splitlines() if line]
        header = next(line["value"] for line in lines if line["key"] == "header")
        changes: dict[str, str | None] = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = self.hub.store(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if not (self.hub.root / "blobs" / value["oid"]).is_file():
                    raise Refused(400, "", f"{value['path']} was never uploaded")
                changes[value["path"]] = value["oid"]
            elif line["key"] == "deletedFile":
                changes[value["path"]] = None
        self.hub.revision(state, ref)
        url = None
        if proposal:
            state["pulls"] += 1
            url = f"{self.hub.url}/{repo}/discussions/{state['pulls']}"
            state["refs"][f"refs/pr/{state['pulls']}"] = state["refs"][ref]
            ref = f"refs/pr/{state['pulls']}"
        sha = self.hub.commit(state, ref, changes, header["summary"], header.get("description", ""))
        self.hub.save(repo, state)
        made = {"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha}
        return {**made, **({"pullRequestUrl": url} if url else {})}

    def info(self, body: bytes, repo: str, ref: str = "") -> Any:
        state = self.hub.repo(repo, self.user)
        sha = self.hub.revision(state, ref or "main")
        files = [{"rfilename": path} for path in sorted(state["commits"][sha]["files"])]
        facts = {"_id": repo, "id": repo, "modelId": repo, "sha": sha, "private": state["private"]}
        return {**facts, "siblings": files, "tags": [], "downloads": 0, "likes": 0, "gated": False, "disabled": False}

    def tree(self, body: bytes, repo: str, ref: str) -> Any:
        state = self.hub.repo(repo, self.user)
        files = state["commits"][self.hub.revision(state, ref)]["files"]
        return [self._entry(path, oid) for path, oid in sorted(files.items())]

    def _entry(self, path: str, oid: str) -> dict[str, Any]:
        size = len(self.hub.blob(oid))
        large = {"lfs": {"oid": oid, "size": size, "pointerSize": 100}} if path.endswith(LFS) else {}
        return {"type": "file", "path": path, "oid": oid[:40], "size": size, **large}

    def resolve(self, body: bytes, repo: str, ref: str, file: str) -> Any:
        state = self.hub.repo(repo, self.user)
        sha = self.hub.revision(state, ref)
        oid = state["commits"][sha]["files"].get(file)
        headers = {"X-Repo-Commit": sha}
        if oid is None:
            return 404, {**headers, "X-Error-Code": "EntryNotFound"}, b""
        if file.endswith(LFS):
            size = str(len(self.hub.blob(oid)))
            linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": size, "ETag": f'"{oid[:40]}"'}
            return 302, {**headers, **linked, "Location": f"{self.hub.storage}/lfs/{oid}"}, b""
        return self._content(oid, {**headers, "ETag": f'"{oid[:40]}"'})

    def lfs_get(self, body: bytes, oid: str) -> Any:
        if "Authorization" in self.headers:
            raise Refused(400, "", "a token was sent to a host that is not the Hub")
        return self._content(oid, {"ETag": f'"{oid}"'})

    def _content(self, oid: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        data, status = self.hub.blob(oid), 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        headers = {**headers, "Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        if asked:
            start, total, status = int(asked[1]), len(data), 206
            data = data[start : int(asked[2]) + 1 if asked[2] else None]
            headers["Content-Range"] = f"bytes {start}-{start + len(data) - 1}/{total}"
        return status, {**headers, "Content-Length": str(len(data))}, data


_REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = (
    (r"GET /api/whoami-v2", "whoami"),
    (r"POST /api/validate-yaml", "validate"),
    (r"POST /api/repos/create", "new_repo"),
    (rf"POST /api/models/{_REPO}/branch/(?P<ref>[^/]+)", "new_branch"),
    (rf"POST /api/models/{_REPO}/preupload/(?P<ref>[^/]+)", "preupload"),
    (rf"POST /api/models/{_REPO}/commit/(?P<ref>[^/]+)", "new_commit"),
    (rf"GET /api/models/{_REPO}", "info"),
    (rf"GET /api/models/{_REPO}/revision/(?P<ref>[^/]+)", "info"),
    (rf"GET /api/models/{_REPO}/tree/(?P<ref>[^/]+)", "tree"),
    (r"POST /(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"PUT /lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    (r"(?:GET|HEAD) /lfs/(?P<oid>[0-9a-f]{64})", "lfs_get"),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/(?P<ref>[^/]+)/(?P<file>.+)", "resolve"),
)


@contextlib.contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """A Hub with its repositories below `root`, on a port of its own for as long as the block runs."""
    hub = Hub(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
