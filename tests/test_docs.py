"""The site: it builds without a warning, everything on it that can be clicked exists, and it says what the
notebooks say."""
import json
import os
import re
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag

import nbformat
import pytest
import yaml
from conftest import ROOT, code_notebook, notebooks, run

from visionbench import docs

SIDEBAR = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]


class Page(HTMLParser):
    """The links, sources and ids of an HTML page."""

    def __init__(self, text):
        super().__init__()
        self.links, self.ids = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for key, value in attributes:
            hint = tag == "link" and ("rel", "preconnect") in attributes
            if key in ("href", "src") and value and not hint:
                self.links.add(value)
            if key in ("id", "name") and value:
                self.ids.add(value)


def hrefs(entries):
    """The pages a sidebar names, with those of its sections."""
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        else:
            yield from [entry["href"]] if "href" in entry else []
            yield from hrefs(entry.get("contents", []))


def broken_links(site):
    """`page: link` for each link of a site that leads nowhere, be it a file or a place on a page."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z][a-z0-9+.-]*:|//", link):
                continue
            file, place = urldefrag(link)
            file = unquote(file.split("?")[0])
            base = site if file.startswith("/") else path.parent
            target = (base / file.lstrip("/")).resolve() if file else path
            target = target / "index.html" if target.is_dir() else target
            unknown = place and target in pages and unquote(place) not in pages[target].ids
            if not target.is_file() or unknown:
                yield f"{path.relative_to(site)}: {link}"


def test_sidebar_names_every_notebook_once():
    named, there = list(hrefs(SIDEBAR)), [p.relative_to(ROOT / "nbs").as_posix() for p in notebooks()]
    assert len(named) == len(set(named)), "named twice"
    assert set(named) == set(there), (f"not in _quarto.yml: {sorted(set(there) - set(named))}; "
                                      f"no such file: {sorted(set(named) - set(there))}")


def test_one_configuration_serves_both_places():
    link = ROOT / "nbs" / "_quarto.yml"
    assert link.is_symlink() and os.readlink(link) == "../_quarto.yml"


def test_readme_equals_the_index_notebook():
    text, figures = docs.readme_text(nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4))
    assert (ROOT / "README.md").read_text(encoding="utf-8") == text, "run `visionbench docs`"
    for name, content in figures.items():
        same = (ROOT / name).read_bytes() == content
        assert same, f"{name} is not the figure in the notebook; run `visionbench docs`"
    for file in re.findall(r"\]\((?![a-z]+:|#)([^)\s]+)\)", text):
        assert (ROOT / file.split("#")[0]).exists(), f"README links to {file}"


def test_every_notebook_is_a_page(site):
    made = {p.relative_to(site).with_suffix("").as_posix() for p in site.rglob("*.html")}
    assert {p.relative_to(ROOT / "nbs").with_suffix("").as_posix() for p in notebooks()} <= made


def test_every_link_leads_somewhere(site):
    assert not sorted(broken_links(site))


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#here">1</a><a href="b.html#there">2</a>'
                                     '<a href="/c.html">3</a><a href="https://x.org">4</a>')
    (tmp_path / "b.html").write_text('<h2 id="here">x</h2><a href="a.html">5</a>')
    assert sorted(broken_links(tmp_path)) == ["a.html: /c.html", "a.html: b.html#there"]


def test_a_chapter_shows_signatures_and_hides_directives(site):
    page = (site / "docs.html").read_text(encoding="utf-8")
    assert 'id="plotly_outputs"' in page and "a notebook cell; changed in place" in page
    assert "default_exp" not in page and "#| export" not in page


def project(folder, pages, sidebar=("index.ipynb",)):
    """A small checkout in `folder` with this project's settings; `pages` maps names to lists of cells."""
    for name, cells in pages.items():
        (folder / "nbs" / name).parent.mkdir(parents=True, exist_ok=True)
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# {name}\n\n> a page"), *cells])
        nbformat.write(nb, folder / "nbs" / name)
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    settings = settings.replace("lib_path = visionbench", "lib_path = none")
    (folder / "settings.ini").write_text(settings, encoding="utf-8")
    quarto = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    quarto["website"] = {"title": "small", "sidebar": {"contents": list(sidebar)}}
    (folder / "_quarto.yml").write_text(yaml.safe_dump(quarto))
    (folder / "nbs" / "_quarto.yml").symlink_to("../_quarto.yml")
    return folder


def build(folder, **options):
    return run(sys.executable, "-m", "visionbench.docs", cwd=folder, timeout=120,
               PYTHONPATH=str(ROOT), **options)


def test_a_plotly_figure_becomes_html_in_the_staged_notebook(tmp_path):
    data = {docs.PLOTLY: {"data": [{"type": "scatter", "y": [1, 4, 9]}], "layout": {}},
            "text/plain": "Figure"}
    cell = nbformat.v4.new_code_cell("fig", outputs=[nbformat.v4.new_output("display_data", data=data)])
    build(project(tmp_path, {"index.ipynb": [], "deep/er/plot.ipynb": [cell]},
                  ["index.ipynb", "deep/er/plot.ipynb"]))
    staged = json.loads((tmp_path / "_proc/deep/er/plot.ipynb").read_text())
    shown = "".join(staged["cells"][-1]["outputs"][0]["data"]["text/html"])
    assert re.search(r'<div id="plotly-[0-9a-f]{12}"', shown) and "[1,4,9]" in shown
    page = (tmp_path / "_docs/deep/er/plot.html").read_text()
    assert '<script src="../../plotly.min.js">' in page
    assert (tmp_path / "_docs/plotly.min.js").stat().st_size > 1e6
    assert not [*broken_links(tmp_path / "_docs")]


def test_a_broken_link_stops_the_build(tmp_path):
    link = nbformat.v4.new_markdown_cell("[nowhere](missing.ipynb)")
    project(tmp_path, {"index.ipynb": [link]})
    done = build(tmp_path, check=False)
    assert done.returncode != 0 and "broken link missing.ipynb" in done.stdout
    assert "Traceback" not in done.stdout
    assert not (tmp_path / "_docs").exists()


def test_a_second_build_returns_at_once_and_a_change_is_seen(tmp_path, monkeypatch):
    project(tmp_path, {"index.ipynb": []})
    build(tmp_path)
    monkeypatch.setattr(docs, "stage", lambda *_: pytest.fail("built again though nothing changed"))
    assert docs.build(tmp_path) == tmp_path / "_docs"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# new\n\n> page")]),
                   tmp_path / "nbs" / "index.ipynb")
    with pytest.raises(pytest.fail.Exception, match="built again"):
        docs.build(tmp_path)


def test_a_checkout_below_a_hidden_folder_builds(tmp_path):
    """nbdev passes over every path with a part that starts with a dot, so an absolute path would lose all
    pages."""
    folder = tmp_path / ".cache" / "clone"
    folder.mkdir(parents=True)
    build(project(folder, {"index.ipynb": []}))
    assert (folder / "_docs" / "index.html").exists()


def test_outside_a_checkout_the_message_is_one_line(tmp_path):
    done = build(tmp_path, check=False)
    assert done.returncode != 0 and "settings.ini" in done.stdout
    assert len(done.stdout.strip().splitlines()) == 1


def test_executing_a_failing_notebook_leaves_it_as_it_was(tmp_path):
    from nbclient.exceptions import CellExecutionError

    path = tmp_path / "wrong.ipynb"
    nbformat.write(code_notebook("1 / 0"), path)
    before = path.read_bytes()
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        docs.execute_notebooks([path])
    assert path.read_bytes() == before
