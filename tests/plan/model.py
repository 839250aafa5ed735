"""What FusedMomentum promises, as plain Python on plain tensors: the oracle of the random sequences.

One step at a time: after each, the values that were found right (or near enough) are what the model goes on from, so
that differences in rounding never add up. What a step must do, which state there must be, in which dtype, and when it
must raise, follows from the class's text, not from its code; the update itself is momentum_ext.reference.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from harness import assert_same, params_of
from precision_oracle import Options, as_live, buffer_values, dtype_of_buffer, order_of, parts_of_value, tensor_of
from torch import Tensor
from values import BF16, FP8, FP16, FP32, FP64, HALVES, INT8

from momentum_ext import FusedMomentum, reference

PACKED = torch.uint8  # int4
IN_BLOCKS = (INT8, FP8, PACKED)
TORCH_KEYS = set(torch.optim.SGD([torch.zeros(1)]).state_dict()["param_groups"][0])
OWN_DEFAULTS = {
    "formulation": "torch",
    "decoupled_weight_decay": False,
    "momentum_dtype": None,
    "master_weights": False,
    "stochastic_rounding": None,
}


class Raises(Exception):
    """What the optimizer must raise: the kind, and a pattern of its text."""

    def __init__(self, kind: type[BaseException], says: str) -> None:
        super().__init__(kind.__name__, says)
        self.kind, self.says = kind, says


# ------------------------------------------------------------------------------------------------------------ values


def dtype_of(name: Any) -> torch.dtype | None:
    return getattr(torch, name) if isinstance(name, str) else name


def decoded(entry: dict[str, Any], param: Tensor) -> Tensor | None:
    """A momentum buffer's values."""
    buffer = entry.get("momentum_buffer")
    if buffer is None or "momentum_scale" not in entry:
        return buffer if buffer is None else buffer.detach().clone()
    return tensor_of(buffer_values(entry, param), FP32, param, order_of(param))


def exact(param: Tensor, entry: dict[str, Any]) -> Tensor:
    """A parameter's value: the master's, if there is one."""
    value = param.detach()
    if "param_remainder" in entry:
        return (value.float().view(torch.int32) + entry["param_remainder"].to(torch.int32)).view(FP32)
    if "master_param" in entry:
        return entry["master_param"].clone()
    return value.float() if value.dtype in HALVES else value.clone()


# A unit in the last place, since rounding may go either way.
ROUNDING = {BF16: 2.0**-7, FP16: 2.0**-10, FP32: 2.0**-22, FP64: 2.0**-51}


def assert_near(
    found: Tensor, wanted: Tensor, dtype: torch.dtype, tolerance: float, what: str, before: Tensor | None = None
) -> None:
    """Equal up to the rounding of the dtype that it is stored in; with no tolerance and a wide dtype, to the bit.

    The tolerance is relative to the largest value, also of those `before`, which may have cancelled.
    """
    assert found.shape == wanted.shape, what
    if tolerance == 0 and dtype in (FP32, FP64):
        assert_same(found, wanted.to(found.dtype), what)
        return
    found, wanted = found.double(), wanted.double()
    odd = ~wanted.isfinite()  # an infinity may have become NaN on another way to it
    assert torch.equal(found.isfinite() | (wanted.abs() > 3e4), ~odd | (wanted.abs() > 3e4)), f"{what}: not finite"
    values = torch.cat([each.double().reshape(-1).abs() for each in (wanted, before) if each is not None])
    largest = float(values.nan_to_num(0.0, 0.0).max()) if values.numel() else 0.0
    if dtype in IN_BLOCKS:
        stored = wanted.abs() if before is None else wanted.abs() + before.double().abs()
        gap = {INT8: 1018 / 81280, PACKED: 23 / 119}.get(dtype)
        apart = largest * gap if gap else stored / 8  # neighbours, and two scales
        bound = apart + largest * (2.0**-8 + tolerance)
    else:
        bound = wanted.abs() * (ROUNDING[dtype] + tolerance) + largest * tolerance + (1e-7 if dtype is FP16 else 1e-37)
    bad = ((found - wanted).abs() > bound) & ~odd & found.isfinite()
    assert not bool(bad.any()), f"{what}: {found[bad][0].item()!r} instead of {wanted[bad][0].item()!r}"


# ------------------------------------------------------------------------------------------------------------- model


class Memory:
    """Where a gradient lies, and what waits there for the next step."""

    def __init__(self) -> None:
        self.waits = False  # for a step: a coefficient was computed from it
        self.factor = 1.0
        self.norm = 0.0  # that the coefficient came from; None: from a scaler
        self.unscales = self.is_over = self.written = False

    def end(self) -> None:
        self.__init__()

    @property
    def lapses(self) -> bool:
        if self.is_over:
            return True
        return not self.unscales and (self.factor == 1.0 or (self.norm is not None and not math.isfinite(self.norm)))


class Weight:
    """One parameter: its values as the step left them, and what is known of its state."""

    def __init__(self, param: Tensor) -> None:
        self.param = param
        self.memory: Memory | None = None  # of its gradient
        self.formulation: str | None = None  # that its buffer is written in
        self.follow({})

    def follow(self, entry: dict[str, Any]) -> None:
        """Go on from what the optimizer has."""
        self.value = exact(self.param, entry)
        self.buffer = decoded(entry, self.param)
        self.average = None if "ema" not in entry else entry["ema"].detach().clone()
        self.formats = {key: tensor.dtype for key, tensor in entry.items()}


class Model:
    def __init__(self, opt: FusedMomentum) -> None:
        self.ema_count = self.rounding_step = 0
        self.grad_norm: float | None = None
        self.coefficients: list[Memory] = []  # everywhere that something waits
        self.weights: dict[Tensor, Weight] = {}
        self.buffer_formulations: list[str] = []
        self.opt = opt
        self.add_weights()

    @property
    def params(self) -> list[Tensor]:
        return params_of(self.opt)

    def add_weights(self) -> None:
        """For new groups."""
        for group in self.opt.param_groups[len(self.buffer_formulations) :]:
            self.buffer_formulations.append(group.get("formulation", "torch"))
        self.weights |= {param: Weight(param) for param in self.params if param not in self.weights}

    def move_to(self, copied: FusedMomentum) -> None:
        """The same training goes on in a copy of the optimizer; gradients stay behind."""
        weights = [self.weights[param] for param in self.params]
        self.opt = copied
        self.weights = dict(zip(self.params, weights, strict=True))
        for param, weight in self.weights.items():
            weight.param, weight.memory = param, None
            group, _ = self.stored_as(weight)
            if self.was_moved(weight):
                entry = copied.state[param]
                wanted = self.converted(group, weight, copies=True)
                assert_near(decoded(entry, param), wanted, weight.formats["momentum_buffer"], 2e-6, "copied buffer")
                weight.buffer = decoded(entry, param)
            weight.formulation = self.stored_as(weight)[1]
        self.coefficients, self.grad_norm = [], None

    # ---- clipping

    def _present(self) -> list[tuple[Weight, Memory]]:
        return [(self.weights[p], self.weights[p].memory) for p in self.params if p.grad is not None]

    def factors(self) -> dict[Weight, float]:
        """What the gradients that are there are multiplied with, or the error."""
        out = {}
        for weight, memory in self._present():
            out[weight] = memory.factor
            if not memory.waits:
                if any(each.unscales and not each.is_over for each in self.coefficients):
                    raise Raises(RuntimeError, "replaced after unscale_")
            elif memory.written:
                if not memory.lapses:
                    raise Raises(RuntimeError, r"written to after (clip_grad_norm_|unscale_).*clip last")
                out[weight] = 1.0
        return out

    def _remember(self, factors: dict[Weight, float], norm: float | None, unscales: bool) -> None:
        unscales = unscales or any(each.unscales and not each.is_over for each in self.coefficients)
        for weight, memory in self._present():
            memory.end()
            memory.waits, memory.factor, memory.norm, memory.unscales = True, factors[weight], norm, unscales
            if memory not in self.coefficients:
                self.coefficients.append(memory)

    def end_present(self) -> None:
        """After what used them; gradients that are absent keep their coefficients, whatever scaler they are from."""
        for _, memory in self._present():
            memory.end()
        self.coefficients = [memory for memory in self.coefficients if memory.waits]
        self.outlive_scaler()

    def end_coefficients(self) -> None:
        for memory in self.coefficients:
            memory.end()
        self.coefficients = []

    def norm(self, factors: dict[Weight, float], norm_type: float) -> float:
        parts = [(weight.param.grad.detach().double() * factors[weight]).reshape(-1) for weight, _ in self._present()]
        values = torch.cat([*parts, torch.zeros(1, dtype=FP64)])
        return float(torch.linalg.vector_norm(values, norm_type))

    def clip(self, max_norm: float, norm_type: float, error_if_nonfinite: bool) -> float:
        factors = self.factors()
        norm = self.norm(factors, norm_type)
        if error_if_nonfinite and not math.isfinite(norm):
            raise Raises(RuntimeError, "non-finite, so it cannot be clipped")
        coefficient = clip_coefficient(norm, max_norm)
        self._remember({weight: factor * coefficient for weight, factor in factors.items()}, norm, False)
        return norm

    def unscale(self, inv_scale: float) -> bool:
        """momentum_ext.GradScaler looks at the gradients; whether it finds an inf."""
        factors = self.factors()
        found_inf = not math.isfinite(self.norm(dict.fromkeys(factors, 1.0), 2.0))
        self._remember({weight: f * inv_scale for weight, f in factors.items()}, None, inv_scale != 1.0)
        return found_inf

    def outlive_scaler(self) -> None:
        for memory in self.coefficients:
            memory.is_over = True

    # ---- the step

    def check_options(self) -> None:
        for group in self.opt.param_groups:
            wanted = group.get("formulation", "torch")
            if wanted != "torch" and group["dampening"] != 0:
                raise Raises(ValueError, f"formulation '{wanted}' has no dampening")

    def check_conversions(self) -> None:
        """What can't be converted, or is no step: the error."""
        self.check_options()
        for group in self.opt.param_groups:
            wanted = group.get("formulation", "torch")
            for param in group["params"] if group["momentum"] != 0 else ():
                weight = self.weights[param]
                self._check_conversion(group, weight, wanted)

    def _check_conversion(self, group: dict[str, Any], weight: Weight, wanted: str) -> None:
        if weight.buffer is None or self.formulation_of(weight) == wanted:
            return
        if "ema" in (wanted, self.formulation_of(weight)):
            raise Raises(ValueError, "no exact conversion of the momentum buffers")
        if float(group["lr"]) == 0:
            raise Raises(ValueError, "converted at the current lr, which is 0")

    def stored_as(self, weight: Weight) -> tuple[dict[str, Any], str]:
        """The parameter's group, and what it says of its buffers."""
        groups = zip(self.opt.param_groups, self.buffer_formulations, strict=True)
        return next(pair for pair in groups if any(weight.param is p for p in pair[0]["params"]))

    def formulation_of(self, weight: Weight) -> str:
        return weight.formulation or self.stored_as(weight)[1]

    def was_moved(self, weight: Weight) -> bool:
        """Into a group that says something else of its buffers: what can only say that converts it in a copy."""
        return weight.buffer is not None and self.formulation_of(weight) != self.stored_as(weight)[1]

    def check_moved(self, all_groups: bool) -> None:
        """What a copy, or with momentum 0 a checkpoint, can't say of moved parameters: the error."""
        for weight in map(self.weights.get, self.params):
            group, stored = self.stored_as(weight)
            if self.was_moved(weight) and (all_groups or group["momentum"] == 0):
                self.check_options()
                self._check_conversion(group, weight, stored)

    def converted(self, group: dict[str, Any], weight: Weight, copies: bool = False) -> Tensor | None:
        """The buffer in its group's formulation; with momentum 0, or in a copy, in the one that the group has noted."""
        buffer, wanted = weight.buffer, group.get("formulation", "torch")
        if copies or group["momentum"] == 0:
            wanted = self.stored_as(weight)[1]
        if buffer is None or self.formulation_of(weight) == wanted:
            return buffer
        wide = buffer.float() if buffer.dtype in HALVES else buffer
        return wide * float(group["lr"]) if wanted == "classical" else wide / float(group["lr"])

    def wanted_formats(self, group: dict[str, Any], weight: Weight) -> dict[str, torch.dtype]:
        """The state of a parameter that was updated."""
        param = weight.param
        has_master = group.get("master_weights", False) and param.dtype in HALVES
        out = {
            key: dtype for key, dtype in weight.formats.items() if key in ("momentum_buffer", "momentum_scale", "ema")
        }
        if group["momentum"] != 0:
            options = Options(momentum_dtype=dtype_of(group.get("momentum_dtype")), master_weights=has_master)
            dtype = dtype_of_buffer(param, options)
            dtype = PACKED if dtype is torch.int4 else dtype
            out.pop("momentum_scale", None)
            out |= {"momentum_buffer": dtype, **({"momentum_scale": torch.uint8} if dtype in IN_BLOCKS else {})}
        if has_master:
            out |= {"param_remainder": torch.int16} if param.dtype is BF16 else {"master_param": FP32}
        return out

    def step(self, run: Any, inv_grad_scale: float = 1.0, found_inf: bool = False) -> None:
        """`run` is the optimizer's step, which must do what is worked out here."""
        if found_inf:
            run()
            self.end_coefficients()
            self.check_nothing_moved()
            return
        factors = self.factors()
        norm = None
        if self.opt.max_grad_norm is not None:
            norm = self.norm(factors, 2.0) * inv_grad_scale
            factors = {w: f * clip_coefficient(norm, self.opt.max_grad_norm) for w, f in factors.items()}
        self.check_conversions()
        trains = any(float(group["lr"]) != 0 for group in self.opt.param_groups)
        averages = trains and self.opt.ema_decay is not None
        expected = []
        for group in self.opt.param_groups:
            for param in group["params"]:
                weight = self.weights[param]
                factor = None if param.grad is None else factors[weight] * inv_grad_scale
                expected.append((weight, *self._updated(group, weight, factor), factor))
        run()
        for weight, value, buffer, formats, factor in expected:
            self._check(weight, value, buffer, formats, factor)
        for g, group in enumerate(self.opt.param_groups):
            if group["momentum"] != 0:
                self.buffer_formulations[g] = group.get("formulation", "torch")
                for param in group["params"]:
                    self.weights[param].formulation = self.buffer_formulations[g]
        if averages:
            self.ema_count += 1
        self.rounding_step += trains
        if trains and norm is not None:
            self.grad_norm = norm
        self.end_present()
        self.follow()

    def _updated(
        self, group: dict[str, Any], weight: Weight, factor: float | None
    ) -> tuple[Tensor, Tensor | None, dict[str, torch.dtype]]:
        """Value, buffer and formats after a step; without a gradient only what is converted changes."""
        buffer = self.converted(group, weight) if group["momentum"] != 0 else weight.buffer
        if factor is None:
            return (
                weight.value,
                buffer,
                weight.formats if buffer is weight.buffer else self.wanted_formats(group, weight),
            )
        wide = weight.value.dtype
        formats = self.wanted_formats(group, weight)
        if self.opt.ema_decay is not None:
            formats["ema"] = weight.param.dtype
        grad = weight.param.grad.detach().to(wide)
        grad = grad if factor == 1.0 else grad * factor
        keeps_master = {"param_remainder", "master_param"} & formats.keys()
        value, new = reference.update(
            weight.value
            if keeps_master
            else weight.param.detach().to(wide),  # a master that was taken back is forgotten
            grad,
            None if buffer is None else buffer.to(wide),
            **{key: group[key] for key in ("momentum", "dampening", "nesterov", "maximize")},
            lr=float(group["lr"]),
            weight_decay=float(group["weight_decay"]),
            formulation=group.get("formulation", "torch"),
            decoupled_weight_decay=group.get("decoupled_weight_decay", False),
        )
        return value, weight.buffer if new is None else new, formats

    def _check(
        self,
        weight: Weight,
        value: Tensor,
        buffer: Tensor | None,
        formats: dict[str, torch.dtype],
        factor: float | None,
    ) -> None:
        """The optimizer's tensors against these; to the bit where nothing was rounded on the way that need not be."""
        entry = self.opt.state.get(weight.param, {})
        found = {key: tensor.dtype for key, tensor in entry.items()}
        assert found == formats, f"state has {found} instead of {formats}"
        param = weight.param.detach()
        is_plain = param.dtype in (FP32, FP64) and formats.get("momentum_buffer", param.dtype) is param.dtype
        is_plain = is_plain and weight.formats.get("momentum_buffer", param.dtype) is param.dtype
        is_bits = is_plain and factor in (None, 1.0)
        tolerance = 0.0 if is_bits else 1e-12 if is_plain and {p.dtype for p in self.params} == {FP64} else 2e-6
        if not is_plain and buffer is not None and formats["momentum_buffer"] not in (FP32, FP64):
            tolerance = {INT8: 0.07, FP8: 0.07, PACKED: 0.25}.get(formats["momentum_buffer"], 0.01)  # it moves on
        has_master = "param_remainder" in entry or "master_param" in entry
        found = exact(param, entry) if has_master else param
        is_8_bit = "momentum_scale" in formats or "momentum_scale" in weight.formats
        if is_8_bit and any(t is not None and not bool(t.isfinite().all()) for t in (buffer, weight.buffer)):
            return  # nothing is promised for a block whose scale is not finite
        assert_near(found, value, found.dtype, tolerance, "parameter", weight.value)
        if buffer is not None:
            tolerance = tolerance if is_plain else 0.01
            found, dtype = decoded(entry, weight.param), formats["momentum_buffer"]
            assert_near(found, buffer, dtype, tolerance, "buffer", weight.buffer)
        if "ema" in entry:
            assert_near(entry["ema"], self._averaged(weight), param.dtype, 0.0, "average")

    def _averaged(self, weight: Weight) -> Tensor:
        """From the parameter that the optimizer has now, whose value was compared before."""
        param = weight.param.detach()
        average = weight.average
        if average is None:
            average = weight.value.to(param.dtype)  # it has not moved before
        if self.opt.ema_decay is None or all(float(group["lr"]) == 0 for group in self.opt.param_groups):
            return average
        count = self.ema_count
        decay = min(self.opt.ema_decay, (1 + count) / (10 + count)) if self.opt.ema_warmup else self.opt.ema_decay
        return param.clone() if count == 0 else average.lerp(param, 1.0 - decay)

    # ---- between steps

    def follow(self) -> None:
        for param, weight in self.weights.items():
            weight.follow(self.opt.state.get(param, {}))

    def check_nothing_moved(self) -> None:
        """Values, which state there is, and the counts, as the last step left them."""
        for param, weight in self.weights.items():
            entry = self.opt.state.get(param, {})
            assert_same(exact(param, entry), weight.value, "parameter")
            assert {key: tensor.dtype for key, tensor in entry.items()} == weight.formats
            for found, wanted, what in (
                (decoded(entry, param), weight.buffer, "buffer"),
                (entry.get("ema"), weight.average, "ema"),
            ):
                assert (found is None) == (wanted is None), what
                if wanted is not None:
                    assert_same(found, wanted, what)
        if self.grad_norm is not None:
            assert_near(self.opt.grad_norm, torch.tensor(self.grad_norm), self.opt.grad_norm.dtype, 1e-6, "grad_norm")

    @property
    def has_averages(self) -> bool:
        return any(weight.average is not None for weight in self.weights.values())

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keys, dtypes and values of what the next step would start from."""
        names = {}
        for g, (group, packed) in enumerate(zip(self.opt.param_groups, state_dict["param_groups"], strict=True)):
            names |= dict(zip(group["params"], packed["params"], strict=True))
            wanted = set(TORCH_KEYS) | {
                key for key, default in OWN_DEFAULTS.items() if group.get(key, default) != default
            }
            written = group.get("formulation", "torch") if group["momentum"] != 0 else self.buffer_formulations[g]
            assert packed.get("buffer_formulation", "torch") == written
            if written != "torch" or "formulation" in wanted:  # "torch" need not be said
                wanted |= {"buffer_formulation"} & set(packed)
            if group.get("stochastic_rounding"):
                wanted.add("rounding_step")
                assert packed["rounding_step"] == self.rounding_step
                wanted |= {"rounding_seed"} & set(group)
            if self.opt.ema_decay is not None or self.has_averages:
                wanted.add("ema_step")
                assert packed["ema_step"] == self.ema_count
            assert set(packed) == wanted, f"group {g} has {set(packed) ^ wanted} too many or too few"
            assert all(type(value) in (int, float, bool, str, list, type(None), Tensor) for value in packed.values())
            for param in group["params"]:
                self._check_packed(group, self.weights[param], state_dict["state"].get(names[param], {}))

    def _check_packed(self, group: dict[str, Any], weight: Weight, entry: dict[str, Any]) -> None:
        buffer = self.converted(group, weight)
        wanted = dict(weight.formats)
        if buffer is not None and group["momentum"] != 0:
            wanted = self.wanted_formats(group, weight)
        elif not (group.get("master_weights") and weight.param.dtype in HALVES):
            wanted = {key: dtype for key, dtype in wanted.items() if key not in ("param_remainder", "master_param")}
        dtype = wanted.get("momentum_buffer")
        if "momentum_scale" in wanted:  # as codes where blocks are parts of rows, else as values
            saved = parts_of_value(entry["momentum_buffer"])
            has_rows = saved[0].dim() > 1 and saved[0].shape[-1] % 32 == 0 and saved[0].is_contiguous()
            assert len(saved) == 1 + has_rows
            if not has_rows:
                del wanted["momentum_scale"]
                wanted["momentum_buffer"] = FP32
        travelling = {each.dtype for value in entry.values() for each in parts_of_value(value)}
        assert not travelling & {torch.int16, torch.float8_e4m3fn}
        entry = as_live(entry, weight.param)
        assert {k: t.dtype for k, t in entry.items()} == wanted
        if buffer is None:
            return
        is_plain = dtype is weight.formats["momentum_buffer"] and dtype in (FP32, FP64)
        found = decoded(entry, weight.param)
        assert_near(found, buffer, dtype, 0.0 if is_plain else 2e-6, "saved buffer")

    def load(self, state_dict: dict[str, Any]) -> None:
        """After load_state_dict() of what was checked before."""
        loaded = state_dict["param_groups"]
        self.buffer_formulations = [packed.get("buffer_formulation", "torch") for packed in loaded]
        for weight in self.weights.values():
            weight.formulation = self.stored_as(weight)[1]
        self.ema_count = max((packed.get("ema_step", 0) for packed in loaded), default=0)
        self.rounding_step = max((packed.get("rounding_step", 0) for packed in loaded), default=0)
        self.grad_norm = None
        self.follow()


def clip_coefficient(norm: float, max_norm: float) -> float:
    """torch.nn.utils.clip_grads_with_norm_'s; a NaN stays."""
    coefficient = max_norm / (norm + 1e-6)
    return 1.0 if coefficient > 1.0 else coefficient
