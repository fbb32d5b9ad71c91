"""Ways in which a file goes wrong, drawn by a random generator: bits, lengths, JSON values, missing and swapped files."""

import json
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What a number of a header becomes: the ends of every width, and what wraps when it is multiplied.
_INTEGERS = (
    0, 1, 7, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1,
)  # fmt: skip
# What a value of a JSON text becomes.
_VALUES = (
    "null", "true", "false", "0", "1", "-1", "2", "0.5", "-0.0", "1.5", "1e-320", "1e308", "1e999", "NaN", "-Infinity",
    "2147483648", "9223372036854775808", "1" * 5000, '""', '"x"', '"0"', r'"\u001b[2J"', r'"\ud800"', r'"\u0000"',
    '"../../../etc/passwd"', '"/dev/zero"', '"{{ 1 }}"', '"' + "x" * 100_000 + '"', "[]", "{}", "[[]]", "[null]",
    '{"x": 1}', "[" * 40 + "]" * 40, "[" * 100_000 + "]" * 100_000, '{"a":' * 500 + "1" + "}" * 500,
)  # fmt: skip
_MARK = "\ue000"


def damaged_bytes(rng: random.Random, data: bytes, head: int | None = None) -> bytes:
    """One thing about the bytes of a file is another; half the time in its first `head` bytes."""
    size = len(data)
    if size == 0:
        return rng.randbytes(rng.randrange(1, 64))
    near = min(size, head) if head and rng.random() < 0.7 else size
    at, found = rng.randrange(near), bytearray(data)
    match rng.randrange(8):
        case 0 | 1:
            for _ in range(rng.choice((1, 1, 2, 8))):
                found[rng.randrange(near)] ^= 1 << rng.randrange(8)
        case 2 | 3:
            kind = rng.choice(("<I", "<Q", "<H"))
            at = min(at, max(0, size - 8))
            bits = 8 * struct.calcsize(kind)
            found[at : at + bits // 8] = struct.pack(kind, rng.choice(_INTEGERS) % 2**bits)
        case 4:
            del found[at:]
        case 5:
            del found[at : at + rng.choice((1, 4, 8, 64))]
        case 6:
            found[at:at] = found[at : at + rng.choice((1, 4, 8, 64))] or b"\0"
        case 7:
            length = rng.choice((1, 8, 64, 512))
            fills = bytes(length), b"\xff" * length, rng.randbytes(length)
            found[at : at + length] = rng.choice(fills)
    return bytes(found[: max(size, len(found))])


def damaged_json(rng: random.Random, data: bytes) -> bytes:
    """One value, key or list of a JSON text is another."""
    if rng.random() < 0.15:
        return damaged_bytes(rng, data)
    tree = json.loads(data)
    places = list(_places(tree))
    if not places or rng.random() < 0.03:
        return rng.choice(_VALUES).encode()
    holder, key = rng.choice(places)
    raw: list[str] = []

    def put(text: str) -> str:
        raw.append(text)
        return f"{_MARK}{len(raw) - 1}{_MARK}"

    value = holder[key]
    match rng.randrange(8):
        case 0 | 1 | 2:
            holder[key] = put(rng.choice(_VALUES))
        case 3:
            holder[key] = rng.choice([
                [value], {"x": value}, str(value),
                *([value + 1, -value, value * 2, value / 3, float(value)] if isinstance(value, int | float) else []),
                *([value[: len(value) // 2], value * 300] if isinstance(value, str | list) else []),
            ])  # fmt: skip
        case 4:
            del holder[key]
        case 5 if isinstance(holder, dict):
            holder[put(json.dumps(key))] = put(rng.choice((*_VALUES[:16], json.dumps(value))))
        case 6 if isinstance(holder, dict):
            holder[rng.choice((key + "x", key[1:], "", "\x1b[31m", key.upper()))] = holder.pop(key)
        case _:
            other, name = rng.choice(places)
            holder[key] = _plain(other[name])
    text = json.dumps(tree, ensure_ascii=False)
    text = re.sub(f'"{_MARK}(\\d+){_MARK}"', lambda found: raw[int(found[1])], text)
    return text.encode(errors="surrogatepass")


def _plain(value: Any) -> Any:
    """A copy, so that a value put into itself makes no circle."""
    return json.loads(json.dumps(value))


def _places(value: Any) -> Any:
    """(container, key) of everything in a JSON value."""
    keys = {dict: list, list: lambda items: range(len(items))}.get(type(value), lambda _: ())
    for key in keys(value):
        yield value, key
        yield from _places(value[key])


def damaged_safetensors(rng: random.Random, data: bytes) -> bytes:
    """The header's JSON, its length, or the bytes of a safetensors file are others."""
    (length,) = struct.unpack("<Q", data[:8])
    if rng.random() < 0.4:
        return damaged_bytes(rng, data, 8 + length)
    text = damaged_json(rng, data[8 : 8 + length])
    if rng.random() < 0.7:
        text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def damaged_gguf(rng: random.Random, data: bytes) -> bytes:
    """The header or the blocks of a GGUF file are others; what is small of it is nearly all header."""
    return damaged_bytes(rng, data, min(len(data), 12_000))


_BY_ENDING: dict[str, Callable[[random.Random, bytes], bytes]] = {
    ".json": damaged_json, ".safetensors": damaged_safetensors, ".gguf": damaged_gguf,
}  # fmt: skip


def damage_file(rng: random.Random, path: Path) -> None:
    """Damage a file in place, once or a few times."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = path.read_bytes()
        try:
            made = _BY_ENDING.get(path.suffix, damaged_bytes)(rng, data)
        except (ValueError, struct.error, RecursionError):  # damaged beyond its form already
            made = damaged_bytes(rng, data)
        path.write_bytes(made)


def damage_folder(rng: random.Random, folder: Path) -> None:
    """Damage a file of a folder, or take, swap or replace one."""
    files = sorted(p for p in folder.iterdir() if p.is_file())
    file, other = rng.choice(files), rng.choice(files)
    match rng.randrange(30):
        case 0:
            file.unlink()
        case 1:
            file.write_bytes(b"")
        case 2:
            shutil.copyfile(other, file) if file != other else file.unlink()
        case 3:
            file.unlink()
            file.mkdir()
        case 4:
            file.unlink()
            file.symlink_to(rng.choice((file, folder / "nowhere", Path("/dev/null"))))
        case 5:
            (folder / rng.choice(("more.safetensors", "model.safetensors.index.json", "added_tokens.json"))).write_bytes(
                other.read_bytes())  # fmt: skip
        case _:
            damage_file(rng, file)
