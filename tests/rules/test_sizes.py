"""Every length around a vector, a tile, a chunk and a thread's share, at every alignment, and nothing beside it."""

import pytest
import torch
from harness import Oracle, Pair, assert_same, only_elements_written
from values import FLOAT_DTYPES, clone_exact, storage_of

EDGES = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129]
EDGES += [255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 2047, 2048, 2049, 4095, 4096, 4097]
LARGE = [16383, 16384, 16385, 32767, 32768, 32769, 65535, 65536, 65537, 131071, 262145, (1 << 20) + 3]
HYPER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}


def train(sizes, dtype=torch.float32, steps=3):
    Pair([torch.randn(size).to(dtype) for size in sizes], Oracle, **HYPER).step(steps)


@FLOAT_DTYPES
@pytest.mark.parametrize("size", EDGES)
def test_one_tensor(size, dtype, isa):
    train([size], dtype)


@FLOAT_DTYPES
@pytest.mark.parametrize("size", LARGE)
def test_one_large_tensor(size, dtype, threads):
    train([size], dtype, 2)


@FLOAT_DTYPES
def test_all_edges_in_one_list(dtype, isa, threads):
    train(EDGES + LARGE[:6] + EDGES, dtype)


@pytest.mark.parametrize("count", [2, 3, 5, 8])
@pytest.mark.parametrize("size", [0, 1, 9, 333, 1024])
def test_many_equal_tensors_split_among_threads(size, count):
    torch.set_num_threads(count)
    train([size] * max(8, 80_000 // (size + 40)), steps=2)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_thread_edges_inside_and_between_tensors(count):
    """A share's edge at each place relative to a tensor's edge: totals that differ by one element."""
    torch.set_num_threads(count)
    for shift in range(-2, 3):
        train((0, 65536 + shift, 1, 65536 - shift, 0, 32768 + shift), steps=2)


@FLOAT_DTYPES
@pytest.mark.parametrize("place", ["param", "grad", "momentum_buffer", "all"])
def test_unaligned_storage_offsets(place, dtype, isa):
    """Each offset within a vector for the parameter, the gradient and the buffer; the neighbours stay as they were."""
    for offset in range(9):
        for size in (1, 15, 16, 17, 64, 300):

            def view(values, what, offset=offset, size=size):
                if place not in (what, "all"):
                    return values
                base = torch.full((size + 40,), 7.0, dtype=dtype)
                base[offset : offset + size] = values
                return base[offset : offset + size]

            pair = Pair([view(torch.randn(size).to(dtype), "param")], Oracle, **HYPER)
            pair.step()
            for opt, param in pair.each(0):
                opt.state[param]["momentum_buffer"] = view(opt.state[param]["momentum_buffer"], "momentum_buffer")
            param = pair.params[0][0]
            pair.set_grad(0, view(pair.random_like(param), "grad"))
            with only_elements_written(param, param.grad, pair.mine.state[param]["momentum_buffer"]):
                pair.step_as_is()


def test_neighbours_in_one_storage_are_not_touched():
    """Slices of one storage, as a flattening wrapper makes them; every second one has no gradient."""
    base = torch.randn(5000)
    sizes = [1, 7, 16, 33, 64, 257, 513, 100]
    starts = torch.tensor([0] + [n + 3 for n in sizes[:-1]]).cumsum(0).tolist()
    pair = Pair([base[start : start + n] for start, n in zip(starts, sizes, strict=True)], **HYPER)
    whole = storage_of(pair.params[0][0].detach())
    before = clone_exact(whole)
    pair.step(missing=range(0, len(sizes), 2))
    expected = before.clone()
    for index in range(1, len(sizes), 2):
        expected[starts[index] : starts[index] + sizes[index]] = pair.params[index][1].detach()
    assert_same(whole, expected)
    assert not torch.equal(whole, before)


@pytest.mark.parametrize("gap", [(1 << 31) + 1, (1 << 31) + 7])
def test_offsets_beyond_two_to_the_31_elements(gap, tmp_path):
    """Rows that lie 2^31 elements apart, in a sparse file, so that no such memory is needed."""
    rows, columns = 3, 50
    base = torch.from_file(str(tmp_path / "sparse"), shared=True, size=gap * (rows - 1) + columns, dtype=torch.float32)
    pair = Pair([torch.randn(rows, columns)], lr=0.1, momentum=0.9)
    param = pair.params[0][0]
    param.data = base.as_strided((rows, columns), (gap, 1)).copy_(param.detach())
    pair.step(3)
