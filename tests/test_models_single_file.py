"""Single-file checkpoints as base models: the same tensors and predictions as the folder they were made of."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import original_checkpoints as original
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from benchmarks import published
from singlora_diffusion import cli, models
from singlora_diffusion.adapters import budget
from singlora_diffusion.errors import UserError
from singlora_diffusion.models import clip_vocabulary, network, parts, single_file

PROMPTS = ["a photo of sks dog", "", "Ein Bär, 2 cafés & (quotes) it's \U0001f43b " * 9]
WRITERS = {
    "1": original.stable_diffusion_1,
    "2": original.stable_diffusion_2,
    "xl": original.stable_diffusion_xl,
}


def text_config(width: int, projection: int, activation: str) -> transformers.CLIPTextConfig:
    return transformers.CLIPTextConfig(
        vocab_size=clip_vocabulary.SIZE,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 64,
        projection_dim=projection,
        hidden_act=activation,
    )


def build(kind: str) -> Any:
    """A tiny pipeline of the shape that the checkpoints of a kind have, saved nowhere yet."""
    cross = {"1": 64, "2": 64, "xl": 192}[kind]
    told = (
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 6 * 256 + 64,
        }
        if kind == "xl"
        else {}
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=128 if kind == "xl" else 64,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=cross,
        attention_head_dim=8 if kind == "1" else (1, 1),
        use_linear_projection=kind != "1",
        **told,
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        latent_channels=4,
        scaling_factor=0.13025 if kind == "xl" else 0.18215,
    )
    text = transformers.CLIPTextModel(text_config(64, 64, "gelu" if kind == "2" else "quick_gelu"))
    shared = {"unet": unet, "vae": vae, "text_encoder": text, "tokenizer": None, "scheduler": None}
    if kind == "xl":
        second = transformers.CLIPTextModelWithProjection(text_config(128, 64, "gelu"))
        return diffusers.StableDiffusionXLPipeline(
            **{**shared, "scheduler": diffusers.EulerDiscreteScheduler()},
            text_encoder_2=second,
            tokenizer_2=None,
            add_watermarker=False,
        )
    return diffusers.StableDiffusionPipeline(
        **{**shared, "scheduler": diffusers.DDIMScheduler()},
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {kind: build(kind) for kind in WRITERS}


@pytest.fixture(scope="module")
def files(pipes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    found = {}
    for kind, write in WRITERS.items():
        found[kind] = folder / f"{kind}.safetensors"
        metadata = {"modelspec.prediction_type": "v"} if kind == "2" else None
        save_file(write(pipes[kind]), found[kind], metadata)
    return found


@pytest.mark.parametrize("kind", WRITERS)
def test_the_tensors_are_those_of_the_pipeline(kind: str, files: dict[str, Path], pipes: dict[str, Any]) -> None:
    family: Any = models.load(str(files[kind]))
    assert family.fingerprint == parts.fingerprint([files[kind]])
    assert family.source == str(files[kind])
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if (wanted := getattr(pipes[kind], name, None)) is None:
            continue
        found, state = getattr(family, name).state_dict(), wanted.state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(found[one], state[one]) for one in state)
        for setting, value in wanted.config.items() if name in ("unet", "vae") else ():
            if setting not in ("sample_size", "use_linear_projection", "_use_default_values"):
                assert _plain(getattr(family, name).config[setting]) == _plain(value), setting


def _plain(value: Any) -> Any:
    """A list and a tuple of the same are the same here, and a number and as many of it."""
    if isinstance(value, list | tuple):
        return value[0] if len(set(value)) == 1 else list(value)
    return value


@pytest.mark.numerical
@pytest.mark.parametrize("kind", WRITERS)
def test_predictions(kind: str, files: dict[str, Path], pipes: dict[str, Any]) -> None:
    """The stock pipeline with the same modules and transformers' own CLIP computes the same."""
    family: Any = models.load(str(files[kind]))
    conditioning = family.encode_prompts(PROMPTS[:2])
    stock = pipes[kind]
    ids = family.tokenizer(PROMPTS[:2], padding="max_length", return_tensors="pt").input_ids
    hidden = stock.text_encoder(ids, output_hidden_states=True)
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    times = torch.tensor([10, 800])
    if kind == "xl":
        second = family.tokenizer_2(PROMPTS[:2], padding="max_length", return_tensors="pt").input_ids
        assert second[1, -1] == 0 and ids[1, -1] == 49407  # padded by "!" and by the end mark
        other = stock.text_encoder_2(second, output_hidden_states=True)
        text = torch.cat([hidden.hidden_states[-2], other.hidden_states[-2]], -1)
        told = {"text_embeds": other.text_embeds, "time_ids": torch.tensor([[16, 16, 0, 0, 16, 16]] * 2)}
    else:
        text, told = hidden.last_hidden_state, None
    assert torch.equal(conditioning["text"], text)
    with torch.no_grad():
        expected = stock.unet(noisy, times, text, added_cond_kwargs=told).sample
        torch.testing.assert_close(family.denoise(noisy, times, conditioning), expected)


def test_the_scheduler_says_what_the_file_does(files: dict[str, Path], tmp_path: Path) -> None:
    kinds = {kind: models.load(str(file)).noise_process.prediction_type for kind, file in files.items()}
    assert kinds == {"1": "epsilon", "2": "v_prediction", "xl": "epsilon"}
    marked = tmp_path / "marked.safetensors"
    save_file({**load_file(files["xl"]), "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, marked)
    family = models.load(str(marked))
    assert family.noise_process.prediction_type == "v_prediction"
    assert family.scheduler.config.rescale_betas_zero_snr


class PredictsNoise:
    """A UNet that predicts velocity, as one that predicts noise."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        self.unet, self.scheduler = unet, scheduler

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unet, name)

    def __call__(self, noisy: Any, time: int, text: Any) -> Any:
        alpha = self.scheduler.alphas_cumprod[time]
        velocity = self.unet(noisy, time, text).sample
        return type("Output", (), {"sample": alpha.sqrt() * velocity + (1 - alpha).sqrt() * noisy})


def test_a_stable_diffusion_2_is_asked_what_it_predicts() -> None:
    """Toyworld's UNet stands for it, which predicts velocity."""
    family: Any = models.load("toyworld")
    assert single_file.asked(family.unet, family.scheduler) is family.scheduler
    silent = diffusers.DDIMScheduler.from_config(family.scheduler.config, prediction_type=single_file.ASK)
    assert single_file.asked(family.unet, silent).config.prediction_type == "v_prediction"
    assert family.unet.config.sample_size == 96
    asked = single_file.asked(PredictsNoise(family.unet, family.scheduler), silent)
    assert asked.config.prediction_type == "epsilon" and family.unet.config.sample_size == 64


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_configs_of_published_models(name: str) -> None:
    """Of the shapes of a full-size checkpoint: the config files of its diffusers folder."""
    model = published.MODELS[name]
    kinds: dict[str, Any] = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    kinds |= {"text_encoder": transformers.CLIPTextModel, "text_encoder_2": transformers.CLIPTextModelWithProjection}
    with torch.device("meta"):
        made = {
            part: kinds[part].from_config(config)
            if "_class_name" in config
            else kinds[part](transformers.CLIPTextConfig.from_dict(config))
            for part, config in model.parts.items()
        }
    pipe = type("Pipe", (), made)
    state = (original.stable_diffusion_xl if name == "sdxl" else original.stable_diffusion_1)(pipe)
    contents = single_file.Contents({key: tuple(tensor.shape) for key, tensor in state.items()}, {})
    layout = next(one for one in single_file.LAYOUTS if one.mark in contents.shapes)
    assert layout.pipeline == model.pipeline
    found = layout.parts(contents)
    for part, config in model.parts.items():
        for setting, value in config.items():
            if setting != "shift_factor":
                assert _plain(found[part][setting]) == _plain(value), (part, setting)


@pytest.mark.parametrize("padding", [clip_vocabulary.END, "!"])
def test_the_tokenizer_is_clips(padding: str, tmp_path: Path) -> None:
    """Against open_clip's own implementation, which reads the same vocabulary in another way."""
    from open_clip.tokenizer import SimpleTokenizer

    clip_vocabulary.write(tmp_path / "tokenizer", 77, padding)
    ours, theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer"), SimpleTokenizer()
    words = (Path(__file__).parent.parent / "prompts" / "object.txt").read_text().splitlines()
    for prompt in [*PROMPTS, *words]:
        found = ours(prompt, padding="max_length", truncation=True).input_ids
        length = min(ours(prompt).input_ids.index(49407) + 1, 77)
        expected = theirs(prompt)[0].tolist()
        assert found[:length] == expected[:length]
        assert set(found[length:]) <= {49407 if padding == clip_vocabulary.END else 0}
    assert len(ours) == clip_vocabulary.SIZE


def test_names_of_early_files(files: dict[str, Path], pipes: dict[str, Any], tmp_path: Path) -> None:
    early = {name.replace(".text_model.", "."): tensor for name, tensor in load_file(files["1"]).items()}
    save_file(early, tmp_path / "early.safetensors")
    found = models.load(str(tmp_path / "early.safetensors")).networks["text_encoder"].module.state_dict()
    wanted = pipes["1"].text_encoder.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_networks_without_weights(files: dict[str, Path]) -> None:
    specs = models.meta_networks(files["xl"])
    assert list(specs) == ["unet", "text_encoder", "text_encoder_2"]
    assert network.unet("unet", specs["unet"].module).module.config.cross_attention_dim == 192


def _without(file: Path, part: str, new: Path) -> Path:
    save_file({name: tensor for name, tensor in load_file(file).items() if part not in name}, new)
    return new


def _damaged(files: dict[str, Path], folder: Path) -> Iterator[tuple[Path, str]]:
    first = files["1"]
    cut = folder / "cut.safetensors"
    cut.write_bytes(first.read_bytes()[:1000])
    yield cut, "cut.safetensors is damaged or no safetensors file"
    (folder / "old.ckpt").write_bytes(b"PK")
    yield folder / "old.ckpt", "a .ckpt can run any code.*convert it with diffusers"
    (folder / "empty.safetensors").write_bytes(b"")
    yield folder / "empty.safetensors", "is damaged or no safetensors file"
    yield _without(first, "cond_stage_model", folder / "silent.safetensors"), "lacks the text encoders"
    yield _without(first, "first_stage_model", folder / "blind.safetensors"), "is no complete checkpoint"
    yield _without(first, "middle_block", folder / "hollow.safetensors"), "lacks tensors of its unet"
    yield _without(first, "q_proj.bias", folder / "text.safetensors"), "its text_encoder lacks 2 tensors"
    for name, tensor, message in (
        ("lora_unet_down_blocks_0.lora_down.weight", torch.zeros(1), "is a LoRA"),
        ("double_blocks.0.img_attn.proj.weight", torch.zeros(1), "holds a FLUX transformer"),
        ("down_blocks.0.resnets.0.conv1.weight", torch.zeros(1), "is one network of a diffusers folder"),
        ("something", torch.zeros(1), "is no checkpoint"),
    ):
        file = folder / f"{message[-5:]}.safetensors"
        save_file({name: tensor}, file)
        yield file, message
    adapter = folder / "adapter.safetensors"
    save_file({"x": torch.zeros(1)}, adapter, {"singlora": "{}"})
    yield adapter, "is an adapter: give its base model"
    edm = folder / "edm.safetensors"
    save_file({**load_file(files["xl"]), "edm_mean": torch.zeros(4)}, edm)
    yield edm, "is of EDM's noise schedule"
    inpainting = folder / "inpainting.safetensors"
    key = "model.diffusion_model.input_blocks.0.0.weight"
    save_file({**load_file(first), key: torch.zeros(32, 9, 3, 3)}, inpainting)
    yield inpainting, "takes 9 channels"


def test_files_that_are_no_base_model(files: dict[str, Path], tmp_path: Path) -> None:
    for file, message in _damaged(files, tmp_path):
        with pytest.raises(UserError, match=message) as caught:
            models.load(str(file))
        assert "\n" not in str(caught.value) and file.name in str(caught.value)


def test_the_commands(
    files: dict[str, Path], training_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planning, training, generating, exporting and inspecting, without asking any network."""
    base, run, images = str(files["1"]), str(tmp_path / "run"), tmp_path / "images"
    train = (
        *("train", "--instance_data_dir", str(training_images), "--instance_prompt", "a photo of sks dog"),
        *("--pretrained_model_name_or_path", base, "--output_dir", run, "--max_train_steps", "1", "--rank", "2"),
        *("--resolution", "32", "--validation_steps", "0", "--report_to", "none", "--device", "cpu"),
    )

    def asked(*about: Any, **more: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", asked)
    for words in (
        train,
        (
            *("generate", "--adapter", run, "--output_dir", str(images), "--device", "cpu", "--seeds", "0"),
            *("--height", "32", "--width", "32", "--num_inference_steps", "2", "--prompt", "a sks dog"),
        ),
        ("export", "--adapter", run, "--output", str(tmp_path / "lora.safetensors")),
        ("export", "--adapter", run, "--merge_into", str(tmp_path / "merged")),
    ):
        assert not cli.run(words[0], list(words[1:])), words
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()
    assert (tmp_path / "lora.safetensors").is_file() and len(list(images.glob("*.png"))) == 2  # with the sheet
    merged = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "merged", local_files_only=True)
    assert merged.unet.config.cross_attention_dim == 64
    assert len(budget.shapes(base)) == 64  # eight blocks with two attentions of four projections
