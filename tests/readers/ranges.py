"""A file server on this machine's loopback that answers byte ranges, as the Hub and object stores do, and counts bytes."""

import gzip
import re
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any


class Handler(SimpleHTTPRequestHandler):
    server: "RangeServer"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not path.is_file() or (asked and not self.server.ranges):
            return super().do_GET()
        data = part = path.read_bytes()
        if asked:
            begin = int(asked[1])
            part = data[begin : int(asked[2]) + 1]
            self.send_response(206 if part else 416)
            here = f"{begin}-{begin + len(part) - 1}" if part else "*"
            self.send_header("Content-Range", f"bytes {here}/{len(data)}")
        else:
            self.send_response(200)
            self.send_header("Content-Type", self.guess_type(path))
            if self.server.compressed and "gzip" in self.headers.get("Accept-Encoding", ""):
                part = gzip.compress(data)
                self.send_header("Content-Encoding", "gzip")
        self.server.sent[path.name] = self.server.sent.get(path.name, 0) + len(part)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


class RangeServer(ThreadingHTTPServer):
    """Serves `directory` at `url` until it is left; `sent` has the bytes that each file took. `compressed`: whole files."""

    def __init__(self, directory: Path, ranges: bool = True, compressed: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(directory)))
        self.ranges, self.compressed, self.sent = ranges, compressed, dict[str, int]()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "RangeServer":
        Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.shutdown()
        self.server_close()
