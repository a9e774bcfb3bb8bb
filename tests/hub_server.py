"""A small Hugging Face hub on 127.0.0.1, for tests: real HTTP, so that the real client library runs against it.

    with HubServer(repos={"org/model": {"config.json": b"{}"}}) as hub:
        subprocess.run([...], env=dict(os.environ, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path)))
        hub.requests  # what was asked, in order

It speaks what huggingface_hub 0.23 to 2.4 and `datasets.load_dataset` ask of the real one: the repository's list with
and without sizes, the tree, paths-info, files with HEAD, GET and Range. A large file (`LFS` below) answers, as on the
real hub, with a redirect to a second server that knows no tokens. The refusals have the status codes, X-Error-Code and
X-Error-Message of the real hub; the list of a gated repository is public there, its files are not.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import yaml

LFS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".parquet", ".model")
DATE = "2024-01-01T00:00:00.000Z"


class Request(NamedTuple):
    method: str
    path: str  # without the query; of a large file's second request: /cdn/<name>
    range: str  # the Range header, or ""
    token: str  # what came in the Authorization header, or ""
    status: int
    sent: int  # bytes of the body


class HubServer:
    """A hub with the model repositories `repos` and the data sets `datasets`, both {"owner/name": {file name: bytes}}.

    gated: {"owner/name": token}, the one token whose account has accepted the licence.
    tokens: further valid tokens, of accounts without any right. Every other token is invalid.
    accounts: {token: user name}, which `hf auth login` asks for; a mirror has none.
    gated_list: a gated repository hides its list as well, as some do.
    sizes: {"owner/name": {file name: bytes}}, false sizes to tell in the lists.
    Attributes to set while it runs: `cuts`, {file name: [bytes, ...]}, the transfers of that file that break off after
    so many bytes, first to last; `stalls`, names of files that stop coming half-way, while `stalled` becomes set;
    `failing`, {regular expression of a path: status}.
    """

    def __init__(self, repos=None, datasets=None, gated=None, tokens=(), gated_list=False, sizes=None, accounts=None):
        self.repos = {"models": repos or {}, "datasets": datasets or {}}
        self.gated = gated or {}
        self.accounts = accounts or {}
        self.tokens = {*tokens, *self.gated.values(), *self.accounts}
        self.gated_list = gated_list
        self.sizes = sizes or {}
        self.cuts = {}
        self.stalls = set()
        self.stalled, self._closing = threading.Event(), threading.Event()
        self.failing = {}
        self.requests = []
        self._servers = [_Server(("127.0.0.1", 0), _Handler) for _ in range(2)]
        for server in self._servers:
            server.hub = self
        self.url, self.cdn_url = [f"http://127.0.0.1:{server.server_port}" for server in self._servers]

    def __enter__(self):
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._closing.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def wait(self):
        self.stalled.set()
        self._closing.wait()

    def served(self, name):
        """Bytes of the file `name` that have gone out, over all requests."""
        return sum(request.sent for request in self.requests if request.path.endswith("/" + name))

    def downloaded(self):
        """Names of the files of which at least one byte has gone out."""
        paths = [
            r.path for r in self.requests if r.method == "GET" and r.sent and re.search("/resolve/|^/cdn/", r.path)
        ]
        return {path.rsplit("/", 1)[1] for path in paths}

    def commit(self, kind, repo):
        """The commit id of a repository: it changes with the content, as git's does."""
        digest = hashlib.sha1()
        for name, data in sorted(self.repos[kind][repo].items()):
            digest.update(name.encode() + b"\0" + hashlib.sha1(data).digest())
        return digest.hexdigest()

    def describe(self, repo, name, data):
        """One file, as the tree lists it."""
        size = self.sizes.get(repo, {}).get(name, len(data))
        entry = {"type": "file", "path": name, "size": size, "oid": _git_id(data)}
        if name.endswith(LFS):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 134}
        return entry


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that goes away in the middle is what some tests are about, and no news."""


class _Refusal(Exception):
    def __init__(self, status, message, code=None):
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the client's acknowledgement of its headers

    def log_message(self, *_):
        pass

    def do_GET(self):
        hub, self.sent, self.status = self.server.hub, 0, 0
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        path, _, query = self.path.partition("?")
        self.route, self.query = urllib.parse.unquote(path), urllib.parse.parse_qs(query + "&" + body)
        self.token = (self.headers.get("Authorization") or "").replace("Bearer ", "")
        try:
            for pattern, status in hub.failing.items():
                if re.search(pattern, self.route):
                    raise _Refusal(status, "the hub is not well")
            self.answer(hub)
        except _Refusal as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self.reply_json({"error": refusal.message}, refusal.status, headers)
        finally:
            headers = (self.headers.get("Range") or "", self.token)
            hub.requests.append(Request(self.command, self.route, *headers, self.status, self.sent))

    do_HEAD = do_POST = do_GET

    def answer(self, hub):
        if self.route.startswith("/cdn/"):  # a signed address: whoever knows it may read
            _, _, kind, owner, repo, name = self.route.split("/", 5)
            return self.reply_file(hub, name, hub.repos[kind][f"{owner}/{repo}"][name], {})
        if self.token and self.token not in hub.tokens:
            raise _Refusal(401, "Invalid credentials in Authorization header")
        if self.route == "/api/whoami-v2" and hub.accounts:
            if self.token not in hub.accounts:
                raise _Refusal(401, "Invalid username or password.")
            token = {"type": "access_token", "accessToken": {"displayName": "tutorial", "role": "read"}}
            return self.reply_json({"type": "user", "name": hub.accounts[self.token], "orgs": [], "auth": token})
        # /api/models/<repo>[/...]   /api/datasets/<repo>[/...]   /<repo>/resolve/...   /datasets/<repo>/resolve/...
        match = re.fullmatch(
            r"(?:/api/(models|datasets)|(/datasets)?)/([^/]+/[^/]+)(?:/([^/]+)(?:/([^/]+)(?:/(.*))?)?)?", self.route
        )
        if not match:
            raise _Refusal(404, "Sorry, we can't find the page you are looking for.")
        api, data_set, repo, action, revision, name = match.groups()
        kind = api or ("datasets" if data_set else "models")
        if repo not in hub.repos[kind]:  # the real hub does not tell a stranger whether a private one exists
            if self.token:
                raise _Refusal(404, "Repository not found", "RepoNotFound")
            raise _Refusal(401, "Invalid username or password.")
        if repo in hub.gated and self.token != hub.gated[repo] and (action == "resolve" or hub.gated_list):
            restricted = f"Access to {kind[:-1]} {repo} is restricted"
            if self.token:
                page = f"https://huggingface.co/{repo}"
                raise _Refusal(403, f"{restricted} and you are not in the authorized list. Visit {page}", "GatedRepo")
            raise _Refusal(401, f"{restricted}. You must have access to it and be authenticated.", "GatedRepo")
        files, commit = hub.repos[kind][repo], hub.commit(kind, repo)
        if revision not in (None, "main", commit):
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

        if api and action in (None, "revision"):
            self.reply_json(self.repository(hub, kind, repo, files, commit))
        elif api and action == "tree":
            deep = self.query.get("recursive", [""])[0].lower() == "true"
            self.reply_json(self.tree(hub, repo, files, name, deep))
        elif api and action == "paths-info":
            entries = {entry["path"]: entry for entry in self.tree(hub, repo, files, None, deep=True)}
            self.reply_json([entries[path] for path in self.query.get("paths", []) if path in entries])
        elif action == "resolve" and not api:
            if name not in files:
                raise _Refusal(404, "Entry not found", "EntryNotFound")
            data, headers = files[name], {"X-Repo-Commit": commit}
            if not name.endswith(LFS):
                return self.reply_file(hub, name, data, dict(headers, ETag=f'"{_git_id(data)}"'))
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(data).hexdigest()}"'
            headers["X-Linked-Size"] = str(hub.describe(repo, name, data)["size"])
            headers["Location"] = f"{hub.cdn_url}/cdn/{kind}/{repo}/{urllib.parse.quote(name)}"
            self.reply(302, b"", headers)
        else:
            raise _Refusal(404, "Not found")

    def repository(self, hub, kind, repo, files, commit):
        siblings = []
        for name, data in files.items():
            sibling = {"rfilename": name}
            if self.query.get("blobs", [""])[0].lower() == "true":
                entry = hub.describe(repo, name, data)
                sibling.update(size=entry["size"], blobId=entry["oid"])
                if "lfs" in entry:
                    sibling["lfs"] = {"sha256": entry["lfs"]["oid"], "size": entry["size"], "pointerSize": 134}
            siblings.append(sibling)
        info = {"id": repo, "sha": commit, "siblings": siblings, "gated": "manual" if repo in hub.gated else False}
        head = re.match(rb"---\n(.*?)\n---\n", files.get("README.md", b""), re.DOTALL)
        info.update({"cardData": yaml.safe_load(head.group(1))} if head else {})
        info.update(private=False, disabled=False, tags=[], downloads=0, likes=0, author=repo.split("/")[0])
        return dict(info, lastModified=DATE, createdAt=DATE, **({"modelId": repo} if kind == "models" else {}))

    def tree(self, hub, repo, files, folder, deep):
        prefix = folder + "/" if folder else ""
        inside = {name: data for name, data in files.items() if name.startswith(prefix)}
        if not inside:
            raise _Refusal(404, f"{folder} does not exist", "EntryNotFound")
        entries, folders = [], set()
        for name, data in inside.items():
            parts = name[len(prefix) :].split("/")
            depth = len(parts) if deep else 2
            folders.update(prefix + "/".join(parts[:n]) for n in range(1, min(depth, len(parts))))
            if deep or len(parts) == 1:
                entries.append(hub.describe(repo, name, data))
        return [{"type": "directory", "path": p, "size": 0, "oid": "0" * 40} for p in sorted(folders)] + entries

    def reply_json(self, content, status=200, headers=None):
        self.reply(status, json.dumps(content).encode(), dict(headers or {}, **{"Content-Type": "application/json"}))

    def reply_file(self, hub, name, data, headers):
        headers = dict(headers, **{"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"})
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        status, total = 200, len(data)
        if asked:
            begin, end = int(asked.group(1)), min(int(asked.group(2) or total - 1), total - 1)
            if begin >= total:
                return self.reply(416, b"", {"Content-Range": f"bytes */{total}"})
            status, data = 206, data[begin : end + 1]
            headers["Content-Range"] = f"bytes {begin}-{end}/{total}"
        if self.command == "GET" and name in hub.stalls:
            return self.reply(status, data, headers, cut=len(data) // 2, then=hub.wait)
        cuts = hub.cuts.get(name) if self.command == "GET" else None
        return self.reply(status, data, headers, cut=cuts.pop(0) if cuts else None)

    def reply(self, status, body, headers, cut=None, then=None):
        self.status = status
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        body = memoryview(body)[:cut]
        for start in range(0, len(body), 1 << 20):  # in pieces, so that `sent` is right when the client goes away
            self.sent += self.wfile.write(body[start : start + (1 << 20)])
        if then:
            then()
        if cut is not None:
            self.close_connection = True


def _git_id(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
