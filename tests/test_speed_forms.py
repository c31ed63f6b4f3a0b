"""The fast form of an adapted layer is the plain one, in answers and gradients, and steps aside where it must."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from singlora_diffusion import adapters
from singlora_diffusion.adapters import singlora_fused
from singlora_diffusion.adapters.config import AdapterConfig
from singlora_diffusion.adapters.singlora import SingLoRA
from singlora_diffusion.adapters.singlora_dora import DoraSingLoRA
from singlora_diffusion.models import cpu_layers

SHAPES = ((24, 24), (16, 40), (40, 16), (1, 7), (9, 1))  # (out, in)
FORMS = (SingLoRA, DoraSingLoRA)


def made(
    shape: tuple[int, int], form: type[SingLoRA], bias: bool, signature: str
) -> tuple[nn.Linear, SingLoRA, Tensor]:
    """A float64 layer, its delta after some training, in mid-ramp, and an input that wants its gradient."""
    torch.manual_seed(0)
    base = nn.Linear(shape[1], shape[0], bias=bias).double().requires_grad_(False)
    delta = form(base, 3, 1.3, signature=signature).double()
    for parameter in delta.parameters():
        parameter.data += torch.randn_like(parameter) * 0.3
    delta.set_ramp(0.5)
    return base, delta, torch.randn(2, 5, shape[1], dtype=torch.float64, requires_grad=True)


def answers(base: nn.Linear, delta: SingLoRA, x: Tensor) -> list[Tensor]:
    """The output and the gradients in x and in everything trained, of a loss that weighs every output differently."""
    y = delta(base, x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weights).sum() + y.square().sum(), [x, *delta.parameters()])]


@pytest.mark.numerical
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("signature", ("positive", "balanced"))
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_plain_form(shape, bias, signature, form, monkeypatch) -> None:
    # The norm is float32 by contract, and no part of what is compared.
    monkeypatch.setattr(
        DoraSingLoRA, "norm", lambda self, weight: (weight + torch.matmul(*self.exact_pair())).norm(dim=1).detach()
    )
    base, delta, x = made(shape, form, bias, signature)
    for scale in (1.0, 0.4):
        delta.set_scale(scale)
        fast = answers(base, delta, x)
        with monkeypatch.context() as patch:
            patch.setattr(singlora_fused, "applies", lambda base, x: False)
            slow = answers(base, delta, x)
        for one, other in zip(fast, slow, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_it_is_in_use(monkeypatch) -> None:
    """Else the test above would compare the plain form with itself."""
    base, delta, x = made((16, 40), SingLoRA, True, "positive")
    called = []
    fused = singlora_fused.adapted_linear
    monkeypatch.setattr(singlora_fused, "adapted_linear", lambda *args: called.append(1) or fused(*args))
    delta(base, x)
    assert called


@pytest.mark.numerical
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_the_finite_differences(shape) -> None:
    base, delta, x = made(shape, SingLoRA, True, "balanced")
    scaling = delta._scaling()
    assert torch.autograd.gradcheck(
        lambda x, a: singlora_fused.adapted_linear(base, x, a, scaling), (x, delta.A), fast_mode=True
    )


def test_an_input_without_gradient_gets_none() -> None:
    base, delta, x = made((16, 40), SingLoRA, False, "positive")
    delta(base, x.detach()).sum().backward()
    assert x.grad is None and delta.A.grad is not None


def test_steps_aside() -> None:
    """For every layer that is more than F.linear with frozen weights."""
    x = torch.zeros(1, 4)
    base = nn.Linear(4, 4).requires_grad_(False)
    assert singlora_fused.applies(base, x)
    assert not singlora_fused.applies(base, x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not singlora_fused.applies(base, x)

    class Quantized(nn.Linear):
        pass

    assert not singlora_fused.applies(Quantized(4, 4).requires_grad_(False), x)
    hook = base.register_forward_hook(lambda *args: None)
    assert not singlora_fused.applies(base, x)
    hook.remove()
    assert singlora_fused.applies(base, x)
    assert not singlora_fused.applies(nn.Linear(4, 4), x)


@pytest.mark.numerical
@pytest.mark.parametrize("cast", (False, True), ids=("float32", "autocast"))
def test_hooks_of_the_base_are_heard(cast: bool) -> None:
    """A hook sees the base's own answer and may change it, as with the plain form."""
    base, delta, x = made((8, 8), SingLoRA, True, "positive")
    delta, base, x = delta.float(), base.float(), x.detach().float()
    usual = delta(base, x)
    handle = base.register_forward_hook(lambda module, args, output: output + 1)
    with torch.autocast("cpu", dtype=torch.bfloat16) if cast else nullcontext():
        hooked = delta(base, x)
    handle.remove()
    torch.testing.assert_close(hooked.float(), usual + 1, rtol=0, atol=0.1 if cast else 1e-5)


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="its compiler reads neither generators nor vars()")
@pytest.mark.parametrize(("dora", "dtype"), ((True, torch.float32), (False, torch.bfloat16)))
def test_a_step_compiles_without_graph_breaks(dora, dtype, monkeypatch) -> None:
    """Through the attention processors and the layers' CPU forms; answers and gradients are those of the eager step."""
    monkeypatch.setattr(cpu_layers, "LARGE_WEIGHT", 1)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(  # a block on each side: tracing takes the time
        sample_size=8,
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=48,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    unet = unet.to(dtype).requires_grad_(False).eval()
    cpu_layers.prepare(unet, cpu_layers.Forms(patches=1, pointwise=True, wide=1))
    adapter = adapters.attach({"unet": unet}, AdapterConfig(rank=2, dora=dora))
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    inputs = (
        torch.randn(2, unet.config.in_channels, side, side, dtype=dtype),
        torch.tensor([10, 500]),
        torch.randn(2, 7, width, dtype=dtype),
    )
    torch.compiler.reset()
    results = []
    for call in (unet, torch.compile(unet, fullgraph=True, backend="aot_eager")):
        answer = call(*inputs).sample
        results.append([answer, *torch.autograd.grad(answer.float().square().mean(), adapter.parameters())])
    for eager, compiled in zip(*results, strict=True):
        tolerance = (1e-5 if dtype == torch.float32 else 0.05) * eager.abs().max()
        assert (eager - compiled).abs().max() <= tolerance
