"""A Hugging Face Hub on loopback, for tests without a network.

It speaks what the `huggingface_hub` client asks for in `push_to_hub` and `from_pretrained`, nothing more: any other
request is answered with 501 and stays in the log. As at the real Hub there are two hosts: the Hub itself, and the
storage that large files are redirected to. Everything is kept in memory; blobs, trees and commits carry the ids that
git would give them.

    with HubServer() as hub:
        subprocess.run([sys.executable, "push.py"], env=hub.environment(home=tmp_path))
        assert "README.md" in hub.repos["user/name"].resolve("main").files
"""

import fnmatch
import hashlib
import json
import os
import re
import threading
from base64 import b64decode
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USER = "user"
TOKEN = "hf_loopback"
LFS_SUFFIXES = ("bin", "ckpt", "gguf", "msgpack", "npz", "onnx", "pt", "pth", "safetensors")
GITATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
LARGE_FILE_BYTES = 10 * 2**20  # the Hub stores anything above as LFS, whatever its name
FRONT_MATTER = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", re.DOTALL)


# --- what a repository holds ---------------------------------------------------------------------------------------


def git_oid(kind: str, content: bytes) -> str:
    """The 40-hex id of a git object of `kind` ("blob", "tree", "commit")."""
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


@dataclass(frozen=True)
class Blob:
    """A file's bytes. Of an LFS file, git itself stores only the pointer."""

    data: bytes
    is_lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @cached_property
    def oid(self) -> str:
        return git_oid("blob", self.pointer if self.is_lfs else self.data)

    @property
    def etag(self) -> str:
        """What names the content to the client: in the cache and when it looks for files that did not change."""
        return self.sha256 if self.is_lfs else self.oid


def tree_oid(files: dict[str, Blob]) -> str:
    """The git id of a folder; `files` are its files at any depth, by path."""
    folders: dict[str, dict[str, Blob]] = defaultdict(dict)
    entries: dict[str, tuple[str, str]] = {}
    for path, blob in files.items():
        name, _, rest = path.partition("/")
        if rest:
            folders[name][rest] = blob
        else:
            entries[name] = ("100644", blob.oid)
    for name, inner in folders.items():
        entries[f"{name}/"] = ("40000", tree_oid(inner))  # git sorts a folder as if its name ended in a slash
    listed = sorted(entries.items())
    lines = (f"{mode} {name.rstrip('/')}\0".encode() + bytes.fromhex(oid) for name, (mode, oid) in listed)
    return git_oid("tree", b"".join(lines))


@dataclass(frozen=True)
class Commit:
    files: dict[str, Blob]
    parent: str | None
    message: str
    time: int  # seconds since the epoch

    @cached_property
    def oid(self) -> str:
        parent = f"parent {self.parent}\n" if self.parent else ""
        author = f"{USER} <{USER}@localhost> {self.time} +0000"
        return git_oid(
            "commit",
            f"tree {tree_oid(self.files)}\n{parent}author {author}\ncommitter {author}\n\n{self.message}\n".encode(),
        )

    @property
    def date(self) -> str:
        return datetime.fromtimestamp(self.time, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")

    def folder(self, path: str) -> dict[str, Blob]:
        """The files below `path` ("" is the root), by their path inside it."""
        prefix = f"{path}/" if path else ""
        return {name.removeprefix(prefix): blob for name, blob in self.files.items() if name.startswith(prefix)}


class Repo:
    """One model repository: its commits, its branches, and the large files uploaded to it."""

    def __init__(self):
        self.lfs_objects: dict[str, bytes] = {}  # by sha256
        self.commits: dict[str, Commit] = {}  # oldest first
        self.branches: dict[str, str] = {}
        self.commit("main", "initial commit", {".gitattributes": Blob(GITATTRIBUTES)})

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch or a full commit id names; HubError when there is none."""
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        return self.commits[oid]

    def commit(self, branch: str, message: str, files: dict[str, Blob]) -> Commit:
        """Puts a commit that holds exactly `files` on top of `branch`."""
        clock = 1_700_000_000 + len(self.commits)  # a clock of its own, so that the same history has the same ids
        commit = Commit(dict(files), self.branches.get(branch), message, clock)
        self.lfs_objects.update({blob.sha256: blob.data for blob in files.values() if blob.is_lfs})
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit


# --- requests and replies ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    method: str
    path: str  # still quoted: a branch may hold a slash
    query: dict[str, list[str]]
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> dict:
        return json.loads(self.body)


@dataclass(frozen=True)
class Reply:
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    sent: int | None = None  # bytes of the body after which the line drops; None is all

    @classmethod
    def of(cls, content: dict | list, status: int = 200, **headers: str) -> "Reply":
        return cls(status, {"Content-Type": "application/json", **headers}, json.dumps(content).encode())


class HubError(Exception):
    """An answer with an error status, as the Hub words it."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None):
        super().__init__(message)
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        named = {name: value for name, value in headers.items() if value}
        self.reply = Reply.of({"error": message}, status, **named)


class Exchange(NamedTuple):
    """One line of a server's log."""

    method: str
    path: str
    status: int


def route(method: str, pattern: str) -> Callable:
    """Binds a handler to `/path/{name}`; `{repo}` is user/name, `{path}` the rest, any other name one segment."""
    kinds = {"repo": r"[\w.-]+/[\w.-]+", "path": ".+"}
    regex = re.sub(r"\\{(\w+)\\}", lambda name: f"(?P<{name[1]}>{kinds.get(name[1], '[^/]+')})", re.escape(pattern))

    def bind(handler: Callable) -> Callable:
        handler.routes = [*getattr(handler, "routes", []), (method, re.compile(regex))]
        return handler

    return bind


def content(request: Request, data: bytes, headers: dict[str, str]) -> Reply:
    """`data`, or the end of it that `Range: bytes=N-` asks for."""
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", ""))
    if asked is None:
        return Reply(200, headers, data)
    start = int(asked[1])
    return Reply(206, {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}, data[start:])


class Service:
    """Routes requests to the methods marked with `route`, one at a time, and keeps a log."""

    def __init__(self, repos: dict[str, Repo]):
        self.repos = repos
        self.log: list[Exchange] = []
        self._lock = threading.Lock()
        methods = (getattr(type(self), name) for name in dir(type(self)))
        self._routes = [(*bound, handler) for handler in methods for bound in getattr(handler, "routes", [])]

    def __call__(self, request: Request) -> Reply:
        with self._lock:
            try:
                reply = self._answer(request)
            except HubError as error:
                reply = error.reply
            self.log.append(Exchange(request.method, request.path, reply.status))
        return reply

    def repo(self, repo_id: str) -> Repo:
        if repo_id not in self.repos:
            raise HubError(404, "Repository not found", code="RepoNotFound")
        return self.repos[repo_id]

    def _answer(self, request: Request) -> Reply:
        for method, regex, handler in self._routes:
            if method == request.method and (match := regex.fullmatch(request.path)):
                return handler(self, request, **{name: unquote(value) for name, value in match.groupdict().items()})
        raise HubError(501, f"{request.method} {request.path} is not spoken here")


# --- the two services ----------------------------------------------------------------------------------------------


class Storage(Service):
    """The bucket behind the Hub. A test sets `damage` to spoil the replies to downloads."""

    def __init__(self, repos: dict[str, Repo]):
        super().__init__(repos)
        self.damage: Callable[[Reply], Reply] | None = None

    @route("PUT", "/{repo}/{sha256}")
    def upload(self, request: Request, repo: str, sha256: str) -> Reply:
        if hashlib.sha256(request.body).hexdigest() != sha256:
            raise HubError(400, f"the {len(request.body)} bytes received do not hash to {sha256}")
        self.repo(repo).lfs_objects[sha256] = request.body
        return Reply(200, {"ETag": f'"{sha256}"'})

    @route("GET", "/{repo}/{sha256}")
    def download(self, request: Request, repo: str, sha256: str) -> Reply:
        reply = content(request, self.repo(repo).lfs_objects[sha256], {"ETag": f'"{sha256}"'})
        return self.damage(reply) if self.damage else reply


class Hub(Service):
    """The Hub's API. Reading needs no token; writing does."""

    def __init__(self, repos: dict[str, Repo]):
        super().__init__(repos)
        self.url = self.storage_url = ""  # HubServer sets them once it is bound

    def _answer(self, request: Request) -> Reply:
        if request.method == "POST" and request.headers.get("authorization") != f"Bearer {TOKEN}":
            raise HubError(401, "Invalid username or password.")
        return super()._answer(request)

    @route("GET", "/api/whoami-v2")
    def whoami(self, request: Request) -> Reply:
        token = {"displayName": "loopback", "role": "write"}
        return Reply.of({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"accessToken": token}})

    @route("POST", "/api/repos/create")
    def create(self, request: Request) -> Reply:
        if request.json.get("type", "model") != "model":
            raise HubError(400, f"only model repositories are spoken here, not {request.json['type']!r}")
        repo_id = f"{request.json['organization'] or USER}/{request.json['name']}"
        answer = {"name": repo_id, "id": repo_id, "url": f"{self.url}/{repo_id}"}
        if repo_id in self.repos:
            return Reply.of({**answer, "error": "You already created this model repo"}, 409)
        self.repos[repo_id] = Repo()
        return Reply.of(answer)

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, request: Request) -> Reply:
        header = FRONT_MATTER.match(request.json["content"])
        if header is None:
            return Reply.of({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        try:
            is_mapping = isinstance(yaml.safe_load(header[1]), dict)
            errors = [] if is_mapping else [{"message": "metadata is not a mapping"}]
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        return Reply.of({"errors": errors, "warnings": []}, 400 if errors else 200)

    @route("GET", "/api/models/{repo}")
    @route("GET", "/api/models/{repo}/revision/{revision}")
    def model_info(self, request: Request, repo: str, revision: str = "main") -> Reply:
        commit = self.repo(repo).resolve(revision)
        return Reply.of(
            {
                "id": repo,
                "modelId": repo,
                "author": repo.split("/")[0],
                "sha": commit.oid,
                "lastModified": commit.date,
                "private": False,
                "tags": [],
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
            }
        )

    @route("GET", "/api/models/{repo}/tree/{revision}")
    @route("GET", "/api/models/{repo}/tree/{revision}/{path}")
    def tree(self, request: Request, repo: str, revision: str, path: str = "") -> Reply:
        commit = self.repo(repo).resolve(revision)
        if not commit.folder(path):
            raise HubError(404, f"{path} does not exist on {revision!r}", code="EntryNotFound", commit=commit.oid)
        recursive = request.query.get("recursive", ["false"])[0].lower() == "true"
        below = f"{path}/" if path else ""
        inside = [entry for entry in self._entries(commit) if entry["path"].startswith(below)]
        return Reply.of([entry for entry in inside if recursive or "/" not in entry["path"].removeprefix(below)])

    @route("POST", "/api/models/{repo}/paths-info/{revision}")
    def paths_info(self, request: Request, repo: str, revision: str) -> Reply:
        wanted = parse_qs(request.body.decode())["paths"]
        entries = self._entries(self.repo(repo).resolve(revision))
        return Reply.of([entry for entry in entries if entry["path"] in wanted])

    @staticmethod
    def _entries(commit: Commit) -> Iterator[dict]:
        """Every folder and file of a commit, as the Hub describes it."""
        folders = {str(parent) for path in commit.files for parent in Path(path).parents if parent != Path()}
        for path in sorted(folders):
            yield {"type": "directory", "path": path, "oid": tree_oid(commit.folder(path)), "size": 0}
        for path, blob in sorted(commit.files.items()):
            entry = {"type": "file", "path": path, "oid": blob.oid, "size": len(blob.data)}
            lfs = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
            yield {**entry, "lfs": lfs} if blob.is_lfs else entry

    @route("POST", "/api/models/{repo}/branch/{branch}")
    def create_branch(self, request: Request, repo: str, branch: str) -> Reply:
        stored = self.repo(repo)
        if branch in stored.branches:
            raise HubError(409, f"Reference already exists: {branch}")
        stored.branches[branch] = stored.resolve(request.json.get("startingPoint", "main")).oid
        return Reply.of({})

    @route("POST", "/api/models/{repo}/preupload/{revision}")
    def preupload(self, request: Request, repo: str, revision: str) -> Reply:
        """Says of each file whether it goes into the commit or through LFS, and what is there under its name now."""
        commit = self.repo(repo).resolve(revision)
        attributes = commit.files[".gitattributes"].data.decode().splitlines()
        lfs_patterns = [line.split()[0] for line in attributes if "filter=lfs" in line]

        def plan(path: str, size: int) -> dict:
            by_name = any(fnmatch.fnmatch(os.path.basename(path), pattern) for pattern in lfs_patterns)
            mode = "lfs" if by_name or size > LARGE_FILE_BYTES else "regular"
            known = {"oid": commit.files[path].etag} if path in commit.files else {}
            return {"path": path, "uploadMode": mode, "shouldIgnore": False, **known}

        return Reply.of({"files": [plan(file["path"], file["size"]) for file in request.json["files"]]})

    @route("POST", "/{repo}.git/info/lfs/objects/batch")
    def lfs_batch(self, request: Request, repo: str) -> Reply:
        stored = self.repo(repo)
        upload = f"{self.storage_url}/{repo}"
        verify = {"href": f"{self.url}/{repo}.git/info/lfs/verify"}
        objects = [dict(wanted) for wanted in request.json["objects"]]
        for wanted in objects:
            if wanted["oid"] not in stored.lfs_objects:  # without actions, the client takes it as uploaded
                wanted["actions"] = {"upload": {"href": f"{upload}/{wanted['oid']}"}, "verify": verify}
        return Reply.of({"transfer": "basic", "objects": objects})

    @route("POST", "/{repo}.git/info/lfs/verify")
    def lfs_verify(self, request: Request, repo: str) -> Reply:
        data = self.repo(repo).lfs_objects.get(request.json["oid"])
        if data is None or len(data) != request.json["size"]:
            raise HubError(404, f"no object {request.json['oid']} of {request.json['size']} bytes")
        return Reply.of({})

    @route("POST", "/api/models/{repo}/commit/{revision}")
    def commit(self, request: Request, repo: str, revision: str) -> Reply:
        stored = self.repo(repo)
        head = stored.resolve(revision)
        if revision not in stored.branches or "create_pr" in request.query:
            raise HubError(400, f"{revision!r} is no branch to commit on, and pull requests are not spoken here")
        header, *operations = (json.loads(line) for line in request.body.splitlines())
        if header["value"].get("parentCommit", head.oid) != head.oid:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for operation in operations:
            self._apply(stored, files, operation["key"], operation["value"])
        commit = stored.commit(revision, header["value"]["summary"], files)
        return Reply.of(
            {"success": True, "commitOid": commit.oid, "commitUrl": f"{self.url}/{repo}/commit/{commit.oid}"}
        )

    @staticmethod
    def _apply(repo: Repo, files: dict[str, Blob], key: str, value: dict) -> None:
        """Carries out one line of a commit on `files`."""
        path = value["path"]
        if key == "file":
            files[path] = Blob(b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in repo.lfs_objects:
                raise HubError(400, f"LFS pointer of {path} points to {value['oid']}, which was never uploaded")
            files[path] = Blob(repo.lfs_objects[value["oid"]], is_lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            doomed = [name for name in files if name == path or name.startswith(path.rstrip("/") + "/")]
            if not doomed:
                raise HubError(404, f"A file with this name doesn't exist: {path}", code="EntryNotFound")
            for name in doomed:
                del files[name]
        else:
            raise HubError(400, f"the commit operation {key!r} is not spoken here")

    @route("HEAD", "/{repo}/resolve/{revision}/{path}")
    @route("GET", "/{repo}/resolve/{revision}/{path}")
    def resolve(self, request: Request, repo: str, revision: str, path: str) -> Reply:
        commit = self.repo(repo).resolve(revision)
        blob = commit.files.get(path)
        if blob is None:
            raise HubError(404, "Entry not found", code="EntryNotFound", commit=commit.oid)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.oid}"'}
        if not blob.is_lfs:
            return content(request, blob.data, headers)
        headers["X-Linked-Size"] = str(len(blob.data))
        headers["X-Linked-ETag"] = f'"{blob.sha256}"'
        return Reply(302, {**headers, "Location": f"{self.storage_url}/{repo}/{blob.sha256}"})


# --- over HTTP -----------------------------------------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    """Carries requests to the server's service and its replies back."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", 0)))
        reply = self.server.service(Request(self.command, url.path, parse_qs(url.query), headers, body))
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body[: reply.sent])
        if reply.sent is not None:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def log_message(self, *args) -> None:
        """The service keeps the log."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, service: Service):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.service = service

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's own also looks up the host's name, which may go to the network


class HubServer:
    """Both servers, running while the `with` block does.

    Attributes:
        url: the Hub's address, for `HF_ENDPOINT`.
        repos: what was pushed, by repo id.
        hub, storage: the two services, each with its `log`.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.hub, self.storage = Hub(self.repos), Storage(self.repos)
        self._servers = [_Server(self.hub), _Server(self.storage)]
        # A client that is redirected within one host goes on asking there, whatever the port: hence two names.
        hub_port, storage_port = (server.server_address[1] for server in self._servers)
        self.hub.url, self.hub.storage_url = f"http://127.0.0.1:{hub_port}", f"http://localhost:{storage_port}"
        self.url = self.hub.url

    def __enter__(self) -> "HubServer":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc_info) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a client process: this Hub, `home` as its cache, and nothing of the caller's settings."""
        foreign = re.compile(r"(HF|HUGGING\w*|TRANSFORMERS)_.*|.*_proxy|PYTHONPATH", re.IGNORECASE)
        kept = {name: value for name, value in os.environ.items() if not foreign.fullmatch(name)}
        return {
            **kept,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "*",
            "OMP_NUM_THREADS": "1",
        }
