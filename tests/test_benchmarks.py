"""The speed benchmarks: tiny cases of each, their command, and their committed page."""

import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
from script import ROOT

sys.path.insert(0, str(ROOT))  # pytest itself does not look for modules there
from benchmarks import (
    _page,
    _suite,
    _timing,
    activation_maps,
    camdrop,
    checkpoint,
    defaults,
    dropblock,
    growth,
    imports,
    rblock,
    refits,
    rena,
    steps,
)
from benchmarks._settings import Settings
from timm_structdrop.errors import UserError, run_command
from timm_structdrop.layers import regularizers

TINY = (4, 3, 16, 16)
COMMAND = re.compile(r"python -m (benchmarks(?:\.\w+)?)")


@pytest.fixture
def tiny(monkeypatch):
    """Every benchmark with the smallest case that it can have."""
    for module in (camdrop, rblock):
        monkeypatch.setattr(module, "ARCHITECTURE", "resnet8")
    monkeypatch.setattr(camdrop, "QUICK_SHAPES", (TINY,))
    monkeypatch.setattr(rblock, "QUICK_SHAPE", TINY)
    monkeypatch.setattr(steps, "CASES", {"resnet8": (None, TINY, 10, 5)})
    monkeypatch.setattr(dropblock, "QUICK_CASES", (((2, 4, 7, 7), 3),))
    monkeypatch.setattr(rena, "QUICK_SIZES", {16: 1})
    monkeypatch.setattr(rena, "CHANNELS", rena.DEAD_CHANNELS + 2)
    monkeypatch.setattr(refits, "SCHEDULES", (("lenet5_dropcluster", (4, 1, 16, 16), 10, 2),))
    monkeypatch.setattr(checkpoint, "CASES", {"lenet5": ((4, 1, 16, 16), 10, 1)})
    monkeypatch.setattr(growth, "BASE", {**growth.BASE, "pixels": 64, "channels": 4, "images": 4})
    monkeypatch.setattr(growth, "AXES", dict.fromkeys(growth.AXES, (16, 64)))
    code = imports.CODE.replace("import timm\n", "import decimal\n")
    monkeypatch.setattr(imports, "CODE", code.replace("import timm_structdrop", "import fractions"))


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A suite of fake benchmarks; where its files and the summary go."""

    def add(name, **parts):
        module = ModuleType(f"benchmarks.{name}")
        module.TITLE = f"The {name} one"
        module.run = lambda settings: [{"ratio": 1.5, "quick": settings.quick}]
        module.headline = lambda rows: f"{name} takes {rows[0]['ratio']:.1f}."
        module.report = lambda rows: [f"ratio {rows[0]['ratio']:.2f}"]
        for part, value in parts.items():
            setattr(module, part, value)
        monkeypatch.setitem(sys.modules, f"benchmarks.{name}", module)
        monkeypatch.setattr(_suite, "SPEED", (*_suite.SPEED, name))

    def lack(name, package):
        (tmp_path / f"{name}.py").write_text(f"import {package}\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr("benchmarks.__path__", [str(tmp_path)])
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setattr(_suite, "SPEED", (*_suite.SPEED, name))

    results = tmp_path / "results"
    results.mkdir()
    document = tmp_path / "results.md"
    document.write_text(f"before\n\n{_page.BEGIN}\nold\n{_page.END}\n\nafter\n")
    monkeypatch.setattr(_suite, "SPEED", ())
    for module in (_suite, _page):
        monkeypatch.setattr(module, "RESULTS", results)
    monkeypatch.setattr(_page, "DOCUMENT", document)
    add.lack, add.results, add.document = lack, results, document
    return add


@pytest.mark.parametrize("name", _suite.SPEED)
def test_each_benchmark_measures_and_says_what_it_found(tiny, name):
    module = _suite.available(name, Settings())
    rows = json.loads(json.dumps(module.run(Settings(quick=True, repeats=1))))
    text = "\n".join([module.headline(rows), *_page.section(module, rows)])
    assert text.count("\n## ") == 1 and re.search(r"\d", module.headline(rows))
    if name == "steps":
        assert [row["regularizer"] for row in rows] == [
            *regularizers,
            steps.PREDICTED,
            steps.AGAIN,
        ]
        assert all(f"| {regularizer} " in text for regularizer in regularizers)
        assert all((row["layers"] > 0) == (row["regularizer"] != steps.AGAIN) for row in rows)
    if name == "growth":
        assert {row["axis"] for row in rows} == set(growth.AXES)
    if name == "imports":
        assert "none of sklearn, matplotlib, nilearn" in text


def test_what_takes_turns_is_compared_within_a_round():
    order = []
    functions = {name: lambda name=name: order.append(name) for name in "abc"}
    times = _timing.paired(functions, 2, warm_up=1)
    assert order == [*"cab", *"abc", *"bca"]
    assert [len(found.elapsed) for found in times.values()] == [2, 2, 2]
    ours, other = (
        _timing.Times([2.0, 8.0, 3.0], [1.0, 1.0, 1.0]),
        _timing.Times([1.0] * 3, [2.0] * 3),
    )
    found = _timing.compared(ours, other)
    assert found["ratio"] == {"median": 3.0, "low": 2.5, "high": 5.5}
    assert found["processor_ratio"] == 0.5 and found["repeats"] == 3
    assert _timing.weighted((2, ours), (3, other)) == ([7.0, 19.0, 9.0], [8.0] * 3)
    assert growth.slope([1, 2, 4], [5.0, 20.0, 80.0]) == pytest.approx(2.0)


def test_along_a_curve_one_size_moves(monkeypatch):
    asked = []
    curves = (growth.FIT, growth.CLUSTER, growth.BLOCK, growth.FLOOR)
    functions = dict.fromkeys(curves, lambda: None)
    monkeypatch.setattr(growth, "timed", lambda sizes, device: asked.append(sizes) or functions)
    rows = growth.axis_rows("images", Settings(repeats=1))
    assert asked == [{**growth.BASE, "images": count} for count in growth.AXES["images"]]
    assert [row["what"] for row in rows] == list(curves)
    along_clusters = {row["what"] for row in growth.axis_rows("clusters", Settings())}
    assert along_clusters == {growth.FIT, growth.CLUSTER}


def test_a_whole_run_writes_its_files_and_the_summary(fake, capsys):
    fake("first")
    fake("second", CPU_ONLY=True)
    fake.lack("third", "nilearn")
    _suite.main([])
    assert sorted(path.name for path in fake.results.iterdir()) == ["speed.json", "speed.md"]
    results = json.loads((fake.results / "speed.json").read_text())
    assert list(results["benchmarks"]) == ["first", "second"]
    assert results["benchmarks"]["first"]["rows"] == [{"ratio": 1.5, "quick": False}]
    assert {"command", "versions", "hardware", "date"} < set(results)
    page = (fake.results / "speed.md").read_text()
    assert "## The second one\n\nratio 1.50\n" in page and page == _page.page(results)
    assert 'third was left out: nilearn is not installed (pip install -e ".[test]").' in page
    document = fake.document.read_text()
    assert document.startswith(f"before\n\n{_page.BEGIN}\n") and "old" not in document
    assert document.endswith(f"- second takes 1.5.\n{_page.END}\n\nafter\n")
    out, progress = capsys.readouterr()
    assert "## The first one" in out and "[" not in out
    assert re.search(r"\[1/3\] first took \d:\d\d, \d:\d\d in all; left: second, third", progress)
    assert "[3/3] third is skipped: nilearn is not installed" in progress


def test_other_runs_do_not_take_the_place_of_a_whole_one(fake, tmp_path):
    fake("first")
    fake("second")
    before = fake.document.read_text()
    _suite.main(["--quick"])
    _suite.main(["second", "--repeats", "1"])
    assert list(fake.results.iterdir()) == []
    _suite.main(["second", "--quick", "--output", str(fake.results)])
    names = ["speed-second-quick.json", "speed-second-quick.md"]
    assert sorted(path.name for path in fake.results.iterdir()) == names
    page = (fake.results / names[1]).read_text()
    assert "**A quick run" in page and "## The second one" in page and "first" not in page
    _suite.main(["--output", str(tmp_path / "elsewhere")])
    assert (tmp_path / "elsewhere" / "speed.md").is_file()
    assert fake.document.read_text() == before


def test_pages_are_written_again_without_measuring(fake):
    fake("first")
    _suite.main([])
    numbers = (fake.results / "speed.json").read_bytes()
    fake("first", report=lambda rows: ["other words"], run=None)
    _suite.main(["--rewrite"])
    assert "other words" in (fake.results / "speed.md").read_text()
    assert (fake.results / "speed.json").read_bytes() == numbers


def test_a_picture_that_cannot_be_drawn_is_left_out(fake):
    def draw(rows):
        raise UserError("pictures need matplotlib")

    fake("curves", draw=draw)
    _suite.main([])
    page = (fake.results / "speed.md").read_text()
    assert "curves.png was left out: pictures need matplotlib." in page and "![" not in page


def test_a_library_that_must_be_there_is_an_error(fake):
    fake.lack("broken", "json")
    with pytest.raises(ModuleNotFoundError):
        _suite.main([])
    assert list(fake.results.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["speling"], "a benchmark must be one of first, second; got 'speling'"),
        (["--repeats", "0"], "--repeats must be at least 1; got 0"),
        (["--repeats", "many"], "--repeats"),
        (["--device", "tpu"], "--device must be cpu.* here; got 'tpu'"),
        (["--quik"], "--quik.*--quick"),
        (["--output", str(Path(__file__))], "the output must be a folder"),
        (["first", "--rewrite"], "--rewrite must come without names and --quick"),
        (["--rewrite"], "No such file .*speed.json"),
    ],
)
def test_nonsense_ends_in_one_line(fake, capsys, argv, message):
    fake("first")
    fake("second")
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: _suite.main(argv))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert re.match(f"error: .*{message}", error)


@pytest.mark.parametrize("name", _suite.SPEED)
def test_each_benchmark_is_a_command_of_its_own(monkeypatch, name):
    asked = []
    monkeypatch.setattr(_suite, "main", asked.append)
    monkeypatch.setattr(sys, "argv", ["", "--repeats", "3"])
    runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="__main__")
    assert asked == [[name, "--repeats", "3"]]


def test_the_commands_of_the_documents_exist():
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")]
    sources = list(ROOT.glob("benchmarks/**/*.py"))
    named = {
        name for path in documents + sources for name in COMMAND.findall(path.read_text("utf-8"))
    }
    assert {"benchmarks", *(f"benchmarks.{name}" for name in _suite.SPEED)} <= named
    for name in named - {"benchmarks.NAME"}:
        assert importlib.util.find_spec(name) is not None, name


def test_the_committed_page_is_what_the_numbers_say():
    numbers = _page.read(_page.RESULTS / "speed.json")
    assert set(numbers["benchmarks"]) == set(_suite.SPEED) and not numbers["quick"]
    assert (_page.RESULTS / "speed.md").read_text() == _page.page(numbers)
    document = _page.DOCUMENT.read_text()
    assert document == _page.with_summary(document, numbers)
    assert "\n- " in document.partition(_page.BEGIN)[2].partition(_page.END)[0]
    for picture in numbers["pictures"].values():
        assert (_page.RESULTS / picture).stat().st_size > 10_000


@pytest.mark.parametrize("study", [activation_maps, defaults])
def test_a_study_without_a_place_for_its_results_trains_nothing(study, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["study", "--output", str(tmp_path / "none" / "x")])
    monkeypatch.setattr(study, "train", lambda *args: pytest.fail("it trains"))
    with pytest.raises(UserError, match=r"must be in a folder that is there; got .*none/x"):
        study.main()
