"""Trainers that people use, each with torch's SGD and with FusedMomentum: the same weights, bit for bit.

Each is installed by name (the extra "trainers" in pyproject.toml). The sparse spots of their interfaces are where an
optimizer can go wrong: wrappers that copy attributes, steps that are left out, clipping in between, checkpoints.
They are imported where they are used: that takes seconds, also where these tests are only collected.
"""

import functools

import pytest
import torch
from harness import assert_all_same, for_loop
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

import momentum_ext
from momentum_ext import FusedMomentum

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

HYPER = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
KINDS = {"SGD": for_loop, "FusedMomentum": FusedMomentum, "fused": functools.partial(FusedMomentum, fused=True)}


class Model(nn.Module):
    """Takes and gives what transformers' Trainer wants, and plain tensors."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x, labels=None):
        output = self.layers(x)
        if labels is None:
            return output
        return {"loss": (output - labels).square().mean(), "logits": output}


def data(count=40):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 6, generator=generator)
    return x, x.sin().sum(1, keepdim=True)


def loader():
    return DataLoader(TensorDataset(*data()), batch_size=8)


def assert_alike(train, tmp_path, kinds=("SGD", "FusedMomentum")):
    """`train(make, folder)` gives the same model with each optimizer; it is another model than the first."""
    found = []
    for kind in kinds:
        torch.manual_seed(0)
        folder = tmp_path / kind
        folder.mkdir()
        found.append([tensor.detach().clone() for tensor in train(KINDS[kind], folder).state_dict().values()])
    torch.manual_seed(0)
    assert not torch.equal(found[0][0], next(iter(Model().state_dict().values())))
    for other in found[1:]:
        assert_all_same(other, found[0])


# ---- transformers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2, "bf16": True}], ids=["plain", "bf16"])
def test_transformers(options, tmp_path):
    """Evaluation, the best model at the end, a run that is resumed."""
    import transformers

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, i):
            x, y = data()
            return {"x": x[i], "labels": y[i]}

    def train(make, folder):
        def trainer(epochs):
            torch.manual_seed(0)
            model = Model()
            optimizer = make(model.parameters(), **HYPER)
            arguments = transformers.TrainingArguments(
                str(folder), num_train_epochs=epochs, per_device_train_batch_size=8, use_cpu=True, seed=0,
                eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True, max_grad_norm=0.5,
                report_to=[], logging_strategy="no", disable_tqdm=True, **options,
            )  # fmt: skip
            return transformers.Trainer(
                model, arguments, train_dataset=Rows(), eval_dataset=Rows(),
                optimizers=(optimizer, StepLR(optimizer, 4)),
            )  # fmt: skip

        trainer(2).train()
        resumed = trainer(4)
        resumed.train(resume_from_checkpoint=True)
        return resumed.model

    assert_alike(train, tmp_path)


# ---- accelerate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_accelerate(precision, tmp_path):
    """Accumulation, clipping, a scheduler that watches for left-out steps, an overflow, and a saved state."""
    import accelerate

    def train(make, folder):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        mixed = "bf16" if precision == "bf16" else "no"
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed, gradient_accumulation_steps=2)
        if precision == "fp16":  # accelerate has no fp16 on the CPU: its wrapper with torch's scaler
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        model = Model()
        optimizer = make(model.parameters(), **HYPER)
        model, optimizer, batches, scheduler = accelerator.prepare(model, optimizer, loader(), StepLR(optimizer, 3))
        skipped = []
        for epoch in range(3):
            for k, (x, y) in enumerate(batches):
                with accelerator.accumulate(model):
                    scale = 1e38 if precision == "fp16" and (epoch, k) == (1, 2) else 1.0
                    loss = (model(x) - y).square().mean() * scale
                    accelerator.backward(loss)
                    if accelerator.sync_gradients and scale == 1.0:
                        accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    skipped.append(accelerator.optimizer_step_was_skipped)
                    scheduler.step()
                    optimizer.zero_grad()
            if epoch == 0:
                accelerator.save_state(str(folder))
            if epoch == 1:
                accelerator.load_state(str(folder))
        assert any(skipped) == (precision == "fp16")
        return accelerator.unwrap_model(model)

    assert_alike(train, tmp_path)


# ---- Lightning and Fabric -----------------------------------------------------------------------------------------


def lightning_module(pl, make, manual=False):
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Model()
            self.automatic_optimization = not manual
            self.seen = []

        def training_step(self, batch):
            x, y = batch
            loss = (self.model(x) - y).square().mean()
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(optimizer, 0.5, "norm")
                optimizer.step()
            return loss

        def on_before_optimizer_step(self, optimizer):
            self.seen.append([param.grad.norm().item() for param in self.parameters()])

        def validation_step(self, batch):
            x, y = batch
            self.log("loss", (self.model(x) - y).square().mean())

        def configure_optimizers(self):
            optimizer = make(self.parameters(), **HYPER)
            return {"optimizer": optimizer, "lr_scheduler": StepLR(optimizer, 1)}

    return Module()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_val": 0.5},
        {"precision": "bf16-mixed", "gradient_clip_val": 0.5, "accumulate_grad_batches": 2},
        {"precision": "16-mixed", "gradient_clip_val": 0.5},
        {"manual": True},
        {"average": True},
    ],
    ids=str,
)
def test_lightning(options, tmp_path):
    import lightning.pytorch as pl

    options = dict(options)
    manual, average = options.pop("manual", False), options.pop("average", False)

    def train(make, folder):
        def trainer(epochs):
            callbacks = [pl.callbacks.ModelCheckpoint(folder, save_last=True), pl.callbacks.LearningRateMonitor()]
            if average:
                callbacks.append(pl.callbacks.EMAWeightAveraging(decay=0.9))
            how = dict(options)
            if options.get("precision") == "16-mixed":  # which Lightning itself takes on accelerators only
                scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
                how = {**how, "plugins": [pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)]}
                del how["precision"]
            return pl.Trainer(
                accelerator="cpu", devices=1, max_epochs=epochs, callbacks=callbacks,
                logger=pl.loggers.CSVLogger(folder), log_every_n_steps=1,
                enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, **how,
            )  # fmt: skip

        module = lightning_module(pl, make, manual)
        trainer(2).fit(module, loader(), loader())
        torch.manual_seed(0)
        resumed = lightning_module(pl, make, manual)
        trainer(4).fit(resumed, loader(), loader(), ckpt_path=folder / "last.ckpt", weights_only=False)
        train.seen.append(resumed.seen)
        return resumed.model

    train.seen = []
    assert_alike(train, tmp_path)
    assert train.seen[0] == train.seen[1]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_fabric(precision, tmp_path):
    """16-mixed is torch's GradScaler, with clipping between unscale_ and step."""
    import lightning

    def train(make, folder):
        if precision == "16-mixed":
            plugin = lightning.fabric.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 1024.0))
            fabric = lightning.Fabric(accelerator="cpu", devices=1, plugins=[plugin])
        else:
            fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
        model = Model()
        model, optimizer = fabric.setup(model, make(model.parameters(), **HYPER))
        batches = fabric.setup_dataloaders(loader())
        for epoch in range(3):
            for x, y in batches:
                optimizer.zero_grad()
                fabric.backward((model(x) - y).square().mean())
                fabric.clip_gradients(model, optimizer, max_norm=0.5)
                optimizer.step()
            if epoch == 0:
                fabric.save(folder / "state.ckpt", {"model": model, "optimizer": optimizer})
            if epoch == 1:
                fabric.load(folder / "state.ckpt", {"model": model, "optimizer": optimizer})
        return model.module

    assert_alike(train, tmp_path)


# ---- torchtitan ---------------------------------------------------------------------------------------------------


def test_torchtitan(tmp_path):
    """Its container, whose checkpoints are flattened by names, over two groups."""
    titan = pytest.importorskip("torchtitan.components.optimizer")  # needs Python 3.11

    def train(make, folder):
        class Container(titan.OptimizersContainer):
            @staticmethod
            def _resolve_optimizer_factory(name):
                return make

        def group(pattern, options):
            return titan.ParamGroupConfig(pattern=pattern, optimizer_name="ours", optimizer_kwargs=options)

        def container(model):
            config = titan.OptimizersContainer.Config(
                param_groups=[
                    group("bias$", {**HYPER, "weight_decay": 0.0}),
                    group(".*", HYPER),
                ],
                implementation="for-loop",
            )
            return Container(config, model_parts=[model])

        model = Model()
        optimizer = container(model)
        for epoch in range(3):
            for x, y in loader():
                optimizer.zero_grad()
                (model(x) - y).square().mean().backward()
                optimizer.step()
            if epoch == 1:
                torch.save(optimizer.state_dict(), folder / "optimizer.pt")
                fresh = container(model)
                fresh.load_state_dict(torch.load(folder / "optimizer.pt"))
                optimizer = fresh
        return model

    assert_alike(train, tmp_path)


# ---- loops as in timm's and torchvision's references ----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["FusedMomentum", "fused"])
@pytest.mark.parametrize("scaler", [torch.amp.GradScaler, momentum_ext.GradScaler])
def test_a_reference_loop(scaler, kind, tmp_path):
    """AMP, clipping, an average of the weights that torch keeps, no decay for biases and norms, a warm-up by step."""

    def train(make, folder):
        model = Model()
        decayed = [param for param in model.parameters() if param.ndim > 1]
        others = [param for param in model.parameters() if param.ndim <= 1]
        optimizer = make([{"params": decayed}, {"params": others, "weight_decay": 0.0}], **HYPER)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=6)
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        amp = scaler("cpu", init_scale=2.0**10, growth_interval=4)
        for _ in range(3):
            for x, y in loader():
                optimizer.zero_grad(set_to_none=True)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = (model(x) - y).square().mean()
                amp.scale(loss).backward()
                if scaler is torch.amp.GradScaler:
                    amp.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), 1e9)
                amp.step(optimizer)
                amp.update()
                scheduler.step()
                average.update_parameters(model)
        return average

    assert_alike(train, tmp_path, ("SGD", kind))
