"""One table of image cells, which training, captioning and scoring must all read in the same way."""

import base64
import io
import json

import pyarrow as pa
from PIL import Image


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
    return buffer.getvalue()


RED, BLUE = png((255, 0, 0)), png((0, 0, 255))
BASE64 = base64.b64encode(RED).decode()
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
LARGE = pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])
PATH = pa.struct([("path", pa.string())])
WIDE = pa.struct([("bytes", pa.binary()), ("path", pa.string()), ("width", pa.int64())])

CELLS = {
    "bytes": (pa.binary(), RED, [RED]),
    "large bytes": (pa.large_binary(), RED, [RED]),
    "bytes view": (pa.binary_view(), RED, [RED]),
    "null bytes": (pa.binary(), None, []),
    "path": (pa.string(), "red.png", [RED]),
    "large path": (pa.large_string(), "red.png", [RED]),
    "path in a dictionary": (pa.dictionary(pa.int32(), pa.string()), "red.png", [RED]),
    "bytes in a dictionary": (pa.dictionary(pa.int32(), pa.binary()), RED, [RED]),
    "path in a subfolder": (pa.string(), "sub/été #1 100%.png", [BLUE]),
    "data URL": (pa.string(), f"data:image/png;base64,{BASE64}", [RED]),
    "data URL over lines": (pa.string(), f"data:image/png;base64,\n{BASE64[:40]}\n{BASE64[40:]}", [RED]),
    "base64": (pa.string(), BASE64, [RED]),
    "base64 over lines": (pa.string(), f"{BASE64[:40]}\n{BASE64[40:]}\n", [RED]),
    "list of base64": (pa.list_(pa.string()), [BASE64, BASE64], [RED, RED]),
    "struct with base64 as its path": (PATH, {"path": BASE64}, [RED]),
    "empty path": (pa.string(), "", []),
    "null path": (pa.string(), None, []),
    "struct with bytes": (STRUCT, {"bytes": RED, "path": None}, [RED]),
    "struct with bytes and path": (STRUCT, {"bytes": RED, "path": "blue.png"}, [RED]),
    "struct with a path": (STRUCT, {"bytes": None, "path": "red.png"}, [RED]),
    "struct with a path only": (PATH, {"path": "red.png"}, [RED]),
    "struct with nothing": (STRUCT, {"bytes": None, "path": None}, []),
    "struct with nothing of use": (WIDE, {"bytes": None, "path": None, "width": 8}, []),
    "null struct": (STRUCT, None, []),
    "struct with more fields": (WIDE, {"bytes": RED, "path": None, "width": 8}, [RED]),
    "struct of large values": (LARGE, {"bytes": RED, "path": "x"}, [RED]),
    "struct with base64": (PATH_AND_TEXT := pa.struct([("bytes", pa.string())]), {"bytes": BASE64}, [RED]),
    "struct with base64 over lines": (PATH_AND_TEXT, {"bytes": BASE64[:40] + "\n" + BASE64[40:]}, [RED]),
    "struct with a URL": (pa.struct([("url", pa.string())]), {"url": "memory://cells/red.png"}, [RED]),
    "URL": (pa.string(), "memory://cells/red.png", [RED]),
    "list of bytes": (pa.list_(pa.binary()), [RED, BLUE], [RED, BLUE]),
    "large list of bytes": (pa.large_list(pa.binary()), [RED, BLUE], [RED, BLUE]),
    "list of two": (pa.list_(pa.binary(), 2), [RED, BLUE], [RED, BLUE]),
    "list of paths": (pa.list_(pa.string()), ["red.png", "blue.png"], [RED, BLUE]),
    "list of structs": (pa.list_(STRUCT), [{"bytes": RED}, {"path": "blue.png"}], [RED, BLUE]),
    "list of structs with paths": (pa.list_(PATH), [{"path": "red.png"}], [RED]),
    "empty list": (pa.list_(STRUCT), [], []),
    "null list": (pa.list_(STRUCT), None, []),
}
"""By name: the type of the column, the cell, and the images in it."""


def in_table(cell):
    """The cell as columns of VLMEvalKit's tables; None if these cannot express it."""
    values = cell if isinstance(cell, list) else [cell]
    plain = [
        value.get("bytes") or value.get("path") if isinstance(value, dict) else value for value in values
    ]
    if all(isinstance(value, bytes) for value in plain):
        encoded = [base64.b64encode(value).decode() for value in plain]
        return {"image": encoded[0] if len(encoded) == 1 else str(encoded)}
    if not all(isinstance(value, str) and value for value in plain):
        return None
    if plain[0].startswith("data:") or plain[0][:5] == BASE64[:5]:
        return {"image": plain[0] if len(plain) == 1 else str(plain)}
    return {"image_path": plain[0] if len(plain) == 1 else json.dumps(plain)}
