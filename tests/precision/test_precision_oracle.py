"""The oracle of the low-precision tests is itself right: published vectors, exact fractions, torch's own casts."""

from fractions import Fraction

import numpy as np
import precision_oracle as oracle
import pytest
import torch
from values import BF16, FP8, HALF_DTYPES, INT4, INT8

from momentum_ext import _C

IN_BLOCKS = pytest.mark.parametrize("dtype", [INT8, FP8, INT4], ids=str)


def random_floats(count=20_000, spread=60):
    exponents = torch.randint(-spread, spread, (count,), dtype=torch.float32)
    return (torch.randn(count) * exponents.exp2()).numpy()


def nearest(value):
    """The fp32 nearest to a fraction, ties to even, by comparing with its neighbours."""
    guess = np.float32(float(value))
    around = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(around, key=lambda x: (abs(Fraction(float(x)) - value), int(x.view(np.uint32)) % 2))


# The known-answer tests of Random123, kat_vectors: counter, key, result of philox4x32 with 7 rounds.
PHILOX = [
    ([0] * 4, [0] * 2, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A],
    ),
]


@pytest.mark.parametrize("counter, key, result", PHILOX)
def test_philox_known_answers(counter, key, result):
    assert oracle.philox4x32(np.array([counter]), tuple(key)).tolist() == [result]


def test_halves_of_a_philox_block_are_taken_in_order():
    options = oracle.Options(rounding_seed=0, step=0, tensor=0)
    wanted = [half for word in PHILOX[0][2] for half in (word & 0xFFFF, word >> 16)]
    assert oracle.random_16(8, options).tolist() == wanted
    both = oracle.random_16(3, options, first=6)
    assert oracle.exchanged(both).tolist()[:2] == [(half >> 8 | half << 8) & 0xFFFF for half in wanted[6:]]
    assert both.tolist()[:2] == wanted[6:] and both[2] == oracle.random_16(9, options)[8]


def check_fma(a, b, c):
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    assert oracle.fma(a, b, c).tolist() == [float(nearest(value)) for value in exact]


def test_fma_rounds_once():
    a, b = random_floats(3000, 10), random_floats(3000, 10)
    c = (-a.astype(np.float64) * b).astype(np.float32) * np.float32(1 + 2**-20)
    c[::3] = random_floats(1000, 15)
    check_fma(a, b, c)


def test_fma_beside_midpoints():
    """A product of half a unit in c's last place, but for one part in 2^46: fp64 loses that, and rounding is wrong."""
    c = np.abs(torch.randn(1000).numpy()) + np.float32(0.1)
    half = np.ldexp(np.float32(1), np.frexp(c)[1] - 25)
    for a, b in ((1 + 2**-23, 1 - 2**-23), (1 + 2**-22, 1 - 2**-23)):
        check_fma(half * np.float32(a), np.full_like(c, b), c)
        check_fma(-half * np.float32(a), np.full_like(c, b), c)
    a, b = half * np.float32(1 + 2**-23), np.full_like(c, 1 - 2**-23)
    twice = (a.astype(np.float64) * b + c).astype(np.float32)
    assert (twice != oracle.fma(a, b, c)).any()


@HALF_DTYPES
def test_nearest_is_torchs_cast(dtype):
    values = np.concatenate([random_floats(), np.float32([0.0, -0.0, 65504, 65520, 65519.9, 3.4e38, np.inf, -np.inf])])
    wanted = torch.from_numpy(values).to(dtype)
    assert oracle.narrow(values, dtype).tolist() == oracle.flat(wanted, [0]).tolist()
    everything = np.arange(1 << 16).astype(np.uint16)
    wide = oracle.widen(everything, dtype)
    whole = torch.from_numpy(everything.view(np.int16)).view(dtype).float().numpy()
    assert np.array_equal(wide, whole, equal_nan=True)


def test_fp8_nearest_is_torchs_cast():
    values = np.clip(random_floats(spread=12), -448, 448)
    wanted = torch.from_numpy(values).to(FP8).view(torch.uint8)
    assert oracle.e4m3fn(values, None).tolist() == wanted.tolist()
    finite = np.array([q for q in range(256) if q & 0x7F != 0x7F], np.uint8)
    one = np.uint8([[0x00, 0x7F]] * 8)
    wide = oracle.dequantize(finite, one, FP8)
    assert wide.tolist() == torch.from_numpy(finite).view(FP8).float().tolist()


def test_split_and_join_are_exact():
    bits = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).to(torch.int32).numpy().view(np.uint32)
    edges = np.array(
        [0x3F808000, 0x3F818000, 0x3F807FFF, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 1, 0x80000001, 0x8000], np.uint32
    )
    values = oracle.from_bits(np.concatenate([bits, edges]))
    high, remainder = oracle.split(values)
    again = oracle.join(high, remainder)
    nan = np.isnan(values)
    assert np.array_equal(again.view(np.uint32)[~nan], values.view(np.uint32)[~nan]) and np.isnan(again[nan]).all()
    cast = oracle.narrow(values, BF16)
    differs = (high != cast) & ~nan
    assert set((values.view(np.uint32)[differs] & 0xFFFF).tolist()) == {0x8000}, "other than at ties"


@HALF_DTYPES
@pytest.mark.parametrize("value", [1.2345, -0.0310, 3e-5, -7e-6])
def test_every_random_number_once_gives_the_exact_share(dtype, value):
    """Over all 65,536 random numbers the mean is the value itself, to the last of the bits that they can tell apart."""
    random = np.arange(1 << 16, dtype=np.uint32)
    values = np.full(1 << 16, value, np.float32)
    rounded = oracle.widen(oracle.narrow(values, dtype, random), dtype).astype(np.float64)
    gap = rounded.max() - rounded.min()
    assert gap > 0 and len(set(rounded.tolist())) == 2
    assert abs(rounded.mean() - float(np.float32(value))) <= gap * 2**-13


@IN_BLOCKS
def test_8_bit_rounding_has_no_bias(dtype):
    """Nor has a scale: 1.0 lies between two, and so does all that is close to it."""
    values = np.full(1 << 16, 0.123, np.float32)
    values[::32], values[5::32] = 1.0, 0.9985
    random = np.concatenate([torch.randperm(1 << 16).numpy() for _ in range(50)]).astype(np.uint32)
    decoded = oracle.dequantize(*oracle.quantize(np.tile(values, 50), dtype, random), dtype).reshape(-1, 32)
    for column, value in ((0, 1.0), (5, 0.9985), (7, 0.123)):
        found = decoded[:, column].astype(np.float64)
        assert len(set(found.tolist())) == {0: 2, 5: 3, 7: 4}[column] or dtype is not INT8
        assert found.std() > 0
        assert abs(found.mean() - np.float32(value)) < 5 * found.std() / len(found) ** 0.5


@pytest.mark.parametrize("random", [False, True])
@IN_BLOCKS
def test_blocks_keep_their_largest_value_and_bound_the_error(dtype, random):
    """To a neighbour of the value; a scale has 8 bits of mantissa."""
    values = random_floats(32 * 2000 + 3, 3)
    draws = np.random.default_rng(0).integers(0, 1 << 16, 32 * 2001, np.uint32) if random else None
    codes, scale = oracle.quantize(values, dtype, draws)
    assert codes.nbytes == len(values) and scale.shape == (2001, 2)
    back = oracle.dequantize(codes, scale, dtype)
    blocks, found = (np.pad(each, (0, 29)).reshape(-1, 32) for each in (values, back))
    top = np.abs(blocks).max(1, keepdims=True)
    of_scale = 2.0**-8 if random else 2.0**-9
    places = np.abs(blocks).argmax(1)[:, None]
    largest_codes = np.take_along_axis(np.pad(codes, (0, 29)).reshape(-1, 32), places, 1)
    assert np.isin(largest_codes, {INT8: [127, -127], INT4: [7, -7], FP8: [0x7E, 0xFE]}[dtype]).all()
    assert (np.abs(np.abs(found).max(1, keepdims=True) - top) <= top * of_scale).all()
    y = np.abs(blocks) / top
    finest = 2.0**-9 / 448  # fp8's subnormal numbers
    if dtype is FP8:
        gap = top * np.maximum(y / 8, finest)
    else:  # what follows the level above: the map's slope there, and a step of its square more
        square, linear = (3, 259) if dtype is INT8 else (1, 10)
        largest = float(oracle.TOP[dtype])
        gap = top * (np.sqrt(linear**2 + 4 * square * largest * y) + 3 * square) / largest
    assert (np.abs(blocks - found) <= (gap if random else gap / 2) + np.abs(blocks) * of_scale * 1.01).all()


@IN_BLOCKS
@pytest.mark.parametrize("shift", [1.0, 2.0**-98, 2.0**100], ids=str)
def test_values_encode_again_to_the_same_codes(dtype, shift):
    """All scales and codes, by the oracle and by torch's operators."""
    largest = {INT8: 127, INT4: 7, FP8: 0x7E}[dtype]
    codes = [q for q in range(256) if q & 0x7F != 0x7F] if dtype is FP8 else np.arange(-largest, largest + 1)
    rows = np.stack([np.resize(np.roll(codes, -31 * i), 32) for i in range(9)])
    rows[:, 0] = largest
    codes = np.tile(rows.astype(np.uint8 if dtype is FP8 else np.int8), (256, 1)).reshape(-1)
    first = int(oracle.bits(np.float32([shift / oracle.TOP[dtype]]))[0] >> 15) & 0xFF00
    scale = np.repeat(np.arange(first, first + 256, dtype="<u2"), 9).view(np.uint8).reshape(-1, 2)
    values = oracle.dequantize(codes, scale, dtype)
    again, scale_again = oracle.quantize(values, dtype)
    is_zero = (codes == 0) | (codes == 0x80) if dtype is FP8 else codes == 0  # zeros have no sign
    assert (again == codes)[~is_zero].all() and (scale_again == scale).all()
    as_stored = torch.uint8 if dtype is INT4 else dtype
    found, found_scale = _C.quantize(torch.from_numpy(values), as_stored, torch.from_numpy(values))
    stored = oracle.packed(codes, torch.from_numpy(values), [0]).numpy() if dtype is INT4 else codes
    kept = slice(None) if dtype is INT4 else ~is_zero
    assert np.array_equal(found.view(torch.uint8).numpy().view(stored.dtype)[kept], stored[kept])
    assert np.array_equal(found_scale.numpy(), scale)
    assert np.array_equal(_C.dequantize(found, found_scale, values.shape).numpy(), values)


@IN_BLOCKS
def test_the_largest_numbers_stay_finite(dtype):
    values = np.float32([np.finfo(np.float32).max, -1e38, 0.0])
    for random in (None, np.full(32, 0xFFFF, np.uint32), np.zeros(32, np.uint32)):
        back = oracle.dequantize(*oracle.quantize(values, dtype, random), dtype)
        atol = 23 / 119 * values[0] if dtype is INT4 else 0
        assert np.isfinite(back).all() and np.allclose(back, values, rtol=2.0**-3, atol=atol)


@IN_BLOCKS
def test_blocks_that_overflow_or_vanish(dtype):
    one = np.float32(oracle.TOP[dtype])  # whose scale is 1
    values = np.full(32 * 4 + 5, one, np.float32)
    values[3], values[32 + 4], values[64:96] = np.inf, np.nan, 1e-31
    q, scale = oracle.quantize(values, dtype)
    back = oracle.dequantize(q, scale, dtype)
    assert np.isnan(back[:64]).all() and (back[64:96] == 0).all() and (back[96:] == one).all()
    assert (q[:96] == 0).all() and (scale[2] == 0).all()


def test_master_is_believed_only_where_it_matches():
    master = np.float32([1.0001, 2.5, np.nan, 3.0])
    param = np.float16([1.0001, 7.0, np.nan, np.nan]).view(np.uint16)
    found = oracle.believed(param, master)
    assert found[0] == master[0] and found[1] == 7 and np.isnan(found[2:]).all()
