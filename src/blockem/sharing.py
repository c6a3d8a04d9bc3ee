"""Steps that several run folders have in common, done once: each is kept in one place by content and adopted from there.

A step's key names everything that it depends on, so a record with the same key is the same work. Files are copied, weights linked where
the file system can; everything is renamed into place, and the record comes last, as in any run folder.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockem.store import RunFolder, disk_errors, held, is_scratch_of, scratch_of, write_json

SHARED_STEPS = ("sae", "plain", "discover", "contrasts-blocked", "contrasts-anchor", "evaluate-base", "evaluate-plain")
MEASURED = "measurements.jsonl"  # what discovery has measured so far
LINKED = ".safetensors"  # never written in place, so that two names for one file cannot disturb each other


@dataclass
class SharingFolder(RunFolder):
    """A run folder that takes the steps of `SHARED_STEPS` from `shared` and leaves its own there.

    A step that another process is at is waited for, and then taken.

    Attributes:
        say: is told when this one waits.
    """

    shared: Path
    say: Callable[[str], None] = lambda _: None

    def step(self, name: str, key: str, outputs: list[str], work: Callable[[], Any], sealed: Iterable[str] = ()) -> tuple[Any, bool]:
        if name not in SHARED_STEPS:
            return super().step(name, key, outputs, work, sealed)
        kept = RunFolder(self.shared / f"{name}-{key}")
        record = kept.finished(name, key, outputs)
        if record is None:
            with held(self.shared / f".{name}-{key}.lock", lambda: self.say(f"{name}: another run is at it; waiting")):
                record = kept.finished(name, key, outputs)  # whoever was waited for has left it
                if record is None:
                    if self.finished(name, key, outputs) is None:
                        self._inherit(name, key)
                    done = super().step(name, key, outputs, work, sealed)
                    self._leave(name, key, outputs, kept)
                    return done
        if self.finished(name, key, outputs) is None:
            take(kept.path, self.path, tops(outputs))
            write_json(self.path / "steps" / f"{name}.json", record)
        return super().step(name, key, outputs, work, sealed)

    def _inherit(self, name: str, key: str) -> None:
        """Go on with what a sibling had begun of this step when it was killed or failed: nobody else is at it while the lock is held."""
        own = scratch_of(self.path / name)
        if not is_scratch_of(own, key):
            for other in sorted(self.path.parent.glob(f"*/{own.name}")):
                if other != own and is_scratch_of(other, key):
                    shutil.rmtree(own, ignore_errors=True)
                    with disk_errors(own):
                        self.path.mkdir(parents=True, exist_ok=True)
                        other.rename(own)
                    return
        if name == "discover" and not (self.path / MEASURED).is_file():
            begun = sorted(self.path.parent.glob(f"*/{MEASURED}"), key=lambda file: file.stat().st_mtime)
            if begun:  # whoever reads it leaves out what belongs to another key
                take(begun[-1].parent, self.path, [MEASURED])

    def _leave(self, name: str, key: str, outputs: list[str], kept: RunFolder) -> None:
        """Make a shared step of an own one, whole or not at all; where another machine has just left it, that one stays."""
        place = kept.path
        with disk_errors(place):
            self.shared.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=self.shared))
        try:
            take(self.path, scratch, [*tops(outputs), f"steps/{name}.json"])
            with disk_errors(place):
                for _ in range(2):
                    try:
                        scratch.rename(place)
                        return
                    except OSError as error:
                        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                            raise
                    if kept.finished(name, key, outputs) is not None:
                        return
                    shutil.rmtree(place, ignore_errors=True)  # a broken one: a whole one would have been taken
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def tops(outputs: Iterable[str]) -> list[str]:
    """What is to be taken for these outputs: files, and the whole folder of one in a folder (an adapter has its settings beside)."""
    return list(dict.fromkeys(name.split("/")[0] for name in outputs))


def take(source: Path, target: Path, parts: Iterable[str]) -> None:
    """Put files and folders of `source` into `target`, each renamed into place when it is whole; what was there is replaced."""
    for part in parts:
        to = target / part
        with disk_errors(to):
            to.parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=".taking-", dir=to.parent))
            try:
                if (source / part).is_dir():
                    shutil.copytree(source / part, scratch / "whole", copy_function=link_or_copy)
                    shutil.rmtree(to, ignore_errors=True)
                else:
                    link_or_copy(str(source / part), str(scratch / "whole"))
                os.replace(scratch / "whole", to)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)


def link_or_copy(source: str, target: str) -> str:
    """A hard link to weights, a copy of anything else or where there are no links."""
    if source.endswith(LINKED):
        try:
            os.link(source, target)
            return target
        except OSError:
            pass
    return shutil.copy(source, target)
