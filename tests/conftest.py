"""What holds for all tests."""

import pytest
import torch
from hub_client import Client
from hub_server import Hub

# The models are tiny: more threads would only wait for one another.
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def hub():
    """A hub on this machine, empty."""
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """A process that talks to it as alice, with a cache of its own."""
    with Client(hub.env(tmp_path_factory.mktemp("home"))) as client:
        yield client
