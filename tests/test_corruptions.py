"""Corruptions: the library's, repeatable, gray and small; ImageNet-C's errors from their rows."""

import json
import random
import sys
from statistics import mean

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from timm_structdrop.analysis import draw_corruption_curves
from timm_structdrop.errors import UserError
from timm_structdrop.evaluation import (
    CORRUPTIONS,
    PAPER_CORRUPTIONS,
    CorruptedDataset,
    corrupt,
    corruption_errors,
    corruption_table,
    parse_corruptions,
    parse_severities,
    read_corruption_rows,
    write_results,
)

imagecorruptions = pytest.importorskip(
    "imagecorruptions", reason="imagecorruptions-imaug is not installed"
)
DETERMINISTIC = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate")
RANDOM = tuple(n for n in CORRUPTIONS if n not in (*DETERMINISTIC, "jpeg_compression"))


def photo(*shape: int) -> np.ndarray:
    """A smooth picture with some texture, with values away from both ends."""
    rows, columns = np.indices(shape[:2])
    smooth = 128 + 60 * np.sin(rows / 5) * np.cos(columns / 7)
    texture = np.random.default_rng(0).normal(0, 8, shape)
    return np.clip(smooth.reshape(*shape[:2], *[1] * (len(shape) - 2)) + texture, 0, 255).astype(
        np.uint8
    )


def test_the_names_are_those_of_imagenet_c():
    assert list(CORRUPTIONS) == imagecorruptions.get_corruption_names("common")
    groups = [imagecorruptions.get_corruption_names(group) for group in ("noise", "blur")]
    assert list(PAPER_CORRUPTIONS) == [name for group in groups for name in group]


@pytest.mark.parametrize("corruption", [*DETERMINISTIC, "jpeg_compression"])
def test_corruptions_without_chance_are_the_librarys(corruption):
    image = photo(40, 33, 3)
    for severity in (1, 5):
        expected = imagecorruptions.corrupt(image, severity, corruption)
        assert np.array_equal(corrupt(image, corruption, severity, 7), expected)
        assert (expected != image).mean() > 0.1


@pytest.mark.parametrize("corruption", RANDOM)
def test_random_corruptions_depend_on_the_seed_alone(corruption):
    image = photo(32, 36, 3)
    np.random.seed(5)
    random.seed(5)
    state, other = np.random.get_state()[1].copy(), random.getstate()
    first = corrupt(image, corruption, 3, (1, 2))
    assert np.array_equal(np.random.get_state()[1], state)
    assert random.getstate() == other
    np.random.seed(6)
    assert np.array_equal(corrupt(image, corruption, 3, (1, 2)), first)
    assert not np.array_equal(corrupt(image, corruption, 3, (1, 3)), first)
    assert np.array_equal(image, photo(32, 36, 3))


@pytest.mark.parametrize("shape", [(64, 64), (64, 64, 1), (64, 64, 3)])
def test_noise_has_the_strength_of_imagenet_c(shape):
    """Also on gray images, where averaging three noisy channels would weaken it."""
    image = np.full(shape, 128, dtype=np.uint8)
    for severity, sigma in ((1, 0.08), (2, 0.12)):
        change = corrupt(image, "gaussian_noise", severity).astype(float) - 128
        assert change.std() == pytest.approx(255 * sigma, rel=0.06)
    for severity, share in ((1, 0.03), (5, 0.27)):
        changed = (np.abs(corrupt(image, "impulse_noise", severity) - 128.0) > 100).mean()
        assert changed == pytest.approx(share, abs=4 * (share / image.size) ** 0.5)
    spread = corrupt(image, "shot_noise", 1).astype(float).std()
    assert spread == pytest.approx(255 * (128 / 255 / 60) ** 0.5, rel=0.06)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_gray_and_small_images(corruption):
    for shape in ((8, 8), (13, 9, 1), (8, 17, 3), (32, 16)):
        image = photo(*shape)
        found = corrupt(image, corruption, 5, 3)
        assert found.shape == shape
        assert found.dtype == np.uint8
        assert not np.array_equal(found, image)
    column = photo(16, 16, 1)
    assert np.array_equal(
        corrupt(column, corruption, 2, 1)[..., 0], corrupt(column[..., 0], corruption, 2, 1)
    )


def test_images_that_cannot_be_corrupted():
    with pytest.raises(UserError, match=r"pixelate at severity 5 needs larger images; got 2 x 3"):
        corrupt(photo(2, 3), "pixelate", 5)
    with pytest.raises(UserError, match=r"gray or RGB images .*; got \(8, 8, 4\)"):
        corrupt(photo(8, 8, 4), "contrast", 1)
    with pytest.raises(UserError, match=r"severities must be 1 to 5, .*; got 6"):
        corrupt(photo(8, 8), "contrast", 6)
    with pytest.raises(UserError, match=r"got 'all'"):
        corrupt(photo(8, 8), "all", 1)


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions.corruptions", None)
    with pytest.raises(UserError, match=r'pip install "timm-structdrop\[robustness\]"'):
        corrupt(photo(8, 8), "contrast", 1)


def test_names_and_severities_of_flags():
    assert parse_corruptions("all") == CORRUPTIONS
    assert parse_corruptions("paper") == PAPER_CORRUPTIONS
    assert parse_corruptions("fog, shot_noise,fog") == ("shot_noise", "fog")
    assert parse_corruptions("snow,paper") == (*PAPER_CORRUPTIONS, "snow")
    with pytest.raises(UserError, match=r"of gaussian_noise, .*; got 'fogg' \(nearest: fog"):
        parse_corruptions("snow,fogg")
    assert parse_severities("1-5") == (1, 2, 3, 4, 5)
    assert parse_severities("5, 1,2-3") == (1, 2, 3, 5)
    for text in ("0", "6", "1-6", "5-1", "", "x", "1,,2", "-1", "1-"):
        with pytest.raises(UserError, match="severities must be 1 to 5, as 1-5 or 1,3,5; got"):
            parse_severities(text)


class Photos(Dataset):
    """Nine uint8 tensors (3, 8, 10)."""

    transform = None

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(np.roll(photo(8, 10, 3), index, 0)).permute(2, 0, 1), index


def test_a_sample_depends_on_its_index_and_not_on_the_workers():
    data = CorruptedDataset(Photos(), seed=4)
    for workers in (0, 2):
        settings = {"persistent_workers": True} if workers else {}
        loader = DataLoader(data, 4, num_workers=workers, **settings)
        for name, severity in (("shot_noise", 2), ("glass_blur", 3), (None, 1), ("shot_noise", 5)):
            data.choose(name, severity)
            found = torch.cat([images for images, _ in loader])
            for index, (image, _) in enumerate(Photos()[i] for i in range(9)):
                expected = image.permute(1, 2, 0).numpy()
                if name is not None:
                    seed = (4, index, CORRUPTIONS.index(name), severity)
                    expected = corrupt(expected, name, severity, seed)
                assert np.array_equal(found[index].permute(1, 2, 0).numpy(), expected)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


def test_data_sets_that_cannot_be_corrupted():
    with pytest.raises(UserError, match="map-style data set"):
        CorruptedDataset(Stream())
    with pytest.raises(UserError, match="seed must be at least 0; got -1"):
        CorruptedDataset(Photos(), seed=-1)


def some_rows(scale: float = 1.0, names: tuple[str, ...] = ("fog", "snow")) -> list[dict]:
    errors = {("none", 0): 5.0}
    errors.update({(n, s): scale * (7 + 10 * i + s) for i, n in enumerate(names) for s in (1, 3)})
    return [
        {"model": "m", "corruption": n, "severity": s, "top1": 100 - e, "top1_err": e, "top5": 99}
        for (n, s), e in errors.items()
    ]


def test_errors_by_hand():
    found = corruption_errors(some_rows())
    fog, snow = mean([8, 10]), mean([18, 20])
    assert found == {
        "mean_corruption_error": mean([fog, snow]),
        "corruption_error": {"fog": fog, "snow": snow},
    }
    found = corruption_errors(some_rows(), some_rows(2.0))
    assert found["mce"] == pytest.approx(50)
    relative = [(8 - 5 + 10 - 5) / (16 - 5 + 20 - 5), (18 - 5 + 20 - 5) / (36 - 5 + 40 - 5)]
    assert found["relative_mce"] == pytest.approx(100 * mean(relative), abs=1e-4)
    own = corruption_errors(some_rows(), some_rows())
    assert (own["mce"], own["relative_mce"]) == (100, 100)
    assert corruption_errors(some_rows(), some_rows(0.5))["relative_mce"] is None


def test_baselines_that_do_not_fit(tmp_path):
    with pytest.raises(UserError, match="it has no snow at severity 1"):
        corruption_errors(some_rows(), some_rows(names=("fog",)))
    with pytest.raises(UserError, match="must make an error under fog; its error is 0"):
        corruption_errors(some_rows(), some_rows(0.0))
    with pytest.raises(UserError, match="must be an existing file"):
        read_corruption_rows(tmp_path / "gone.csv")
    for text in ("model,top1\nx,3\n", "{}", "[]", '{"rows": 3}', "\x00", ""):
        (tmp_path / "other").write_text(text)
        with pytest.raises(UserError, match="the results of a baseline must be"):
            read_corruption_rows(tmp_path / "other")
    write_results(tmp_path / "two", [{"rows": some_rows()}, {"rows": some_rows()}])
    with pytest.raises(UserError, match=r"must be one model's.*; got 10 rows"):
        read_corruption_rows(tmp_path / "two")


def test_results_are_read_as_they_were_written(tmp_path):
    result = {"model": "m", "top1": 95.0, "rows": some_rows()}
    for format in ("csv", "json"):
        write_results(tmp_path / format, result, format)
        found = read_corruption_rows(tmp_path / format)
        assert corruption_errors(some_rows(2.0), found)["mce"] == pytest.approx(200)
    assert json.loads((tmp_path / "json").read_text()) == result


def test_table_and_curves():
    lines = corruption_table(some_rows()).splitlines()
    assert lines[0].split() == ["top-1", "%", "sev.", "1", "sev.", "3", "mean"]
    assert lines[1].split() == ["without", "corruption", "95.00"]
    assert lines[2].split() == ["fog", "92.00", "90.00", "91.00"]
    assert lines[4].split() == ["mean", "87.00", "85.00", "86.00"]
    three = some_rows(2.0, ("fog", "snow", "frost"))
    figure = draw_corruption_curves({"one": three, "two": some_rows()})
    panels = {axis.get_title(): axis.get_lines() for axis in figure.axes if axis.get_title()}
    assert list(panels) == ["fog", "snow", "frost", "mean over corruptions"]
    assert [len(lines) for lines in panels.values()] == [2, 2, 1, 2]
    assert panels["fog"][0].get_xydata().tolist() == [[0, 95], [1, 84], [3, 80]]
    # over fog and snow, which both have
    means = [line.get_xydata().tolist() for line in panels["mean over corruptions"]]
    assert means == [[[0, 95], [1, 74], [3, 70]], [[0, 95], [1, 87], [3, 85]]]
