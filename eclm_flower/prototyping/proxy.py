"""The cloud's proxy data: samples, their sub-tasks, and the batches the stages draw from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from eclm_flower.errors import PrototypingError

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""Augment a batch of inputs ``[B, ...]``."""


class ProxyData:
    """Proxy data with a sub-task for every sample.

    Parameters
    ----------
    data : Dataset
        Map-style; yields ``(x, y, ...)``.
    sub_tasks : sequence of int or Tensor
        ``[len(data)]``, numbered from 0. Under label skew, the label (or group of labels that occur
        together on a device); under feature skew, the environment.
    augment : callable, optional
        Applied to whole training batches.
    device : torch.device, optional
        Where batches are wanted. On a GPU all samples are moved there at once and kept.
    """

    def __init__(
        self,
        data: Dataset[Any],
        sub_tasks: Sequence[int] | Tensor,
        augment: Augment | None = None,
        *,
        device: torch.device | None = None,
    ) -> None:
        self.data = data
        self.sub_tasks = torch.as_tensor(sub_tasks, dtype=torch.int64)
        self.augment = augment
        samples = len(data)  # type: ignore[arg-type]
        if samples == 0 or self.sub_tasks.shape != (samples,):
            raise PrototypingError(
                f"Expected one sub-task for each of {samples} proxy samples, got "
                f"{list(self.sub_tasks.shape)}."
            )
        counts = torch.bincount(self.sub_tasks) if int(self.sub_tasks.min()) >= 0 else None
        if counts is None or int(counts.min()) == 0:
            raise PrototypingError(
                "Expected sub-tasks numbered from 0 without gaps, got "
                f"{sorted(set(self.sub_tasks.tolist()))[:20]}."
            )
        self.num_sub_tasks = len(counts)
        if device is not None and device.type != "cpu":
            (x, y, _), *_ = self.batches([range(samples)])
            self.data = TensorDataset(x.to(device), y.to(device))
        self._rows = [np.flatnonzero(self.sub_tasks == task) for task in range(len(counts))]

    def __len__(self) -> int:
        return len(self.sub_tasks)

    def split(self, share: float) -> tuple[ProxyData, ProxyData]:
        """Part with a share of the samples: the last ones of each sub-task, one at least.

        Returns
        -------
        tuple[ProxyData, ProxyData]
            The first ones, in their order, and the last ones, which are never augmented.

        Raises
        ------
        PrototypingError
            A sub-task has a single sample.
        """
        if min(map(len, self._rows)) < 2:
            raise PrototypingError(
                "Expected at least 2 samples of each sub-task, one of them to be held out."
            )
        kept_back = np.zeros(len(self), dtype=bool)
        for rows in self._rows:
            kept_back[rows[-min(len(rows) - 1, max(1, round(share * len(rows)))) :]] = True
        parts = []
        for own, augment in ((~kept_back, self.augment), (kept_back, None)):
            rows = np.flatnonzero(own)
            data: Dataset[Any] = Subset(self.data, rows.tolist())
            if isinstance(self.data, TensorDataset):
                data = TensorDataset(*self.data[rows])
            parts.append(ProxyData(data, self.sub_tasks[rows], augment))
        return parts[0], parts[1]

    def batches(self, row_batches: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, ...]]:
        """Yield the samples of each list of rows as ``(x, y, sub_task)``, sub-tasks on the CPU."""
        if isinstance(self.data, TensorDataset):  # no need to collect it sample by sample
            for rows in row_batches:
                x, y, *_ = self.data[list(rows)]
                yield x, y, self.sub_tasks[list(rows)]
            return
        loader: DataLoader[Any] = DataLoader(
            self.data, batch_sampler=[list(rows) for rows in row_batches]
        )
        for rows, batch in zip(row_batches, loader, strict=True):
            yield batch[0], batch[1], self.sub_tasks[list(rows)]

    def in_order(self, batch_size: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield all samples once, in their order, as they are."""
        rows = list(range(len(self)))
        return self.batches([rows[i : i + batch_size] for i in range(0, len(rows), batch_size)])

    def shuffled(
        self, sizes: Sequence[int], generator: torch.Generator
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield all samples once, shuffled and augmented, in batches of given sizes."""
        order = torch.randperm(len(self), generator=generator)
        rows = [part.tolist() for part in torch.split(order, list(sizes))]
        for x, y, tasks in self.batches(rows):
            yield self.augmented(x, generator), y, tasks

    def augmented(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Augment a batch, if an augmentation was given."""
        return self.augment(x, generator) if self.augment else x

    def labelled(self, rows: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return rows as a training batch ``(x, y)``, augmented."""
        (x, y, _), *_ = self.batches([rows])
        return self.augmented(x, generator), y

    def device_rows(
        self, sub_tasks: Sequence[int], samples: int, rng: np.random.Generator
    ) -> list[int]:
        """Draw the rows of a simulated device: as equally from each of its sub-tasks as it goes."""
        tasks = np.resize(rng.permutation(sub_tasks), samples)
        return [int(rng.choice(self._rows[task])) for task in tasks]


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's parameters are; the CPU if it has none."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device
