"""The packaged model with an adapter: stock diffusers draws the picture that our own path draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from singlora_diffusion import adapters, formats, models
from singlora_diffusion.adapters.config import AdapterConfig

pytestmark = pytest.mark.numerical

PIPELINE = Path(models.__file__).parent.parent / "toyworld" / "weights" / "pipeline"
PROMPT, SEED, STEPS = "a photo of a sks dog", 3, 4
CONFIG = AdapterConfig(
    rank=8, text_rank=4, text_targets=("q_proj", "k_proj", "v_proj", "out_proj"), alpha=6.0, ramp_steps=10
)


def picture(pipe: Any) -> np.ndarray:
    """(height, width, 3) in 0 to 1, float32: nothing is rounded to bytes."""
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        PROMPT, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(SEED), output_type="np"
    ).images
    return made[0]


@pytest.mark.skipif(not (PIPELINE / "model_index.json").is_file(), reason="toyworld's weights are not here")
def test_load_lora_weights_draws_our_picture(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    def stock() -> Any:
        return StableDiffusionPipeline.from_pretrained(
            PIPELINE, safety_checker=None, torch_dtype=torch.float32, local_files_only=True
        )

    family = models.load("toyworld", dtype="float32", device="cpu")
    plain = picture(family.pipeline())
    adapter = adapters.attach(family.networks, CONFIG, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    adapter.set_step(7)
    ours = picture(family.pipeline())
    shown = np.asarray(models.sample(family, [PROMPT], [SEED], steps=STEPS, guidance=7.5)[0])
    assert np.abs(shown / 255 - ours).max() <= 1 / 255  # what `generate` writes is this picture
    adapter.set_scale(0.5)
    half = picture(family.pipeline())
    assert np.abs(ours - plain).max() > 0.1 and np.abs(ours - half).max() > 0.1
    adapter.set_scale(1.0)

    for form in ("kohya", "diffusers", "peft"):
        file = tmp_path / f"{form}.safetensors"
        formats.export(adapter, form, file)
        pipe = stock()
        pipe.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name="dog")
        assert np.abs(picture(pipe) - ours).max() < 1e-3
        if form == "kohya":
            pipe.set_adapters(["dog"], [0.5])
            assert np.abs(picture(pipe) - half).max() < 1e-3
            pipe.fuse_lora()
            pipe.unload_lora_weights()
            assert np.abs(picture(pipe) - half).max() < 1e-3
    adapter.detach()
    assert np.array_equal(picture(family.pipeline()), plain)
