"""What trainers put around the step, as passes of their own: clipping, loss scaling, averaging.

Each pipeline has three contenders: ours, where it rides in the step; torch's default way, what its documentation shows;
and torch's best way, which takes the fused step and functions over lists of tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from contenders import Contender, Model, Pass, Settings, warm
from timing import Step

MAX_NORM = 1.0
EMA_DECAY = 0.9998


def _ours_clipping(model: Model, settings: Settings) -> Step:
    from momentum_ext import FusedMomentum

    optimizer = FusedMomentum(model.groups, **settings.sgd)

    def step() -> None:
        optimizer.clip_grad_norm_(MAX_NORM)
        optimizer.step()

    return warm(step)


def _torch_clipping(foreach: bool | None, **path: Any) -> Callable[[Model, Settings], Step]:
    def build(model: Model, settings: Settings) -> Step:
        params = model.params
        optimizer = torch.optim.SGD(model.groups, **settings.sgd, **path)

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=foreach)
            optimizer.step()

        return warm(step)

    return build


def _scaler(kind: type[torch.amp.GradScaler], settings: Settings) -> torch.amp.GradScaler:
    # With a scale of 1, gradients that torch writes to stay what they are from step to step.
    scaler = kind(settings.device, init_scale=1.0, growth_interval=1 << 30)
    scaler.scale(torch.ones((), device=settings.device))
    return scaler


def _ours_scaling(model: Model, settings: Settings) -> Step:
    from momentum_ext import FusedMomentum, GradScaler

    optimizer = FusedMomentum(model.groups, **settings.sgd)
    scaler = _scaler(GradScaler, settings)

    def step() -> None:
        scaler.unscale_(optimizer)
        optimizer.clip_grad_norm_(MAX_NORM)
        scaler.step(optimizer)
        scaler.update()

    return warm(step)


def _torch_scaling(foreach: bool | None, **path: Any) -> Callable[[Model, Settings], Step]:
    def build(model: Model, settings: Settings) -> Step:
        params = model.params
        optimizer = torch.optim.SGD(model.groups, **settings.sgd, **path)
        scaler = _scaler(torch.amp.GradScaler, settings)

        def step() -> None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=foreach)
            scaler.step(optimizer)
            scaler.update()

        return warm(step)

    return build


def _ours_averaging(model: Model, settings: Settings) -> Step:
    from momentum_ext import FusedMomentum

    return warm(FusedMomentum(model.groups, **settings.sgd, ema_decay=EMA_DECAY).step)


def _torch_averaging(over_lists: bool, **path: Any) -> Callable[[Model, Settings], Step]:
    """AveragedModel's update, by its function over lists (best) or tensor by tensor, its default for an avg_fn."""
    from torch.optim.swa_utils import get_ema_avg_fn, get_ema_multi_avg_fn

    def build(model: Model, settings: Settings) -> Step:
        params = [param.detach() for param in model.params]
        averages = [param.clone() for param in params]
        optimizer = torch.optim.SGD(model.groups, **settings.sgd, **path)
        average_one, average_all = get_ema_avg_fn(EMA_DECAY), get_ema_multi_avg_fn(EMA_DECAY)

        def step() -> None:
            optimizer.step()
            if over_lists:
                average_all(averages, params, None)
            else:
                for average, param in zip(averages, params, strict=True):
                    average.copy_(average_one(average, param, None))

        return warm(step)

    return build


def _contenders(
    mine: Callable[[Model, Settings], Step],
    default: Callable[[Model, Settings], Step],
    best: Callable[[Model, Settings], Step],
) -> tuple[Contender, ...]:
    return (
        Contender("ours", "FusedMomentum", mine),
        Contender("default", "torch default", default),
        Contender("fused", "torch best", best),
    )


PIPELINES: dict[str, tuple[Pass, tuple[Contender, ...]]] = {
    "clip": (
        Pass("clip + step", updated=2, norm=True),
        _contenders(_ours_clipping, _torch_clipping(None), _torch_clipping(True, fused=True)),
    ),
    "amp_clip": (
        Pass("unscale + clip + step", updated=2, norm=True),
        _contenders(_ours_scaling, _torch_scaling(None), _torch_scaling(True, fused=True)),
    ),
    "ema": (
        Pass("step + average", updated=3),
        _contenders(_ours_averaging, _torch_averaging(False), _torch_averaging(True, fused=True)),
    ),
}
"""By the name that --pipeline takes: what is timed, and who takes part."""

WORKLOADS = ("gpt2", "resnet50", "small_1000x1024")
"""What a pipeline is timed on by default."""
