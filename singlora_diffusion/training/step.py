"""One step of the optimizer: examples by position, forward and backward passes, clipping, update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from ..adapters import Adapter
from ..data import draws, latents
from ..data.latents import EncodedImages
from ..models.family import Conditioning, Family, Geometry, denoiser, noise_process
from . import objective
from .diagnosis import NotFinite
from .recipe import OptimizationSettings, Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator


class Streams(NamedTuple):
    """What is trained on: the subject, and with prior preservation its class; each has a prompt of its own."""

    images: Sequence[EncodedImages]
    prompts: Sequence[str]


class Figures(NamedTuple):
    """Of one step."""

    loss: float
    lr: float
    u: float
    grad_norm: float


class Denoiser(nn.Module):
    """What a step calls, and what accelerate wraps: all networks, so that gradients of all of them are averaged.

    Args:
        text: of the streams' prompts, where nothing that encodes them is trained; None: encoded at every call.
    """

    def __init__(self, family: Family, prompts: Sequence[str], text: Conditioning | None) -> None:
        super().__init__()
        self.networks = nn.ModuleDict({name: network.module for name, network in family.networks.items()})
        self.family, self.prompts, self.text = family, list(prompts), text

    def forward(self, noisy: Tensor, times: Tensor, stream: Sequence[int], geometry: Geometry) -> Tensor:
        """The family's prediction for noisy latents (N, C, h, w); `stream` says whose prompt each example has."""
        text = self.family.encode_prompts(self.prompts) if self.text is None else self.text
        conditioning = self.family.with_geometry(text.select(stream), geometry)
        return self.family.denoise(noisy, times, conditioning)


class Stepper:
    """The optimization of an attached adapter.

    Args:
        resolution: side of the images in pixels.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        family: Family,
        adapter: Adapter,
        recipe: Recipe,
        streams: Streams,
        resolution: int,
    ) -> None:
        self.accelerator, self.family, self.adapter, self.streams = accelerator, family, adapter, streams
        self.settings: OptimizationSettings = recipe.optimization
        self.prior_weight = recipe.prior.prior_loss_weight
        self.resolution = resolution
        self.process = noise_process(family, recipe.times, resolution)
        text = None
        if not self.settings.train_text_encoder:
            with torch.no_grad():
                text = family.encode_prompts(streams.prompts)
        self.raw_optimizer = adamw(adapter, self.settings)
        self.peaks = [group["lr"] for group in self.raw_optimizer.param_groups]
        schedule = get_scheduler(
            self.settings.lr_scheduler,
            self.raw_optimizer,
            num_warmup_steps=self.settings.lr_warmup_steps,
            num_training_steps=self.settings.max_train_steps,
        )
        self.rate = schedule.lr_lambdas[0]  # a function of the step, so there is no state to keep
        self.denoiser = Denoiser(family, streams.prompts, text)
        self.optimizer: Any = None

    def prepare(self) -> None:
        """Hand denoiser and optimizer to accelerate: after a checkpoint was restored, before the first step."""
        if self.settings.gradient_checkpointing:
            network: Any = denoiser(self.family).module
            network.enable_gradient_checkpointing()
            network.train()  # diffusers checkpoints in train mode only
        self.denoiser, self.optimizer = self.accelerator.prepare(self.denoiser, self.raw_optimizer)

    def advance(self, step: int) -> Figures:
        """Do one step.

        Args:
            step: from 1 on.

        Raises:
            NotFinite: the adapter and the optimizer are as they were before, the ramp's clock included.
        """
        self.adapter.set_step(step)  # u(0) = 0 would make the first gradient exactly zero, so the clock starts at 1
        for group, peak in zip(self.raw_optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.rate(step - 1)
        total = torch.zeros((), device=self.family.device)
        for positions in self._positions(step):
            with self.accelerator.accumulate(self.denoiser):
                loss = self._loss(positions)
                self.accelerator.backward(loss)
                total += loss.detach() / self.settings.gradient_accumulation_steps
        norm = self.accelerator.clip_grad_norm_(self.adapter.parameters(), self.settings.max_grad_norm)
        if self.accelerator.num_processes > 1:
            total = self.accelerator.reduce(total, "mean")
        loss_now, norm_now = torch.stack([total, torch.as_tensor(norm).to(total)]).tolist()
        if not self._is_sound(loss_now, norm_now):
            self.optimizer.zero_grad()
            self.adapter.set_step(step - 1)
            raise NotFinite(step, loss_now, norm_now)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.adapter.settle()
        return Figures(loss_now, self.raw_optimizer.param_groups[0]["lr"], self.adapter.u, norm_now)

    def _is_sound(self, loss: float, norm: float) -> bool:
        """fp16's scaler skips steps whose gradients overflow, and lowers its scale, until that cannot help any more."""
        scaler = self.accelerator.scaler
        overflow_is_mended = scaler is not None and scaler.get_scale() >= 1
        return math.isfinite(loss) and (math.isfinite(norm) or overflow_is_mended)

    def _positions(self, step: int) -> Iterator[range]:
        """Where this process's examples of a step stand in the streams, one range per forward pass."""
        size, passes = self.settings.train_batch_size, self.settings.gradient_accumulation_steps
        for micro in range(passes):
            first = ((step - 1) * passes + micro) * size * self.accelerator.num_processes
            first += self.accelerator.process_index * size
            yield range(first, first + size)

    def _loss(self, positions: range) -> Tensor:
        size, kinds = len(positions), (draws.INSTANCE, draws.PRIOR)
        parts = [
            latents.batch(images, self.settings.seed, positions, kind)
            for images, kind in zip(self.streams.images, kinds, strict=False)
        ]
        examples, there = latents.joined(parts), self.family.device
        stream = [number for number in range(len(parts)) for _ in range(size)]
        times = self.process.times(examples.quantile).to(there)
        noisy, target = self.process.corrupt(examples.latents.to(there), examples.noise.to(there), times)
        geometry = Geometry(examples.original, examples.crop, torch.full_like(examples.crop, self.resolution))
        return objective.loss(
            self.denoiser(noisy, times, stream, geometry),
            target,
            prior=size * (len(parts) - 1),
            prior_weight=self.prior_weight,
            weights=self.process.loss_weights(times, self.settings.snr_gamma),
        )


def adamw(adapter: Adapter, settings: OptimizationSettings) -> torch.optim.AdamW:
    """The optimizer of an adapter's parameters, each group with the rate that the adapter gives it."""
    assert settings.learning_rate is not None  # see `preparation.for_model`
    return torch.optim.AdamW(
        adapter.param_groups(settings.learning_rate, settings.text_encoder_lr),
        lr=settings.learning_rate,  # the polynomial schedule reads it, to end at `recipe.POLYNOMIAL_END`
        betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.adam_weight_decay,
        eps=settings.adam_epsilon,
    )
