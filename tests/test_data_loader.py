"""Splits, subsets and the loader: against plain per-image code, torchvision, and counting."""

import numpy as np
import pytest
import torch
from folders import unprivileged
from PIL import Image
from sklearn.datasets import load_digits as load_sklearn_digits
from torchvision.transforms.functional import to_tensor

from data import (
    DATASETS,
    Loader,
    Split,
    balanced_subset,
    digest,
    find_data_dir,
    first_examples,
    hold_out,
    is_sorted,
    load_data,
    to_input,
)
from data.loader import crop_and_flip, random_generator, rows_of
from experiment.build import sample


def random_split(n: int, size: int = 8, classes: int = 10, seed: int = 0) -> Split:
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(256, size=(n, size, size, 3), dtype=np.uint8))
    return Split(images, torch.from_numpy(rng.integers(classes, size=n)))


def numbered_split(n: int, start: int = 0) -> Split:
    """Images that can be told apart by any of their pixels inside the padding; labels are the numbers themselves."""
    numbers = torch.arange(start, start + n)
    pixels = torch.stack([numbers % 256, numbers // 256, torch.full((n,), 7)], dim=1).to(torch.uint8)
    return Split(pixels[:, None, None, :].expand(n, 12, 12, 3).clone(), numbers)


class ListedAuxiliary:
    """Auxiliary data in memory, which notes what is drawn from it."""

    def __init__(self, split: Split):
        self.split = split
        self.drawn = []

    def __len__(self) -> int:
        return len(self.split.labels)

    def rows(self, index: np.ndarray) -> Split:
        self.drawn.append(index)
        return Split(self.split.images[index], self.split.labels[index])


def batches_equal(first, second) -> bool:
    first, second = list(first), list(second)
    return len(first) == len(second) and all(
        torch.equal(x1, x2) and torch.equal(y1, y2) for (x1, y1), (x2, y2) in zip(first, second, strict=True)
    )


def test_to_input_is_torchvisions_to_tensor():
    images = random_split(5).images
    x = to_input(images)
    assert torch.equal(x, torch.stack([to_tensor(image.numpy()) for image in images]))
    assert x.is_contiguous() and x.dtype == torch.float32


def test_every_crop_and_flip_equals_slices_of_the_padded_image():
    shifts = [(top, left, flip) for top in range(9) for left in range(9) for flip in (False, True)]
    images = random_split(len(shifts), size=11).images
    top, left, flip = (torch.tensor(column) for column in zip(*shifts, strict=True))
    out = crop_and_flip(images, top, left, flip).numpy()
    for image, result, (t, lft, mirrored) in zip(images.numpy(), out, shifts, strict=True):
        padded = np.zeros((19, 19, 3), np.uint8)
        padded[4:15, 4:15] = image
        expected = padded[t : t + 11, lft : lft + 11]
        assert np.array_equal(result, expected[:, ::-1] if mirrored else expected)


def test_an_epoch_shows_every_image_once_with_its_label_and_keeps_the_last_partial_batch():
    train = random_split(50)
    loader = Loader(train, 16, seed=0, augment=False)
    batches = list(loader.epoch(0))
    assert len(loader) == 4 and [len(y) for _, y in batches] == [16, 16, 16, 2]
    seen = [(x.numpy().tobytes(), int(label)) for xs, ys in batches for x, label in zip(xs, ys, strict=True)]
    wanted = [(to_tensor(im.numpy()).numpy().tobytes(), int(y)) for im, y in zip(*train, strict=True)]
    assert seen != wanted and sorted(seen) == sorted(wanted)


def test_augmentation_draws_every_shift_and_both_directions_equally_often():
    # One image whose pixels tell their place, many times: the middle pixels of a batch then tell its crops.
    place = torch.stack(torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij"), dim=-1)
    image = torch.cat([place, torch.zeros(16, 16, 1)], dim=-1).to(torch.uint8)
    loader = Loader(Split(image.expand(9000, 16, 16, 3), torch.zeros(9000).long()), 9000, seed=1)
    x = (next(loader.epoch(0))[0] * 255).round().long()
    row, column, right = x[:, 0, 8, 7], x[:, 1, 8, 7], x[:, 1, 8, 8]
    top, flip = row - 8 + 4, right < column
    left = torch.where(flip, column - 8, column - 7) + 4
    for values, count in ((top, 9), (left, 9), (flip.long(), 2)):
        share = torch.bincount(values, minlength=count) / len(values)
        assert len(share) == count and (share * count - 1).abs().max() < 0.15
    # The three are drawn apart from each other.
    assert torch.corrcoef(torch.stack([top, left, flip.long()]).double()).triu(1).abs().max() < 0.05


def test_batches_depend_on_seed_epoch_and_step_alone():
    train = random_split(70)
    whole = list(Loader(train, 16, seed=3).epoch(5))
    later = Loader(train, 16, seed=3)
    list(later.epoch(1))
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002  (global state must not matter)
    for step in range(6):
        assert batches_equal(later.epoch(5, start_step=step), whole[step:])
    assert not batches_equal(later.epoch(6), whole)
    assert not batches_equal(Loader(train, 16, seed=4).epoch(5), whole)


@pytest.mark.parametrize("fraction", [0.0, 0.7])
def test_parts_have_the_rows_of_the_whole_batch_and_read_no_others(fraction):
    """Images, crops and flips; a part for which a batch has no row gets all of it."""
    train, extra = numbered_split(33), numbered_split(40, start=100)
    for parts in (2, 3, 5):
        auxiliaries = [ListedAuxiliary(extra) for _ in range(parts + 1)]
        common = {"seed": 0, "auxiliary_fraction": fraction}
        loaders = [
            Loader(train, 16, part=part, auxiliary=auxiliary if fraction else None, **common)
            for part, auxiliary in zip([(0, 1), *((i, parts) for i in range(parts))], auxiliaries, strict=True)
        ]
        for step, (whole, *pieces) in enumerate(zip(*(loader.epoch(2) for loader in loaders), strict=True)):
            n = len(whole[1])
            assert all(loader.batch_rows(step) == n for loader in loaders)
            for i, piece in enumerate(pieces):
                rows = slice(i, None, parts) if i < n else slice(None)
                assert batches_equal([piece], [(whole[0][rows], whole[1][rows])])
        read = [sum(map(len, auxiliary.drawn)) for auxiliary in auxiliaries]
        assert read[0] == sum(read[1:])


def test_the_rows_of_all_parts_are_the_batch():
    for n, parts in ((16, 1), (16, 3), (5, 5)):
        assert sorted(row for part in range(parts) for row in range(n)[rows_of(n, part, parts)]) == list(range(n))


def test_auxiliary_data_takes_its_share_of_every_batch_and_training_data_the_rest():
    train, extra = numbered_split(100), numbered_split(40, start=100)
    auxiliary = ListedAuxiliary(extra)
    loader = Loader(train, 20, seed=0, auxiliary=auxiliary, auxiliary_fraction=0.7)
    assert len(loader) == 5
    from_train, from_extra = [], []
    for epoch in range(40):
        labels = [y for _, y in loader.epoch(epoch)]
        assert all(len(y) == 20 and (y >= 100).sum() == 14 for y in labels)
        labels = torch.cat(labels)
        here = labels[labels < 100]
        assert len(here.unique()) == len(here) == 30
        from_train.append(here)
        from_extra.append(labels[labels >= 100] - 100)
    assert (torch.bincount(torch.cat(from_train), minlength=100) > 0).all()
    counts = torch.bincount(torch.cat(from_extra), minlength=40)  # 2800 draws, 70 each, standard deviation 8
    assert counts.min() > 35 and counts.max() < 110
    x, y = next(loader.epoch(0))
    middle = (x[:, :, 6, 6] * 255).round().long()
    assert torch.equal(middle[:, 0] + 256 * middle[:, 1], y)
    assert batches_equal(loader.epoch(7, start_step=3), list(loader.epoch(7))[3:])


def test_steps_per_epoch_cuts_an_epoch_short_or_shuffles_again_and_goes_on():
    loader = Loader(random_split(50), 16, seed=0, steps_per_epoch=2)
    assert len(loader) == len(list(loader.epoch(0))) == 2
    # 12 steps of 10 images, of which 4 are auxiliary: 72 of 30 training images, so twice each and 12 of them once more.
    auxiliary = ListedAuxiliary(numbered_split(40, start=100))
    loader = Loader(numbered_split(30), 10, seed=0, auxiliary=auxiliary, auxiliary_fraction=0.4, steps_per_epoch=12)
    labels = [y for _, y in loader.epoch(3)]
    assert len(labels) == 12 and all(len(y) == 10 and (y >= 100).sum() == 4 for y in labels)
    from_train = torch.cat([y[y < 100] for y in labels])
    passes = from_train.split(30)
    assert [len(p.unique()) for p in passes] == [len(p) for p in passes] == [30, 30, 12]
    assert not torch.equal(passes[0], passes[1])
    assert batches_equal(loader.epoch(3, start_step=7), list(loader.epoch(3))[7:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch size 0"),
        ({"auxiliary_fraction": 1.1}, "auxiliary fraction 1.1"),
        ({"auxiliary_fraction": float("nan")}, "auxiliary fraction nan"),
        ({"steps_per_epoch": 0}, "steps per epoch 0: must be at least 1"),
    ],
)
def test_loader_refuses_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Loader(random_split(5), **({"batch_size": 2, "seed": 0} | settings))


def test_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed -1: must not be negative"):
        random_generator(-1, "order")


def test_balanced_subset_is_balanced_repeatable_and_in_order():
    split = numbered_split(1000)
    classes = Split(split.images, split.labels % 7)
    subset = balanced_subset(classes, 100, seed=5)
    counts = torch.bincount(subset.labels)
    assert counts.sum() == 100 and counts.max() - counts.min() == 1
    assert torch.equal(subset.images, balanced_subset(classes, 100, seed=5).images)
    assert not torch.equal(subset.images, balanced_subset(classes, 100, seed=6).images)
    numbers = subset.images[:, 0, 0, 0].long() + 256 * subset.images[:, 0, 0, 1].long()
    assert torch.equal(numbers % 7, subset.labels)
    assert (numbers.diff() > 0).all()


def test_balanced_subset_takes_all_of_a_small_class_and_fills_up_with_the_others():
    labels = torch.tensor([0] * 3 + [1] * 50 + [2] * 47)
    subset = balanced_subset(Split(torch.zeros(100, 2, 2, 3, dtype=torch.uint8), labels), 43, seed=0)
    assert torch.bincount(subset.labels).tolist() == [3, 20, 20]
    everything = balanced_subset(Split(torch.zeros(100, 2, 2, 3, dtype=torch.uint8), labels), 100, seed=0)
    assert torch.equal(everything.labels, labels)


@pytest.mark.parametrize("n", [0, 21])
def test_balanced_subset_refuses_sizes_that_the_split_has_not(n):
    with pytest.raises(ValueError, match=f"subset of {n} examples: must lie between 1 and 20"):
        balanced_subset(random_split(20), n, seed=0)


@pytest.mark.parametrize(("name", "count"), [("cifar10", 1024), ("cifar100", 1024), ("digits", 200)])
def test_hold_out_takes_the_first_images(name, count):
    split = numbered_split(1300)
    train, validation = hold_out(split, name, seed=0)
    assert torch.equal(validation.labels, torch.arange(count))
    assert torch.equal(train.labels, torch.arange(count, 1300))
    assert torch.equal(train.images, split.images[count:])


def test_hold_out_of_tiny_imagenet_is_a_seeded_random_tenth():
    split = numbered_split(2000)
    train, validation = hold_out(split, "tiny-imagenet", seed=0)
    assert len(validation.labels) == 200
    assert torch.equal(torch.cat([train.labels, validation.labels]).sort().values, split.labels)
    assert validation.labels[:100].max() > 500  # not the first ones
    assert torch.equal(validation.labels, hold_out(split, "tiny-imagenet", seed=0)[1].labels)
    assert not torch.equal(validation.labels, hold_out(split, "tiny-imagenet", seed=1)[1].labels)


def test_hold_out_needs_something_left():
    with pytest.raises(ValueError, match="cifar10: cannot hold out 1024 of 1024 training images"):
        hold_out(random_split(1024), "cifar10", seed=0)


def test_digits_are_scikit_learns_scaled_up():
    train, test = load_data("digits")
    assert train.images.shape == (1397, 32, 32, 3) and test.images.shape == (400, 32, 32, 3)
    assert torch.bincount(test.labels).tolist() == [40] * 10
    # The same scaling by another library; the images are all different, so that each tells its label.
    digits = load_sklearn_digits()
    expected = {}
    for image, label in zip(digits.images, digits.target, strict=True):
        large = np.asarray(Image.fromarray(image.astype(np.float32)).resize((32, 32), Image.Resampling.BILINEAR))
        expected[np.rint(large * 255 / 16).astype(np.uint8).tobytes()] = label
    images, labels = torch.cat([train.images, test.images]).numpy(), torch.cat([train.labels, test.labels])
    assert (images == images[..., :1]).all()
    assert {image[..., 0].tobytes(): label for image, label in zip(images, labels.tolist(), strict=True)} == expected


def test_unknown_dataset_is_named_with_those_that_exist():
    with pytest.raises(
        ValueError, match="unknown dataset 'mnist': must be one of cifar10, cifar100, tiny-imagenet, digits"
    ):
        load_data("mnist")


def test_means_and_deviations_of_digits():
    pixels = load_data("digits")[0].images.double() / 255
    assert torch.allclose(pixels.mean((0, 1, 2)), torch.tensor(DATASETS["digits"].mean).double(), atol=1e-4)
    assert torch.allclose(pixels.std((0, 1, 2)), torch.tensor(DATASETS["digits"].std).double(), atol=1e-4)


def test_the_first_examples_of_a_sorted_split_are_of_all_its_classes():
    shuffled = random_split(400)
    order = shuffled.labels.argsort()
    in_order = Split(shuffled.images[order], shuffled.labels[order])
    assert not is_sorted(shuffled) and is_sorted(in_order)
    assert torch.equal(first_examples(shuffled, 20, 0).images, shuffled.images[:20])
    chosen = first_examples(in_order, 20, 0)
    assert chosen.labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert torch.equal(chosen.images, first_examples(in_order, 20, 0).images)
    assert not torch.equal(chosen.images, first_examples(in_order, 20, 1).images)


def test_files_that_were_sorted_one_by_one_are_sorted():
    labels = torch.arange(10).repeat_interleave(20).repeat(5)
    assert is_sorted(Split(labels, labels))
    assert not is_sorted(Split(labels, torch.arange(10).repeat(100)))  # as the digits lie
    assert is_sorted(Split(labels, torch.arange(200).repeat_interleave(2)))  # few of a class
    assert not is_sorted(Split(labels, torch.arange(200)))
    assert not is_sorted(load_data("digits")[0]) and not is_sorted(load_data("digits")[1])


def test_a_number_of_held_out_images_of_a_sorted_set_is_of_all_classes(monkeypatch):
    monkeypatch.setitem(DATASETS, "birds", DATASETS["digits"]._replace(held_out=40))
    labels = torch.arange(10).repeat_interleave(50)
    split = Split(torch.arange(500), labels)
    train, validation = hold_out(split, "birds", seed=0)
    assert validation.labels.bincount().tolist() == [4] * 10
    assert sorted([*train.images.tolist(), *validation.images.tolist()]) == list(range(500))
    _, validation = hold_out(split, "birds", seed=0, by_class=False)
    assert validation.images.tolist() == list(range(40))


def test_held_out_images_of_a_sorted_set_are_judged_by_class_balanced_ones():
    """Tiny-ImageNet's are sorted by class: 256 first ones are of a few classes, and as many as those of all."""
    labels = torch.arange(200).repeat_interleave(50)
    split = Split(torch.zeros(len(labels), 1, 1, 3, dtype=torch.uint8), labels)
    _, validation = hold_out(split, "tiny-imagenet", 0)
    for rules, classes in ((1, 60), (2, 200)):
        number = len(sample(validation, 256, {"rules": rules, "seed": 0}).labels.unique())
        assert number < classes if rules == 1 else number == classes


def test_a_digest_tells_images_and_labels():
    split = random_split(5)
    others = [Split(split.images.flip(0), split.labels), Split(split.images, split.labels + 1)]
    others += [Split(split.images[:4], split.labels[:4])]
    assert len({digest(split), *map(digest, others)}) == 4
    assert digest(split) == digest(Split(split.images.clone(), split.labels.clone()))


def test_data_is_looked_for_where_its_prepared_files_are(tmp_path, monkeypatch, caplog):
    default, stored = tmp_path / "default", tmp_path / "stored"
    monkeypatch.setattr("data.DEFAULT_DATA_DIR", default)

    def prepare(place):
        (place / "cifar-10").mkdir(parents=True)
        for part in ("train", "test"):
            (place / "cifar-10" / f"{part}.npz").touch()

    assert find_data_dir("cifar10", stored) == default and not stored.exists()
    assert "--data-dir" in caplog.text
    stored.mkdir()
    assert find_data_dir("cifar10", stored) == stored  # made ready for it, perhaps
    prepare(default)
    assert find_data_dir("cifar10", stored) == default
    prepare(stored)
    assert find_data_dir("cifar10", stored) == stored
    assert find_data_dir("cifar10", None) == default


def test_a_data_folder_that_is_closed_to_us_is_as_good_as_gone(tmp_path, monkeypatch, caplog):
    """Of somebody else's checkpoint, say."""
    monkeypatch.setattr("data.DEFAULT_DATA_DIR", tmp_path / "default")
    home = tmp_path / "home"
    (home / "data" / "cifar-10").mkdir(parents=True)
    home.chmod(0)
    try:
        with unprivileged():
            assert find_data_dir("cifar10", home / "data") == tmp_path / "default"
    finally:
        home.chmod(0o700)
    assert "--data-dir" in caplog.text
