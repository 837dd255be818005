"""Files that lie in a remote alone: what is checked, what is sent, what is made again."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest

from flows import runner, snapshot
from flows.dag import Dag, StageChanged
from flows.nodes import Node
from flows.sparse import HostDag, SparseDag
from taskvec.errors import InvalidInput, MissingArtifact, ServiceUnreachable, TaskvecError
from tests import bucket
from tests.test_dag import CODE, EDITS, MAIN, PARAMS, bring_up_to_date, change, copy, dvc

pytestmark = pytest.mark.filterwarnings(
    "ignore:_NoneStep.value:DeprecationWarning",  # in DVC
    "ignore::DeprecationWarning:botocore",
)
TARGETS = ["join", "search-sum-0"]
SEARCH = "edits/dvc.yaml:search-sum-0"


def configure(root: Path, **remote: str) -> None:
    """Give a repository a default remote; none without settings."""
    lines = ["[cache]", 'type = "reflink,hardlink,copy"']
    if remote:
        lines += ["[core]", "remote = store", "['remote \"store\"']"]
    lines += [f"{name} = {value}" for name, value in remote.items()]
    (root / ".dvc/config").write_text("\n".join(lines) + "\n")


class Driver:
    """A checkout with a remote, and a host that shares nothing with it but the remote."""

    def __init__(self, directory: Path) -> None:
        self.root, self.host, self.store = (directory / n for n in ("driver", "host", "store"))
        self.root.mkdir()
        subprocess.run(["git", "init", "-q"], cwd=self.root, check=True)
        dvc(self.root, "init", "-q")
        files = {
            "dvc.yaml": MAIN, "edits/dvc.yaml": EDITS, "params.yaml": PARAMS, "code.yaml": CODE,
            "source.txt": "text\n", ".gitignore": "/data/\n", "data/keep": "",
        }  # fmt: skip
        for name, text in files.items():
            (self.root / name).parent.mkdir(exist_ok=True)
            (self.root / name).write_text(text)
        self.store.mkdir()
        configure(self.root, url=str(self.store), verify="true")
        copy(self.root, self.host)

    def change(self, name: str, old: str, new: str) -> None:
        """Change a file of the driver."""
        change(self.root, name, old, new)

    def reasons(self) -> dict[str, list[str]]:
        """Return the stale stages with their reasons."""
        with chdir(self.root):
            nodes = SparseDag(self.root).plan(TARGETS)
        return {node.name: [r.words for r in node.reasons] for node in nodes if node.reasons}

    def run(self, small: int = 0) -> dict[str, str]:
        """Do what is stale, on the host; outputs up to a size come back."""
        with chdir(self.root):
            dag = SparseDag(self.root)
            hows = {}
            for node in dag.plan(TARGETS):
                hows[node.name] = how = dag.begin(node.address)
                if how == "run":
                    dag.upload(node.address, set())
                    deps = dag.objects(node.address)
                    dag.adopt(node.address, *self.perform(node, deps, small))
                if how != "skip":
                    dag.commit(node.address)
        return hows

    def perform(
        self, node: Node, deps: dict[str, str], small: int = 0
    ) -> tuple[dict[str, object], dict[str, bytes]]:
        """Do one stage as an agent would."""
        for name in ("params.yaml", "code.yaml"):
            shutil.copy(self.root / name, self.host / name)
        with chdir(self.host):
            dag = HostDag(self.host)
            assert not dag.remote.fetch(set(deps.values()))
            dag.place(node.address, deps)
            dag.begin(node.address)
            subprocess.run(["sh", "-c", node.command], cwd=self.host, check=True)
            dag.commit(node.address)
            entry, cached = dag.made(node.address)
            dag.remote.push(set(cached.values()))
            files = {
                out: path.read_bytes()
                for out in node.outs
                if (path := self.host / out).stat().st_size <= small
            }
            dag.clear(node.address, deps)
            assert [path.name for path in (self.host / "data").iterdir()] == ["keep"]
        return entry, files

    def locks(self) -> list[bytes]:
        return [(self.root / name).read_bytes() for name in ("dvc.lock", "edits/dvc.lock")]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    return Driver(tmp_path_factory.mktemp("remotes"))


@pytest.fixture
def driver(template: Driver, tmp_path: Path) -> Driver:
    """Return a driver with nothing done."""
    made = Driver.__new__(Driver)
    made.root, made.host, made.store = (tmp_path / n for n in ("driver", "host", "store"))
    for source, target in zip(
        (template.root, template.host, template.store), (made.root, made.host, made.store),
        strict=True,
    ):  # fmt: skip
        copy(source, target)
    for root in (made.root, made.host):
        configure(root, url=str(made.store), verify="true")
    return made


def test_the_books_of_stages_that_ran_elsewhere_are_those_of_a_local_run(driver: Driver) -> None:
    local = copy(driver.root, driver.root.with_name("local"))
    assert set(driver.run(small=4).values()) == {"run"}
    with chdir(local):
        bring_up_to_date(local)
    names = ("dvc.lock", "edits/dvc.lock")
    assert driver.locks() == [(local / name).read_bytes() for name in names]
    runs = [
        sorted(p.relative_to(root) for p in (root / ".dvc/cache/runs").rglob("*") if p.is_file())
        for root in (driver.root, local)
    ]
    assert runs[0] == runs[1] and len(runs[0]) == 4
    # the small metric came, the rest is in the remote alone
    here = {path.name for path in (driver.root / "data").iterdir()}
    assert here == {"keep", "joined.json"}
    assert not driver.reasons() and set(driver.run().values()) == {"skip"}


def test_dvc_pull_completes_the_checkout(driver: Driver) -> None:
    driver.run()
    assert dvc(driver.root, "pull").returncode == 0
    assert (driver.root / "data/joined.txt").read_text() == "text\ntext\n"
    with chdir(driver.root):
        assert not any(node.reasons for node in Dag(driver.root).plan(TARGETS))
    said = dvc(driver.root, "repro", "dvc.yaml", "edits/dvc.yaml")
    assert "up to date" in said.stdout + said.stderr


def test_a_changed_file_is_noticed_although_it_is_not_here(driver: Driver) -> None:
    driver.run()
    driver.change("source.txt", "text", "other")
    shutil.copy(driver.root / "source.txt", driver.host / "source.txt")
    assert set(driver.reasons()) == {"prepare@mnist", "prepare@digits", "join", "search-sum-0"}
    assert set(driver.run().values()) == {"run"}
    assert not driver.reasons()
    driver.change("source.txt", "other", "text")  # put back: known, and in the remote
    assert set(driver.run().values()) == {"restored"}
    assert not driver.reasons()


def test_what_the_remote_lost_is_made_again_if_a_stale_stage_needs_it(driver: Driver) -> None:
    driver.run()
    shutil.rmtree(driver.store / "files")
    assert not driver.reasons()  # nobody needs it
    driver.change("params.yaml", "points: 3", "points: 5")
    reasons = driver.reasons()
    assert "its output data/joined.txt is not in cache" in reasons["join"]
    assert set(reasons) == {"prepare@mnist", "prepare@digits", "join", "search-sum-0"}
    hows = driver.run()  # two outputs are equal: the second is known once the first is there
    assert hows["prepare@mnist"] == hows["join"] == hows["search-sum-0"] == "run"
    assert not driver.reasons()


def test_a_file_that_is_nowhere_is_named_with_the_stage_that_makes_it(driver: Driver) -> None:
    driver.run()
    shutil.rmtree(driver.store / "files")
    with chdir(driver.root):
        dag = SparseDag(driver.root)
        with pytest.raises(MissingArtifact, match=r"joined\.txt .* `taskvec run join`"):
            dag.upload(SEARCH, set())


def test_what_the_driver_has_and_the_remote_lacks_is_sent_once(driver: Driver) -> None:
    with chdir(driver.root):
        bring_up_to_date(driver.root)
        assert not (driver.store / "files").exists()
        dag, known = SparseDag(driver.root), set[str]()
        dag.upload("join", known)
        digests = set(dag.objects("join").values())
        assert known == digests and not dag.remote.missing(digests)
        shutil.rmtree(driver.store / "files")
        dag.upload("join", known)  # not asked again
        assert dag.remote.missing(digests) == digests


def test_a_damaged_file_of_the_remote_is_not_used(driver: Driver) -> None:
    driver.run()
    for path in (driver.store / "files").rglob("*"):
        if path.is_file():
            path.chmod(0o644)
            path.write_text("damaged")
            path.chmod(0o444)
    with chdir(driver.root):
        dag = SparseDag(driver.root)
        digests = set(dag.objects("join").values())
        assert dag.remote.fetch(digests) == digests
        assert not any(dag._has(digest) for digest in digests)


def test_a_host_with_other_parameters_or_files_is_refused(driver: Driver) -> None:
    with chdir(driver.root):
        dag = SparseDag(driver.root)
        node = dag.plan(["prepare@mnist"])[0]
        assert dag.begin(node.address) == "run"
    entry, files = driver.perform(node, {})
    other = {**entry, "params": {"params.yaml": {"tasks.mnist": {"train": 9}}}}
    with chdir(driver.root):
        dag.adopt(node.address, other, files)
        with pytest.raises(StageChanged, match=r"something else than what is here now \(params\)"):
            dag.commit(node.address)
        with pytest.raises(TaskvecError, match=r"sent \.\./evil, which is no output"):
            dag.adopt(node.address, entry, {"../evil": b""})
        with pytest.raises(TaskvecError, match="source.txt, which is no output"):
            dag.adopt(node.address, entry, {"source.txt": b""})
        dag.begin(node.address)
        dag.adopt(node.address, entry, files)
        assert dag.commit(node.address)


# The remote


def test_a_remote_that_cannot_be_used_is_refused_with_what_mends_it(driver: Driver) -> None:
    cases: list[tuple[dict[str, str], type[TaskvecError], str]] = [
        ({}, InvalidInput, "there is no default one; `dvc remote add"),
        ({"url": str(driver.store)}, InvalidInput, "remote modify store verify true"),
        ({"url": "/nowhere/at/all", "verify": "true"}, MissingArtifact, "its directory does not"),
    ]
    with chdir(driver.root):
        SparseDag(driver.root).remote.check()
        for settings, error, message in cases:
            configure(driver.root, **settings)
            with pytest.raises(error, match=message):
                SparseDag(driver.root).remote.check()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[bucket.Store]:
    pytest.importorskip("moto.server", reason="moto[server] of the extra dev is not installed")
    with bucket.running(tmp_path_factory.mktemp("s3")) as found:
        yield found


def test_files_travel_through_s3_without_their_keys(
    driver: Driver, store: bucket.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    settings = {"endpointurl": store.endpoint, "verify": "true"}
    configure(driver.root, url=store.url(), **settings)
    (driver.root / ".dvc/config.local").write_text(
        "['remote \"store\"']\naccess_key_id = hidden-name\nsecret_access_key = hidden-key\n"
    )
    with chdir(driver.root):
        bring_up_to_date(driver.root)
        dag = SparseDag(driver.root)
        dag.remote.check()
        assert "hidden" not in str(dag.remote.settings)
        assert dag.remote.settings["endpointurl"] == store.endpoint
        dag.upload("join", set())
        digests = set(dag.objects("join").values())
        assert not dag.remote.missing(digests)
        shutil.rmtree(driver.root / ".dvc/cache/files")
        assert not dag.remote.fetch(digests) and all(dag._has(digest) for digest in digests)
        configure(driver.root, url="s3://no-such-bucket/x", **settings)
        with pytest.raises(MissingArtifact, match="its bucket does not exist"):
            SparseDag(driver.root).remote.check()
        configure(driver.root, url=store.url(), **{**settings, "endpointurl": "http://127.0.0.1:9"})
        with pytest.raises(ServiceUnreachable, match="does not answer at 127.0.0.1:9"):
            SparseDag(driver.root).remote.check()


# The code


def test_a_snapshot_is_the_working_tree_and_changes_nothing(tmp_path: Path) -> None:
    def git(*words: str, content: bytes = b"") -> str:
        done = subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", *words],
            cwd=tmp_path, input=content, check=True, capture_output=True,
        )  # fmt: skip
        return done.stdout.decode()

    git("init", "-q")
    for name in ("flows/a.py", "params.yaml", "dvc.lock", "flows/dvc.lock", "gone.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("committed\n")
    git("add", "-A")
    git("commit", "-qm", "first")
    (tmp_path / ".git/info/exclude").write_text(".taskvec\nflows/ignored\n")
    (tmp_path / "gone.txt").unlink()
    for name in ("flows/a.py", "flows/new.py", "flows/ignored", "notes.txt", ".env"):
        (tmp_path / name).write_text("changed\n")
    before = git("status", "--porcelain"), git("count-objects", "-v")
    taken = snapshot.take(tmp_path)
    assert (git("status", "--porcelain"), git("count-objects", "-v")) == before
    assert taken.names == {"flows/a.py", "flows/new.py", "params.yaml"}
    git("index-pack", "--stdin", content=taken.pack)
    assert git("show", f"{taken.commit}:flows/a.py") == "changed\n"
    (tmp_path / "dvc.lock").write_text("another\n")
    assert snapshot.take(tmp_path).commit == taken.commit
    (tmp_path / "params.yaml").write_text("another\n")
    assert snapshot.take(tmp_path).commit != taken.commit


def test_too_much_to_send_is_refused_with_the_largest_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / "params.yaml").write_text("a: 1\n")
    (tmp_path / "big.yaml").write_text("b: 12345678\n")
    monkeypatch.setattr(snapshot, "MOST_BYTES", 10)
    with pytest.raises(InvalidInput, match="the largest is big.yaml"):
        snapshot.take(tmp_path)


# The runner


def test_an_unknown_runner_is_refused_and_local_is_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TASKVEC_RUNNER", raising=False)
    assert runner.chosen() == "local"
    monkeypatch.setenv("TASKVEC_RUNNER", "rey")
    with pytest.raises(InvalidInput, match="did you mean 'ray'"):
        runner.chosen()
