"""Sentences of README, docs and changelog that speak of every, all, always: what holds them.

A sentence with such a word is decided here from the registries, or stands in HELD with the test
that would fail if it were not so. Who writes another one finds it a test, or other words.
"""

import re

import pytest
import timm
from script import ROOT

import timm_structdrop  # noqa: F401  registers the models
from timm_structdrop.layers import regularizers
from timm_structdrop.models.architectures import architectures
from timm_structdrop.recipes.packaged import table_names

PAGES = ("README.md", "CHANGELOG.md", "docs/results.md", "docs/training.md")
WORDS = re.compile(r"(?<!-)\b(every|exactly|all|always|never|any)\b", re.IGNORECASE)
# by part of the sentence: the test that holds it, or the reason why there is nothing to hold
HELD = {
    "before any training": "no claim",
    "of all three in CIFAR ResNets": "test_variants.py::test_words_say_where_the_layers_are",
    "residual branches of all groups": "test_variants.py::test_words_say_where_the_layers_are",
    "never stops it": "test_hub_roundtrip.py::test_training_goes_on_when_the_hub_is_away",
    "all settings of the layers": "test_hub_push.py::test_an_export_brings_back_all_settings",
    "continues exactly": "test_resume.py::test_killed_twice_and_continued_it_is_the_same_run",
    "Every default, checked by training": "test_defaults.py::test_the_committed_table",
    "on all 1437 training digits": "test_defaults.py::test_the_committed_table",
    "counts pixels that never change": "test_rena.py::test_dead_and_constant_channels",
    "Pixels that never change": "test_rena.py::test_dead_and_constant_channels",
    "all from one run of": "test_benchmarks.py::test_the_committed_page_is_what_the_numbers_say",
    "never replace a checkpoint": (
        "test_loop.py::test_weights_that_are_not_finite_replace_no_checkpoint"
    ),
    "the networks lean on it all the same": "no claim",
    '`channels="all"`': "a keyword",
    '`rank="all"': "a keyword",
    '`seeds="all"`': "a keyword",
}


def prose(page):
    """The sentences of a page, without code blocks and what benchmarks write."""
    text = (ROOT / page).read_text()
    text = re.sub(r"```.*?```|<!-- speed: written.*?<!-- speed: end -->", "", text, flags=re.DOTALL)
    for paragraph in re.split(r"\n\s*\n|\n(?=[-|#] ?)", text):
        yield from re.split(r"(?<=[.;])\s", " ".join(paragraph.split()))


@pytest.mark.parametrize("page", PAGES)
def test_what_is_said_of_all_is_held_by_something(page):
    loose = [
        sentence
        for sentence in prose(page)
        if WORDS.search(sentence) and not any(part in sentence for part in HELD)
    ]
    assert not loose


@pytest.mark.parametrize("part", HELD)
def test_what_is_held_is_still_said_and_its_test_is_there(part):
    assert any(part in " ".join((ROOT / page).read_text().split()) for page in PAGES)
    file, _, name = HELD[part].partition("::")
    if name:
        assert re.search(rf"def {name}\w*\(", (ROOT / "tests" / file).read_text()), HELD[part]


def test_the_number_of_models():
    names = [f"{a}_{r}" for a in architectures for r in regularizers if timm.is_model(f"{a}_{r}")]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"registers {len(names)} models with timm" in readme


def named_architectures(text):
    """`resnet18/34_cifar` and the like, name by name."""
    for prefix, numbers, suffix in re.findall(r"`([a-z]+)(\d+(?:/\d+)*)((?:_[a-z]+)?)`", text):
        yield from (f"{prefix}{number}{suffix}" for number in numbers.split("/"))
    yield from re.findall(r"`([a-z_]+(?:_[a-z0-9]+)+)`", text)
    yield from re.findall(r"`(nasnetalarge)`", text)


def test_the_architectures_are_named_with_the_regularizers_that_they_have():
    readme = " ".join((ROOT / "README.md").read_text().split())
    said = readme[readme.index("Architectures: ") : readme.index("Pretrained tags are")]
    assert set(named_architectures(said)) - {"stochasticdepth"} == set(architectures)
    only = said[said.index("(with DropBlock also") : said.index("and for small images")]
    without = said[said.index("`vgg16_cifar`") : said.index("(the last two")]
    for name in architectures:
        expected = set(regularizers)
        if name in named_architectures(without):
            expected -= {"stochasticdepth"}
        if name in named_architectures(only):
            expected = {"dropblock"}
        assert {r for r in regularizers if timm.is_model(f"{name}_{r}")} == expected, name


def test_the_tables_that_are_recipes_are_those_that_are_named():
    readme = " ".join((ROOT / "README.md").read_text().split())
    papers = ("dropblock", "dropcluster", "camdrop", "rblock")
    have = {name for name in table_names() if name.startswith(papers)}
    numbers = {"dropblock-table": 2, "dropcluster-table": 5, "camdrop-table": 7, "rblock-table": 3}
    expected = {f"{paper}{n}" for paper, last in numbers.items() for n in range(1, last + 1)}
    expected |= {"dropblock-fig3", "dropblock-fig4", "dropblock-fig5", "camdrop-fig4"}
    expected -= {"rblock-table1"}  # which is two files
    assert have == expected | {"rblock-table1-cifar10", "rblock-table1-cifar100"}
    said = (
        "DropBlock's Tables 1 and 2 and Figures 3 to 5, DropCluster's Tables 1 to 5, CamDrop's "
        "Tables 1 to 7 and Figure 4, R-Block's Tables 1 to 3"
    )
    assert said in readme
