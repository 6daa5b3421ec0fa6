"""Model cards: what they say, that their code runs, and that the committed ones are current."""

import contextlib
import dataclasses
import io
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image

from timm_structdrop import attach, regularizers
from timm_structdrop.errors import UserError
from timm_structdrop.hub.card import make_card
from timm_structdrop.hub.citations import bibtex, in_words, paper_line
from timm_structdrop.hub.model_stats import model_stats, regularizer_uses
from timm_structdrop.layers import Paper
from timm_structdrop.models.packaged import packaged
from tools.card import main, stale_parts

CARDS = Path(__file__).parent.parent / "hfcards"
NAMES = sorted(facts["name"] for facts in packaged().values())


def test_a_card_says_where_the_layers_are():
    for name, where in (
        ("resnet20_camdrop", "convolutions and skips (before projection) of groups 1, 2 and 3"),
        ("resnet20_rblock", "convolutions and skips of groups 2 and 3, fork in front of them"),
    ):
        card = card_of(timm.create_model(name))
        (line,) = (line for line in card.splitlines() if line.startswith("In short: "))
        assert line.endswith(f"...): {where}."), line
    model = attach(timm.create_model("resnet18"), "dropcluster", modules=["act1"], img_size=64)
    assert "one layer (`act1.dropcluster`): after act1." in card_of(model)


def code_blocks(text: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def card_of(model, **arguments) -> str:
    return str(make_card(model, license="apache-2.0", **arguments))


def run_code(code: str) -> tuple[dict, list[str]]:
    """The names that a code block leaves, and the lines that it prints."""
    names: dict = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    return names, printed.getvalue().splitlines()


def test_the_committed_cards_are_current():
    assert [str(path) for path in stale_parts(CARDS)] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_code_of_a_card_runs_as_written(name):
    classification, features, embeddings = code_blocks((CARDS / name / "README.md").read_text())

    left, printed = run_code(classification)
    assert len(printed) == 5
    assert printed[0].startswith(f"{left['label']}: "), "the first digit is an easy one"

    _, printed = run_code(features)
    commented = re.findall(r"^# (\(.*\))$", features, flags=re.MULTILINE)
    assert printed == commented and printed

    left, _ = run_code(embeddings)
    assert tuple(left["embedding"].shape) == (1, left["model"].num_features)
    assert f"# {tuple(left['maps'].shape)}" in embeddings


@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_what_the_facts_say(name):
    facts = packaged()[name.partition(".")[0]]
    card = ModelCard.load(CARDS / name / "README.md")
    (top1, top5) = card.data.eval_results
    assert (top1.metric_value, top5.metric_value) == (facts["top1"], facts["top5"])
    assert (top1.metric_type, top1.dataset_type, top1.dataset_split) == (
        "accuracy",
        "digits",
        facts["split"],
    )
    assert card.data.library_name == "timm" and card.data.license == facts["license"]
    assert card.data.pipeline_tag == "image-classification"
    regularizer = facts["model"].rpartition("_")[2]
    assert regularizer in card.data.tags
    assert facts["command"] in card.text and facts["sha256"] in card.text
    assert all(f"{library} {is_}" in card.text for library, is_ in facts["versions"].items())
    assert code_blocks(card.text, "bibtex") == ["\n\n".join(bibtex([regularizer])) + "\n"]
    for other in NAMES:
        assert f"| `{other}` |" in card.text
    has_picture = "](clusters.png)" in card.text
    assert has_picture == (regularizer == "dropcluster")
    assert has_picture == (CARDS / name / "clusters.png").is_file()


def test_every_regularizer_has_its_paper():
    for name, entry in regularizers.items():
        paper = entry.paper
        author, year = re.search(r"(\w+) (?:et al\.|& \w+),? ?(\d{4})?", paper.citation).groups()
        assert author in paper.bibtex and f"title = {{{paper.title}}}" in paper.bibtex, name
        assert year is None or f"year = {{{year}}}" in paper.bibtex, name
        arxiv = re.search(r"\d{4}\.\d{5}", paper.citation)
        assert arxiv is None or arxiv[0] in paper.url, name


def test_a_regularizer_from_elsewhere_is_cited_as_it_was_registered(monkeypatch):
    entry = dataclasses.replace(regularizers["camdrop"], paper=Paper("Me 2026"))
    monkeypatch.setitem(regularizers, "camdrop", entry)
    assert paper_line("camdrop") == "Me 2026"
    assert in_words("camdrop") == "camdrop" and len(bibtex(["camdrop"])) == 1


def test_stats_are_those_of_a_count_by_hand():
    stats = model_stats(timm.create_model("lenet5_dropcluster"))
    c1, c3, c5, f6, fc = 28 * 28 * 6, 10 * 10 * 16, 120, 84, 10
    assert stats.macs == c1 * 25 + c3 * 150 + c5 * 400 + f6 * 120 + fc * 84
    assert stats.activations == c1 + c3 + c5 + f6 + fc
    assert stats.params == 61706
    assert stats.input_size == (1, 32, 32)


def test_a_card_leaves_the_model_as_it_was():
    model = timm.create_model("resnet8_camdrop").train()
    model.layer1.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    card_of(model)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_what_the_recipe_owes_to_the_evaluated_images_is_told():
    facts = {"dataset": "digits", "top1": 90.0, "n_eval": 10, "recipe_note": "It was tuned on them"}
    text = card_of(timm.create_model("lenet5_dropblock"), facts=facts)
    assert "Top-1 accuracy 90.00 %, on 10 images" in text and "It was tuned on them." in text
    assert "recipe_note" in packaged()["resnet20_camdrop"]


def test_a_card_without_facts_claims_nothing():
    text = card_of(timm.create_model("resnet8_dropblock"))
    card = ModelCard(text)
    assert card.data.eval_results is None and "model-index" not in text
    assert card.data.datasets is None and card.data.base_model is None
    for section in ("## Training", "## Evaluation", "SHA-256", "clusters.png"):
        assert section not in text, section


def test_the_code_loads_from_the_repository_that_the_card_is_for():
    model = timm.create_model("resnet8_dropblock")
    blocks = code_blocks(card_of(model, repo_id="someone/something"))
    assert len(blocks) == 3
    assert all('create_model("hf-hub:someone/something", pretrained=True' in b for b in blocks)
    both = card_of(model, repo_id="someone/something", facts={"name": "resnet8_dropblock.x"})
    assert all('"resnet8_dropblock.x", pretrained=True' in b for b in code_blocks(both))
    assert "`hf-hub:someone/something`" in both


@pytest.mark.parametrize("channels", [1, 3])
def test_code_for_other_data_shows_a_photograph(channels, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = timm.create_model("resnet8_dropblock", in_chans=channels, num_classes=3)
    size = (channels, 32, 32)
    config = {"input_size": size, "mean": (0.5,) * channels, "std": (0.25,) * channels}
    model.pretrained_cfg = {**model.pretrained_cfg, **config}
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    monkeypatch.chdir(tmp_path)
    blocks = code_blocks(card_of(model, facts={"label_names": ["a", "b", "c"]}))
    lines = [run_code(code)[1] for code in blocks]
    assert [len(printed) for printed in lines] == [3, 4, 0]


def test_clusters_masked_channels_and_hopkins_figures_are_told():
    torch.manual_seed(0)
    model = timm.create_model("lenet5_dropcluster", n_clusters=4)
    assert "No clusters have been found yet" in card_of(model)
    activations = torch.randn(8, 6, 28, 28)
    activations[:, :2] = 0.0
    model.act1.dropcluster.fit(activations)
    text = card_of(model, facts={"hopkins": {"act1": 0.8125}})
    assert "4 in each of 4 structured channels, on 28 x 28 maps" in text
    assert "at inference: 2 of 6" in text and "stay masked" in text
    assert "| `act1` | 0.812 |" in text and "](clusters.png)" in text
    assert "](clusters.png)" not in card_of(model, facts={"picture": None})


def test_settings_that_differ_between_layers_are_all_shown():
    (use,) = regularizer_uses(timm.create_model("resnet8_dropblock"))
    assert sorted(use.settings["gamma_scale"]) == [0.25, 1.0]
    assert "drop_prob" not in use.settings
    text = card_of(timm.create_model("resnet8_dropblock"), facts={"drop_prob": 0.2})
    assert "| `gamma_scale` | 0.25 or 1.0 |" in text and "| rate in training | 0.2 |" in text


def test_a_model_with_two_regularizers_cites_both():
    model = timm.create_model("resnet10t")
    attach(model, "dropblock", stages=(4,))
    attach(model, "spatialdropout", stages=(4,))
    text = card_of(model, repo_id="a/b", facts={"base_model": "timm/resnet10t.c3_in1k"})
    (entries,) = code_blocks(text, "bibtex")
    assert "ghiasi2018dropblock" in entries and "tompson2015spatialdropout" in entries
    assert "regularized with DropBlock and SpatialDropout" in text and "resnet10t" in text
    assert ModelCard(text).data.base_model == "timm/resnet10t.c3_in1k"


def test_odd_text_survives_the_metadata():
    name = 'mine: "it\'s" #1 {x}'
    facts = {"dataset": "hfds/me/data", "dataset_name": name, "top1": 50, "split": "test"}
    card = ModelCard(card_of(timm.create_model("resnet8_dropblock"), facts=facts, repo_id="a/b"))
    assert card.data.datasets == ["me/data"]
    assert card.data.eval_results[0].dataset_name == name


def test_facts_are_text_whatever_they_look_like():
    odd = "{{ 7 * 7 }} <b> & {% if %} {# no #}"
    text = card_of(timm.create_model("resnet8_dropblock"), facts={"recipe": odd, "command": odd})
    assert f"| recipe | {odd} |" in text and code_blocks(text, "sh") == [f"{odd}\n"]
    assert not re.search(r"\n\n\n| \n|None|Undefined", text) and text.endswith("```\n")


@pytest.mark.parametrize("license", ["", "  ", "apache 2.0", "apache2", "Apache-2.0", None])
def test_a_license_must_be_stated(license):
    with pytest.raises(UserError, match="license must be an identifier of the Hub"):
        make_card(timm.create_model("resnet8_dropblock"), license=license)


@pytest.mark.parametrize("top1", [101.0, -1.0, float("nan"), "high"])
def test_a_figure_must_be_a_percentage(top1):
    with pytest.raises(UserError, match=r"top1 must be a percentage in \[0, 100\]"):
        card_of(timm.create_model("resnet8_dropblock"), facts={"top1": top1})


def test_the_command_finds_and_mends_what_is_stale(tmp_path, capsys):
    folder = tmp_path / "cards"
    shutil.copytree(CARDS, folder)
    readme = folder / NAMES[1] / "README.md"
    readme.write_text(readme.read_text().replace("Top-1 accuracy 9", "Top-1 accuracy 8"))
    picture = folder / "lenet5_dropcluster.digits" / "clusters.png"
    Image.new("L", (8, 8)).save(picture)
    untouched = folder / "resnet20_dropcluster.digits" / "clusters.png"
    before = untouched.stat().st_mtime_ns
    with pytest.raises(UserError, match="stale") as caught:
        main(["--check", "--output", str(folder)])
    assert str(readme) in str(caught.value) and str(picture) in str(caught.value)
    assert str(untouched) not in str(caught.value)

    main(["--output", str(folder)])
    assert "2 files written" in capsys.readouterr().out
    assert untouched.stat().st_mtime_ns == before
    assert readme.read_text() == (CARDS / NAMES[1] / "README.md").read_text()
    main(["--check", "--output", str(folder)])

    (folder / "left_over.digits").mkdir()
    with pytest.raises(UserError, match=r"left_over\.digits"):
        main(["--check", "--output", str(folder)])


def test_without_a_folder_every_card_is_stale(tmp_path):
    found = {path.parent.name for path in stale_parts(tmp_path / "none")}
    assert found == set(NAMES)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="must be a folder"):
        main(["--output", str(tmp_path / "file")])
