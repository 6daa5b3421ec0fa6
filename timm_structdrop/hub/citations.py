"""The papers behind the regularizers, as a reader of a card cites them."""

from __future__ import annotations

from collections.abc import Iterable

from timm_structdrop.layers import Paper, regularizers

__all__ = ["TIMM", "bibtex", "in_words", "paper_line"]

TIMM = Paper.with_bibtex(
    "Wightman 2019, doi:10.5281/zenodo.4414861",
    "timm",
    "PyTorch Image Models",
    "https://github.com/huggingface/pytorch-image-models",
    "misc",
    "rw2019timm",
    author="Ross Wightman",
    year="2019",
    publisher="GitHub",
    journal="GitHub repository",
    doi="10.5281/zenodo.4414861",
    howpublished="\\url{https://github.com/huggingface/pytorch-image-models}",
)


def bibtex(names: Iterable[str]) -> list[str]:
    """Entries of the regularizers' papers, in their order, and timm's; a regularizer that was
    registered without an entry has none."""
    entries = [regularizers[name].paper.bibtex for name in names]
    return [*filter(None, entries), TIMM.bibtex]


def in_words(name: str) -> str:
    """A regularizer's name as its paper writes it; its key if the paper does not say."""
    return regularizers[name].paper.name or name


def paper_line(name: str) -> str:
    """A regularizer's paper as Markdown: a link, or what its registration says."""
    paper = regularizers[name].paper
    return f"{paper.title}: {paper.url}" if paper.url else paper.citation
