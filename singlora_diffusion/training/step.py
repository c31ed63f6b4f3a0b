"""One step of the optimizer: examples by position, forward and backward passes, clipping, update."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..adapters import Adapter
from ..data import draws
from ..models.family import Conditioning, Family, Geometry, denoiser
from . import averaging, objective, optimizers
from .averaging import Average
from .compiling import Compiled
from .diagnosis import NotFinite
from .examples import Batch, Examples, Streams, again, joined
from .recipe import OptimizationSettings, Recipe
from .resting import Resting


class Figures(NamedTuple):
    """Of one step."""

    loss: float
    lr: float
    u: float
    grad_norm: float


class Denoiser(nn.Module):
    """What a step calls, and what accelerate wraps: every network in it, so that gradients of all are averaged.

    Args:
        text: of the streams' prompts, where nothing that encodes them is trained; None: encoded at every call.
    """

    def __init__(self, family: Family, prompts: Sequence[str], text: Conditioning | None) -> None:
        super().__init__()
        called = {name: one.module for name, one in family.networks.items() if text is None or one.role == "denoiser"}
        self.networks = nn.ModuleDict(called)
        self.family, self.prompts, self.text = family, list(prompts), text

    def forward(self, noisy: Tensor, times: Tensor, stream: Sequence[int], geometry: Geometry) -> Tensor:
        """The family's prediction for noisy latents (N, C, h, w); `stream` says whose prompt each example has."""
        if self.text is None:
            used = texts_of(stream)
            text = self.family.encode_prompts([self.prompts[place] for place in used])
            own = text.select([used.index(place) for place in stream])
        else:
            own = self.text.select(stream)
        conditioning = self.family.with_geometry(own, geometry)
        return self.family.denoise(noisy, times, conditioning)


def texts_of(stream: Sequence[int]) -> list[int]:
    """The texts that examples have, each once, in the order in which they are encoded."""
    return sorted(set(stream))


class Stepper:
    """The optimization of an attached adapter.

    From `prepare` to `release`, the base model is arranged for steps: what they do not call rests, blocks are compiled.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        family: Family,
        adapter: Adapter,
        recipe: Recipe,
        streams: Streams,
    ) -> None:
        self.accelerator, self.family, self.adapter = accelerator, family, adapter
        self.settings: OptimizationSettings = recipe.optimization
        self.prior_weight = recipe.prior.prior_loss_weight
        together = (
            self.settings.train_batch_size * self.settings.gradient_accumulation_steps * accelerator.num_processes
        )
        self.examples = Examples(family, streams, recipe, together)
        self.taught = recipe.prior.with_prior_preservation and not streams.classes  # by the base model itself
        rate = self.settings.learning_rate
        assert rate is not None and rate != "auto"  # see `preparation.for_model` and `rate_search`
        groups = adapter.param_groups(rate, self.settings.text_encoder_lr)
        self.raw_optimizer = optimizers.make(groups, self.settings)
        self.peaks = [group["lr"] for group in self.raw_optimizer.param_groups]
        self.rate = optimizers.schedule(self.raw_optimizer, self.settings)
        self.average = self._averaged()
        self.denoiser = Denoiser(family, streams.texts, streams.encoded)
        self.compiled = Compiled(denoiser(family).module, family.device) if self.settings.compile else None
        self.resting = Resting(family, text=streams.encoded is not None)
        self.optimizer: Any = None

    def _averaged(self) -> Average | None:
        if optimizers.OPTIMIZERS[self.settings.optimizer].averages:
            return averaging.ScheduleFree(self.adapter, self.raw_optimizer)
        decay = self.settings.ema_decay
        return None if decay is None else averaging.Moving(self.adapter, decay)

    def prepare(self) -> None:
        """Hand denoiser and optimizer to accelerate: after a checkpoint was restored, before the first step."""
        if self.settings.gradient_checkpointing:
            network: Any = denoiser(self.family).module
            network.enable_gradient_checkpointing()
            network.train()  # diffusers checkpoints in train mode only
        if self.compiled is not None:
            self.compiled.begin()
        self.denoiser, self.optimizer = self.accelerator.prepare(self.denoiser, self.raw_optimizer)
        self.resting.begin()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the model is as its users have it: with the weights to use, and not compiled."""
        with averaging.in_use(self.adapter, self.average), self._uncompiled():
            yield

    def _uncompiled(self) -> AbstractContextManager[None]:
        """Without gradients it would be compiled once more, and in every size."""
        return nullcontext() if self.compiled is None else self.compiled.interrupted()

    @torch.no_grad()
    def loss_on(self, batches: Iterable[Batch]) -> float:
        """The mean loss of examples, with the weights to use. Nothing is learned."""
        ask, losses, counts = self.accelerator.unwrap_model(self.denoiser), [], []
        with self.in_use():
            for batch in batches:
                predicted = ask(batch.noisy, batch.times, batch.stream, batch.geometry)
                losses.append(objective.loss(predicted, batch.target, weights=self._weights(batch), mask=batch.mask))
                counts.append(len(batch.stream))
        return sum(loss.item() * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)

    def release(self) -> None:
        """Leave the base model as it was, but for the adapter."""
        self.resting.end()
        if self.compiled is not None:
            self.compiled.end()

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
            batch = self._batch(positions)
            with self.accelerator.accumulate(self.denoiser), self._dropping(step, positions, batch):
                loss = self._loss(batch, prior=len(positions))
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
        if self.average is not None:
            self.average.follow(step)
        return Figures(loss_now, optimizers.rate(self.raw_optimizer), self.adapter.u, norm_now)

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

    def _batch(self, positions: range) -> Batch:
        batch = self.examples.at(positions)
        return joined(batch, self.lesson(batch)) if self.taught else batch

    @torch.no_grad()
    def lesson(self, batch: Batch) -> Batch:
        """The same noisy latents with the class prompt, the second one, and what the base model predicts of them."""
        asked = again(batch, 1)
        self.adapter.set_scale(0.0)
        try:
            base = self.accelerator.unwrap_model(self.denoiser)
            with self._uncompiled():
                return asked._replace(target=base(asked.noisy, asked.times, asked.stream, asked.geometry))
        finally:
            self.adapter.set_scale(1.0)

    def _dropping(self, step: int, positions: range, batch: Batch) -> AbstractContextManager[None]:
        """Dropout as this part of a step has it, however the step is divided."""
        if not self.adapter.config.lora_dropout:
            return nullcontext()
        seed, kinds = self.settings.seed, range(len(batch.stream) // len(positions))
        return self.adapter.dropping(
            {
                "denoiser": [draws.mask(seed, position, kind) for kind in kinds for position in positions],
                "text": [draws.text_mask(seed, step, text) for text in texts_of(batch.stream)],
            }
        )

    def _loss(self, batch: Batch, prior: int) -> Tensor:
        return objective.loss(
            self.denoiser(batch.noisy, batch.times, batch.stream, batch.geometry),
            batch.target,
            prior=prior if len(batch.stream) > prior else 0,
            prior_weight=self.prior_weight,
            weights=self._weights(batch),
            mask=batch.mask,
        )

    def _weights(self, batch: Batch) -> Tensor | None:
        return self.examples.process.loss_weights(batch.times, self.settings.snr_gamma)
