"""A server, on this machine only, that shows a review page and saves what a person decides."""

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from inoculation.export import again, parse_review, read_summary
from inoculation.files import InputError, decode, write_json

LOOPBACK = "127.0.0.1"
MAX_BODY = 32 * 2**20
"""Bytes of a saved review, at most."""


def server(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server of one export's folder; `serve_forever` runs it.

    Args:
        folder: made by `export.export`.
        port: 0 takes a free one.

    Raises:
        InputError: the folder is no export.
    """
    summary = read_summary(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self._from_here() or self.path.partition("?")[0] != "/":
                self._answer(404, "not here")
                return
            try:
                page = (folder / "review.html").read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                why = error.strerror if isinstance(error, OSError) else "no UTF-8"
                self._answer(500, f"review.html: {why}; `inoculation inoculate` writes it anew")
                return
            self._answer(200, page, "text/html; charset=utf-8")

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not self._from_here() or self.headers.get("Content-Type") != "application/json":
                self._answer(403, "only this page may save")
                return
            if not (length.isascii() and length.isdecimal() and len(length) < 10 and int(length) <= MAX_BODY):
                self._answer(413, f"a review of at most {MAX_BODY} bytes is expected")
                return
            try:
                raw = decode(self.rfile.read(int(length)))
                parse_review(raw, summary.rows)
                if raw.get("data") != summary.data:
                    raise ValueError("this page shows another data set; load it again")
                write_json(folder / "review.json", {"data": raw["data"], "decided": raw["decided"]})
                told = again(folder)
            except ValueError as error:  # InputError is one
                self._answer(400, str(error))
                return
            except OSError as error:
                self._answer(500, f"not saved: {error.strerror}")
                return
            self._answer(200, f"saved: {told['inoculated']} of {told['rows']} rows are inoculated in train.jsonl")

        def _from_here(self) -> bool:
            """Whether the request names this server: a page of another site, whose name may resolve here, does not."""
            own = [f"{name}:{self.server.server_port}" for name in (LOOPBACK, "localhost")]  # type: ignore[attr-defined]
            hosts, origins = self.headers.get_all("Host", []), self.headers.get_all("Origin", [])
            return len(hosts) == 1 and hosts[0] in own and origins in ([], [f"http://{hosts[0]}"])

        def _answer(self, status: int, text: str, kind: str = "text/plain; charset=utf-8") -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("X-Frame-Options", "DENY")  # nobody clicks Save through another page
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: a person is looking at the page, not at the console."""

    try:
        return ThreadingHTTPServer((LOOPBACK, port), Handler)
    except OSError as error:
        raise InputError(f"port {port}: {error.strerror}; choose another with --port") from None
