"""What only a GPU can show, on a tiny model: `python -m pytest -m cuda tests/test_cuda.py`.

The commands are the user's own. SINGLORA_TEST_DEVICE=cpu tries out the tests themselves where there is no GPU: all but
float16 training and captured graphs.

Tolerances: each of the network's some hundred layers rounds to the compute dtype once; roundings add up like a random
walk, to ten times the dtype's epsilon, and `ROUNDINGS` leaves some room. A convolution in float32 on a GPU has TF32's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    import torch
    from conftest import MakeNetworks

pytestmark = pytest.mark.cuda

ROUNDINGS = 16
EPSILON = {"no": 2**-10, "fp16": 2**-10, "bf16": 2**-7, "float32": 2**-10, "float16": 2**-10, "bfloat16": 2**-7}
"""By precision, TF32's for float32."""
DTYPES = ("float32", "float16", "bfloat16")
STEPS = 4

Train = Callable[..., list[dict[str, float]]]


@pytest.fixture(scope="session")
def device() -> str:
    """The GPU; skips where there is none."""
    import torch

    name = os.environ.get("SINGLORA_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU that torch can use")
    return name


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    yield
    import sys

    if "torch._dynamo" in sys.modules:
        import torch

        torch.compiler.reset()


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images to train on."""
    folder = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for number in range(3):
        small = Image.fromarray(noise.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((40, 36)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def train(device: str, images: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """train(*flags, device=None) -> the log's lines; the adapter is verified by the command itself."""
    from singlora_diffusion import cli

    def trained(*flags: str, on: str = device, out: Path | None = None) -> list[dict[str, float]]:
        out = out or tmp_path_factory.mktemp("run") / "out"
        words = [
            "--instance_data_dir",
            str(images),
            "--instance_prompt",
            "a photo of sks dog",
            "--output_dir",
            str(out),
        ]
        words += ["--pretrained_model_name_or_path", str(tiny_model), "--max_train_steps", str(STEPS)]
        words += ["--train_batch_size", "2", "--rank", "4", "--validation_steps", "0", "--report_to", "none"]
        assert cli.run("train", [*words, "--device", on, *flags]) == 0
        return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]

    return trained


@pytest.fixture(scope="session")
def reference(train: Train) -> list[dict[str, float]]:
    """The log of the training in float32 on the CPU, text encoder included."""
    return train("--train_text_encoder", on="cpu")


def close(log: list[dict[str, float]], reference: list[dict[str, float]], precision: str) -> None:
    """The same losses and gradients to rounding. Adam divides by the gradient's size, so later steps drift."""
    assert [line["step"] for line in log] == list(range(1, STEPS + 1))
    tolerance = ROUNDINGS * EPSILON[precision]
    assert log[0]["loss"] == pytest.approx(reference[0]["loss"], rel=tolerance)
    assert log[0]["grad_norm"] == pytest.approx(reference[0]["grad_norm"], rel=4 * tolerance)
    assert [line["loss"] for line in log] == pytest.approx([line["loss"] for line in reference], rel=4 * tolerance)
    assert all(np.isfinite(list(line.values())).all() for line in log)


@pytest.mark.parametrize("precision", ("no", "fp16", "bf16"))
def test_training_is_that_of_the_cpu(
    precision: str, device: str, train: Train, reference: list[dict[str, float]]
) -> None:
    """With fp16 the gradients are scaled up for the way back: the log's, which are clipped, are the unscaled ones."""
    if device == "cpu" and precision == "fp16":
        pytest.skip("accelerate's scaler is for GPUs")
    close(train("--train_text_encoder", "--mixed_precision", precision), reference, precision)


@pytest.mark.parametrize("precision", ("no", "bf16"))
def test_gradient_checkpointing_changes_nothing_but_memory(
    precision: str, train: Train, reference: list[dict[str, float]]
) -> None:
    flags = ("--train_text_encoder", "--gradient_checkpointing", "--mixed_precision", precision)
    close(train(*flags), reference, precision)


@pytest.mark.parametrize("method", ("lora", "dora", "oft"))
def test_the_baselines_train(method: str, train: Train) -> None:
    log = train("--method", method, "--mixed_precision", "bf16")
    assert all(np.isfinite([line["loss"], line["grad_norm"]]).all() for line in log)


def test_dora_on_singlora_trains(train: Train) -> None:
    log = train("--dora", "--mixed_precision", "bf16")
    assert all(np.isfinite([line["loss"], line["grad_norm"]]).all() for line in log)


def inputs(unet: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """Two noisy latents, their times, their text."""
    import torch

    draw = torch.Generator().manual_seed(0)
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    latents = torch.randn(2, unet.config.in_channels, side, side, generator=draw)
    text = torch.randn(2, 7, width, generator=draw)
    return latents.to(device, dtype), torch.tensor([10, 500], device=device), text.to(device, dtype)


@pytest.mark.parametrize("mode", ("compiled", "captured"))
@pytest.mark.parametrize("dora", (False, True))
@pytest.mark.parametrize("dtype_name", ("float32", "bfloat16"))
def test_a_compiled_step_is_the_eager_one(
    mode: str, dora: bool, dtype_name: str, device: str, make_networks: MakeNetworks
) -> None:
    """Also when the ramp moves on between steps: a captured graph must not keep the u that it was captured with."""
    import torch

    from singlora_diffusion import adapters
    from singlora_diffusion.adapters.config import AdapterConfig

    if device == "cpu" and mode == "captured":
        pytest.skip("CUDA graphs")
    dtype = getattr(torch, dtype_name)
    unet: Any = make_networks(dtype)["unet"].to(device)
    adapter = adapters.attach({"unet": unet}, AdapterConfig(rank=3, dora=dora, ramp_steps=4))
    given = inputs(unet, dtype, device)

    def answers() -> list[torch.Tensor]:
        found = []
        for step in range(1, 5):
            adapter.set_step(step)
            answer = unet(*given).sample.float()
            gradients = torch.autograd.grad(answer.square().mean(), adapter.parameters())
            found.append(torch.cat([answer.flatten(), *(g.float().flatten() for g in gradients)]).detach().clone())
        return found

    eager = answers()
    assert not torch.equal(eager[0], eager[3])
    backend = "inductor" if device == "cuda" else "aot_eager"  # which needs no C++ compiler
    unet.compile(backend=backend, mode="reduce-overhead" if mode == "captured" else None)
    for step, (one, other) in enumerate(zip(eager, answers(), strict=True), 1):
        parts = [part.split(given[0].numel()) for part in (one, other)]
        for before, after in zip(*parts, strict=True):
            bound = ROUNDINGS * EPSILON[dtype_name] * before.norm() + 1e-7
            assert (before - after).norm() <= bound, f"step {step}"


@pytest.mark.parametrize("dtype_name", DTYPES)
def test_merging_is_exact_and_undone_to_the_bit(dtype_name: str, device: str, make_networks: MakeNetworks) -> None:
    """The merged weight is W0 + dW in float32, rounded once to the base's dtype."""
    import torch

    from singlora_diffusion import adapters
    from singlora_diffusion.adapters.config import AdapterConfig

    dtype = getattr(torch, dtype_name)
    networks = {name: network.to(device) for name, network in make_networks(dtype).items()}
    before = {name: {k: t.clone() for k, t in one.state_dict().items()} for name, one in networks.items()}
    adapter = adapters.attach(networks, AdapterConfig(rank=3, text_targets=("q_proj", "v_proj")))
    adapter.set_step(1)
    originals = {name: layer.weight.detach().clone() for name, layer in adapter.layers().items()}
    deltas = dict(adapter.delta_weights())
    assert all(delta.device.type == device and delta.dtype == torch.float32 for delta in deltas.values())
    adapter.merge()
    for name, layer in adapter.layers().items():
        assert torch.equal(layer.weight, (originals[name].float() + deltas[name]).to(dtype)), name
        assert not torch.equal(layer.weight, originals[name]), name
    adapter.unmerge()
    adapter.detach()
    for name, network in networks.items():
        assert all(torch.equal(tensor, before[name][key]) for key, tensor in network.state_dict().items())


@pytest.mark.parametrize("dtype_name", DTYPES)
def test_images_in_every_precision(
    dtype_name: str, device: str, train: Train, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> None:
    """Attached and merged, from an adapter that this device trained: what the CPU draws in float32, to rounding."""
    from singlora_diffusion import cli

    out = tmp_path_factory.mktemp("drawn")
    train("--learning_rate", "1e-2", "--train_text_encoder", out=out / "run")

    def drawn(name: str, *flags: str) -> np.ndarray:
        words = ["--adapter", str(out / "run"), "--prompt", "a photo of sks dog", "--seeds", "0-1"]
        words += ["--num_inference_steps", "4", "--output_dir", str(out / name)]
        assert cli.run("generate", [*words, *flags]) == 0
        return np.stack([np.asarray(Image.open(path), np.float32) for path in sorted((out / name).glob("0*.png"))])

    reference = drawn("reference", "--device", "cpu", "--dtype", "float32")
    attached = drawn("attached", "--device", device, "--dtype", dtype_name)
    merged = drawn("merged", "--device", device, "--dtype", dtype_name, "--merge")
    assert attached.shape == reference.shape == (2, 32, 32, 3) and attached.std() > 1
    # Four denoising steps and the decoder, each with the network's roundings; half a level of 255 is the file's own.
    bound = 4 * ROUNDINGS * EPSILON[dtype_name] * 255 + 1
    assert np.abs(attached - reference).mean() <= bound
    assert np.abs(merged - attached).mean() <= bound


def test_an_adapter_trained_on_the_device_continues_there(train: Train, tmp_path: Path) -> None:
    """Killed after two steps' checkpoint and resumed: the log goes on with the unbroken run's losses."""
    unbroken = train("--mixed_precision", "bf16", "--checkpointing_steps", "2", out=tmp_path / "run")
    (tmp_path / "run" / "adapter.safetensors").unlink()
    resume = ("--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-2"))
    resumed = train("--mixed_precision", "bf16", "--checkpointing_steps", "2", *resume, out=tmp_path / "run")
    close(resumed, unbroken, "bf16")
