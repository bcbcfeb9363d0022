"""The report stands alone, says what was found, and treats what comes from data as text."""

import base64
import csv
import errno
import io
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from einlinear.lab.report import live, page, print_summary, save_figure, watch, write_report
from einlinear.lab.report.charts import label
from einlinear.lab.report.maps import places
from einlinear.lab.report.routers import family_health
from einlinear.lab.run import Run
from einlinear.lab.summary import answer, summary


class Page(HTMLParser):
    """Attributes that load something, the visible text, and the text of each script."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source, self.loads, self.text, self.scripts, self.tags = source, [], [], [], []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags[-1:] == ["script"] and self.cdata_elem == "script":
            self.scripts[-1] += data
        elif self.cdata_elem is None:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def _decoded(link: str) -> str:
    return base64.b64decode(link.split(",")[1]).decode()


def _json(link: str) -> dict:
    return json.loads(_decoded(link), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.fixture(scope="module")
def written(study, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    write_report(study, path, command="einlinear compare --seed 0")
    return path


@pytest.fixture(scope="module")
def parsed(written):
    return Page(written.read_text())


def test_the_page_loads_nothing_and_is_small(written, parsed):
    assert written.stat().st_size < 3_000_000
    assert parsed.loads and all(value.startswith("data:") for value in parsed.loads)
    assert "default-src 'none'" in parsed.source
    styles = re.findall(r"<style>(.*?)</style>", parsed.source, re.S)
    assert not any("url(" in style or "@import" in style for style in styles)


def test_the_answer_comes_first_and_everything_is_told(study, parsed):
    words, said = parsed.words, answer(summary(study))
    assert said.startswith("At equal loss, dense needs 1.5")
    first = said.split(" By ")[0]
    assert words.index(first) < words.index("Loss against training compute")
    for family in {run.family for run in study}:
        assert family in words
    assert "loss is not a number at step 1,904" in words and "einlinear compare --seed 0" in words
    for fact in ("3f9a1c02be774d10", "torch 2.13.0", "1a2b3c4", "cpu, 2 threads", "batch 32", "One seed per size"):
        assert fact in words
    rows = re.search(r'<table id="runs">(.*?)</table>', parsed.source, re.S).group(1).count("<tr") - 1
    assert rows == len(study)


def test_the_charts_hold_the_runs_and_the_laws(study, parsed):
    charts = json.loads(next(script for script in parsed.scripts if script.startswith("{")))
    assert set(charts) == {"flops", "seconds", "parameters", "multipliers", "tuning", "taxonomy"}
    for name in charts:
        assert f'id="{name}"' in parsed.source
    sizes = {json.dumps(row) for rows in charts["flops"]["datasets"].values() for row in rows if "seeds" in row}
    assert len(sizes) == sum(run.purpose == "measure" and run.status == "done" for run in study)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("btt(rank=2)", "btt(rank=2)"),
        ("theta(theta=(0.3333, 0.0, 0.6667, 0.0, 0.3333, 0.6667, 0.0))", "θ(1/3, 0, 2/3, 0, 1/3, 2/3, 0)"),
        ("theta(theta=(1.0, 0.25, 0.0, 0.4, 0.75, 0.0, 0.1))", "θ(1, 1/4, 0, 2/5, 3/4, 0, 1/10)"),
        (
            "mixture(of='theta(theta=(0.5, 0.5, 0.0, 0.5, 0.5, 0.0, 0.0))', experts=4, active=2)",
            "mixture(of='θ(1/2, 1/2, 0, 1/2, 1/2, 0, 0)', experts=4, active=2)",
        ),
    ],
)
def test_figures_name_exponents_as_fractions(family, name):
    assert label(family) == name


def test_without_javascript_the_main_figures_are_there(parsed):
    pictures = re.findall(r"<noscript><svg(.*?)</svg></noscript>", parsed.source, re.S)
    assert len(pictures) == 2 and all("training FLOPs" in picture for picture in pictures)


def test_downloads_are_the_runs_and_the_summary(study, parsed):
    rows = list(csv.DictReader(io.StringIO(_decoded(parsed.loads[0]))))
    assert [(row["family"], int(row["flops"]), row["status"]) for row in rows] == [
        (run.family, run.flops, run.status) for run in study
    ]
    assert _json(parsed.loads[1])["families"][1]["multipliers"]["flops"]["verdict"] == "better"


def test_structures_lie_where_their_exponents_say(study):
    rows = {row["family"]: row for row in places(summary(study))}
    assert set(rows) == {run.family for run in study}
    assert (rows["btt(rank=1)"]["psi"], rows["btt(rank=1)"]["nu"], rows["btt(rank=1)"]["omega"]) == (1, 0.5, 0)
    assert rows["dense"]["multiplier"] == 1 and rows["btt(rank=1)"]["multiplier"] > 1.2
    heights = [row["height"] for row in rows.values()]
    assert len(set(heights)) == len(heights)
    foreign = [replace(run, family="my own layer") if run.family == "btt(rank=1)" else run for run in study]
    assert "my own layer" not in {row["family"] for row in places(summary(foreign))}


def routed(study: list[Run]) -> list[Run]:
    """The study, one of whose structures has two layers of four experts; the last one of the first layer died."""
    history = {"tokens": [10, 20], "entropy": [1.0, 0.6], "busiest": [0.3, 0.5], "idlest": [0.2, 0.0]}
    history |= {"dead": [0, 1], "dropped": [0.0, 0.02]}
    dying = {"load": [0.5, 0.3, 0.2, 0.0], "entropy": 0.6, "dropped": 0.02, "history": history}
    even = {"load": [0.25] * 4, "entropy": 0.8, "dropped": 0.0, "history": history | {"dead": [0, 0]}}
    text = json.dumps({"blocks.0.mlp": dying, "blocks.1.mlp": even})
    return [replace(run, routers=text) if run.family == "btt(rank=1)" else run for run in study]


def test_router_health_is_shown_when_runs_carry_it(study, tmp_path):
    runs = routed(study)
    (health,) = family_health(summary(runs))
    assert (health.family, health.run.width, health.layers, health.experts) == ("btt(rank=1)", 512, 2, 8)
    assert (health.dead, health.worst, health.busiest, health.idlest, health.entropy) == (1, 1, 2.0, 0.0, 0.7)
    assert (health.runs_with_dead, health.runs) == (8, 8)
    write_report(runs, tmp_path / "r.html")
    parsed = Page((tmp_path / "r.html").read_text())
    assert "Some runs end with dead experts" in parsed.words and "1 of 8" in parsed.words
    charts = json.loads(next(script for script in parsed.scripts if script.startswith("{")))
    assert all(f'id="{name}"' in parsed.source for name in charts)
    loads, dead = ([row for rows in charts[name]["datasets"].values() for row in rows] for name in ("loads", "dead"))
    assert [row["load"] for row in loads if row.get("layer") == "blocks.0.mlp"] == [2.0, 1.2, 0.8, 0.0]
    assert [row["share"] for row in dead if row["kind"] == "dead experts"] == [0, 1 / 8]
    table = list(csv.DictReader(io.StringIO(_decoded(parsed.loads[-1]))))
    assert len(table) == 2 * sum(run.family == "btt(rank=1)" for run in study)
    assert (table[0]["layer"], table[0]["dead"], table[0]["busiest"]) == ("blocks.0.mlp", "1", "2.0")


def test_without_experts_nothing_is_said_of_routers(study, parsed):
    assert family_health(summary(study)) == [] and "Router health" not in parsed.words


def test_the_law_card_is_on_the_page_and_below_it(study, parsed):
    card = _json(parsed.loads[2])
    assert card["baseline"] == "dense" and set(card["families"]) == {run.family for run in study}
    assert card["multiplier"]["btt(rank=1)"]["verdict"] == "better"
    assert "2 numbers of tokens" in parsed.words  # why no surface was fitted to two horizons


def test_watching_writes_the_page_again_for_new_runs_until_interrupted(study, tmp_path, monkeypatch):
    looks, pages = iter([study[:0], study[:12], study[:12], study]), []
    path = tmp_path / "r.html"

    def read():
        try:
            return next(looks)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(live.time, "sleep", lambda seconds: None)
    with pytest.raises(KeyboardInterrupt):
        watch(read, path, every=7, told=lambda runs: pages.append(path.read_text()))
    assert len(pages) == 2 and all('http-equiv="refresh" content="7"' in page for page in pages)
    assert "12 runs so far" in pages[0] and f"{len(study)} runs so far" in pages[1]
    assert 'http-equiv="refresh"' not in path.read_text()


def test_text_from_data_is_escaped(make_study, tmp_path):
    evil = '<script>alert("x")</script>'
    runs = [replace(run, device=evil, reason=run.reason and evil) for run in make_study(evil)]
    write_report(runs, tmp_path / "r.html", command=evil)
    parsed = Page((tmp_path / "r.html").read_text())
    assert not any("alert" in script for script in parsed.scripts if not script.startswith("{"))
    assert parsed.tags.count("script") == 3 and evil not in parsed.source
    assert evil in parsed.words


def test_a_plan_is_listed(study, tmp_path):
    @dataclass(frozen=True)
    class Recipe:
        batch: int = 77

    @dataclass(frozen=True)
    class Plan:
        widths: tuple[int, ...] = (64, 128)
        recipe: Recipe = Recipe()

    write_report(study, tmp_path / "r.html", plan=Plan())
    words = Page((tmp_path / "r.html").read_text()).words
    assert "64, 128" in words and "recipe.batch 77" in words


@pytest.mark.parametrize(
    "choose",
    [
        lambda run: False,
        lambda run: run.family == "dense",
        lambda run: run.family != "dense",
        lambda run: run.purpose == "tune",
        lambda run: run.width == 64 and run.purpose == "measure",
        lambda run: run.status != "done",
    ],
    ids=["nothing", "only dense", "no dense", "only tuning", "one width", "all diverged"],
)
def test_an_unfinished_study_has_a_report_too(study, tmp_path, choose):
    runs = [run for run in study if choose(run)]
    write_report(runs, tmp_path / "r.html")
    parsed = Page((tmp_path / "r.html").read_text())
    assert answer(summary(runs)).split(":")[0] in parsed.words
    assert len(_json(parsed.loads[1])["families"]) == len({run.family for run in runs})
    print_summary(summary(runs), Console(file=io.StringIO()))


def test_numbers_are_whole_in_a_terminal_of_80_columns(study):
    """Long names are folded instead; a squeezed table would leave nothing of the numbers."""
    named = "theta(theta=(0.3333, 0.6667, 0.0, 0.0, 0.6667, 0.3333, 0.0))"
    found = summary([replace(run, family=named) if run.family != "dense" else run for run in study])
    print_summary(found, Console(file=(text := io.StringIO()), width=80))
    shown = text.getvalue().split("\n\n")[0].split()
    for family in found.families:
        assert {f"{family.best_loss:.4f}", str(family.runs)} <= {*shown}
        for axis in ("flops", "seconds", "parameters") if family.family != "dense" else ():
            assert {*str(family.multipliers[axis]).split()} <= {*shown}


def test_a_full_disk_leaves_the_old_report_and_one_sentence(study, tmp_path, monkeypatch):
    path = tmp_path / "r.html"
    path.write_text("the old one")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(page.os, "replace", full)
    with pytest.raises(OSError, match=r"^Writing the report to .*r\.html: no space left on device; make room"):
        write_report(study, path)
    assert path.read_text() == "the old one" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_is_one_sentence(study, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"^Writing the figure to "):
        save_figure(study, tmp_path / "file" / "figure.svg")


def test_the_figure_is_svg_or_png(study, tmp_path):
    save_figure(study, tmp_path / "f.svg")
    save_figure(study, tmp_path / "f.png")
    assert (tmp_path / "f.svg").read_text().startswith("<svg") and "btt(rank=1)" in (tmp_path / "f.svg").read_text()
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"only \.svg and \.png"):
        save_figure(study, tmp_path / "f.pdf")


def test_the_terminal_table_has_multipliers_and_failures(study):
    text = io.StringIO()
    print_summary(summary(study), Console(file=text, width=140))
    lines = text.getvalue().splitlines()
    btt = next(line for line in lines if "btt(rank=1)" in line)
    assert re.search(r"1\.5\d× \(1\.\d\d–1\.\d\d\) better", btt) and "worse" in btt
    assert any("monarch" in line and "7 (1 failed)" in line for line in lines)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (999, "999"), (1234, "1.23 k"), (3.06e14, "306 T"), (float("nan"), "–")]
)
def test_quantities(value, text):
    assert page.quantity(value).replace(page.SPACE, " ") == text


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(0.0638, 2, "0.064"), (154.0, 2, "150"), (478712.0, 2, "480000"), (2.1e128, 2, "2.1e128"), (None, 3, "–")],
)
def test_numbers_are_written_out(value, digits, text):
    assert page.number(value, digits) == text


def test_a_browser_draws_every_chart_without_complaint(written, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine: the page was not rendered")
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--no-first-run", f"--user-data-dir={tmp_path}",
            f"--log-net-log={tmp_path / 'net.json'}",
            "--enable-logging=stderr", "--virtual-time-budget=8000", "--dump-dom", written.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    drawn = re.findall(r'<div class="chart[^"]*" id="(\w+)".*?<svg', done.stdout, re.S)
    assert drawn == ["flops", "seconds", "parameters", "multipliers", "taxonomy", "tuning"]
    assert done.stdout.count("data of this figure (CSV)</button>") == 6
    assert done.stdout.count("this table (CSV)</button>") == len(re.findall('<div class="scroll', done.stdout))
    requests = json.loads((tmp_path / "net.json").read_text())
    asked = {event["params"]["url"] for event in requests["events"] if "url" in event.get("params", {})}
    assert not [url for url in asked if url.startswith(("http:", "https:", "ws:")) and "google" not in url]
