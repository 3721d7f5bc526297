"""What a network sees of an image, against plain loops and PIL; order, statistics, and independence of workers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import striped, write_images
from torch import Tensor

from resnet_fused.data import DataError, ImageFolder, Images, Pixels, load
from resnet_fused.data.loading import batches, in_batches, measure_pixels, order
from resnet_fused.data.views import Augment, HeldOutView, TrainingView, stream

image_module = pytest.importorskip("PIL.Image")

PLAIN = Pixels.given([0.0], [1 / 255])  # leaves 0 to 255


def digits(n: int = 40) -> Images:
    pixels, labels = striped(n)
    return Images(pixels.unsqueeze(1), labels.long(), tuple("0123456789"))


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    train, _ = load("images", write_images(tmp_path, each=5, size=(48, 40)))
    assert isinstance(train, ImageFolder)
    return train


def training_batch(view: TrainingView, rows: list[int]) -> tuple[Tensor, Tensor]:
    found = view.__getitems__(rows)
    assert not isinstance(found, DataError)
    return found


# ------------------------------------------------------------------------------------------ training


def test_without_variation_images_are_normalised_alone() -> None:
    images, pixels = digits(), Pixels.given([0.1307], [0.3081])
    x, labels = training_batch(TrainingView(images, pixels, Augment(), 0, 0), [7, 3])
    torch.testing.assert_close(x, (images.pixels[[7, 3]].float() / 255 - 0.1307) / 0.3081)
    assert labels.tolist() == images.labels[[7, 3]].tolist()


def test_padded_crops_and_mirror_images() -> None:
    """Each is one of the crops of the padded image, or of its mirror image; over many draws, all of them come."""
    image = digits(1)
    pad = 2
    padded = F.pad(PLAIN(image.pixels), (pad, pad, pad, pad))[0]
    crops = {}
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            crop = padded[:, top : top + 28, left : left + 28]
            crops[top, left, False], crops[top, left, True] = crop, crop.flip(2)
    seen: dict[tuple, int] = dict.fromkeys(crops, 0)
    for epoch in range(600):
        x, _ = training_batch(TrainingView(image, PLAIN, Augment(pad, flip=True), 0, epoch), [0])
        matches = [key for key, crop in crops.items() if torch.equal(crop, x[0])]
        assert len(matches) == 1
        seen[matches[0]] += 1
    assert min(seen.values()) > 0
    mirrored = sum(n for (*_, flip), n in seen.items() if flip)
    assert 240 < mirrored < 360


def test_crops_of_scaled_images(folder: ImageFolder) -> None:
    """Every training crop lies within the image at a scale of the range, as PIL scales it."""
    augment = Augment(size=24, scale=(28, 36))
    whole = image_module.open(folder.paths[0]).convert("RGB")
    sides = set()
    for epoch in range(20):
        view = TrainingView(folder, PLAIN, augment, 0, epoch)
        x, _ = training_batch(view, [0])
        assert x.shape == (1, 3, 24, 24)
        scale, top, left, _ = view.uniform[0].tolist()
        shorter = 28 + int(scale * 9)
        sides.add(shorter)
        height, width = shorter, round(48 * shorter / 40)
        scaled = torch.frombuffer(bytearray(whole.resize((width, height), 2).tobytes()), dtype=torch.uint8)
        scaled = scaled.view(height, width, 3).permute(2, 0, 1)
        y, z = int(top * (height - 23)), int(left * (width - 23))
        # Two roundings apart: of the whole image's passes, and of the crop's.
        assert (x[0] - scaled[:, y : y + 24, z : z + 24].float()).abs().max() < 2.1
    assert len(sides) > 4


def test_colours_move_along_their_axes(folder: ImageFolder) -> None:
    pixels = measure_pixels(folder, 24, per_pixel=False)
    still = TrainingView(folder, pixels, Augment(size=24, scale=(28, 28)), 0, 0)
    moving = TrainingView(folder, pixels, Augment(size=24, scale=(28, 28), colour=0.1), 0, 0)
    assert moving.normal is not None
    rows = [0, 3, 9]
    moved = (training_batch(moving, rows)[0] - training_batch(still, rows)[0]) * pixels.std
    for row, shift in zip(rows, moved, strict=True):
        expected = pixels.colours @ (0.1 * moving.normal[row])
        torch.testing.assert_close(shift, expected[:, None, None].expand_as(shift), atol=1e-5, rtol=1e-4)


def test_variation_follows_seed_epoch_and_image() -> None:
    """And neither the batches nor the workers that load them."""
    images, augment = digits(), Augment(4, flip=True)

    def load_epoch(seed: int, epoch: int, size: int, workers: int = 0) -> Tensor:
        view = TrainingView(images, PLAIN, augment, seed, epoch)
        return torch.cat([x for x, _ in batches(view, in_batches(range(40), size), workers)])

    expected = load_epoch(0, 0, 8)
    assert torch.equal(load_epoch(0, 0, 5), expected)
    assert torch.equal(load_epoch(0, 0, 8, workers=2), expected)
    assert not torch.equal(load_epoch(0, 1, 8), expected)
    assert not torch.equal(load_epoch(1, 0, 8), expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_in_one_line(workers: int, folder: ImageFolder) -> None:
    folder.paths[4].write_bytes(folder.paths[4].read_bytes()[:300])
    view = TrainingView(folder, PLAIN, Augment(size=24, scale=(28, 36)), 0, 0)
    with pytest.raises(DataError, match=r"c0/4\.png is damaged: ") as caught:
        list(batches(view, [[0, 1], [3, 4]], workers))
    assert "\n" not in str(caught.value)
    folder.paths[4].write_bytes(b"no image")
    with pytest.raises(DataError, match=r"c0/4\.png is no image: "):
        list(batches(view, [[4]], workers))


# ------------------------------------------------------------------------------------------ tests


def views_of(view: HeldOutView, row: int) -> list[Tensor]:
    found = view.__getitems__([row])
    assert not isinstance(found, DataError)
    return found[0][0]


def test_one_crop_of_the_centre(folder: ImageFolder) -> None:
    (x,) = views_of(HeldOutView(folder, PLAIN, 28), 2)
    scaled = image_module.open(folder.paths[2]).convert("RGB").resize((38, 32), 2)
    expected = torch.frombuffer(bytearray(scaled.tobytes()), dtype=torch.uint8).view(32, 38, 3).permute(2, 0, 1)
    assert (x - expected[:, 2:30, 5:33].float()).abs().max() < 1.1
    images = digits()
    (whole,) = views_of(HeldOutView(images, PLAIN, 28), 2)
    torch.testing.assert_close(whole, images.pixels[2].float())


def test_ten_crops(folder: ImageFolder) -> None:
    views = views_of(HeldOutView(folder, PLAIN, 28, "ten"), 2)
    (centre,) = views_of(HeldOutView(folder, PLAIN, 28), 2)
    assert torch.equal(views[0], centre)
    assert len(views) == 10
    for crop, mirrored in zip(views[::2], views[1::2], strict=True):
        assert torch.equal(crop.flip(2), mirrored)
    whole = torch.zeros(3, 32, 38)  # the corners tile what they cover
    for crop, (y, z) in zip(views[2::2], [(0, 0), (0, 10), (4, 0), (4, 10)], strict=True):
        whole[:, y : y + 28, z : z + 28] = crop
    for crop, (y, z) in zip(views[2::2], [(0, 0), (0, 10), (4, 0), (4, 10)], strict=True):
        assert torch.equal(whole[:, y : y + 28, z : z + 28], crop)
    assert torch.equal(whole[:, 2:30, 5:33], centre)


def test_several_scales(folder: ImageFolder) -> None:
    shapes = [tuple(v.shape) for v in views_of(HeldOutView(folder, PLAIN, 28, "multi", (20, 40, 60)), 0)]
    assert shapes == [(3, 20, 24), (3, 40, 48), (3, 60, 72)]
    images = digits()
    small, same = views_of(HeldOutView(images, PLAIN, 28, "multi", (14, 28)), 0)
    assert small.shape == (1, 14, 14)
    torch.testing.assert_close(same, images.pixels[0].float())


# ------------------------------------------------------------------------------------------ order, statistics


def test_the_order_is_each_image_once_shared_by_processes() -> None:
    """A step's batch is the same set of images however many processes share it."""
    alone = order(41, 3, 5, 1, 0)
    assert sorted(alone) == list(range(41))
    assert alone != order(41, 3, 6, 1, 0)
    assert alone != order(41, 4, 5, 1, 0)
    assert alone == order(41, 3, 5, 1, 0)
    halves = [in_batches(order(41, 3, 5, 2, rank), 4, whole=True) for rank in range(2)]
    for step, whole in enumerate(in_batches(alone, 8, whole=True)):
        assert {*whole} == {*halves[0][step], *halves[1][step]}


def test_batches_are_slices() -> None:
    assert in_batches([4, 2, 3], 2) == [[4, 2], [3]]
    assert in_batches([4, 2, 3], 2, whole=True) == [[4, 2]]
    assert in_batches([4, 2], 2, whole=True) == [[4, 2]]


def test_streams_of_neighbouring_keys_differ() -> None:
    first = {
        torch.rand(1, generator=stream(*key)).item() for key in [(0, 1), (1, 0), (1, 1), (0, 0, 1), (-1,), (2**64,)]
    }
    assert len(first) == 6


@pytest.mark.parametrize("per_pixel", [False, True])
def test_statistics_are_those_of_the_pixels(per_pixel: bool) -> None:
    x = torch.randint(0, 256, (30, 3, 6, 5)).to(torch.uint8)
    x[:, 2] = x[:, 0] // 2  # colours that vary together
    pixels = Pixels.measured(lambda: x.split(7), per_pixel)
    y = pixels(x).double()
    if per_pixel:
        assert pixels.mean.shape == (3, 6, 5)
        assert y.mean(0).abs().max() < 1e-6
        assert torch.equal(pixels.std, torch.ones(3, 1, 1))
    else:
        flat = y.movedim(1, 0).flatten(1)
        assert flat.mean(1).abs().max() < 1e-6
        torch.testing.assert_close(flat.std(1, correction=0), torch.ones(3).double(), atol=1e-5, rtol=0)
    covariance = torch.cov((x.double() / 255).movedim(1, 0).flatten(1), correction=0)
    torch.testing.assert_close((pixels.colours @ pixels.colours.T).double(), covariance, atol=1e-6, rtol=1e-4)


def test_a_mean_image_serves_other_sizes_by_its_mean() -> None:
    mean = torch.rand(3, 4, 4)
    pixels = Pixels(mean, torch.ones(3, 1, 1), torch.zeros(3, 3))
    black = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    torch.testing.assert_close(pixels(black)[0], -mean)
    wide = pixels(torch.zeros(1, 3, 5, 4, dtype=torch.uint8))[0]
    torch.testing.assert_close(wide, -mean.mean((1, 2), keepdim=True).expand(3, 5, 4))
