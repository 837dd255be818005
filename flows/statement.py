"""The provenance of an exported model: the predicate of its in-toto statement.

Source: SLSA provenance v1 (https://slsa.dev/spec/v1.0/provenance) in an in-toto Statement v1
(https://github.com/in-toto/attestation/tree/main/spec/v1). The build is the whole chain of stages,
back to the data. Nobody watches it, so this is level 1: it says what was done, and only a signature
says who states it. It holds no times, users, hosts, absolute paths or credentials.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from flows.records import Execution
from flows.redaction import cleaned
from taskvec.sections import Source

BUILD_TYPE = "urn:taskvec:edit:v1"
BUILDER = "urn:taskvec:local"
CODE = "code.yaml"
# The facts of a run that say nothing of users, hosts and times.
RUN_FACTS = (
    "mlflow_run", "mlflow_parent", "prefect_task_run", "prefect_flow_run", "how", "dirty",
)  # fmt: skip

Descriptor = dict[str, Any]


def predicate(
    recipe: Mapping[str, Any],
    build: Sequence[Execution],
    evaluation: Sequence[Execution],
    fingerprints: Mapping[str, str],
    sources: Iterable[Source] = (),
    head: str = "",
) -> dict[str, Any]:
    """Return the predicate, of equal content for equal lineages.

    Args:
        recipe: expression, coefficients, seed and format: what somebody decided.
        build: the executions that made the model, the newest first.
        evaluation: those that measured it and had no part in it.
        fingerprints: md5 -> fingerprint of the weights among the inputs.
        sources: package files that the base weights come from.
        head: the commit of the checkout, for executions that no commit records yet.
    """
    invocation = {"invocationId": f"urn:sha256:{build[0].ident}"} if build else {}
    product = set(build[0].outputs.values()) if build else set()
    # stages that do not wait for one another come in any order
    build, evaluation = _ordered(build), _ordered(evaluation)
    found = {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {"recipe": recipe, "stages": _stages(build)},
            "internalParameters": {"pictures": _pictures(build)},
            "resolvedDependencies": _sorted(
                [
                    *_with_role(_dependencies(build, fingerprints, head), "build"),
                    *_with_role((_of_source(*item) for item in _files(sources)), "build"),
                    *_with_role(_dependencies(evaluation, fingerprints, head), "evaluation"),
                ],
                product,
            ),
        },
        "runDetails": {
            "builder": {"id": BUILDER, "version": {"taskvec": _version()}},
            "metadata": invocation,
            "byproducts": [_record(execution) for execution in (*build, *evaluation)],
        },
    }
    shown: dict[str, Any] = public(found)
    return shown


def public(value: Any) -> Any:
    """Return a JSON value without passwords and absolute paths, of which the last part stays."""
    return _without_paths(cleaned({"": value})[""])


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            public(key) if "://" in key else _without_paths(key): _without_paths(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind(value)
        if path.is_absolute():
            return _without_paths(path.name) if path.name else path.root
    return value


def data_sections(executions: Iterable[Execution]) -> dict[str, dict[str, Any]]:
    """Return task -> its section ``data`` of params.yaml, as it was recorded."""
    found = {}
    for execution in _ordered(executions):
        for key, value in execution.parameters.get("params.yaml", {}).items():
            section, _, rest = key.partition(".")
            task, _, what = rest.partition(".")
            if section == "tasks" and what == "data":
                found[task] = dict(value)
    return found


def _ordered(executions: Iterable[Execution]) -> list[Execution]:
    return sorted(executions, key=lambda execution: (execution.name, execution.ident))


def _stages(executions: Sequence[Execution]) -> dict[str, Any]:
    """Return stage -> file -> its parameters, without the digests of code."""
    names = Counter(execution.name for execution in executions)
    return {
        execution.name if names[execution.name] == 1 else f"{execution.name} {execution.ident}": {
            file: values for file, values in execution.parameters.items() if file != CODE
        }
        for execution in executions
    }


def _dependencies(
    executions: Iterable[Execution], fingerprints: Mapping[str, str], head: str
) -> Iterator[Descriptor]:
    """Yield everything that executions used: files, data, code, commits, packages."""
    executions = list(executions)
    for execution in executions:
        for path, mark in execution.inputs.items():
            yield _of_file(path, mark, fingerprints)
        for key, value in execution.parameters.get(CODE, {}).items():
            yield from _of_code(key, value)
        commit = execution.run.get("commit") or execution.run.get("recorded") or head
        if commit:
            yield {"name": "repository", "digest": {"gitCommit": commit}}
    sources = [Source.model_validate(data["source"]) for data in data_sections(executions).values()]
    for item in _files(sources):
        yield _of_source(*item)


def _of_file(path: str, mark: str, fingerprints: Mapping[str, str]) -> Descriptor:
    """Return an input: what DVC knows by its md5, or weights from elsewhere by fingerprint."""
    if re.fullmatch(r"[0-9a-f]{64}", mark):
        return {"name": path, "digest": {"fingerprint": mark}}
    if not re.fullmatch(r"[0-9a-f]{32}(\.dir)?", mark):
        return {"name": path, "uri": f"urn:taskvec:unknown:{PurePosixPath(mark).name}"}
    own = {"fingerprint": fingerprints[mark]} if fingerprints.get(mark) else {}
    return {"name": path, "digest": {"md5": mark, **own}}


def _of_code(key: str, value: Any) -> Iterator[Descriptor]:
    if key == "python":
        yield {"name": "python", "uri": f"pkg:generic/python@{value}"}
    elif key.startswith("packages."):
        name = key.removeprefix("packages.")
        yield {"name": name, "uri": f"pkg:pypi/{name}@{value}"}
    elif isinstance(value, str):
        yield {"name": f"{CODE}:{key}", "digest": {"md5": value}}


def _files(sources: Iterable[Source]) -> Iterator[tuple[Source, str, str]]:
    for source in sources:
        for name, digest in source.files.items():
            yield source, name, digest


def _of_source(source: Source, name: str, digest: str) -> Descriptor:
    if source.package:
        uri = f"pkg:pypi/{source.package}@{source.version}#{name}"
    else:
        uri = f"urn:taskvec:external:{source.external}:{name}"
    return {"name": PurePosixPath(name).name, "uri": uri, "digest": {"sha256": digest}}


def _pictures(executions: Iterable[Execution]) -> Any:
    """Return what of the model decided the pictures, as code.yaml records it."""
    found = [
        execution.parameters[CODE]["pictures"]
        for execution in executions
        if "pictures" in execution.parameters.get(CODE, {})
    ]
    return found[0] if found else {}


def _with_role(items: Iterable[Descriptor], role: str) -> Iterator[Descriptor]:
    for item in items:
        yield {**item, "annotations": {"role": role}}


def _sorted(items: Iterable[Descriptor], product: Collection[str]) -> list[Descriptor]:
    """Return each dependency once, in a fixed order; the role "build" wins over "evaluation".

    What the last stage of the build made is no dependency, although the evaluation read it.
    """
    once: dict[str, Descriptor] = {}
    for item in items:
        if item.get("digest", {}).get("md5") in product:
            continue
        key = {name: value for name, value in item.items() if name != "annotations"}
        once.setdefault(repr(sorted(key.items(), key=str)), item)
    return [once[key] for key in sorted(once)]


def _record(execution: Execution) -> Descriptor:
    """Return the record of an execution: its digest and the runs of MLflow and Prefect."""
    facts = {key: execution.run[key] for key in RUN_FACTS if execution.run.get(key)}
    return {
        "name": execution.name,
        "digest": {"sha256": execution.ident},
        **({"annotations": facts} if facts else {}),
    }


def _version() -> str:
    try:
        return version("taskvec")
    except PackageNotFoundError:
        return "source"
