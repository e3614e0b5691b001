"""The published tables and the chart of results: they are what the committed JSON says."""

from __future__ import annotations

import itertools
import json
import sys
from xml.etree import ElementTree

import pytest
from bench_scripts import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))
import readme_table as table


@pytest.fixture
def report():
    return json.loads(table.RESULTS.read_text())


@pytest.fixture
def copies(tmp_path, report):
    """Files of their own: arguments, the JSON, a page and the chart."""
    results, page, chart = (tmp_path / name for name in ("results.json", "page.md", "speed.svg"))
    page.write_text(
        "\n".join(f"{table.BEGIN.format(k)}\n{table.END.format(k)}" for k in ("table", "summary"))
    )
    results.write_text(json.dumps(report))
    return ["--json", results, "--pages", page, "--chart", chart], results, page, chart


def main(arguments, *more):
    return table.main([*map(str, arguments), *more])


def test_published_figures_are_the_committed_ones():
    assert table.main(["--check"]) == 0


def test_results_are_written_with_a_record_to_a_line(module, report, tmp_path):
    module("report").write_json(report, tmp_path / "out.json")
    text = (tmp_path / "out.json").read_text()
    assert text == table.RESULTS.read_text()
    records = [line.strip().removesuffix(",") for line in text.splitlines() if line[:2] == "  "]
    listed = (report[name] for name in ("limits", "results", "saved_bytes", "notes"))
    assert list(map(json.loads, records)) == list(itertools.chain(*listed))


def test_rows_are_the_results(report):
    lines = [line for line in table.render_table(report).splitlines() if line.startswith("| ")][1:]
    results = [r for case in table.TITLES for r in report["results"] if r["case"] == case]
    assert {r["batch"] for r in results} >= {1, 4, 64, 256}
    for line, result in zip(lines, results, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        medians = {row["name"]: row["median_us"] for row in result["rows"] if "median_us" in row}
        assert cells[1:3] == [str(result["batch"]), str(result["threads"])]
        fused, best = (float(cell.replace(",", "")) for cell in cells[3:5])
        assert fused == pytest.approx(medians.pop("fused"), abs=0.5)
        assert best == pytest.approx(min(medians.values()), abs=0.5)
        assert cells[5] == table.PEERS[min(medians, key=medians.get)]
        assert float(cells[6]) == pytest.approx(best / fused, rel=0.06)
    summary = table.render_summary(report).splitlines()[2:]
    batch64 = {
        line.split("|")[4] for line, r in zip(lines, results, strict=True) if r["batch"] == 64
    }
    assert {line.split("|")[4] for line in summary} == batch64
    assert len(summary) == len(table.TITLES)


def test_chart_is_small_and_says_how_many_times_as_fast(report):
    text = table.draw(report)
    assert len(text.splitlines()) < 70
    ElementTree.fromstring(text)
    for result in table.summary(report):
        medians = {row["name"]: row["median_us"] for row in result["rows"] if "median_us" in row}
        assert f">{medians['eager'] / medians['fused']:.1f}<" in text


def test_other_figures_are_noticed_and_written(copies, report, capsys):
    arguments, results, page, chart = copies
    assert main(arguments) == main(arguments, "--check") == 0
    before = page.read_text(), chart.read_text()
    result = next(r for r in report["results"] if r["batch"] == 64)
    result["rows"][0]["median_us"] *= 2
    results.write_text(json.dumps(report))
    assert main(arguments, "--check") == 1
    printed = capsys.readouterr().out
    assert f"{page}: not what" in printed
    assert f"{chart}: not what" in printed
    assert (page.read_text(), chart.read_text()) == before
    page.write_text(f"before\n{page.read_text()}\nafter")
    assert main(arguments) == main(arguments, "--check") == 0
    assert page.read_text().startswith("before\n<!--")
    assert page.read_text().endswith("-->\nafter")
    assert (page.read_text(), chart.read_text()) != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(status="wrong"), "expected status 'right', got 'wrong'"),
        (lambda r: r["machine"].update(commit="abc-dirty"), "expected figures of a commit"),
        (lambda r: r["machine"].update(commit=None), "expected figures of a commit, got None"),
        (lambda r: r["options"].update(isa=["avx2"]), "expected no forced ISA"),
        (lambda r: r.update(results=r["results"][:1]), "expected all cases"),
        (lambda r: r["results"][0].update(speedups=[]), "expected another contender"),
    ],
)
def test_figures_nobody_could_trust_are_refused(copies, report, change, message, capsys):
    arguments, results, page, _ = copies
    before = page.read_text()
    change(report)
    results.write_text(json.dumps(report))
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err
    assert page.read_text() == before


@pytest.mark.parametrize("marker", [table.BEGIN, table.END])
def test_a_marker_without_its_partner_is_refused(copies, marker, capsys):
    arguments, _, page, _ = copies
    page.write_text(page.read_text().replace(marker.format("table"), ""))
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "page: expected one line" in capsys.readouterr().err
