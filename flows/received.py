"""A received export, checked on its own: without the repository, DVC, MLflow or torch.

    python -m flows.received DIR

An export is a directory of plain files. Its statement, provenance.json, names every other file with
its SHA-256. Everything in the statement follows from the files but the predicate. The header of the
weights repeats the digests of the predicate and of the other files, and the predicate that of the
header. An edited statement is therefore found even where nobody signed the export; who forges all
of these together is stopped by a signature alone.
"""

import base64
import hashlib
import json
import os
import stat
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskvec import headers
from taskvec.errors import IncompatibleWeights, MissingArtifact, TaskvecError

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
STATEMENT = "provenance.json"
SIGNATURE = "model.sig"
WEIGHTS = ".safetensors"
TIE = "export"  # the key of the weights' header that repeats the digests
MAX_TEXT = 64 << 20  # bytes of a statement or a signature
EXIT_CODE = 4


@dataclass(frozen=True)
class Finding:
    """Something that is not as it was exported.

    Attributes:
        file: which file.
        problem: what is wrong with it, in words.
    """

    file: str
    problem: str

    def __str__(self) -> str:
        shown = self.file if self.file.isprintable() else ascii(self.file)
        return f"{shown} {self.problem}"


def verify_received(directory: Path) -> list[Finding]:
    """Return what is wrong with an export, the cause before what follows from it; none if intact.

    Every byte is read once; two threads digest it, as files and as tensors.

    Raises:
        MissingArtifact: there is no such directory.
    """
    present, findings = _listed(directory)
    if STATEMENT not in present:
        return [*findings, Finding(STATEMENT, "is missing: nothing says what the export holds")]
    try:
        text = _read(directory / STATEMENT)
        content = _parsed(text)
    except (ValueError, RecursionError, OSError) as error:
        return [*findings, Finding(STATEMENT, f"is no statement of an export: {error}")]
    named = {item["name"]: item["digest"]["sha256"] for item in content["subject"]}
    own = present - {STATEMENT, SIGNATURE}
    weights = sorted(name for name in own if name.endswith(WEIGHTS))
    digests, measured = _digests(directory, own, weights)
    known = {name: digest for name, digest in digests.items() if digest is not None}
    findings += [Finding(name, "cannot be read") for name in sorted(own - known.keys())]
    findings += _compared(named, known, own)
    if len(weights) != 1:
        found = ", ".join(weights) or "none"
        findings.append(Finding(STATEMENT, f"belongs to one file of weights, found {found}"))
    for name in weights:
        findings += _check_weights(directory / name, measured.get(name, ""), content, known)
    if not findings and text != rendered(known, measured, content["predicate"]):
        findings.append(Finding(STATEMENT, "was edited: it is not what the files give"))
    if not findings and SIGNATURE in present:
        findings += _check_signature(directory, {**known, STATEMENT: _sha256(text)})
    return findings


def rendered(
    digests: Mapping[str, str], fingerprints: Mapping[str, str], predicate: Mapping[str, Any]
) -> bytes:
    """Return the statement of an export: in-toto Statement v1, the same bytes for equal content.

    Args:
        digests: name -> SHA-256 (hex) of every file but the statement and the signature.
        fingerprints: name -> fingerprint of each file of weights.
        predicate: of the type `PREDICATE_TYPE`.
    """
    subjects: list[dict[str, Any]] = []
    for name in sorted(digests):
        subjects.append({"name": name, "digest": {"sha256": digests[name]}})
        if name in fingerprints:
            subjects[-1]["annotations"] = {"fingerprint": fingerprints[name]}
    content = {
        "_type": STATEMENT_TYPE,
        "subject": subjects,
        "predicateType": PREDICATE_TYPE,
        "predicate": predicate,
    }
    return (json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def tie(digests: Mapping[str, str], predicate: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the header of the weights repeats under the key `TIE`.

    Args:
        digests: name -> SHA-256 (hex) of every file but weights, statement and signature.
        predicate: of the statement.
    """
    return {
        "files": dict(sorted(digests.items())),
        "predicate": _sha256(headers.canonical(predicate).encode()),
    }


def header_digest(metadata: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what the header of the weights says, but for its `TIE`."""
    own = {key: value for key, value in metadata.items() if key != TIE}
    return _sha256(headers.canonical(own).encode())


def tied(predicate: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return a predicate that names the digest of the header of the weights.

    Args:
        predicate: of the type `PREDICATE_TYPE`.
        metadata: what the header says, with its `TIE` or without.
    """
    definition = predicate["buildDefinition"]
    internal = {**definition.get("internalParameters", {}), "header": header_digest(metadata)}
    return {**predicate, "buildDefinition": {**definition, "internalParameters": internal}}


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments: list[str]) -> int:
    """Check the directory that is named, write what is found, and return the exit code."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m flows.received DIR\n")
        return 2
    try:
        findings = verify_received(Path(arguments[0]))
    except TaskvecError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write(report(Path(arguments[0]), findings))
    return EXIT_CODE if findings else 0


def report(directory: Path, findings: Iterable[Finding]) -> str:
    """Return the findings as lines of text, the first bad file first."""
    lines = [str(item) for item in findings]
    if not lines:
        return f"{directory} is intact: every file is the one that was exported\n"
    return "\n".join([*lines, f"{directory} is not what was exported; fetch it anew", ""])


def _listed(directory: Path) -> tuple[set[str], list[Finding]]:
    """Return the plain files of a directory, and what else is in it."""
    if not directory.is_dir():
        raise MissingArtifact(f"{directory} is no directory; name the directory of an export")
    present, findings = set(), []
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        mode = entry.stat(follow_symlinks=False).st_mode
        if stat.S_ISREG(mode):
            present.add(entry.name)
            continue
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "no plain file"
        findings.append(Finding(entry.name, f"is {kind}; an export holds plain files alone"))
    return present, findings


def _read(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_TEXT:
        raise ValueError(f"{size} bytes are too many")
    return path.read_bytes()


def _parsed(text: bytes) -> dict[str, Any]:
    """Return a statement whose parts have the types that the checks rely on."""
    content = json.loads(text, object_pairs_hook=headers.unique)
    if not isinstance(content, dict) or content.get("_type") != STATEMENT_TYPE:
        raise ValueError(f"its type is not {STATEMENT_TYPE}")
    if content.get("predicateType") != PREDICATE_TYPE:
        raise ValueError(f"the type of its predicate is not {PREDICATE_TYPE}")
    if not isinstance(content.get("predicate"), dict):
        raise ValueError("it has no predicate")
    subjects = content.get("subject")
    if not isinstance(subjects, list) or not all(map(_is_subject, subjects)):
        raise ValueError("a subject is not a file with its SHA-256")
    if len({item["name"] for item in subjects}) != len(subjects):
        raise ValueError("a file stands twice")
    return content


def _is_subject(item: Any) -> bool:
    if not isinstance(item, dict) or not isinstance(item.get("digest"), dict):
        return False
    return isinstance(item.get("name"), str) and isinstance(item["digest"].get("sha256"), str)


def _digests(
    directory: Path, names: Iterable[str], weights: Iterable[str]
) -> tuple[dict[str, str | None], dict[str, str]]:
    """Return the SHA-256 of files, None if one cannot be read, and the fingerprints of weights.

    Weights that are malformed have no fingerprint.
    """
    with ThreadPoolExecutor(2) as pool:
        prints = {name: pool.submit(_attempt, measure, directory / name) for name in weights}
        digests = {
            name: pool.submit(_attempt, file_sha256, directory / name) for name in sorted(names)
        }
        found = {name: job.result() for name, job in prints.items()}
        return (
            {name: job.result() for name, job in digests.items()},
            {name: mark for name, mark in found.items() if mark is not None},
        )


def _attempt(compute: Callable[[Path], str], path: Path) -> str | None:
    try:
        return compute(path)
    except (OSError, TaskvecError):
        return None


def measure(path: Path) -> str:
    """Return the fingerprint of the tensors that a file of weights holds now.

    Raises:
        IncompatibleWeights: the header is malformed or was not written by taskvec.
    """
    slots, raw, start = headers.read_slots(path)
    metadata = headers.read_metadata({"__metadata__": raw}, path)
    ties = headers.read_ties(metadata, slots, path)
    entries: list[tuple[str, str, tuple[int, ...], bytes]] = [
        (name, f"= {twin}", (), b"") for name, twin in ties.items()
    ]
    with path.open("rb") as file:
        for name, slot in slots.items():
            file.seek(start + slot.start)
            pieces = [
                headers.piece_digests(file.read(min(headers.PIECE, slot.stop - place)))
                for place in range(slot.start, slot.stop, headers.PIECE)
            ]
            entries.append((name, slot.dtype, slot.shape, b"".join(pieces)))
    return headers.fingerprint(entries)


def _compared(
    named: Mapping[str, str], known: Mapping[str, str], present: set[str]
) -> list[Finding]:
    """Return the files that are missing, changed or not named in the statement."""
    findings = []
    strange = sorted(present - named.keys())
    for name in sorted(named.keys() - present):
        twin = next((other for other in strange if known.get(other) == named[name]), "")
        was = f"was renamed to {ascii(twin)}" if twin else "is missing"
        findings.append(Finding(name, was))
    for name in sorted(named.keys() & known.keys()):
        if known[name] != named[name]:
            twin = next((other for other in sorted(named) if named[other] == known[name]), "")
            holds = f"holds the bytes of {twin}" if twin else "was changed"
            digests = f"its SHA-256 is {known[name][:12]}, the statement says {named[name][:12]}"
            findings.append(Finding(name, f"{holds}: {digests}"))
    return findings + [Finding(name, "is not in the statement") for name in strange]


def _check_weights(
    path: Path, measured: str, content: Mapping[str, Any], known: Mapping[str, str]
) -> list[Finding]:
    """Return what the header of the weights, their tensors and the statement disagree about."""
    try:
        metadata = headers.read_metadata(headers.read_header(path), path)
        headers.read_slots(path)
    except (IncompatibleWeights, OSError) as error:
        return [Finding(path.name, f"cannot be read: {str(error).replace(str(path), 'it')}")]
    if metadata.get("fingerprint") != measured:
        return [Finding(path.name, "is damaged: its tensors are not those of its header")]
    stated = [
        (item.get("annotations") or {}).get("fingerprint")
        for item in content["subject"]
        if item["name"] == path.name and isinstance(item.get("annotations") or {}, dict)
    ]
    findings = []
    if stated and stated != [measured]:
        findings.append(Finding(STATEMENT, f"was edited: {path.name} has another fingerprint"))
    others = {name: mark for name, mark in known.items() if not name.endswith(WEIGHTS)}
    expected, found = tie(others, content["predicate"]), metadata.get(TIE)
    if not isinstance(found, dict):
        return [*findings, Finding(path.name, "is no export: its header ties it to no statement")]
    if found.get("predicate") != expected["predicate"]:
        findings.append(Finding(STATEMENT, f"was edited, or {path.name} is of another export"))
    elif not _names_header(content["predicate"], metadata):
        findings.append(Finding(path.name, f"was edited: {STATEMENT} is of another header"))
    if found.get("files") != expected["files"]:
        listed = found["files"] if isinstance(found.get("files"), dict) else {}
        names = sorted({*listed, *others})
        name = next((n for n in names if listed.get(n) != others.get(n)), path.name)
        findings.append(Finding(name, f"is not the file that was exported with {path.name}"))
    if not findings and found != expected:
        findings.append(Finding(path.name, "was edited: its header says more than an export's"))
    return findings


def _names_header(predicate: Mapping[str, Any], metadata: Mapping[str, Any]) -> bool:
    try:
        return bool(tied(predicate, metadata) == predicate)
    except (KeyError, TypeError, AttributeError):
        return False


def _check_signature(directory: Path, digests: Mapping[str, str]) -> list[Finding]:
    """Return whether a signature is about other files than these; its key is not asked here."""
    try:
        bundle = json.loads(_read(directory / SIGNATURE))
        payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"], validate=True))
        signed = {item["name"]: item["digest"] for item in payload["predicate"]["resources"]}
    except (ValueError, KeyError, TypeError, RecursionError, OSError):
        return [Finding(SIGNATURE, "is no signature of a model: a bundle of Sigstore is expected")]
    if signed != dict(digests):
        return [Finding(SIGNATURE, "is the signature of other files")]
    return []


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
