"""When clusters are fitted, and the task that carries schedule and refits through a loop."""

import pytest
import timm
import torch
from torch import nn

from timm_structdrop.errors import UserError
from timm_structdrop.layers import DropCluster2d
from timm_structdrop.training import ClusterRefits, DropSchedule, StructDropTask, make_task


def small_model(drop_prob: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        DropCluster2d(3, (6, 5), drop_prob=drop_prob, n_clusters=4),
        nn.Flatten(),
        nn.Linear(90, 2),
    )


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 1, 6, 5, generator=generator), torch.arange(8) % 2


@pytest.mark.parametrize(("start", "every"), [(50, 50), (0, 1), (3, 7)])
def test_due_epochs_are_start_and_every_so_many_after(start, every):
    refits = ClusterRefits(small_model(), start, every)
    expected = set(range(start, 300, every))
    assert {epoch for epoch in range(300) if refits.due(epoch)} == expected


def test_the_task_fits_on_the_first_batch_of_a_due_epoch():
    model = small_model()
    layer, refits = model[1], ClusterRefits(model, start=1, every=2)
    task = StructDropTask(model, refits=refits, verbose=False)
    fitted = []
    for epoch in range(4):
        task.begin_epoch(epoch)
        for step in range(2):
            task(*batch(10 * epoch + step))
            fitted.append((epoch, step, int(layer.fitted_at)))
    assert [at for _, _, at in fitted] == [-1, -1, 1, 1, 1, 1, 3, 3]
    expected = layer.labels.clone()
    layer.fit(model[0](batch(30)[0]), at=3)
    assert torch.equal(layer.labels, expected)


def test_reports_are_of_their_epoch_and_the_summary_is_of_the_buffers():
    model = small_model()
    refits = ClusterRefits(model, start=0, every=1)
    task = make_task(model, refits=refits, verbose=False)
    assert refits.summary() == {"clusters_fitted_at": "", "unstructured_channels": 0}
    task.begin_epoch(5)
    assert refits.report(5) == {}
    task(*batch())
    report = refits.report(5)["1"]
    assert (report["at"], report["n_clusters"], report["channels"]) == (5, 4, 3)
    assert refits.report(4) == {}
    model[1].structured[0] = False
    assert refits.summary() == {"clusters_fitted_at": 5, "unstructured_channels": 1}


def test_an_epoch_continued_in_the_middle_is_not_fitted_again():
    model = small_model()
    task = StructDropTask(model, refits=ClusterRefits(model, 0, 1), verbose=False)
    task.begin_epoch(0, first_batch=3)
    task(*batch())
    assert not model[1].is_fitted


def test_a_compiled_task_fits_without_the_compiled_code():
    model = small_model()
    task = StructDropTask(model, refits=ClusterRefits(model, 1, 1), verbose=False)
    calls = []

    def backend(graph, inputs):
        calls.append(len(inputs))
        return graph.forward

    task.compile(backend=backend)
    task.begin_epoch(0)
    task(*batch())
    assert calls and not model[1].is_fitted
    compiled = len(calls)
    task.begin_epoch(1)
    task(*batch(1))
    assert int(model[1].fitted_at) == 1
    assert len(calls) == compiled
    task(*batch(2))
    assert len(calls) == compiled, "one fit must not change the compiled code"
    torch.compiler.reset()


def test_the_task_sets_the_rate_before_each_update():
    model = small_model(drop_prob=0.4)
    schedule = DropSchedule(model, "linear", total_updates=4)
    task = make_task(model, nn.CrossEntropyLoss(), schedule=schedule, verbose=False)
    task.begin_update(1)
    assert model[1].rate() == pytest.approx(0.1)
    result = task(*batch())
    expected = nn.functional.cross_entropy(model(batch()[0]), batch()[1])
    torch.testing.assert_close(result["loss"], expected)
    assert result["output"].shape == (8, 2)


def test_plain_timm_models_need_neither():
    task = make_task(timm.create_model("test_resnet", num_classes=3), verbose=False)
    task.begin_epoch(0)
    task.begin_update(0)
    assert task(torch.randn(2, 3, 32, 32), torch.tensor([0, 2]))["output"].shape == (2, 3)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [({"start": -1}, "at least 0; got -1"), ({"every": 0}, "at least 1; got 0")],
)
def test_wrong_settings_state_the_rule(settings, rule):
    with pytest.raises(UserError, match=rule):
        ClusterRefits(small_model(), **settings)


def test_a_model_without_such_layers_is_an_error():
    with pytest.raises(UserError, match="DropCluster2d"):
        ClusterRefits(nn.Linear(2, 2))
