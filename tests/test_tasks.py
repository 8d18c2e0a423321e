import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from adq_search.errors import TaskError
from adq_search.tasks import DatasetPart, Task, TensorPart, as_part, load_task, split_indices
from adq_search.tasks.cifar10 import crop_and_flip


def rows(part):
    return {bytes(x.numpy().tobytes()) for batch in part.batches(64) for x in batch.inputs}


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_embedded_tasks_have_disjoint_parts_and_a_network_that_fits(name):
    task = load_task(name)
    n = len(task.train) + len(task.validation) + len(task.test)
    seen = rows(task.train) | rows(task.validation) | rows(task.test)
    assert len(seen) == n  # these data sets hold no image twice, so parts share none
    assert task.make_network().eval()(task.example()).shape == (1, task.n_classes)


def test_parts_do_not_depend_on_global_randomness():
    first = load_task("digits").fingerprint()
    torch.manual_seed(123)
    assert load_task("digits").fingerprint() == first


def test_shuffled_batches_cover_every_sample_once_and_never_train_on_one():
    part = TensorPart(torch.arange(65.0).unsqueeze(1), torch.zeros(65))
    batches = list(part.batches(32, seed=3))
    assert sorted(int(i) for b in batches for i in b.indices) == list(range(65))
    assert [len(b.inputs) for b in batches] == [32, 33]
    assert all(torch.equal(b.inputs[:, 0], b.indices.float()) for b in batches)
    again = list(part.batches(32, seed=3))
    assert all(torch.equal(a.indices, b.indices) for a, b in zip(batches, again))


def test_dataset_part_gives_what_the_tensor_part_gives():
    inputs, targets = torch.randn(10, 3), torch.arange(10)
    fast = list(TensorPart(inputs, targets).batches(4, seed=1))
    slow = list(DatasetPart(TensorDataset(inputs, targets)).batches(4, seed=1))
    for a, b in zip(fast, slow, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_fingerprint_follows_content():
    x, y = torch.randn(8, 2), torch.arange(8)
    assert TensorPart(x, y).fingerprint() == TensorPart(x.clone(), y.clone()).fingerprint()
    assert TensorPart(x + 1, y).fingerprint() != TensorPart(x, y).fingerprint()
    assert TensorPart(x, y.flip(0)).fingerprint() != TensorPart(x, y).fingerprint()


def test_split_is_disjoint_and_refuses_too_much():
    parts = split_indices(10, (5, 3, 2), seed=0)
    assert sorted(torch.cat(parts).tolist()) == list(range(10))
    with pytest.raises(TaskError, match="need 11, but there are 10"):
        split_indices(10, (6, 5), seed=0)


def test_wrong_sources_are_refused():
    with pytest.raises(TaskError, match="this is a list"):
        as_part([1, 2])
    with pytest.raises(TaskError, match="as many targets as inputs"):
        TensorPart(torch.zeros(3, 1), torch.zeros(2))


@pytest.mark.parametrize(
    ("reference", "match"),
    [
        ("digit", "Did you mean 'digits'"),
        ("no.such.module:make", "cannot be imported"),
        ("math:pie", "Did you mean 'pi'"),
        ("math:sqrt", "does not take these options"),
        ("builtins:dict", "must return an adq_search.tasks.Task"),
    ],
)
def test_unknown_tasks_are_refused_with_a_hint(reference, match):
    with pytest.raises(TaskError, match=match):
        load_task(reference)


def test_options_the_factory_does_not_know_are_refused():
    with pytest.raises(TaskError, match="does not take these options"):
        load_task("digits", {"colour": "red"})


def write_cifar10(folder, n_per_file=20):
    """Write the data set's own format: pickled batches of (n, 3072) bytes."""
    base = folder / "cifar-10-batches-py"
    base.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        content = {
            "data": random.integers(0, 256, (n_per_file, 3072), dtype=np.uint8),
            "labels": random.integers(0, 10, n_per_file).tolist(),
        }
        (base / name).write_bytes(pickle.dumps(content))
    labels = [f"class{i}" for i in range(10)]
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": labels}))


def test_cifar10_reads_its_real_format(tmp_path, monkeypatch):
    write_cifar10(tmp_path)
    # torchvision checks the official files' digests; ours are small stand-ins of the same format
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    task = load_task("cifar10_resnet20", {"root": str(tmp_path), "n_validation": 30})
    assert [len(p) for p in (task.train, task.validation, task.test)] == [70, 30, 20]
    batch = next(task.train.batches(8, seed=0))
    assert batch.inputs.shape == (8, 3, 32, 32)
    assert batch.inputs.dtype == torch.float32
    assert task.make_network().eval()(batch.inputs).shape == (8, 10)
    assert not rows(task.train) & rows(task.validation)


def test_cifar10_that_is_absent_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(TaskError, match=f"CIFAR-10 is not at {tmp_path}"):
        load_task("cifar10_resnet20", {"root": str(tmp_path)})


def write_image_folders(folder, n_classes=2, n_images=4):
    random = np.random.default_rng(0)
    for part in ("train", "val"):
        for c in range(n_classes):
            place = folder / part / f"n{c:08d}"
            place.mkdir(parents=True)
            for i in range(n_images):
                pixels = random.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.JPEG")


def test_imagenet_reads_class_folders(tmp_path):
    write_image_folders(tmp_path)
    options = {"root": str(tmp_path), "n_validation": 3, "n_loaders": 0, "network": "resnet18"}
    task = load_task("imagenet", options)
    assert [len(p) for p in (task.train, task.validation, task.test)] == [5, 3, 8]
    batch = next(task.validation.batches(2))
    assert batch.inputs.shape == (2, 3, 224, 224)
    assert task.make_network().fc.out_features == 2
    assert task.validation.fingerprint() == task.validation.fingerprint()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"network": "resnet19"}, "Did you mean 'resnet1"),
        ({"root": "/nowhere"}, "'train' folder is not at /nowhere"),
    ],
    ids=["network", "folder"],
)
def test_imagenet_refuses_what_is_not_there(options, match):
    with pytest.raises(TaskError, match=match):
        load_task("imagenet", options)


def test_augmentation_moves_images_by_at_most_four_pixels_and_mirrors_some():
    image = torch.zeros(64, 1, 32, 32)
    image[:, :, 16, 10] = 1.0
    moved = crop_and_flip(image, torch.Generator().manual_seed(0))
    at = moved.flatten(1).argmax(dim=1)
    row, column = at // 32, at % 32
    assert moved.sum() == 64
    assert int((row - 16).abs().max()) <= 4
    as_it_was = (column - 10).abs() <= 4
    mirrored = (column - (31 - 10)).abs() <= 4
    assert bool((as_it_was | mirrored).all())
    assert 10 < int(mirrored.sum()) < 54
    again = crop_and_flip(image, torch.Generator().manual_seed(0))
    assert torch.equal(moved, again)


def test_a_task_needs_two_classes():
    part = (torch.zeros(4, 2), torch.zeros(4))
    with pytest.raises(TaskError, match="at least 2 classes"):
        Task("t", torch.nn.Identity, part, part, part, n_classes=1)
