"""Every family behind one contract, held to its stock pipeline; adding noise is held to its own inverse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline, FluxPipeline
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor, nn

from benchmarks import make_tiny
from singlora_diffusion import adapters, models
from singlora_diffusion.adapters.config import AdapterConfig
from singlora_diffusion.errors import UserError
from singlora_diffusion.models import autoencoder, flux, flux_2
from singlora_diffusion.models.family import Geometry
from singlora_diffusion.sampling.generate import generate
from singlora_diffusion.sampling.settings import GenerateSettings
from singlora_diffusion.settings import build, replaced
from singlora_diffusion.training.loop import run

PROMPTS = ["a photo of sks dog", "a cat in the snow"]
FOLDERS = {
    "stable_diffusion": "tiny_model",
    "stable_diffusion_xl": "tiny_sdxl",
    "stable_diffusion_3": "tiny_sd3",
    "flux": "tiny_flux",
    "flux_2": "tiny_flux2",
}
FLOWS = ("stable_diffusion_3", "flux", "flux_2")
LATENTS = {name: (16, 4, 4) if name == "flux_2" else (4, 8, 8) for name in FOLDERS}


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(FOLDERS[request.param])
    return path


@pytest.fixture(scope="module")
def family(folder: Path) -> Any:
    return models.load(str(folder))


@pytest.fixture(scope="module")
def stock(folder: Path) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def xl(tiny_sdxl: Path) -> Any:
    return models.load(str(tiny_sdxl))


@pytest.fixture(scope="module")
def klein(tiny_flux2: Path) -> Any:
    return models.load(str(tiny_flux2))


@pytest.fixture(scope="module")
def one_flux(tiny_flux: Path) -> Any:
    return models.load(str(tiny_flux))


def pixels(images: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_every_family_has_a_tiny_model() -> None:
    assert set(make_tiny.FAMILIES) == set(models.FAMILIES.values()) == set(FOLDERS)


@pytest.mark.parametrize("name", make_tiny.FAMILIES)
def test_make_tiny_writes_what_the_tests_use(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    made = make_tiny.make(make_tiny.Settings(name, tmp_path / "made"))
    assert models.load(str(made)).fingerprint == models.load(str(request.getfixturevalue(FOLDERS[name]))).fingerprint
    with pytest.raises(UserError, match="exists: choose another folder"):
        make_tiny.make(make_tiny.Settings(name, made))
    with pytest.raises(UserError, match="unknown family 'sd': there are stable_diffusion, "):
        make_tiny.make(make_tiny.Settings("sd", tmp_path / "other"))


def test_load(family: Any, folder: Path) -> None:
    low = models.load(str(folder), "bfloat16")
    assert low.name in FOLDERS and low.source == str(folder) and low.dtype == torch.bfloat16
    assert low.fingerprint == family.fingerprint and len(low.fingerprint) == 64
    assert (low.resolution, low.multiple) == (32, 8)
    roles = [network.role for network in low.networks.values()]
    assert roles[0] == "denoiser" and set(roles[1:]) == {"text"}
    for name, network in low.networks.items():
        assert network.name == name and network.module is getattr(low, name) and not network.module.training
        assert {p.dtype for p in network.module.parameters()} == {torch.bfloat16}
        assert not any(p.requires_grad for p in network.module.parameters())
        full = family.networks[name].module.state_dict()
        assert all(torch.equal(t, full[key].to(t.dtype)) for key, t in network.module.state_dict().items())
    assert {p.dtype for p in low.vae.parameters()} == {torch.float32}


def test_loading_prints_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    logging.enable_progress_bar()  # a command that ran before in this process may have turned it off
    models.load(str(folder))
    assert capfd.readouterr() == ("", "") and logging.is_progress_bar_enabled()


def test_networks_from_configs_alone(family: Any, folder: Path, tmp_path: Path) -> None:
    for file in ("model_index.json", *(f"{name}/config.json" for name in family.networks)):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(folder / file, tmp_path / file)
    found = models.meta_networks(tmp_path)
    assert list(found) == list(family.networks)
    for name, network in found.items():
        loaded = family.networks[name]
        assert all(p.is_meta for p in network.module.parameters())
        shapes = {key: p.shape for key, p in network.module.named_parameters()}
        assert shapes == {key: p.shape for key, p in loaded.module.named_parameters()}
        assert (network.role, network.targets, network.prefixes) == (loaded.role, loaded.targets, loaded.prefixes)


@pytest.mark.numerical
def test_the_exact_answer_gives_the_image_back(family: Any) -> None:
    quantiles = torch.linspace(0, 1, 8, dtype=torch.float64)[:-1]
    times = family.noise_process.times(quantiles)
    assert len(times) == 7 and (times.diff() > 0).all()
    x0, noise = normal(2, 7, 4, 8, 8)
    noisy, target = family.noise_process.corrupt(x0, noise, times)
    recovered = family.noise_process.recover(noisy, target, times)
    # Rounding of x_t is divided by the image's share of it, which is 0.1 or more at these times.
    torch.testing.assert_close(recovered, x0, rtol=0, atol=100 * torch.finfo(torch.float32).eps)
    # Little noise at small quantiles, and next to nothing but noise at the largest.
    assert (noisy[0] - x0[0]).abs().max() < 0.2 and family.noise_process.corrupt(
        x0, noise, family.noise_process.times(quantiles * 0)
    ).noisy.isfinite().all()
    last = family.noise_process.times(torch.full((7,), 1 - 1e-9, dtype=torch.float64))
    assert (family.noise_process.corrupt(x0, noise, last).noisy - noise).norm() < 0.1 * noise.norm()


@pytest.mark.numerical
def test_prompts_are_read_as_the_stock_pipeline_does(family: Any, stock: Any) -> None:
    ours = family.encode_prompts(PROMPTS)
    assert len(ours) == 2 and ours["text"].dtype == family.dtype
    pooled = 1 if family.name == "flux" else 2
    options: dict[str, Any] = {"num_images_per_prompt": 1}
    if family.name in FLOWS:
        options["max_sequence_length"] = family.prompt_length
    if family.name == "stable_diffusion_3":
        options.update(prompt_2=None, prompt_3=None)
    if not family.name.startswith("flux"):
        options["do_classifier_free_guidance"] = False
    same = family.pipeline().encode_prompt(PROMPTS, device="cpu", **options)
    theirs = stock.encode_prompt(PROMPTS, device="cpu", **options)
    for name, place in (("text", 0), ("pooled", pooled)):
        if name in ours.tensors:
            assert torch.equal(ours[name], same[place])
            torch.testing.assert_close(ours[name], theirs[place])  # its linear layers may add up in another order


@pytest.mark.numerical
@pytest.mark.parametrize("negative", ["", "snow"])
def test_sample_is_the_stock_pipeline(family: Any, stock: Any, negative: str) -> None:
    options: dict[str, Any] = {"negative_prompt": negative or None}
    if family.name == "flux":
        if negative:
            with pytest.raises(UserError, match="takes none"):
                models.sample(family, PROMPTS[:1], [5], negative_prompt=negative)
            return
        options = {}
    if family.name == "flux_2":  # it takes the encoded text only
        options = {"negative_prompt_embeds": family.encode_prompts([negative])["text"]} if negative else {}
    if family.name in FLOWS:
        options["max_sequence_length"] = family.prompt_length
    theirs = stock(
        prompt=PROMPTS[0],
        num_inference_steps=4,
        guidance_scale=3.0,
        height=48,
        width=32,
        generator=torch.Generator().manual_seed(5),
        **options,
    ).images
    ours = models.sample(family, PROMPTS[:1], [5], steps=4, guidance=3.0, height=48, width=32, negative_prompt=negative)
    assert ours[0].size == (32, 48)
    assert np.abs(pixels(ours) - pixels(theirs)).max() <= 1
    # Several at once, each with its own generator.
    more = models.sample(family, PROMPTS, [7, 5], steps=4, guidance=3.0, height=48, width=32, negative_prompt=negative)
    alone = models.sample(
        family, PROMPTS[1:], [5], steps=4, guidance=3.0, height=48, width=32, negative_prompt=negative
    )
    assert np.abs(pixels(more)[1:] - pixels(alone)).max() <= 1


def test_seeds_of_64_bits(family: Any) -> None:
    few = [models.sample(family, PROMPTS[:1], [seed], steps=2) for seed in (3, 3 + (1 << 40))]
    assert np.abs(pixels(few[0]) - pixels(few[1])).max() > 1


def test_sides_and_schedulers_that_cannot_be_used(family: Any) -> None:
    with pytest.raises(UserError, match="36x32 pixels"):
        models.sample(family, PROMPTS[:1], [0], width=36)
    with pytest.raises(UserError, match="unknown scheduler 'plms'"):
        models.sample(family, PROMPTS[:1], [0], scheduler="plms")
    for name in family.schedulers:
        assert pixels(models.sample(family, PROMPTS[:1], [0], steps=3, scheduler=name)).std() > 1


@pytest.mark.numerical
def test_an_exact_denoiser_samples_the_image(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs, time scale and packing as the stock sampler has them: what the network is asked is how noisy x is."""
    shape = LATENTS[family.name]
    x0 = normal(1, *shape, seed=1)

    def diffusion(x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        a = family.noise_process.scheduler.alphas_cumprod[t]
        return ((x - a.sqrt() * x0) / (1 - a).sqrt(),)

    def flux_flow(*, hidden_states: Tensor, timestep: Tensor, **kwargs: Any) -> tuple[Tensor]:
        return ((hidden_states - flux.pack(x0)) / timestep.reshape(-1, 1, 1),)

    def klein_flow(*, hidden_states: Tensor, timestep: Tensor, **kwargs: Any) -> tuple[Tensor]:
        return ((hidden_states - x0.flatten(2).transpose(1, 2)) / timestep.reshape(-1, 1, 1),)

    def sd3_flow(*, hidden_states: Tensor, timestep: Tensor, **kwargs: Any) -> tuple[Tensor]:
        return ((hidden_states - x0) / (timestep.reshape(-1, 1, 1, 1) / 1000),)

    denoiser = next(iter(family.networks.values())).module
    exact = {"flux": flux_flow, "flux_2": klein_flow, "stable_diffusion_3": sd3_flow}.get(family.name, diffusion)
    monkeypatch.setattr(denoiser, "forward", exact)
    options: dict[str, Any] = {"guidance": 1.0}
    if family.name in FLOWS:
        end = x0
    else:  # DDIM keeps what it takes for the noise at first, timestep 751 of four steps, and ends at timestep 0
        noise = diffusion(normal(1, 4, 8, 8, seed=0), torch.tensor(751))[0]
        end = family.noise_process.corrupt(x0, noise, torch.tensor([0])).noisy
        options["scheduler"] = "ddim"
    found = models.sample(family, PROMPTS[:1], [0], steps=4, height=32, width=32, **options)
    if family.name == "flux_2":
        centre, spread = family._normalization()
        wanted = autoencoder.to_images(family.vae, nn.functional.pixel_shuffle(end * spread + centre, 2))
    else:
        wanted = autoencoder.decode(family.vae, end)
    assert np.abs(pixels(found) - pixels(wanted)).max() <= 1


def test_a_step_of_training_reaches_the_adapter(family: Any) -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = family.encode_images(images)
    assert mean.shape == std.shape == (2, *LATENTS[family.name])
    networks = [network for network in family.networks.values() if network.role == "text"]
    named = next((network.targets for network in networks if network.targets), ("self_attn.q_proj",))
    adapter = adapters.attach(family.networks, AdapterConfig(rank=2, text_targets=named))
    try:
        times = family.noise_process.times(torch.tensor([0.2, 0.9], dtype=torch.float64))
        noisy, target = family.noise_process.corrupt(mean, normal(*mean.shape), times)
        answer = family.denoise(noisy, times, family.encode_prompts(PROMPTS))
        assert answer.shape == target.shape and answer.dtype == family.dtype
        assert family.noise_process.loss_weights(times, None) is None
        (answer.float() - target).square().mean().backward()
        layers = {name.partition(".")[0] for name in adapter.layers()}
        adapted = {name for name, network in family.networks.items() if network.targets}
        assert layers == adapted | ({"text_encoder"} if family.name == "flux_2" else set())
        denoiser = next(iter(family.networks.values()))
        assert adapter.config.targets == denoiser.targets == denoiser.presets["attention"]
        # Without a say: the last layer of SDXL's first encoder, what the last block of SD3 asks for the text, and the
        # last layer of Qwen3, the 28th.
        silent = {p for p in adapter.parameters() if p.grad is None or not p.grad.any()}
        assert len(silent) == {"stable_diffusion_xl": 4, "stable_diffusion_3": 1, "flux_2": 1}.get(family.name, 0)
    finally:
        adapter.detach()


def test_t5_is_adapted_by_who_names_its_layers(one_flux: Any) -> None:
    clip, t5 = "text_encoder", "text_encoder_2"
    for targets, expected in ((None, {clip: 8}), (("t5_attention",), {t5: 8}), (("q", "q_proj"), {clip: 2, t5: 2})):
        adapter = adapters.attach(one_flux.networks, AdapterConfig(rank=2, targets=("proj_mlp",), text_targets=targets))
        names = [layer.partition(".")[0] for layer in adapter.layers()]
        adapter.detach()
        assert {name: names.count(name) for name in (clip, t5) if name in names} == expected


@pytest.mark.numerical
def test_autoencoders_with_a_scale_by_channel(xl: Any) -> None:
    """Playground's; the stock pipeline decodes latents * std / scale + mean."""
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain = autoencoder.encode(xl.vae, images)
    mean, std, scale = torch.tensor([0.1, -2.0, 0.5, 3.0]), torch.tensor([1.0, 2.0, 5.0, 0.5]), 0.5
    xl.vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist(), scaling_factor=scale)
    try:
        found = autoencoder.encode(xl.vae, images)
        z = plain.mean / 0.13025
        torch.testing.assert_close(found.mean, (z - mean.view(1, 4, 1, 1)) / std.view(1, 4, 1, 1) * scale)
        decoded = xl.vae.decode(z).sample.clamp(-1, 1)
        ours = pixels(autoencoder.decode(xl.vae, found.mean)).transpose(0, 3, 1, 2) / 127.5 - 1
        assert np.abs(ours - decoded.detach().numpy()).max() <= 0.5 / 127.5 + 1e-3
    finally:
        xl.vae.register_to_config(latents_mean=None, latents_std=None, scaling_factor=0.13025)


def test_sizes_and_crops(xl: Any) -> None:
    """As diffusers' SDXL script orders them, and the image's own without them, as the pipeline does."""
    geometry = Geometry(
        original=torch.tensor([[600, 800], [32, 32]]),
        crop=torch.tensor([[0, 7], [0, 0]]),
        target=torch.tensor([[32, 32]] * 2),
    )
    text = xl.encode_prompts(PROMPTS)
    told = xl.with_geometry(text, geometry)
    assert told["sizes"].tolist() == [[600, 800, 0, 7, 32, 32], [32, 32, 0, 0, 32, 32]]
    assert told.select([1, 1])["sizes"].tolist() == [[32, 32, 0, 0, 32, 32]] * 2
    noisy, times = normal(2, 4, 8, 8), torch.tensor([5, 500])
    plain, sized = xl.denoise(noisy, times, text), xl.denoise(noisy, times, told)
    assert torch.equal(plain[1], sized[1]) and not torch.equal(plain[0], sized[0])
    pipe = xl.pipeline()
    ids = pipe._get_add_time_ids((32, 32), (0, 0), (32, 32), torch.float32, 32)
    assert ids.tolist() == [told["sizes"][1].tolist()]


def test_an_empty_negative_prompt_of_sdxl(xl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros where the model says so, else the encoded empty text."""
    zeros = pixels(models.sample(xl, PROMPTS[:1], [0], steps=2))
    monkeypatch.setattr(xl, "force_zeros_for_empty_prompt", False)
    encoded = pixels(models.sample(xl, PROMPTS[:1], [0], steps=2))
    assert np.abs(zeros - encoded).max() > 1
    text = xl.encode_prompts(["", PROMPTS[0]])
    asked = [text.select([i]) for i in (0, 1)]
    pipe = xl.pipeline()
    theirs = pipe(
        prompt_embeds=asked[1]["text"],
        pooled_prompt_embeds=asked[1]["pooled"],
        negative_prompt_embeds=asked[0]["text"],
        negative_pooled_prompt_embeds=asked[0]["pooled"],
        num_inference_steps=2,
        guidance_scale=5.0,
        height=32,
        width=32,
        generator=torch.Generator().manual_seed(0),
    ).images
    assert np.abs(encoded - pixels(theirs)).max() <= 1


def test_refiner_is_refused(tiny_sdxl: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_sdxl, tmp_path / "refiner"))
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(path / part)
    index = path / "model_index.json"
    absent = {"text_encoder": [None, None], "tokenizer": [None, None]}
    changes = {"_class_name": "StableDiffusionXLImg2ImgPipeline", **absent}
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))
    with pytest.raises(UserError, match="refiner: adapters are for the base model") as caught:
        models.load(str(path))
    assert "\n" not in str(caught.value)


def test_packing_is_the_stock_pipelines(one_flux: Any) -> None:
    latents = normal(2, 4, 6, 8)
    tokens = flux.pack(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 4, 6, 8))
    assert torch.equal(flux.unpack(tokens, 6, 8), latents)
    assert torch.equal(flux.image_ids(3, 4), FluxPipeline._prepare_latent_image_ids(2, 3, 4, "cpu", torch.float32))


def test_flux_is_told_what_the_stock_pipeline_tells_it(one_flux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same arguments at the same time, but the guidance scale, which is 1 in training."""
    calls: list[dict[str, Any]] = []
    forward = type(one_flux.transformer).forward

    def spy(**arguments: Any) -> Any:
        calls.append(arguments)
        return forward(one_flux.transformer, **arguments)

    monkeypatch.setattr(one_flux.transformer, "forward", spy)
    models.sample(one_flux, PROMPTS[:1], [3], steps=1, guidance=1.0, height=48)
    noisy = torch.randn(1, 4, 12, 8, generator=torch.Generator().manual_seed(3))
    one_flux.denoise(noisy, torch.ones(1), one_flux.encode_prompts(PROMPTS[:1]))
    sampled, trained = calls
    for name, value in trained.items():
        assert torch.equal(torch.as_tensor(sampled[name]), value), name


def test_times_of_flow_matching(one_flux: Any) -> None:
    """diffusers' script: sigmas[(u * 1000).long()] of a scheduler that sampling has not touched."""
    table = diffusers.FlowMatchEulerDiscreteScheduler.from_config(one_flux.scheduler.config).sigmas[:1000]
    quantiles = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theirs = table[((1 - quantiles) * 1000).ceil().long() - 1]  # theirs descends: a small u is much noise
    assert torch.equal(one_flux.noise_process.times(quantiles), theirs)
    ends = one_flux.noise_process.times(torch.tensor([0.0, 1 - 1e-9], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0.001, 1.0]))
    with pytest.raises(UserError, match="--snr_gamma is for diffusion models"):
        one_flux.noise_process.loss_weights(ends, 5.0)


def test_times_of_stable_diffusion_3(tiny_sd3: Path) -> None:
    """A shift of 3 in the table; drawn logit-normal as compute_density_for_timestep_sampling does."""
    family: Any = models.load(str(tiny_sd3))
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)[1:]
    torch.testing.assert_close(family.noise_process.levels.double(), 3 * u / (1 + 2 * u), rtol=1e-5, atol=0)
    count = 20_000
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    draws = torch.Generator().manual_seed(0)
    drawn = compute_density_for_timestep_sampling("logit_normal", count, 0.0, 1.0, generator=draws)
    theirs = family.noise_process.levels.flip(0)[(drawn * 1000).long()]
    ours = family.noise_process.times(quantiles)
    # The distribution of n draws is off by more than 2 / sqrt(n) in one of 1,500 cases.
    grid = torch.linspace(0, 1, 101)
    gap = (ours[:, None] <= grid).double().mean(0) - (theirs[:, None] <= grid).double().mean(0)
    assert gap.abs().max() < 2 / count**0.5


def test_stable_diffusion_3_without_t5(tiny_sd3: Path, tmp_path: Path) -> None:
    stock = DiffusionPipeline.from_pretrained(tiny_sd3, text_encoder_3=None, tokenizer_3=None)
    stock.set_progress_bar_config(disable=True)
    stock.save_pretrained(tmp_path / "small")
    family: Any = models.load(str(tmp_path / "small"))
    assert list(family.networks) == ["transformer", "text_encoder", "text_encoder_2"]
    assert list(models.meta_networks(tmp_path / "small")) == list(family.networks)
    assert family.encode_prompts(PROMPTS)["text"].shape == (2, 24 + 256, 64)
    assert family.prompt_overflow(" ".join(["dog"] * 30)) == 8
    theirs = stock(PROMPTS[0], num_inference_steps=2, height=32, width=32, generator=torch.Generator().manual_seed(0))
    assert np.abs(pixels(models.sample(family, PROMPTS[:1], [0], steps=2)) - pixels(theirs.images)).max() <= 1


def test_the_second_attention_of_stable_diffusion_3(tiny_sd3: Path) -> None:
    family: Any = models.load(str(tiny_sd3))
    presets = family.networks["transformer"].presets
    for preset, second in (("attention", 0), ("attention+attn2", 4)):
        adapter = adapters.attach(family.networks, AdapterConfig(rank=2, targets=presets[preset]))
        layers = list(adapter.layers())
        adapter.detach()
        assert len(layers) == 8 + 7 + second  # the last block has no text to go on with
        assert sum(".attn2." in layer for layer in layers) == second


def test_sides_beyond_the_positions_of_stable_diffusion_3(tiny_sd3: Path) -> None:
    family = models.load(str(tiny_sd3))
    with pytest.raises(UserError, match=r"104x32 pixels: .* knows sides of up to 96 pixels"):
        models.sample(family, PROMPTS[:1], [0], steps=1, width=104)
    assert models.sample(family, PROMPTS[:1], [0], steps=1, width=96)[0].size == (96, 32)


def test_training_and_generation_refuse_what_stable_diffusion_3_has_no_positions_for(
    tiny_sd3: Path, recipe: Any, tmp_path: Path
) -> None:
    known = r"must be smaller, \S+ knows sides of up to 96 pixels"
    with pytest.raises(UserError, match=f"--resolution 104: {known}"):
        list(run(replaced(recipe, pretrained_model_name_or_path=str(tiny_sd3), resolution=104)))
    assert not recipe.output.output_dir.exists()
    settings = build(
        GenerateSettings,
        output_dir=tmp_path / "images",
        pretrained_model_name_or_path=str(tiny_sd3),
        device="cpu",
        prompt=(PROMPTS[0],),
        height=104,
    )
    with pytest.raises(UserError, match=f"--height 104: {known}"):
        generate(settings)
    assert not settings.output.output_dir.exists()


def test_schnell(tiny_flux: Path, tmp_path: Path) -> None:
    """Not told a guidance scale, four steps, and prompts of 256 tokens."""
    pipe = make_tiny.build("flux")
    config = dict(pipe.transformer.config) | {"guidance_embeds": False}
    pipe.transformer = type(pipe.transformer).from_config(config)
    pipe.tokenizer_2.model_max_length = 512
    pipe.save_pretrained(tmp_path / "schnell")
    family = models.load(str(tmp_path / "schnell"))
    assert (family.guidance, family.steps, family.prompt_length) == (0.0, 4, 256)
    assert family.encode_prompts(PROMPTS)["text"].shape == (2, 256, 40)
    theirs = pipe(
        PROMPTS[0],
        num_inference_steps=4,
        height=32,
        width=32,
        max_sequence_length=256,
        generator=torch.Generator().manual_seed(0),
    ).images
    assert np.abs(pixels(models.sample(family, PROMPTS[:1], [0])) - pixels(theirs)).max() <= 1


def test_long_prompts(family: Any) -> None:
    assert family.prompt_overflow("a photo of sks dog") == 0
    longest = 24 - (1 if family.name in FLOWS else 2)  # T5 has an end, CLIP a beginning as well
    if family.name == "flux_2":
        longest = 48 - 3  # three marks of its chat template
    words = ["dog"] * (longest + 3)
    assert family.prompt_overflow(" ".join(words)) == 3


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_2", "vae", "scheduler", "text_encoder"])
def test_a_missing_part_is_refused_in_one_line(part: str, tiny_sdxl: Path, tiny_flux: Path, tmp_path: Path) -> None:
    for folder, what in ((tiny_sdxl, "Stable Diffusion XL"), (tiny_flux, "FLUX.1")):
        path = Path(shutil.copytree(folder, tmp_path / what))
        shutil.rmtree(path / part)
        with pytest.raises(UserError, match=f"no folder {part}") as caught:
            models.load(str(path))
        assert "\n" not in str(caught.value) and str(caught.value).count(str(path)) == 1


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("tiny_sdxl:unet/config.json", {"projection_class_embeddings_input_dim": 72}, "cannot be loaded as"),
        ("tiny_sdxl:text_encoder_2/config.json", {"hidden_size": 48}, "cannot be loaded as a Stable Diffusion XL"),
        ("tiny_sdxl:scheduler/scheduler_config.json", {"prediction_type": "flow"}, "'flow'"),
        ("tiny_flux:scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "is a DDIMScheduler"),
        ("tiny_flux:transformer/config.json", {"joint_attention_dim": 32}, "cannot be loaded as a FLUX.1 model"),
        ("tiny_flux:text_encoder_2/config.json", {"d_model": 32}, "cannot be loaded as a FLUX.1 model"),
    ],
)
def test_a_damaged_part_is_refused_in_one_line(
    file: str, changes: dict[str, Any], message: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    fixture, _, name = file.partition(":")
    path = Path(shutil.copytree(request.getfixturevalue(fixture), tmp_path / "model"))
    config = json.loads((path / name).read_text())
    (path / name).write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=message) as caught:
        models.load(str(path))
    assert "\n" not in str(caught.value) and str(caught.value).count(str(path)) == 1


def test_klein_places_and_patches_are_the_stock_pipelines(klein: Any) -> None:
    latents = normal(2, 4, 6, 8)
    patches = Flux2KleinPipeline._patchify_latents(latents)
    assert torch.equal(nn.functional.pixel_unshuffle(latents, 2), patches)
    assert torch.equal(flux_2.image_ids(3, 4), Flux2KleinPipeline._prepare_latent_ids(patches)[0])
    assert torch.equal(flux_2.text_ids(5), Flux2KleinPipeline._prepare_text_ids(normal(2, 5, 3))[0])
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = klein.encode_images(images)
    theirs = klein.pipeline()._encode_vae_image(images, torch.Generator())
    torch.testing.assert_close(found.mean, theirs)
    assert not found.std.any()


def test_klein_is_told_what_the_stock_pipeline_tells_it(klein: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    forward = type(klein.transformer).forward

    def spy(**arguments: Any) -> Any:
        calls.append(arguments)
        return forward(klein.transformer, **arguments)

    monkeypatch.setattr(klein.transformer, "forward", spy)
    models.sample(klein, PROMPTS[:1], [3], steps=1, guidance=1.0, height=48)
    noisy = torch.randn(1, 16, 6, 4, generator=torch.Generator().manual_seed(3))
    klein.denoise(noisy, torch.ones(1), klein.encode_prompts(PROMPTS[:1]))
    sampled, trained = calls
    for name, value in trained.items():
        theirs = sampled[name]
        if name.endswith("_ids"):
            theirs = theirs[0]
        assert (theirs is value is None) or torch.equal(theirs, value), name


def test_a_distilled_klein_takes_few_steps_and_no_guidance(tiny_flux2: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_flux2, tmp_path / "distilled"))
    index = path / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"is_distilled": True}))
    family: Any = models.load(str(path))
    assert (family.steps, family.guidance) == (4, 1.0)
    with pytest.raises(UserError, match="is distilled and takes none"):
        models.sample(family, PROMPTS[:1], [0], negative_prompt="snow")
    assert np.array_equal(*(pixels(models.sample(family, PROMPTS[:1], [0], steps=2, guidance=g)) for g in (1.0, 4.0)))
