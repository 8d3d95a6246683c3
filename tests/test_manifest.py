import contextlib
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep import beton_reader as reader
from data_prep import manifest
from runner.common.errors import UserError


def test_round_trip(small_data: Path) -> None:
    prepared = manifest.read(small_data)
    assert prepared.to_json() == (small_data / "dataset.json").read_text()
    assert len(prepared.fingerprint) == 16


def test_the_fingerprint_follows_the_contents(own_data: Path) -> None:
    before = manifest.read(own_data).fingerprint
    path = own_data / "dataset.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"name": "renamed"}))
    assert manifest.read(own_data).fingerprint == before
    fields["splits"]["train"]["sha256"] = "0" * 64
    path.write_text(json.dumps(fields))
    assert manifest.read(own_data).fingerprint != before


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"format": 2}',
        '{"format": 1, "splits": {}}',
        "nonsense",
        pytest.param('{"more": ' + "[" * 10_000, id="nested too deep"),
    ],
)
def test_invalid_manifests_are_refused(own_data: Path, content: str) -> None:
    (own_data / "dataset.json").write_text(content)
    with pytest.raises(UserError, match="expected a manifest of format 1"):
        manifest.read(own_data)


def test_a_manifest_of_an_earlier_version_is_one_of_raw_records(own_data: Path) -> None:
    path, now = own_data / "dataset.json", manifest.read(own_data)
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({name: fields[name] for name in fields if name not in ("records", "jpeg_quality")}))
    assert manifest.read(own_data) == now
    for other in ({"jpeg_quality": 90}, {"records": "jpeg"}, {"records": "smart"}):
        path.write_text(json.dumps(fields | other))
        with pytest.raises(UserError, match="expected a manifest of format 1"):
            manifest.read(own_data)


def places(value: object, place: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every place in nested JSON, and of a list only the first."""
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*place, key))


def test_no_manifest_of_a_stranger_ends_in_a_traceback(own_data: Path) -> None:
    """Each value is replaced with values of all types and sizes: the manifest is refused, or the same dataset."""
    path = own_data / "dataset.json"
    sound = json.loads(path.read_text())
    for place in list(places(sound))[1:]:
        for value in (
            None,
            -1,
            0,
            1.5,
            "x",
            [],
            {},
            [0],
            True,
            2**47,
            2**70,
            float("nan"),
            "\x00\u202e",
            "/etc/passwd",
        ):
            fields = json.loads(json.dumps(sound))
            parent = functools.reduce(lambda part, key: part[key], place[:-1], fields)
            parent[place[-1]] = value
            path.write_text(json.dumps(fields))
            with contextlib.suppress(UserError):
                prepared = manifest.read(own_data)
                for name, split in prepared.splits.items():
                    reader.read_labels(own_data / f"{name}.beton", split, prepared)


def test_a_missing_folder_or_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a folder made by data_prep, found none"):
        manifest.read(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"expected dataset\.json"):
        manifest.read(tmp_path)


def test_a_manifest_cannot_point_outside(own_data: Path, tmp_path: Path) -> None:
    path = own_data / "dataset.json"
    fields = json.loads(path.read_text())
    (tmp_path / "elsewhere.beton").write_bytes((own_data / "test.beton").read_bytes())
    fields["splits"]["test"]["file"] = "../elsewhere.beton"
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError, match="expected the file"):
        manifest.check_files(own_data, manifest.read(own_data))


def test_a_manifest_larger_than_the_memory_is_refused(own_data: Path) -> None:
    os.truncate(own_data / "dataset.json", 1 << 36)
    with pytest.raises(UserError, match="expected at most"):
        manifest.read(own_data)
