"""The public traces: where they are, under which licence, and a folder of those that have been downloaded."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from morph_client.errors import BadInput, MorphError

_TIMEOUT_S = 30.0
_CHUNK = 1 << 18

_AZURE = "https://raw.githubusercontent.com/Azure/AzurePublicDataset"
_AZURE_AT = "790921015d50dd6aae7f7e47f39ba0e235ad6b08"
_BURST = "https://github.com/HPMLL/BurstGPT"
_BURST_AT = "5d93d820d9b6bee4e26914df003e5713538164ae"


@dataclass(frozen=True)
class PublicTrace:
    """One file that others have published. It is never part of this product: users download it themselves."""

    name: str
    """What it is called on the command line."""
    url: str
    licence_url: str
    licence: str
    sha256: str
    size: int
    """Bytes."""
    about: str
    cite: str

    @property
    def file(self) -> str:
        """The file's name at its publisher."""
        return self.url.rpartition("/")[2]


class DownloadFailed(MorphError):
    """A trace could not be downloaded, or is not what was published."""


def _azure(kind: str, sha256: str, size: int, about: str) -> PublicTrace:
    return PublicTrace(
        name=f"azure-{kind}",
        url=f"{_AZURE}/{_AZURE_AT}/data/AzureLLMInferenceTrace_{kind}.csv",
        licence_url=f"{_AZURE}/master/LICENSE",
        licence="CC-BY 4.0",
        sha256=sha256,
        size=size,
        about=about,
        cite="Azure LLM inference trace 2023; Patel et al., Splitwise, ISCA 2024",
    )


def _burst(name: str, file: str, sha256: str, size: int, about: str) -> PublicTrace:
    return PublicTrace(
        name=name,
        url=f"{_BURST}/raw/{_BURST_AT}/data/{file}",
        licence_url=f"{_BURST}/raw/main/LICENSE",
        licence="CC-BY 4.0",
        sha256=sha256,
        size=size,
        about=about,
        cite="Wang et al., BurstGPT, KDD 2025, arXiv 2401.17644",
    )


CATALOGUE = (
    _azure(
        "code", "54e9a6d2a4bd06ba1e060304b900abbc74cbea53de96506e60fe5bb4f2277fb6", 320117,
        "8,819 requests in 57 min, bursty; prompts 2,048 tokens on average, outputs 28",
    ),
    _azure(
        "conv", "2f1e5b666d4e3055fdbba98598ce2ec307767b9064e03e2fa46676dbcc7d0bf8", 719188,
        "19,366 requests in 58 min, smooth; prompts 1,155 tokens on average, outputs 211",
    ),
    _burst(
        "burstgpt-1", "BurstGPT_1.csv", "4bb3783693d0a435686fbfc885615d2349bd067239079fa4b749f2e679e12122", 52283111,
        "1.43 M requests in two months, failed ones included as rows of 0 tokens (--skip-empty)",
    ),
    _burst(
        "burstgpt-1-good", "BurstGPT_without_fails_1.csv",
        "a4d068a7113ec0290e74063a1b3447dc6001a30e4298eb313581b71006dda1f4", 51429517,
        "the same without failed requests",
    ),
)  # fmt: skip


def by_name(name: str) -> PublicTrace | None:
    """The trace of that name."""
    return next((trace for trace in CATALOGUE if trace.name == name), None)


def cache_folder() -> Path:
    """Where downloaded traces are: ``MORPH_CACHE``, else the user's cache folder."""
    if own := os.environ.get("MORPH_CACHE"):
        return Path(own) / "traces"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "morph" / "traces"


def cached_file(trace: PublicTrace) -> Path:
    """Where the trace is, or would be."""
    return cache_folder() / trace.name / trace.file


def find_trace(name: str) -> Path:
    """The file that a command's argument means: a path, or the name of a downloaded trace.

    Raises :class:`BadInput` for a name that is not downloaded.
    """
    path, trace = Path(name), by_name(name)
    if trace is None or path.exists():
        return path
    if not cached_file(trace).is_file():
        raise BadInput(f"the trace {name} is not downloaded yet: morph traces get {name}")
    return cached_file(trace)


def download(trace: PublicTrace, mirror: str = "", on_bytes: Callable[[int], None] = lambda _count: None) -> Path:
    """Puts the trace, its licence and a note on its source into the cache folder; returns the trace's path.

    A file that is there already and right is kept. ``mirror`` is the address of a folder with the files, for places
    that the publishers cannot be reached from. Raises :class:`DownloadFailed`, and :class:`BadInput` if the cache
    cannot be written.
    """
    target = cached_file(trace)
    urls = (f"{mirror.rstrip('/')}/{trace.file}", f"{mirror.rstrip('/')}/LICENSE")
    file_url, licence_url = urls if mirror else (trace.url, trace.licence_url)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not (target.is_file() and _sha256(target) == trace.sha256):
            _fetch(file_url, target, on_bytes, trace)
        _fetch(licence_url, target.parent / "LICENSE", lambda _count: None)
        note = f"{trace.file}\nFrom {trace.url}\nLicence: {trace.licence} (file LICENSE)\nCite: {trace.cite}\n"
        (target.parent / "SOURCE").write_text(note, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot write to {target.parent}: {(error.strerror or str(error)).lower()}") from None
    return target


def _fetch(url: str, target: Path, on_bytes: Callable[[int], None], expected: PublicTrace | None = None) -> None:
    """Downloads beside the target, checks, and only then takes its place."""
    if not url.startswith(("http://", "https://")):
        raise BadInput(f"'{url}' is not an address of files: write http://host/folder")
    part = target.with_name(target.name + ".part")
    try:
        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer, part.open("wb") as file:
                while piece := answer.read(_CHUNK):
                    file.write(piece)
                    on_bytes(len(piece))
        except urllib.error.HTTPError as error:
            raise DownloadFailed(f"{url} answers with status {error.code}: the file may have moved") from None
        except (urllib.error.URLError, TimeoutError, http.client.HTTPException, ConnectionError) as error:
            reason = getattr(error, "reason", error)
            raise DownloadFailed(
                f"{url} cannot be reached ({reason}): connect to the network, or name a --mirror that has the files"
            ) from None
        if expected is not None and (found := _sha256(part)) != expected.sha256:
            raise DownloadFailed(
                f"{url} is not the file that was published: its sha256 is {found[:16]}…, not {expected.sha256[:16]}…"
            )
        part.replace(target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()
