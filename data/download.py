"""Download of one file: resumed, verified, and given up when nothing comes any more."""

import http.client
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from data.files import other_kind
from storage.files import one_line

logger = logging.getLogger(__name__)

TIMEOUT = 20.0  # seconds without an answer or without a byte


def download(url: str, path: str | os.PathLike, is_intact: Callable[[Path], bool], *, timeout: float = TIMEOUT) -> None:
    """Download `url` to `path`, which appears only when complete and found intact by `is_intact(file)`.

    What has come so far is kept in `path`.part. A connection that breaks is taken up again where it ended, in this
    call as long as each attempt brings something, and in the next call otherwise. A complete but damaged file is
    thrown away; if part of it was from an earlier attempt, the download starts once more from the beginning.

    Raises OSError, in one line, where there is no answer within `timeout` seconds or the file is not intact.
    """
    part = Path(f"{path}.part")
    resumed = part.exists()
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            complete = _fetch(url, part, timeout)
        except (OSError, http.client.HTTPException) as error:
            if not part.exists() or part.stat().st_size <= before:
                raise OSError(f"{url}: {one_line(error)}") from error
            logger.warning("%s: %s; going on from byte %d", url, one_line(error), part.stat().st_size)
            resumed = True
            continue
        if not complete:
            if part.stat().st_size <= before:
                raise OSError(f"{url}: the connection closed at byte {before}")
            resumed = True
            continue
        if is_intact(part):
            os.replace(part, path)
            return
        what = other_kind(part, Path(path).suffix)
        part.unlink()
        if not resumed:
            raise OSError(f"{url}: what came is not the expected file" + (f" but {what}" if what else ""))
        logger.warning("%s: the resumed download is damaged, starting afresh", url)
        resumed = False


def _fetch(url: str, part: Path, timeout: float) -> bool:
    """Append to `part` what is missing of `url`; return whether everything has come that the server announced."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "DyART"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing lies beyond what we have
            return True
        raise
    with response:
        continues = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        have = have if continues else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with (
            open(part, "ab" if continues else "wb") as stream,
            tqdm(desc=part.stem, initial=have, total=total, unit="B", unit_scale=True) as bar,
        ):
            while chunk := response.read(1 << 16):
                stream.write(chunk)
                bar.update(len(chunk))
    return total is None or part.stat().st_size >= total
