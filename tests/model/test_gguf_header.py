"""Headers of GGUF files: what the gguf package reads, nothing beyond the file, and the parts of split files."""

import itertools
import re
import shutil

import gguf
import numpy as np
import pytest
import torch
from gguf_files import blocky, split_gguf, write_gguf

from acttail.engine import Engine
from acttail.errors import ModelError
from acttail.model import gguf_types
from acttail.model.gguf_file import gguf_files, open_gguf
from acttail.model.gguf_header import read_header
from acttail.model.names import resolve
from acttail.model.opened import as_weights

KINDS = gguf.GGUFValueType
VALUES = {
    "a.u8": (200, KINDS.UINT8), "a.i8": (-3, KINDS.INT8), "a.u16": (60000, KINDS.UINT16),
    "a.i16": (-5, KINDS.INT16), "a.u32": (4 * 10**9, KINDS.UINT32), "a.i32": (-7, KINDS.INT32),
    "a.f32": (0.1, KINDS.FLOAT32), "a.u64": (2**63, KINDS.UINT64), "a.i64": (-(2**62), KINDS.INT64),
    "a.f64": (0.1, KINDS.FLOAT64), "a.yes": (True, KINDS.BOOL), "a.text": ("na\u00efve \u4f60\u597d\n", KINDS.STRING),
    "a.empty": ("", KINDS.STRING),
}  # fmt: skip
LISTS = {
    "l.u8": ([1, 255], KINDS.UINT8), "l.f32": ([0.5, -1e30], KINDS.FLOAT32), "l.i32": ([-1, 2], KINDS.INT32),
    "l.bool": ([True, False], KINDS.BOOL), "l.text": (["a", "", "\U0001f642", " b"], KINDS.STRING),
}  # fmt: skip
TENSORS = {
    "one": ((7,), "F32"),
    "half": ((3, 5), "F16"),
    "bits": ((4, 64), "Q4_0"),
    "three": ((2, 3, 256), "Q6_K"),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A file with a value of every type."""
    place = tmp_path_factory.mktemp("header") / "all.gguf"
    writer = gguf.GGUFWriter(str(place), "llama")
    for key, (value, kind) in VALUES.items():
        writer.add_key_value(key, value, kind)
    for key, (value, kind) in LISTS.items():
        writer.add_key_value(key, value, KINDS.ARRAY, kind)
    random = np.random.default_rng(0)
    for name, (shape, kind) in TENSORS.items():
        chosen = gguf.GGMLQuantizationType[kind]
        if kind in ("F32", "F16"):
            writer.add_tensor(
                name, random.standard_normal(shape).astype(kind.lower().replace("f", "float"))
            )
            continue
        weights, size = gguf.GGML_QUANT_SIZES[chosen]
        raw = random.integers(0, 256, (*shape[:-1], shape[-1] // weights * size), dtype=np.uint8)
        writer.add_tensor(name, raw, raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return place


def test_it_reads_what_the_gguf_package_reads(path):
    header, theirs = read_header(path), gguf.GGUFReader(str(path))
    assert list(header.fields) == [k for k in theirs.fields if not k.startswith("GGUF.")]
    for key, field in header.fields.items():
        found = field.contents()
        assert found == theirs.fields[key].contents()
        assert type(found) is type(theirs.fields[key].contents())
        assert list(field.types) == theirs.fields[key].types
        assert len(field) == (len(found) if isinstance(found, list) else 1)
    assert header.get("l.text") == LISTS["l.text"][0]
    for mine, other in zip(header.tensors, theirs.tensors, strict=True):
        assert (mine.name, mine.tensor_type, mine.data_offset) == (
            other.name,
            other.tensor_type,
            other.data_offset,
        )
        assert mine.shape == tuple(other.shape)
        assert mine.n_bytes == other.n_bytes
        assert mine.data.dtype == other.data.dtype
        assert np.array_equal(mine.data, other.data, equal_nan=mine.data.dtype.kind == "f")
        mine.release()
        assert np.array_equal(mine.data, other.data, equal_nan=mine.data.dtype.kind == "f")


def test_the_table_of_types_is_that_of_the_gguf_package():
    assert {t.name: int(t) for t in gguf_types.GgmlType} == {
        t.name: int(t) for t in gguf.GGMLQuantizationType
    }
    assert gguf_types.BLOCKS == gguf.GGML_QUANT_SIZES


def test_whatever_a_byte_becomes_a_header_is_read_or_refused(path, tmp_path):
    whole = path.read_bytes()
    end = min(t.data_offset for t in read_header(path).tensors)
    outcomes = set()
    for at, value in itertools.product(range(4, end), (0x00, 0x01, 0x7F, 0xFF)):
        broken = bytearray(whole)
        broken[at] = value
        outcomes.add(read(tmp_path / "broken.gguf", broken))
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize("value", [2**64 - 1, 2**63, 2**61, 2**32, 2**31])
def test_no_length_leads_out_of_the_file(path, tmp_path, value):
    whole = path.read_bytes()
    end = min(t.data_offset for t in read_header(path).tensors)
    for at in range(8, end - 8):
        broken = bytearray(whole)
        broken[at : at + 8] = value.to_bytes(8, "little")
        read(tmp_path / "broken.gguf", broken)


def test_wherever_a_file_ends_it_is_refused(path, tmp_path):
    whole = path.read_bytes()
    last = read_header(path).tensors[-1]
    for size in range(last.data_offset + last.n_bytes):
        assert read(tmp_path / "cut.gguf", whole[:size]) == "refused"


def read(place, content):
    """What becomes of a file: it is read to the last value, or refused in one line."""
    place.write_bytes(content)
    try:
        header = read_header(place)
        for field in header.fields.values():
            field.contents()
    except ModelError as error:
        said = str(error)
    else:
        assert all(tensor.data.nbytes == tensor.n_bytes for tensor in header.tensors)
        return "read"
    assert str(place) in said
    assert "\n" not in said
    return "refused"


@pytest.mark.parametrize(("version", "message"), [
    (1, "of version 1; acttail reads 2 and 3"), (3 << 24, "for big-endian machines"),
])  # fmt: skip
def test_another_version_is_named(path, tmp_path, version, message):
    whole = bytearray(path.read_bytes())
    whole[4:8] = version.to_bytes(4, "little")
    (tmp_path / "old.gguf").write_bytes(whole)
    with pytest.raises(ModelError, match=message):
        read_header(tmp_path / "old.gguf")


def test_a_type_that_is_not_known_is_named(path, tmp_path):
    whole = path.read_bytes()
    at = whole.index(b"half") + 4 + 4 + 16
    (tmp_path / "new.gguf").write_bytes(whole[:at] + (77).to_bytes(4, "little") + whole[at + 4 :])
    with pytest.raises(ModelError, match=r"new\.gguf has half in a format .* \(number 77\)"):
        read_header(tmp_path / "new.gguf")


@pytest.fixture
def split(tmp_path, tokenizer):
    """A tiny model, whole and in three parts."""
    whole = tmp_path / "whole.gguf"
    write_gguf(whole, blocky(), "Q8_0", tokenizer)
    (tmp_path / "parts").mkdir()
    return whole, split_gguf(whole, tmp_path / "parts" / "tiny", 3)


def test_a_split_model_is_the_whole_one(split):
    whole, parts = split
    assert gguf_files(parts[0]) == tuple(parts)
    assert resolve(parts[0]).files() == parts
    assert resolve(parts[0].parent) == resolve(parts[0])  # a folder that holds nothing else
    one, other = as_weights(whole), as_weights(parts[0])
    for p in one.projections:
        assert torch.equal(one.weight(p), other.weight(p))
    ids = torch.arange(3, 9)
    engines = [Engine.from_pretrained(place, native=True) for place in (whole, parts[0])]
    assert torch.equal(*(e.new_sequence(16).feed(ids) for e in engines))


def test_a_missing_part_is_named(split):
    _, parts = split
    parts[1].unlink()
    for way in (as_weights, Engine.from_pretrained):
        with pytest.raises(
            ModelError, match=r"the first of 3 parts, and .*tiny-00002-of-00003\.gguf is missing"
        ):
            way(parts[0])


def test_another_part_is_not_the_model(split):
    _, parts = split
    with pytest.raises(
        ModelError, match=r"is part 2 of 3; name the first: .*tiny-00001-of-00003\.gguf"
    ):
        as_weights(parts[1])


def test_parts_of_another_model_are_refused(split):
    _, parts = split
    shutil.copy(parts[1], parts[2])
    with pytest.raises(ModelError, match=r"says that it is part 1 \(from 0\) of 3, not 2 of 3"):
        open_gguf(parts[0])


def test_a_part_under_a_name_of_its_own_is_refused(split):
    _, parts = split
    parts[0].rename(parts[0].with_name("model.gguf"))
    with pytest.raises(
        ModelError, match=re.escape("is one of 3 parts by its header and not by its name")
    ):
        open_gguf(parts[0].with_name("model.gguf"))
