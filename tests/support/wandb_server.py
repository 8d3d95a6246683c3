"""A mock of W&B's server: the part of its HTTP API that training, sync and reports use.

It stores runs, their history lines by offset, summaries, artifacts by digest, files, and reports. `status`, `delay`
and `after_rows` make it fail or slow down; it answers no request while a test holds `lock`.
"""

import base64
import contextlib
import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

from tests.support.processes import children_of

ENTITY = "someone"
PROJECT_FIELDS = {"createdAt": "2026-01-01T00:00:00", "isBenchmark": False, "user": None}


def end_clients(process: int) -> None:
    """Kills the service processes that W&B started for a process: the children of its threads."""
    for child in children_of(process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


class Server:
    """Context manager that serves from threads of this process; `url` is the value for WANDB_BASE_URL."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}  # by id
        self.uses: list[tuple[str, str]] = []  # run, artifact id
        self.reports: dict[str, dict[str, Any]] = {}
        self.requests: list[tuple[str, str, str]] = []  # method, path, body
        self.files: dict[str, bytes] = {}
        self.status = 200  # 500 refuses everything
        self.delay = 0.0  # seconds before each answer
        # Called after each row with the number of rows; a ConnectionError from it drops the rest of the request.
        self.after_rows: Callable[[int], None] = lambda rows: None
        self.lock = threading.RLock()

    def __enter__(self) -> "Server":
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None: ...

            def handle(self) -> None:
                with contextlib.suppress(ConnectionError):  # a client that was killed
                    super().handle()

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                time.sleep(server.delay)
                with server.lock:
                    server.requests.append((self.command, self.path, body.decode("latin1")))
                    status = server.status
                    answer = server.answer(self.path, body) if status == 200 else {}
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = handle_any  # noqa: N815

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}"

    def history(self, run: str) -> list[dict[str, Any]]:
        """Returns the rows of a run, without W&B's internal keys."""
        rows = [json.loads(line) for line in self.runs[run]["history"]]
        return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]

    def artifacts_of(self, kind: str) -> list[dict[str, Any]]:
        return [artifact for artifact in self.artifacts.values() if artifact["artifactTypeName"] == kind]

    # ---- answers

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path.startswith("/graphql"):
            request = json.loads(body)
            variables = request.get("variables") or {}
            data: dict[str, Any] = {}
            for pattern, reply in self.replies.items():
                if pattern in request["query"].split("fragment ")[0].replace(" (", "("):
                    data |= reply(self, variables)
            return {"data": data}
        if path.endswith("/file_stream"):
            return self.file_stream(path.split("/")[-2], json.loads(body))
        self.files[path] = body
        return {}

    def file_stream(self, run: str, sent: dict[str, Any]) -> dict[str, Any]:
        stored = self.runs[run]
        for name, chunk in (sent.get("files") or {}).items():
            lines, offset = chunk["content"], chunk["offset"]
            if name == "wandb-history.jsonl":
                for index, line in enumerate(lines, offset):
                    stored["history"][index : index + 1] = [line]
                    self.after_rows(len(stored["history"]))
            elif name == "wandb-summary.json":
                stored["summary"] = json.loads(lines[-1])
        if sent.get("complete"):
            stored["exit_code"] = sent["exitcode"]
        return {"limits": {}}

    def project(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables.get("project") or variables.get("projectName") or variables.get("name") or "project"
        return {
            "id": "UHJvamVjdA==",
            "internalId": "UHJvamVjdEludGVybmFsSWQ6MTc=",
            "name": name,
            "entity": {"id": "e", "name": ENTITY},
        }

    def bucket(self, run: str) -> dict[str, Any]:
        stored = self.runs[run]
        tail = json.dumps(stored["history"][-1:])
        return {
            "id": base64.b64encode(f"Run:{run}".encode()).decode(), "name": run, "displayName": stored["displayName"],
            "description": "", "sweepName": None, "config": stored["config"], "tags": stored["tags"], "notes": "",
            "summaryMetrics": json.dumps(stored["summary"]), "historyLineCount": len(stored["history"]),
            "logLineCount": 0, "eventsLineCount": 0, "historyTail": tail, "eventsTail": "[]",
            "wandbConfig": json.dumps({"t": {}}), "project": self.project(stored),
        }  # fmt: skip

    def upsert_bucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = variables["name"]
        new = run not in self.runs
        stored = self.runs.setdefault(
            run,
            {
                "history": [],
                "summary": {},
                "config": "{}",
                "tags": [],
                "displayName": run,
                "group": None,
                "project": variables.get("project"),
                "job": None,
            },
        )
        for variable, key in (
            ("config", "config"), ("tags", "tags"), ("displayName", "displayName"), ("groupName", "group"),
            ("jobType", "job"),
        ):  # fmt: skip
            if variables.get(variable):
                stored[key] = variables[variable]
        return {"upsertBucket": {"bucket": self.bucket(run), "inserted": new}}

    def resume_status(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = variables["name"]
        bucket = self.bucket(run) if run in self.runs else None
        return {"model": {**self.project(variables), "bucket": bucket}}

    def create_artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        request = variables["input"]
        collection = request["artifactCollectionName"]
        for number, stored in self.artifacts.items():
            if (stored["artifactCollectionName"], stored["digest"]) == (collection, request["digest"]):
                stored["aliases"] = self.move_aliases(collection, request, stored.get("aliases", []))
                return {"createArtifact": {"artifact": self.artifact(number)}}
        number = base64.b64encode(f"Artifact:{len(self.artifacts)}".encode()).decode()
        version = sum(stored["artifactCollectionName"] == collection for stored in self.artifacts.values())
        self.artifacts[number] = {**request, "state": "PENDING", "version": version}
        self.artifacts[number]["aliases"] = self.move_aliases(collection, request, [])
        return {"createArtifact": {"artifact": self.artifact(number)}}

    def move_aliases(self, collection: str, request: dict[str, Any], old: list[str]) -> list[str]:
        """Moves the aliases of a request from the other versions; returns those of the new version."""
        new = [alias["alias"] for alias in request.get("aliases") or []]
        for stored in self.artifacts.values():
            if stored["artifactCollectionName"] == collection:
                stored["aliases"] = [alias for alias in stored.get("aliases", []) if alias not in new]
        return sorted({*old, *new})

    def artifact(self, number: str) -> dict[str, Any]:
        stored = self.artifacts[number]
        return {
            "id": number, "state": stored["state"], "digest": stored["digest"], "versionIndex": stored["version"],
            "artifactSequence": {
                "id": "s", "__typename": "ArtifactSequence", "name": stored["artifactCollectionName"],
                "latestArtifact": None, "project": self.project(stored),
            },
            "aliases": [], "description": None, "metadata": stored.get("metadata"), "ttlDurationSeconds": -2,
            "ttlIsInherited": True, "tags": [], "historyStep": None, "currentManifest": {"file": {"directUrl": ""}},
            "commitHash": "", "fileCount": 0, "size": 0, "createdAt": "2026-01-01T00:00:00",
            "updatedAt": "2026-01-01T00:00:00", "__typename": "Artifact", "digestAlgorithm": None,
            "artifactType": {"name": stored["artifactTypeName"]},
        }  # fmt: skip

    def commit_artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.artifacts[variables["artifactID"]]["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": self.artifact(variables["artifactID"])}}

    def use_artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        use = variables.get("input", variables)
        self.uses.append((use["runName"], use["artifactID"]))
        return {"useArtifact": {"artifact": self.artifact(use["artifactID"])}}

    def upload(self, name: str) -> dict[str, Any]:
        number = hashlib.sha256(name.encode()).hexdigest()[:12]
        return {"id": number, "uploadUrl": f"{self.url}/storage/{name}", "uploadHeaders": []}

    def manifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        answer = {"id": "m", "file": self.upload(f"manifest-{variables.get('artifactID') or 'm'}")}
        return {kind: {"artifactManifest": answer} for kind in ("createArtifactManifest", "updateArtifactManifest")}

    def artifact_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = variables["input"]["artifactFiles"]
        nodes = [
            {"node": {**self.upload(f"{file['artifactID']}/{file['name']}"), "storagePath": file["name"],
                      "uploadMultipartUrls": None, "artifact": {"id": file["artifactID"]}}}
            for file in files
        ]  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def run_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/storage/run/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}

    def upsert_view(self, variables: dict[str, Any]) -> dict[str, Any]:
        number = variables.get("id") or base64.b64encode(f"View:{len(self.reports)}".encode()).decode()
        new = number not in self.reports
        view = {
            "id": number, "type": "runs", "name": variables["name"], "displayName": variables["displayName"],
            "description": variables["description"], "spec": variables["spec"], "updatedAt": "2026-01-01T00:00:00",
            "createdAt": "2026-01-01T00:00:00", "user": {"username": ENTITY, "photoUrl": None, "name": ""},
            "project": {"id": "p", "name": variables["projectName"], "entityName": ENTITY},
        }  # fmt: skip
        self.reports[number] = view
        return {"upsertView": {"view": view, "inserted": new}}

    def views(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables.get("viewName")
        edges = [{"node": view} for view in self.reports.values() if not name or view["displayName"] == name]
        page = {"edges": edges, "pageInfo": {"endCursor": "c", "hasNextPage": False}}
        return {"project": {**self.project(variables), "allViews": page}}

    replies: ClassVar = {
        "serverInfo": lambda self, _: {
            "serverInfo": {"features": [], "cliVersionInfo": {"max_cli_version": "99.0.0"}}
        },
        "viewer": lambda self, _: {
            "viewer": {"id": "u", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}", "admin": False,
                       "name": "", "deletedAt": None, "teams": {"edges": []}, "apiKeys": {"edges": []}}
        },
        "upsertBucket": upsert_bucket,
        "bucket(name": resume_status,
        "createArtifact(": create_artifact,
        "createArtifactManifest(": manifest,
        "updateArtifactManifest(": manifest,
        "createArtifactFiles(": artifact_files,
        "commitArtifact(": commit_artifact,
        "useArtifact(": use_artifact,
        "createRunFiles(": run_files,
        "markRunFilesUploaded(": lambda self, _: {"markRunFilesUploaded": {"success": True}},
        "clientIDMapping(": lambda self, _: {"clientIDMapping": None},
        "xxhashDigestsEnabled": lambda self, _: {"entity": {"xxhashDigestsEnabled": False}},
        "query ArtifactByID(": lambda self, variables: {"artifact": self.artifact(variables["id"])},
        "query ArtifactType(": lambda self, _: {"project": {"artifact": None}},
        "upsertView(": upsert_view,
        "allViews(": views,
        "internalId": lambda self, variables: {"project": self.project(variables)},
        "query GetProjects(": lambda self, _: {
            "models": {
                "edges": [{"node": {**self.project({}), "entityName": ENTITY, **PROJECT_FIELDS}}],
                "pageInfo": {"endCursor": None, "hasNextPage": False},
            }
        },
    }  # fmt: skip
