"""The Lightning and Fabric recipes are the plain loop: in every precision, resumed, in parallel."""

import os

import broken_torchvision  # noqa: F401  # here too: processes that are spawned read no conftest
import plain_loop
import pytest
import torch
import torch.multiprocessing as mp

L = pytest.importorskip("lightning", reason="needs the extra `integrations`")

import fabric_loop
import lightning_module
from lightning.fabric.plugins.precision import MixedPrecision as FabricMixedPrecision
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader, DistributedSampler

from graph_kd import GraphTransferLoss

pytestmark = [
    # Lightning 2.6.6 asks torch 2.13 for a class by its old name.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),
    # It advises on idle CPUs and GPUs, and on modules in eval mode: the teacher is meant to be.
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode at the start of training"),
]
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
RECIPES = {
    "manual": lightning_module.Distillation,
    "automatic": lightning_module.AutomaticDistillation,
}


def module(form):
    student, teacher = plain_loop.pair(lightning_module.network, 3, 5)
    transfer = GraphTransferLoss(lightning_module.CHANNELS)
    plain_loop.train_heads(transfer, teacher, lightning_module.POINTS)
    made = RECIPES[form](teacher, transfer)
    made.student.load_state_dict(student.state_dict())
    return made


def fit(made, epochs, *, loader=None, ckpt_path=None, **settings):
    if made.automatic_optimization:
        settings |= {"accumulate_grad_batches": plain_loop.ACCUMULATE}
        settings |= {"gradient_clip_val": plain_loop.CLIP}
    trainer = L.Trainer(max_epochs=epochs, **QUIET, **settings)
    trainer.fit(made, loader or plain_loop.loader(), ckpt_path=ckpt_path)
    return trainer


def plain(epochs, precision=None):
    student, teacher = plain_loop.pair(lightning_module.network, 3, 5)
    transfer = GraphTransferLoss(lightning_module.CHANNELS)
    plain_loop.train_heads(transfer, teacher, lightning_module.POINTS)

    def autocast():
        return torch.autocast("cpu", precision, enabled=precision is not None)

    args = student, teacher, transfer, lightning_module.POINTS
    plain_loop.train(*args, epochs=epochs, autocast=autocast)
    return student.state_dict()


@pytest.mark.parametrize("form", RECIPES)
def test_accumulated_training_is_the_plain_loop(form):
    made = module(form)
    with plain_loop.losses_of() as got:
        trainer = fit(made, 2)
    with plain_loop.losses_of() as expected:
        plain_loop.assert_equal(made.student.state_dict(), plain(2))
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected))
    assert trainer.global_step == 4
    assert len(trainer.optimizers[0].gates) == 6  # what the shell's `backward` did is seen here


@pytest.mark.parametrize("form", RECIPES)
def test_bfloat16_is_the_plain_loop_under_autocast(form):
    made = module(form)
    fit(made, 1, precision="bf16-mixed")
    plain_loop.assert_equal(made.student.state_dict(), plain(1, torch.bfloat16))


@pytest.mark.parametrize("form", RECIPES)
def test_float16_is_the_plain_loop_under_autocast(form):
    made = module(form)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
    fit(made, 1, plugins=[plugin])
    # Scaled by powers of two: the same but for what is too small for float16.
    plain_loop.assert_equal(made.student.state_dict(), plain(1, torch.float16), tolerance=1e-4)
    assert plugin.scaler.get_scale() == 256.0


@pytest.mark.parametrize("form", RECIPES)
def test_resumed_run_is_the_uninterrupted_one(form, tmp_path):
    fit(module(form), 1).save_checkpoint(tmp_path / "last.ckpt")
    torch.manual_seed(9)
    _, teacher = plain_loop.pair(lightning_module.network, 3, 5)
    made = RECIPES[form](teacher, GraphTransferLoss(lightning_module.CHANNELS))  # other heads
    fit(made, 2, ckpt_path=tmp_path / "last.ckpt")
    plain_loop.assert_equal(made.student.state_dict(), plain(2))


def train_by_fabric(folder, epochs, *, batch=plain_loop.BATCH, **settings):
    fabric = L.Fabric(accelerator="cpu", **settings)
    fabric.launch()
    student, teacher = plain_loop.pair(fabric_loop.network, 3, 5)
    fabric_loop.train(fabric, student, teacher, plain_loop.loader(batch), folder, epochs)
    return student.state_dict()


def use_plain_heads(transfer, teacher, *_):
    """Train the heads on whole batches in each process."""
    group, transfer.process_group = transfer.process_group, None
    plain_loop.train_heads(transfer, teacher, fabric_loop.POINTS)
    transfer.process_group = group


def test_fabric_accumulates_as_the_plain_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(fabric_loop, "train_heads", use_plain_heads)
    with plain_loop.losses_of() as got:
        student = train_by_fabric(tmp_path, 2)
    with plain_loop.losses_of() as expected:
        plain_loop.assert_equal(student, plain(2))
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected))


def test_fabric_in_bfloat16_is_the_plain_loop_under_autocast(tmp_path, monkeypatch):
    monkeypatch.setattr(fabric_loop, "train_heads", use_plain_heads)
    got = train_by_fabric(tmp_path, 1, precision="bf16-mixed")
    plain_loop.assert_equal(got, plain(1, torch.bfloat16))


def test_fabric_in_float16_is_the_plain_loop_under_autocast(tmp_path, monkeypatch):
    monkeypatch.setattr(fabric_loop, "train_heads", use_plain_heads)
    plugin = FabricMixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
    got = train_by_fabric(tmp_path, 1, plugins=[plugin])
    plain_loop.assert_equal(got, plain(1, torch.float16), tolerance=1e-4)


def test_fabric_resumes_as_if_uninterrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(fabric_loop, "train_heads", use_plain_heads)
    train_by_fabric(tmp_path, 1)
    monkeypatch.delattr(fabric_loop, "train_heads")  # they come from the checkpoint
    torch.manual_seed(9)  # other heads to begin with
    plain_loop.assert_equal(train_by_fabric(tmp_path, 2), plain(2))


@pytest.mark.parametrize("recipe", [lightning_module, fabric_loop])
def test_script_runs(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe.main()


def work(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    together = {"devices": 2, "strategy": "ddp"}
    half = plain_loop.BATCH // 2
    data = plain_loop.loader().dataset
    sampler = DistributedSampler(data, 2, rank, shuffle=False)  # Lightning's own would shuffle
    loader = DataLoader(data, half, sampler=sampler)
    for form in RECIPES:
        made = module(form)
        fit(made, 1, loader=loader, use_distributed_sampler=False, **together)
        torch.save(made.student.state_dict(), folder / f"{form}{rank}.pt")
    fabric_loop.train_heads = use_plain_heads
    torch.save(
        train_by_fabric(folder / "run", 1, batch=half, **together), folder / f"fabric{rank}.pt"
    )


def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    mp.spawn(work, args=(plain_loop.free_port(), tmp_path), nprocs=2)
    for name in [*RECIPES, "fabric"]:
        for rank in range(2):
            got = torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True)
            plain_loop.assert_equal(got, plain(1))
