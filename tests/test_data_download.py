"""Downloads against a server on this machine that behaves badly in the ways servers do."""

import hashlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from data.download import download

CONTENT = np.random.default_rng(0).bytes(300_000)


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT; the server's attributes say how badly."""

    def do_GET(self) -> None:
        server = self.server
        asked = self.headers.get("Range")
        server.requests.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges else 0
        if self.path != "/file":
            self.send_error(404)
            return
        if start >= len(CONTENT):
            self.send_error(416)
            return
        body = CONTENT[start:] if not server.wrong else CONTENT[start:][::-1]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.breaks_after])
        self.wfile.flush()
        if server.stalls:
            server.over.wait(30)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.ranges, server.wrong, server.breaks_after, server.stalls = [], True, False, None, False
    server.over = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/file"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


def is_intact(path: Path) -> bool:
    return hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(CONTENT).digest()


def check_complete(folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert (folder / "file").read_bytes() == CONTENT


def test_a_whole_file(server, tmp_path):
    download(server.url, tmp_path / "file", is_intact)
    check_complete(tmp_path)
    assert server.requests == [None]


def test_a_connection_that_breaks_is_taken_up_again(server, tmp_path):
    server.breaks_after = 100_000
    download(server.url, tmp_path / "file", is_intact)
    check_complete(tmp_path)
    assert server.requests == [None, "bytes=100000-", "bytes=200000-"]


def test_a_server_without_ranges_is_asked_from_the_start(server, tmp_path):
    server.ranges = False
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    download(server.url, tmp_path / "file", is_intact)
    check_complete(tmp_path)


def test_a_server_that_always_breaks_at_the_same_place_is_given_up(server, tmp_path):
    server.ranges, server.breaks_after = False, 5000
    with pytest.raises(OSError, match=f"{server.url}: the connection closed at byte 5000"):
        download(server.url, tmp_path / "file", is_intact)
    assert len(server.requests) == 2 and not (tmp_path / "file").exists()


def test_the_next_call_goes_on_with_what_has_come(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT[:250_000])
    download(server.url, tmp_path / "file", is_intact)
    check_complete(tmp_path)
    assert server.requests == ["bytes=250000-"]


def test_a_part_that_is_already_complete_is_used(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    download(server.url, tmp_path / "file", is_intact)
    check_complete(tmp_path)


@pytest.mark.parametrize("length", [1000, len(CONTENT), len(CONTENT) + 10])
def test_a_damaged_part_is_thrown_away_and_the_download_starts_afresh(server, tmp_path, length):
    (tmp_path / "file.part").write_bytes(bytes(length))
    download(server.url, tmp_path / "file", is_intact)
    check_complete(tmp_path)
    assert server.requests == [f"bytes={length}-", None]


def test_a_wrong_file_is_not_kept(server, tmp_path):
    server.wrong = True
    with pytest.raises(OSError, match=f"{server.url}: what came is not the expected file"):
        download(server.url, tmp_path / "file", is_intact)
    assert not list(tmp_path.iterdir())


def test_a_page_in_the_place_of_the_file_is_told_for_what_it_is(tmp_path):
    page = tmp_path / "page"
    page.write_bytes(b"<!DOCTYPE html><title>Please log in")
    with pytest.raises(OSError, match="not the expected file but a web page"):
        download(page.as_uri(), tmp_path / "data.zip", is_intact)


def test_a_server_that_falls_silent_is_given_up_after_the_timeout(server, tmp_path):
    server.stalls, server.breaks_after = True, 5000
    began = time.monotonic()
    with pytest.raises(OSError, match=f"{server.url}: .*timed out"):
        download(server.url, tmp_path / "file", is_intact, timeout=0.3)
    assert time.monotonic() - began < 20
    assert not (tmp_path / "file").exists()


def test_no_such_file_and_no_server(server, tmp_path):
    with pytest.raises(OSError, match="HTTP Error 404"):
        download(server.url + "s", tmp_path / "file", is_intact)
    with pytest.raises(OSError, match="http://127.0.0.1:9/file: .*refused"):
        download("http://127.0.0.1:9/file", tmp_path / "file", is_intact)
    assert not list(tmp_path.iterdir())
