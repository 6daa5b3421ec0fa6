"""Loss and accuracies against a loop over single samples."""

import multiprocessing as mp
from functools import partial

import pytest
import torch
import torch.distributed as dist
from timm.data.distributed_sampler import OrderedDistributedSampler
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from timm_structdrop.errors import UserError
from timm_structdrop.evaluation import evaluate
from timm_structdrop.training import Progress


def problem(n_classes: int, n: int = 23) -> tuple[nn.Module, TensorDataset]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.LazyLinear(n_classes)
    )
    images = torch.randn(n, 1, 5, 6)
    model(images)
    return model, TensorDataset(images, torch.randint(n_classes, (n,)))


def one_by_one(model: nn.Module, data: TensorDataset) -> dict[str, float]:
    """The oracle: every sample alone, ranked by sorting."""
    model.eval()
    loss = top1 = top5 = 0.0
    for image, target in data:
        with torch.no_grad():
            logits = model(image[None])[0]
        ranking = logits.argsort(descending=True).tolist()
        loss += cross_entropy(logits, target).item()
        top1 += ranking.index(target) < 1
        top5 += ranking.index(target) < 5
    n = len(data)
    model.train()
    return {"loss": loss / n, "top1": 100 * top1 / n, "top5": 100 * top5 / n, "samples": n}


@pytest.mark.parametrize("n_classes", [3, 5, 12])
@pytest.mark.parametrize("batch_size", [1, 8, 64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_figures(n_classes, batch_size, channels_last):
    model, data = problem(n_classes)
    found = evaluate(model, DataLoader(data, batch_size), channels_last=channels_last)
    assert found.pop("seconds") > 0
    assert found == pytest.approx(one_by_one(model, data), rel=1e-5)
    if n_classes <= 5:
        assert found["top5"] == 100


def test_accuracies_are_exact_fractions():
    model, data = problem(7, 360)
    by_size = [evaluate(model, DataLoader(data, size)) for size in (7, 64, 360)]
    assert len({figures["top1"] for figures in by_size}) == 1
    assert by_size[0]["top1"] * 3.6 == pytest.approx(round(by_size[0]["top1"] * 3.6), abs=1e-9)


def test_the_model_is_left_as_it_was():
    model, data = problem(3)
    model[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    evaluate(model, DataLoader(data, 8))
    assert [module.training for module in model] == [True, False, True, True, True]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    with pytest.raises(ZeroDivisionError):
        evaluate(model, DataLoader(data, 8), criterion=lambda *_: 1 / 0)
    assert model[2].training


def test_precision_and_criterion():
    model, data = problem(3)
    plain = evaluate(model, DataLoader(data, 8))
    low = partial(torch.autocast, device_type="cpu", dtype=torch.bfloat16)
    amp = evaluate(model, DataLoader(data, 8), amp_autocast=low)
    assert amp["loss"] != plain["loss"]
    assert amp["loss"] == pytest.approx(plain["loss"], rel=0.02)
    zero = evaluate(model, DataLoader(data, 8), criterion=lambda output, target: output.sum() * 0)
    assert zero["loss"] == 0
    half = evaluate(model.bfloat16(), DataLoader(data, 8), model_dtype=torch.bfloat16)
    assert half["loss"] == pytest.approx(plain["loss"], rel=0.03)


def test_progress_counts_every_sample(capsys):
    model, data = problem(3)
    progress = Progress("Validate", 3, log_interval=1)
    found = evaluate(model, DataLoader(data, 8), progress=progress)
    lines = capsys.readouterr().err.splitlines()
    assert progress.images == 23 and len(lines) == 3
    assert f"top1 {found['top1']:.4g}" in lines[-1]


def half_of_the_data(rank: int, store: str, results: mp.Queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    model, data = problem(3)
    # Of 23 samples the sampler makes 24: one comes twice, and counts once.
    sampler = OrderedDistributedSampler(data, num_replicas=2, rank=rank)
    results.put(evaluate(model, DataLoader(data, 4, sampler=sampler)))
    dist.destroy_process_group()


# Python 3.12 warns of every fork in a process with threads; the children use none of theirs.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_every_process_gets_the_figures_of_all(tmp_path):
    model, data = problem(3)
    alone = evaluate(model, DataLoader(data, 4))
    fork = mp.get_context("fork")
    results = fork.Queue()
    processes = [
        fork.Process(target=half_of_the_data, args=(rank, str(tmp_path / "store"), results))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    for figures in found:
        figures["seconds"] = alone["seconds"]
        assert figures == pytest.approx(alone)


def test_what_cannot_be_evaluated():
    model, data = problem(3)
    with pytest.raises(UserError, match="at least one image; got none"):
        evaluate(model, [])
    for target in (3, -1):
        wrong = TensorDataset(data.tensors[0], torch.full((23,), target))
        with pytest.raises(UserError, match=rf"classes of the model, in \[0, 2\]; got {target}"):
            evaluate(model, DataLoader(wrong, 8))
