"""Signatures of exports: OpenSSF model-signing with an elliptic curve key, offline.

The extra ``sign`` brings the package. A key is made with
``openssl ecparam -name prime256v1 -genkey -noout -out key.pem`` and
``openssl ec -in key.pem -pubout -out key.pub``.
"""

import importlib
from pathlib import Path
from types import ModuleType

from flows.received import SIGNATURE, Finding, verify_received
from taskvec.errors import InvalidInput, MissingArtifact, MissingDependency


def sign(directory: Path, key: Path) -> None:
    """Sign all files of a directory; the signature becomes one of them.

    Args:
        directory: an export.
        key: a private key in PEM: NIST P-256, P-384 or P-521, without a password.

    Raises:
        MissingDependency: model-signing is not installed.
        InvalidInput, MissingArtifact: the key cannot be used.
    """
    check_key(key)
    hashing = _package("hashing").Config().set_ignored_paths(paths=[SIGNATURE])
    try:
        config = _package("signing").Config().use_elliptic_key_signer(private_key=key)
        config.set_hashing_config(hashing).sign(directory, directory / SIGNATURE)
    except (ValueError, TypeError) as error:
        raise _unusable(key, error) from None


def verify(directory: Path, key: Path | None = None) -> list[Finding]:
    """Return what is wrong with an export and, if a key is given, with its signature.

    Args:
        directory: an export.
        key: the public key in PEM of who is expected to have signed it.

    Raises:
        MissingDependency: a key is given and model-signing is not installed.
        InvalidInput, MissingArtifact: the key cannot be used, or there is no such directory.
    """
    findings = verify_received(directory)
    if key is None:
        return findings
    check_key(key)
    if not (directory / SIGNATURE).is_file():
        return [*findings, Finding(SIGNATURE, "is missing: nobody signed this export")]
    verifying = _package("verifying").Config()
    try:
        verifier = verifying.use_elliptic_key_verifier(public_key=key)
    except (ValueError, TypeError) as error:
        raise _unusable(key, error) from None
    try:
        verifier.verify(directory, directory / SIGNATURE)
    except Exception as error:  # a signature is foreign input: its readers raise a dozen types
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:80]
        return [*findings, Finding(SIGNATURE, f"is not of these files and this key ({reason})")]
    return findings


def check_key(key: Path) -> None:
    """Raise unless signatures can be made and checked here and the key is a file.

    Raises:
        MissingDependency: model-signing is not installed.
        MissingArtifact: there is no such file.
    """
    _package("signing")
    if not key.is_file():
        raise MissingArtifact(f"{key} does not exist; name the file of a key in PEM")


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"model_signing.{name}")
    except ImportError as error:
        raise MissingDependency(
            f"signatures need model-signing and pyopenssl ({error}); "
            "pip install 'taskvec[sign]', or leave out the key"
        ) from None


def _unusable(key: Path, error: Exception) -> InvalidInput:
    return InvalidInput(
        f"{key} is no key that can be used ({' '.join(str(error).split())[:200]}); expected an "
        "elliptic curve key in PEM (P-256, P-384 or P-521) without a password"
    )
