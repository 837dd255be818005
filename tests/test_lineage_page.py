"""The page of a lineage: a layered picture, nothing fetched, nothing that a name could break."""

import json
import re
from pathlib import Path
from typing import Any

import networkx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.lineage_page import layers, page
from tests.programs import require_program

law = settings(deadline=None, max_examples=100)


@st.composite
def graphs(draw: st.DrawFn) -> networkx.DiGraph:
    """Draw a graph without cycles: edges lead from smaller to larger numbers."""
    number = draw(st.integers(1, 14))
    pairs = st.tuples(st.integers(0, number - 1), st.integers(0, number - 1))
    found: networkx.DiGraph = networkx.DiGraph()
    found.add_nodes_from(f"n{i}" for i in range(number))
    found.add_edges_from(
        (f"n{min(p)}", f"n{max(p)}") for p in draw(st.lists(pairs)) if p[0] != p[1]
    )
    return found


@law
@given(graphs())
def test_every_node_is_right_of_what_it_was_made_from(graph: networkx.DiGraph) -> None:
    columns = layers(graph)
    place = {name: column for column, names in enumerate(columns) for name in names}
    assert sorted(place) == sorted(graph)
    assert all(place[a] < place[b] for a, b in graph.edges)
    assert layers(graph) == columns


def test_a_chain_of_pairs_is_drawn_without_crossings() -> None:
    graph: networkx.DiGraph = networkx.DiGraph()
    for row in "abcd":
        graph.add_edge(f"left {'dcba'['abcd'.index(row)]}", f"right {row}")
    left, right = layers(graph)
    assert [name[-1] for name in left] == ["dcba"["abcd".index(name[-1])] for name in right]


def test_a_cycle_is_drawn_as_one_column() -> None:
    graph: networkx.DiGraph = networkx.DiGraph([("a", "b"), ("b", "a")])
    assert layers(graph) == [["a", "b"]]


def traced(number: int) -> networkx.DiGraph:
    """Return a graph as `flows.trace.graph` gives it: files and stages by turns."""
    found: networkx.DiGraph = networkx.DiGraph()
    found.add_node("f0", kind="data", label="data/prepared/a/train.safetensors")
    for i in range(1, number):
        run = {"by": "</script><script>alert(1)</script>", "MLflow run": "1" * 32}
        found.add_node(f"s{i}", kind="stage", label=f"stage {i}", stage=f"stage {i}",
                       parameters={"steps": i}, run=run)  # fmt: skip
        found.add_node(f"f{i}", kind="checkpoint", label=f"data/checkpoints/<b>{i}.safetensors")
        found.add_edge(f"f{(i - 1) // 3}", f"s{i}")
        found.add_edge(f"s{i}", f"f{i}")
    return found


def content(text: str) -> Any:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(found)


@pytest.mark.parametrize("number", [1, 5, 50, 500])
def test_the_page_holds_every_file_and_how_it_was_made(number: int) -> None:
    text = page(traced(number), "f0", "mnist & <co>", {"f1": "trained on test"})
    found = content(text)
    assert len(found["nodes"]) == number and len(found["edges"]) == number - 1
    assert "Lineage of mnist &amp; &lt;co&gt;" in text
    assert text.count("<script") == 2  # a name cannot add one
    assert not re.search(r"(?:src|href)\s*=|https?://(?!www\.w3\.org/2000/svg)", text)
    for node in found["nodes"]:
        if node["id"] != "f0":
            assert node["made"]["stage"] == f"stage {node['id'][1:]}"
            assert node["made"]["parameters"] == {"steps": int(node["id"][1:])}
        assert node["retracted"] == ("trained on test" if node["id"] == "f1" else "")


def test_files_that_are_no_part_of_the_question_are_left_out() -> None:
    graph = traced(10)
    found = content(page(graph, "f4", "f4", {}))
    assert {node["id"] for node in found["nodes"]} == {"f4", "f1", "f0"}


@pytest.mark.system
def test_a_browser_shows_and_explains_it(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    path = tmp_path / "lineage.html"
    path.write_text(page(traced(50), "f0", "everything", {"f3": "bad"}))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=require_program("chromium"), args=["--no-sandbox"]
        )
        view = browser.new_page()
        errors: list[str] = []
        view.on("pageerror", lambda error: errors.append(str(error)))
        view.goto(path.as_uri())
        assert view.locator(".node").count() == 50
        assert view.locator(".node.bad").count() == 1
        view.fill("#search", "<b>7.")
        assert "stage 7" in view.inner_text("#facts")
        assert view.locator(".node.near").count() == 3 + 3  # 7, what it is made of, what is of it
        before = view.get_attribute("#picture", "viewBox")
        view.mouse.move(300, 300)
        view.mouse.wheel(0, -400)
        view.wait_for_function(
            f"document.getElementById('picture').getAttribute('viewBox') !== '{before}'"
        )
        view.click("#fit")
        assert view.get_attribute("#picture", "viewBox") == before
        assert errors == []
        browser.close()
