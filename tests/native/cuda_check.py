#!/usr/bin/env python3
"""What can be told about the CUDA kernels without a GPU: compiled by nvcc alone, with no torch in sight, and read.

    python tests/native/cuda_check.py [--require]

For each architecture: no spills, registers within their limits, parameters within theirs; in the machine code 128-bit
loads and stores, no local memory, no generic addresses, no double arithmetic where there are no doubles. The norm alone
adds up floats in double, on purpose: see csrc/cuda/norm.cu. Exits 0 when everything holds, and where nvcc is missing
(with --require: 1).
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("step", "count_steps", "low_precision", "modes_fp32", "modes_bf16", "norm", "count_updates")
SOURCES = tuple(ROOT / f"csrc/cuda/{name}.cu" for name in NAMES)
ARCHS = (80, 90, 100)
FLAGS = ["-std=c++20", "-O3", "--fmad=false"]  # setup.py's NVCC_FLAGS

# For each of three rules and two sizes of parameter, 16 flat kernels (half of them keep averages) and 2 strided, or 3
# of low-precision state (flat, strided, in double); an instance for each mode of a rule (Sgd has 7 of fp32 parameters
# and 13 of bf16, Adam 2 and 8, NAdam none); 4 norms; and by themselves record_settled and count_update and count_one,
# or conclude_alone, or count_updates_of in float and in double, or count_steps_of for Adam and NAdam and two sizes.
NUM_KERNELS = {
    "step": 111,
    "low_precision": 18,
    "modes_fp32": 18,
    "modes_bf16": 42,
    "norm": 9,
    "count_updates": 2,
    "count_steps": 4,
}
NUM_WITHOUT_TABLE = {"step": 3, "norm": 1, "count_updates": 2}
FLAT_REGISTERS = 32  # for every thread that a multiprocessor can hold: 65,536 registers, 2,048 threads
FLAT_DOUBLE_REGISTERS = 36  # 35 on sm_100; the others have 31
FLAT_16_BIT_REGISTERS = 32
AVERAGED_REGISTERS = 40
AVERAGED_16_BIT_REGISTERS = 40
STRIDED_REGISTERS = 48
LOW_PRECISION_REGISTERS = 128  # two blocks at once; in double one, with as many registers as a thread can have
LOW_PRECISION_DOUBLE_REGISTERS = 255
MODE_REGISTERS = 64  # four blocks at once
# Rules with several states have four or five operands in the place of three, and more coefficients. 64 leave four
# blocks at once, whose threads have more loads on their way: 64 KB of a multiprocessor.
MANY_FLAT_REGISTERS = 64
MANY_FLAT_DOUBLE_REGISTERS = 96  # with averages on sm_100: 84, and 64 would spill
MANY_STRIDED_REGISTERS = 64
MANY_STRIDED_DOUBLE_REGISTERS = 128  # two blocks at once
MANY_LOW_PRECISION_REGISTERS = 255  # one, of a kernel that learns how each operand is stored
MANY_MODE_REGISTERS = 128  # two or three blocks at once, by the bytes of an element: 48 KB on their way
# Adam's eight elements of five operands in doubles, and where each lies, are more than 255 registers. It is for what
# nobody trains: doubles beside states of 8 bits.
STACK_BYTES = 256  # 144 on sm_90
COUNT_REGISTERS = 64
NORM_REGISTERS = 40
NORM_OF_DOUBLES_REGISTERS = 48
PARAMETER_BYTES = {4096: 4096, 32760: 32764}


def find(name: str, *places: str) -> str | None:
    """The path of a program: in CUDA_HOME, on the path, or where a package of PyPI puts it."""
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/{name}"] if home else []
    candidates += [shutil.which(name) or ""]
    candidates += [hit for place in places for hit in sorted(glob.glob(place))]
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"cuda-check: {' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


class Kernel:
    """One compiled kernel, by its mangled name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_norm = "norm_of_all" in name or "conclude_alone" in name
        self.is_flat = "update_flat" in name
        self.is_averaged = re.search(r"FlatI\w+?ELb1E", name) is not None
        self.is_strided = "update_strided" in name
        self.is_low_precision = "update_low_precision" in name
        self.is_mode = "OneMode" in name
        self.has_many_states = re.search(r"INS_\d+N?AdamE", name) is not None
        # Its seven formats of 8 bits and more, each element elsewhere: ptxas has 8 bytes too few on sm_100.
        self.is_run_time_strided = re.search(r"LowPrecisionKindINS_3SgdEfLb1E\w*AnyMode", name) is not None
        self.has_stack = re.search(r"LowPrecisionKindINS_4AdamEdL", name) is not None
        # Also the three kernels of one thread that work with doubles, and the norm, which sums up in double.
        self.is_double = (
            "Eddd" in name
            or re.search(r"StridedI\w+?EdE|LowPrecisionKindI\w+?EdL", name) is not None
            or self.is_norm
            or "count_updateE" in name
            or "count_updates_ofIdE" in name
            or "count_steps_of" in name
        )
        self.is_count = "count_updates_of" in name or "count_steps_of" in name
        self.is_16_bit = self.is_flat and re.search(r"ENS_\d+(BFloat16|Float16)ES\d?_S\d?_E", name) is not None
        found = re.search(r"Li(\d+)EEEv", name)
        self.table = int(found[1]) if found else 0

    def __str__(self) -> str:
        kinds = re.search(r"(Flat|Strided|LowPrecisionKind|norm_of_all)I(.*)ELi", self.name)
        return f"{kinds[1].lower()}<{kinds[2]}>, {self.table} bytes" if kinds else self.name

    def stack_bytes(self, arch: int) -> int:
        return 8 if self.is_run_time_strided and arch == 100 else STACK_BYTES if self.has_stack else 0

    @property
    def register_limit(self) -> int:
        if self.is_norm:
            return NORM_OF_DOUBLES_REGISTERS if "WideSums" in self.name else NORM_REGISTERS
        if self.is_count:
            return COUNT_REGISTERS
        if self.has_many_states:
            if self.is_strided:
                return MANY_STRIDED_DOUBLE_REGISTERS if self.is_double else MANY_STRIDED_REGISTERS
            if self.is_mode:
                return MANY_MODE_REGISTERS
            if self.is_low_precision:
                return MANY_LOW_PRECISION_REGISTERS
            return MANY_FLAT_DOUBLE_REGISTERS if self.is_double else MANY_FLAT_REGISTERS
        if self.is_strided:
            return STRIDED_REGISTERS
        if self.is_mode:
            return MODE_REGISTERS
        if self.is_low_precision:
            return LOW_PRECISION_DOUBLE_REGISTERS if self.is_double else LOW_PRECISION_REGISTERS
        if self.is_averaged:
            return AVERAGED_16_BIT_REGISTERS if self.is_16_bit else AVERAGED_REGISTERS
        if self.is_double:
            return FLAT_DOUBLE_REGISTERS
        return FLAT_16_BIT_REGISTERS if self.is_16_bit else FLAT_REGISTERS


failures: list[str] = []


def expect(holds: bool, what: str) -> None:
    if not holds:
        failures.append(what)
        print(f"  FAILED: {what}")


def check_resources(arch: int, file: str, log: str) -> str:
    """What ptxas says; the smallest and the largest number of registers of each sort of kernel."""
    parts = re.split(r"Compiling entry function '(\S+)' for", log)[1:]
    used_by: dict[str, list[int]] = {}
    expect(len(parts) // 2 == NUM_KERNELS[file], f"sm_{arch}: {len(parts) // 2} kernels, not {NUM_KERNELS[file]}")
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        kernel = Kernel(name)
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
        used = re.search(r"Used (\d+) registers", text)
        assert frame and used, text
        most = kernel.stack_bytes(arch)
        expect(
            int(frame[1]) <= most and (most > 0 or frame.groups() == ("0", "0", "0")),
            f"sm_{arch} {kernel}: stack or spills: {frame[0]}",
        )
        registers = int(used[1])
        expect(
            registers <= kernel.register_limit, f"sm_{arch} {kernel}: {registers} > {kernel.register_limit} registers"
        )
        if kernel.table:
            sort = "averaged" if kernel.is_averaged else "flat" if kernel.is_flat else "strided" * kernel.is_strided
            sort = "of counts" if kernel.is_count else sort
            if kernel.is_low_precision:
                sort = "mode" if kernel.is_mode else "low-precision" + ", in double" * kernel.is_double
            sort += ", Adam and NAdam" * kernel.has_many_states
            used_by.setdefault(sort or "norm", []).append(registers)
    return ", ".join(f"{sort} {min(used)} to {max(used)}" for sort, used in sorted(used_by.items()))


def check_parameters(file: str, ptx: str) -> None:
    """Sizes of the kernels' parameters."""
    sizes = re.findall(r"\.param \.align \d+ \.b8 (\S+?)_param_0\[(\d+)\]", ptx)
    sizes = [(name, size) for name, size in sizes if Kernel(name).table]
    expected = NUM_KERNELS[file] - NUM_WITHOUT_TABLE.get(file, 0)
    expect(len(sizes) == expected, f"{len(sizes)} kernels with a launch table, expected {expected}")
    for name, size in sizes:
        kernel = Kernel(name)
        limit = PARAMETER_BYTES.get(kernel.table, 0)
        expect(int(size) <= limit, f"{kernel}: its parameter has {size} bytes, more than {limit}")
    print(f"  {file}.cu: parameters of {', '.join(sorted({size for _, size in sizes}, key=int))} bytes")


def check_machine_code(arch: int, file: str, sass: str) -> None:
    """The instructions of each kernel."""
    parts = re.split(r"^\.text\.(\S+):$", sass, flags=re.MULTILINE)[1:]
    expect(len(parts) // 2 == NUM_KERNELS[file], f"sm_{arch}: machine code of {len(parts) // 2} kernels")
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        kernel = Kernel(name)
        codes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text)
        expect(len(codes) > 10, f"sm_{arch} {kernel}: its machine code was not understood")

        def having(pattern: str, codes: list[str] = codes) -> list[str]:
            return sorted({code for code in codes if re.fullmatch(pattern, code)})

        for what, pattern in {
            "local memory": r"$^" if kernel.stack_bytes(arch) > 0 else r"(LDL|STL)(\..*)?",
            "generic addresses": r"(LD|ST)(\..*)?",
            "double arithmetic": r"$^" if kernel.is_double else r"D(FMA|ADD|MUL|SETP|MNMX)(\..*)?",
        }.items():
            expect(not (found := having(pattern)), f"sm_{arch} {kernel}: {what}: {' '.join(found)}")
        # Of low-precision state, whatever is dense is moved like that: in strided kernels the masters.
        if kernel.is_flat or kernel.is_low_precision or (kernel.is_norm and kernel.table):
            for access in ("LDG",) if kernel.is_norm else ("LDG", "STG"):
                expect(bool(having(rf"{access}\.E(\..*)?\.128(\..*)?")), f"sm_{arch} {kernel}: no 128-bit {access}")


def main() -> int:
    nvcc = find("nvcc", "/usr/local/cuda*/bin/nvcc")
    if nvcc is None:
        print("cuda-check: nvcc was not found (set CUDA_HOME, or put it on the path): the kernels were not checked")
        return int("--require" in sys.argv)
    packages = sysconfig.get_path("purelib")
    nvdisasm = find("nvdisasm", f"{packages}/nvidia/*/bin/nvdisasm", f"{packages}/triton/backends/nvidia/bin/nvdisasm")
    expect(repr(FLAGS).replace("'", '"') in (ROOT / "setup.py").read_text(), "FLAGS are not setup.py's NVCC_FLAGS")
    print(re.search(r"release .*", run(nvcc, "--version"))[0])  # type: ignore[index]
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
        stack.callback(pool.shutdown, cancel_futures=True)  # the first failure ends it

        def compiled(source: Path, arch: int) -> tuple[Path, str]:
            cubin = Path(directory, f"{source.stem}-{arch}.cubin")
            arguments = [f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin", str(source), "-o", str(cubin)]
            return cubin, run(nvcc, *FLAGS, *arguments)

        def ptx_of(source: Path) -> str:
            ptx = Path(directory, f"{source.stem}.ptx")
            run(nvcc, *FLAGS, f"-arch=compute_{ARCHS[0]}", "-ptx", str(source), "-o", str(ptx))
            return ptx.read_text()

        cubins = {(source, arch): pool.submit(compiled, source, arch) for source in SOURCES for arch in ARCHS}
        ptxs = {source: pool.submit(ptx_of, source) for source in SOURCES}
        for (source, arch), future in cubins.items():
            cubin, log = future.result()
            registers = check_resources(arch, source.stem, log)
            print(f"  {source.name}, sm_{arch}: no spills; registers: {registers}")
            if nvdisasm is not None:
                check_machine_code(arch, source.stem, run(nvdisasm, "-c", str(cubin)))
        for source, ptx in ptxs.items():
            check_parameters(source.stem, ptx.result())
    if nvdisasm is None:
        print("  nvdisasm was not found (pip install nvidia-cuda-nvdisasm): the machine code was not read")
        failures.extend(["no nvdisasm"] if "--require" in sys.argv else [])
    else:
        print("  machine code: 128-bit loads and stores; no local memory, generic addresses or stray doubles")
    print("cuda-check: everything holds" if not failures else f"cuda-check: {len(failures)} failures")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
