"""Rewrite JPEGs that libjpeg decodes with a warning, so that the strict decoder accepts them.

Some phones and cameras write files that libjpeg only warns about: other values than the standard's
in a scan header, stray bytes before a marker, an unknown JFIF revision. The pixels are right all
the same. But libjpeg reports only the first warning of a file, and a truncated file is a warning
too. So these faults are corrected in the bytes, and the strict decoder checks everything else.
"""

import re
from collections.abc import Iterator

_APP0, _APP14, _SOS, _EOI = 0xE0, 0xEE, 0xDA, 0xD9
_SEQUENTIAL = {0xC0: True, 0xC1: True, 0xC2: False}  # by start-of-frame marker
_STANDALONE = {0x00, 0x01, 0xD8, *range(0xD0, 0xD8)}  # markers without a length, and escaped 0xFF
_MARKER_AFTER_SCAN = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")
STRAY_BYTES = re.compile(r"(\d+) extraneous bytes before marker 0x([0-9a-f]{2})")
"""A warning of libjpeg."""


def without_quirks(data: bytes) -> bytes:
    """Correct the headers of a JPEG and remove stray bytes between them.

    Args:
        data: a JPEG, perhaps truncated. Entropy-coded data is copied as it is.
    """
    out, position, sequential, components = bytearray(data[:2]), 2, True, 3
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
            known, default = ((0, 1), 1) if components == 3 else ((0, 2), 2)
            segment[15] = segment[15] if segment[15] in known else default  # the colour transform
        elif code == _SOS and sequential:
            segment[-3:] = b"\x00\x3f\x00"  # the spectral range and the bit position
        out += segment
        if code == _SOS:
            match = _MARKER_AFTER_SCAN.search(data, position)
            end = match.start() if match else len(data)
            out += data[position:end]
            position = end


def without_stray_bytes(data: bytes, warning: str) -> Iterator[bytes]:
    """Yield copies of a JPEG without the bytes after image data that libjpeg warned about.

    Args:
        data: a JPEG.
        warning: libjpeg's first warning. It names the kind of the marker behind the bytes, but not
            the place, and more bytes than there are: there is a copy for each possibility.
    """
    if match := STRAY_BYTES.search(warning):
        count, marker = int(match[1]), bytes([0xFF, int(match[2], 16)])
        position = data.find(marker, data.find(bytes([0xFF, _SOS])) + 2)
        while position >= 0:
            for bytes_ in range(1, count + 1):
                yield data[: position - bytes_] + data[position:]
            position = data.find(marker, position + 2)
