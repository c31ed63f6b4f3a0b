"""Image folders and odd image files: `pytest tests/test_images.py`."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from singlora_diffusion.data import png
from singlora_diffusion.data.crops import PLACES, Cropping, crop
from singlora_diffusion.data.folders import image_files, read_folder
from singlora_diffusion.data.images import is_one_colour, open_image
from singlora_diffusion.errors import UserError

ORANGE = (240, 130, 20)


def halves(size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Orange above, dark blue below."""
    image = Image.new("RGB", size, ORANGE)
    image.paste((10, 20, 90), (0, size[1] // 2, size[0], size[1]))
    return image


def pixels(path: Path) -> np.ndarray:
    image = open_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


# --- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "gif", "webp", "jpg"])
def test_every_format_gives_the_same_image(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    halves().save(path, **({"lossless": True} if suffix == "webp" else {"quality": 95} if suffix == "jpg" else {}))
    difference = np.abs(pixels(path) - np.asarray(halves()).astype(int))
    assert difference.max() <= (0 if suffix != "jpg" else 60)  # ringing at the edge
    assert difference.mean() <= (0 if suffix != "jpg" else 2)


def test_transparency_is_composited_on_white(tmp_path: Path) -> None:
    magenta = Image.new("RGBA", (4, 1), (255, 0, 255, 0))  # convert("RGB") would show the hidden magenta
    magenta.putpixel((1, 0), (0, 0, 0, 255))
    magenta.putpixel((2, 0), (0, 0, 0, 51))
    magenta.save(tmp_path / "rgba.png")
    expected = [[255, 255, 255], [0, 0, 0], [204, 204, 204], [255, 255, 255]]
    assert np.abs(pixels(tmp_path / "rgba.png")[0] - expected).max() <= 1

    grey = Image.new("LA", (2, 1), (40, 0))
    grey.putpixel((1, 0), (40, 255))
    grey.save(tmp_path / "la.png")
    assert pixels(tmp_path / "la.png")[0].tolist() == [[255] * 3, [40] * 3]


def test_palettes_and_declared_transparent_colours(tmp_path: Path) -> None:
    palette = Image.new("P", (3, 1))
    palette.putpalette([255, 0, 255, 0, 128, 0, 0, 0, 200])
    palette.putdata([0, 1, 2])
    palette.save(tmp_path / "opaque.png")
    assert pixels(tmp_path / "opaque.png")[0].tolist() == [[255, 0, 255], [0, 128, 0], [0, 0, 200]]
    palette.save(tmp_path / "clear.png", transparency=0)
    assert pixels(tmp_path / "clear.png")[0].tolist() == [[255, 255, 255], [0, 128, 0], [0, 0, 200]]
    Image.new("RGB", (1, 1), (255, 0, 255)).save(tmp_path / "rgb.png", transparency=(255, 0, 255))
    assert pixels(tmp_path / "rgb.png")[0].tolist() == [[255, 255, 255]]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 257 * 7, 257 * 128, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    assert pixels(tmp_path / f"deep.{suffix}")[0, :, 0].tolist() == [0, 7, 128, 255]
    assert len(np.unique(pixels(tmp_path / f"deep.{suffix}")[0], axis=1)[0]) == 1  # grey


def test_float_and_32_bit_grey(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)).save(tmp_path / "unit.tiff")
    assert pixels(tmp_path / "unit.tiff")[0, :, 0].tolist() == [0, 128, 255]
    Image.fromarray(np.array([[0, 100, 255]], dtype=np.int32)).save(tmp_path / "bytes.tiff")
    assert pixels(tmp_path / "bytes.tiff")[0, :, 0].tolist() == [0, 100, 255]


def test_black_and_white_and_cmyk(tmp_path: Path) -> None:
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
    assert pixels(tmp_path / "bits.png")[0].tolist() == [[255] * 3, [0] * 3]
    halves().convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert Image.open(tmp_path / "cmyk.jpg").mode == "CMYK"
    assert np.abs(pixels(tmp_path / "cmyk.jpg") - np.asarray(halves()).astype(int)).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = halves((40, 20))
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {
        1: upright,
        2: ImageOps.mirror(upright),
        3: upright.rotate(180),
        4: ImageOps.flip(upright),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    turned.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "turned.png"), np.asarray(upright))


def test_a_damaged_exif_block_does_not_cost_the_image(tmp_path: Path) -> None:
    halves().save(tmp_path / "odd.png", exif=b"Exif\0\0nonsense")
    assert np.array_equal(pixels(tmp_path / "odd.png"), np.asarray(halves()))


def test_lab_tiffs_are_converted(tmp_path: Path) -> None:
    lab = ImageCms.profileToProfile(
        halves(), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    lab.save(tmp_path / "lab.tiff")
    assert (
        np.abs(pixels(tmp_path / "lab.tiff") - np.asarray(halves()).astype(int)).max() <= 8
    )  # LAB in 8 bits is coarse


def test_a_wide_gamut_profile_changes_the_numbers(tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    halves().save(path, icc_profile=_swapped_primaries())
    swapped = pixels(path)
    assert swapped[0, 0, 1] > 200 and swapped[0, 0, 0] < 180  # what was mostly red is mostly green in that profile
    transparent = halves().convert("RGBA")
    transparent.save(tmp_path / "wide_alpha.png", icc_profile=_swapped_primaries())
    assert np.abs(pixels(tmp_path / "wide_alpha.png") - swapped).max() <= 1


def test_srgb_and_damaged_profiles_leave_the_pixels_alone(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, profile in (("srgb", srgb), ("damaged", b"not a profile")):
        halves().save(tmp_path / f"{name}.png", icc_profile=profile)
        assert np.array_equal(pixels(tmp_path / f"{name}.png"), np.asarray(halves()))
    halves().convert("L").save(tmp_path / "grey.png", icc_profile=srgb)  # a profile for another colour model
    assert np.array_equal(pixels(tmp_path / "grey.png"), np.asarray(halves().convert("L").convert("RGB")))


def test_the_first_frame_of_several_is_taken(tmp_path: Path) -> None:
    for name in ("frames.mpo", "frames.gif", "frames.webp", "frames.tiff"):
        quality = {"quality": 95} if name.endswith("mpo") else {}
        halves().save(tmp_path / name, save_all=True, append_images=[Image.new("RGB", (64, 64), "green")], **quality)
        assert np.abs(pixels(tmp_path / name)[:20] - ORANGE).max() <= 12, name
    (tmp_path / "frames.mpo").rename(tmp_path / "phone.jpg")  # as telephones name them
    assert Image.open(tmp_path / "phone.jpg").format == "MPO"
    assert np.abs(pixels(tmp_path / "phone.jpg")[:20] - ORANGE).max() <= 12


# --- damaged files ---------------------------------------------------------------------------------------------------


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tiff"])
def test_a_truncated_image_is_an_error_that_names_it(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut.{suffix}"
    noise().save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"cut\.{suffix}: cannot be decoded.*save it again or remove it") as error:
        open_image(path)
    assert "\n" not in str(error.value)
    halves().save(tmp_path / "good.png")
    report = read_folder(tmp_path)
    assert [path.name for path in report.images] == ["good.png"] and report.trouble[0].name == path.name
    with pytest.raises(UserError, match="cut"):
        read_folder(tmp_path, strict=True)


def test_too_many_pixels(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(UserError, match=r"bomb\.png: has too many pixels"):
        open_image(tmp_path / "bomb.png")


def test_heic_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 40)
    with pytest.raises(UserError, match=r"phone\.heic: is a HEIC image.*pip install pillow-heif"):
        open_image(tmp_path / "phone.heic")


@pytest.mark.parametrize("orientation", [1, 6])
def test_heic_of_a_telephone(tmp_path: Path, orientation: int) -> None:
    """Upright whatever its EXIF says, under any name; cut off, it is an error of one line."""
    heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed: `make extras` has it")
    picture, exif = halves((48, 64)), Image.Exif()
    exif[0x0112] = orientation
    heif.from_pillow(picture.rotate(90, expand=True) if orientation == 6 else picture).save(
        tmp_path / "phone.HEIC", quality=95, exif=exif.tobytes()
    )
    content = (tmp_path / "phone.HEIC").read_bytes()
    assert content[4:8] == b"ftyp"
    found = open_image(tmp_path / "phone.HEIC")
    assert found.size == picture.size
    for rows in (slice(2, 28), slice(36, 62)):  # the edge between the halves is smeared by the codec
        found_rows, rows_wanted = (np.asarray(one).astype(int)[rows] for one in (found, picture))
        assert np.abs(found_rows - rows_wanted).max() <= 12
    (tmp_path / "renamed.jpg").write_bytes(content)
    assert np.array_equal(np.asarray(open_image(tmp_path / "renamed.jpg")), np.asarray(found))
    (tmp_path / "cut.heic").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cut\.heic: cannot be decoded as HEIF.*save it again or remove it") as error:
        open_image(tmp_path / "cut.heic")
    assert "\n" not in str(error.value)
    report = read_folder(tmp_path)
    assert {path.name for path in report.images} <= {"phone.HEIC", "renamed.jpg"}
    assert [one.name for one in report.trouble] == ["cut.heic"]


# --- folders ---------------------------------------------------------------------------------------------------------


def test_natural_order_and_content_before_extension(tmp_path: Path) -> None:
    for name in ("10.png", "2.png", "1.PNG"):
        halves().save(tmp_path / name, format="png")
    halves().save(tmp_path / "noname", format="png")
    halves().save(tmp_path / "misnamed.jpg", format="png")
    assert [path.name for path in image_files(tmp_path)] == ["1.PNG", "2.png", "10.png", "misnamed.jpg", "noname"]


def test_junk_is_skipped_and_reported(tmp_path: Path) -> None:
    halves().save(tmp_path / "a.png")
    (tmp_path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (tmp_path / "._a.png").write_bytes(b"\0\5\x16\7")  # macOS notes, named as an image
    (tmp_path / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (tmp_path / "notes.txt").write_text("BM is how a bitmap begins")
    (tmp_path / "BM.txt").write_text("BMW i3, white, a dozen pictures to come")
    (tmp_path / "raw.dng").write_bytes(b"II*\0" + bytes(40))
    (tmp_path / "more").mkdir()
    halves().save(tmp_path / "more" / "b.png")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    report = read_folder(tmp_path)
    assert [path.name for path in report.images] == ["a.png"]
    reasons = dict(report.skipped)
    assert set(reasons) == {".DS_Store", "._a.png", "Thumbs.db", "notes.txt", "BM.txt", "raw.dng", "more", "gone.jpg"}
    assert "raw file" in reasons["raw.dng"] and "sub-folder" in reasons["more"]
    assert "1 image in" in str(report) and "skipped notes.txt: not an image" in str(report)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("page.jpg", b"<html>404</html>", "is not an image although its name says so"),
        ("empty.png", b"", "is empty"),
    ],
)
def test_a_file_named_as_an_image_must_be_one(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    halves().save(tmp_path / "a.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: {complaint}"):
        image_files(tmp_path)


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        image_files(tmp_path / "none")
    with pytest.raises(UserError, match="is empty"):
        image_files(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="is a file"):
        image_files(tmp_path / "notes.txt")
    with pytest.raises(UserError, match=r"has no images, only notes.txt \(not an image\)"):
        image_files(tmp_path)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        halves().save(tmp_path / name / "a.png")
    with pytest.raises(UserError, match=r"one level down, in cat \(1\), dog \(1\); name one of these, such as .*cat"):
        image_files(tmp_path)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a user whose permissions are checked")
def test_an_image_that_may_not_be_read(tmp_path: Path) -> None:
    halves().save(tmp_path / "mine.png")
    (tmp_path / "mine.png").chmod(0)
    with pytest.raises(UserError, match="permissions"):
        image_files(tmp_path)


def test_all_trouble_is_listed_at_once_and_the_good_images_are_used(tmp_path: Path) -> None:
    halves().save(tmp_path / "good.png")
    noise().save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:500])
    (tmp_path / "page10.jpg").write_bytes(b"<html>404</html>")
    (tmp_path / "page9.jpg").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("hello")
    report = read_folder(tmp_path)
    assert [path.name for path in report.images] == ["good.png"]
    assert [name for name, _ in report.trouble] == ["cut.png", "page9.jpg", "page10.jpg"]
    assert [name for name, _ in report.skipped] == ["notes.txt"]
    for line in (
        "1 image in",
        "left out cut.png: cannot be decoded",
        "left out page9.jpg: is empty",
        "skipped notes.txt",
    ):
        assert line in str(report)
    with pytest.raises(
        UserError, match=r"3 files cannot be used: cut\.png: .*; page9\.jpg: .*; page10\.jpg: "
    ) as error:
        read_folder(tmp_path, strict=True)
    assert "\n" not in str(error.value)
    (tmp_path / "good.png").unlink()
    with pytest.raises(UserError, match="3 files cannot be used"):
        read_folder(tmp_path)


def test_odd_images_are_used_and_noted(tmp_path: Path) -> None:
    halves((64, 64)).save(tmp_path / "1.png")
    halves((64, 64)).save(tmp_path / "2.bmp")
    halves((192, 64)).save(tmp_path / "3.png")
    halves((193, 64)).save(tmp_path / "4.png")
    halves((1, 1)).save(tmp_path / "5.png")
    report = read_folder(tmp_path)
    assert len(report.images) == 5 and not report.trouble
    assert report.notes == (
        ("2.bmp", "has the same pixels as 1.png"),
        ("4.png", "is 193x64 pixels: most of so long an image is cropped off"),
        ("5.png", "is 1x1 pixels, which is tiny"),
    )
    assert "note on 2.bmp: has the same pixels" in str(report)
    small = {name for name, why in read_folder(tmp_path, resolution=130).notes if "less than half of 130" in why}
    assert small == {"1.png", "2.bmp", "3.png", "4.png", "5.png"}
    assert len(read_folder(tmp_path, resolution=128).notes) == 3


def test_only_a_contact_sheet_of_this_program_is_no_image(tmp_path: Path) -> None:
    halves().save(tmp_path / "contact_sheet.png")
    assert len(image_files(tmp_path)) == 1
    png.write(halves(), tmp_path / "contact_sheet.png")
    png.write(halves(), tmp_path / "made.png")
    assert [path.name for path in image_files(tmp_path)] == ["made.png"]
    assert read_folder(tmp_path).skipped == (("contact_sheet.png", "a contact sheet of this program"),)


@pytest.mark.parametrize("name", ["x" * 300, "nobody\0here", "~nobody-of-this-name/x"])
def test_folders_that_cannot_be(name: str) -> None:
    with pytest.raises(UserError, match="no such folder"):
        image_files(name)


def test_names_cannot_command_the_terminal(tmp_path: Path) -> None:
    evil = tmp_path / "a\x1b[31m\nb"
    evil.mkdir()
    halves().save(evil / "good.png")
    (evil / "c\x1b[2J.txt").write_text("")
    (evil / "d\x1b[2J.png").write_text("")
    report = str(read_folder(evil))
    with pytest.raises(UserError) as error:
        image_files(evil)
    assert "\x1b" not in report + str(error.value) and "\n" not in str(error.value) and report.count("\n") == 2


def test_one_colour() -> None:
    assert is_one_colour(Image.new("RGB", (9, 9), ORANGE)) and not is_one_colour(halves())
    almost = Image.new("RGB", (9, 9), (0, 0, 0))
    almost.putpixel((3, 3), (2, 0, 1))
    assert is_one_colour(almost)
    almost.putpixel((3, 3), (0, 3, 0))
    assert not is_one_colour(almost)


# --- squares ---------------------------------------------------------------------------------------------------------


def test_centre_crop_keeps_the_middle_of_the_longer_side() -> None:
    stripes = np.zeros((20, 60, 3), dtype=np.uint8)
    stripes[:, 20:40] = 255
    square = crop(Image.fromarray(stripes), 20, 20).pixels
    assert square.shape == (3, 20, 20) and square.dtype == np.float32
    assert np.all(square == 1.0)
    assert np.all(crop(Image.fromarray(255 - stripes), 20, 20).pixels == -1.0)
    upright = crop(Image.fromarray(stripes.transpose(1, 0, 2)), 20, 20).pixels
    assert np.all(upright == 1.0)


def test_values_and_channels() -> None:
    square = crop(Image.new("RGB", (30, 30), (0, 255, 51)), 8, 8).pixels
    assert np.allclose(square[:, 0, 0], [-1.0, 1.0, -0.6], atol=1e-6)


def test_small_images_are_enlarged_and_long_ones_cost_nothing() -> None:
    assert crop(Image.new("RGB", (3, 5)), 64, 64).pixels.shape == (3, 64, 64)
    assert crop(Image.new("RGB", (2, 30000)), 512, 512).pixels.shape == (
        3,
        512,
        512,
    )  # 512 x 7,680,000 if enlarged whole


@pytest.mark.parametrize(
    ("size", "corner"), [((60, 20), (0, 20)), ((20, 60), (20, 0)), ((30, 20), (0, 5)), ((9, 9), (0, 0))]
)
def test_a_crop_knows_its_place_in_the_scaled_image(size: tuple[int, int], corner: tuple[int, int]) -> None:
    for scale in (1, 2, 3):
        found = crop(Image.new("RGB", size), scale * min(size), scale * min(size))
        assert (found.top, found.left) == (scale * corner[0], scale * corner[1])


def test_crops_go_from_end_to_end_and_are_as_large_as_can_be() -> None:
    ramp = Image.fromarray(np.tile(np.arange(0, 240, dtype=np.uint8), (40, 1))).convert("RGB")
    cropping = Cropping(40, 80, random=True)
    places = cropping.places(ramp.size)
    assert len(places) == PLACES and (places[0], places[-1]) == (0.0, 1.0)
    found = [crop(ramp, 40, 80, place) for place in places]
    for one in found:  # nothing is scaled here, so pixels say where they come from
        assert one.top == 0 and one.pixels.shape == (3, 40, 80)
        np.testing.assert_allclose((one.pixels[0, 0, 0] + 1) * 127.5, one.left, atol=1)
        assert one.left_mirrored == 240 - 80 - one.left
    assert [one.left for one in found] == [round(160 * place) for place in places]
    assert cropping.places((120, 60)) == Cropping(40, 80).places(ramp.size) == [0.5]  # nothing to choose from
    upright = crop(ramp.rotate(90, expand=True), 80, 40, 1.0)
    assert (upright.top, upright.left) == (160, 0)


def test_torch_is_not_imported() -> None:
    program = "import sys, singlora_diffusion.data.crops; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def _swapped_primaries() -> bytes:
    """A matrix profile whose red is sRGB's green and the other way round."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = io.BytesIO(profile[128:])
    places = {}
    for index in range(struct.unpack(">I", tags.read(4))[0]):
        name, offset, size = struct.unpack(">4sII", tags.read(12))
        places[name] = (128 + 4 + 12 * index, offset, size)
        if name == b"desc":
            profile[offset : offset + size] = profile[offset : offset + size].replace(b"s\0R\0G\0B", b"o\0t\0h\0r")
    red, green = places[b"rXYZ"], places[b"gXYZ"]
    profile[red[0] : red[0] + 4], profile[green[0] : green[0] + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile)
