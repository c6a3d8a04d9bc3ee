"""The run folder: atomic writes, steps that are done once, content keys and a lock.

A step's result counts only when its record (`steps/NAME.json`) is there, and the record is written last. A killed run therefore
leaves nothing that a later run could take for finished.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from blockem.errors import BlockemError

if TYPE_CHECKING:
    from torch import Tensor


def content_key(*parts: Any) -> str:
    """A short hash of JSON-able parts: equal content, equal key."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_key(path: Path) -> str:
    """A short hash of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception means that no space is left; safetensors says so in its own words."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "os error 28" in str(error).lower() or "no space left on device" in str(error).lower()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a folder that is gone or without write permission, or too long a name into one sentence."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise BlockemError(f"the disk is full: {path} was not written; free some space and run the same command again") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EPERM):
            raise BlockemError(f"{path} cannot be written ({error.strerror}); choose another --out") from error
        if error.errno == errno.ENOENT:
            lost = error.filename or path.parent
            raise BlockemError(
                f"{path} cannot be written: {lost} is missing; if it was removed meanwhile, run the same command again"
            ) from error
        if error.errno == errno.ENAMETOOLONG:
            raise BlockemError(f"{path} cannot be written: its name is too long for this disk; choose a shorter --out") from error
        raise


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A scratch file beside `path` to write, which takes its place when that is done; after an error nothing of it is left.

    Its name is its own: several processes may write the same file, as they do in the cache of base values.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        scratch = Path(name)
        try:
            yield scratch
            umask = os.umask(0)
            os.umask(umask)
            scratch.chmod(0o666 & ~umask)
            scratch.replace(path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with written_whole(path) as scratch, scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write safetensors whole or not at all."""
    from safetensors.torch import save_file

    with written_whole(path) as scratch:
        save_file({name: one.contiguous() for name, one in tensors.items()}, scratch, metadata=metadata)


def strict(value: Any) -> Any:
    """The same without numbers that JSON does not know: those become null."""
    if isinstance(value, dict):
        return {name: strict(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; NaN and infinity become null."""
    write_text(path, json.dumps(strict(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically; NaN and infinity become null."""
    write_text(path, "".join(json.dumps(strict(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def read_json(path: Path, what: str = "file") -> Any:
    """Read JSON.

    Raises:
        BlockemError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BlockemError(f"{path}: no such {what}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BlockemError(f"{path}: not a JSON {what} ({error})") from error
    except OSError as error:
        raise BlockemError(f"{path}: cannot be read ({error.strerror})") from error


def scratch_of(out: Path) -> Path:
    """Where the work on `out` goes on until it is done."""
    return out.with_name(f"{out.name}.making")


def is_scratch_of(folder: Path, key: str) -> bool:
    """Whether `folder` is the scratch folder of the work that `key` names."""
    mark = folder / "key"
    return mark.is_file() and mark.read_text(encoding="utf-8") == key


def claim_scratch(folder: Path, key: str) -> None:
    """Make `folder` a scratch folder of the work that `key` names; what other work left in it is removed, its own is kept."""
    if folder.exists() and not is_scratch_of(folder, key):
        shutil.rmtree(folder)
    write_text(folder / "key", key)


def made_with(card: Path, key: str) -> bool:
    """Whether the facts beside something finished (`card`, JSON) say that it was made of what `key` names."""
    facts = read_json(card, "card") if card.is_file() else None
    return isinstance(facts, dict) and facts.get("key") == key


def check_target(path: Path) -> None:
    """Refuse a file that cannot be written, before the work whose outcome it shall hold.

    Raises:
        BlockemError: it is a folder, or what it would lie in is none or may not be written to.
    """
    if path.is_dir():
        raise BlockemError(f"{path} is a folder; give the name of a file")
    lies_in = next(parent for parent in path.absolute().parents if parent.exists())
    if not lies_in.is_dir() or not os.access(lies_in, os.W_OK):
        raise BlockemError(f"{path} cannot be written: {lies_in} is no folder that you may write to; choose another file")


def check_replaceable(out: Path, mark: str, what: str) -> None:
    """Refuse to write over anything but nothing, an empty folder, or another one that holds `mark`: the whole folder is replaced.

    Args:
        what: is made, such as "judge".

    Raises:
        BlockemError: with what stands there.
    """
    if out.exists() and not out.is_dir():
        raise BlockemError(f"{out} is a file; choose a folder of the {what}'s own with --out")
    if out.is_dir() and any(out.iterdir()) and not (out / mark).is_file():
        raise BlockemError(f"{out} holds other files and no {what}, and they would be lost; choose a folder of the {what}'s own with --out")


@contextmanager
def held(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file `path`, after `waiting()` and a wait where another process holds it; the file is gone afterwards.

    The lock is the kernel's, so one that a killed process held is free.
    """
    while True:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("w")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(path, file):  # who held it has removed it meanwhile
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@dataclass
class RunFolder:
    """A folder that one run writes at a time."""

    path: Path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder; the lock is the kernel's, so a killed process leaves none behind."""
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("w")
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise BlockemError(f"{self.path} is in use by another blockem run; wait for it or choose another --out") from error
            yield
        finally:
            file.close()

    def finished(self, step: str, key: str, outputs: list[str]) -> dict[str, Any] | None:
        """The step's record if it was finished with the same key and its files are still there."""
        path = self.path / "steps" / f"{step}.json"
        if not path.is_file():
            return None
        try:
            record: Any = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return None
        if not isinstance(record, dict) or record.get("key") != key or "result" not in record:
            return None
        if not all((self.path / output).exists() for output in outputs):
            return None
        sealed = record.get("sealed", {})
        return record if all(self._seal(output) == seal for output, seal in sealed.items()) else None

    def step(self, name: str, key: str, outputs: list[str], work: Callable[[], Any], sealed: Iterable[str] = ()) -> tuple[Any, bool]:
        """Do `work` unless it was done with this key; returns its JSON-able result and whether it was reused.

        Args:
            outputs: what must be there for the step to count as done.
            sealed: files (those that `work` wrote) that must also be as it left them: a later step of the same name, killed half-way, may
                have replaced some.
        """
        record = self.finished(name, key, outputs)
        if record is not None:
            return record["result"], True
        result = work()
        record = {"step": name, "key": key, "outputs": outputs, "result": result}
        seals = {output: seal for output in sealed if (seal := self._seal(output))}
        write_json(self.path / "steps" / f"{name}.json", {**record, **({"sealed": seals} if seals else {})})
        return result, False

    def _seal(self, output: str) -> str:
        path = self.path / output
        return file_key(path) if path.is_file() else ""
