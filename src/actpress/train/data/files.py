"""Image files: decoded to upright 8-bit RGB, with notes on what the decoding loses.

Palette, grey, CMYK and 1-bit images become RGB as Pillow converts them. EXIF orientation is applied. Of 16-bit samples the
upper 8 bits are used, as Pillow does for 16-bit colour; Pillow alone would clip 16-bit grey to white. Of several frames the
first is used, and alpha is ignored, as in torchvision and timm. LAB becomes sRGB, which holds fewer colours. These four conversions
lose something and are counted (`Notes`), as are files whose format is not that of their suffix, since a data label names suffixes.
32-bit and float samples have no fixed range to scale from and are refused. Not noted: colour profiles, which are ignored, and colour
of more than 8 bits in JPEG 2000 and AVIF, which Pillow hands over as 8 bits.
"""

import os
import struct
import warnings
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

FORMATS = {  # format, as a label names it -> suffixes; files of other suffixes are not read
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp", ".dib"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "JPEG 2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "WebP": (".webp",),
    "GIF": (".gif",),
    "AVIF": (".avif",),
    "TGA": (".tga",),
    "QOI": (".qoi",),
    "PCX": (".pcx",),
}
_OTHER_NAMES = {"MPO": "JPEG", "DIB": "BMP", "JPEG2000": "JPEG 2000", "WEBP": "WebP"}  # format, as Pillow names it
FORMAT_OF = {suffix: name for name, suffixes in FORMATS.items() for suffix in suffixes}

ABOUT = "about the image files: "  # and then, how many
FRAMES = "of several frames, the first is used"
DEEP = "of 16-bit samples, the upper 8 bits are used"
ALPHA = "with transparent pixels, alpha is ignored"
LAB = "of LAB colours, those outside sRGB are clipped"
DISGUISED = "of another format than their suffix says"
EXIF = "with damaged EXIF data, read as not rotated"

# What Pillow's decoders raise for a damaged, hostile or unsupported file.
_UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    EOFError,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """A file that cannot be used as an image; the message is one line that names it."""


class Notes:
    """Counts paths by note: each path once, each note with an example."""

    def __init__(self) -> None:
        self._paths: dict[str, dict[str, None]] = {}
        self._said = 0

    def add(self, kind: str, path: str) -> None:
        self._paths.setdefault(kind, {})[path] = None

    def warn(self, about: str) -> None:
        """Give one warning with all counts, unless the last warning had the same ones."""
        total = sum(map(len, self._paths.values()))
        if total > self._said:
            self._said = total
            parts = [f"{len(paths)} {kind} (such as {shown(next(iter(paths)))})" for kind, paths in self._paths.items()]
            warnings.warn(f"{about}{'; '.join(parts)}", stacklevel=3)


def shown(path: str | os.PathLike) -> str:
    """The path as one line of printable text."""
    text = os.fspath(path)
    return text if text.isprintable() else ascii(text)


class FileImages:
    """Images read from files: samples is a list of (path, class index), of which indices picks some; None means all.

    `read(i)` -> (RGB image, what of the file is lost in it); `pil(i)` -> the image alone.
    """

    def __init__(self, samples: Sequence[tuple[str, int]], indices: Tensor | None = None) -> None:
        self._samples = samples
        self._indices = torch.arange(len(samples)) if indices is None else indices
        self.labels = torch.tensor([target for _, target in samples], dtype=torch.int64)[self._indices]
        suffixes = {os.path.splitext(path)[1].lower() for path, _ in samples}
        self.formats = tuple(sorted({FORMAT_OF[suffix] for suffix in suffixes}))
        width, height = self.pil(0).size
        self.size = (height, width)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        return self._samples[int(self._indices[index])][0]

    def read(self, index: int) -> tuple[Image.Image, tuple[str, ...]]:
        """RGB image and the notes on it; ImageError naming the file if it cannot be decoded."""
        path = self.path(index)
        try:
            with warnings.catch_warnings(record=True) as said:  # Pillow's, which name no file
                warnings.simplefilter("always")
                with Image.open(path) as image:
                    rgb, notes = _decode(image, said)
                    if _OTHER_NAMES.get(image.format, image.format) != FORMAT_OF[os.path.splitext(path)[1].lower()]:
                        notes += (DISGUISED,)
                    return rgb, notes
        except _UNREADABLE as error:
            reason = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
            raise ImageError(f"{shown(path)} is not a readable image ({reason})") from error

    def pil(self, index: int) -> Image.Image:
        return self.read(index)[0]

    def pixels(self) -> Tensor:
        """All files decoded, uint8 [N, 3, H, W]; ImageError naming a file of another size than the first.

        One thread: small files spend their time in Python, where 2 or 4 threads were measured to be slower than one.
        """
        pixels_NHWC = np.empty((len(self), *self.size, 3), np.uint8)
        notes = Notes()
        for index in range(len(self)):
            read, kinds = self.read(index)
            image = np.asarray(read)
            if image.shape[:2] != self.size:
                raise ImageError(
                    f"{shown(self.path(index))} is {image.shape[0]}x{image.shape[1]}; expected {self.size[0]}x{self.size[1]} "
                    "as the others (data.pipeline=stream brings images of any size to data.image_size)"
                )
            pixels_NHWC[index] = image
            for kind in kinds:
                notes.add(kind, self.path(index))
        notes.warn(ABOUT)
        return torch.from_numpy(pixels_NHWC).permute(0, 3, 1, 2).contiguous()

    def subset(self, indices: Sequence[int]) -> "FileImages":
        return FileImages(self._samples, self._indices[torch.as_tensor(indices)])


def _decode(image: Image.Image, said: list[warnings.WarningMessage]) -> tuple[Image.Image, tuple[str, ...]]:
    """(upright 8-bit RGB; notes on what the decoding lost). said: the list to which warnings on this file are appended."""
    notes = []
    deep = _is_deep_colour(image)
    if image.format != "MPO" and getattr(image, "is_animated", False):  # an MPO is a photo and its preview
        notes.append(FRAMES)
    image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        damaged = orientation is None and any("orrupt EXIF" in str(warning.message) for warning in said)
    except _UNREADABLE:
        orientation, damaged = None, True
    if damaged:
        notes.append(EXIF)
    if deep:
        notes.append(DEEP)
    if image.mode == "LAB":
        notes.append(LAB)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        notes.append(DEEP)
        values_HW = np.asarray(image)
        clear = image.info.get("transparency")
        if isinstance(clear, int) and (values_HW == clear).any():
            notes.append(ALPHA)
        rgb = Image.fromarray(_upper_bits(values_HW, image)).convert("RGB")
    elif image.mode in ("I", "F"):
        kind = "float" if image.mode == "F" else "signed or 32-bit"
        raise ValueError(f"{kind} samples, whose range is not known; expected 8 or 16 bits a sample")
    elif _may_be_transparent(image):
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema()[0] < 255:
            notes.append(ALPHA)
        rgb = rgba.convert("RGB")
    else:
        rgb = image.convert("RGB")
    if orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    return rgb, tuple(notes)


def _is_deep_colour(image: Image.Image) -> bool:
    """Whether Pillow will reduce colour of more than 8 bits a sample to 8. To be called before the image is decoded."""
    if image.mode.startswith("I"):  # grey, which keeps its 16 bits
        return False
    if image.format == "PPM":
        return image.mode == "RGB" and any(
            tile.codec_name.startswith("ppm") and tile.args[1] > 255 for tile in image.tile
        )
    return image.format in ("PNG", "TIFF") and any(";16" in str(tile.args) for tile in image.tile)


def _upper_bits(values_HW: np.ndarray, image: Image.Image) -> np.ndarray:
    """uint8 [H, W]. TIFF has two ways of its own: 12 bits in 16, and 0 for white."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    bits = 12 if tags.get(ExifTags.Base.BitsPerSample) == (12,) else 16
    upper = (values_HW >> (bits - 8)).astype(np.uint8)
    return 255 - upper if tags.get(ExifTags.Base.PhotometricInterpretation) == 0 else upper


def _may_be_transparent(image: Image.Image) -> bool:
    if image.mode == "P" and image.palette.mode == "RGBA":
        return True
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
