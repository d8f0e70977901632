"""A local stand-in of the Hugging Face hub: the requests of huggingface_hub for models, no LFS."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants

WRITE, READ = "hf_write", "hf_read"  # tokens
_REPO = r"(?P<repo>[^/]+/[^/]+)"


class Hub(ThreadingHTTPServer):
    """A server that stands in for the hub.

    `repos` has {repository: list of its commits}, a commit is {path: bytes}.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.private, self.requests = {}, set(), []

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repo):
        return self.repos[repo][-1]

    def add_commit(self, repo, files):
        self.repos.setdefault(repo, [{".gitattributes": b""}]).append(files)


@contextlib.contextmanager
def serve(monkeypatch, cache):
    """Yields a Hub that huggingface_hub uses in this process, with the token WRITE."""
    hub = Hub()
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no token"))
    monkeypatch.setenv("HF_TOKEN", WRITE)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def sha_of(repo, number):
    """Returns the id of a commit: 40 hexadecimal digits."""
    return hashlib.sha1(f"{repo} {number}".encode()).hexdigest()


def blob_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._route("GET")

    def do_GET(self):
        self._route("GET")

    def do_POST(self):
        self._route("POST")

    def _route(self, method):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in (WRITE, READ):
            message = "Invalid credentials in Authorization header"
            return self._send(401, {"error": message}, {"X-Error-Message": message})
        for pattern, function in ROUTES[method].items():
            if match := re.fullmatch(pattern, path):
                if method == "POST" and not path.startswith("/api/validate") and token != WRITE:
                    message = "You don't have the rights to do this"
                    return self._send(403, {"error": message}, {"X-Error-Message": message})
                repo = match.groupdict().get("repo")
                hidden = repo in self.server.private and not token
                if repo and (repo not in self.server.repos or hidden):
                    code = {"X-Error-Code": "RepoNotFound"}
                    return self._send(401 if not token else 404, {"error": "not found"}, code)
                return function(self, match, body)
        return self._send(404, {"error": f"no route for {path}"})

    def _send(self, status, content, headers=None):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Length": len(content)} | (headers or {})
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _commit(self, match):
        """Returns (number, files) of the revision in a request, None if there is none."""
        repo, revision = match["repo"], match.groupdict().get("revision") or "main"
        commits = self.server.repos[repo]
        numbers = {sha_of(repo, n): n for n in range(len(commits))} | {"main": len(commits) - 1}
        number = numbers.get(revision)
        if number is None:
            self._send(404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return number, commits[number]

    def create(self, match, body):
        fields = json.loads(body)
        repo = f"{fields['organization']}/{fields['name']}"
        exists = repo in self.server.repos
        if not exists:
            self.server.repos[repo] = [{".gitattributes": b""}]
            if fields.get("private") or fields.get("visibility") == "private":
                self.server.private.add(repo)
        self._send(409 if exists else 200, {"url": f"{self.server.address}/{repo}"})

    def info(self, match, body):
        if found := self._commit(match):
            names = [{"rfilename": name} for name in found[1]]
            sha = sha_of(match["repo"], found[0])
            self._send(200, {"id": match["repo"], "sha": sha, "siblings": names, "tags": []})

    def tree(self, match, body):
        if found := self._commit(match):
            items = found[1].items()
            files = [{"path": n, "size": len(c), "oid": blob_id(c)} for n, c in items]
            self._send(200, [{"type": "file"} | file for file in files])

    def resolve(self, match, body):
        if found := self._commit(match):
            if (content := found[1].get(match["file"])) is None:
                return self._send(404, {"error": "none"}, {"X-Error-Code": "EntryNotFound"})
            sha = sha_of(match["repo"], found[0])
            self._send(200, content, {"X-Repo-Commit": sha, "ETag": f'"{blob_id(content)}"'})

    def validate(self, match, body):
        is_valid = "license: nonsense" not in json.loads(body)["content"]
        errors = [] if is_valid else [{"message": '"license" must be one of [mit]'}]
        self._send(200 if is_valid else 400, {"errors": errors, "warnings": []})

    def preupload(self, match, body):
        files, answers = self.server.files(match["repo"]), []
        for name in (file["path"] for file in json.loads(body)["files"]):
            oid = blob_id(files[name]) if name in files else None
            answers.append({"path": name, "uploadMode": "regular", "shouldIgnore": False})
            answers[-1]["oid"] = oid
        self._send(200, {"files": answers})

    def commit(self, match, body):
        repo = match["repo"]
        files, newest = dict(self.server.files(repo)), len(self.server.repos[repo]) - 1
        for line in body.splitlines():
            key, value = json.loads(line).values()
            if key == "header" and value["parentCommit"] != sha_of(repo, newest):
                return self._send(412, {"error": "A commit has happened since. Please refresh"})
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if key == "deletedFile":
                del files[value["path"]]
        self.server.add_commit(repo, files)
        sha = sha_of(repo, newest + 1)
        self._send(
            200, {"commitUrl": f"{self.server.address}/{repo}/commit/{sha}", "commitOid": sha}
        )


ROUTES = {
    "GET": {
        rf"/api/models/{_REPO}(/revision/(?P<revision>.+))?": _Handler.info,
        rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)": _Handler.tree,
        rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)": _Handler.resolve,
    },
    "POST": {
        "/api/repos/create": _Handler.create,
        "/api/validate-yaml": _Handler.validate,
        rf"/api/models/{_REPO}/preupload/main": _Handler.preupload,
        rf"/api/models/{_REPO}/commit/main": _Handler.commit,
    },
}
