"""Small images: the next pixel, or the class."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from einlinear.lab.data.rows import read_rows
from einlinear.lab.data.task import Examples, Sequences, fingerprint, held_out, sent
from einlinear.lab.extras import extra

HELD_OUT = 0.2  # share of the images kept for validation: the digits are only 1797


def pixels(*, data_seed: int = 0, limit: int = 2**16) -> Sequences:
    """next-pixel prediction on scikit-learn's 8x8 digits: 17 levels, 64 pixels after a start token"""
    images, _ = _digits()
    levels = torch.from_numpy(images).flatten(1)
    start = 17
    records = torch.cat([torch.full((len(levels), 1), start, dtype=torch.uint8), levels], dim=1)
    held = _held_out(images, data_seed)
    train, validation = records[~held].flatten(), records[held].flatten()
    return Sequences(
        name="pixels",
        description=f"next pixel of 8x8 digits: {len(images)} images, {int(held.sum())} of them held out",
        fingerprint=fingerprint("pixels", limit, train, validation),
        vocabulary=start + 1,
        context=levels.shape[1],
        train=train,
        validation=validation,
        limit=limit,
        record=records.shape[1],
    )


def digits(*, data_seed: int = 0, limit: int = 2**16) -> Examples:
    """classification of scikit-learn's 8x8 digits, shifted by a pixel and with a little noise"""
    images, labels = _digits()
    return _classification("images", images, labels, data_seed, limit, shift=1, flip=False)


def cifar10(
    *, paths: Sequence[str | Path] = (), download: bool = False, data_seed: int = 0, limit: int = 2**16
) -> Examples:
    """classification of CIFAR-10: parquet rows with "img" and "label", or by download; a fifth held out"""
    with extra("hf"):
        from PIL import Image
    images, labels = [], []
    for row in read_rows("cifar10", "uoft-cs/cifar10", ["img", "label"], paths, download):
        image = row["img"]
        if isinstance(image, dict):  # a file without the dataset library's own metadata: still encoded
            image = Image.open(io.BytesIO(image["bytes"]))
        images.append(np.asarray(image.convert("RGB")))
        labels.append(row["label"])
    if len({image.shape for image in images}) != 1:
        raise ValueError("Loading the task 'cifar10': it needs images of one size. Check the files given.")
    stacked, classes = np.stack(images), np.array(labels)
    return _classification("cifar10", stacked, classes, data_seed, limit, shift=2, flip=True)


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """UCI's optical digits: 1797 images, uint8 [count, 8, 8, 1] with levels 0 to 16, and their classes."""
    with extra("lab"):
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    images, labels = load_digits(return_X_y=True)
    return images.astype(np.uint8).reshape(-1, 8, 8, 1), labels


def _held_out(images: np.ndarray, data_seed: int) -> Tensor:
    """By content, so that equal images go to the same side."""
    return held_out([image.tobytes() for image in images], [1] * len(images), HELD_OUT, data_seed)


def _classification(
    name: str, images: np.ndarray, labels: np.ndarray, data_seed: int, limit: int, *, shift: int, flip: bool
) -> Examples:
    """Classification of uint8 images [count, height, width, channels] with integer labels [count]."""
    held = _held_out(images, data_seed)
    every, classes = torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))
    train, train_classes = every[~held], classes[~held]
    validation, validation_classes = every[held], classes[held]
    mean, std = float(train.double().mean()), float(train.double().std())
    return Examples(
        name=name,
        description=f"classes of {len(images)} images, {len(validation)} of them held out",
        fingerprint=fingerprint(name, limit, train, train_classes, validation, validation_classes),
        d_in=train[0].numel(),
        d_out=int(classes.max()) + 1,
        loss="cross-entropy",
        sample=Augmented(train, train_classes, mean, std, shift, flip),
        validation=(_standardised(validation, mean, std)[:limit], validation_classes[:limit]),
    )


def _standardised(images: Tensor, mean: float, std: float) -> Tensor:
    return ((images.float() - mean) / std).flatten(1)


@dataclass(frozen=True)
class Augmented:
    """Random ones of some images, moved by up to `shift` pixels, half mirrored if `flip`, with noise of 0.1 std.

    Images are uint8 [count, height, width, channels], with levels of this mean and standard deviation; classes [count].
    """

    images: Tensor
    classes: Tensor
    mean: float
    std: float
    shift: int
    flip: bool

    def __call__(self, random: np.random.Generator, size: int) -> tuple[Tensor, Tensor]:
        _, height, width, channels = self.images.shape
        chosen = self._drawn(random.integers(0, len(self.images), size))
        padded = torch.nn.functional.pad(self.images[chosen], [0, 0, *[self.shift] * 4])
        down, right = self._drawn(random.integers(0, 2 * self.shift + 1, (2, size, 1)))
        rows, columns = down + self._range(height), right + self._range(width)
        if self.flip:
            mirrored = self._drawn(random.random((size, 1)) < 0.5)
            columns = torch.where(mirrored, columns.flip(1), columns)
        moved = padded[self._range(size)[:, None, None], rows[:, :, None], columns[:, None, :]]
        noise = self._drawn(random.standard_normal((size, height * width * channels), dtype=np.float32))
        return _standardised(moved, self.mean, self.std) + 0.1 * noise, self.classes[chosen]

    def on(self, device: torch.device) -> Self:
        """With the images on a device."""
        return replace(self, images=self.images.to(device), classes=self.classes.to(device))

    def _drawn(self, numbers: np.ndarray) -> Tensor:
        return sent(torch.from_numpy(numbers), self.images.device)

    def _range(self, count: int) -> Tensor:
        return torch.arange(count, device=self.images.device)
