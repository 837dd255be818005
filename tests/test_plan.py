"""What is rendered from params.yaml: exact, stable, and never a way into a shell."""

import copy
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from flows import plan, rendering
from tasks import stages
from taskvec import params
from taskvec.errors import InvalidInput, InvalidParams, StaleRendering, TaskvecError
from taskvec.expressions import NAME
from tests.project import ROOT

GRAPHS = ("dvc.yaml", "edits/dvc.yaml", "results/dvc.yaml")
RENDERED = ("code.yaml", *GRAPHS)
COMMAND = re.compile(
    r"python -m tasks (prepare|head) \$\{item\}"
    r"|python -m tasks (fine_tune|extract|evaluate) \$\{item\.task\}-\$\{item\.seed\}"
    r"|python -m tasks pretrain"
    r"|python -m tasks report (page|results|studies)"
    rf"|python -m tasks (combine|search|evaluate) {NAME}-[0-9]+"
)
Content = dict[str, Any]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with params.yaml, dvc.yaml and everything rendered; do not change it."""
    root = tmp_path_factory.mktemp("pristine")
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, root / name)
    plan.write(root, params.load(root / "params.yaml"))
    return root


@pytest.fixture
def checkout(pristine: Path, tmp_path: Path) -> Path:
    """Return a copy of the rendered directory, to change at will."""
    return Path(shutil.copytree(pristine, tmp_path / "checkout"))


def source(root: Path = ROOT) -> Content:
    return params.plain(params.read(root / "params.yaml"))  # type: ignore[no-any-return]


def rendered(root: Path, content: Content, *names: str) -> dict[str, Content]:
    """Return rendered files for other parameters, as data; the fingerprints only if asked for."""
    with pytest.MonkeyPatch.context() as patch:
        if "code.yaml" not in names:
            patch.setattr(plan, "code_fingerprints", lambda _: {})
        texts = plan.render(root, params.validate(content))
    yaml = YAML(typ="safe", pure=True)
    return {name: yaml.load(texts[root / name]) for name in names}


def commands(files: dict[str, Content]) -> Iterator[str]:
    for file in files.values():
        for stage in file.get("stages", {}).values():
            yield stage.get("do", stage)["cmd"]


def strings(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, str):
        yield value


def command_line(root: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=root, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def listing(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("name", ["size", "nfiles"])
def test_a_name_that_the_run_cache_overlooks_is_refused(checkout: Path, name: str) -> None:
    content = source()
    edit = {**content["edits"]["addition"], "expression": f"{name} * mnist"}
    edit["coefficients"] = {name: {"low": 0, "high": 1, "points": 2}}
    content["edits"] = {"some": edit}
    with pytest.raises(InvalidParams, match=f"edits.some.coefficients.{name}"):
        plan.render(checkout, params.validate(content))


def test_the_committed_files_are_those_that_follow_from_their_sources() -> None:
    plan.check(ROOT, params.load(ROOT / "params.yaml"))


def test_rendering_twice_changes_nothing(checkout: Path) -> None:
    loaded = params.load(checkout / "params.yaml")
    assert plan.write(checkout, loaded) == []
    plan.check(checkout, loaded)


def test_two_that_render_at_once_do_not_tear_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "params.yaml").touch()
    path = tmp_path / "dvc.yaml"
    texts = ["a" * 100_000, "b" * 200_000]
    monkeypatch.setattr(plan, "render", lambda root, text: {root / "dvc.yaml": text})
    plan.write(tmp_path, texts[0])  # type: ignore[arg-type]

    def write(place: int) -> None:
        for turn in range(25):
            plan.write(tmp_path, texts[(place + turn) % 2])  # type: ignore[arg-type]

    with ThreadPoolExecutor(3) as pool:
        writers = [pool.submit(write, place) for place in range(3)]
        while not all(writer.done() for writer in writers):
            assert path.read_text() in texts
        for writer in writers:
            writer.result()


def test_a_rendered_file_that_was_edited_is_put_right(checkout: Path) -> None:
    loaded = params.load(checkout / "params.yaml")
    path = checkout / "edits/dvc.yaml"
    before = path.read_text()
    path.write_text(before.replace("gpu: 1", "gpu: 2"))
    with pytest.raises(StaleRendering, match=r"edits/dvc\.yaml does not match.*taskvec status"):
        plan.check(checkout, loaded)
    assert plan.write(checkout, loaded) == [path]
    assert path.read_text() == before


def test_check_says_by_its_exit_code_whether_everything_is_up_to_date(checkout: Path) -> None:
    assert command_line(checkout, "flows.plan", "--check").returncode == 0
    (checkout / "code.yaml").write_text("python: '2.7'\n")
    before = listing(checkout)
    done = command_line(checkout, "flows.plan", "--check")
    assert done.returncode == 3
    assert "code.yaml" in done.stderr
    assert listing(checkout) == before
    assert command_line(checkout, "flows.plan", "--chek").returncode == 2
    done = command_line(checkout, "flows.plan")
    assert (done.returncode, done.stderr) == (0, "rendered code.yaml\n")
    assert command_line(checkout, "flows.plan", "--check").returncode == 0


def test_comments_and_hand_made_edits_of_dvc_yaml_survive(checkout: Path) -> None:
    path = checkout / "dvc.yaml"
    text = path.read_text().replace(
        "  head:\n", "  # a word about heads\n  head:  # and one more\n"
    )
    text = text.replace("meta: {gpu: 1, timeout: 1800}", "meta: {gpu: 1, timeout: 99}")
    path.write_text(text)
    content = source()
    del content["tasks"]["letters"]
    for edit in ("addition", "forget_digits"):
        del content["edits"][edit]
    content["model"]["align_tasks"].remove("letters")
    plan.write(checkout, params.validate(content))
    after = path.read_text()
    comments = [line.strip() for line in text.splitlines() if "#" in line]
    assert [line.strip() for line in after.splitlines() if "#" in line] == comments
    assert "timeout: 99" in after
    assert "letters" not in after


def test_a_new_task_adds_its_own_entries_and_changes_no_other(checkout: Path) -> None:
    content = source()
    before = rendered(checkout, content, *RENDERED)
    content["tasks"]["novel"] = content["tasks"]["mnist"]
    after = rendered(checkout, content, *RENDERED)
    assert after["edits/dvc.yaml"] == before["edits/dvc.yaml"]
    stages_before, stages_after = before["dvc.yaml"]["stages"], after["dvc.yaml"]["stages"]
    names = [*before["dvc.yaml"]["stages"]["prepare"]["foreach"], "novel"]
    for name, stage in stages_after.items():
        expected = copy.deepcopy(stages_before[name])
        if "foreach" in expected:
            expected["foreach"] = names
        elif "matrix" in expected:
            expected["matrix"]["task"] = names
        elif name == "report":
            assert set(stage.pop("deps")) - set(expected.pop("deps")) == {
                "data/evaluations/novel-0.csv",
                "data/training/novel-0.csv",
                "data/vectors/novel-0.safetensors",
            }
        assert stage == expected
    code_before, code_after = before["code.yaml"], after["code.yaml"]
    assert code_after["prepare"].pop("novel") == code_before["prepare"]["mnist"]
    code_before.pop("graph"), code_after.pop("graph")
    assert code_after == code_before


def test_a_new_edit_adds_exactly_its_three_stages_for_every_seed(checkout: Path) -> None:
    content = source()
    content["seeds"] = [0, 1, 5]
    before = rendered(checkout, content, *GRAPHS)
    content["edits"]["novel"] = content["edits"]["only_digits"]
    after = rendered(checkout, content, *GRAPHS)
    for name, seeds in (("edits/dvc.yaml", [0]), ("results/dvc.yaml", [1, 5])):
        old, new = before[name]["stages"], after[name]["stages"]
        added = {f"{s}-novel-{seed}" for s in ("combine", "search", "evaluate") for seed in seeds}
        assert new.keys() - old.keys() == added
        assert {k: v for k, v in new.items() if k in old and k != "report-results"} == {
            k: v for k, v in old.items() if k != "report-results"
        }


def test_another_seed_repeats_the_stages_from_fine_tuning_on(checkout: Path) -> None:
    content = source()
    content["seeds"] = [3]
    one = rendered(checkout, content, *GRAPHS)
    assert one["dvc.yaml"]["stages"]["fine_tune"]["matrix"]["seed"] == [3]
    assert set(one["results/dvc.yaml"]["stages"]) == {"report-results"}
    content["seeds"] = [3, 4]
    two = rendered(checkout, content, *GRAPHS)
    assert one["edits/dvc.yaml"] == two["edits/dvc.yaml"]
    more = two["results/dvc.yaml"]["stages"]
    assert more["fine_tune"]["matrix"]["seed"] == [4]
    assert more["fine_tune"]["wdir"] == ".."
    assert {name for name in more if name.endswith("-4")} == {
        name.removesuffix("-3") + "-4" for name in one["edits/dvc.yaml"]["stages"]
    }


EDITS = {
    "expression": "a * mnist + b * (digits - faces + faces) + 0.5 * letters",
    "coefficients": {"a": {"low": 0, "high": 1, "points": 2},
                     "b": {"low": 0, "high": 1, "points": 2}},
    "objective": {"maximize": "accuracy", "tasks": ["textures"]},
    "constraint": {"tasks": ["faces"], "min_ratio": 0.9},
    "evaluate": ["textures", "faces", "digits"],
}  # fmt: skip


def test_an_edit_depends_on_exactly_what_it_reads(checkout: Path) -> None:
    content = source()
    content["edits"] = {"some": EDITS}
    found = rendered(checkout, content, "edits/dvc.yaml")["edits/dvc.yaml"]["stages"]
    assert set(found) == {"combine-some-0", "search-some-0", "evaluate-some-0"}
    combine, search, evaluate = found.values()
    # faces - faces cancels
    assert combine["deps"] == [
        f"data/vectors/{t}-0.safetensors" for t in ("digits", "letters", "mnist")
    ]
    assert combine["params"][0] == "edits.some.expression"
    assert set(search["deps"]) == {
        "data/checkpoints/pretrained.safetensors",
        "data/edits/some-0/basis.safetensors",
        *(f"data/heads/{task}.safetensors" for task in ("faces", "textures")),
        *(f"data/prepared/{task}/validation.safetensors" for task in ("faces", "textures")),
        *(f"data/evaluations/{task}-0.csv" for task in ("faces", "textures")),
    }
    keys = ("coefficients", "objective", "constraint")
    assert search["params"][:-1] == [*(f"edits.some.{key}" for key in keys), "model"]
    three = ("digits", "faces", "textures")
    assert set(evaluate["deps"]) == {
        "data/checkpoints/pretrained.safetensors",
        "data/edits/some-0/model.safetensors",
        *(f"data/heads/{task}.safetensors" for task in three),
        *(
            f"data/prepared/{task}/{s}.safetensors"
            for task in three
            for s in ("test", "validation")
        ),
        *(f"data/evaluations/{task}-0.csv" for task in three),
        # what it is evaluated on must not be among what its vectors have learnt
        *(f"data/prepared/{task}/items.csv" for task in (*three, "letters", "mnist")),
    }
    assert evaluate["params"][:-1] == [
        "edits.some.evaluate", "edits.some.constraint", "model", "gates",
    ]  # fmt: skip
    for stage in found.values():
        assert all("test" not in dep or stage is evaluate for dep in stage["deps"])


def test_the_search_declares_the_keys_that_its_edit_has(checkout: Path) -> None:
    content = source()
    one = {"a": {"low": 0, "high": 1, "points": 2}}
    edit = {**EDITS, "expression": "a * mnist", "select": "largest", "coefficients": one}
    content["edits"] = {"some": edit}
    search = rendered(checkout, content, "edits/dvc.yaml")["edits/dvc.yaml"]["stages"][
        "search-some-0"
    ]
    assert "edits.some.select" in search["params"]
    del content["edits"]["some"]["select"], content["edits"]["some"]["constraint"]
    search = rendered(checkout, content, "edits/dvc.yaml")["edits/dvc.yaml"]["stages"][
        "search-some-0"
    ]
    assert not {"edits.some.select", "edits.some.constraint"} & set(map(str, search["params"]))


STUDY = {
    "variants": {
        "slow": {"of": ["mnist"], "fine_tune": {"steps": 9}},
        "joint": {"of": ["mnist", "faces"], "fine_tune": {}, "evaluate": ["faces", "digits"]},
    },
    "sweeps": {
        "pairs": {"vectors": ["mnist", "faces", "digits"], "sizes": [2], "seeds": [1],
                  "coefficient": {"low": 0, "high": 1, "points": 3}},
    },
    "few_shots": {"few": {"task": "digits", "edits": ["some"], "shots": [0, 2], "seeds": [0]}},
}  # fmt: skip


def test_variants_sweeps_and_few_shots_depend_on_exactly_what_they_read(checkout: Path) -> None:
    content = {**source(), **STUDY}
    content["edits"] = {"some": {**EDITS, "seeds": [0]}}
    files = rendered(checkout, content, "edits/dvc.yaml", "results/dvc.yaml")
    first, second = files["edits/dvc.yaml"]["stages"], files["results/dvc.yaml"]["stages"]
    train = first["fine_tune-joint-0"]
    assert train["cmd"] == "python -m tasks fine_tune joint-0"
    assert set(train["deps"]) == {
        "data/checkpoints/pretrained.safetensors",
        *(f"data/heads/{task}.safetensors" for task in ("mnist", "faces")),
        *(
            f"data/prepared/{task}/{split}.safetensors"
            for task in ("mnist", "faces")
            for split in ("train", "validation")
        ),
    }
    assert train["params"][:-1] == [
        "model", "fine_tune", "variants.joint.of", "variants.joint.fine_tune",
    ]  # fmt: skip
    evaluate = first["evaluate-joint-0"]
    assert "data/checkpoints/joint-0.safetensors" in evaluate["deps"]
    assert {f"data/heads/{task}.safetensors" for task in ("faces", "digits")} <= set(
        evaluate["deps"]
    )
    assert "data/heads/mnist.safetensors" not in evaluate["deps"]
    assert "data/prepared/mnist/items.csv" in evaluate["deps"]  # it has learnt from it
    assert first["extract-slow-0"]["deps"] == [
        "data/checkpoints/pretrained.safetensors", "data/checkpoints/slow-0.safetensors",
    ]  # fmt: skip
    few = first["few_shot-few-0"]
    assert "data/edits/some-0/model.safetensors" in few["deps"]
    assert few["outs"] == ["data/few_shots/few-0.csv"]
    # an edit, a sweep and a few-shot study are made for the seeds that they name
    assert "sweep-pairs-1" in second and "sweep-pairs-0" not in first
    assert "few_shot-few-1" not in second and "search-some-1" not in second
    sweep = second["sweep-pairs-1"]
    assert {f"data/vectors/{t}-1.safetensors" for t in ("mnist", "faces", "digits")} <= set(
        sweep["deps"]
    )
    assert sweep["params"][:-1] == ["sweeps.pairs", "model"]


def test_an_experiment_is_one_file_with_all_seeds_and_the_stages_of_the_repository(
    checkout: Path,
) -> None:
    content = {**source(), **STUDY, "study": "addition"}
    content["edits"] = {"some": EDITS}
    root = checkout / "experiments" / "trial"
    texts = plan.render(root, params.validate(content))
    assert {str(path.relative_to(root)) for path in texts} == {
        "code.yaml", "dvc.yaml", ".dvc/config",
    }  # fmt: skip
    assert sorted(texts) == sorted(plan.rendered(root))
    stages = YAML(typ="safe").load(texts[root / "dvc.yaml"])["stages"]
    repository = source_stages(checkout)
    assert list(stages)[: len(repository) - 1] == [n for n in repository if n != "report"]
    assert stages["fine_tune"]["matrix"]["seed"] == [0, 1]
    assert {"search-some-0", "search-some-1", "sweep-pairs-1", "report", "report-study"} < set(
        stages
    )
    # Equal stages of two experiments must have one key in the run cache: equal words and paths.
    own = rendered(checkout, content, "edits/dvc.yaml")["edits/dvc.yaml"]["stages"]
    for name, block in own.items():
        assert {**stages[name], "wdir": ".."} == block, name
    assert stages["prepare"]["do"] == repository["prepare"]["do"]


def test_the_dvc_project_of_an_experiment_shares_the_cache(checkout: Path) -> None:
    (checkout / ".dvc").mkdir()
    root = checkout / "experiments" / "trial"
    for line, expected in (("", "../../../.dvc/cache"), ("dir = /big", "/big")):
        (checkout / ".dvc/config").write_text(f'[cache]\n    type = "reflink,copy"\n    {line}\n')
        text = plan.render(root, params.validate(source()))[root / ".dvc/config"]
        assert f"dir = {expected}\n" in text and 'type = "reflink,copy"' in text


def source_stages(root: Path) -> Content:
    return dict(YAML(typ="safe").load((root / "dvc.yaml").read_text())["stages"])


def test_align_tasks_decide_what_the_base_depends_on(checkout: Path) -> None:
    content = source()
    for chosen in (["faces", "mnist"], []):
        content["model"]["align_tasks"] = chosen
        pretrain = rendered(checkout, content, "dvc.yaml")["dvc.yaml"]["stages"]["pretrain"]
        assert pretrain["deps"] == [f"data/prepared/{t}/alignment.safetensors" for t in chosen]


def test_an_experiment_without_edits_renders(checkout: Path) -> None:
    content = source()
    content["edits"] = {}
    assert rendered(checkout, content, "edits/dvc.yaml")["edits/dvc.yaml"] == {"stages": {}}


HOSTILE = ("$(touch x)", "; touch x", "${item}", "a\nb", "'\"", "x y")


@pytest.mark.parametrize("text", HOSTILE)
def test_no_string_of_the_parameters_reaches_a_command(checkout: Path, text: str) -> None:
    """Put shell syntax into every string in turn: it is refused, or no command holds it."""
    content = source()
    content["tasks"] = {name: content["tasks"][name] for name in ("digits", "faces")}
    content["model"]["align_tasks"] = ["digits"]
    edit = {**content["edits"]["forget_digits"], "evaluate": ["digits", "faces"]}
    content["edits"] = {"forget": {**edit, "constraint": {"tasks": ["faces"], "min_ratio": 0.9}}}
    places = list(string_places(content))
    assert len(places) > 80
    accepted = 0
    for place in places[:: 1 if text == HOSTILE[0] else 5]:
        poisoned = replaced(content, place, text)
        try:
            files = rendered(checkout, poisoned, *GRAPHS)
        except TaskvecError:
            continue
        accepted += 1
        for command in commands(files):
            assert COMMAND.fullmatch(command), command
        for part in strings([list(file["stages"].values()) for file in files.values()]):
            assert text not in part or text == "${item}", (place, part)
    assert accepted  # class names and templates may hold anything


def string_places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every string; a way that ends in None means a key."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*place, key, None)
            yield from string_places(item, (*place, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from string_places(item, (*place, i))
    elif isinstance(value, str):
        yield place


def replaced(content: Content, place: tuple[Any, ...], text: str) -> Content:
    result = copy.deepcopy(content)
    *way, last = place if place[-1] is not None else place[:-1]
    node: Any = result
    for part in way:
        node = node[part]
    if place[-1] is None:
        node[text] = node.pop(last)
    else:
        node[last] = text
    return result


@settings(max_examples=10, deadline=None)
@given(
    task=st.from_regex(re.compile(NAME, re.ASCII), fullmatch=True), seed=st.integers(0, 2**31 - 1)
)
def test_any_name_is_the_same_text_after_rendering(task: str, seed: int) -> None:
    """YAML has words that are no text (null, true, 1e5): names stay names."""
    content = {**source(), "seeds": [seed], "edits": {}}
    content["tasks"] = {task: content["tasks"]["mnist"]}
    content["model"]["align_tasks"] = [task]
    files = rendered(ROOT, content, *GRAPHS)
    assert files["dvc.yaml"]["stages"]["prepare"]["foreach"] == [task]
    assert all(COMMAND.fullmatch(command) for command in commands(files))


@pytest.mark.parametrize("name", ["null", "true", "on", "no", "y", "e1", "N", "key", "item"])
def test_words_that_mean_something_in_yaml_are_names_like_any_other(name: str) -> None:
    content = {**source(), "edits": {}}
    content["tasks"] = {name: content["tasks"]["mnist"]}
    content["model"]["align_tasks"] = []
    files = rendered(ROOT, content, *GRAPHS)
    assert files["dvc.yaml"]["stages"]["prepare"]["foreach"] == [name]


def test_a_missing_or_broken_dvc_yaml_is_one_line_with_its_place(checkout: Path) -> None:
    loaded = params.load(checkout / "params.yaml")
    path = checkout / "dvc.yaml"
    text = path.read_text()
    path.write_text(
        text.replace("    cmd: python -m tasks pretrain", "   cmd: python -m tasks pretrain")
    )
    with pytest.raises(TaskvecError, match=r"dvc\.yaml:\d+: "):
        plan.render(checkout, loaded)
    path.write_text(text.replace("  pretrain:\n", "  pre_train:\n"))
    with pytest.raises(TaskvecError, match=r"dvc\.yaml lacks .*'pretrain'"):
        plan.render(checkout, loaded)
    path.unlink()
    with pytest.raises(InvalidParams, match="does not exist"):
        plan.render(checkout, loaded)


def test_the_rendering_is_remembered_until_a_source_or_a_rendered_file_changes(
    checkout: Path,
) -> None:
    (checkout / ".dvc").mkdir()
    (checkout / ".dvc/config").write_text("[core]\n")
    assert not rendering.is_fresh(checkout)
    rendering.remember(checkout)
    assert rendering.is_fresh(checkout)
    moved = checkout.rename(checkout.with_name("moved"))
    assert rendering.is_fresh(moved)
    moved.rename(checkout)
    for name in ("params.yaml", ".dvc/config", *RENDERED):
        path = checkout / name
        text = path.read_text()
        path.write_text(f"{text}\n")
        assert not rendering.is_fresh(checkout), name
        path.write_text(text)
        assert rendering.is_fresh(checkout)
        path.unlink()
        assert not rendering.is_fresh(checkout), name
        path.write_text(text)


# `python -m tasks`, which DVC calls


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serch", "addition-0"], "did you mean 'search'"),
        (["../search", "addition-0"], "unknown stage"),
        (["combine", "additon-0"], "did you mean 'addition'"),
    ],
)
def test_a_wrong_stage_or_item_ends_with_the_nearest_names_and_writes_nothing(
    checkout: Path, words: list[str], message: str
) -> None:
    before = listing(checkout)
    done = command_line(checkout, "tasks", *words)
    assert done.returncode == 3, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert listing(checkout) == before


@pytest.mark.parametrize(
    ("stage", "item", "message"),
    [
        ("prepare", "mnits", "did you mean 'mnist'"),
        ("prepare", "", "unknown task"),
        ("head", "mnist-0", "unknown task"),
        ("fine_tune", "addition-0", "unknown task"),
        ("extract", "-0", "expected a name and a seed"),
        ("combine", "addition", "expected a name and a seed"),
        ("combine", "addition-x", "expected a name and a seed"),
        ("search", "addition-0-0", "unknown edit"),
        ("evaluate", "mnits-0", "unknown edit"),
        ("combine", "mnist-0", "unknown edit"),
    ],
)
def test_every_stage_refuses_an_item_that_it_does_not_have(
    stage: str, item: str, message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        stages.arguments(stage, item, params.load(ROOT / "params.yaml"))


@pytest.mark.parametrize("words", [[], ["combine", "a-0", "b"]])
def test_a_wrong_number_of_words_shows_the_usage(checkout: Path, words: list[str]) -> None:
    done = command_line(checkout, "tasks", *words)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: python -m tasks STAGE [ITEM]")
    assert all(name in done.stderr for name in stages.NAMES)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("code.yaml", "combine:\n  addition: ", "combine:\n  addition: 0"),
        ("params.yaml", "expression: c * (mnist + digits", "expression: c * (digits + digits"),
    ],
)
def test_a_stage_refuses_to_work_while_a_rendered_file_is_stale(
    checkout: Path, name: str, old: str, new: str
) -> None:
    text = (checkout / name).read_text()
    assert old in text
    (checkout / name).write_text(text.replace(old, new, 1))
    before = listing(checkout)
    done = command_line(checkout, "tasks", "combine", "addition-0")
    assert done.returncode == 3
    assert "taskvec status" in done.stderr
    assert listing(checkout) == before
