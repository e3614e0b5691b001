"""The README's table of results: it is what the committed JSON says."""

from __future__ import annotations

import json

import pytest
from bench_scripts import load

table = load("readme_table")


@pytest.fixture
def report():
    return json.loads(table.RESULTS.read_text())


@pytest.fixture
def copies(tmp_path, report):
    """A JSON and a README of their own: arguments, and how to write a changed report."""
    results, readme = tmp_path / "results.json", tmp_path / "README.md"
    readme.write_text(table.README.read_text())
    results.write_text(json.dumps(report))
    arguments = ["--json", str(results), "--readme", str(readme)]
    return arguments, results, readme


def test_readme_shows_the_committed_figures():
    assert table.main(["--check"]) == 0


def test_rows_are_the_reports(report):
    lines = [line for line in table.render(report).splitlines() if line.startswith("| ")][1:]
    results = [r for case in table.ROWS for r in report["results"] if r["case"] == case]
    assert {r["batch"] for r in results} >= {1, 4, 64, 256}
    for line, result in zip(lines, results, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        medians = {
            row["name"]: row["median_us"] for row in result["contenders"] if "median_us" in row
        }
        assert cells[1:3] == [str(result["batch"]), str(result["threads"])]
        fused, best = (float(cell.replace(",", "")) for cell in cells[3:5])
        assert fused == pytest.approx(medians.pop("fused"), abs=0.5)
        assert best == pytest.approx(min(medians.values()), abs=0.5)
        assert cells[5] == table.PEERS[min(medians, key=medians.get)]
        assert float(cells[6]) == pytest.approx(best / fused, rel=0.06)


def test_check_fails_on_other_figures(copies, report, capsys):
    arguments, results, readme = copies
    assert table.main([*arguments, "--check"]) == 0
    report["results"][0]["contenders"][0]["median_us"] *= 2
    results.write_text(json.dumps(report))
    before = readme.read_text()
    assert table.main([*arguments, "--check"]) == 1
    assert "not what" in capsys.readouterr().out
    assert readme.read_text() == before
    assert table.main(arguments) == 0
    assert readme.read_text() != before
    assert table.main([*arguments, "--check"]) == 0
    # Only what stands between the markers.
    assert readme.read_text().split(table.BEGIN)[0] == before.split(table.BEGIN)[0]
    assert readme.read_text().split(table.END)[1] == before.split(table.END)[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(status="wrong"), "expected status 'right', got 'wrong'"),
        (lambda r: r["machine"].update(commit="abc-dirty"), "expected figures of a commit"),
        (lambda r: r["machine"].update(commit=None), "expected figures of a commit, got None"),
        (lambda r: r["options"].update(isa="avx2"), "expected no forced ISA"),
        (lambda r: r.update(results=r["results"][:1]), "expected all cases"),
    ],
)
def test_figures_nobody_could_trust_are_refused(copies, report, change, message, capsys):
    arguments, results, readme = copies
    before = readme.read_text()
    change(report)
    results.write_text(json.dumps(report))
    with pytest.raises(SystemExit) as exit:
        table.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert readme.read_text() == before


@pytest.mark.parametrize("marker", [table.BEGIN, table.END])
def test_readme_without_a_marker_is_refused(copies, marker, capsys):
    arguments, _, readme = copies
    readme.write_text(readme.read_text().replace(marker, ""))
    with pytest.raises(SystemExit):
        table.main(arguments)
    assert "README: expected one line" in capsys.readouterr().err
