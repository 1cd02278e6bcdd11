"""Image files of every kind are read as what they show, or named; in both pipelines, and from worker processes."""

import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from actpress.train.data import ImageError
from actpress.train.data.files import ALPHA, DEEP, DISGUISED, EXIF, FORMAT_OF, FRAMES, LAB, FileImages
from datasets import create, epoch, same

RGB = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
RGB16 = RGB.astype(np.uint16) * 256 + 99
GREY16 = np.random.default_rng(1).integers(0, 65536, (8, 12), dtype=np.uint16)


def grey(values_HW: np.ndarray) -> np.ndarray:
    return np.repeat(values_HW.astype(np.uint8)[..., None], 3, axis=2)


def picture(value: int = 0, side: int = 32) -> Image.Image:
    return Image.fromarray(np.full((side, side, 3), value, np.uint8))


def tiff(values: np.ndarray, bits: int, white_is_zero: bool = False) -> bytes:
    """A grey or RGB TIFF of one strip, little-endian; 12 bits are packed, two samples in three bytes."""
    height, width, *colours = values.shape
    if bits == 12:
        first, second = values[:, ::2].astype(int), values[:, 1::2].astype(int)
        packed = (
            np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=2).astype(np.uint8).tobytes()
        )
    else:
        packed = values.astype("<u2").tobytes()
    photometric = 2 if colours else int(not white_is_zero)
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric)]
    begin = 8 + 2 + 9 * 12 + 4
    tags += [(273, begin), (277, 3 if colours else 1), (278, height), (279, len(packed))]
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    if colours:  # three numbers do not fit into an entry: they lie behind the pixels
        entries = entries.replace(
            struct.pack("<HHII", 258, 3, 1, bits), struct.pack("<HHII", 258, 3, 3, begin + len(packed))
        )
    return (
        b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + packed + struct.pack("<3H", bits, bits, bits)
    )


def png16(values_HWC: np.ndarray) -> bytes:
    """A 16-bit PNG of grey and alpha, RGB or RGBA, which Pillow reads and does not write."""
    height, width, channels = values_HWC.shape

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values_HWC)
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def ppm16(values_HWC: np.ndarray, largest: int) -> bytes:
    height, width, _ = values_HWC.shape
    return f"P6 {width} {height} {largest}\n".encode() + values_HWC.astype(">u2").tobytes()


def saved(image: Image.Image, **how):
    return lambda path: image.save(path, **how)


def written(content: bytes):
    return lambda path: path.write_bytes(content)


LAB_IMAGE = Image.frombytes("LAB", (12, 8), RGB.tobytes())
RED565 = b"BM" + struct.pack("<IIIIiiHHIIiiII", 258, 0, 66, 40, 12, 8, 1, 16, 3, 192, 0, 0, 0, 0)
RED565 += struct.pack("<3I", 0xF800, 0x7E0, 0x1F) + b"\x00\xf8" * 96  # 16 bits a pixel, not a sample
PALETTE = Image.fromarray(RGB).quantize(8)
PALETTE_RGB = np.asarray(PALETTE.convert("RGB"))
EVERY_ALPHA = np.dstack([RGB, RGB[..., :1]])
FRAME_LIST = [Image.fromarray(np.full((8, 12, 3), value, np.uint8)) for value in (10, 100, 200)]
SEVERAL = {"save_all": True, "append_images": FRAME_LIST[1:]}
RIGHT = {  # name: (write the file, the pixels it shows, the notes on it)
    "rgb.png": (saved(Image.fromarray(RGB)), RGB, ()),
    "rgb.bmp": (saved(Image.fromarray(RGB)), RGB, ()),
    "rgb.ppm": (saved(Image.fromarray(RGB)), RGB, ()),
    "rgb.tif": (saved(Image.fromarray(RGB)), RGB, ()),
    "rgb.TIFF": (saved(Image.fromarray(RGB)), RGB, ()),
    "rgb.tga": (saved(Image.fromarray(RGB)), RGB, ()),
    "rgb.webp": (saved(Image.fromarray(RGB), lossless=True), RGB, ()),
    "rgb16.png": (written(png16(RGB16)), RGB, (DEEP,)),
    "rgba16.png": (written(png16(np.dstack([RGB16, RGB16[..., :1]]))), RGB, (DEEP, ALPHA)),
    "grey_alpha16.png": (written(png16(RGB16[..., :2])), grey(RGB[..., 0]), (DEEP, ALPHA)),
    "rgb16.tif": (written(tiff(RGB16, 16)), RGB, (DEEP,)),
    "rgb16.ppm": (written(ppm16(RGB.astype(np.uint16) * 257, 65535)), RGB, (DEEP,)),
    "rgb10.ppm": (written(ppm16(RGB.astype(np.uint16) * 4, 1020)), RGB, (DEEP,)),
    "plain_rgb10.ppm": (
        written(b"P3 12 8 1020 " + b" ".join(b"%d" % (4 * value) for value in RGB.ravel().tolist())),
        RGB,
        (DEEP,),
    ),
    "plain_one_bit.pbm": (written(b"P1 12 8 " + b"0 1 " * 48), grey(np.tile([255, 0], (8, 6))), ()),
    "rgb16.bmp": (written(RED565), np.full((8, 12, 3), (255, 0, 0)), ()),
    "grey.png": (saved(Image.fromarray(RGB[..., 0])), grey(RGB[..., 0]), ()),
    "one_bit.png": (saved(Image.fromarray(RGB[..., 0] > 99)), grey((RGB[..., 0] > 99) * 255), ()),
    "palette.png": (saved(PALETTE), PALETTE_RGB, ()),
    "palette.gif": (saved(PALETTE), PALETTE_RGB, ()),
    "cmyk.tif": (saved(Image.fromarray(RGB).convert("CMYK")), RGB, ()),
    "lab.tif": (saved(LAB_IMAGE), np.asarray(LAB_IMAGE.convert("RGB")), (LAB,)),
    "opaque.png": (saved(Image.fromarray(np.dstack([RGB, np.full((8, 12), 255, np.uint8)]))), RGB, ()),
    "alpha.png": (saved(Image.fromarray(EVERY_ALPHA)), RGB, (ALPHA,)),
    "grey_alpha.png": (saved(Image.fromarray(RGB[..., :2].copy(), "LA")), grey(RGB[..., 0]), (ALPHA,)),
    "palette_alpha.png": (saved(PALETTE, transparency=bytes([0, 128])), PALETTE_RGB, (ALPHA,)),
    "grey16.png": (saved(Image.fromarray(GREY16)), grey(GREY16 >> 8), (DEEP,)),
    "grey16.pgm": (saved(Image.fromarray(GREY16)), grey(GREY16 >> 8), (DEEP,)),
    "grey16_alpha.png": (
        saved(Image.fromarray(GREY16), transparency=int(GREY16[2, 3])),
        grey(GREY16 >> 8),
        (DEEP, ALPHA),
    ),
    "grey16.tif": (written(tiff(GREY16, 16)), grey(GREY16 >> 8), (DEEP,)),
    "grey12.tif": (written(tiff(GREY16 >> 4, 12)), grey(GREY16 >> 8), (DEEP,)),
    "white_is_zero.tif": (written(tiff(GREY16, 16, white_is_zero=True)), grey(255 - (GREY16 >> 8)), (DEEP,)),
    "big_endian.tif": (
        saved(Image.frombytes("I;16B", (12, 8), GREY16.astype(">u2").tobytes())),
        grey(GREY16 >> 8),
        (DEEP,),
    ),
    "frames.gif": (saved(FRAME_LIST[0], **SEVERAL), np.asarray(FRAME_LIST[0]), (FRAMES,)),
    "frames.tif": (saved(FRAME_LIST[0], **SEVERAL), np.asarray(FRAME_LIST[0]), (FRAMES,)),
    "frames.png": (saved(FRAME_LIST[0], **SEVERAL), np.asarray(FRAME_LIST[0]), (FRAMES,)),
    "frames.webp": (saved(FRAME_LIST[0], lossless=True, **SEVERAL), np.asarray(FRAME_LIST[0]), (FRAMES,)),
    "damaged_exif.png": (saved(Image.fromarray(RGB), exif=b"Exif\0\0not a TIFF header"), RGB, (EXIF,)),
    "truncated_exif.png": (saved(Image.fromarray(RGB), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x02"), RGB, (EXIF,)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_file_is_read_as_what_it_shows(tmp_path, name):
    write, shows, notes = RIGHT[name]
    write(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image, found = FileImages([(str(tmp_path / name), 0)]).read(0)
    assert image.mode == "RGB" and found == notes
    assert np.array_equal(np.asarray(image), shows)


def test_cmyk_jpeg_shows_its_colours(tmp_path):
    colour = np.full((8, 12, 3), (200, 100, 50), np.uint8)
    Image.fromarray(colour).convert("CMYK").save(tmp_path / "x.jpg", quality=100)
    read = np.asarray(FileImages([(str(tmp_path / "x.jpg"), 0)]).pil(0)).astype(int)
    assert abs(read - colour).max() <= 3  # JPEG at its best quality: an inverted CMYK would be wrong by 145


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(RGB).save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    unturned = Image.fromarray(RGB)
    unturned.getexif()[ExifTags.Base.Orientation] = orientation
    images = FileImages([(str(path), 0)])
    assert np.array_equal(np.asarray(images.pil(0)), np.asarray(ImageOps.exif_transpose(unturned)))
    assert images.size == ((8, 12) if orientation < 5 else (12, 8)), "height and width as shown"


def test_every_suffix_is_one_that_pillow_knows():
    Image.init()
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    assert set(FORMAT_OF) - known <= {".mpo"}  # read as JPEG, by its content


# In a data set


def folders(root: Path, label_count: int = 2, count: int = 3) -> Path:
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in range(label_count):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(generator.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return root


def load(root: Path, pipeline: str, workers: int = 0, **changes):
    settings = {"source": "folder", "root": str(root), "num_classes": 2, "pipeline": pipeline, **changes}
    return create("cifar10", batch_size=2, workers=workers, **settings)


@pytest.mark.parametrize("suffix", ["webp", "bmp", "tif", "gif", "jfif", "JPG", "ppm", "jp2"])
def test_files_of_any_image_suffix_are_counted_in(tmp_path, suffix):
    root = folders(tmp_path)
    for index in range(4):
        picture(index).save(
            root / "train" / "class1" / f"x{index}.{suffix}", format="JPEG" if suffix == "jfif" else None
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load(root, "auto")
    assert found.train_images == 10
    assert FORMAT_OF[f".{suffix.lower()}"] in found.label and "PNG" in found.label


def test_the_label_names_the_formats_of_both_splits(tmp_path):
    root = folders(tmp_path)
    for path in (root / "test").rglob("*.png"):
        picture().save(path.with_suffix(".webp"))
        path.unlink()
    assert load(root, "auto").label == "CIFAR-10 (PNG, WebP)"


@pytest.mark.parametrize(("format_", "suffix"), [("JPEG", "png"), ("PNG", "jpg"), ("WEBP", "jpeg"), ("ICO", "png")])
def test_a_file_of_another_format_than_its_suffix_is_noted(tmp_path, format_, suffix):
    picture().save(tmp_path / f"x.{suffix}", format=format_)
    assert DISGUISED in FileImages([(str(tmp_path / f"x.{suffix}"), 0)]).read(0)[1]


@pytest.mark.parametrize("suffix", sorted(set(FORMAT_OF) - {".pfm"}))  # floats, which are refused
def test_a_file_of_the_format_of_its_suffix_is_not_noted(tmp_path, suffix):
    picture().save(tmp_path / f"x{suffix}", format="MPO" if suffix == ".mpo" else None)
    assert FileImages([(str(tmp_path / f"x{suffix}"), 0)]).read(0)[1] == ()


@pytest.mark.parametrize(("pipeline", "workers"), [("resident", 0), ("stream", 0), ("stream", 2)])
def test_losses_are_said_once_with_counts_and_an_example(tmp_path, pipeline, workers):
    root = folders(tmp_path)
    for index in range(3):
        Image.fromarray(np.full((32, 32), 256 * 7, np.uint16)).save(root / "test" / "class0" / f"deep{index}.png")
    Image.new("RGBA", (32, 32), (1, 2, 3, 4)).save(root / "test" / "class1" / "clear.png")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = load(root, pipeline, workers)
        first, second = epoch(found.test, 0), epoch(found.test, 1)
    assert same(first, second) and sum(len(y) for _, y in first) == 10
    messages = [str(warning.message) for warning in said if "image files" in str(warning.message)]
    assert len(messages) == 1, messages
    for words in (f"3 {DEEP}", "class0/deep0.png", f"1 {ALPHA}", "class1/clear.png"):
        assert words in messages[0]


def bomb(path: Path) -> None:
    Image.new("1", (15_000, 13_000)).save(path)


def long_text(path: Path) -> None:
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("k", "A" * (PngImagePlugin.MAX_TEXT_CHUNK + 10), zip=True)
    picture().save(path, pnginfo=info)


def truncated(path: Path) -> None:
    picture().save(path)
    path.write_bytes(path.read_bytes()[:60])


def damaged_stream(path: Path) -> None:
    Image.fromarray(np.random.default_rng(3).integers(256, size=(32, 32, 3), dtype=np.uint8)).save(path)
    content = bytearray(path.read_bytes())
    begin = content.index(b"IDAT") + 40
    content[begin : begin + 20] = b"\xff" * 20
    path.write_bytes(content)


UNREADABLE = {
    "bomb": bomb,
    "long_text": long_text,
    "truncated": truncated,
    "damaged_stream": damaged_stream,
    "empty": written(b""),
    "html": written(b"<html>404 Not Found</html>"),
    "apple_double": written(b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(60)),
    "dead_link": lambda path: path.symlink_to("nowhere.png"),
    "link_to_itself": lambda path: path.symlink_to(path.name),
    "float": lambda path: Image.fromarray(np.ones((32, 32), np.float32)).save(path, format="TIFF"),
    "int32": lambda path: Image.fromarray(np.ones((32, 32), np.int32)).save(path, format="TIFF"),
}


@pytest.mark.quick(12)
@pytest.mark.parametrize(("pipeline", "workers"), [("resident", 0), ("stream", 0), ("stream", 1)])
@pytest.mark.parametrize("how", UNREADABLE)
def test_an_unreadable_file_is_named(tmp_path, how, pipeline, workers):
    root = folders(tmp_path)
    culprit = root / "train" / "class1" / "culprit.png"
    UNREADABLE[how](culprit)
    message = error_of_training(root, pipeline, workers)
    assert message.startswith(f"{culprit} is not a readable image (") and "\n" not in message
    assert how != "float" or "expected 8 or 16 bits" in message


def error_of_training(root: Path, pipeline: str, workers: int) -> str:
    """The message of the ImageError that loading raises.

    pytest.raises would keep the traceback, and with it the loader, until a garbage collection, which then takes five seconds a worker.
    """
    try:
        for number in range(3):  # the last incomplete batch is dropped, so that one pass may miss the file
            epoch(load(root, pipeline, workers).train, number)
    except ImageError as error:
        return str(error)
    pytest.fail("no ImageError")


def test_a_file_that_goes_away_is_named(tmp_path):
    found = load(folders(tmp_path), "stream", workers=1)
    (tmp_path / "test" / "class1" / "2.png").unlink()
    with pytest.raises(ImageError, match=r"class1/2\.png is not a readable image \(No such file or directory\)$"):
        epoch(found.test, 0)


def test_a_name_that_cannot_be_printed_stays_on_one_line(tmp_path):
    root = folders(tmp_path)
    (root / "train" / "class0" / "new\nline.png").write_bytes(b"")
    (root / "train" / "class0" / os.fsdecode(b"not-utf8-\xff.png")).write_bytes(b"")
    with pytest.raises(
        ImageError, match=r"'[^\n]*(new\\nline|not-utf8-\\udcff)\.png' is not a readable image"
    ) as caught:
        load(root, "resident")
    assert str(caught.value).isprintable()


# Sizes


def test_a_large_image_is_read_in_silence_until_pillow_refuses_it(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    root = folders(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(root, "resident").train_images == 6
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
        with pytest.raises(
            ImageError, match=r"class0/0\.png is not a readable image \(Image size \(1024 pixels\) exceeds"
        ):
            load(root, "resident")


@pytest.mark.parametrize("size", [(32, 48), (64, 64), (20, 32), (16, 16)])
def test_test_images_of_another_size_are_brought_to_the_size_asked_for(tmp_path, size):
    root = folders(tmp_path)
    for path in (root / "test").rglob("*.png"):
        Image.new("RGB", size, (90, 90, 90)).save(path)
    found = load(root, "auto", mean=[0, 0, 0], std=[1, 1, 1])
    assert found.pipeline == "stream"
    for loader in (found.train, found.test):
        assert {tuple(x.shape[1:]) for x, _ in loader} == {(3, 32, 32)}
    assert torch.allclose(torch.cat([x for x, _ in found.test]), torch.tensor(90 / 255)), "the image, not a border"
    with pytest.raises(ValueError) as caught:
        load(root, "resident")
    for words in (
        f"{size[1]}x{size[0]} test images to image_size 32",
        "test/class0/0.png",
        "allowed here: auto, stream",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_single_image_of_another_size_is_named_or_resized(tmp_path, split):
    root = folders(tmp_path)
    picture(0, 40).save(root / split / "class1" / "2.png")
    for pipeline in ("auto", "resident"):
        with pytest.raises(
            ImageError, match=rf"{split}/class1/2\.png is 40x40; expected 32x32 .*data\.pipeline=stream"
        ):
            load(root, pipeline)
    found = load(root, "stream")
    for loader in (found.train, found.test):
        assert {tuple(x.shape[1:]) for x, _ in loader} == {(3, 32, 32)}


def test_imagenet_is_tested_on_its_centre_crop_whatever_its_size(tmp_path):
    """At image_size too, where nothing has to be resized: 32 / .875 = 36, of which the middle 32."""
    root = folders(tmp_path)
    settings = {
        "source": "folder",
        "root": str(root),
        "num_classes": 2,
        "image_size": 32,
        "mean": [0] * 3,
        "std": [1] * 3,
    }
    (root / "test").rename(root / "val")
    found = create("imagenet", batch_size=2, **settings)
    assert found.pipeline == "stream"
    with Image.open(root / "val" / "class0" / "0.png") as image:
        larger = image.resize((36, 36), Image.Resampling.BILINEAR).crop((2, 2, 34, 34))
    x, _ = next(iter(found.test))
    assert torch.equal((x[0] * 255).round().byte(), torch.from_numpy(np.array(larger)).permute(2, 0, 1))
    with pytest.raises(ValueError, match=r"'resident' cannot do augment\.crop_pct"):
        create("imagenet", batch_size=2, pipeline="resident", **settings)
    assert create("imagenet", batch_size=2, augment={"crop_pct": 1}, **settings).pipeline == "resident"
