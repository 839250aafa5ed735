"""What stands beside another rule's step, for --rule: FusedMomentum, and 8-bit AdamW of other packages."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from contenders import Contender, Model, NotRun, Settings, warm
from timing import Step
from torch import Tensor


def momentum(model: Model, settings: Settings) -> Step:
    """momentum_ext.FusedMomentum, whose small lists are the yardstick of the other rules'."""
    from momentum_ext import FusedMomentum  # imported late, so that --help works where nothing is built

    return warm(FusedMomentum(model.groups, **settings.sgd).step)


def package(module: str, name: str, only_cuda: bool = False, **options: Any) -> Callable[[Model, Settings], Step]:
    """AdamW of a package that one may have. The step raises NotRun."""

    def build(model: Model, settings: Settings) -> Step:
        if only_cuda and settings.device != "cuda":
            raise NotRun("not run: it needs triton and a GPU")
        try:
            kind = getattr(importlib.import_module(module), name)
        except ImportError as error:
            raise NotRun(f"not run: pip install {module.partition('.')[0]}") from error
        return warm(kind(model.groups, **settings.arguments, **options).step)

    return build


INT8: dict[str, Any] = {"state_dtype": "int8", "stochastic_rounding": True}
PEERS: tuple[Contender, ...] = (
    Contender("momentum", "FusedMomentum", momentum, moves_the_pass=False),
    Contender("ours-8bit", "FusedAdamW 8-bit", package("momentum_ext", "FusedAdamW", **INT8), moves_the_pass=False),
    Contender("flash", "FlashAdamW", package("flashoptim", "FlashAdamW", only_cuda=True), moves_the_pass=False),
    Contender("bitsandbytes", "bitsandbytes 8-bit", package("bitsandbytes.optim", "AdamW8bit"), moves_the_pass=False),
    Contender("torchao", "torchao 8-bit", package("torchao.optim", "AdamW8bit"), moves_the_pass=False),
)


def state_bytes(step: Step) -> int | None:
    """Bytes of the tensors in the state of the optimizer whose step it is; None where a compiler hides it."""
    optimizer = getattr(step, "__self__", None)
    if not isinstance(optimizer, torch.optim.Optimizer):
        return None
    storages = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
        for each in _parts(value)
    }
    return sum(storages.values())


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a subclass is made of, or the tensor itself."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
    else:
        yield tensor
