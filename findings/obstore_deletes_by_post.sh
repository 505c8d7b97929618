#!/usr/bin/env bash
# obstore 0.12.1, delete of one object in S3.
# One would expect DELETE /bucket/key, which the protocol has for one object.
# obstore sends POST /bucket?delete with the key in an XML body, also for a single key, and never DELETE.
# It hurts whoever stands between: a proxy or rule that knows deletions by the method DELETE sees none,
# and a stand-in of S3 without the bulk request deletes nothing.
# Our product's tests expect the POST, and its writers do their work also where deleting is refused.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q obstore==0.12.1

NO_PROXY=127.0.0.1 timeout 60 venv/bin/python - <<'EOF'
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from obstore.store import S3Store

DONE = b"<DeleteResult><Deleted><Key>folder/one</Key></Deleted></DeleteResult>"
asked = []


class Bucket(BaseHTTPRequestHandler):
    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        asked.append((self.command, self.path, body.decode()))
        self.send_response(200 if self.command == "POST" else 204)
        if self.command == "POST":
            self.send_header("Content-Length", str(len(DONE)))
        self.end_headers()
        if self.command == "POST":
            self.wfile.write(DONE)

    do_POST = do_DELETE = answer

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
threading.Thread(target=server.serve_forever, daemon=True).start()
store = S3Store(
    "bucket",
    endpoint=f"http://127.0.0.1:{server.server_port}",
    region="us-east-1",
    skip_signature=True,
    client_options={"allow_http": True},
)
store.delete("folder/one")
server.shutdown()
for request in asked:
    print(*request)
if [(method, path) for method, path, _ in asked] != [("POST", "/bucket?delete")] or "folder/one" not in asked[0][2]:
    sys.exit("Changed: obstore no longer deletes one object by one POST ?delete.")
EOF
