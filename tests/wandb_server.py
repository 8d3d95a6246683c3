"""A stand-in for W&B's server: as much of its HTTP API as training, sync and reports use, and it keeps what came.

Runs, their history lines by offset, summaries, artifacts by digest, files, and reports. It can be made slow, or
to fail.
"""

import base64
import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

ENTITY = "someone"
MADE = {"createdAt": "2026-01-01T00:00:00", "isBenchmark": False, "user": None}


class Server:
    """Runs in threads of this process from `with` to the end of it; `url` is WANDB_BASE_URL."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}  # by id
        self.uses: list[tuple[str, str]] = []  # run, artifact id
        self.reports: dict[str, dict[str, Any]] = {}
        self.requests: list[tuple[str, str, str]] = []  # method, path, body
        self.files: dict[str, bytes] = {}
        self.status = 200  # 500 refuses everything
        self.delay = 0.0  # seconds before each answer
        self.after_rows: Callable[[int], None] = lambda rows: None
        self.lock = threading.RLock()

    def __enter__(self) -> "Server":
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None: ...

            def handle(self) -> None:
                with contextlib.suppress(ConnectionError):  # a client that was killed
                    super().handle()

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                time.sleep(owner.delay)
                with owner.lock:
                    owner.requests.append((self.command, self.path, body.decode("latin1")))
                    status, answer = (
                        (owner.status, {}) if owner.status != 200 else (200, owner.answer(self.path, body))
                    )
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
        """The rows of a run, without W&B's own keys."""
        rows = [json.loads(line) for line in self.runs[run]["history"]]
        return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]

    def artifacts_of(self, kind: str) -> list[dict[str, Any]]:
        return [artifact for artifact in self.artifacts.values() if artifact["artifactTypeName"] == kind]

    # ---- answers

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path.startswith("/graphql"):
            asked = json.loads(body)
            variables = asked.get("variables") or {}
            data: dict[str, Any] = {}
            for word, reply in self.replies.items():
                if word in asked["query"].split("fragment ")[0].replace(" (", "("):
                    data |= reply(self, variables)
            return {"data": data}
        if path.endswith("/file_stream"):
            return self.file_stream(path.split("/")[-2], json.loads(body))
        self.files[path] = body
        return {}

    def file_stream(self, run: str, sent: dict[str, Any]) -> dict[str, Any]:
        held = self.runs[run]
        for name, part in (sent.get("files") or {}).items():
            lines, offset = part["content"], part["offset"]
            if name == "wandb-history.jsonl":
                held["history"][offset : offset + len(lines)] = lines
                self.after_rows(len(held["history"]))
            elif name == "wandb-summary.json":
                held["summary"] = json.loads(lines[-1])
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
        held = self.runs[run]
        tail = json.dumps(held["history"][-1:])
        return {
            "id": base64.b64encode(f"Run:{run}".encode()).decode(), "name": run, "displayName": held["displayName"],
            "description": "", "sweepName": None, "config": held["config"], "tags": held["tags"], "notes": "",
            "summaryMetrics": json.dumps(held["summary"]), "historyLineCount": len(held["history"]),
            "logLineCount": 0, "eventsLineCount": 0, "historyTail": tail, "eventsTail": "[]",
            "wandbConfig": json.dumps({"t": {}}), "project": self.project(held),
        }  # fmt: skip

    def upsert_bucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = variables["name"]
        new = run not in self.runs
        held = self.runs.setdefault(
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
        for theirs, ours in (
            ("config", "config"), ("tags", "tags"), ("displayName", "displayName"), ("groupName", "group"),
            ("jobType", "job"),
        ):  # fmt: skip
            if variables.get(theirs):
                held[ours] = variables[theirs]
        return {"upsertBucket": {"bucket": self.bucket(run), "inserted": new}}

    def resume_status(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = variables["name"]
        bucket = self.bucket(run) if run in self.runs else None
        return {"model": {**self.project(variables), "bucket": bucket}}

    def create_artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        wanted = variables["input"]
        collection = wanted["artifactCollectionName"]
        for number, held in self.artifacts.items():
            if (held["artifactCollectionName"], held["digest"]) == (collection, wanted["digest"]):
                held["aliases"] = self.move_aliases(collection, wanted, held.get("aliases", []))
                return {"createArtifact": {"artifact": self.artifact(number)}}
        number = base64.b64encode(f"Artifact:{len(self.artifacts)}".encode()).decode()
        version = sum(held["artifactCollectionName"] == collection for held in self.artifacts.values())
        self.artifacts[number] = {**wanted, "state": "PENDING", "version": version}
        self.artifacts[number]["aliases"] = self.move_aliases(collection, wanted, [])
        return {"createArtifact": {"artifact": self.artifact(number)}}

    def move_aliases(self, collection: str, wanted: dict[str, Any], own: list[str]) -> list[str]:
        given = [alias["alias"] for alias in wanted.get("aliases") or []]
        for held in self.artifacts.values():
            if held["artifactCollectionName"] == collection:
                held["aliases"] = [alias for alias in held.get("aliases", []) if alias not in given]
        return sorted({*own, *given})

    def artifact(self, number: str) -> dict[str, Any]:
        held = self.artifacts[number]
        return {
            "id": number, "state": held["state"], "digest": held["digest"], "versionIndex": held["version"],
            "artifactSequence": {
                "id": "s", "__typename": "ArtifactSequence", "name": held["artifactCollectionName"],
                "latestArtifact": None, "project": self.project(held),
            },
            "aliases": [], "description": None, "metadata": held.get("metadata"), "ttlDurationSeconds": -2,
            "ttlIsInherited": True, "tags": [], "historyStep": None, "currentManifest": {"file": {"directUrl": ""}},
            "commitHash": "", "fileCount": 0, "size": 0, "createdAt": "2026-01-01T00:00:00",
            "updatedAt": "2026-01-01T00:00:00", "__typename": "Artifact", "digestAlgorithm": None,
            "artifactType": {"name": held["artifactTypeName"]},
        }  # fmt: skip

    def commit_artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.artifacts[variables["artifactID"]]["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": self.artifact(variables["artifactID"])}}

    def use_artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        wanted = variables["input"]
        self.uses.append((wanted["runName"], wanted["artifactID"]))
        return {"useArtifact": {"artifact": self.artifact(wanted["artifactID"])}}

    def upload(self, name: str) -> dict[str, Any]:
        number = hashlib.sha256(name.encode()).hexdigest()[:12]
        return {"id": number, "uploadUrl": f"{self.url}/storage/{name}", "uploadHeaders": []}

    def manifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        held = {"id": "m", "file": self.upload(f"manifest-{variables.get('artifactID') or 'm'}")}
        return {kind: {"artifactManifest": held} for kind in ("createArtifactManifest", "updateArtifactManifest")}

    def artifact_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        wanted = variables["input"]["artifactFiles"]
        nodes = [
            {"node": {**self.upload(f"{file['artifactID']}/{file['name']}"), "storagePath": file["name"],
                      "uploadMultipartUrls": None, "artifact": {"id": file["artifactID"]}}}
            for file in wanted
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
        wanted = variables.get("viewName")
        edges = [{"node": view} for view in self.reports.values() if not wanted or view["displayName"] == wanted]
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
                "edges": [{"node": {**self.project({}), "entityName": ENTITY, **MADE}}],
                "pageInfo": {"endCursor": None, "hasNextPage": False},
            }
        },
    }  # fmt: skip
