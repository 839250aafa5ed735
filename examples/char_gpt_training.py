"""How train_char_gpt.py trains: one run for each form of momentum, AdamW and NAdam, and checkpoints to go on from.

A run that was killed and resumed gives the losses of a run that was not, bit for bit: a checkpoint holds everything
that the next step depends on, and is replaced in one piece or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import char_gpt_data
import torch
from char_gpt_data import Corpus
from char_gpt_model import CharGPT
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR

from momentum_ext import FusedAdamW, FusedMomentum, FusedNAdam

ADAPTIVE = {"adamw": FusedAdamW, "nadam": FusedNAdam}
ADAPTIVE_LR = 3e-3
"""Their peak learning rate; it was not searched for."""

FORMULATIONS = ("torch", "classical", "ema", *ADAPTIVE)
VALIDATION_SEED = 1
"""Validation sees the same pieces of text in every run and at every step."""


class OtherRun(ValueError):
    """A checkpoint is that of other settings or another text; says what differs."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run computes; two runs with equal settings have equal bits."""

    formulation: str = "torch"
    nesterov: bool = False
    lr: float = 0.3
    """Peak learning rate, in the units of torch.optim.SGD."""
    momentum: float = 0.9
    steps: int = 2000
    batch: int = 32
    context: int = 64
    width: int = 96
    heads: int = 4
    layers: int = 2
    seed: int = 0
    threads: int = 1
    """Sums over several threads round differently from sums over one."""
    validate_every: int = 100
    validation_batches: int = 8

    @property
    def name(self) -> str:
        """ "torch", "torch-nesterov": names the run's files."""
        return self.formulation + "-nesterov" * self.nesterov

    @property
    def formulation_lr(self) -> float:
        """The peak in the formulation's own units: an average of gradients is 1 - momentum times their sum."""
        if self.formulation in ADAPTIVE:
            return ADAPTIVE_LR
        return self.lr / (1 - self.momentum) if self.formulation == "ema" else self.lr


@dataclass
class Run:
    """One training: a model, its optimizer, where it stands, and what it recorded."""

    settings: Settings
    corpus: Corpus
    model: CharGPT
    optimizer: FusedMomentum | FusedAdamW | FusedNAdam
    schedule: OneCycleLR
    generator: torch.Generator
    """Draws the batches; its state is the position in the data."""
    losses: list[float] = field(default_factory=list)
    """Cross-entropy of each step's batch in nats per character; a double holds the fp32 value exactly."""
    validation: list[tuple[int, float]] = field(default_factory=list)
    """After how many steps, and the cross-entropy on the modules that were held out."""

    @classmethod
    def start(
        cls,
        settings: Settings,
        corpus: Corpus,
        wrap: Callable[[CharGPT], CharGPT] = lambda model: model,
        make_optimizer: Callable[..., Any] = FusedMomentum,
    ) -> Run:
        """A run before its first step, as the seed makes it; `wrap` makes of the model the module that is trained."""
        torch.manual_seed(settings.seed)
        model = CharGPT(len(char_gpt_data.ALPHABET), settings.context, settings.width, settings.heads, settings.layers)
        model = wrap(model)
        if adaptive := ADAPTIVE.get(settings.formulation):
            optimizer = adaptive(model.parameters(), lr=settings.formulation_lr, betas=(settings.momentum, 0.999))
        else:
            optimizer = make_optimizer(
                model.parameters(),
                lr=settings.formulation_lr,
                momentum=settings.momentum,
                nesterov=settings.nesterov,
                formulation=settings.formulation,
            )
        schedule = OneCycleLR(
            optimizer, settings.formulation_lr, total_steps=settings.steps + 1, pct_start=0.1, cycle_momentum=False
        )
        return cls(settings, corpus, model, optimizer, schedule, torch.Generator().manual_seed(settings.seed))

    def train_step(self) -> None:
        """One step on the next batch; at times a look at the text that was held out."""
        settings = self.settings
        inputs, targets = char_gpt_data.batch(self.corpus.train, settings.batch, settings.context, self.generator)
        self.optimizer.zero_grad()
        loss = functional.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())
        if len(self.losses) % settings.validate_every == 0 or len(self.losses) == settings.steps:
            self.validation.append((len(self.losses), self.validate()))

    @torch.no_grad()
    def validate(self) -> float:
        """Cross-entropy on held-out text in nats per character, of the parameters that training will hand out."""
        settings = self.settings
        generator = torch.Generator().manual_seed(VALIDATION_SEED)
        total = 0.0
        with self.evaluating():
            for _ in range(settings.validation_batches):
                inputs, targets = char_gpt_data.batch(
                    self.corpus.validation, settings.batch, settings.context, generator
                )
                total += functional.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten()).item()
        return total / settings.validation_batches

    def sample(self, prompt: str, length: int, temperature: float = 0.8) -> str:
        """`length` characters that the model writes on after the prompt."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        with self.evaluating():
            tokens = self.model.sample(char_gpt_data.encode(prompt).long(), length, temperature, generator)
        return char_gpt_data.decode(tokens)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """With Nesterov's momentum the parameters stand at the look-ahead point in training; here they leave it."""
        self.model.eval()
        iterates = self.optimizer.iterate_weights if isinstance(self.optimizer, FusedMomentum) else nullcontext
        try:
            with iterates():
                yield
        finally:
            self.model.train()

    def save(self, path: Path) -> None:
        """Writes the checkpoint: whoever reads `path`, and whenever, finds a whole one, the last or the one before."""
        state = {
            "settings": asdict(self.settings),
            "corpus": self.corpus.fingerprint,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "losses": self.losses,
            "validation": self.validation,
        }
        replace(path, lambda temporary: torch.save(state, temporary))

    @classmethod
    def resume(cls, settings: Settings, corpus: Corpus, path: Path) -> Run:
        """The run as the checkpoint holds it.

        Raises:
            OtherRun: where the checkpoint is that of other settings or another text.
        """
        state: dict[str, Any] = torch.load(path, weights_only=True)
        wanted = {**asdict(settings), "text": corpus.fingerprint}
        found = {**state["settings"], "text": state["corpus"]}
        different = [
            f"{key}: found {found.get(key)}, expected {value}"
            for key, value in wanted.items()
            if found.get(key) != value
        ]
        if different:
            raise OtherRun(f"{path} is of another run ({'; '.join(different)}). Start over with --restart")
        run = cls.start(settings, corpus)
        run.model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.schedule.load_state_dict(state["schedule"])
        run.generator.set_state(state["generator"])
        run.losses = state["losses"]
        run.validation = state["validation"]
        return run

    def write_losses(self, path: Path) -> None:
        """The losses as CSV, with as many digits as tell every fp32 from its neighbours."""
        lines = ["step,loss", *(f"{step},{loss!r}" for step, loss in enumerate(self.losses, 1))]
        replace(path, lambda temporary: temporary.write_text("\n".join(lines) + "\n"))


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file beside `path`, brings it to the disk and moves it there in one piece."""
    temporary = path.with_name(path.name + ".new")
    write(temporary)
    # Without this, a machine that loses power could have done the renaming and not yet the writing.
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
