"""XMP's digital source type, put into a finished PNG, JPEG or WebP file; the pixels stay as they are.

Source: IPTC's NewsCodes (`trainedAlgorithmicMedia`: made by a model; `compositeWithTrainedAlgorithmicMedia`: somebody's
picture, edited by one), the XMP specification part 3, RFC 9649 for WebP.
"""

import struct
import zlib

from serving.marking.forms import ImageForm

_CODES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
MADE = f"{_CODES}trainedAlgorithmicMedia"
EDITED = f"{_CODES}compositeWithTrainedAlgorithmicMedia"
_PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
    "<Iptc4xmpExt:DigitalSourceType>{source}</Iptc4xmpExt:DigitalSourceType>"
    '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)
_PNG_HEADER = 33  # signature and IHDR
_XMP_FLAG = 0x04
_ALPHA_FLAG = 0x10


def with_xmp(data: bytes, form: ImageForm, source: str = MADE) -> bytes:
    """The file with a packet in it that says its digital source type."""
    return {"png": _png, "jpeg": _jpeg, "webp": _webp}[form](data, _PACKET.format(source=source).encode())


def _png(data: bytes, packet: bytes) -> bytes:
    text = b"XML:com.adobe.xmp\0\0\0\0\0" + packet
    chunk = struct.pack(">I", len(text)) + b"iTXt" + text + struct.pack(">I", zlib.crc32(b"iTXt" + text))
    return data[:_PNG_HEADER] + chunk + data[_PNG_HEADER:]


def _jpeg(data: bytes, packet: bytes) -> bytes:
    text = b"http://ns.adobe.com/xap/1.0/\0" + packet
    after = 2  # behind the start, and behind JFIF's segment where there is one
    if data[2:4] == b"\xff\xe0":
        after = 4 + int.from_bytes(data[4:6], "big")
    return data[:after] + b"\xff\xe1" + struct.pack(">H", len(text) + 2) + text + data[after:]


def _webp(data: bytes, packet: bytes) -> bytes:
    """Files without metadata have no header for any: it is put before the picture."""
    chunks = data[12:]
    if chunks[:4] == b"VP8X":
        chunks = chunks[:8] + bytes([chunks[8] | _XMP_FLAG]) + chunks[9:]
    else:
        width, height, alpha = _webp_size(chunks)
        flags = _XMP_FLAG | (_ALPHA_FLAG if alpha else 0)
        sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        chunks = b"VP8X" + struct.pack("<I", 10) + bytes([flags, 0, 0, 0]) + sides + chunks
    chunks += b"XMP " + struct.pack("<I", len(packet)) + packet + b"\0" * (len(packet) % 2)
    return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WEBP" + chunks


def _webp_size(chunks: bytes) -> tuple[int, int, bool]:
    """Width, height and whether there is an alpha channel, of a lossy or lossless picture's chunk."""
    if chunks[:4] == b"VP8L":
        bits = int.from_bytes(chunks[9:13], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, bool(bits >> 28 & 1)
    width, height = struct.unpack("<HH", chunks[14:18])
    return width & 0x3FFF, height & 0x3FFF, False
