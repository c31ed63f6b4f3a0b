"""Dropout on what an update reads: the identity it is, and masks that nothing but the example decides."""

from __future__ import annotations

import copy
import math
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from singlora_diffusion import adapters
from singlora_diffusion.adapters.config import AdapterConfig
from singlora_diffusion.adapters.dropout import BITS, Dropout, mixed
from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import replaced
from singlora_diffusion.training import loop
from singlora_diffusion.training.events import Step
from singlora_diffusion.training.recipe import Recipe

CONFIG = AdapterConfig(rank=2, alpha=3.0, targets=("only",))
WITH_DROPOUT = {
    "singlora": CONFIG,
    "offset": replace(CONFIG, init="offset"),
    "balanced": replace(CONFIG, signature="balanced"),
    "singlora with dora": replace(CONFIG, dora=True),
    "lora": replace(CONFIG, method="lora"),
    "lora+": replace(CONFIG, method="lora+"),
    "dora": replace(CONFIG, method="dora"),
}
ROWS = (11, 4_000_000_000, 11)

methods = pytest.mark.parametrize("config", WITH_DROPOUT.values(), ids=WITH_DROPOUT.keys())


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x)


def made(config: AdapterConfig) -> tuple[Network, adapters.Adapter]:
    """A layer with an adapter after some training."""
    torch.manual_seed(3)
    network = Network().requires_grad_(False)
    adapter = adapters.attach({"unet": network}, config)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return network, adapter


@pytest.mark.numerical
@methods
def test_the_update_reads_what_is_left_of_the_input_and_the_base_reads_all_of_it(config: AdapterConfig) -> None:
    """y = x W0^T + b + drop(x) (W' - W0)^T, the same rows with the same masks."""
    network, adapter = made(replace(config, lora_dropout=0.4))
    ((name, change),) = adapter.delta_weights()
    base = copy.deepcopy(adapter.layers()[name])
    x = torch.randn(3, 5, 12)
    x[2] = x[0]
    with torch.no_grad(), adapter.dropping({"denoiser": ROWS}):
        y = network(x)
        assert torch.equal(network(x), y)
    dropout = Dropout(0.4, zlib.crc32(name.encode()))
    dropout.rows = torch.tensor(ROWS)
    torch.testing.assert_close(y, base(x) + dropout(x) @ change.T, atol=1e-5, rtol=1e-5)
    assert torch.equal(y[0], y[2])
    with torch.no_grad():
        assert not torch.allclose(network(x), y, atol=1e-3)


@methods
def test_outside_of_training_steps_there_is_no_dropout_to_the_bit(config: AdapterConfig) -> None:
    x = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(0))
    (plain, _), (network, adapter) = made(config), made(replace(config, lora_dropout=0.9))
    assert torch.equal(network(x), plain(x))
    with pytest.raises(RuntimeError, match="in between"), adapter.dropping({"denoiser": ROWS}):
        raise RuntimeError("in between")
    assert torch.equal(network(x), plain(x))
    with (
        adapter.dropping({"denoiser": ROWS}),
        pytest.raises(ValueError, match=r"3 rows are numbered.* the input has 2"),
    ):
        network(x[:2])


def test_steps_drop_and_validation_does_not(recipe: Recipe, training_images: Path, tmp_path: Path) -> None:
    """A rate of almost nothing leaves the start as it is, and the loss of the step before it follows from the start."""
    still = replaced(recipe, held_out_data_dir=training_images, max_train_steps=1, learning_rate=1e-30, ramp_steps=0)
    still = replaced(still, validation_steps=1, num_validation_images=1)
    steps = []
    for p in (0.0, 0.5):
        run = loop.run(replaced(still, lora_dropout=p, output_dir=tmp_path / str(p)))
        steps += [event for event in run if isinstance(event, Step)]
    assert steps[0].loss != steps[1].loss and steps[0].validation_loss == steps[1].validation_loss


@pytest.mark.parametrize("method", ["oft", "lokr"])
def test_methods_without_such_a_dropout_refuse_it(method: str) -> None:
    config = AdapterConfig(method=method, targets=("only",), lora_dropout=0.1)
    with pytest.raises(UserError, match=rf"lora_dropout is an option of singlora, .*, not of {method}: leave it out"):
        adapters.attach({"unet": Network()}, config)


@pytest.mark.numerical
@pytest.mark.parametrize("method", ["singlora", "lora"])
def test_other_rows_need_no_other_graph(method: str) -> None:
    """Blocks that are compiled for training are compiled once."""
    from torch._dynamo.testing import CompileCounter

    network, adapter = made(replace(WITH_DROPOUT[method], lora_dropout=0.3))
    count, x = CompileCounter(), torch.randn(3, 5, 12)
    compiled = torch.compile(network.forward, backend=count, fullgraph=True)
    for step in range(4):
        with adapter.dropping({"denoiser": (step, step + 9, (1 << 31) + step)}):
            torch.testing.assert_close(compiled(x), network(x))
    assert count.frame_count == 1


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_masks_keep_the_share_they_should_and_know_nothing_of_each_other(p: float) -> None:
    """Within five standard deviations of a binomial count; the masks are fixed, so this cannot fail by chance."""
    count = 1 << 16
    dropout, other = Dropout(p, 1), Dropout(p, 2)
    dropout.rows = other.rows = torch.tensor([0, 1, 2, 1 << 31])
    kept = torch.cat([one(torch.ones(4, count)) for one in (dropout, other)]) > 0
    room = 5 * math.sqrt(p * (1 - p) / count)
    assert torch.all((kept.double().mean(dim=1) - (1 - p)).abs() < room)
    covariance = torch.cov(kept.double()) - torch.eye(8) * p * (1 - p)
    assert covariance.abs().max() < 5 * p * (1 - p) * math.sqrt(2 / count)
    shifted = torch.stack([kept[0, :-9], kept[0, 1:-8], kept[0, 8:-1]]).double()
    assert (torch.cov(shifted) - torch.eye(3) * p * (1 - p)).abs().max() < 5 * p * (1 - p) * math.sqrt(2 / count)
    values = dropout(torch.ones(4, 8)).unique()
    torch.testing.assert_close(values[values > 0], torch.tensor([1 / (1 - p)]))


def test_numbers_are_mixed_one_to_one() -> None:
    """And as the 32-bit arithmetic of the hash has it, which has no overflow in Python."""
    numbers = [0, 1, 2, 0xDEADBEEF, BITS]
    expected = []
    for number in numbers:
        number = ((number ^ (number >> 16)) * 0x7FEB352D) % (1 << 32)
        number = ((number ^ (number >> 15)) * 0x846CA68B) % (1 << 32)
        expected.append(number ^ (number >> 16))
    assert mixed(torch.tensor(numbers)).tolist() == expected
    assert len(mixed(torch.arange(1 << 16)).unique()) == 1 << 16
