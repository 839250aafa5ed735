"""Second moments in 8 bits, by every instruction set's kernels and by torch's operators, against a NumPy oracle."""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest
import torch
from compiling import ROOT, compiled_all
from precision_oracle import Options, exchanged, random_16
from roots_oracle import LEVELS, SMALLEST, TOP, dequantize, quantize

from momentum_ext import _C

FLAGS = ["-std=c++20", "-O2", "-fPIC", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-Wno-psabi"]
F32, MAX = np.float32, np.float32(np.finfo(np.float32).max)
COMPILER = next(name for name in ("g++", "clang++") if shutil.which(name))  # it has built the extension
SIZES = [1, 2, 31, 32, 33, 63, 64, 65, 255, 256, 257, 1000, 5003]


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


class Kernels:
    """The CPU kernels without torch."""

    def __init__(self, library):
        self.library = library
        names = ctypes.create_string_buffer(1000)
        library.names_of_isas(names)
        self.isas = names.value.decode().split()

    def call(self, function, isa, values, param, codes, scales, random):
        options = random or Options()
        getattr(self.library, function)(
            isa.encode(),
            ctypes.c_int64(len(values)),
            *map(pointer, (values, param, codes, scales)),
            ctypes.c_bool(random is not None),
            ctypes.c_uint64(options.rounding_seed),
            ctypes.c_uint32(options.step),
        )

    def encode(self, isa, values, random=None):
        """(codes, scales)."""
        codes, scales = np.full(len(values), 7, np.uint8), np.full((-(-len(values) // 32), 2), 7, np.uint8)
        self.call("encode", isa, values, np.zeros_like(values), codes, scales, random)
        return codes, scales

    def decode(self, isa, codes, scales, random=None):
        """(values, and codes and scales as they are stored again)."""
        values, codes, scales = np.zeros(len(codes), F32), codes.copy(), scales.copy()
        self.call("decode", isa, np.zeros_like(values), values, codes, scales, random)
        return values, codes, scales


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    sources = [*sorted((ROOT / "csrc/cpu").glob("*.cpp")), ROOT / "tests/precision/roots_on_cpu.cpp"]
    library = tmp_path_factory.mktemp("roots") / "roots.so"
    subprocess.run([COMPILER, "-shared", *compiled_all(COMPILER, FLAGS, sources), "-o", str(library)], check=True)
    return Kernels(ctypes.CDLL(str(library)))


def by_operators(values):
    codes, scale = _C.quantize(torch.from_numpy(values), torch.uint8, torch.from_numpy(values), non_negative=True)
    return codes.numpy(), scale.numpy().reshape(-1, 2)


def decoded_by_operators(codes, scale):
    return _C.dequantize(torch.from_numpy(codes), torch.from_numpy(scale), codes.shape, non_negative=True).numpy()


def squares(numel, spread=3.0, seed=0):
    """Of gradients whose sizes differ."""
    generator = np.random.default_rng(seed)
    return np.square(generator.normal(size=numel) * np.exp(spread * generator.normal(size=numel))).astype(F32)


def all_of_a_binade(exponent):
    """(codes, scales): all codes with each of the 256 mantissas, the largest code in every block."""
    rows = np.stack([np.r_[255, np.arange(first, first + 31) % 256] for first in range(0, 256, 31)]).astype(np.uint8)
    scales = np.repeat(np.arange(exponent << 8, (exponent + 1) << 8, dtype="<u2"), len(rows))
    return np.tile(rows, (256, 1)).reshape(-1), scales.view(np.uint8).reshape(-1, 2)


def edges():
    smallest, denormal = F32(2.0**-126), F32(2.0**-149)
    rows = [
        [],
        [1.0],
        [1.0] * 32,
        [0.0, -0.0, 1.0],
        [1.0, denormal],  # not 0
        [smallest],
        [smallest, denormal],
        [smallest * F32(0.99)],  # zeros
        [smallest * F32(0.9999)],
        [denormal],
        [MAX, 1.0, denormal],
        [MAX * F32(0.999), 0.0],
        [np.inf, 1.0],
        [1.0, np.nan],
        [-np.inf, np.nan],
        [-4.0, 4.0, -1.0],  # never there: by magnitude
        list(np.geomspace(1e-12, 1, 32)),
    ]
    return np.array([row + [0.0] * (32 - len(row)) for row in rows], F32).reshape(-1)


CASES = {
    "squares": squares(5003),
    "alike": squares(4096, 0.1),
    "far apart": squares(4099, 12.0),
    "small": squares(1000) * F32(1e-30),
    "large": squares(1000) * F32(1e30),
    "equal": np.full(97, 0.7, F32),
    "edges": edges(),
    **{f"{numel} elements": squares(numel, seed=numel) for numel in SIZES},
}


@pytest.mark.parametrize("name", CASES)
def test_operators_are_the_oracle(name):
    with np.errstate(all="ignore"):
        values = CASES[name]
        codes, scale = quantize(values)
        back = dequantize(codes, scale)
    found, found_scale = by_operators(values)
    assert np.array_equal(found, codes) and np.array_equal(found_scale, scale)
    assert np.array_equal(decoded_by_operators(codes, scale), back, equal_nan=True)


@pytest.mark.parametrize("random", [None, Options(rounding_seed=3, step=5), Options(rounding_seed=2**60, step=7)])
@pytest.mark.parametrize("name", CASES)
def test_kernels_are_the_oracle(kernels, name, random):
    values = CASES[name]
    draws = None if random is None else exchanged(random_16(-(-len(values) // 32) * 32, random))
    with np.errstate(all="ignore"):
        codes, scale = quantize(values, draws)
        back = dequantize(codes, scale)
    for isa in kernels.isas:
        found, found_scale = kernels.encode(isa, values, random)
        assert np.array_equal(found_scale, scale) and np.array_equal(found, codes), isa
        decoded, again, scale_again = kernels.decode(isa, codes, scale, random)
        assert np.array_equal(decoded, back, equal_nan=True), isa
        if random is None:
            assert np.array_equal(again, codes) and np.array_equal(scale_again, scale), isa


@pytest.mark.parametrize("exponent", [47, 48, 67, 127, 150, 172])
def test_values_encode_again_to_the_same_codes(exponent):
    """All mantissas with all codes; those of the smallest scales have squares that are denormal."""
    codes, scale = all_of_a_binade(exponent)
    values = dequantize(codes, scale)
    assert (values[codes != 0] > 0).all() and np.isfinite(values).all()
    again, scale_again = quantize(values)
    assert np.array_equal(again, codes) and np.array_equal(scale_again, scale)
    again, scale_again = quantize(values, np.arange(len(codes), dtype=np.uint32) & 0xFFFF)
    assert np.array_equal(scale_again, scale) and (again[codes == 255] == 255).all()
    assert (again != codes).mean() < 2e-4  # a square is rounded, and so it lies beside that of its level
    assert all(np.array_equal(a, b) for a, b in zip(by_operators(values), (codes, scale), strict=True))


def test_blocks_keep_their_largest_value_and_what_is_not_0():
    values = squares(32 * 3000, 6.0)
    draws = np.random.default_rng(1).integers(0, 1 << 16, len(values), np.uint32)
    for random in (None, draws, draws * 0, draws * 0 + 0xFFFF):
        codes, _ = quantize(values, random)
        blocks, found = values.reshape(-1, 32), codes.reshape(-1, 32)
        assert (np.take_along_axis(found, blocks.argmax(1)[:, None], 1) == 255).all()
        assert ((codes == 0) == (values == 0)).all() and (codes == 1).any()


def test_the_error_is_half_a_gap_of_the_roots():
    values = squares(32 * 3000, 2.0)
    roots = np.sqrt(values.astype(np.float64)).reshape(-1, 32)
    found = np.sqrt(dequantize(*quantize(values)).astype(np.float64)).reshape(-1, 32)
    top = roots.max(1, keepdims=True)
    gap = top / TOP * (np.sqrt(385**2 + 4 * roots / top * TOP) + 3)
    is_small = roots < top / TOP * LEVELS[1] / 2  # not 0
    assert (
        np.abs(roots - found) <= np.where(is_small, 1.002 * top * LEVELS[1] / TOP, gap / 2) + roots * 2.0**-8.9
    ).all()


def test_random_rounding_has_the_right_mean():
    """Of the values themselves, not of their roots; that of the smallest is too large, as they are never 0."""
    kept = {0: 1.0, 5: 0.9971, 7: 0.123, 9: 3e-3, 11: 6e-6, 13: 1e-7}
    for largest in (1.0, 0.7, 3.1e-20):
        values = np.full(1 << 16, 0.5 * largest, F32)
        for column, value in kept.items():
            values[column::32] = value * largest
        random = np.concatenate([np.random.default_rng(i).permutation(1 << 16) for i in range(50)]).astype(np.uint32)
        decoded = dequantize(*quantize(np.tile(values, 50), random)).reshape(-1, 32).astype(np.float64)
        for column in (*kept, 20):
            found, value = decoded[:, column], float(values[column])
            if column == 13:
                assert found.mean() > 10 * value
            else:
                assert found.std() > 0 and abs(found.mean() - value) < 5 * found.std() / len(found) ** 0.5, column


def test_the_scale_of_a_block_is_unbiased():
    """Over all random numbers the mean of the largest value is the value, to their last bit."""
    random = np.zeros((1 << 15, 32), np.uint32)
    random[:, 0] = np.arange(1 << 15)
    for value in F32([1.0, 0.9, 1.2345, 7e-38, 2e38]):
        values = np.zeros((1 << 15, 32), F32)
        values[:, 3] = value
        found = dequantize(*quantize(values.reshape(-1), random.reshape(-1)))[3::32].astype(np.float64)
        assert abs(found.mean() / float(value) - 1) < 2.0**-21, value


def test_what_vanishes_and_what_does_not():
    smallest = (TOP * SMALLEST) ** 2
    assert F32(2.0**-127) < smallest <= F32(2.0**-126)
    codes, scale = by_operators(F32([smallest] * 32 + [2.0**-128] * 32 + [2.0**-126, 2.0**-149]))
    assert (codes[:32] == 255).all() and (codes[32:64] == 0).all() and (scale[1] == 0).all()
    assert codes[64:].tolist() == [255, 1]
    assert (decoded_by_operators(codes, scale)[codes != 0] > 0).all()


def test_they_lie_as_their_parameter_does():
    """Whole, in its order in memory, where codes of 4 bits have half as many elements."""
    value = torch.rand(6, 64)
    for param in (value, value.t(), value.view(2, 3, 64).permute(2, 0, 1), torch.rand(5, 33).t(), torch.rand(())):
        codes, scale = _C.quantize(param, torch.uint8, param, non_negative=True)
        assert codes.shape == param.shape and (codes.stride() == param.stride() or param.dim() == 0)
        assert scale.shape[-1] == 2 and scale.numel() == 2 * -(-param.numel() // 32)
        back = _C.dequantize(codes, scale, param.shape, non_negative=True)
        assert back.stride() == codes.stride()
        assert torch.allclose(back, param, rtol=0.02, atol=1e-4)
    assert _C.quantize(value, torch.uint8, value)[0].shape == (6, 32)
    codes, scale = _C.quantize(value, torch.uint8, value, non_negative=True)
    assert scale.shape == (6, 2, 2)
    with pytest.raises(ValueError, match="two bytes for each 32 elements"):
        _C.dequantize(codes, scale[:5], value.shape, non_negative=True)


def test_other_formats_are_as_they_are():
    value = torch.rand(6, 64)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        for one, other in zip(_C.quantize(value, dtype, value), _C.quantize(value, dtype, value, True), strict=True):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("seed", range(3))
def test_adams_update_is_at_least_as_exact_as_with_roots_in_even_steps(seed):
    """FlashOptim's 8 bits: the nearest of 255 even steps of the root, with an fp16 scale, of its largest in 32."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(128, 1, generator=generator).exp()
    size = (rows * torch.randn(128, 512, generator=generator).mul(0.5).exp()).flatten()
    m, v, errors = torch.zeros(1 << 16), torch.zeros(1 << 16), {}
    for step in range(1, 401):
        g = size * torch.randn(1 << 16, generator=generator)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
        if step not in (1, 10, 100, 400):
            continue
        roots = v.sqrt().view(-1, 32)
        scale = roots.amax(1, keepdim=True).half().float()
        even = ((roots / scale * 255).round().clamp(max=255) / 255 * scale).square().flatten()
        ours = _C.dequantize(*_C.quantize(v, torch.uint8, v, True), v.shape, True)
        exact = m / v.sqrt()
        relative = [
            float((m / (each.sqrt() + 1e-12) - exact).square().sum() / exact.square().sum()) for each in (even, ours)
        ]
        errors[step] = relative
        assert relative[1] <= relative[0], errors
    assert errors[400][1] < 2e-5 and errors[1][1] < 0.05, errors
