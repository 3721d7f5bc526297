"""The file of measurements: what is in it, and what happens to one that is damaged, foreign, or written by two."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from resnet_fused import tuned
from resnet_fused.backend import Choice
from resnet_fused.data import MissingPackageError
from resnet_fused.tuned import Entry, Table

CPU = torch.device("cpu")
ENTRY = Entry.of({"aten": 2e-3, "cuda:2": 1e-3, "triton:1": 3e-3})


def kept() -> Table:
    table = Table.load(CPU)
    table.add("a problem", ENTRY)
    return table


def test_an_entry() -> None:
    assert ENTRY.winner == "cuda:2"
    assert ENTRY.runner_up == "aten"
    assert list(ENTRY.seconds) == ["cuda:2", "aten", "triton:1"]
    assert Entry.of({"aten": 1.0}).runner_up is None


def test_what_is_added_is_there_the_next_time() -> None:
    kept()
    table = Table.load(CPU)
    assert table.entries == {"a problem": ENTRY}
    assert table.choice("a problem") == Choice("cuda", 2)
    assert table.choice("another") is None


def test_the_file_says_of_what_it_is() -> None:
    path = kept().path
    assert path is not None
    content = json.loads(path.read_text())
    assert content["machine"] == tuned.machine(CPU)
    assert {"device", "torch", "triton", "resnet_fused"} <= content["machine"].keys()
    assert [p.name for p in path.parent.iterdir() if p.suffix != ".lock"] == [path.name]


DAMAGE = {
    "empty": lambda content: "",
    "cut off": lambda content: json.dumps(content)[:-20],
    "no json": lambda content: "nonsense",
    "a list": lambda content: "[]",
    "another format": lambda content: json.dumps(content | {"format": 0}),
    "another version": lambda content: json.dumps(content | {"machine": content["machine"] | {"torch": "1.0"}}),
    "no entries": lambda content: json.dumps({k: v for k, v in content.items() if k != "entries"}),
    "entries of another kind": lambda content: json.dumps(content | {"entries": ["a"]}),
    "no winner": lambda content: json.dumps(content | {"entries": {"a": {"winner": "b", "seconds": {"c": 1.0}}}}),
    "no seconds": lambda content: json.dumps(content | {"entries": {"a": {"winner": "b"}}}),
    "times below zero": lambda content: json.dumps(
        content | {"entries": {"a": {"winner": "b", "seconds": {"b": -1.0}}}}
    ),
    "a winner of no kind": lambda content: json.dumps(
        content | {"entries": {"a": {"winner": "b", "seconds": {"b": 1.0}}}}
    ),
    "deeply nested": lambda content: "[" * 200_000,
    "times of another kind": lambda content: json.dumps(
        content | {"entries": {"a": {"winner": "b", "seconds": {"b": "fast"}}}}
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_file_is_left_aside(damage: str) -> None:
    path = kept().path
    assert path is not None
    path.write_text(DAMAGE[damage](json.loads(path.read_text())))
    with pytest.warns(UserWarning, match="are left aside"):
        table = Table.load(CPU)
    assert table.entries == {}
    table.add("another", ENTRY)
    assert Table.load(CPU).entries == {"another": ENTRY}
    assert path.with_suffix(".bad").exists()


def test_a_file_that_cannot_be_read() -> None:
    path = kept().path
    assert path is not None
    path.unlink()
    path.mkdir()
    with pytest.warns(UserWarning, match="are left aside"):
        assert Table.load(CPU).entries == {}


def test_a_full_disk_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch) -> None:
    table = kept()

    def full(self: Path, text: str) -> None:
        with open(self, "w") as file:
            file.write(text[: len(text) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        table.add("another", ENTRY)
    assert Table.load(CPU).entries == {"a problem": ENTRY}
    assert table.path is not None
    assert not list(table.path.parent.glob("*.partial"))


def add_many(folder: str, prefix: str, threads: int) -> None:
    os.environ[tuned.VARIABLE] = folder
    torch.set_num_threads(threads)  # by which measurements differ
    table = Table.load(CPU)
    for i in range(20):
        table.add(f"{prefix}{i}", ENTRY)


def test_two_processes_lose_nothing() -> None:
    context = multiprocessing.get_context("spawn")
    folder = os.environ[tuned.VARIABLE]
    both = [context.Process(target=add_many, args=(folder, prefix, torch.get_num_threads())) for prefix in "ab"]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert len(Table.load(CPU).entries) == 40


def test_what_another_process_has_measured_since_stays() -> None:
    first, second = Table.load(CPU), Table.load(CPU)
    first.add("a", Entry.of({"gram": 1.0, "recompute": 2.0}))
    second.add("a", Entry.of({"gram": 5.0, "recompute": 2.0}))
    first.add("b", ENTRY)
    assert Table.load(CPU).entries["a"].winner == "recompute"


def test_threads_have_tables_of_their_own() -> None:
    tuned.table(CPU).add("a", ENTRY)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert tuned.table(CPU).entries == {}
    finally:
        torch.set_num_threads(before)
    assert tuned.table(CPU).entries == {"a": ENTRY}


def test_other_devices_have_none() -> None:
    table = tuned.table(torch.device("meta"))
    table.add("a", ENTRY)
    assert table.path is None


def test_without_a_folder_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tuned.VARIABLE)

    def missing(*_: object) -> None:
        raise MissingPackageError("no platformdirs")

    monkeypatch.setattr(tuned, "require", missing)
    table = Table.load(CPU)
    table.add("a problem", ENTRY)
    assert table.path is None
    assert table.entries == {"a problem": ENTRY}
    assert Table.load(CPU).entries == {}


def test_the_platforms_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(tuned.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned.folder() == tmp_path / "resnet_fused"


@pytest.mark.parametrize("text", ["cuda", "cuda:3", "triton:12", "aten"])
def test_choices_as_text(text: str) -> None:
    assert str(Choice.parse(text)) == text


@pytest.mark.parametrize("text", ["", "auto", "cudnn", "cuda:", "cuda:x", "cuda:-1"])
def test_texts_that_are_no_choices(text: str) -> None:
    if text == "cuda:":
        assert Choice.parse(text) == Choice("cuda")
        return
    with pytest.raises(ValueError, match="is no choice"):
        Choice.parse(text)
