"""The papers behind the regularizers, as a reader of a card cites them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from timm_structdrop.layers import regularizers

__all__ = ["PAPERS", "TIMM", "Paper", "bibtex", "in_words", "paper_line", "paper_of"]


@dataclass(frozen=True)
class Paper:
    """A publication.

    Attributes:
        subject: what it is about, as it writes the name.
        title: as printed.
        url: where to read it.
        bibtex: one entry.
    """

    subject: str
    title: str
    url: str
    bibtex: str


def _entry(kind: str, key: str, **fields: str) -> str:
    lines = [f"  {name} = {{{value}}}" for name, value in fields.items()]
    return f"@{kind}{{{key},\n" + ",\n".join(lines) + "\n}"


def _paper(subject: str, title: str, url: str, kind: str, key: str, **fields: str) -> Paper:
    return Paper(subject, title, url, _entry(kind, key, title=title, **fields))


PAPERS: dict[str, Paper] = {
    "dropblock": _paper(
        "DropBlock",
        "DropBlock: A regularization method for convolutional networks",
        "https://arxiv.org/abs/1810.12890",
        "inproceedings",
        "ghiasi2018dropblock",
        author="Ghiasi, Golnaz and Lin, Tsung-Yi and Le, Quoc V.",
        booktitle="Advances in Neural Information Processing Systems",
        volume="31",
        year="2018",
    ),
    "dropcluster": _paper(
        "DropCluster",
        "DropCluster: A structured dropout for convolutional networks",
        "https://arxiv.org/abs/2002.02997",
        "article",
        "chen2020dropcluster",
        author="Chen, Liyan and Gautier, Philip and Aydore, Sergul",
        journal="arXiv preprint arXiv:2002.02997",
        year="2020",
    ),
    "camdrop": _paper(
        "CamDrop",
        "CamDrop: A New Explanation of Dropout and A Guided Regularization Method for Deep "
        "Neural Networks",
        "https://doi.org/10.1145/3357384.3357999",
        "inproceedings",
        "wang2019camdrop",
        author="Wang, Hongjun and Wang, Guangrun and Li, Guanbin and Lin, Liang",
        booktitle="Proceedings of the 28th ACM International Conference on Information and "
        "Knowledge Management",
        year="2019",
        doi="10.1145/3357384.3357999",
    ),
    "rblock": _paper(
        "R-Block",
        "R-Block: Regularized Block of Dropout for convolutional networks",
        "https://arxiv.org/abs/2307.15150",
        "article",
        "wang2023rblock",
        author="Wang, Liqi and Hu, Qiya",
        journal="arXiv preprint arXiv:2307.15150",
        year="2023",
    ),
    "spatialdropout": _paper(
        "SpatialDropout",
        "Efficient Object Localization Using Convolutional Networks",
        "https://arxiv.org/abs/1411.4280",
        "inproceedings",
        "tompson2015spatialdropout",
        author="Tompson, Jonathan and Goroshin, Ross and Jain, Arjun and LeCun, Yann and "
        "Bregler, Christoph",
        booktitle="IEEE Conference on Computer Vision and Pattern Recognition",
        year="2015",
    ),
    "dropout": _paper(
        "Dropout",
        "Dropout: A Simple Way to Prevent Neural Networks from Overfitting",
        "https://jmlr.org/papers/v15/srivastava14a.html",
        "article",
        "srivastava2014dropout",
        author="Srivastava, Nitish and Hinton, Geoffrey and Krizhevsky, Alex and Sutskever, Ilya "
        "and Salakhutdinov, Ruslan",
        journal="Journal of Machine Learning Research",
        volume="15",
        pages="1929--1958",
        year="2014",
    ),
    "stochasticdepth": _paper(
        "Stochastic Depth",
        "Deep Networks with Stochastic Depth",
        "https://arxiv.org/abs/1603.09382",
        "inproceedings",
        "huang2016stochasticdepth",
        author="Huang, Gao and Sun, Yu and Liu, Zhuang and Sedra, Daniel and Weinberger, Kilian Q.",
        booktitle="European Conference on Computer Vision",
        year="2016",
    ),
}

TIMM = _paper(
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


def paper_of(name: str) -> Paper | None:
    """The paper of a regularizer; None of one that is not of this package."""
    return PAPERS.get(name)


def bibtex(names: Iterable[str]) -> list[str]:
    """Entries of the regularizers' papers, in their order, and timm's; a regularizer that is not
    of this package has none."""
    return [paper.bibtex for paper in map(paper_of, names) if paper] + [TIMM.bibtex]


def in_words(name: str) -> str:
    """A regularizer's name as its paper writes it; of one without a paper here, its key."""
    paper = paper_of(name)
    return paper.subject if paper else name


def paper_line(name: str) -> str:
    """A regularizer's paper as Markdown: a link, or what its registration says."""
    paper = paper_of(name)
    return f"{paper.title}: {paper.url}" if paper else regularizers[name].paper
