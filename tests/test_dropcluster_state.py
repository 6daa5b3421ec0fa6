"""DropCluster's state in everything that carries a model: export, ONNX, averaging, DDP."""

import copy
import io
import warnings
from datetime import timedelta

import pytest
import timm
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.optim.swa_utils import AveragedModel

import timm_structdrop  # noqa: F401
from timm_structdrop.layers import DropCluster2d

SIZE = 32


def fitted_model(channels_dead=(1, 4), **kwargs):
    """A small model whose first convolution has dead channels, with clusters fitted."""
    torch.manual_seed(0)
    model = timm.create_model(
        "resnet8_dropcluster", num_classes=4, n_clusters=6, drop_block_rate=0.3, **kwargs
    )
    with torch.no_grad():
        for channel in channels_dead:
            model.bn1.weight[channel] = 0.0
            model.bn1.bias[channel] = -1.0
    layer = model.act1.dropcluster
    layer.request_fit(at=1)
    model.train()(torch.randn(8, 3, SIZE, SIZE))
    assert int((~layer.structured).sum()) == len(channels_dead)
    # what the masked channels would say if they were not masked
    with torch.no_grad():
        for channel in channels_dead:
            model.bn1.weight[channel] = 1.0
            model.bn1.bias[channel] = 1.0
    return model.eval()


def test_masked_channels_matter_in_this_model():
    model = fitted_model()
    x = torch.randn(2, 3, SIZE, SIZE)
    masked = model(x)
    model.act1.dropcluster.structured.fill_(True)
    assert not torch.allclose(masked, model(x))


def test_export_has_the_same_logits():
    model = fitted_model()
    x = torch.randn(2, 3, SIZE, SIZE)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


@pytest.mark.skipif(
    torch.__version__.startswith("2.6."),
    reason="the ONNX exporter of torch 2.6 fails on batch norms with the onnxscript, onnx_ir and "
    "protobuf of today",
)
def test_onnx_has_the_same_logits():
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = fitted_model()
    x = torch.randn(2, 3, SIZE, SIZE)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=1e-4, atol=1e-4)


def test_stochastic_weight_averaging_keeps_the_state():
    model = fitted_model()
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    model.act1.dropcluster.fit(torch.randn(8, 16, SIZE, SIZE), at=2)
    averaged.update_parameters(model)
    x = torch.randn(2, 3, SIZE, SIZE)
    averaged.eval()(x)
    twin = copy.deepcopy(averaged.module.state_dict())
    assert twin["act1.dropcluster.labels"].dtype == torch.uint8
    assert int(twin["act1.dropcluster.labels"].max()) == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_in_training(dtype):
    model = fitted_model().train()
    with torch.autocast("cpu", dtype):
        out = model(torch.randn(4, 3, SIZE, SIZE))
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fit_on_half_precision_activations(dtype):
    layer = DropCluster2d(4, (8, 8), n_clusters=5)
    assert layer.fit(torch.randn(4, 4, 8, 8).to(dtype)).structured.all()


def test_channels_last_gives_the_same_clusters_and_keeps_the_format():
    maps = torch.randn(8, 4, 8, 8)
    plain, last = (DropCluster2d(4, (8, 8), n_clusters=5, drop_prob=0.4) for _ in range(2))
    plain.fit(maps)
    last.fit(maps.to(memory_format=torch.channels_last))
    assert torch.equal(plain.labels, last.labels)
    out = last(maps.to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)


def train_on_ranks(rank: int, world: int, rendezvous: str, results: mp.SimpleQueue) -> None:
    """Three steps under DDP with a fit before the first and the third one."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world
    )
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        DropCluster2d(4, (8, 8), n_clusters=5),
        nn.Flatten(),
        nn.Linear(256, 2),
    )
    model = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.manual_seed(100 + rank)
    for step in range(3):
        x = torch.randn(6, 1, 8, 8)
        if rank == world - 1 and step == 0:
            x = torch.zeros_like(x)  # all channels of this rank's batch are dead
        if step in (0, 2):
            net[1].request_fit(at=step)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        state = {name: value.tolist() for name, value in net[1].state_dict().items()}
        results.put((rank, step, state, float(net[0].weight.detach().sum())))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_state_is_identical_on_all_ranks(world, tmp_path):
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    arguments = (world, str(tmp_path / "rendezvous"), results)
    mp.start_processes(train_on_ranks, arguments, nprocs=world, start_method="spawn")
    found = sorted(results.get() for _ in range(3 * world))
    for step, fitted_at in enumerate([0, 0, 2]):
        states = [state for _, at, state, _ in found if at == step]
        assert len(states) == world
        assert all(state == states[0] for state in states)
        assert states[0]["fitted_at"] == fitted_at
        assert len({weight for _, at, _, weight in found if at == step}) == 1


def fail_on_the_first_rank(rank: int, rendezvous: str, results: mp.SimpleQueue) -> None:
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=20),
    )
    layer = DropCluster2d(4, (8, 8), n_clusters=5)
    layer.request_fit(at=0)
    if rank == 0:
        layer._hopkins_structured = lambda *args: 1 / 0
    try:
        layer(torch.randn(6, 4, 8, 8))
    except (ZeroDivisionError, RuntimeError) as error:
        results.put((rank, f"{type(error).__name__}: {error}"))
    torch.distributed.destroy_process_group()


def test_a_fit_that_fails_ends_all_ranks(tmp_path):
    results = mp.get_context("spawn").SimpleQueue()
    mp.start_processes(
        fail_on_the_first_rank,
        (str(tmp_path / "rendezvous"), results),
        nprocs=2,
        start_method="spawn",
    )
    first, second = sorted(results.get() for _ in range(2))
    assert first == (0, "ZeroDivisionError: division by zero")
    assert second == (
        1,
        "RuntimeError: the clusters of all ranks are fitted on rank 0, where it failed",
    )
