"""What CamDrop's blocks tell of the label: trainings of ResNet-8 on the digits, six epochs each.

Every number is of one seed; benchmarks/results/defaults.md has ten. The bounds lie between what the
two readings of the paper were seen to do, far from both.
"""

from functools import lru_cache

import pytest
import torch
from script import ROOT  # noqa: F401  where benchmarks is imported from

from benchmarks.defaults import LETTER, Cell, RandomClasses, accuracy, digits, train

# of torch 2.6's SequentialLR, which steps its parts with an epoch
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@lru_cache
def trained(random_classes=False, **settings):
    name = "resnet8_camdrop" if settings else "resnet8"
    return train(Cell("", name, settings, random_classes), seed=0)


def wrong_labels():
    generator = torch.Generator().manual_seed(0)
    classes = digits(False).classes
    return (classes + torch.randint(1, 10, classes.shape, generator=generator)) % 10


def authors(gamma):
    return trained(block_size=4, keep_prob=gamma)


def letter(gamma, guide="cam", random_classes=False):
    return trained(random_classes, block_size=4, keep_prob=gamma, guide=guide, **LETTER)


def test_the_default_trains_at_gamma_one_half():
    """Within a few points of no regularizer; the letter's reading is tens of points behind."""
    plain, _ = trained()
    camdrop, _ = authors(0.5)
    assert accuracy(plain) > 90
    assert accuracy(camdrop) > accuracy(plain) - 5


def test_the_letter_gives_the_label_away():
    """A training loss far below the plain network's, and an accuracy that follows the blocks."""
    model, loss = letter(0.5)
    _, plain_loss = trained()
    assert loss < 0.2 * plain_loss
    assert accuracy(model) < 60
    assert accuracy(model, digits(False).classes) > 95
    assert accuracy(model, wrong_labels()) < 20


def test_the_default_at_the_papers_gamma_does_not_follow_a_wrong_label():
    model, _ = authors(0.9)
    assert accuracy(model, wrong_labels()) > accuracy(model) - 5


@pytest.mark.parametrize("random_classes", [False, True])
def test_without_the_label_the_letters_rates_train(random_classes):
    """Guided by the predicted class or by a random one, at gamma 0.9 and 0.7."""
    for gamma, bound in ((0.9, 90), (0.7, 85)):
        model, _ = letter(gamma, "predicted", random_classes)
        assert accuracy(model) > bound
    model, _ = letter(0.9, "predicted", random_classes)
    assert accuracy(model, wrong_labels()) > accuracy(model) - 8


def test_random_classes_come_from_the_task():
    _, target = digits(False)
    torch.manual_seed(0)
    task = RandomClasses(torch.nn.Identity())
    one, two = (task.guides(target, target)["prediction"] for _ in range(2))
    assert len(one) == len(target) and not torch.equal(one, two)
