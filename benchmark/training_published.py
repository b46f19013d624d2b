"""The published training, line for line on current torch: the baseline of benchmark/training.py.

PIL decoding and float64 normalization in two threads, float32 NCHW, Adam, mining by boolean masks, figures read back in
every step.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Iterator

import numpy as np
import torch
import torchvision
from blocks import Block, peak_memory
from loader import published_image
from torch import nn

from aligned_reid.config import Config
from aligned_reid.data import TrainImages, open_data

IMS_PER_ID, MARGIN = 4, 0.3


class PublishedModel(nn.Module):
    """The reference's model."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        resnet = torchvision.models.resnet50(weights=None)
        self.base = nn.Sequential(*list(resnet.children())[:-2])
        self.local_conv = nn.Conv2d(2048, 128, 1)
        self.local_bn = nn.BatchNorm2d(128)
        self.local_relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(2048, num_classes)

    def forward(self, x):
        feat = self.base(x)
        global_feat = nn.functional.avg_pool2d(feat, feat.size()[2:]).view(len(feat), -1)
        local_feat = torch.mean(feat, -1, keepdim=True)
        local_feat = self.local_relu(self.local_bn(self.local_conv(local_feat)))
        return global_feat, local_feat.squeeze(-1).permute(0, 2, 1), self.fc(global_feat)


def published_batches(
    paths: list[str], ids: np.ndarray, size: tuple[int, int], ids_per_batch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of one epoch; two threads put identities into a queue of 200."""
    identities = np.random.permutation(np.unique(ids))
    samples: queue.Queue = queue.Queue(maxsize=200)
    stop, pending, lock = threading.Event(), iter(identities), threading.Lock()

    def work() -> None:
        while not stop.is_set():
            with lock:
                identity = next(pending, None)
            if identity is None:
                return
            own = np.flatnonzero(ids == identity)
            chosen = np.random.choice(own, IMS_PER_ID, replace=len(own) < IMS_PER_ID)
            images = [published_image(paths[index], size, np.random.uniform() > 0.5) for index in chosen]
            while not stop.is_set():
                try:
                    samples.put((images, identity), timeout=0.1)
                    break
                except queue.Full:
                    continue

    threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(len(identities) // ids_per_batch):
            drawn = [samples.get() for _ in range(ids_per_batch)]
            images = np.stack(np.concatenate([images for images, _ in drawn]))
            yield images, np.repeat([identity for _, identity in drawn], IMS_PER_ID)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def published_euclidean(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    m, n = len(x), len(y)
    xx = torch.pow(x, 2).sum(1, keepdim=True).expand(m, n)
    yy = torch.pow(y, 2).sum(1, keepdim=True).expand(n, m).t()
    dist = xx + yy
    dist.addmm_(x, y.t(), beta=1, alpha=-2)
    return dist.clamp(min=1e-12).sqrt()


def published_mining(
    dist: torch.Tensor, labels: torch.Tensor, return_inds: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hardest distances of each anchor, and their indices if asked for, as in the reference."""
    n = len(dist)
    is_pos = labels.expand(n, n).eq(labels.expand(n, n).t())
    is_neg = labels.expand(n, n).ne(labels.expand(n, n).t())
    dist_ap, relative_p = torch.max(dist[is_pos].contiguous().view(n, -1), 1, keepdim=True)
    dist_an, relative_n = torch.min(dist[is_neg].contiguous().view(n, -1), 1, keepdim=True)
    if return_inds:
        indices = torch.arange(n).unsqueeze(0).expand(n, n)
        torch.gather(indices[is_pos].contiguous().view(n, -1), 1, relative_p)
        torch.gather(indices[is_neg].contiguous().view(n, -1), 1, relative_n)
    return dist_ap.squeeze(1), dist_an.squeeze(1)


def published_triplets(feat: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return published_mining(published_euclidean(feat, feat), labels, return_inds=True)


def published_local_distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Aligned distance, [M, H, d], [N, G, d] -> [M, N], by a table of all stripe pairs, cell by cell."""
    num_x, h, width = x.shape
    num_y, g, _ = y.shape
    cost = published_euclidean(x.contiguous().view(num_x * h, width), y.contiguous().view(num_y * g, width))
    cost = (torch.exp(cost) - 1.0) / (torch.exp(cost) + 1.0)
    cost = cost.contiguous().view(num_x, h, num_y, g).permute(1, 3, 0, 2)
    total = [[cost[0, 0]] * g for _ in range(h)]
    for i in range(h):
        for j in range(g):
            if i == 0 and j > 0:
                total[i][j] = total[i][j - 1] + cost[i, j]
            elif i > 0 and j == 0:
                total[i][j] = total[i - 1][j] + cost[i, j]
            elif i > 0 and j > 0:
                total[i][j] = torch.min(total[i - 1][j], total[i][j - 1]) + cost[i, j]
    return total[-1][-1]


def published_local_loss(feat: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The local triplet loss, mined by local distance: feat [N, H, d], labels [N] -> scalar."""
    feat = 1.0 * feat / (torch.norm(feat, 2, -1, keepdim=True).expand_as(feat) + 1e-12)
    dist_ap, dist_an = published_mining(published_local_distance(feat, feat), labels)
    return nn.MarginRankingLoss(margin=MARGIN)(dist_an, dist_ap, torch.ones_like(dist_an))


class PublishedTraining:
    """The reference's loop in blocks of steps."""

    def __init__(self, images: TrainImages, ids_per_batch: int) -> None:
        self.images, self.ids_per_batch = images, ids_per_batch
        self.paths = [f"{images.images_dir}/{name}" for name in images.image_names]
        self.model = PublishedModel(images.num_classes).train()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=2e-4, weight_decay=5e-4)
        self.criterion = nn.MarginRankingLoss(margin=MARGIN)

    def block(self, steps: int) -> list[float]:
        """Seconds of each of `steps` steps, after an untimed one."""
        seconds = []
        start = time.perf_counter()
        batches = published_batches(self.paths, self.images.person_ids, self.images.size, self.ids_per_batch)
        for images, labels in itertools.islice(batches, steps + 1):
            self.step(torch.from_numpy(images).float(), torch.from_numpy(labels))
            now = time.perf_counter()
            seconds.append(now - start)
            start = now
        batches.close()  # ends its threads
        return seconds[1:]

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        global_feat, _, _ = self.model(images)
        dist_ap, dist_an = published_triplets(global_feat, labels)
        loss = self.criterion(dist_an, dist_ap, torch.ones_like(dist_an))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        for figure in (dist_an > dist_ap, dist_an > dist_ap + MARGIN, dist_ap, dist_an, loss):
            figure.detach().float().mean().item()


def published_block(config: Config, steps: int) -> Block:
    """Run `steps` timed steps of the published loop with the data and sizes of `config`."""
    images = TrainImages(open_data(config.data_path), size=config.resize_h_w)
    seconds = PublishedTraining(images, config.ids_per_batch).block(steps)
    return Block(seconds, peak_memory(), "")
