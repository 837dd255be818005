"""DVC's graph: what is stale and why, and the bookkeeping around a stage.

With flows/lock_file.py the only module that imports dvc, whose Python interface is not public: the
version is pinned.
The life of a stage:

    begin   (repository locked) remove old outputs; restore from the run cache, else
    run     (not locked, by somebody else) the stage writes its outputs; rwlock entries guard them
    commit  (repository locked) hash, check that the dependencies did not move, put into the cache,
            write the lock entry, atomically, in the order of the plan

What `dvc repro` would leave is left here byte for byte: see tests/test_pipeline.py.
"""

import json
import logging
import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

from dvc.dependency.param import ParamsDependency
from dvc.exceptions import DvcException
from dvc.lock import make_lock
from dvc.repo import Repo, lock_repo
from dvc.repo.reproduce import get_active_graph, plan_repro
from dvc.rwlock import RWLOCK_FILE, RWLOCK_LOCK, rwlock
from dvc.stage import Stage
from dvc.stage.cache import RunCacheNotFoundError
from dvc.stage.serialize import to_single_stage_lockfile
from dvc.utils.serialize import load_path, load_yaml

from flows.lock_file import LockFile
from flows.nodes import Node, Reason
from tasks.artifacts import Artifacts
from taskvec.errors import InvalidInput, TaskvecError, nearest

logging.getLogger("dvc").setLevel(logging.WARNING)  # what happens is told by the flow


UNFINISHED = re.compile(r"\.[\w-]{22}\.tmp", re.ASCII)


class StageChanged(TaskvecError):
    """A dependency moved while its stage ran."""


class Dag:
    """The graph of one checkout. Thread-safe: one lock guards the one `Repo`."""

    def __init__(self, root: Path) -> None:
        """Load the graph below ``root``, the directory of dvc.yaml and the working directory."""
        self._root = root
        self._mutex = threading.RLock()
        try:
            self._repo = Repo(str(root), _wait_for_lock=True)
            self._graph = get_active_graph(self._repo.index.graph)
            # `Repo.stage.collect` would read the files a second time
            main = [s for s in self._repo.index.stages if Path(s.path) == root / "dvc.yaml"]
        except DvcException as error:
            raise InvalidInput(f"DVC cannot load the graph: {_flat(error)}") from None
        self._stages = {self._address(stage): stage for stage in self._graph}
        self._contents: dict[str, tuple[tuple[int, int, int], Any]] = {}
        for stage in self._graph:
            for dep in stage.deps:
                if isinstance(dep, ParamsDependency):  # DVC reads the file for each stage, twice
                    dep.read_params = partial(self._read_params, dep)
        self._main = [self._address(stage) for stage in plan_repro(self._graph, main)]
        rest = [self._address(stage) for stage in plan_repro(self._graph)]
        self.order = list(dict.fromkeys([*self._main, *rest]))
        position = {self._stages[address].name: i for i, address in enumerate(self.order)}
        self._lock_files = {
            path: LockFile(Path(path), position)
            for path in {self._lock_path(stage) for stage in self._stages.values()}
        }
        self._saved = {address: _remember(stage) for address, stage in self._stages.items()}
        self._retracted = _retracted(root)

    def plan(self, targets: Iterable[str] = ()) -> list[Node]:
        """Return the stages that targets need, in the order in which `dvc repro` would run them.

        Args:
            targets: names of stages, tasks, edits or of ``results``; none: all of dvc.yaml and what
                it needs, as for `dvc repro`.

        Raises:
            InvalidInput: a target names nothing.
        """
        wanted = [address for target in targets for address in self._match(target)]
        if wanted:
            needed = plan_repro(self._graph, [self._stages[address] for address in wanted])
            addresses = {self._address(stage) for stage in needed}
        else:
            addresses = set(self._main)
        with self._mutex:
            nodes = [self._node(address) for address in self.order if address in addresses]
        stale = {node.address for node in nodes if node.reasons}
        for node in nodes:
            above = [self._stages[a].name for a in node.upstream if a in stale]
            if above and not node.reasons:
                words = f"{above[0]} will run" + (
                    f" (and {len(above) - 1} more)" * (len(above) > 1)
                )
                node.reasons.append(Reason("upstream", words))
                stale.add(node.address)
        return nodes

    def entries(self) -> dict[str, dict[str, Any]]:
        """Return what the lock files record: address -> entry (cmd, deps, params, outs)."""
        result = {}
        for path in sorted(self._lock_files):
            stages = (load_yaml(path) if Path(path).is_file() else {}).get("stages", {})
            for address, stage in self._stages.items():
                if self._lock_path(stage) == path and stage.name in stages:
                    result[address] = stages[stage.name]
        return result

    def why(self, address: str) -> list[Reason]:
        """Return why a stage itself is stale, without its upstream; empty if it is not."""
        stage = self._stages[address]
        if not any(out.hash_info for out in stage.outs):
            return [Reason("never run", "never run")]
        reasons = []
        if stage.cmd_changed:
            reasons.append(Reason("command", "its command changed"))
        for dep in stage.deps:
            if isinstance(dep, ParamsDependency):
                reasons += self._changed_params(dep)
            elif status := self._status(dep):
                reasons.append(Reason("data", f"{self._relative(dep)} is {_word(status)}"))
        reasons += [
            Reason("retracted", f"its output {self._relative(out)} is retracted: {bad}")
            for out in stage.outs
            if (bad := self._retracted.get(_hash(out)))
        ]
        reasons += [
            Reason("output", f"its output {self._relative(out)} is {_word(status)}")
            for out in stage.outs
            if (status := self._status(out))
        ]
        return reasons

    def begin(self, address: str) -> str:
        """Prepare a stage; return "skip", "restored" (from the run cache) or "run".

        After "run" the caller does the work and then calls `commit`; after "restored" it calls
        `commit` at once.
        """
        with self._locked():
            stage = self._stages[address]
            # Never go on with what an earlier attempt left in the object: with the new hashes of
            # the dependencies in it, the run cache would hand back the old outputs for them.
            _recall(stage, self._saved[address])
            if not self.why(address):
                return "skip"
            stage.remove_outs(ignore_remove=False)
            if self._restore(stage):
                if not any(_hash(out) in self._retracted for out in stage.outs):
                    return "restored"
                stage.remove_outs(ignore_remove=False)
            self._save_deps(stage)
            for out in stage.outs:
                Path(out.fs_path).parent.mkdir(parents=True, exist_ok=True)
            return "run"

    @contextmanager
    def guard(self, address: str, owner: str) -> Iterator[None]:
        """Keep other DVC commands off a stage's files while it runs."""
        stage = self._stages[address]
        read = [dep.fs_path for dep in stage.deps if not isinstance(dep, ParamsDependency)]
        write = [out.fs_path for out in stage.outs]
        stack = ExitStack()
        with self._mutex:
            stack.enter_context(
                rwlock(
                    self._repo.tmp_dir, self._repo.fs, f"{owner} {address}", read, write,
                    self._repo.config["core"].get("hardlink_lock", False),
                )
            )  # fmt: skip
        try:
            yield
        finally:
            with self._mutex:
                stack.close()

    def commit(self, address: str) -> dict[str, str]:
        """Hash and cache the outputs of a stage and record it; return path -> md5 of each.

        Raises:
            StageChanged: a dependency is not what it was when the stage began.
        """
        with self._locked():
            stage = self._stages[address]
            before = [_hash(dep) for dep in stage.deps]
            try:
                stage.save(
                    run_cache=all(o.use_cache or o.is_metric or o.is_plot for o in stage.outs)
                )
            except DvcException as error:
                raise TaskvecError(f"{stage.name}: {_flat(error)}") from None
            moved = [
                self._relative(dep)
                for dep, old in zip(stage.deps, before, strict=True)
                if _hash(dep) != old
            ]
            if moved:
                raise StageChanged(f"{moved[0]} changed while {stage.name} ran; run again")
            self._refuse_retracted(stage)
            stage.commit()
            return self._record(address)

    def inputs(self, address: str) -> dict[str, str]:
        """Return path -> md5 of a stage's file dependencies, as last hashed."""
        return {
            self._relative(dep): str(dep.hash_info.value)
            for dep in self._stages[address].deps
            if not isinstance(dep, ParamsDependency) and dep.hash_info
        }

    def repair(self) -> None:
        """Remove what a kill of any DVC command may leave.

        One is a truncated rwlock file: DVC rewrites it in place and then refuses to work for ever.
        Whoever writes it holds its guard, which is held here: nobody is writing. Another are links
        to the cache beside outputs, under the name that they have before they are renamed.
        """
        places = {Path(out.fs_path).parent for stage in self._stages.values() for out in stage.outs}
        if any(_unfinished(place) for place in places):
            with self._locked():  # nobody is linking
                for path in [path for place in places for path in _unfinished(place)]:
                    path.unlink(missing_ok=True)
        path = Path(self._repo.tmp_dir) / RWLOCK_FILE
        guard = make_lock(str(path.with_name(RWLOCK_LOCK)), tmp_dir=self._repo.tmp_dir, wait=True)
        with self._mutex, guard:
            try:
                json.loads(path.read_text() or "broken")
            except FileNotFoundError:
                return
            except ValueError:
                path.unlink()

    def _refuse_retracted(self, stage: Stage) -> None:
        for out in stage.outs:
            if why := self._retracted.get(_hash(out)):
                raise TaskvecError(
                    f"{stage.name} made the retracted bytes of {self._relative(out)} again "
                    f"({why}); change its data or parameters in params.yaml"
                )

    def _record(self, address: str) -> dict[str, str]:
        """Write the lock entry of a committed stage; return path -> md5 of its outs."""
        stage = self._stages[address]
        self._write(stage, to_single_stage_lockfile(stage))
        self._saved[address] = _remember(stage)
        return {self._relative(out): str(out.hash_info.value) for out in stage.outs}

    def _write(self, stage: Stage, entry: dict[str, Any]) -> None:
        self._lock_files[self._lock_path(stage)].write(stage.name, entry)

    def _status(self, item: Any) -> dict[str, str]:
        """Return what is wrong with a file; nothing if it is as recorded."""
        return dict(item.status())

    def _restore(self, stage: Stage) -> bool:
        """Take a stage's outputs from the run cache, if it has them."""
        try:
            self._repo.stage_cache.restore(stage)
        except RunCacheNotFoundError:
            return False
        return True

    def _save_deps(self, stage: Stage) -> None:
        """Hash the dependencies of a stage."""
        stage.save_deps()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._mutex, lock_repo(self._repo):
            yield

    def _match(self, target: str) -> list[str]:
        """Return the addresses that a target means: its last stages."""
        if target == "results":
            found = [a for a in self.order if a.startswith("results/")]
        else:
            found = [a for a in self.order if target in (a, self._stages[a].name)]
        if not found:
            in_main = set(self._main)
            named = [a for a in self.order if a in in_main and target in _names(self._stages[a])]
            found = [a for a in named if not any(a in self._upstream(b) for b in named)]
        if not found:
            known = {name for a in self._main for name in _names(self._stages[a])}
            raise InvalidInput(f"nothing is called {target!r}; {nearest(target, known)}, results")
        return found

    def _upstream(self, address: str) -> list[str]:
        return [self._address(stage) for stage in self._graph.successors(self._stages[address])]

    def _node(self, address: str) -> Node:
        stage = self._stages[address]
        meta = stage.meta or {}
        params = {
            f"{dep.def_path}:{key}" if dep.def_path != "params.yaml" else key: value
            for dep in stage.params
            for key, value in self._values(dep).items()
        }
        return Node(
            name=stage.name,
            address=address,
            command=stage.cmd if isinstance(stage.cmd, str) else " && ".join(stage.cmd or []),
            gpus=int(meta.get("gpu", 0)),
            timeout=float(meta.get("timeout", 3600)),
            upstream=sorted(self._upstream(address)),
            deps=[self._relative(d) for d in stage.deps if not isinstance(d, ParamsDependency)],
            outs=[self._relative(out) for out in stage.outs],
            params=params,
            reasons=self.why(address),
            meta=dict(meta),
        )

    def _changed_params(self, dep: Any) -> list[Reason]:
        old, new = dep.hash_info.value or {}, self._values(dep)
        is_code = dep.def_path == "code.yaml"
        reasons = []
        for key in dep.params:
            if key in new and key in old and new[key] == old[key]:
                continue
            if is_code and key not in ("python",) and not key.startswith(("packages.", "pictures")):
                reasons.append(Reason("code", "its code changed"))
            else:
                reasons += [
                    Reason("params", words)
                    for words in _differences(key, old.get(key), new.get(key))
                ]
        return reasons

    def _values(self, dep: Any) -> dict[str, Any]:
        """Return the present values of a parameter dependency."""
        content = self._content(dep)
        result = {}
        for key in dep.params:
            value = content
            try:
                for part in key.split("."):
                    value = value[part]
            except (KeyError, TypeError):
                continue
            result[key] = value
        return result

    def _content(self, dep: Any) -> Any:
        """Return what a file of parameters holds; it is read again if it has changed."""
        path = Path(dep.fs_path)
        if not path.is_file():
            return {}
        info = path.stat()
        state = info.st_ino, info.st_size, info.st_mtime_ns
        if self._contents.get(dep.fs_path, ((0, 0, 0),))[0] != state:
            self._contents[dep.fs_path] = state, load_path(dep.fs_path, dep.fs)
        return self._contents[dep.fs_path][1]

    def _read_params(self, dep: Any, **_: Any) -> dict[str, Any]:
        """Return what DVC's own `read_params` returns."""
        return deepcopy(self._values(dep))

    def _address(self, stage: Stage) -> str:
        file = os.path.relpath(stage.path, self._root)
        return stage.name if file == "dvc.yaml" else f"{file}:{stage.name}"

    def _relative(self, item: Any) -> str:
        return os.path.relpath(item.fs_path, self._root)

    def _lock_path(self, stage: Stage) -> str:
        return str(Path(stage.path).with_suffix(".lock"))


def _retracted(root: Path) -> dict[str, str]:
    """Return md5 -> why of what must not be used any more."""
    if not Artifacts(root).retractions().is_file():
        return {}
    from flows import retractions

    return retractions.load(Artifacts(root).top).reasons()


def _names(stage: Stage) -> set[str]:
    """Return what a stage may be called: its module, its item and the item without the seed."""
    words = str(stage.cmd).split()
    if words[:3] != ["python", "-m", "tasks"] or len(words) < 4:
        return {stage.name}
    _, _, _, name, *items = words
    return {name, *items, *(item.rpartition("-")[0] for item in items if "-" in item)}


def _remember(stage: Stage) -> list[tuple[Any, Any, Any]]:
    return [(x.hash_info, x.meta, x.obj) for x in (*stage.deps, *stage.outs)]


def _recall(stage: Stage, saved: list[tuple[Any, Any, Any]]) -> None:
    for item, (hash_info, meta, obj) in zip((*stage.deps, *stage.outs), saved, strict=True):
        item.hash_info, item.meta, item.obj = hash_info, meta, obj


def _hash(dep: Any) -> Any:
    return dep.hash_info.value


def _word(status: dict[str, str]) -> str:
    word = next(iter(status.values()))
    return {"modified": "changed", "deleted": "missing", "new": "new"}.get(word, word)


def _differences(key: str, old: Any, new: Any) -> list[str]:
    """Return what changed below a key, in words, with old and new values."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            words
            for name in [*new, *(n for n in old if n not in new)]
            if old.get(name) != new.get(name)
            for words in _differences(f"{key}.{name}", old.get(name), new.get(name))
        ]
    return [f"{key} changed: {_brief(old)} -> {_brief(new)}"]


def _brief(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unfinished(directory: Path) -> list[Path]:
    """Return the links that DVC did not come to rename."""
    return [path for path in directory.glob(".*.tmp") if UNFINISHED.fullmatch(path.name)]


def _flat(error: Exception) -> str:
    return " ".join(str(error).split())
