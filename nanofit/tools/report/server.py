"""The report of runs that train, served on this machine alone: a page that asks for news."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from urllib.parse import parse_qs, urlsplit

import numpy as np

from nanofit.errors import usage_errors
from nanofit.tools.report.charts import data_of
from nanofit.tools.report.page import page_of, texts_of

HOST = "127.0.0.1"


def server_of(load, port):
    """An HTTP server whose every answer shows what load(), which gives the runs, finds by then. port 0: any."""
    lock = Lock()  # reading on is no work for two at a time

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked = urlsplit(self.path)
            # A page elsewhere may have its own name lead here; the runs are none of its business.
            if self.headers.get("Host", "").rsplit(":", 1)[0] not in (HOST, "localhost"):
                self.send_error(403)
            elif asked.path == "/":
                with lock:
                    self._send("text/html; charset=utf-8", page_of(load(), watched=True))
            elif asked.path == "/news":
                with lock:
                    runs = load()
                    seen = "-".join(str(run.log.version) for run in runs)
                    if parse_qs(asked.query).get("seen") == [seen]:
                        self.send_response(204)
                        self.end_headers()
                    else:
                        news = {"seen": seen, "data": data_of(runs), "texts": texts_of(runs)}
                        self._send("application/json", json.dumps(news, default=_plain))
            else:
                self.send_error(404)

        def _send(self, kind, text):
            body = text.encode()
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            """Nothing: a line every other second helps nobody."""

    with usage_errors(OSError, OverflowError, prefix=f"the report can't be served at {HOST}:{port}: "):
        return ThreadingHTTPServer((HOST, port), Handler)


def _plain(values):
    """An array as a list that JSON can hold, None for nan."""
    assert isinstance(values, np.ndarray)
    return [value if np.isfinite(value) else None for value in values.tolist()]
