"""Oriented gratings of low contrast in noise, 6 classes, 3 x 16 x 16, and a convolutional network that learns them in seconds."""

import math

import torch
from torch import nn
from torch.nn import functional

from aft.attacks import PGD, ClassificationObjective, sample_keys

CLASSES, SIZE = 6, 16


def gratings(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images in [0, 1] and their labels: a sine wave at one of six angles, of random phase, under noise."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    angle, phase = labels * math.pi / CLASSES, torch.rand(count, generator=random) * 2 * math.pi
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    wave = torch.sin(0.9 * (columns * angle.cos()[:, None, None] + rows * angle.sin()[:, None, None]) + phase[:, None, None])
    noise = torch.randn(count, 3, SIZE, SIZE, generator=random)
    return (0.5 + 0.1 * wave[:, None] + 0.15 * noise).clamp(0, 1), labels


def trained(seed: int = 0, attack: PGD | None = None) -> nn.Module:
    """A network with BatchNorm and dropout, in eval mode, fp32, frozen; with an attack the last two thirds are on adversarial images."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images, labels = gratings(1536, seed=1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(3, 16, 5, padding=2), nn.BatchNorm2d(16), nn.ReLU(), nn.AvgPool2d(2),
            nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(96, CLASSES),
        )  # fmt: skip
        optimizer = torch.optim.Adam(network.parameters(), 4e-3)
        for step in range(144):
            rows = torch.arange(64) + 64 * (step % 24)
            shown = images[rows]
            if attack is not None and step >= 48:
                objective = ClassificationObjective(network, labels[rows], modules=[network])
                shown = attack(objective, shown, sample_keys(seed, step, rows)).x_BCHW
            optimizer.zero_grad()
            functional.cross_entropy(network(shown), labels[rows]).backward()
            optimizer.step()
    torch.set_num_threads(threads)
    return network.eval().requires_grad_(False)
