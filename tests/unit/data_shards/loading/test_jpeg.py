"""JPEGs that are not quite as the standard has them: read where the pixels are whole."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from data_shards.errors import DataError
from data_shards.loading.decode import decode, decode_into

SOS, DHT = b"\xff\xda", b"\xff\xc4"


def jpeg(mode: str = "RGB", **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 4, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(cv2.resize(pixels, (40, 72))).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


PLAIN, GREY = jpeg(quality=90), jpeg("L")
RESTARTS = jpeg(restart_marker_rows=1)
PROGRESSIVE = jpeg(progressive=True)
CMYK = jpeg("CMYK")
YCCK = CMYK.replace(b"Adobe\0d\0\0\0\0\0", b"Adobe\0d\0\0\0\0\x02")  # the colour transform


def insert(data: bytes, place: bytes, stray: bytes) -> bytes:
    """Put bytes before the last occurrence of others."""
    before, _, after = data.rpartition(place)
    return before + stray + place + after


def spectral_end_0(data: bytes) -> bytes:
    """What some phones and cameras write into the scan header."""
    start = data.index(SOS)
    end = start + 2 + int.from_bytes(data[start + 2 : start + 4])
    assert data[end - 3 : end] == b"\x00\x3f\x00"
    return data[: end - 2] + b"\x00" + data[end - 1 :]


def stray_before_restarts(data: bytes) -> bytes:
    header, scan = data[: data.index(SOS)], data[data.index(SOS) :]
    for number in range(8):
        restart = bytes([0xFF, 0xD0 + number])
        scan = scan.replace(restart, b"\x55\x66" + restart)
    return header + scan


ODD = {
    "spectral end 0": spectral_end_0(PLAIN),
    "spectral end 0, grey": spectral_end_0(GREY),
    "spectral end 0, restart markers": spectral_end_0(RESTARTS),
    "stray bytes before the scan": insert(PLAIN, SOS, b"\x00\x01\x02"),
    "stray bytes before a table": insert(PLAIN, DHT, b"\x00" * 40),
    "fill bytes before the scan": insert(PLAIN, SOS, b"\xff" * 5),
    "escaped bytes before the scan": insert(PLAIN, SOS, b"\xff\x00\xff\x00"),
    "stray bytes between scans": insert(PROGRESSIVE, DHT, b"\x01\x02\x03\x04"),
    "stray bytes before restart markers": stray_before_restarts(RESTARTS),
    "stray bytes before the end": insert(PLAIN, b"\xff\xd9", b"\x12\x34"),
    "bytes after the end": PLAIN + b"more" * 100,
    "JFIF 3.1": PLAIN.replace(b"JFIF\0\x01\x01", b"JFIF\0\x03\x01"),
    "JFIF 0.0, progressive": PROGRESSIVE.replace(b"JFIF\0\x01\x01", b"JFIF\0\0\0"),
    "several": insert(spectral_end_0(PLAIN), SOS, b"x").replace(b"JFIF\0\x01", b"JFIF\0\x02"),
}


@pytest.mark.parametrize("data", ODD.values(), ids=ODD)
def test_odd_jpeg_is_read_as_pil_reads_it(data):
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(decode(data), expected)
    into = np.empty((72, 40, 3), np.uint8)
    decode_into(data, into)
    assert np.array_equal(into, expected)


@pytest.mark.parametrize("data", [CMYK, YCCK], ids=["CMYK", "YCCK"])
def test_jpeg_in_the_colours_of_print_is_read(data):
    assert decode(data).shape == (72, 40, 3)
    assert np.array_equal(decode(insert(data, SOS, b"\x00\x01")), decode(data))


@pytest.mark.parametrize("ending", [b"", b"\xff\xd9"], ids=["cut", "cut and ended"])
@pytest.mark.parametrize(
    "data",
    [PLAIN, GREY, RESTARTS, PROGRESSIVE, CMYK, YCCK, *ODD.values()],
    ids=["plain", "grey", "restart markers", "progressive", "CMYK", "YCCK", *ODD],
)
def test_truncated_jpeg_is_refused(data, ending):
    whole = data[: data.rindex(b"\xff\xd9")].removesuffix(b"\x12\x34")
    for lost in (30, len(whole) // 6):
        with pytest.raises(DataError, match="corrupt JPEG"):
            decode(whole[:-lost] + ending)


def test_lost_restart_interval_is_refused():
    first, second = RESTARTS.index(b"\xff\xd1"), RESTARTS.index(b"\xff\xd2")
    with pytest.raises(DataError, match="corrupt JPEG"):
        decode(RESTARTS[:first] + RESTARTS[second:])


@pytest.mark.parametrize("length", [3, 4, 5, 20, 200])
def test_a_beginning_only_is_refused(length):
    for data in (PLAIN, PROGRESSIVE, ODD["several"]):
        with pytest.raises(DataError):
            decode(data[:length])
