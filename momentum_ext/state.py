"""What an optimizer of ours keeps: keys of groups, checkpoints, copies."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from momentum_ext import _C, compiled
from momentum_ext.averaging import HeldWeights, UpdateCount, check_decay
from momentum_ext.checkpoint import (
    changed,
    check_complete,
    check_counters,
    keep_dtypes,
    unpack,
    with_changes,
    without_defaults,
)
from momentum_ext.clipping import GradFactor
from momentum_ext.dtensor import local
from momentum_ext.formulation import check_group
from momentum_ext.full_precision import fp32_state_dict, load_fp32_state_dict
from momentum_ext.keys import AVERAGE, AVERAGE_COUNT, BUFFER, BUFFER_FORMULATION, ROUNDING_STEP, SCALE
from momentum_ext.lookahead import restore_lookahead
from momentum_ext.precision import rounds_at_random

__all__ = ["StatefulOptimizer"]


class StatefulOptimizer(Optimizer):
    """The state of our optimizers, apart from how they step."""

    # Set by the optimizer's constructor, before torch's adds the groups.
    max_grad_norm: float | None
    process_group: Any
    ema_decay: float | None
    ema_warmup: bool
    compact_state_dict: bool
    _own_defaults: dict[str, Any]
    _rule: str  # the kernels' name for what the optimizer does, in csrc/rules/
    _counters: tuple[str, ...] = ()  # torch's keys of numbers in a parameter's state
    _options: dict[str, Any]  # of a group, that torch's optimizer does not have, with their defaults
    _plan: _C.Plan
    _held_weights: HeldWeights
    _grad_factor: GradFactor
    _step_supports_amp_scaling: bool

    @staticmethod
    def _states_of(group: dict[str, Any]) -> tuple[str, ...]:
        """The keys of the states that a step of this group has."""
        raise NotImplementedError

    def _take_options(
        self,
        max_grad_norm: float | None,
        process_group: Any,
        ema_decay: float | None,
        ema_warmup: bool,
        compact_state_dict: bool,
        **options: Any,
    ) -> None:
        """What torch's optimizer does not have, before its constructor is called; :meth:`_start` comes after it."""
        check_decay(ema_decay, ema_warmup)
        if max_grad_norm is not None and not max_grad_norm >= 0:
            raise ValueError(f"Invalid max_grad_norm value: {max_grad_norm}")
        self.max_grad_norm = max_grad_norm
        self.process_group = process_group
        self.ema_decay = ema_decay
        self.ema_warmup = ema_warmup
        self.compact_state_dict = compact_state_dict
        # A group gets a key of ours only where its value is not the default. Groups without our keys load into
        # torch's optimizer, and a step has fewer values to compare. add_param_group() fills these in.
        self._own_defaults = {key: value for key, value in options.items() if value != self._options[key]}

    def _keep_defaults(self) -> None:
        self.defaults.update(self._own_defaults)
        self._start()

    def _start(self) -> None:
        """What is not part of the state."""
        before = self.__dict__.get("_plan")
        self._plan = _C.Plan(self._rule, type(self).__name__)
        if before is not None:  # other ranks go on agreeing with this one
            self._plan.redistributing_meshes = before.redistributing_meshes
        self._plan.adopt(self.param_groups)
        counts = [group.get(ROUNDING_STEP, 0) for group in self.param_groups]
        self._plan.rounding_step = max([*counts, self.__dict__.pop("_steps_taken", 0)])
        self._traced = compiled.Traced(max((group.get(AVERAGE_COUNT, 0) for group in self.param_groups), default=0))
        # These outlive a loaded state: wrappers share the one, the gradients of the other are as they were.
        self.__dict__.setdefault("_held_weights", HeldWeights())
        self.__dict__.setdefault("_grad_factor", GradFactor())
        if self.defaults.get("fused"):  # torch sets it when the optimizer is made, and a copy forgets it
            self._step_supports_amp_scaling = True

    @property
    def grad_norm(self) -> Tensor | None:
        """What ``max_grad_norm`` has found in the last step: the norm of all gradients before clipping."""
        return self._traced.grad_norm

    @grad_norm.setter
    def grad_norm(self, norm: Tensor | None) -> None:
        self._traced.grad_norm = norm

    @property
    def _ema_count(self) -> UpdateCount:
        return self._traced.ema_count

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; see :meth:`torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: also for a formulation that the group's other hyperparameters do not go with, and for a
                momentum_dtype that is not supported.
        """
        num_groups = len(self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name, value in self._own_defaults.items():
            group.setdefault(name, value)
        try:
            check_group(group)
            without_defaults(group, self._options)
        except (TypeError, ValueError):
            del self.param_groups[num_groups:]
            raise
        self._add_own_keys(group)

    def _add_own_keys(self, group: dict[str, Any]) -> None:
        """Keys beside the options that are used: what flattens a checkpoint reads its keys from the live groups."""
        if "formulation" in group:
            group.setdefault(BUFFER_FORMULATION, group["formulation"])
        if rounds_at_random(group):
            group.setdefault(ROUNDING_STEP, 0)
        if self.ema_decay is not None:
            group.setdefault(AVERAGE_COUNT, 0)

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`torch.optim.Optimizer.state_dict`, with the state that the next step would start from.

        What was edited in ``param_groups`` and is to be converted is converted here, in a copy. Tensors leave in dtypes
        that every backend moves: an int16 remainder as bfloat16, fp8 codes as uint8, both with the same bits. Momentum
        of 8 or 4 bits leaves as a dict of ``"codes"`` and ``"scale"`` where rows are whole blocks of 32 and no sharding
        cuts one; elsewhere, and with ``compact_state_dict=False``, as its fp32 values, which encode to the same codes
        again.

        Raises:
            RuntimeError: inside :meth:`ema_weights` and :meth:`iterate_weights`.
            ValueError: for an edit of ``param_groups`` that no step could carry out.
        """
        self._held_weights.check()
        self._update_counts()
        handle = self.register_state_dict_post_hook(_finish_state_dict, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def _finish_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        changes, converted = self._plan.pending_changes(self.param_groups, self.state)
        params: dict[Any, Any] = {}
        has_averages = any(AVERAGE in entry for entry in self.state.values())
        for g, (group, packed) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=True)):
            params.update(zip(packed["params"], group["params"], strict=True))
            without_defaults(packed, self._options)
            if self.ema_decay is None and not has_averages:
                packed.pop(AVERAGE_COUNT, None)
            if not rounds_at_random(packed):
                packed.pop(ROUNDING_STEP, None)
            if g in converted:
                packed.pop(BUFFER_FORMULATION, None)
                if "formulation" in packed:
                    packed[BUFFER_FORMULATION] = packed["formulation"]
            elif "formulation" in packed:  # what an older checkpoint does not say is that they are the same
                packed.setdefault(BUFFER_FORMULATION, "torch")
        return with_changes(state_dict, changes + self._unstarted(), params, self.compact_state_dict)

    def _moved(self) -> list[tuple[Tensor, str, Tensor | None]]:
        """Buffers of parameters that came from another group, as their group says that they are written."""
        if not self._plan.has_moved(self.param_groups):
            return []
        return self._plan.pending_changes(self.param_groups, self.state, moved_only=True)[0]

    def _unstarted(self) -> list[tuple[Tensor, str, Tensor | None]]:
        """Momentum that was never computed, because its first step overflowed on the GPU."""
        buffers = {id(buffer) for buffer in self._plan.unstarted_buffers()}
        if not buffers:
            return []
        params = [param for param, entry in self.state.items() if id(local(entry.get(BUFFER))) in buffers]
        return [(param, key, None) for param in params for key in (BUFFER, SCALE)]

    def _update_counts(self) -> None:
        """What counts outside of the groups goes into them."""
        count = int(self._ema_count)
        has_averages = any(AVERAGE in entry for entry in self.state.values())
        for group in self.param_groups:
            if self.ema_decay is not None or has_averages:
                group[AVERAGE_COUNT] = count  # in every group: any of them may go
            if rounds_at_random(group):
                group[ROUNDING_STEP] = self._plan.rounding_step

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` of this class or of torch's optimizer has returned.

        The options of this optimizer stay: formulation, momentum_dtype, master_weights, stochastic_rounding and its
        seed. State keeps the dtype and the formulation that it was saved in, and the next step converts it where that
        is exact, at the loaded learning rate. ``decoupled_weight_decay`` is loaded where it was saved. What 0.1.0 had
        saved after ``eval()`` is moved back to the look-ahead point: load the model first.

        Raises:
            ValueError: for state that is not whole, by its name, and for a formulation that cannot be converted; the
                optimizer is then as it was.
        """
        self._held_weights.check()
        before = dict(self.__dict__)
        old_groups = self.param_groups
        try:
            keep_dtypes(self, lambda: super(StatefulOptimizer, self).load_state_dict(state_dict))
            check_complete(self.param_groups, self.state)
            for group, old in zip(self.param_groups, old_groups, strict=True):
                stored = group.pop(BUFFER_FORMULATION, group.get("formulation", "torch"))
                decoupled = group.get("decoupled_weight_decay", old.get("decoupled_weight_decay", False))
                for name in self._options:
                    group.pop(name, None)
                    if name in old:
                        group[name] = old[name]
                if "decoupled_weight_decay" in self._options:
                    group["decoupled_weight_decay"] = decoupled
                without_defaults(group, self._options)
                if stored != "torch" or "formulation" in group:
                    group[BUFFER_FORMULATION] = stored
                self._add_own_keys(group)
            self._plan.adopt(self.param_groups)
            self._plan.pending_changes(self.param_groups, self.state)  # raises what the next step would
            restore_lookahead(self.param_groups, self.state)
        except BaseException:
            self.__dict__.update(before)
            raise

    def fp32_state_dict(self, model: nn.Module) -> dict[str, Any]:
        """The model's state dict with 16-bit parameters in fp32: from their masters where the optimizer keeps them.

        Loads into the same model in fp32. Names, buffers and extra state are those of ``model.state_dict()``, without
        the wrappers of DistributedDataParallel and torch.compile; parameters that are DTensors are DTensors here.

        Args:
            model: whose parameters this optimizer steps; those that it does not know are widened.

        Raises:
            ValueError: for a model of which the optimizer knows no parameter.
            RuntimeError: where the model's state dict does not hold a parameter with a master itself
                (FullyShardedDataParallel); inside :meth:`ema_weights` and :meth:`iterate_weights`.
        """
        self._held_weights.check()
        return fp32_state_dict(self.param_groups, self.state, model)

    def load_fp32_state_dict(self, model: nn.Module, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`fp32_state_dict` or an fp32 model has returned: parameters, and their masters with them.

        What is not a parameter with a master is loaded by ``model.load_state_dict``, with its hooks. Momentum and
        averages stay as they are. Parameters without a master are rounded to nearest.

        Args:
            model: whose parameters this optimizer steps.
            state_dict: a tensor for each name of ``model.state_dict()``, with the shape, mesh and placements of the
                model's.

        Raises:
            RuntimeError: for names that are missing or unexpected, and for what does not fit, with all of it; nothing
                has been written then. Also as :meth:`fp32_state_dict`.
            ValueError: for a model of which the optimizer knows no parameter.
        """
        self._held_weights.check()
        load_fp32_state_dict(self.param_groups, self.state, model, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        self._held_weights.check()
        self._update_counts()
        state = super().__getstate__()
        state["state"] = changed(
            state["state"], self._moved() + self._unstarted(), {id(param): param for param in self.state}
        )
        return {
            **state,
            "max_grad_norm": self.max_grad_norm,
            "ema_decay": self.ema_decay,
            "ema_warmup": self.ema_warmup,
            "compact_state_dict": self.compact_state_dict,
            "_steps_taken": self._plan.rounding_step,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        unpack(state["state"])
        check_counters(state["param_groups"], state["state"], self._counters)
        super().__setstate__(state)
        self._own_defaults = {name: self.defaults[name] for name in self._options if name in self.defaults}
        for name, default in (
            ("max_grad_norm", None),
            ("process_group", None),
            ("ema_decay", None),
            ("ema_warmup", False),
            ("compact_state_dict", True),
        ):
            self.__dict__.setdefault(name, default)
        self._start()


def _finish_state_dict(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    assert isinstance(optimizer, StatefulOptimizer)
    return optimizer._finish_state_dict(state_dict)
