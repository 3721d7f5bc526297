"""Checkpoints: what they hold, and that neither a kill, nor a full disk, nor damage goes unnoticed or loses one."""

from __future__ import annotations

import builtins
import errno
import multiprocessing
import os
import pickle
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from resnet_fused import checkpoint, models
from resnet_fused.checkpoint import BEST, STATE, CheckpointError, SaveError, read_state, save_state
from resnet_fused.data import Pixels
from resnet_fused.recipe import Recipe

pytest.importorskip("safetensors")
resource = pytest.importorskip("resource")  # of POSIX

PIXELS = Pixels(torch.rand(1, 28, 28), torch.ones(1, 1, 1), torch.rand(1, 1))


def save_numbered(folder: Path, iteration: int) -> None:
    """A state whose weights say which iteration they are of."""
    model = nn.Linear(100, 20)
    nn.init.constant_(model.weight, iteration)
    weights = checkpoint.pack(model, {"model": "mnist_resnet"})
    save_state(folder, iteration, weights, {"momentum": torch.full((50,), iteration)})


def number(folder: Path) -> int:
    """The iteration of the last checkpoint, if all of its parts agree."""
    state, trained = read_state(folder)
    n = state["iteration"]
    assert (trained.weights["weight"] == n).all()
    assert (state["momentum"] == n).all()
    return n


# ------------------------------------------------------------------------------------------ what they hold


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_weights_round_trip(tmp_path: Path, layout: torch.memory_format) -> None:
    model = models.mnist_resnet().to(memory_format=layout)
    path = tmp_path / "deep" / "model.safetensors"
    checkpoint.save(model, path, {"model": "mnist_resnet", "epoch": 3}, PIXELS)
    loaded, metadata = checkpoint.load(path)
    assert metadata == {"model": "mnist_resnet", "epoch": "3"}
    assert not loaded.training
    for (name, a), b in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b), name
    trained = checkpoint.read(path)
    assert trained.pixels is not None
    for name, tensor in PIXELS.tensors().items():
        assert torch.equal(tensor, trained.pixels.tensors()[name])
    assert trained.recipe == Recipe()


def test_a_state_round_trips_through_the_safe_loader(tmp_path: Path) -> None:
    save_numbered(tmp_path, 3)
    save_numbered(tmp_path, 12)
    assert number(tmp_path) == 12
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last-12.safetensors", STATE]


# ------------------------------------------------------------------------------------------ kills


def in_child(action: Callable[[], None]) -> int:
    """Runs `action` in a forked process; its exit code."""
    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def dying_at(step: int, action: Callable[[], None]) -> None:
    """Runs `action`, and dies at its `step`-th change of the disk: half-way through a write, else before it."""
    left = [step]

    def due() -> bool:
        left[0] -= 1
        return left[0] < 0

    def patched(function: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            if due():
                os._exit(9)
            return function(*args, **kwargs)

        return run

    real_open = builtins.open

    def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = real_open(path, mode, *args, **kwargs)
        if "w" not in mode:
            return file
        if due():
            os._exit(9)

        class Half:
            def write(self, content: bytes) -> None:
                if due():
                    file.write(content[: len(content) // 2])
                    file.flush()
                    os._exit(9)
                file.write(content)

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

            def __enter__(self) -> Half:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

        return Half()

    builtins.open = opened
    os.fsync, os.replace, os.unlink = patched(os.fsync), patched(os.replace), patched(os.unlink)
    action()
    os._exit(0)


def test_a_kill_at_any_step_of_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """At each step the old one or the new, and the run can save again."""
    found = []
    for step in range(100):
        folder = tmp_path / str(step)
        save_numbered(folder, 1)
        code = in_child(lambda step=step, folder=folder: dying_at(step, lambda: save_numbered(folder, 2)))  # type: ignore[misc]
        if code == 0:
            break
        assert code == 9
        found.append(number(folder))
        save_numbered(folder, 3)
        assert sorted(p.name for p in folder.iterdir()) == ["last-3.safetensors", STATE]
    assert found == sorted(found)  # old, old, ..., new
    assert {*found} == {1, 2}
    assert len(found) >= 11  # open, write, sync, replace, sync of two files, and an unlink


@pytest.mark.parametrize("delay", [0.02, 0.05, 0.11, 0.17])
def test_a_kill_while_saving_again_and_again(delay: float, tmp_path: Path) -> None:
    def save_on() -> None:
        for i in range(1, 100_000):
            save_numbered(tmp_path, i)
            (tmp_path / "done").write_text(str(i))

    process = multiprocessing.get_context("fork").Process(target=save_on)
    process.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "done").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    process.join()
    text = (tmp_path / "done").read_text()
    assert number(tmp_path) >= int(text or 1)


# ------------------------------------------------------------------------------------------ full disks


@pytest.fixture
def at_most_4k() -> Iterator[None]:
    """No file grows beyond 4 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refused(folder: Path) -> str:
    """The message of a save that fails and leaves everything as it was."""
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(SaveError) as caught:
        save_numbered(folder, 2)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert number(folder) == 1
    return str(caught.value)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_numbered(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        message = refused(tmp_path)
    name = tmp_path / "last-2.safetensors"
    assert message == f"cannot save {name}: No space left on device; what was saved before is as it was"
    save_numbered(tmp_path, 2)  # once there is room
    assert number(tmp_path) == 2


@pytest.mark.usefixtures("at_most_4k")
def test_a_limit_on_files(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match=r"best.safetensors: File too large; what was saved"):
        checkpoint.save(models.mnist_resnet(), tmp_path / BEST, {"model": "mnist_resnet"})
    assert list(tmp_path.iterdir()) == []


def test_a_full_file_system(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    try:
        save_numbered(tmp_path, 1)
        assert "No space left on device" in refused(tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_no_permission(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match=r"cannot save .*(Not a directory|File exists)"):
        checkpoint.write(tmp_path / "file" / "x", b"")


# ------------------------------------------------------------------------------------------ damage


def test_bad_weights_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoint.load(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        checkpoint.load(path)
    checkpoint.save(nn.Linear(2, 2), path, {})
    with pytest.raises(CheckpointError, match="does not say which model"):
        checkpoint.load(path)
    checkpoint.save(nn.Linear(2, 2), path, {"model": "mnist_resnet"})
    with pytest.raises(CheckpointError, match="does not hold the weights of mnist_resnet"):
        checkpoint.load(path)
    for recipe in ('{"lr": "x"}', "{"):
        checkpoint.save(nn.Linear(2, 2), path, {"model": "mnist_resnet", "recipe": recipe})
        with pytest.raises(CheckpointError, match=r"x\.safetensors: "):
            checkpoint.load(path)
    checkpoint.save(models.mnist_resnet(), path, {"model": "mnist_resnet"})
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        checkpoint.load(path)


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


def test_every_damage_of_a_state_is_noticed(tmp_path: Path) -> None:
    """A bit flipped anywhere in either file, or a file cut anywhere: an error that names it, or no effect."""
    good = tmp_path / "good"
    save_numbered(good, 7)
    for name in (STATE, "last-7.safetensors"):
        content = (good / name).read_bytes()
        cuts = [content[: len(content) * i // 8] for i in range(8)]
        for damaged in [*cuts, *(flipped(content, at) for at in range(3, len(content), len(content) // 40))]:
            folder = tmp_path / "bad"
            shutil.copytree(good, folder)
            (folder / name).write_bytes(damaged)
            message = ""
            try:
                found = number(folder)
            except CheckpointError as error:
                found, message = 7, str(error)
            assert found == 7  # in padding, or where nothing is read
            assert not message or str(folder) in message
            assert message or damaged not in cuts
            shutil.rmtree(folder)


def test_a_state_without_its_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no run to go on with in .*: there is no last\.pt"):
        read_state(tmp_path)
    save_numbered(tmp_path, 7)
    (tmp_path / "last-7.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*last-7"):
        read_state(tmp_path)


def test_a_state_runs_nothing(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"weights": Harmful()}, tmp_path / STATE)
    with pytest.raises(CheckpointError, match=r"last\.pt is no checkpoint of a run"):
        read_state(tmp_path)
    (tmp_path / STATE).write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(CheckpointError, match=r"last\.pt is no checkpoint of a run"):
        read_state(tmp_path)
    assert not (tmp_path / "made").exists()
