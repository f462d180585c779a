# SPDX-License-Identifier: Apache-2.0
"""The HTTP API of agent-sandbox's python-runtime-sandbox, on Python's own library.

GET /                  whether it serves
POST /execute          {"command": WORDS} is run without a shell
POST /upload           the multipart field `file` becomes a file
GET /download/PATH     a file
GET /list/PATH         what is in a directory
GET /exists/PATH       whether there is something

Everything is below SANDBOX_BASE_DIR, /app if that is not set.
"""

import email.parser
import email.policy
import http.server
import json
import os
import shlex
import signal
import subprocess
import sys
import urllib.parse

BASE = os.path.realpath(os.environ.get("SANDBOX_BASE_DIR", "/app"))
TIMEOUT = float(os.environ.get("SANDBOX_EXEC_TIMEOUT_SECONDS", "300"))
LARGEST = 1 << 30


class Refused(Exception):
    """An answer that is no success: a status and a body."""

    def __init__(self, status, body):
        super().__init__(status)
        self.status, self.body = status, body


def inside(path):
    """The path of the host for one of a request, which must not lead out."""
    full = os.path.realpath(os.path.join(BASE, path.lstrip("/")))
    if full != BASE and not full.startswith(BASE + os.sep):
        raise Refused(403, {"message": "Access denied: the path leads out of the sandbox's directory"})
    return full


def execute(body):
    try:
        command = json.loads(body)["command"]
        if not isinstance(command, str):
            raise TypeError("command")
    except (ValueError, TypeError, KeyError):
        raise Refused(422, {"detail": [{"loc": ["body", "command"], "msg": "a string is required"}]})
    try:
        done = subprocess.run(
            shlex.split(command), capture_output=True, cwd=BASE, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return {"stdout": "", "stderr": f"Command timed out after {TIMEOUT:g} seconds", "exit_code": 124}
    except (OSError, ValueError, IndexError) as e:
        return {"stdout": "", "stderr": f"Failed to execute command: {e}", "exit_code": 1}
    return {
        "stdout": done.stdout.decode(errors="replace"),
        "stderr": done.stderr.decode(errors="replace"),
        "exit_code": done.returncode,
    }


def upload(kind, body):
    head = b"Content-Type: " + kind.encode() + b"\r\n\r\n"
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
    parts = message.iter_parts() if message.is_multipart() else ()
    for part in parts:
        name = part.get_filename()
        if part.get_param("name", header="content-disposition") == "file" and name:
            path = inside(name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(part.get_payload(decode=True))
            return {"message": f"File '{name}' uploaded successfully."}
    raise Refused(422, {"detail": [{"loc": ["body", "file"], "msg": "a file is required"}]})


def listing(path):
    if not os.path.isdir(path):
        raise Refused(404, {"message": "Directory not found"})
    entries = []
    with os.scandir(path) as found:
        for entry in sorted(found, key=lambda e: e.name):
            stat = entry.stat(follow_symlinks=False)
            kind = "directory" if entry.is_dir(follow_symlinks=False) else "file"
            entries.append(
                {"name": entry.name, "size": stat.st_size, "type": kind, "mod_time": stat.st_mtime}
            )
    return entries


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(self.get)

    def do_POST(self):
        self.answer(self.post)

    def get(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if path == "/":
            return {"status": "ok", "message": "Sandbox Runtime is active."}
        verb, _, rest = path[1:].partition("/")
        if verb == "download":
            full = inside(rest)
            if not os.path.isfile(full):
                raise Refused(404, {"message": "File not found"})
            with open(full, "rb") as file:
                return file.read()
        if verb == "list":
            return listing(inside(rest))
        if verb == "exists":
            return {"path": rest, "exists": os.path.exists(inside(rest))}
        raise Refused(404, {"detail": "Not Found"})

    def body(self):
        """The body of the request, which may come in chunks (RFC 9112, 7.1)."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.piece(int(self.headers.get("Content-Length") or 0))
        body = bytearray()
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.piece(size, len(body))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return bytes(body)

    def piece(self, size, before=0):
        if size < 0 or before + size > LARGEST:
            self.close_connection = True
            raise Refused(413, {"detail": "Content Too Large"})
        return self.rfile.read(size)

    def post(self):
        body = self.body()
        path = urllib.parse.urlsplit(self.path).path
        if path == "/execute":
            return execute(body)
        if path == "/upload":
            return upload(self.headers.get("Content-Type", ""), body)
        raise Refused(404, {"detail": "Not Found"})

    def answer(self, work):
        try:
            status, body = 200, work()
        except Refused as e:
            status, body = e.status, e.body
        except (OSError, ValueError) as e:
            status, body = 500, {"message": f"Failed: {e}"}
        binary = isinstance(body, bytes)
        data = body if binary else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if binary else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def main():
    # The first process of a container is not ended by a signal that it does not handle.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8888
    http.server.ThreadingHTTPServer(("", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
