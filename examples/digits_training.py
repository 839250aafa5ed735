"""What digits.py trains: data, network, and runs that advance side by side and are compared bit by bit."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

SPLIT_SEED = 0
"""The test digits are the same ones whatever the seed of the training."""

TEST_DIGITS = 450
BATCH = 64


@dataclass(frozen=True)
class Digits:
    """Images are fp32 [n, 1, 8, 8] in [0, 1]; labels are int64 [n], 0 to 9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load() -> Digits:
    """scikit-learn's 1,797 handwritten digits (Alpaydin and Kaynak 1998); 450 are held out, of each class its share."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        (images / 16).astype(np.float32).reshape(-1, 1, 8, 8),
        labels.astype(np.int64),
        test_size=TEST_DIGITS,
        stratify=labels,
        random_state=SPLIT_SEED,
    )
    train_images, test_images, train_labels, test_labels = (torch.from_numpy(part) for part in parts)
    return Digits(train_images, train_labels, test_images, test_labels)


class Block(nn.Module):
    """Two 3x3 convolutions with batch normalization around a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs, h, w] -> [n, outputs, h / stride, w / stride]."""
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """A ResNet of 14 layers for 8x8 images: 47 parameter tensors, 175 thousand values."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            Block(16, 16),
            Block(16, 16),
            Block(16, 32, stride=2),
            Block(32, 32),
            Block(32, 64, stride=2),
            Block(64, 64),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """fp32 [n, 1, 8, 8] -> scores, fp32 [n, 10]."""
        scores: Tensor = self.layers(images)
        return scores


@dataclass
class Run:
    """One training: a model, its optimizer, and what it recorded."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: OneCycleLR
    losses: list[float] = field(default_factory=list)
    """Cross-entropy of each step's batch; a double holds the fp32 value exactly."""
    accuracies: list[float] = field(default_factory=list)
    """Share of the test digits that are right after each epoch, 0 to 1."""
    optimizer_ns: list[int] = field(default_factory=list)
    """Nanoseconds inside each optimizer.step(), and nothing else."""
    training_ns: int = 0
    """Nanoseconds of all training steps: forward, backward, optimizer and schedule."""

    def train_step(self, images: Tensor, labels: Tensor) -> None:
        """One step on one batch, timed."""
        begin = time.perf_counter_ns()
        self.optimizer.zero_grad()
        loss = functional.cross_entropy(self.model(images), labels)
        loss.backward()
        before = time.perf_counter_ns()
        self.optimizer.step()
        after = time.perf_counter_ns()
        self.schedule.step()
        self.training_ns += time.perf_counter_ns() - begin
        self.optimizer_ns.append(after - before)
        self.losses.append(loss.item())

    def read(self, images: Tensor) -> Tensor:
        """What the network takes these images [n, 1, 8, 8] for: int64 [n], 0 to 9."""
        self.model.eval()
        with torch.no_grad():
            digits: Tensor = self.model(images).argmax(dim=1)
        self.model.train()
        return digits

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training changes: parameters, normalization statistics, momentum buffers."""
        found: dict[str, Tensor] = {f"parameter {name}": tensor for name, tensor in self.model.named_parameters()}
        found |= {f"statistic {name}": tensor for name, tensor in self.model.named_buffers()}
        for name, parameter in self.model.named_parameters():
            found[f"momentum_buffer of {name}"] = self.optimizer.state[parameter]["momentum_buffer"]
        return {name: tensor.detach() for name, tensor in found.items()}

    def fingerprint(self) -> str:
        """SHA-256 over all bits of `tensors` and of the losses."""
        digest = hashlib.sha256(np.array(self.losses).tobytes())
        for name, tensor in self.tensors().items():
            digest.update(name.encode())
            digest.update(as_bytes(tensor).numpy().tobytes())
        return digest.hexdigest()


class RunsDiffer(Exception):
    """Two runs that were to be bit-identical are not; says where."""


def as_bytes(tensor: Tensor) -> Tensor:
    """The bits themselves, uint8 [n]: unlike ==, they tell 0.0 from -0.0 and find NaN equal to itself."""
    return tensor.contiguous().flatten().view(torch.uint8)


def require_identical(one: Run, other: Run) -> None:
    """Raises RunsDiffer if a loss, parameter, statistic or momentum buffer differs in a single bit."""
    names = f"with {one.name} and with {other.name}"
    for step, (a, b) in enumerate(zip(one.losses, other.losses, strict=True), start=1):
        if a.hex() != b.hex():
            raise RunsDiffer(f"the loss of step {step} is {a!r} and {b!r} {names}")
    theirs = other.tensors()
    for name, tensor in one.tensors().items():
        differs = (as_bytes(tensor) != as_bytes(theirs[name])).view(tensor.numel(), -1).any(dim=1)
        if differs.any():
            largest = (tensor - theirs[name]).abs().max().item()
            raise RunsDiffer(
                f"after step {len(one.losses)}, {name} is not the same {names}: "
                f"{int(differs.sum())} of {tensor.numel()} values differ, by up to {largest:.3g}"
            )


def batches(digits: Digits, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in a new order, each image moved by up to one pixel; what does not fill a batch is left out."""
    count = len(digits.train_labels)
    order = torch.randperm(count, generator=generator)
    padded = functional.pad(digits.train_images, (1, 1, 1, 1))
    windows = padded.unfold(2, 8, 1).unfold(3, 8, 1)[:, 0]  # [n, 3, 3, 8, 8]: all nine positions of each image
    for chosen in order[: count - count % BATCH].split(BATCH):
        down, right = torch.randint(3, (2, BATCH), generator=generator)
        yield windows[chosen, down, right].unsqueeze(1), digits.train_labels[chosen]


def train(runs: Sequence[Run], digits: Digits, epochs: int, seed: int) -> None:
    """Trains all runs on the same batches, step by step side by side, and compares them bit by bit after each epoch.

    The runs take turns in going first, so that neither gains from what the other left in the caches.
    Shows a progress bar.

    Raises:
        RunsDiffer: at the first epoch after which the runs are not bit-identical.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * steps_per_epoch(digits)
    with tqdm(total=steps, unit="step", desc="training both", dynamic_ncols=True) as progress:
        for _ in range(epochs):
            for images, labels in batches(digits, generator):
                order = runs if progress.n % 2 == 0 else runs[::-1]
                for run in order:
                    run.train_step(images, labels)
                progress.update()
            for run in runs:
                run.accuracies.append((run.read(digits.test_images) == digits.test_labels).double().mean().item())
            for other in runs[1:]:
                require_identical(runs[0], other)
            progress.set_postfix_str(f"loss {runs[0].losses[-1]:.4f}, test accuracy {runs[0].accuracies[-1]:.2%}")


def steps_per_epoch(digits: Digits) -> int:
    """Training steps in one epoch."""
    return len(digits.train_labels) // BATCH


def step_quantiles(run: Run) -> tuple[float, float, float]:
    """The 5 %, 50 % and 95 % quantiles of the time inside optimizer.step(), in nanoseconds."""
    low, median, high = np.quantile(run.optimizer_ns, (0.05, 0.5, 0.95))
    return float(low), float(median), float(high)


def what_was_compared(run: Run) -> str:
    """As "all 420 losses, 47 parameters, 47 momentum buffers and 42 normalization statistics (… values)"."""
    tensors = run.tensors()
    parameters, buffers, others = (
        sum(name.startswith(kind) for name in tensors) for kind in ("parameter ", "momentum_buffer ", "statistic ")
    )
    values = sum(tensor.numel() for tensor in tensors.values())
    return (
        f"all {counted(len(run.losses), 'loss', 'losses')}, {parameters} parameters, {buffers} momentum buffers and "
        f"{others} normalization statistics ({values:,} values)"
    )


def counted(count: int, singular: str, plural: str | None = None) -> str:
    """ "1 thread", "2 threads"."""
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"


def total_ratio(theirs: Run, ours: Run) -> float:
    """How many times as long theirs spent in the optimizer, over all steps."""
    return sum(theirs.optimizer_ns) / sum(ours.optimizer_ns)


def median_ratio(theirs: Run, ours: Run) -> float:
    """The median step of theirs over the median step of ours."""
    return float(np.median(theirs.optimizer_ns) / np.median(ours.optimizer_ns))


def ratio_text(ratio: float) -> str:
    """ "0.85x", "7.8x", "31x": as many digits as mean something."""
    return f"{ratio:.2f}x" if ratio < 1 else f"{ratio:.1f}x" if ratio < 10 else f"{ratio:.0f}x"
