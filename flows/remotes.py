"""The DVC remote through which the hosts of a cluster exchange files."""

import socket
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dvc_data.hashfile.hash_info import HashInfo

from flows.redaction import SECRET_NAME, reason, redacted
from taskvec.errors import InvalidInput, MissingArtifact, ServiceUnreachable, TaskvecError

CONNECT_SECONDS = 5.0


class Remote:
    """The default remote of a repository. Thread-safe."""

    def __init__(self, repo: Any) -> None:
        """Take what the configuration of a DVC repository names; `check` looks at it."""
        self._repo = repo
        self._mutex = threading.Lock()
        self.name = str(repo.config["core"].get("remote") or "")

    @property
    def settings(self) -> dict[str, Any]:
        """What DVC knows of it, passwords and keys left out: those each host has for itself."""
        known = self._repo.config["remote"].get(self.name, {})
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in known.items()
            if not SECRET_NAME.search(name)
        }

    def check(self) -> None:
        """Look whether the remote can be used.

        Raises:
            InvalidInput: there is none, or it does not verify what it sends.
            MissingArtifact: its directory or bucket does not exist.
            ServiceUnreachable: nobody answers.
        """
        if not self.name:
            raise InvalidInput(
                "hosts exchange files through a DVC remote, and there is no default one; "
                "`dvc remote add -d NAME URL`, then `dvc remote modify NAME verify true`"
            )
        if self.name not in self._repo.config["remote"]:
            raise InvalidInput(
                f"the default remote {self.name!r} is not configured; "
                f"`dvc remote add -d {self.name} URL`"
            )
        if self.settings.get("verify") is not True:
            raise InvalidInput(
                f"the remote {self.name!r} does not verify what it sends; a damaged file would "
                f"spread: `dvc remote modify {self.name} verify true`"
            )
        self._check_place()

    def missing(self, digests: Collection[str]) -> set[str]:
        """Return which contents, by md5, the remote has not got."""
        if not digests:
            return set()
        with self._mutex, _told(self, "be asked"):
            return set(digests) - set(self._odb.oids_exist(list(digests)))

    def push(self, digests: Collection[str]) -> None:
        """Send contents from the cache of this repository; those that are there are not sent.

        Raises:
            MissingArtifact: the cache has not got them.
            ServiceUnreachable: some could not be sent.
        """
        with self._mutex, _told(self, "take files"):
            failed = self._repo.cloud.push(_infos(digests)).failed
        absent = {digest for digest in digests if not self._cached(digest)}
        if absent and (lost := self.missing(absent)):
            raise MissingArtifact(f"not in the cache: {', '.join(sorted(lost))}")
        if failed:
            raise ServiceUnreachable(f"{self} did not take {len(failed)} of {len(digests)} files")

    def fetch(self, digests: Collection[str]) -> set[str]:
        """Bring contents into the cache of this repository; return those that could not be had."""
        wanted = {digest for digest in digests if not self._cached(digest)}
        if wanted:
            with self._mutex, _told(self, "send files"):
                self._repo.cloud.pull(_infos(wanted))
        return {digest for digest in wanted if not self._cached(digest)}

    def __str__(self) -> str:
        return redacted(f"the remote {self.name!r} ({self.settings.get('url')})")

    @cached_property
    def _odb(self) -> Any:
        return self._repo.cloud.get_remote_odb(self.name)

    def _cached(self, digest: str) -> bool:
        return Path(self._repo.cache.local.oid_to_path(digest)).is_file()

    def _check_place(self) -> None:
        endpoint = urlsplit(str(self.settings.get("endpointurl", "")))
        if endpoint.hostname:
            port = endpoint.port or (443 if endpoint.scheme == "https" else 80)
            try:
                socket.create_connection((endpoint.hostname, port), CONNECT_SECONDS).close()
            except OSError as error:
                raise ServiceUnreachable(
                    f"{self} does not answer at {endpoint.hostname}:{port} ({reason(error)}); "
                    "start it, or correct endpointurl in .dvc/config"
                ) from None
        with _told(self, "be asked"):
            odb = self._odb
            place = odb.path[: -len("/files/md5")] if odb.path.endswith("files/md5") else odb.path
            local = odb.fs.protocol == "local"
            there = Path(place).is_dir() if local else _bucket_exists(odb.fs, place)
        if not there:
            what = "its directory" if local else "its bucket"
            raise MissingArtifact(
                f"{self}: {what} does not exist; create it, or correct the url in .dvc/config"
            )


@contextmanager
def _told(remote: Remote, what: str) -> Iterator[None]:
    """Turn whatever a storage library raises into one error without passwords."""
    try:
        yield
    except TaskvecError:
        raise
    except Exception as error:
        raise ServiceUnreachable(f"{remote} could not {what} ({reason(error)})") from None


def _bucket_exists(fs: Any, place: str) -> bool:
    return bool(fs.exists(place.lstrip("/").split("/")[0])) if fs.protocol == "s3" else True


def _infos(digests: Collection[str]) -> set[HashInfo]:
    return {HashInfo("md5", digest) for digest in digests}
