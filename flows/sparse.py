"""Graphs of checkouts that have not got every file.

The driver of a cluster keeps the books of stages whose files lie in the remote; a host has just
the files of the stage that it does.
"""

import os
from collections.abc import Iterable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.meta import Meta

from flows.dag import Dag, ParamsDependency, StageChanged, to_single_stage_lockfile
from flows.nodes import Node, Reason
from flows.remotes import Remote
from taskvec.atomic import sync
from taskvec.errors import InvalidInput, MissingArtifact, TaskvecError


class _Elsewhere(Dag):
    """A graph whose files come from the remote."""

    @cached_property
    def remote(self) -> Remote:
        """Where the files lie that are not here."""
        return Remote(self._repo)

    @cached_property
    def _made(self) -> dict[str, tuple[str, Any]]:
        """The stage, by address, and the output of every path that a stage makes."""
        return {
            out.fs_path: (address, out)
            for address, stage in self._stages.items()
            for out in stage.outs
        }


class SparseDag(_Elsewhere):
    """The graph of a checkout whose files may lie in the remote alone.

    A file that is not here is what its stage made last. The lock files and the run cache are what
    they would be if every stage had run here.
    """

    def __init__(self, root: Path) -> None:
        """Load the graph below ``root``; see `Dag`."""
        super().__init__(root)
        self._lost: set[str] = set()
        self._adopted: dict[str, Any] = {}  # address -> lock entry, between `adopt` and `commit`

    def plan(self, targets: Iterable[str] = ()) -> list[Node]:
        """Return the stages that targets need, as `Dag.plan` does.

        A stage is stale, too, if another one needs a file of it that is neither here nor in the
        remote. The remote is only asked if anything is stale.
        """
        targets = list(targets)
        while True:
            nodes = super().plan(targets)
            wanted = {
                digest
                for node in nodes
                if node.reasons
                for digest in self.objects(node.address).values()
                if not self._has(digest)
            }
            try:
                lost = self.remote.missing(wanted) - self._lost if self.remote.name else set()
            except TaskvecError:  # the run itself will say it
                return nodes
            if not lost:
                return nodes
            self._lost |= lost

    def objects(self, address: str) -> dict[str, str]:
        """Return path -> md5 of the files that a stage reads and other stages made, if known."""
        return {
            self._relative(dep): _digest(self._made[dep.fs_path][1])
            for dep in self._stages[address].deps
            if dep.fs_path in self._made and self._made[dep.fs_path][1].hash_info
        }

    def maker(self, path: str) -> str:
        """Return the name of the stage that makes a file; empty if none does."""
        address, _ = self._made.get(str(self._root / path), ("", None))
        return self._stages[address].name if address else ""

    def sources(self, address: str) -> list[str]:
        """Return the paths of the files that a stage reads and no stage makes."""
        return [
            self._relative(dep)
            for dep in self._stages[address].deps
            if not isinstance(dep, ParamsDependency) and dep.fs_path not in self._made
        ]

    def upload(self, address: str, known: set[str]) -> None:
        """Send the remote what a stage reads and it has not got.

        Args:
            address: of the stage.
            known: digests that the remote has; those that are looked at here are added.

        Raises:
            MissingArtifact: a file is neither here nor there; the message says what makes it.
        """
        wanted = {path: md5 for path, md5 in self.objects(address).items() if md5 not in known}
        absent = self.remote.missing(set(wanted.values()))
        for path, md5 in wanted.items():
            if md5 in absent and not self._has(md5):
                raise MissingArtifact(
                    f"{path} is neither here nor in {self.remote}; {self.maker(path)} makes it: "
                    f"`taskvec run {self.maker(path)}`"
                )
        if absent:
            self.remote.push(absent)
        known |= set(wanted.values())

    def adopt(self, address: str, entry: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Take over what a host made of a stage; `commit` then records it.

        Args:
            address: of the stage.
            entry: of the host's lock file.
            files: path -> content of outputs that came with it; the others are in the remote.
        """
        outs = [self._relative(out) for out in self._stages[address].outs]
        for path, content in files.items():
            parts = Path(path).parts
            if ".." in parts or not any(Path(path).is_relative_to(out) for out in outs):
                raise TaskvecError(f"a host sent {path}, which is no output of {address}")
            _write(self._root / path, content)
        self._adopted[address] = entry

    def commit(self, address: str) -> dict[str, str]:
        """Record a stage: as `Dag.commit` if it ran here, else what was adopted.

        Raises:
            StageChanged: the host had other dependencies or parameters than there are here.
        """
        entry = self._adopted.pop(address, None)
        if entry is None:
            return super().commit(address)
        with self._locked():
            stage = self._stages[address]
            self._fill(stage, entry)
            ours = to_single_stage_lockfile(stage)
            if _plain(ours) != _plain(entry):
                raise StageChanged(
                    f"{stage.name} was made of something else than what is here now "
                    f"({_difference(_plain(ours), _plain(entry))}); run again"
                )
            self._refuse_retracted(stage)
            for out in stage.outs:
                if out.exists:
                    out.commit()
            self._repo.stage_cache.save(stage)
            return self._record(address)

    def _fill(self, stage: Any, entry: Mapping[str, Any]) -> None:
        """Give the outputs the digests of an entry; those that are here are hashed."""
        recorded = {item["path"]: item for item in entry.get("outs", [])}
        for out in stage.outs:
            if out.exists:
                out.save()
                continue
            found = recorded.get(os.path.relpath(out.fs_path, stage.wdir), {})
            if not out.use_cache or "md5" not in found:
                raise TaskvecError(f"{stage.name}: the host did not send {self._relative(out)}")
            out.hash_info = HashInfo("md5", found["md5"])
            out.meta, out.obj = Meta(size=found.get("size")), None

    def _status(self, item: Any) -> dict[str, str]:
        _, maker = self._made.get(item.fs_path, ("", item))
        if not item.hash_info or not maker.use_cache or _digest(item) in self._lost:
            return super()._status(item)
        if item.exists:  # whether or not the cache has it
            return dict(item.workspace_status())
        if item.fs_path not in self._made:
            return super()._status(item)
        same = not maker.hash_info or item.hash_info.value == maker.hash_info.value
        return {} if same else {str(item): "modified"}

    def _restore(self, stage: Any) -> bool:
        """Take the outputs from the run cache, if this repository or the remote has them."""
        try:
            self._save_deps(stage)
        except MissingArtifact:
            return False
        entry = self._repo.stage_cache._load(stage)
        if not entry:
            return False
        kept = {out.fs_path for out in stage.outs if out.use_cache}
        made = self._repo.stage_cache._create_stage(entry, wdir=stage.wdir).outs
        here = [out for out in made if self._has(_digest(out))]
        elsewhere = [out for out in made if out not in here]
        if any(out.fs_path not in kept for out in elsewhere):
            return False
        if elsewhere and not self.remote.name:
            return False
        if self.remote.missing({_digest(out) for out in elsewhere}):
            return False
        for out in here:
            out.checkout()
        self._adopted[self._address(stage)] = entry
        self._fill(stage, entry)
        return True

    def _save_deps(self, stage: Any) -> None:
        for dep in stage.deps:
            maker = self._made.get(dep.fs_path)
            vars(dep).pop("get_hash", None)
            if isinstance(dep, ParamsDependency) or dep.exists or maker is None:
                dep.save()
                continue
            made = maker[1]
            if not made.hash_info:
                raise MissingArtifact(f"{self._relative(dep)} is not made yet")
            dep.hash_info, dep.meta, dep.obj = made.hash_info, made.meta, None
            # DVC's run cache would read the file to hash it
            dep.get_hash = partial(getattr, made, "hash_info")

    def _has(self, digest: str) -> bool:
        return Path(self._repo.cache.local.oid_to_path(digest)).is_file()


class HostDag(_Elsewhere):
    """The graph of a host's checkout: does one stage at a time and remembers nothing of it."""

    def __init__(self, root: Path) -> None:
        """Load the graph below ``root``; see `Dag`."""
        super().__init__(root)
        self._entries: dict[str, dict[str, Any]] = {}  # address -> what `made` returns

    def node(self, address: str) -> Node:
        """Return a stage.

        Raises:
            InvalidInput: the graph has none of that name.
        """
        if address not in self._stages:
            raise InvalidInput(f"the graph has no stage {address!r}")
        with self._mutex:
            return self._node(address)

    def place(self, address: str, deps: Mapping[str, str]) -> None:
        """Put the files that a stage reads into the checkout, from the cache.

        Args:
            address: of the stage.
            deps: path -> md5.
        """
        with self._locked():
            for path, md5 in deps.items():
                _, out = self._made[str(self._root / path)]
                before = out.hash_info, out.obj
                out.hash_info, out.obj = HashInfo("md5", md5), None
                out.checkout(force=True)
                out.hash_info, out.obj = before

    def clear(self, address: str, deps: Mapping[str, str]) -> None:
        """Remove what `place` put there, and the outputs of a stage; the cache keeps them."""
        with self._locked():
            for path in deps:
                (self._root / path).unlink(missing_ok=True)
            self._stages[address].remove_outs(ignore_remove=False)

    def made(self, address: str) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the lock entry of a committed stage, and path -> md5 of what the cache holds."""
        with self._locked():
            stage = self._stages[address]
            entry = self._entries.pop(address)
            cached = {self._relative(out): _digest(out) for out in stage.outs if out.use_cache}
            return _plain(entry), cached

    def why(self, address: str) -> list[Reason]:
        """A host always does what it is asked."""
        del address
        return [Reason("never run", "a driver asks for it")]

    def _restore(self, stage: Any) -> bool:
        del stage
        return False

    def _write(self, stage: Any, entry: dict[str, Any]) -> None:
        self._entries[self._address(stage)] = entry


def _digest(item: Any) -> str:
    return str(item.hash_info.value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Return the first thing that differs in two lock entries, in words."""
    for kind in ("cmd", "deps", "params", "outs"):
        left, right = ours.get(kind), theirs.get(kind)
        if left == right:
            continue
        if kind in ("deps", "outs") and left and right:
            names = [a["path"] for a, b in zip(left, right, strict=False) if a != b]
            return f"{kind}: {names[0] if names else len(right)}"
        return kind
    return "order"


def _write(path: Path, content: bytes) -> None:
    """Write a file so that it holds the old content or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".writing-{path.name}")
    try:
        temporary.write_bytes(content)
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
