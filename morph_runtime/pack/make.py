"""Makes a pack: a temporary folder beside the target, every file written and synced, then one rename."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec
import torch
from torch import Tensor

from morph_runtime import __version__
from morph_runtime.config import EngineConfig
from morph_runtime.engine.opening import OpenModel, open_checkpoint
from morph_runtime.errors import ConfigError, IntegrityError
from morph_runtime.kernels.rung import Rung
from morph_runtime.pack.digests import layout_digest, packing_digest, source_of
from morph_runtime.pack.manifest import (
    ALIGNMENT,
    COPIED,
    FORMAT,
    MANIFEST,
    STATIC,
    FileEntry,
    Manifest,
    RungEntry,
    Source,
    is_pack,
    slots_file,
    stride_of,
)
from morph_runtime.weights.reader import CheckpointReader


def make_pack(config: EngineConfig, out: Path, say: Callable[[str], None] = lambda words: None) -> Manifest:
    """Prepare the model of `config.model` (path, awq_path, dtype) for the ladder, order and kernels of `config`.

    Holds one layer at full precision and two copies of it quantized; the checkpoint is read layer by layer.

    Args:
        config: validated settings.
        out: the pack's folder; must not exist or be empty. It appears when it is complete, or not at all.
        say: told what is being done.

    Raises:
        ConfigError: the model cannot be served like this, `out` is taken, or writing fails (disk full).
    """
    folder = Path(config.model.path)
    if is_pack(folder):
        raise ConfigError(f"'{folder}' is a pack already: give the checkpoint that it was made from.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out '{out}' exists and is not an empty folder: give another one, or remove it first.")
    model = open_checkpoint(config, folder)
    source = _identify(folder, say)
    awq = _identify(Path(config.model.awq_path), say) if config.model.awq_path else None
    try:
        with _temporary(out) as target:
            _check_space(model, target)
            files = _write(model, target, say)
            for name in COPIED:
                if (folder / name).is_file():
                    data = (folder / name).read_bytes()
                    with _synced(target / name) as file:
                        file.write(data)
                    files[name] = FileEntry(len(data), hashlib.sha256(data).hexdigest())
            manifest = _manifest(config, model, source, awq, files)
            # Read again what was read before the weights were: a change in between must not go unseen.
            _unchanged(folder, source)
            if awq is not None:
                _unchanged(Path(config.model.awq_path), awq)
            with _synced(target / MANIFEST) as file:
                file.write(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
    except OSError as error:
        raise ConfigError(f"The pack '{out}' cannot be written: {error.strerror or error}.") from None
    return manifest


def _identify(folder: Path, say: Callable[[str], None]) -> Source:
    say(f"reading {folder} for its checksums")
    reader = CheckpointReader(folder)
    try:
        return source_of(reader)
    finally:
        reader.close()


def _unchanged(folder: Path, source: Source) -> None:
    for name, entry in source.items():
        found = (folder / name).stat()
        if (found.st_size, found.st_mtime_ns) != (entry.nbytes, entry.mtime_ns):
            raise ConfigError(f"{folder / name} has changed while it was packed: try again when it is complete.")


def _check_space(model: OpenModel, target: Path) -> None:
    slots = sum(stride_of(model.slots.slot_bytes(rung)) for rung in model.slots.rungs) * model.spec.layers
    needed, free = slots + model.static.static_bytes, shutil.disk_usage(target).free
    if needed > free:
        raise ConfigError(f"The pack takes {needed >> 20} MiB, but {target.parent} has {free >> 20} MiB free.")


def _write(model: OpenModel, target: Path, say: Callable[[str], None]) -> dict[str, FileEntry]:
    """The large files; what is written is what `LayerSlots.fill` gives, checked for each layer and rung."""
    slots, layers = model.slots, model.spec.layers
    buffers = {rung: _aligned(stride_of(slots.slot_bytes(rung))) for rung in slots.rungs}
    again = {rung: _aligned(slots.slot_bytes(rung)) for rung in slots.rungs[1:]}
    writers: dict[Rung, _Writer] = {}
    with contextlib.ExitStack() as stack:
        for rung in slots.rungs:
            writers[rung] = _Writer(stack.enter_context(_synced(target / slots_file(rung))))
        for layer in range(layers):
            say(f"packing layer {layer + 1} of {layers}")
            slots.fill(layer, "full", buffers["full"])
            full = slots.bind(layer, "full", buffers["full"])
            for rung in slots.rungs:
                if rung != "full":
                    slots.fill(layer, rung, buffers[rung])
                    slots.fill(layer, rung, again[rung], full)
                    if not torch.equal(buffers[rung][: slots.slot_bytes(rung)], again[rung]):
                        raise IntegrityError(
                            f"Layer {layer}: {rung} made from the checkpoint and made from the layer at full "
                            "precision differ."
                        )
                writers[rung].write(buffers[rung])
        static = _aligned(model.static.static_bytes)
        model.static.fill(static)
        last = _Writer(stack.enter_context(_synced(target / STATIC)))
        last.write(static)
    return {STATIC: last.entry} | {slots_file(rung): writer.entry for rung, writer in writers.items()}


def _manifest(
    config: EngineConfig, model: OpenModel, source: Source, awq: Source | None, files: dict[str, FileEntry]
) -> Manifest:
    slots = model.slots
    rungs = {
        rung: RungEntry(
            slots.kernel_names(rung),
            packing_digest(slots, rung),
            layout_digest(slots.layout(rung)),
            slots.slot_bytes(rung),
            stride_of(slots.slot_bytes(rung)),
        )
        for rung in slots.rungs
    }
    return Manifest(
        format=FORMAT,
        product=__version__,
        torch=str(torch.__version__),
        architecture=model.spec.architecture,
        layers=model.spec.layers,
        dtype=str(slots.dtype).removeprefix("torch."),
        order=list(model.plan.order),
        ladder=list(config.morph.ladder),
        rungs={str(rung): entry for rung, entry in rungs.items()},
        static_layout=layout_digest(model.static.layout),
        source=source,
        files=files,
        awq=awq,
    )


class _Writer:
    """Writes tensors to a file and keeps its size and digest."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self._nbytes = file, hashlib.sha256(), 0

    def write(self, data: Tensor) -> None:
        """Append; uint8 [n]."""
        view = data.numpy().data
        self._file.write(view)
        self._digest.update(view)
        self._nbytes += view.nbytes

    @property
    def entry(self) -> FileEntry:
        return FileEntry(self._nbytes, self._digest.hexdigest())


@contextlib.contextmanager
def _synced(path: Path) -> Iterator[BinaryIO]:
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _temporary(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` if all goes well, and is removed if not."""
    parent = out.absolute().parent
    if not parent.is_dir():
        raise ConfigError(f"--out '{out}': the folder {parent} does not exist.")
    target = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=parent))
    try:
        yield target
        mask = os.umask(0o022)
        os.umask(mask)
        _sync_folder(target)
        target.chmod(0o777 & ~mask)
        target.rename(out)  # takes the place of an empty folder, and fails on any other
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    _sync_folder(parent)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _aligned(nbytes: int) -> Tensor:
    """Zeroed bytes at a page's begin; uint8 [nbytes]."""
    memory = torch.zeros(nbytes + ALIGNMENT, dtype=torch.uint8)
    first = -memory.data_ptr() % ALIGNMENT
    return memory[first : first + nbytes]
