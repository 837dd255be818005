"""Whether what is recorded is true: bytes, headers, lock entries and runs against each other.

Bytes are hashed anew; DVC's own state, which trusts the mode of a file, is not asked. Each byte is
read once: md5 for what DVC keeps, the fingerprint of weights with ``deep``.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flows import mlflow_rows, outbox
from flows.index import header
from flows.lineage import Artifact, Lineage
from flows.records import Execution, Records, chunks, digest_of_entry, md5_of, parsed
from taskvec.atomic import sync
from taskvec.errors import InvalidInput

# MLflow's file is made of the log of runs, and can be made again.
ANEW = "mv mlflow.db mlflow.db.bad && rm .taskvec/outbox/sent.json-lines && taskvec backfill"


@dataclass(frozen=True)
class Finding:
    """Something that is not what the record says.

    Attributes:
        node: the file or the entry.
        problem: what was found and what was expected.
        repair: the command that mends it.
        md5: of the bytes that are wrong or missing; empty if it is not about bytes.
    """

    node: str
    problem: str
    repair: str
    md5: str = ""


@dataclass(frozen=True)
class Verified:
    """What was looked at, and what is wrong, the nearest to the data first.

    Attributes:
        findings: what is wrong.
        entries: executions looked at.
        files: copies of outputs looked at.
        bytes: their size.
        absent: outputs that are not on this machine, where nobody asked for them by name.
    """

    findings: list[Finding]
    entries: int
    files: int
    bytes: int
    absent: int

    def described(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return asdict(self)


def verify(
    lineage: Lineage,
    artifacts: Iterable[Artifact] = (),
    *,
    deep: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verified:
    """Compare the record of some artifacts, or of everything in the checkout, with the facts.

    Args:
        lineage: of the repository.
        artifacts: with their chains; none: all that the lock files name, and then a file that was
            never made or fetched here is no fault.
        deep: also compute the fingerprints of weights, which reads them a second time.
        progress: is told the bytes hashed so far, and all.
    """
    records = lineage.records
    artifacts = list(artifacts)
    chain = _chain(lineage, artifacts)
    findings = list(_bad_locks(records))
    found = [finding for one in chain for finding in _unconfirmed(lineage, records, one)]
    named = _files(lineage, records, chain)
    files = [item for item in named if artifacts or item.path.exists()]
    sizes = {item.path: item.path.stat().st_size for item in files if item.path.is_file()}
    done = 0
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for item, problem in zip(files, pool.map(_rehash, files), strict=True):
            done += sizes.get(item.path, 0)
            progress(done, sum(sizes.values()))
            if problem:
                found.append(Finding(item.name, problem, _repair(item), item.md5))
    bad = {finding.node for finding in found}
    for one in chain:
        found += [f for f in _headers(lineage, records, one, deep=deep) if f.node not in bad]
    damaged = outbox.damages(records.top)
    findings += [*_bad_logs(damaged), *found, *_bad_runs(lineage, chain, damaged)]
    absent = len(named) - len(files)
    return Verified(findings, len(chain), len(files), sum(sizes.values()), absent)


def render(found: Verified) -> str:
    """Return what was found as text, the first bad node first."""
    lines = []
    for one in found.findings:
        lines += [f"{one.node}: {one.problem}", f"  mend it with: {one.repair}"]
    looked = f"{found.entries} entries, {found.files} files, {found.bytes / 1e9:.2f} GB"
    lines.append(f"{len(found.findings) or 'nothing'} wrong in {looked}")
    if found.absent:
        lines.append(f"{found.absent} files are not here: never made or fetched on this machine")
    return "\n".join(lines)


def repair(lineage: Lineage, found: Verified) -> list[str]:
    """Put a good copy in the place of damaged ones; where there is none, remove them.

    Then DVC sees that the file is missing, and fetches it or makes it anew.

    Returns:
        What was done, in words.
    """
    done = []
    for digest in dict.fromkeys(one.md5 for one in found.findings if one.md5):
        cached = lineage.records.cached(digest)
        places = [lineage.top / name for name in lineage.places(digest)]
        copies = [path for path in (cached, *places) if path.is_file()]
        good = [path for path in copies if md5_of(path) == digest]
        for path in copies:
            name = os.path.relpath(path, lineage.top)
            if path in good:
                continue
            path.unlink()
            if good and path == cached:
                copy = path.with_name(f".writing-{path.name}")
                shutil.copyfile(good[0], copy)
                copy.chmod(0o444)
                sync(copy)
                copy.replace(path)
                done.append(f"{name} is a copy of {os.path.relpath(good[0], lineage.top)} now")
            else:
                done.append(f"{name} is removed")
    return done


@dataclass(frozen=True)
class _File:
    """A copy of an output: DVC's, or the one in the checkout."""

    path: Path
    name: str
    md5: str
    stage: str
    cached: bool


def _chain(lineage: Lineage, artifacts: Iterable[Artifact]) -> list[Execution]:
    """Return the executions to look at, those nearest to the data first."""
    chains = [lineage.chain(artifact) for artifact in artifacts]
    found = [e for chain in chains for e in reversed(chain)] or lineage.recorded()
    return list({execution.ident: execution for execution in found}.values())


def _bad_locks(records: Records) -> Iterator[Finding]:
    for lock in records.lock_files():
        text = (records.top / lock).read_text(errors="replace")
        repair = f"git checkout {lock}"
        names = 0
        for stage, entry in chunks(text):
            names += 1
            try:
                parsed(entry)
            except InvalidInput as error:
                yield Finding(f"{lock}: {stage}", str(error), repair)
        if not names and text.strip() not in ("", "schema: '2.0'\nstages: {}"):
            yield Finding(lock, "no lock file of DVC", repair)


def _bad_logs(damaged: Mapping[str, int]) -> Iterator[Finding]:
    for run, line in damaged.items():
        name = (outbox.DIRECTORY / f"{run}.jsonl").as_posix()
        problem = f"line {line} is not what was written"
        yield Finding(name, problem, f"rm {name}  # and trust nothing that it says")


def _bad_runs(
    lineage: Lineage, chain: Iterable[Execution], damaged: Mapping[str, int]
) -> Iterator[Finding]:
    """Yield where MLflow's own file says something else than the log of runs."""
    wanted = {md5 for one in chain for md5 in one.outputs.values()}
    runs = [
        run
        for run in lineage.logged
        if run["kind"] == "stage" and run["outs"] and wanted & set(run["made"])
        and run["run"] not in damaged
    ]  # fmt: skip
    for node, problem in mlflow_rows.changed(lineage.top, runs):
        yield Finding(node, problem, ANEW)


def _unconfirmed(lineage: Lineage, records: Records, one: Execution) -> Iterator[Finding]:
    """Yield a finding if an entry of a lock file stands in no second record."""
    sources = [source for source, _ in lineage.sources(one)]
    locks = [source.removeprefix("lock ") for source in sources if source.startswith("lock ")]
    if not locks or any(source.startswith("commit ") for source in sources):
        return
    for source in sources:
        if source.startswith("run cache "):
            name = source.removeprefix("run cache ")
            path = records.remembered(name)
            if path.is_file() and digest_of_entry(path.read_text()) == path.name:
                return
    stage = lineage.stage(one)
    yield Finding(
        f"{locks[0]}: {stage}",
        "this entry is in no commit and not in DVC's run cache: nobody ran it so",
        f"git checkout {locks[0]} && taskvec run {stage}",
    )


def _files(lineage: Lineage, records: Records, chain: Iterable[Execution]) -> list[_File]:
    """Return the copies of all outputs, each inode once."""
    found: dict[tuple[int, int] | str, _File] = {}
    for one in chain:
        stage = lineage.stage(one)
        for path, md5 in one.outputs.items():
            cached = records.cached(md5)
            places = [records.top / name for name in lineage.places(md5)]
            here = [place for place in places if place.exists()]
            copies = [(cached, True)] if cached.exists() else []
            copies += [(place, False) for place in here]
            if not copies:
                found[md5] = _File(cached, path, md5, stage, cached=True)
            for copy, is_cached in copies:
                status = copy.stat()
                name = path if is_cached else copy.relative_to(records.top).as_posix()
                found.setdefault(
                    (status.st_dev, status.st_ino), _File(copy, name, md5, stage, is_cached)
                )
    return list(found.values())


def _rehash(item: _File) -> str:
    """Return what is wrong with the bytes of a copy; empty if nothing is."""
    if not item.path.exists():
        return "its bytes are neither in DVC's cache nor in the checkout"
    if item.path.is_dir():
        return _rehash_directory(item)
    found = md5_of(item.path)
    if found == item.md5.removesuffix(".dir"):
        return ""
    place = "in DVC's cache" if item.cached else "in the checkout"
    return f"its bytes {place} have the md5 {found}, recorded is {item.md5}"


def _rehash_directory(item: _File) -> str:
    """Compare a directory with the list that its md5 is of."""
    listed = [
        {"md5": md5_of(path), "relpath": path.relative_to(item.path).as_posix()}
        for path in sorted(item.path.rglob("*"))
        if path.is_file()
    ]
    listed.sort(key=lambda entry: entry["relpath"])
    found = hashlib.md5(json.dumps(listed, sort_keys=True).encode(), usedforsecurity=False)
    if f"{found.hexdigest()}.dir" == item.md5:
        return ""
    return f"the files below it are not those of {item.md5}"


def _repair(item: _File) -> str:
    if item.cached and item.path.exists():
        return f"taskvec verify --repair; taskvec run {item.stage}"
    return f"taskvec run {item.stage}"


def _headers(
    lineage: Lineage, records: Records, one: Execution, *, deep: bool
) -> Iterator[Finding]:
    """Yield where the headers of weights do not say what their stage was given."""
    read = [_stated(records, digest) for digest in one.inputs.values()]
    marks = {stated.get(key) for stated in read for key in ("fingerprint", "origin")} - {None}
    for path, digest in one.outputs.items():
        stated = _stated(records, digest)
        if not stated:
            continue
        again = f"taskvec run {lineage.stage(one)}"
        for key, wanted in _named(stated):
            if marks and wanted not in marks and wanted != stated.get("fingerprint"):
                problem = f"its header names {key} {wanted[:12]}, which its stage did not read"
                yield Finding(path, problem, again)
        if deep:
            from taskvec.mapped import open_weights

            found = open_weights(records.cached(digest)).measure()
            if found != stated.get("fingerprint"):
                problem = (
                    f"its tensors have the fingerprint {found[:12]}, "
                    f"its header says {str(stated.get('fingerprint'))[:12]}"
                )
                yield Finding(path, problem, again)


def _named(stated: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (what, fingerprint) of each file that a header refers to."""
    for key in ("origin", "finetuned", "basis"):
        if isinstance(stated.get(key), str) and stated[key]:
            yield key, stated[key]
    for name, mark in stated.get("operands", {}).items():
        if isinstance(mark, str):
            yield name, mark


def _stated(records: Records, digest: str) -> dict[str, Any]:
    path = records.cached(digest)
    return header(path) if path.is_file() else {}
