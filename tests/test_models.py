"""Loading and using base models: a tiny diffusers folder in place of a real one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler
from safetensors.torch import load_file, save_file

from singlora_diffusion import adapters, models
from singlora_diffusion.adapters.config import AdapterConfig
from singlora_diffusion.errors import UserError
from singlora_diffusion.models import hub, parts

pytestmark = pytest.mark.numerical

PROMPTS = ["a photo of sks dog", "a cat in the snow", "a teapot on the grass", "the red house"]
PARTS = ("unet", "text_encoder", "vae")


@pytest.fixture(scope="module")
def family(tiny_model: Path) -> models.Family:
    return models.load(str(tiny_model))


@pytest.fixture
def copied(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def weights(path: Path, part: str) -> Path:
    return next((path / part).glob("*.safetensors"))


def rewrite(file: Path, change) -> None:
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pixels(pictures) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in pictures]).astype(int)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load(dtype: str, tiny_model: Path, networks) -> None:
    family = models.load(str(tiny_model), dtype)
    dtypes = {p.dtype for network in family.networks.values() for p in network.module.parameters()}
    assert dtypes == {getattr(torch, dtype)}
    assert {p.dtype for p in family.vae.parameters()} == {torch.float32}
    assert not any(p.requires_grad for part in PARTS for p in getattr(family, part).parameters())
    assert not any(getattr(family, part).training for part in PARTS)
    assert {name: network.module for name, network in family.networks.items()} == {
        "unet": family.unet,
        "text_encoder": family.text_encoder,
    }
    assert [network.role for network in family.networks.values()] == ["denoiser", "text"]
    assert (family.name, family.source, family.resolution) == ("stable_diffusion", str(tiny_model), 32)
    for name, network in family.networks.items():
        state = networks[name].state_dict()
        assert all(torch.equal(t, state[key].to(t.dtype)) for key, t in network.module.state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_encode_predict_and_train(dtype: str, tiny_model: Path) -> None:
    """The shapes and types of a training step, and that its gradient arrives."""
    family = models.load(str(tiny_model), dtype)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = family.encode_images(images)
    posterior = family.vae.encode(images).latent_dist
    torch.testing.assert_close(mean, posterior.mean * 0.18215)
    torch.testing.assert_close(std, posterior.std * 0.18215)
    assert mean.shape == std.shape == (2, 4, 8, 8) and mean.dtype == torch.float32
    text = family.encode_prompts(PROMPTS[:2])
    assert text["text"].shape == (2, 24, 48) and text["text"].dtype == family.dtype == getattr(torch, dtype)
    stock = family.pipeline().encode_prompt(PROMPTS[:2], "cpu", 1, False)[0]
    assert torch.equal(text["text"], stock)  # training and sampling read prompts alike
    adapters.attach(family.networks, AdapterConfig(rank=2, text_targets=("q_proj",)))
    noisy, target = family.noise_process.corrupt(mean, torch.randn_like(mean), torch.tensor([10, 900]))
    answer = family.denoise(noisy, torch.tensor([10, 900]), family.encode_prompts(PROMPTS[:2]))
    assert answer.shape == target.shape == (2, 4, 8, 8) and answer.dtype == family.dtype
    (answer.float() - target).square().mean().backward()
    grads = [p.grad for network in family.networks.values() for p in network.module.parameters() if p.requires_grad]
    assert all(grad is not None and grad.any() for grad in grads)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_corrupt(kind: str, copied: Path) -> None:
    edit(copied / "scheduler" / "scheduler_config.json", prediction_type=kind)
    family = models.load(str(copied))
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    t = torch.tensor([0, 250, 999])
    alpha = (1 - beta).cumprod(0)[t]
    x0, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noisy, target = family.noise_process.corrupt(x0, noise, t)
    a, s = alpha.sqrt().view(3, 1, 1, 1), (1 - alpha).sqrt().view(3, 1, 1, 1)
    torch.testing.assert_close(noisy.double(), a * x0 + s * noise, rtol=1e-4, atol=1e-4)
    expected = noise.double() if kind == "epsilon" else a * noise - s * x0
    torch.testing.assert_close(target.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(family.noise_process.recover(noisy, target, t)[:2], x0[:2], rtol=1e-4, atol=1e-4)
    snr = alpha / (1 - alpha)
    weights = family.noise_process.loss_weights(t, 5.0)
    assert weights is not None and family.noise_process.loss_weights(t, None) is None
    expected = snr.clamp(max=5) / (snr if kind == "epsilon" else snr + 1)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-3, atol=1e-5)
    assert family.noise_process.times(torch.tensor([0.0, 0.5, 0.9999], dtype=torch.float64)).tolist() == [0, 500, 999]


def test_a_picture_depends_on_its_prompt_and_seed_alone(family: models.Family) -> None:
    seeds = [0, 1, 2, 2]
    four = pixels(models.sample(family, PROMPTS, seeds, steps=5))
    assert four.shape == (4, 32, 32, 3)
    single = np.concatenate(
        [pixels(models.sample(family, [p], [s], steps=5)) for p, s in zip(PROMPTS, seeds, strict=True)]
    )
    assert np.abs(four - single).max() <= 1
    again = pixels(models.sample(family, PROMPTS[::-1], seeds[::-1], steps=5))[::-1]
    assert np.abs(four - again).max() <= 1
    assert np.abs(four[0] - pixels(models.sample(family, PROMPTS[:1], [9], steps=5))[0]).max() > 10
    assert np.abs(four[2] - four[3]).max() > 1  # one seed, two prompts


def test_sample_is_the_stock_pipeline(family: models.Family, tiny_model: Path) -> None:
    from diffusers import StableDiffusionPipeline

    stock = StableDiffusionPipeline.from_pretrained(tiny_model)
    stock.set_progress_bar_config(disable=True)
    theirs = stock(
        PROMPTS[0],
        num_inference_steps=4,
        guidance_scale=3.0,
        negative_prompt="snow",
        height=48,
        width=32,
        generator=torch.Generator().manual_seed(5),
    ).images
    ours = models.sample(family, PROMPTS[:1], [5], steps=4, guidance=3.0, negative_prompt="snow", height=48, width=32)
    assert ours[0].size == (32, 48)
    assert np.abs(pixels(ours) - pixels(theirs)).max() <= 1


@pytest.mark.parametrize("scheduler", [None, "ddim", "dpm++", "euler"])
def test_schedulers_and_half_precision(scheduler: str | None, tiny_model: Path) -> None:
    family = models.load(str(tiny_model), "bfloat16")
    pictures = pixels(models.sample(family, PROMPTS[:2], [0, 1], steps=3, scheduler=scheduler))
    single = pixels(models.sample(family, PROMPTS[:1], [0], steps=3, scheduler=scheduler))
    assert pictures.std() > 5 and np.abs(pictures[:1] - single).mean() < 8  # half precision rounds batches differently


def test_a_pipeline_call_scales_the_adapter(family: models.Family) -> None:
    pipe = family.pipeline()

    def latents(**options: object) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe(PROMPTS[0], num_inference_steps=2, generator=generator, output_type="latent", **options).images

    base = latents()
    adapter = adapters.attach(family.networks, AdapterConfig(rank=4, alpha=40.0))
    try:
        full = latents()
        half = latents(cross_attention_kwargs={"scale": 0.5})
        assert torch.equal(latents(cross_attention_kwargs={"scale": 0.0}), base)
        adapter.set_scale(0.5)
        assert torch.equal(latents(), half)
        assert not torch.equal(half, full) and not torch.equal(half, base)
    finally:
        adapter.detach()
    assert torch.equal(latents(), base)


def test_sides_that_cannot_be_made(family: models.Family) -> None:
    with pytest.raises(UserError, match="36x32 pixels"):
        models.sample(family, PROMPTS[:1], [0], width=36)


def test_fingerprint_is_of_the_unets_weights(family: models.Family, tiny_model: Path, copied: Path) -> None:
    assert models.load(str(copied)).fingerprint == family.fingerprint and len(family.fingerprint) == 64
    rewrite(weights(copied, "unet"), lambda state: state | {"conv_in.bias": state["conv_in.bias"] + 1e-3})
    assert models.load(str(copied)).fingerprint != family.fingerprint


def test_a_folder_as_real_ones_are(copied: Path, family: models.Family) -> None:
    """PNDM, a safety checker, older names of the text encoder's tensors, several variants, bfloat16 on disk, hints."""
    edit(
        copied / "model_index.json",
        requires_safety_checker=True,
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        scheduler=["diffusers", "PNDMScheduler"],
    )
    PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    ).save_pretrained(copied / "scheduler")

    def older(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = {key: key if key.startswith("text_model.") else f"text_model.{key}" for key in state}
        older = {names[key]: tensor for key, tensor in state.items()}
        return older | {"text_model.embeddings.position_ids": torch.arange(24)[None]}

    rewrite(weights(copied, "text_encoder"), older)
    rewrite(weights(copied, "unet"), lambda state: {key: tensor.bfloat16() for key, tensor in state.items()})
    for variant in ("fp16", "non_ema"):
        other = weights(copied, "unet").with_name(f"diffusion_pytorch_model.{variant}.safetensors")
        save_file({"junk": torch.zeros(1)}, other)
    (copied / "singlora.json").write_text(json.dumps({"guidance_scale": 3.0, "prompts": "toyworld"}))
    loaded = models.load(str(copied))
    assert isinstance(loaded.scheduler, PNDMScheduler)
    assert loaded.fingerprint == parts.fingerprint([copied / "unet" / "diffusion_pytorch_model.safetensors"])
    assert {p.dtype for p in loaded.unet.parameters()} == {torch.float32}
    assert (loaded.guidance, loaded.prompt_set, family.guidance, family.prompt_set) == (3.0, "toyworld", 7.5, None)
    assert torch.equal(loaded.encode_prompts(PROMPTS)["text"], family.encode_prompts(PROMPTS)["text"])
    state = family.unet.state_dict()
    assert all(torch.equal(t, state[key].bfloat16().float()) for key, t in loaded.unet.state_dict().items())
    four, single = models.sample(loaded, PROMPTS, range(4), steps=4), models.sample(loaded, PROMPTS[3:], [3], steps=4)
    assert np.abs(pixels(four)[3:] - pixels(single)).max() <= 1


def test_a_folder_of_half_precision_files_alone(copied: Path, family: models.Family) -> None:
    for part in PARTS:
        file = weights(copied, part)
        rewrite(file, lambda state: {key: tensor.half() for key, tensor in state.items()})
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    loaded = models.load(str(copied))
    torch.testing.assert_close(loaded.unet.conv_in.weight, family.unet.conv_in.weight, rtol=1e-3, atol=1e-3)
    assert loaded.fingerprint != family.fingerprint


def test_names_that_are_no_model(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(hub.PACKAGED, "toyworld", tmp_path / "nowhere")
    for name, message in (
        (str(tmp_path / "missing"), "no model at .*missing"),
        ("./missing", "no model at ./missing"),
        ("empty/missing", "no model at empty/missing"),
        ("missing", "no model at missing"),
        (str(tmp_path / "empty"), "has no model_index.json"),
        (str(tmp_path / "file.safetensors"), "is damaged or no safetensors file"),
        ("nobody-at-all/no-such-model", "cannot get nobody-at-all/no-such-model from the hub"),
        ("toyworld", "toyworld is not at"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            models.load(name)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    with pytest.raises(UserError, match="unknown precision 'float8'"):
        models.load(str(tiny_model), "float8")


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGE = {
    "no JSON": (lambda p: (p / "model_index.json").write_text("{"), "model_index.json is damaged"),
    "JSON of another kind": (lambda p: (p / "model_index.json").write_text("[]"), "model_index.json is damaged"),
    "no class": (lambda p: (p / "model_index.json").write_text("{}"), "model_index.json is damaged"),
    "a family that is not supported": (
        lambda p: edit(p / "model_index.json", _class_name="KandinskyPipeline"),
        "is a KandinskyPipeline; supported: StableDiffusionPipeline",
    ),
    "a class that is no name": (lambda p: edit(p / "model_index.json", _class_name=["a", "b"]), "supported: Stable"),
    "no unet": (lambda p: shutil.rmtree(p / "unet"), "no folder unet"),
    "no tokenizer": (lambda p: shutil.rmtree(p / "tokenizer"), "no folder tokenizer"),
    "no scheduler": (lambda p: shutil.rmtree(p / "scheduler"), "no folder scheduler"),
    "no weights": (lambda p: weights(p, "vae").unlink(), "vae has no .safetensors"),
    "pickled unet": (
        lambda p: weights(p, "unet").rename(p / "unet" / "diffusion_pytorch_model.bin"),
        "unet has no .safetensors",
    ),
    "pickled text encoder": (
        lambda p: weights(p, "text_encoder").rename(p / "text_encoder" / "pytorch_model.bin"),
        "text_encoder has no .safetensors",
    ),
    "truncated unet": (lambda p: _cut(weights(p, "unet")), "cannot be loaded"),
    "truncated text encoder": (lambda p: _cut(weights(p, "text_encoder")), "cannot be loaded"),
    "truncated vae": (lambda p: _cut(weights(p, "vae")), "cannot be loaded"),
    "empty vae": (lambda p: weights(p, "vae").write_bytes(b""), "cannot be loaded"),
    "unet without a tensor": (
        lambda p: rewrite(weights(p, "unet"), lambda s: {k: t for k, t in s.items() if k != "conv_in.bias"}),
        "conv_in.bias",
    ),
    "text encoder without a tensor": (
        lambda p: rewrite(weights(p, "text_encoder"), lambda s: {k: t for k, t in s.items() if "q_proj.bias" not in k}),
        "lacks 2 tensors",
    ),
    "another unet's weights": (lambda p: edit(p / "unet" / "config.json", cross_attention_dim=56), "cannot be loaded"),
    "another text encoder's": (lambda p: edit(p / "text_encoder" / "config.json", hidden_size=56), "cannot be loaded"),
    "unet config": (lambda p: (p / "unet" / "config.json").write_text("nothing"), "cannot be loaded"),
    "scheduler config": (lambda p: (p / "scheduler" / "scheduler_config.json").write_text("{"), "cannot be loaded"),
    "prediction": (lambda p: edit(p / "scheduler" / "scheduler_config.json", prediction_type="flow"), "'flow'"),
    "tokenizer": (lambda p: [f.write_text("{") for f in (p / "tokenizer").iterdir()], "cannot be loaded"),
    "hints": (lambda p: (p / "singlora.json").write_text("[1]"), "cannot be loaded"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_line(name: str, copied: Path) -> None:
    damage, message = DAMAGE[name]
    damage(copied)
    with pytest.raises(UserError, match=message) as caught:
        models.load(str(copied))
    line = str(caught.value)
    assert str(copied) in line and "\n" not in line and len(line) < 600
    assert line.count(str(copied)) == 1  # the rest of the line is for the reason
