"""Decode image bytes to uint8 RGB at the training size, directly into the batch.

JPEGs are decoded by libjpeg-turbo (simplejpeg), other formats by OpenCV. Pixels are used as stored:
EXIF orientation is ignored and an alpha channel is dropped, as other re-identification loaders do.

Some phones and cameras write JPEGs that libjpeg only warns about: other values than the standard's
in a scan header, stray bytes before a marker, an unknown JFIF revision. The pixels are right all
the same. But libjpeg reports only the first warning of a file, and a truncated file is a warning
too. So these faults are corrected in the bytes, and the strict decoder checks everything else.
"""

import io
import re
import threading
from collections.abc import Iterator
from itertools import islice

import cv2
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from data_shards.errors import DataError

# A larger image is refused before a pixel is decoded: 2^26 pixels take 200 MB as RGB.
MAX_PIXELS = 1 << 26

_MAX_ATTEMPTS = 200  # to repair one JPEG: each takes as long as decoding it
_scratch = threading.local()
_APP0, _APP14, _SOS, _EOI = 0xE0, 0xEE, 0xDA, 0xD9
_SEQUENTIAL = {0xC0: True, 0xC1: True, 0xC2: False}  # by start-of-frame marker
_STANDALONE = {0x00, 0x01, 0xD8, *range(0xD0, 0xD8)}  # markers without a length, and escaped 0xFF
_MARKER_AFTER_SCAN = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")
# A warning of libjpeg.
_STRAY_BYTES = re.compile(r"(\d+) extraneous bytes before marker 0x([0-9a-f]{2})")

# The loader runs several processes; a thread pool in each would only compete with the others.
cv2.setNumThreads(0)
# The DataError for a corrupt image says more than what OpenCV prints.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def decode(data: bytes) -> np.ndarray:
    """Decode an image at its own size.

    Args:
        data: the bytes of an image file; grey, palette, 16-bit and alpha images become 8-bit RGB.

    Returns:
        (height, width, 3) uint8, RGB.

    Raises:
        DataError: corrupt or truncated bytes, or more than `MAX_PIXELS` pixels.
    """
    return _decode(data).copy()


def decode_into(data: bytes, out: np.ndarray) -> None:
    """Decode an image and resize it to the size of `out`.

    The resizing is bilinear. An image more than twice as large in both dimensions is averaged over
    areas instead, because bilinear interpolation would skip pixels.

    Args:
        data: the bytes of an image file.
        out: (H, W, 3) uint8, C-contiguous; overwritten with RGB.

    Raises:
        DataError: corrupt or truncated bytes, or more than `MAX_PIXELS` pixels.
    """
    image = _decode(data)
    height, width = out.shape[:2]
    if image.shape == out.shape:
        out[:] = image
        return
    shrinks = image.shape[0] > 2 * height and image.shape[1] > 2 * width
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    cv2.resize(image, (width, height), dst=out, interpolation=interpolation)


def _decode(data: bytes) -> np.ndarray:
    """Decode an image; the thread's next call may overwrite it."""
    if not data.startswith(b"\xff\xd8\xff"):
        return _decode_other(data)
    result, attempts = _decode_jpeg(data), _MAX_ATTEMPTS
    if isinstance(result, str):
        data = _without_quirks(data)
        result = _decode_jpeg(data)
    while isinstance(result, str):
        for candidate in islice(_without_stray_bytes(data, result), attempts):
            attempts -= 1
            found = _decode_jpeg(candidate)
            if not isinstance(found, str) or (found != result and _STRAY_BYTES.search(found)):
                data, result = candidate, found
                break
        else:
            raise DataError(f"corrupt JPEG: {result}")
    return result


def _decode_jpeg(data: bytes) -> np.ndarray | str:
    """Decode strictly: return the text of any error or warning of libjpeg."""
    try:
        *size, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        height, width = map(int, size)
        _check_pixels(width, height)
        if colorspace not in ("YCbCr", "Gray", "RGB"):
            # OpenCV converts CMYK to RGB, but ignores warnings.
            simplejpeg.decode_jpeg(data, colorspace="CMYK")
            return _decode_with_opencv(data)
        # Reuse memory: fresh pages cost a third of a decode.
        buffer = getattr(_scratch, "buffer", None)
        if buffer is None or len(buffer) < width * height * 3:
            buffer = _scratch.buffer = np.empty(width * height * 3, np.uint8)
        return simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=buffer)
    except ValueError as error:
        return str(error)


def _decode_other(data: bytes) -> np.ndarray:
    """Decode an image of another format, after a look at its header."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_pixels(*image.size)
    except UnidentifiedImageError:  # its text has a memory address, which differs between builds
        raise DataError("not a readable image: of no known format, or without a header") from None
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"not a readable image: {error}") from error
    return _decode_with_opencv(data)


def _decode_with_opencv(data: bytes) -> np.ndarray:
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise DataError(f"corrupt image: {error}") from error
    if image is None:
        raise DataError("corrupt image, or a format that OpenCV cannot read")
    return image


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{width} × {height} pixels is more than the {MAX_PIXELS:,} allowed for one image: "
            "scale it down before building shards"
        )


def _without_quirks(data: bytes) -> bytes:
    """Correct a JPEG's headers and remove stray bytes between them; it may be truncated."""
    out, position, sequential, components, adobe = bytearray(data[:2]), 2, True, 3, 0
    while True:
        position = data.find(b"\xff", position)  # what is before a marker is stray
        if position < 0 or position + 4 > len(data):
            return bytes(out) + (data[position:] if position >= 0 else b"")
        code = data[position + 1]
        if code == 0xFF or code in _STANDALONE:
            position += 1 if code == 0xFF else 2
            continue
        if code == _EOI:
            return bytes(out) + data[position:]
        end = position + 2 + max(2, int.from_bytes(data[position + 2 : position + 4]))
        segment, position = bytearray(data[position:end]), end
        if code in _SEQUENTIAL and len(segment) > 9:
            sequential, components = _SEQUENTIAL[code], segment[9]
        elif code == _APP0 and segment[4:9] == b"JFIF\0" and len(segment) > 9:
            segment[9] = 1  # the major revision
        elif code == _APP14 and segment[4:9] == b"Adobe" and len(segment) > 15:
            adobe = len(out) + 15  # the colour transform; the number of components may follow
        elif code == _SOS:
            transforms = (0, 1) if components == 3 else (0, 2)
            if adobe and out[adobe] not in transforms:
                out[adobe] = transforms[1]
            if sequential:
                segment[-3:] = b"\x00\x3f\x00"  # the spectral range and the bit position
        out += segment
        if code == _SOS:
            match = _MARKER_AFTER_SCAN.search(data, position)
            end = match.start() if match else len(data)
            out += data[position:end]
            position = end


def _without_stray_bytes(data: bytes, warning: str) -> Iterator[bytes]:
    """Yield copies of a JPEG without the bytes after image data that libjpeg warned about.

    The warning names the kind of the marker behind the bytes, but not the place, and more bytes
    than there are: there is a copy for each possibility.
    """
    if match := _STRAY_BYTES.search(warning):
        count, marker = int(match[1]), bytes([0xFF, int(match[2], 16)])
        position = data.find(marker, data.find(bytes([0xFF, _SOS])) + 2)
        while position >= 0:
            for bytes_ in range(1, count + 1):
                yield data[: position - bytes_] + data[position:]
            position = data.find(marker, position + 2)
