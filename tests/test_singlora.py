"""SingLoRA's maths against dense float64 arithmetic and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from singlora_diffusion.adapters.adapter import ramp
from singlora_diffusion.adapters.delta import Factors
from singlora_diffusion.adapters.singlora import INITS, SIGNATURES, SingLoRA, kaiming
from singlora_diffusion.adapters.singlora_dora import DoraSingLoRA

pytestmark = pytest.mark.numerical

FORMS = (SingLoRA, DoraSingLoRA)
SHAPES = ((24, 24), (16, 40), (40, 16), (1, 7), (9, 1))  # (out, in): square, wide, tall, single rows and columns
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}  # of an output, relative to its norm

shapes = st.sampled_from(SHAPES)
ranks = st.sampled_from((1, 2, 5, 48))  # 48: above every side
ramps = st.integers(0, 8).map(lambda n: n / 8)
scales = st.integers(-4, 8).map(lambda n: n / 4)
inits, signatures, forms = st.sampled_from(INITS), st.sampled_from(SIGNATURES), st.sampled_from(FORMS)


def layer(shape: tuple[int, int], dtype: torch.dtype = torch.float32, bias: bool = True, seed: int = 0) -> nn.Linear:
    out, into = shape
    generator = torch.Generator().manual_seed(seed)
    base = nn.Linear(into, out, bias=bias)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(into))
    return base.to(dtype).requires_grad_(False)


def moved(delta: SingLoRA, seed: int = 1) -> SingLoRA:
    """After some training: every trained tensor somewhere else."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return delta


def inputs(delta: SingLoRA, dtype: torch.dtype = torch.float32, rows: tuple[int, ...] = (3, 4)) -> Tensor:
    return torch.randn(*rows, delta.in_features, generator=torch.Generator().manual_seed(2)).to(dtype)


def dense(delta: SingLoRA, w0: Tensor) -> Tensor:
    """W' - W0 in float64 by the definition, (out, in)."""
    a = delta.A.detach().double()
    signs = torch.ones(delta.rank, dtype=torch.float64)
    if delta.signature == "balanced":
        signs[1::2] = -1
    product = a[: delta.out_features] @ signs.diag() @ a[: delta.in_features].T
    if delta.A0 is not None:
        a0 = delta.A0.double()
        product = product - a0[: delta.out_features] @ signs.diag() @ a0[: delta.in_features].T
    change = delta.alpha / delta.rank * delta.u * product
    if isinstance(delta, DoraSingLoRA):
        directed = w0.double() + change
        norm = torch.linalg.vector_norm(directed, dim=1, keepdim=True)
        change = delta.magnitude.detach().double()[:, None] * directed / norm - w0.double()
    return delta.scale * change


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.double()).norm() / b.double().norm())


@settings(max_examples=60)
@given(
    shapes,
    ranks,
    inits,
    signatures,
    forms,
    st.sampled_from(list(ROUNDING)),
    st.booleans(),
    ramps,
    scales,
)
def test_forward_is_the_dense_layer(shape, rank, init, signature, form, dtype, bias, u, scale) -> None:
    base = layer(shape, dtype, bias)
    delta = moved(form(base, rank, alpha=1.7 * rank, init=init, signature=signature))
    delta.set_ramp(u)
    delta.set_scale(scale)
    w0 = base.weight.double()
    change = dense(delta, base.weight)
    x = inputs(delta, dtype)
    y = delta(base, x).detach()
    assert y.dtype == dtype and delta.A.dtype == torch.float32
    expected = F.linear(x.double(), w0 + change, base.bias.double() if bias else None)
    # Of the terms that are added, which may nearly cancel.
    size = F.linear(x.double(), w0).norm() + F.linear(x.double(), change).norm() + expected.norm()
    assert float((y.double() - expected).norm() / size) < ROUNDING[dtype]
    found = delta.delta_weight(base.weight)
    assert found.dtype == torch.float32 and found.shape == shape
    assert float((found.double() - change).norm()) <= 2e-5 * float(change.norm() + abs(scale) * w0.norm())


@settings(max_examples=30)
@given(shapes, ranks, inits, signatures, ramps, scales)
def test_factors_are_a_lora_pair(shape, rank, init, signature, u, scale) -> None:
    base = layer(shape)
    delta = moved(SingLoRA(base, rank, alpha=3.0, init=init, signature=signature))
    delta.set_ramp(u)
    delta.set_scale(scale)
    up, down, magnitude = delta.factors()
    assert magnitude is None
    k = rank * (2 if init == "offset" else 1)
    assert up.shape == (shape[0], k) and down.shape == (k, shape[1])
    assert up.dtype == down.dtype == torch.float32 and up.is_contiguous() and down.is_contiguous()
    assert up.data_ptr() != delta.A.data_ptr() and down.untyped_storage().data_ptr() != delta.A.data_ptr()
    torch.testing.assert_close(up @ down, delta.delta_weight(base.weight), rtol=1e-5, atol=1e-6)


@settings(max_examples=40)
@given(shapes, ranks, inits, signatures, forms, st.sampled_from(list(ROUNDING)), st.booleans())
def test_nothing_changes_at_the_start(shape, rank, init, signature, form, dtype, bias) -> None:
    base = layer(shape, dtype, bias)
    x = inputs(SingLoRA(base, 1, 1.0), dtype)
    delta = form(base, rank, alpha=float(rank), init=init, signature=signature)
    if init == "offset" and form is SingLoRA:  # at any u
        assert torch.equal(delta(base, x), base(x))
        assert not delta.delta_weight(base.weight).any()
    elif init == "offset":
        assert relative(delta(base, x), base(x)) < (1e-6 if dtype == torch.float32 else 1e-2)
    delta.set_ramp(0.0)
    assert torch.equal(delta(base, x), base(x))
    assert not delta.delta_weight(base.weight).any()
    delta.set_ramp(1.0)
    moved(delta).set_scale(0.0)
    assert torch.equal(delta(base, x), base(x))
    assert not delta.delta_weight(base.weight).any()


@settings(max_examples=15)
@given(shapes, st.sampled_from((2, 5, 48)), st.integers(0, 99))
def test_the_update_depends_on_a_up_to_rotation(shape, rank, seed) -> None:
    base = layer(shape)
    delta = moved(SingLoRA(base, rank, alpha=2.0))
    before = delta.delta_weight(base.weight)
    turn = torch.linalg.qr(torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed)).double()).Q
    with torch.no_grad():
        delta.A.copy_(delta.A.double() @ turn)
    torch.testing.assert_close(delta.delta_weight(base.weight), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [320, 768, 1280])
def test_initial_product_is_of_order_one_at_every_width(rows: int) -> None:
    """fan_in = n. With fan_in = r the norm would be 9.8 at 320 rows and 33 at 1280."""
    a = kaiming(rows, 16, torch.Generator().manual_seed(0))
    assert a.shape == (rows, 16) and a.abs().max() <= rows**-0.5
    assert float(a.square().mean() * rows) == pytest.approx(1 / 3, rel=0.05)  # the variance of U(-1, 1)
    assert 0.36 < float(torch.linalg.matrix_norm(a @ a.T, 2)) < 0.52


def test_the_generator_decides_the_start() -> None:
    base = layer((6, 9))
    one, same, other = (SingLoRA(base, 4, 4.0, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(one.A, same.A) and not torch.equal(one.A, other.A)
    half = SingLoRA(layer((6, 9), torch.bfloat16), 4, 4.0, generator=torch.Generator().manual_seed(3))
    assert torch.equal(one.A, half.A)  # whatever the base's dtype


def test_positive_is_semidefinite_and_balanced_is_not() -> None:
    base = layer((12, 12))
    for signature, rank, negative in (("positive", 4, 0), ("balanced", 4, 2), ("balanced", 5, 2)):
        delta = SingLoRA(base, rank, 4.0, signature=signature)
        eigenvalues = torch.linalg.eigvalsh(delta.delta_weight(base.weight).double())
        assert int((eigenvalues < -1e-6).sum()) == negative
        assert int((eigenvalues > 1e-6).sum()) == rank - negative


@settings(max_examples=30)
@given(shapes, ranks, inits, signatures, st.sampled_from(list(ROUNDING)))
def test_gradients_are_those_of_the_dense_layer(shape, rank, init, signature, dtype) -> None:
    base = layer(shape, dtype)
    delta = moved(SingLoRA(base, rank, alpha=0.6 * rank, init=init, signature=signature))
    delta.set_ramp(0.7)
    x = inputs(delta, dtype).requires_grad_()
    cotangent = torch.randn(3, 4, shape[0], generator=torch.Generator().manual_seed(4)).to(dtype)
    delta(base, x).backward(cotangent)

    a = delta.A.detach().double().requires_grad_()
    z = x.detach().double().requires_grad_()
    signs = delta.S.double() if delta.S is not None else torch.ones(rank, dtype=torch.float64)
    weight = base.weight.double() + 0.6 * 0.7 * a[: shape[0]] * signs @ a[: shape[1]].T
    if delta.A0 is not None:
        a0 = delta.A0.double()
        weight = weight - 0.6 * 0.7 * a0[: shape[0]] * signs @ a0[: shape[1]].T
    F.linear(z, weight, base.bias.double()).backward(cotangent.double())
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert delta.A.grad is not None and delta.A.grad.dtype == torch.float32
    assert relative(delta.A.grad, a.grad) < tolerance
    assert relative(x.grad, z.grad) < tolerance


@settings(max_examples=30)
@given(shapes, ranks, inits, signatures)
def test_dora_norm_is_that_of_the_dense_weight(shape, rank, init, signature) -> None:
    base = layer(shape)
    delta = moved(DoraSingLoRA(base, rank, alpha=float(rank), init=init, signature=signature))
    expected = torch.linalg.vector_norm(base.weight.double() + SingLoRA.delta_weight(delta, base.weight), dim=1)
    largest = float(torch.linalg.vector_norm(base.weight, dim=1).max())
    torch.testing.assert_close(delta.norm(base.weight).double(), expected, rtol=1e-4, atol=1e-3 * largest)
    assert not delta.norm(base.weight).requires_grad


def test_dora_is_pefts() -> None:
    """PEFT's layer with the same direction and magnitude gives the same outputs and gradients."""
    from peft.tuners import lora

    base = layer((40, 16))
    delta = moved(DoraSingLoRA(base, 4, alpha=6.0))
    up, down, magnitude = delta.factors()
    assert torch.equal(magnitude, delta.magnitude)
    theirs = lora.Linear(base, "default", lora.LoraConfig(r=4, lora_alpha=4, use_dora=True), r=4, lora_alpha=4)
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(down)
        theirs.lora_B["default"].weight.copy_(up)
        theirs.lora_magnitude_vector["default"].weight.copy_(delta.magnitude)
    x = inputs(delta)
    ours, expected = delta(base, x), theirs(x)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn_like(ours)
    ours.backward(cotangent)
    expected.backward(cotangent)
    torch.testing.assert_close(
        delta.magnitude.grad, theirs.lora_magnitude_vector["default"].weight.grad, rtol=1e-4, atol=1e-5
    )
    a_grad = torch.zeros_like(delta.A)
    a_grad[:40] += theirs.lora_B["default"].weight.grad * 6.0 / 4  # up = A[:out] * alpha / r
    a_grad[:16] += theirs.lora_A["default"].weight.grad.T
    torch.testing.assert_close(delta.A.grad, a_grad, rtol=1e-4, atol=1e-5)


def test_dora_keeps_a_row_of_zeros() -> None:
    base = layer((6, 9))
    base.weight[2] = 0
    delta = DoraSingLoRA(base, 2, 2.0)
    delta.set_ramp(0.0)
    y = delta(base, inputs(delta))
    assert torch.equal(y, base(inputs(delta)))
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in delta.parameters())


def test_dora_norm_is_float32_under_autocast() -> None:
    base = layer((32, 32))
    delta = moved(DoraSingLoRA(base, 4, 4.0))
    expected = delta.norm(base.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(delta.norm(base.weight), expected)


@given(st.integers(0, 500), st.integers(0, 200))
def test_ramp(step: int, total: int) -> None:
    expected = 1.0 if total == 0 or step >= total else step / total
    assert ramp(step, total) == expected


def test_the_ramp_scales_the_update_and_forward_counts_nothing() -> None:
    base = layer((16, 40))
    delta = moved(SingLoRA(base, 4, 4.0))
    full = delta.delta_weight(base.weight)
    delta.set_ramp(0.25)
    for _ in range(3):
        delta(base, inputs(delta))
    assert delta.u == 0.25
    torch.testing.assert_close(delta.delta_weight(base.weight), full / 4)


def test_saved_tensors() -> None:
    base = layer((6, 9))
    assert list(SingLoRA(base, 2, 2.0, signature="balanced").state_dict()) == ["A"]
    assert list(DoraSingLoRA(base, 2, 2.0, init="offset").state_dict()) == ["A", "magnitude", "A0"]


def test_wrong_arguments() -> None:
    base = layer((6, 9))
    for wrong in ({"rank": 0}, {"init": "zeros"}, {"signature": "negative"}):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            SingLoRA(base, **{"rank": 2, "alpha": 1.0, **wrong})


@pytest.mark.parametrize("signature", SIGNATURES)
def test_a_small_move_of_an_offset_is_not_lost_to_the_gain(signature: str) -> None:
    """dW = gain (D S A^T + A0 S D^T) with D = A - A0, whose terms do not cancel: only sums of products are rounded."""
    eps = torch.finfo(torch.float32).eps
    rank = 10
    delta = SingLoRA(layer((40, 24)), rank, 7.0, init="offset", signature=signature)
    assert delta.A0 is not None
    with torch.no_grad():
        delta.A.add_(1e-5 * torch.randn(delta.A.shape, generator=torch.Generator().manual_seed(3)))
    delta.set_ramp(1.0)
    a, a0 = delta.A.detach().double(), delta.A0.double()
    signs = torch.ones(rank).double() if delta.S is None else delta.S.double()
    exact = 0.7 * ((a[:40] * signs) @ a[:24].T - (a0[:40] * signs) @ a0[:24].T)
    bound = 2 * (2 * rank + 4) * eps
    for dense in (delta.delta_weight(delta.A), _product(delta.factors())):
        assert (dense - exact).norm() <= bound * exact.norm()
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(4))
    answer = delta._update(x).detach().double()
    assert (answer - x.double() @ exact.T).norm() <= 2 * (24 + 2 * rank) * torch.finfo(
        torch.float32
    ).eps * answer.norm()


def _product(factors: Factors | None) -> Tensor:
    assert factors is not None
    return factors.up @ factors.down
