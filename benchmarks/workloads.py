"""The workloads: the shapes of real models, written down, so that no model has to be installed or downloaded.

A workload is a list of parameter groups, a group is a list of shapes and its own factor on the learning rate.
Each model is spelled out layer by layer in the order of its `named_parameters()`; where the shapes come from stands in
`Workload.source`, and `EXPECTED` holds the known counts, which are checked whenever a workload is built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """One parameter group: the shapes of its tensors, and the factor on the learning rate that is its own."""

    shapes: tuple[Shape, ...]
    lr_factor: float = 1.0


@dataclass(frozen=True)
class Workload:
    """A named list of parameter groups; `what` is one line for people, `source` says where the shapes come from."""

    name: str
    what: str
    source: str
    groups: tuple[Group, ...]
    dtype: str = "float32"
    """torch's name for the dtype of parameters, gradients and momentum buffers."""
    grad_layout: str = "contiguous"
    """How gradients with the dimensions for it lie in memory: "contiguous", "channels_last" or "transposed"."""

    @property
    def shapes(self) -> list[Shape]:
        """Every tensor's shape, in order."""
        return [shape for group in self.groups for shape in group.shapes]

    @property
    def tensors(self) -> int:
        """Number of tensors."""
        return len(self.shapes)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return {"float32": 4, "bfloat16": 2}[self.dtype]

    @property
    def elements(self) -> int:
        """Number of elements of all tensors together."""
        return sum(math.prod(shape) for shape in self.shapes)


def linear(inputs: int, outputs: int) -> list[Shape]:
    """A linear layer's weight and bias."""
    return [(outputs, inputs), (outputs,)]


def norm(width: int) -> list[Shape]:
    """A layer norm's or batch norm's weight and bias."""
    return [(width,), (width,)]


def repeat(count: int, shapes: Iterable[Shape]) -> list[Shape]:
    """The same shapes `count` times."""
    return list(shapes) * count


def gpt2_block(width: int = 768) -> list[Shape]:
    """A block of GPT-2 (small by default)."""
    # transformers' Conv1D keeps its weight as (inputs, outputs)
    return [
        *norm(width),
        (width, 3 * width), (3 * width,), (width, width), (width,),
        *norm(width),
        (width, 4 * width), (4 * width,), (4 * width, width), (width,),
    ]  # fmt: skip


def gpt2_shapes(width: int = 768, blocks: int = 12) -> list[Shape]:
    """GPT-2 (small by default); the output projection is tied to the token embedding."""
    return [(50257, width), (1024, width), *repeat(blocks, gpt2_block(width)), *norm(width)]


def resnet50_shapes() -> list[Shape]:
    """ResNet-50: bottleneck blocks 3, 4, 6, 3; convolutions without bias, each followed by a batch norm."""
    shapes: list[Shape] = [(64, 3, 7, 7), *norm(64)]
    inputs = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            outputs = 4 * width
            shapes += [(width, inputs, 1, 1), *norm(width)]
            shapes += [(width, width, 3, 3), *norm(width)]
            shapes += [(outputs, width, 1, 1), *norm(outputs)]
            if block == 0:
                shapes += [(outputs, inputs, 1, 1), *norm(outputs)]
            inputs = outputs
    return shapes + linear(inputs, 1000)


def vit_b16_shapes() -> list[Shape]:
    """ViT-B/16 at 224 x 224: 196 patches and a class token, 12 encoder blocks of width 768."""
    width = 768
    block = [
        *norm(width),
        *linear(width, 3 * width), *linear(width, width),
        *norm(width),
        *linear(width, 4 * width), *linear(4 * width, width),
    ]  # fmt: skip
    stem: list[Shape] = [(1, 1, width), (width, 3, 16, 16), (width,), (1, 197, width)]
    return [*stem, *repeat(12, block), *norm(width), *linear(width, 1000)]


def detector_shapes() -> list[Shape]:
    """RF-DETR Nano, the detector of rf-detr#1409: a DINOv2-small backbone, a projector, a two-layer DETR decoder.

    223 tensors in the backbone, 26 in the projector, 216 in the decoder and its heads, of which 156 belong to the 13
    groups of queries that are trained side by side: 465 trainable tensors, the number given there.
    """
    vit, width, hidden, queries, classes = 384, 256, 2048, 300, 91
    groups, decoder_layers, heads, points = 13, 2, 16, 2

    patches = (384 // 16) ** 2
    embeddings: list[Shape] = [(1, 1, vit), (1, vit), (1, patches + 1, vit), (vit, 3, 16, 16), (vit,)]
    layer_scale: list[Shape] = [(vit,)]
    encoder_layer = [
        *norm(vit), *repeat(4, linear(vit, vit)), *layer_scale,
        *norm(vit), *linear(vit, 4 * vit), *linear(4 * vit, vit), *layer_scale,
    ]  # fmt: skip
    backbone = [*embeddings, *repeat(12, encoder_layer), *norm(vit)]

    def conv_norm(inputs: int, outputs: int, kernel: int) -> list[Shape]:
        return [(outputs, inputs, kernel, kernel), *norm(outputs)]

    half = width // 2
    bottleneck = repeat(2, conv_norm(half, half, 3))
    projector = [
        *conv_norm(4 * vit, width, 1), *conv_norm(5 * half, width, 1), *repeat(3, bottleneck), *norm(width)
    ]  # fmt: skip

    box_head = [*linear(width, width), *linear(width, width), *linear(width, 4)]
    decoder_layer = [
        (3 * width, width), (3 * width,), *linear(width, width), *norm(width),
        *linear(width, heads * points * 2), *linear(width, heads * points), *repeat(2, linear(width, width)),
        *linear(width, hidden), *linear(hidden, width), *repeat(2, norm(width)),
    ]  # fmt: skip
    decoder = [*repeat(decoder_layers, decoder_layer), *norm(width), *linear(2 * width, width), *linear(width, width)]
    first_stage = repeat(groups, [*linear(width, width), *norm(width), *linear(width, classes), *box_head])
    query: list[Shape] = [(queries * groups, 4), (queries * groups, width)]
    return [*backbone, *projector, *decoder, *first_stage, *linear(width, classes), *box_head, *query]


def llama3_8b_shapes() -> list[Shape]:
    """Llama 3 8B: 32 layers of width 4096, 8 key and value heads of 32; the output projection is not tied."""
    width, hidden, vocabulary, kv = 4096, 14336, 128256, 1024
    layer: list[Shape] = [
        (width, width), (kv, width), (kv, width), (width, width),
        (hidden, width), (hidden, width), (width, hidden), (width,), (width,),
    ]  # fmt: skip
    return [(vocabulary, width), *repeat(32, layer), (width,), (vocabulary, width)]


def moe_6000_shapes() -> list[Shape]:
    """6,000 tensors of unequal size, as a mixture of many small experts has them: 1 to 65,536 elements."""
    experts = [[(2 ** (i % 17),), (1 + i % 7, 64), (96,)] for i in range(2000)]
    return [shape for expert in experts for shape in expert]


def reduced(shape: Shape, divisor: int) -> Shape:
    """`shape` with every dimension divided by `divisor`, rounded up."""
    return tuple(-(-size // divisor) for size in shape)


def one_group(shapes: Iterable[Shape]) -> tuple[Group, ...]:
    """All shapes in a single parameter group."""
    return (Group(tuple(shapes)),)


def group_each(shapes: Iterable[Shape]) -> tuple[Group, ...]:
    """A parameter group for each tensor, each with a learning rate of its own."""
    return tuple(Group((shape,), lr_factor=0.99**index) for index, shape in enumerate(shapes))


def same(count: int, elements: int) -> Workload:
    """`count` tensors of `elements` elements each."""
    return Workload(
        name=f"small_{count}x{elements}",
        what=f"{count:,} tensors of {elements:,}",
        source="made up: what a step costs beside the memory's time",
        groups=one_group([(elements,)] * count),
    )


DETECTOR_SOURCE = "RF-DETR Nano; one parameter group for each tensor as reported in roboflow/rf-detr#1409"
DETECTOR_DIVISOR = 16

_BUILDERS: dict[str, Callable[[], Workload]] = {
    "one_64m": lambda: Workload(
        "one_64m", "one tensor of 67.1M", "made up: 2^26 elements, nothing but memory", one_group([(2**26,)])
    ),
    "gpt2": lambda: Workload(
        "gpt2", "GPT-2 small", "transformers.GPT2LMHeadModel, gpt2, tied output", one_group(gpt2_shapes())
    ),
    "resnet50": lambda: Workload("resnet50", "ResNet-50", "torchvision.models.resnet50", one_group(resnet50_shapes())),
    "vit_b16": lambda: Workload("vit_b16", "ViT-B/16", "torchvision.models.vit_b_16", one_group(vit_b16_shapes())),
    "gpt2_bf16": lambda: Workload(
        "gpt2_bf16", "GPT-2 small, all in bf16", "as gpt2", one_group(gpt2_shapes()), dtype="bfloat16"
    ),
    "gpt2_transposed": lambda: Workload(
        "gpt2_transposed", "three blocks of GPT-2 small, gradients of matrices transposed", "as gpt2",
        one_group(repeat(3, gpt2_block())), grad_layout="transposed",
    ),
    "resnet50_channels_last": lambda: Workload(
        "resnet50_channels_last", "ResNet-50, gradients of convolutions in channels_last", "as resnet50",
        one_group(resnet50_shapes()), grad_layout="channels_last",
    ),
    "small_1000x1024": lambda: same(1000, 1024),
    "small_5000x64": lambda: same(5000, 64),
    "small_200x16": lambda: same(200, 16),
    "small_1000x64": lambda: same(1000, 64),
    "small_300x64": lambda: same(300, 64),
    "groups_465": lambda: Workload(
        "groups_465",
        f"a detector at 1/{DETECTOR_DIVISOR} of its width, 465 groups",
        f"{DETECTOR_SOURCE}; every dimension divided by {DETECTOR_DIVISOR}, rounded up",
        group_each(reduced(shape, DETECTOR_DIVISOR) for shape in detector_shapes()),
    ),
    "groups_465_full": lambda: Workload(
        "groups_465_full", "the same detector at full width, 465 groups", DETECTOR_SOURCE, group_each(detector_shapes())
    ),
    "gpt2_xl": lambda: Workload(
        "gpt2_xl", "GPT-2 XL", "transformers.GPT2LMHeadModel, gpt2-xl, tied output", one_group(gpt2_shapes(1600, 48))
    ),
    "llama3_8b": lambda: Workload(
        "llama3_8b", "Llama 3 8B in bf16", "transformers.LlamaForCausalLM, Meta-Llama-3-8B",
        one_group(llama3_8b_shapes()), dtype="bfloat16",
    ),
    "moe_6000": lambda: Workload(
        "moe_6000", "6,000 tensors of 1 to 65,536", "made up: many small experts", one_group(moe_6000_shapes())
    ),
}  # fmt: skip

# name: (tensors, elements)
EXPECTED: dict[str, tuple[int, int]] = {
    "one_64m": (1, 67_108_864),
    "gpt2": (148, 124_439_808),
    "resnet50": (161, 25_557_032),
    "vit_b16": (152, 86_567_656),
    "gpt2_bf16": (148, 124_439_808),
    "gpt2_transposed": (36, 21_263_616),
    "resnet50_channels_last": (161, 25_557_032),
    "small_1000x1024": (1000, 1_024_000),
    "small_5000x64": (5000, 320_000),
    "small_200x16": (200, 3_200),
    "small_1000x64": (1000, 64_000),
    "small_300x64": (300, 19_200),
    "groups_465": (465, 121_402),
    "groups_465_full": (465, 30_467_298),
    "gpt2_xl": (580, 1_557_611_200),
    "llama3_8b": (291, 8_030_261_248),
    "moe_6000": (6000, 16_041_034),
}

NAMES: tuple[str, ...] = tuple(_BUILDERS)

NOT_QUICK = ("gpt2_bf16", "gpt2_transposed", "resnet50_channels_last")
"""Not chosen by default with --quick: torch's own steps take seconds there."""

FOR_GPUS = ("gpt2_xl", "llama3_8b", "moe_6000")
"""Only chosen by default on a GPU."""

FOR_RULES = ("one_64m", "gpt2", "resnet50", "small_1000x1024", "small_1000x64", "small_300x64")
"""Chosen by default with --rule; the last two only there."""


def build(name: str) -> Workload:
    """The workload called `name`, its counts checked against `EXPECTED`. Raises KeyError for an unknown name."""
    workload = _BUILDERS[name]()
    found = (workload.tensors, workload.elements)
    if found != EXPECTED[name]:
        raise AssertionError(f"{name}: expected (tensors, elements) {EXPECTED[name]}, the shapes add up to {found}")
    return workload
