"""Where data comes from: an installed package, or an external set below the data root."""

import hashlib
from pathlib import Path

from taskvec.datasets import external, package_data
from taskvec.sections import Source


def locate(source: Source) -> dict[str, Path]:
    """Return the verified files of a source: name in params.yaml -> path.

    Raises:
        MissingDependency: the package that ships the data is not installed.
        MissingArtifact: an external file is not there.
        InvalidData: the package has another version, or a file has another digest.
    """
    return package_data.locate(source) if source.external is None else external.locate(source)


def recorded(source: Source) -> dict[str, str]:
    """Return what results say of a source: its name, and one digest for the bytes of its files.

    The digest is that of the only file, or that of a manifest of several.
    """
    digests = source.files.values()
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(source.files.items()))
    whole = hashlib.sha256(text.encode()).hexdigest()
    return {
        "source": source.external or f"{source.package} {source.version}",
        "source_sha256": next(iter(digests)) if len(digests) == 1 else whole,
    }
