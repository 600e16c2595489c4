"A small Weights & Biases on loopback: as much of GraphQL and of the file stream as `wandb sync` asks for, and what it was sent."
import gzip, json, re, threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Server(ThreadingHTTPServer):
    "Keeps each run's files as wandb does: a line by its number, so that a line sent again takes its own place."
    def __init__(self, hold=lambda: None, refuse=False):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url, self.hold, self.refuse = f"http://127.0.0.1:{self.server_port}", hold, refuse
        self.runs, self.received, self.asked = {}, Counter(), Counter()  # run -> file -> line -> text; lines per run; operations

    def handle_error(self, request, client_address): pass  # a client that was killed

    def history(self, run): # with the names that the run gave
        lines = self.runs.get(run, {}).get("wandb-history.jsonl", {})
        return [{k: v for k, v in json.loads(lines[n]).items() if not k.startswith("_")} for n in sorted(lines)]

    def answer(self, operation, given):
        self.asked[operation] += 1
        if operation == "UpsertBucket":
            self.runs.setdefault(given["name"], {})["config"] = given.get("config")
            project = {"id": "p", "name": given.get("project") or "llmops_kit", "entity": {"id": "e", "name": "me"}}
            return {"upsertBucket": {"inserted": True, "bucket": {"id": "b", "name": given["name"], "displayName": given["name"], "description": None,
                                                                  "config": given.get("config"), "sweepName": None, "project": project, "historyLineCount": 0}}}
        if operation == "CreateArtifact": # known already: its files need not be sent
            digest = given["input"]["digest"]
            return {"createArtifact": {"artifact": {"id": digest, "state": "COMMITTED", "artifactSequence": {"latestArtifact": {"id": digest}}}}}
        if operation == "CreateRunFiles":
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": [{"name": o, "uploadUrl": f"{self.url}/upload/{o}"} for o in given["files"]]}}
        return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}},
                "serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None, "features": []}}

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *told): pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip": body = gzip.decompress(body)
        reply = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            reply = {"data": self.server.answer(re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])[1], asked.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            run = self.path.split("/")[-2]
            for name, chunk in (json.loads(body).get("files") or {}).items():
                lines = self.server.runs.setdefault(run, {}).setdefault(name, {})
                lines.update(enumerate(chunk["content"], chunk["offset"]))
                if name == "wandb-history.jsonl":
                    self.server.received[run] += len(chunk["content"])
                    self.server.hold()
            reply = {"exitcode": None, "limits": {}}
        text = json.dumps(reply).encode()
        self.send_response(404 if self.server.refuse and self.path.endswith("/file_stream") else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_PUT = do_GET = do_POST

@contextmanager
def wandb_server(**options):
    "A server, and what a process needs in its environment to find it."
    server = Server(**options)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield server, {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40}
    finally: server.shutdown(); server.server_close()
