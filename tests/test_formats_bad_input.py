"""Files that are damaged, mislabelled or meant to harm end in one `UserError` line and touch nothing."""

from __future__ import annotations

import json
import pickle
import random
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from torch import nn

from singlora_diffusion import adapters, formats
from singlora_diffusion.adapters.config import AdapterConfig
from singlora_diffusion.errors import UserError
from singlora_diffusion.formats import header as headers
from singlora_diffusion.formats import safetensors_io

CONFIG = AdapterConfig(rank=2, targets=("to_k",), text_targets=("q_proj",), ramp_steps=4)
Networks = dict[str, nn.Module]


@pytest.fixture
def file(networks: Networks, tmp_path: Path) -> Path:
    """An adapter file; the networks are clean again."""
    adapter = adapters.attach(networks, CONFIG)
    adapter.set_step(3)
    formats.save(adapter, tmp_path / "adapter.safetensors", about={"step": 3, "base_model": "tiny"})
    adapter.detach()
    return tmp_path / "adapter.safetensors"


def structure(networks: Networks) -> list[int]:
    return [id(module) for network in networks.values() for module in network.modules()]


def refused(path: Path, networks: Networks, reason: str, verb: Callable[..., Any] = formats.load) -> None:
    """`verb` names the file and the reason in one line, and the networks are as they were."""
    modules = structure(networks)
    with pytest.raises(UserError, match=reason) as caught:
        verb(path, networks)
    message = str(caught.value)
    assert str(path.name) in message and "\n" not in message and len(message) < 600, message
    assert structure(networks) == modules


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def sign(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """An edited header with the digest that goes with it, unless that was edited."""
    return {**header, "sha256": header["sha256"] and headers.digest(header, tensors)}


def test_what_is_no_safetensors_file(networks: Networks, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    refused(path, networks, "no such file")
    path.mkdir()
    refused(path, networks, "holds no adapter.safetensors")
    path.rmdir()
    for content, reason in (
        (b"", "is empty"),
        (b"{}", "is not a safetensors file.*header too small"),
        (pickle.dumps({"a": [1.0] * 1000}), "pickle"),
        (b"PK\x03\x04" + bytes(100), "pickle"),
        (struct.pack("<Q", 1 << 62) + b"{}", "header too large"),
        (struct.pack("<Q", 1 << 24) + b" " * (1 << 24), "invalid JSON"),
        (struct.pack("<Q", (1 << 24) + 1) + bytes((1 << 24) + 9), "not a safetensors file"),
        (join(b"[" * 100_000, b""), "invalid JSON"),
        (join(b'{"a":' * 100_000, b""), "invalid JSON"),
        (join(b"\xff\xfe", b""), "invalid UTF-8"),
        (join(b"9" * 6000, b""), "not a safetensors file"),
        (join([], b""), "invalid JSON"),
        (join({"__metadata__": {"a": 1}}, b""), "invalid JSON"),
        (join(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', b""), "invalid JSON"),
        (join(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b""), "invalid JSON"),
        (join({}, b""), "is not an adapter of singlora-diffusion"),
    ):
        path.write_bytes(content)
        refused(path, networks, reason)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"dtype": "F32", "data_offsets": [0, 8]}, "missing field `shape`"),
        ({"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}, "unknown variant `F33`"),
        ({"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}, "invalid type: sequence"),
        ({"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}, "floating point `2.0`"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}, "integer `-2`"),
        ({"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}, "boolean `true`"),
        ({"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 8]}, "overflow|damaged"),
        ({"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 8]}, "overflow"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}, "invalid offset"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, "invalid offset"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "cut short.*not fully covered"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "file not fully covered"),
    ],
)
def test_tensors_that_cannot_be(entry: object, reason: str, networks: Networks, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(join({"unet.evil\nname": entry}, bytes(8)))
    refused(path, networks, reason)
    refused(path, networks, reason, lambda path, _: formats.recognise(path))


def test_overlapping_tensors(networks: Networks, tmp_path: Path) -> None:
    entry = {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}
    (tmp_path / "x.safetensors").write_bytes(join({"a": entry, "b": entry}, bytes(16)))
    refused(tmp_path / "x.safetensors", networks, "invalid offset")


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda h: h.update(version=3), "upgrade"),
        (lambda h: h.update(config=None), "lacks its configuration"),
        (lambda h: h["config"].update(rank=0), "impossible value 0 for rank"),
        (lambda h: h["config"].update(rank=3), "promises"),
        (lambda h: h["config"].update(rank=10**9), "impossible value 1000000000 for rank"),
        (lambda h: h["config"].update(rank=2.5), "impossible value 2.5 for rank"),
        (lambda h: h["config"].update(rank=True), "impossible value True for rank"),
        (lambda h: h["config"].update(text_rank=-1), "impossible value -1 for text_rank"),
        (lambda h: h["config"].update(alpha="8"), "impossible value 8 for alpha"),
        (lambda h: h["config"].update(targets=["to_q"]), "absent"),
        (lambda h: h["config"].update(targets=["nothing"]), "no layer 'nothing'"),
        (lambda h: h["config"].update(targets="to_k"), "for targets"),
        (lambda h: h["config"].update(targets=[], text_targets=[]), "cannot be loaded"),
        (lambda h: h["config"].update(method="magic"), "unknown method"),
        (lambda h: h["config"].update(method="lora"), "promises"),
        (lambda h: h["config"].update(init="zeros"), "impossible value zeros for init"),
        (lambda h: h["config"].update(init="offset"), r"promises .*\.A0"),
        (lambda h: h["config"].update(dora=True), r"promises .*\.magnitude"),
        (lambda h: h["config"].update(evil=1), "unknown entry evil"),
        (lambda h: h.update(u=2.0), "impossible value 2.0 for u"),
        (lambda h: h.update(u=float("inf")), "header"),
        (lambda h: h.update(step=-1), "impossible value -1 for step"),
        (lambda h: h.update(sha256=""), "damaged or edited"),
        (lambda h: h.update(layers={}), "does not list the layer"),
        (
            lambda h: h["layers"].update({k: [48, 1 << 30] for k in h["layers"]}),
            "impossible value 1073741824 for layers",
        ),
        (lambda h: h.update(identifier=7), "impossible value 7 for identifier"),
        (lambda h: h.update(recipe=[]), "for recipe"),
    ],
)
def test_headers_that_lie(edit: Any, reason: str, file: Path, networks: Networks) -> None:
    header, data = split(file)
    ours = json.loads(header["__metadata__"]["singlora"])
    edit(ours)
    header["__metadata__"]["singlora"] = json.dumps(sign(ours, load_file(file)))
    file.write_bytes(join(header, data))
    refused(file, networks, reason)


def test_damaged_and_foreign_tensors(file: Path, networks: Networks) -> None:
    raw = file.read_bytes()
    metadata = split(file)[0]["__metadata__"]
    file.write_bytes(raw[:-1])
    refused(file, networks, "cut short.*not fully covered")
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    refused(file, networks, "damaged or edited")
    file.write_bytes(raw)
    state = load_file(file)
    first = next(iter(state))
    save_file({**state, "unet.foreign.A": torch.ones(2)}, file, metadata)
    refused(file, networks, "does not list the layer of tensor unet.foreign.A")
    save_file({key: tensor for key, tensor in state.items() if key != first}, file, metadata)
    refused(file, networks, "promises")
    save_file({**state, first: torch.full_like(state[first], float("nan"))}, file, metadata)
    refused(file, networks, "NaN or infinity")
    save_file({**state, first: state[first].T.contiguous()}, file, metadata)
    refused(file, networks, "promises")


def test_an_adapter_for_another_architecture(file: Path, networks: Networks) -> None:
    from diffusers import UNet2DConditionModel

    config = dict(networks["unet"].config, cross_attention_dim=64)  # type: ignore[arg-type]
    other = {"unet": UNet2DConditionModel.from_config(config), "text_encoder": networks["text_encoder"]}
    refused(file, other, r"made for tiny.*attn2.to_k is \(32, 48\) in the file and \(32, 64\) in this model")
    refused(file, {"unet": networks["unet"]}, "adapts text_encoder, which this model does not have")
    attached = adapters.attach(networks, replace(CONFIG, text_targets=()))
    refused(file, networks, "attached already")
    attached.detach()


def lora(networks: Networks) -> dict[str, torch.Tensor]:
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"  # (64, 48)
    return {f"{name}.lora_A.weight": torch.ones(2, 48), f"{name}.lora_B.weight": torch.eye(64, 2)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a, b: {b: torch.ones(64, 3)}, "do not make an update"),
        (lambda a, b: {a: torch.ones(2, 64)}, "made for another model"),
        (lambda a, b: {a: torch.ones(0, 48), b: torch.ones(64, 0)}, "do not make an update"),
        (lambda a, b: {a: torch.tensor(1.0)}, "do not make an update"),
        (lambda a, b: {a: torch.full((2, 48), float("inf"))}, "NaN or infinity"),
        (lambda a, b: {a.replace("mid_block", "middle"): torch.ones(2, 48)}, "no layer of this model"),
        (lambda a, b: {a.replace("unet", "text_encoder_2"): torch.ones(2, 48)}, "Stable Diffusion XL"),
        (lambda a, b: {a.replace("lora_A.weight", "alpha"): torch.ones(2)}, "2 alphas"),
        (lambda a, b: {a.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(3)}, "magnitude"),
        (lambda a, b: {a.replace("lora_A.weight", "dora_scale"): torch.ones(64)}, "diffusers drops"),
        (lambda a, b: {a.replace("lora_A.weight", "hada_w1_a"): torch.ones(64)}, "LyCORIS"),
        (lambda a, b: {a.replace("to_k", "to_q"): torch.ones(2, 64)}, "half of its pair"),
        (lambda a, b: {"evil\x1b[31m\n": torch.ones(1)}, "evil\ufffd\\[31m\ufffd"),
    ],
)
def test_lora_files_that_do_not_fit(change: Any, reason: str, networks: Networks, tmp_path: Path) -> None:
    tensors = lora(networks)
    save_file({**tensors, **change(*tensors)}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", networks, reason, lambda path, nets: formats.attach_files([path], nets))


def test_a_model_is_not_an_adapter(tiny_model: Path, networks: Networks) -> None:
    refused(
        tiny_model / "unet" / "diffusion_pytorch_model.safetensors",
        networks,
        "is a model",
        lambda path, nets: formats.attach_files([path], nets),
    )


def mutate(raw: bytes, chance: random.Random) -> bytes:
    """A damaged copy: bits flipped, a piece cut out, doubled, moved or overwritten, numbers in the header changed."""
    data = bytearray(raw)
    (length,) = struct.unpack("<Q", raw[:8])
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        where = min(chance.randrange(chance.choice((8, 8 + length, len(data)))), len(data) - 1)
        other = chance.randrange(len(data))
        size = chance.randrange(1, 64)
        kind = chance.randrange(7)
        if kind == 0:
            data[where] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[where:]
        elif kind == 2:
            del data[where : where + size]
        elif kind == 3:
            data[where:where] = data[other : other + size]
        elif kind == 4:
            data[where : where + size] = data[other : other + size]
        elif kind == 5:
            data[where] = chance.choice(b'0123456789-"{}[],:\\')
        else:
            digits = [i for i in range(8, 8 + length) if i < len(data) and chr(data[i]).isdigit()]
            if digits:
                data[chance.choice(digits)] = chance.choice(b"0123456789")
        if len(data) < 16:
            break
    return bytes(data)


def edit_values(raw: bytes, chance: random.Random) -> bytes:
    """A copy whose container is sound and whose header says something else."""
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    ours = json.loads(header["__metadata__"]["singlora"])
    strange = [0, -1, 1, 2, 3, 10**12, 0.5, -0.0, 1e308, "", "x", "offset", "balanced", "lora", "dora", "oft", "lokr"]
    strange += [None, True, False, [], {}, ["to_q"], ["to_k"], [["to_k"]], {"unet": [1, 2]}, "\u202e\n"]
    table = chance.choice((ours, ours["config"], ours["config"]))
    key = chance.choice(list(table))
    if chance.random() < 0.15:
        del table[key]
    else:
        table[key] = chance.choice(strange)
    tensors = load(raw)
    if isinstance(ours.get("sha256"), str) and chance.random() < 0.8:
        ours = sign(ours, tensors)
    header["__metadata__"]["singlora"] = json.dumps(ours)
    return join(header, raw[8 + length :])


def test_fuzz(file: Path, networks: Networks, tmp_path: Path) -> None:
    """Some hundred mutants: each is refused in a line, or loads as an adapter that is whole and comes out again."""
    raw, original, modules = file.read_bytes(), load_file(file), structure(networks)
    kohya = tmp_path / "kohya.safetensors"
    formats.export(file, "kohya", kohya, networks=networks)
    plain = kohya.read_bytes()
    path = tmp_path / "mutant.safetensors"
    chance = random.Random(0)
    outcomes = {"loaded": 0, "refused": 0}
    for i in range(400):
        source, make, verb = [
            (raw, mutate, formats.load),
            (raw, edit_values, formats.load),
            (plain, mutate, lambda path, nets: formats.attach_files([path], nets)),
            (plain, mutate, lambda path, nets: formats.inspect(path) and formats.import_(path, nets)[0]),
        ][i % 4]
        path.write_bytes(make(source, chance))
        try:
            loaded = verb(path, networks)
        except UserError as error:
            assert "mutant" in str(error) and "\n" not in str(error)
            outcomes["refused"] += 1
        else:
            if verb is formats.load:
                state = loaded.state_dict()
                assert all(torch.equal(state[name], tensor) for name, tensor in original.items())
                assert set(state) == set(original)
            loaded.detach()
            outcomes["loaded"] += 1
        assert structure(networks) == modules, f"mutant {i} left something behind"
    assert min(outcomes.values()) > 10, outcomes


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        safetensors_io.write(tmp_path / "folder" / "x.safetensors", {"a": torch.ones(2)}, {})
    with pytest.raises(UserError, match="is a folder"):
        safetensors_io.write(tmp_path, {"a": torch.ones(2)}, {})

    def fails(part: Path) -> None:
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        safetensors_io.write(tmp_path / "x.safetensors", {"a": torch.ones(2)}, {}, check=fails)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
