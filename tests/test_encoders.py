"""Encoders, preprocessing and the store of vectors, on random weights: `pytest tests/test_encoders.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from encoder_folders import clip_folder, timm_folder
from PIL import Image

from eval.encoder_table import ENCODERS, PROTOCOLS, ROLES
from eval.encoders import encoder
from eval.metrics import METRICS
from eval.preprocessing import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from eval.vector_store import VectorStore, image_key, text_key
from singlora_diffusion.errors import UserError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny CLIP and a tiny vision transformer of random weights, as folders."""
    root = tmp_path_factory.mktemp("encoders")
    return {"clip": str(clip_folder(root / "clip")), "dino": str(timm_folder(root / "dino"))}


@pytest.fixture
def small_openai_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenAI's architecture as open_clip describes it, with fewer and narrower layers."""
    import open_clip

    for name, quick in (("ViT-B-32", False), ("ViT-B-32-quickgelu", True)):
        config = open_clip.get_model_config(name)
        assert config["embed_dim"] == 512 and config.get("quick_gelu", False) is quick
        assert config["vision_cfg"] == {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32}
        config["vision_cfg"].update(layers=2, width=64, head_width=32)
        config["text_cfg"].update(layers=2, width=32, heads=2)
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)


def photos(count: int, size: tuple[int, int] = (80, 64), seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    coarse = [rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(count)]
    return [Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC) for pixels in coarse]


# --- preprocessing ---------------------------------------------------------------------------------------------------


@pytest.mark.numerical
@pytest.mark.parametrize("size", [(512, 512), (300, 517), (517, 300), (100, 80), (224, 224), (224, 301), (31, 997)])
def test_clip_preprocessing_is_open_clips(size: tuple[int, int]) -> None:
    from open_clip.transform import image_transform

    theirs = image_transform(224, is_train=False, mean=CLIP_MEAN, std=CLIP_STD, interpolation="bicubic")
    [image] = photos(1, size)
    assert np.array_equal(Preprocessing(224, 224, CLIP_MEAN, CLIP_STD)(image), theirs(image).numpy())


@pytest.mark.numerical
@pytest.mark.parametrize("size", [(512, 512), (300, 517), (517, 300), (256, 256), (90, 64)])
def test_dino_preprocessing_is_resize_256_crop_224(size: tuple[int, int]) -> None:
    from torchvision import transforms

    theirs = transforms.Compose(
        [
            transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    [image] = photos(1, size)
    ours = Preprocessing(256, 224, IMAGENET_MEAN, IMAGENET_STD)(image)
    assert np.array_equal(ours, theirs(image).numpy())


@pytest.mark.numerical
def test_folders_are_preprocessed_as_they_say(folders: dict[str, str]) -> None:
    clip, dino = (encoder("custom", role, folders[role]).preprocessing for role in ("clip", "dino"))
    assert (clip.resize, clip.crop, clip.mean) == (32, 32, (0.4, 0.5, 0.6))
    assert (dino.resize, dino.crop, dino.interpolation) == (
        36,
        32,
        "bicubic",
    )  # crop_pct 0.875, rounded down as timm does

    import timm

    model = timm.create_model(f"local-dir:{folders['dino']}", pretrained=True, num_classes=0)
    theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    [image] = photos(1)
    assert np.allclose(dino(image), theirs(image).numpy(), atol=1e-6)


# --- encoders --------------------------------------------------------------------------------------------------------


@pytest.mark.numerical
def test_vectors_are_unit_float32_rows_and_do_not_depend_on_the_batch(folders: dict[str, str]) -> None:
    images, texts = photos(7), ["a dog", "a cat in the snow", "a dog"]
    for role in ("clip", "dino"):
        one, many = (encoder("custom", role, folders[role], batch_size=size) for size in (1, 5))
        vectors = many.images(images)
        assert vectors.shape == (7, 16 if role == "clip" else 24) and vectors.dtype == np.float32
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)
        assert np.allclose(one.images(images), vectors, atol=1e-6)
        assert np.abs(vectors[0] - vectors[1]).max() > 1e-3
    words = encoder("custom", "clip", folders["clip"], batch_size=2)
    assert words.texts is not None and encoder("custom", "dino", folders["dino"]).texts is None
    vectors = words.texts(texts)
    assert np.allclose(vectors[0], vectors[2], atol=1e-6) and not np.allclose(vectors[0], vectors[1], atol=1e-3)


@pytest.mark.numerical
def test_images_and_texts_are_the_librarys_own(folders: dict[str, str]) -> None:
    import open_clip
    import torch

    name = f"local-dir:{folders['clip']}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    batch, texts = photos(3), ["a photo of a dog", "a cat"]
    with torch.inference_mode():
        images = model.encode_image(torch.stack([preprocess(image) for image in batch]), normalize=True)
        words = model.encode_text(open_clip.get_tokenizer(name)(texts), normalize=True)
    ours = encoder("custom", "clip", folders["clip"])
    assert ours.texts is not None
    assert np.allclose(ours.images(batch), images.numpy(), atol=1e-6)
    assert np.allclose(ours.texts(texts), words.numpy(), atol=1e-6)


@pytest.mark.numerical
@pytest.mark.usefixtures("small_openai_clip")
def test_dreambooth_v1_clip_has_quickgelu_and_512_dimensions(tmp_path: Path) -> None:
    import open_clip
    from safetensors.torch import save_file
    from torch import nn

    model = open_clip.create_model("ViT-B-32")  # plain GELU: the weights alone do not tell
    assert any(isinstance(module, nn.GELU) for module in model.modules())
    path = tmp_path / "open_clip_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    ours = encoder("dreambooth-v1", "clip", str(tmp_path))
    assert ours.texts is not None and ours.about["architecture"] == "ViT-B-32-quickgelu"
    [image] = photos(1)
    vector = ours.images([image])
    assert vector.shape == (1, 512) and ours.texts(["a dog in the snow"]).shape == (1, 512)

    def of_plain_model(activation: nn.Module) -> np.ndarray:
        import torch

        for block in [*model.visual.transformer.resblocks, *model.transformer.resblocks]:
            block.mlp.gelu = activation
        with torch.inference_mode():
            inputs = torch.from_numpy(ours.preprocessing(image))[None]
            return model.eval().encode_image(inputs, normalize=True).numpy()

    assert np.allclose(vector, of_plain_model(open_clip.transformer.QuickGELU()), atol=1e-5)
    assert not np.allclose(vector, of_plain_model(nn.GELU()), atol=1e-4)


@pytest.mark.numerical
@pytest.mark.usefixtures("small_openai_clip")
def test_dreambooth_v1_texts_are_those_with_all_their_padding(tmp_path: Path) -> None:
    import open_clip
    import torch
    from safetensors.torch import save_file

    name = "ViT-B-32-quickgelu"
    model = open_clip.create_model(name).eval()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "clip.safetensors")
    lines = ["a dog", "", "a photo of a dog in the snow", "a very " + 90 * "very " + "good dog", "a cat"]
    with torch.inference_mode():
        expected = model.encode_text(open_clip.get_tokenizer(name)(lines), normalize=True).numpy()
    for size in (1, 3, 5):
        ours = encoder("dreambooth-v1", "clip", str(tmp_path / "clip.safetensors"), batch_size=size)
        assert ours.texts is not None and np.allclose(ours.texts(lines), expected, atol=1e-6)
    assert np.abs(expected[0] - expected[4]).max() > 1e-3


@pytest.mark.numerical
def test_dreambooth_v1_dino_is_the_class_token(tmp_path: Path) -> None:
    import timm
    import torch
    from safetensors.torch import save_file

    model = timm.create_model("vit_small_patch16_224.dino", pretrained=False, num_classes=0).eval()
    save_file(model.state_dict(), tmp_path / "anything.safetensors")
    ours = encoder("dreambooth-v1", "dino", str(tmp_path / "anything.safetensors"))
    assert (ours.preprocessing.resize, ours.preprocessing.crop) == (256, 224)
    [image] = photos(1)
    with torch.inference_mode():
        token = model.forward_features(torch.from_numpy(ours.preprocessing(image))[None])[:, 0]
    expected = torch.nn.functional.normalize(token, dim=-1).numpy()
    assert expected.shape == (1, 384) and np.allclose(ours.images([image]), expected, atol=1e-6)


def test_dreambooth_v1_dinov2_is_the_class_token_at_224_pixels(tmp_path: Path) -> None:
    """The file has timm's 37 x 37 position embeddings; images come at 16 x 16 patches of 14 pixels."""
    import timm
    import torch
    from safetensors.torch import save_file

    name = "vit_small_patch14_dinov2.lvd142m"
    published = timm.create_model(name, pretrained=False, num_classes=0).eval()
    torch.nn.init.normal_(published.pos_embed, std=0.5)  # as it starts, nobody would miss it
    save_file(published.state_dict(), tmp_path / "model.safetensors")
    ours = encoder("dreambooth-v1", "dinov2", str(tmp_path))
    assert (ours.preprocessing.resize, ours.preprocessing.crop) == (256, 224) and ours.texts is None
    assert ours.about["architecture"] == name and ours.preprocessing.mean == IMAGENET_MEAN
    [image] = photos(1)
    pixels = torch.from_numpy(ours.preprocessing(image))[None]

    grid = published.pos_embed[:, 1:].unflatten(1, (37, 37)).permute(0, 3, 1, 2)
    smaller = torch.nn.functional.interpolate(grid, (16, 16), mode="bicubic", antialias=True)
    with torch.inference_mode():
        tokens = torch.cat([published.cls_token, published.patch_embed.proj(pixels).flatten(2).mT], dim=1)
        tokens = tokens + torch.cat([published.pos_embed[:, :1], smaller.flatten(2).mT], dim=1)
        token = published.norm(published.blocks(tokens))[:, 0]
    expected = torch.nn.functional.normalize(token, dim=-1).numpy()
    assert expected.shape == (1, 384) and np.allclose(ours.images([image]), expected, atol=1e-5)


def test_the_tables_fit_together() -> None:
    for protocol in PROTOCOLS.values():
        assert [ENCODERS[name].role for name in protocol.encoders] == list(ROLES)
        assert set(protocol.sources) <= set(ROLES)
    for metric in METRICS.values():
        rows = [row for row in ENCODERS.values() if row.role == metric.encoder]
        assert rows and (
            all(row.reads_texts for row in rows) or not {"prompt", "prompt_without_token"} & {*metric.needs}
        )


def test_networks_start_at_zero_and_draw_nothing() -> None:
    import torch
    from torch import nn

    from eval.skip_init import SkipInit

    before = torch.get_rng_state()
    with SkipInit():
        network = nn.ModuleList([nn.Linear(3, 4), nn.Conv2d(3, 4, 2), nn.Embedding(3, 4), nn.LayerNorm(4)])
        for fill in (nn.init.xavier_uniform_, nn.init.trunc_normal_, nn.init.normal_):
            assert not fill(torch.ones(3, 4)).any()
    assert torch.equal(torch.get_rng_state(), before)
    *drawn, norm = network
    assert not any(parameter.any() for layer in drawn for parameter in layer.parameters())
    assert norm.weight.eq(1).all()  # what is not drawn is as it was
    assert nn.Linear(3, 4).weight.all()


# --- missing and misfitting files ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_openai_clip")
def test_weights_that_fit_another_model(folders: dict[str, str]) -> None:
    [image] = photos(1)
    for role, folder in folders.items():
        file = next(Path(folder).glob("*.safetensors"))
        with pytest.raises(UserError, match=r"safetensors: cannot be loaded as (ViT-B-32|vit_small)"):
            encoder("dreambooth-v1", role, str(file)).images([image])


def test_the_network_is_not_asked_when_the_hub_is_off_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a process of its own, since the hub's client reads its settings once."""
    program = (
        "from eval.encoders import encoder\n"
        "from singlora_diffusion.errors import UserError\n"
        "for protocol, role, source in (('dreambooth-v1', 'clip', None), ('dreambooth-v1', 'dino', None),\n"
        "                               ('custom', 'clip', 'someone/model')):\n"
        "    try: encoder(protocol, role, source)\n"
        "    except UserError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    finished = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    clip, dino, other = finished.stdout.splitlines()
    assert "open_clip_model.safetensors from https://huggingface.co/timm/vit_base_patch32_clip_224.openai" in clip
    assert "--clip" in clip and "cannot be reached" in clip
    assert "model.safetensors from https://huggingface.co/timm/vit_small_patch16_224.dino" in dino and "--dino" in dino
    assert other.startswith("cannot get someone/model from the hub: it is not on this machine")


@pytest.mark.parametrize("role", ["clip", "dino"])
def test_sources_that_are_no_encoder(role: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.pth").write_bytes(b"\x80\x02")
    (tmp_path / "ViT-B-32.pt").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"empty.*safetensors: no such file; get .* from https"):
        encoder("dreambooth-v1", role, str(tmp_path / "empty"))
    with pytest.raises(UserError, match="no such file"):
        encoder("dreambooth-v1", role, str(tmp_path / "none.safetensors"))
    for name in ("weights.pth", "ViT-B-32.pt"):
        with pytest.raises(UserError, match="pickled weights are not read"):
            encoder("dreambooth-v1", role, str(tmp_path / name))
    with pytest.raises(UserError, match=r"config\.json there"):
        encoder("custom", role, str(tmp_path / "empty"))
    with pytest.raises(UserError, match="is a file"):
        encoder("custom", role, str(tmp_path / "weights.pth"))
    with pytest.raises(UserError, match="no such file"):
        encoder("dreambooth-v1", role, "x" * 5000)
    with pytest.raises(UserError, match=r"config\.json there"):
        encoder("custom", role, "x" * 5000)
    with pytest.raises(UserError, match=f"name one with --{role}"):
        encoder("custom", role)
    with pytest.raises(UserError, match="no dinov2 encoder of its own; name one with --dinov2"):
        encoder("toyworld", "dinov2")


def test_folders_that_are_incomplete(folders: dict[str, str], tmp_path: Path) -> None:
    for role, config in (("clip", "open_clip_config.json"), ("dino", "config.json")):
        folder = tmp_path / role
        folder.mkdir()
        (folder / config).write_text((Path(folders[role]) / config).read_text())
        with pytest.raises(UserError, match="the weights of the"):
            encoder("custom", role, str(folder))
        (folder / config).write_text("{]")
        with pytest.raises(UserError, match="is not valid JSON"):
            encoder("custom", role, str(folder))
        (folder / config).write_text('{"model_type": "vit"}')
        for name in ("open_clip_model.safetensors", "model.safetensors"):
            (folder / name).write_bytes(b"")
        with pytest.raises(UserError, match=r"describes no (open_clip|timm) model"):
            encoder("custom", role, str(folder))


@pytest.mark.parametrize(
    ("role", "change"),
    [
        ("clip", {"preprocess_cfg": []}),
        ("clip", {"preprocess_cfg": {"mean": "grey"}}),
        ("clip", {"preprocess_cfg": {"std": [0.2, 0.2, 0]}}),
        ("clip", {"preprocess_cfg": {"resize_mode": "squash"}}),
        ("clip", {"model_cfg": {"vision_cfg": {"image_size": 10**9}, "embed_dim": 16}}),
        ("clip", {"model_cfg": {"vision_cfg": {"image_size": "big"}, "embed_dim": 16}}),
        ("clip", {"model_cfg": 3}),
        ("dino", {"architecture": 7}),
        ("dino", {"pretrained_cfg": {"crop_pct": 0}}),
        ("dino", {"pretrained_cfg": {"crop_pct": "half"}}),
        ("dino", {"pretrained_cfg": {"input_size": []}}),
        ("dino", {"pretrained_cfg": {"interpolation": {}}}),
        ("dino", {"pretrained_cfg": None}),
    ],
)
def test_configurations_that_make_no_sense(
    folders: dict[str, str], tmp_path: Path, role: str, change: dict[str, object]
) -> None:
    for file in Path(folders[role]).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = tmp_path / {"clip": "open_clip_config.json", "dino": "config.json"}[role]
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(UserError, match=r"describes no|is not supported") as caught:
        encoder("custom", role, str(tmp_path))
    assert "\n" not in str(caught.value)


def test_damaged_weights_are_an_error_when_they_are_loaded(folders: dict[str, str], tmp_path: Path) -> None:
    for role, folder in folders.items():
        copy = tmp_path / role
        copy.mkdir()
        for file in Path(folder).iterdir():
            (copy / file.name).write_bytes(file.read_bytes()[: 200 if file.suffix == ".safetensors" else None])
        with pytest.raises(UserError, match=f"{role}: cannot be loaded"):
            encoder("custom", role, str(copy)).images(photos(1))


def test_unknown_devices(folders: dict[str, str]) -> None:
    with pytest.raises(UserError, match="--device nonsense is not available"):
        encoder("custom", "dino", folders["dino"], device="nonsense").images(photos(1))


# --- the store -------------------------------------------------------------------------------------------------------


def test_fingerprints_know_weights_and_preprocessing_but_not_places(folders: dict[str, str], tmp_path: Path) -> None:
    first = encoder("custom", "dino", folders["dino"])
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in Path(folders["dino"]).iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    assert encoder("custom", "dino", str(moved), batch_size=3).fingerprint == first.fingerprint
    config = json.loads((moved / "config.json").read_text())
    config["pretrained_cfg"]["crop_pct"] = 1.0
    (moved / "config.json").write_text(json.dumps(config))
    assert encoder("custom", "dino", str(moved)).fingerprint != first.fingerprint
    other = timm_folder(tmp_path / "other", seed=1)
    assert encoder("custom", "dino", str(other)).fingerprint != first.fingerprint


def test_images_are_known_by_their_pixels() -> None:
    first, second = photos(2)
    assert image_key(first) == image_key(first.copy()) != image_key(second)
    assert image_key(Image.new("RGB", (2, 8))) != image_key(Image.new("RGB", (8, 2)))  # the same bytes
    assert text_key("a dog") != text_key("a cat")


def test_what_is_stored_is_not_computed_again(tmp_path: Path) -> None:
    calls: list[list[str]] = []

    def encode(things: list[str]) -> np.ndarray:
        calls.append(things)
        return np.array([[len(thing), 1.0] for thing in things], dtype=np.float32)

    store = VectorStore(tmp_path / "new", "f" * 64)
    expected = np.array([[1, 1], [2, 1], [1, 1]], dtype=np.float32)
    assert np.array_equal(store.vectors(["k1", "k2", "k1"], ["a", "bb", "a"], encode), expected)
    assert calls == [["a", "bb"]]  # repeats are asked for once
    store.vectors(["k1", "k3"], ["a", "ccc"], encode)
    assert calls == [["a", "bb"], ["ccc"]]
    store.save()

    again = VectorStore(tmp_path / "new", "f" * 64)
    assert np.array_equal(again.vectors(["k1", "k2", "k1"], ["a", "bb", "a"], encode), expected)
    assert len(calls) == 2
    VectorStore(tmp_path / "new", "e" * 64).vectors(["k1"], ["a"], encode)  # another encoder knows nothing of these
    assert len(calls) == 3
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["f" * 16 + ".safetensors"]


def test_a_store_of_vectors_that_do_not_fit_together_is_an_empty_one(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    wrong = {"k": np.zeros(2, np.float32), "m": np.zeros(3, np.float32)}
    save_file(wrong, tmp_path / ("a" * 16 + ".safetensors"))
    store = VectorStore(tmp_path, "a" * 64)
    assert store.vectors(["k", "m"], ["x", "y"], lambda things: np.ones((2, 2), dtype=np.float32)).all()


def test_a_damaged_store_is_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 16 + ".safetensors")
    path.write_bytes(b"\xff" * 100)
    store = VectorStore(tmp_path, "a" * 64)
    store.vectors(["k"], ["x"], lambda things: np.ones((1, 2), dtype=np.float32))
    store.save()
    assert VectorStore(tmp_path, "a" * 64).vectors(["k"], ["x"], lambda things: np.zeros((1, 2)))[0, 0] == 1.0
