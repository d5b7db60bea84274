"""The Trainer recipe is a plain loop: accumulated, clipped, resumed, padded, in two processes."""

import math

import broken_torchvision  # noqa: F401  # here too: processes that are spawned read no conftest
import plain_loop
import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="needs the extra `integrations`")
pytest.importorskip("accelerate", reason="needs the extra `integrations`")

import hf_trainer as recipe

from graph_kd import FeatureHooks, GatedGradClip, GraphTransferLoss

pytestmark = pytest.mark.skipif(
    not transformers.utils.is_torch_available(),
    reason="transformers 5 runs without torch if torch is older than it supports",
)

BATCH, ACCUMULATE, STEPS = 8, 2, 4
DECAY = 0.1
MODELS = {
    "vit": (recipe.vit, recipe.images, [f"vit.layers.{n}" for n in range(3)]),
    "bert": (recipe.bert, recipe.texts, [f"bert.encoder.layer.{n}" for n in range(3)]),
}


def pair(name):
    """Return a student and a teacher without dropout, the same at every call."""
    student, teacher = plain_loop.pair(lambda width: MODELS[name][0](width, 3), 8, 12)
    for module in [*student.modules(), *teacher.modules()]:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return student, teacher.eval().requires_grad_(False)


def rows(name):
    torch.manual_seed(0)
    return MODELS[name][1](BATCH * ACCUMULATE * STEPS)


def batches(name):
    whole = rows(name)
    for first in range(0, len(whole), BATCH):
        part = whole[first : first + BATCH]
        yield {key: torch.stack([row[key] for row in part]) for key in part[0]}


def maps(hooks, batch):
    """Return the features, padding tokens set to zero."""
    if "attention_mask" not in batch:
        return hooks.features
    return [f.masked_fill(batch["attention_mask"][..., None] == 0, 0) for f in hooks.features]


def train_heads(transfer, teacher, name):
    def features():
        with FeatureHooks(teacher, MODELS[name][2]) as hooks:
            for batch in batches(name):
                teacher(**batch)
                yield maps(hooks, batch)

    plain_loop.train_heads(transfer, features())


def plain(name):
    """Train in pure PyTorch; return the student's and the heads' state_dicts."""
    layers = MODELS[name][2]
    student, teacher = pair(name)
    transfer = GraphTransferLoss([12] * 3, student_channels=[8] * 3, squash="scaled")
    train_heads(transfer, teacher, name)
    student_hooks, teacher_hooks = FeatureHooks(student, layers), FeatureHooks(teacher, layers)
    groups = [
        {"params": [p for p in student.parameters() if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in student.parameters() if p.ndim == 1]},  # biases and norms
        {"params": [*transfer.student_heads.parameters()], "weight_decay": DECAY},
    ]
    optimizer = GatedGradClip(torch.optim.SGD(groups, lr=0.1), bound=3.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / STEPS)) / 2
    )
    student.train()
    for index, batch in enumerate(batches(name)):
        task = student(**batch).loss
        teacher(**batch)
        loss = transfer(maps(student_hooks, batch), maps(teacher_hooks, batch))
        optimizer.backward(task / ACCUMULATE, loss / ACCUMULATE)
        if index % ACCUMULATE == ACCUMULATE - 1:
            nn.utils.clip_grad_norm_(student.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return student.state_dict(), transfer.state_dict()


def trainer(name, folder, batch=BATCH):
    """Return the recipe's trainer, on rows in their order."""
    plain_loop.forget_accelerate()
    settings = transformers.TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=ACCUMULATE,
        train_sampling_strategy="sequential",
        optim="sgd",  # Adam magnifies rounding where a gradient is zero
        learning_rate=0.1,
        weight_decay=DECAY,
        lr_scheduler_type="cosine",
        max_grad_norm=0.5,
        save_steps=2,
        use_cpu=True,
        dataloader_pin_memory=False,  # it warns where there is no GPU
        disable_tqdm=True,
        report_to="none",
    )
    student, teacher = pair(name)
    layers = MODELS[name][2]
    return recipe.DistillationTrainer(
        student, teacher, layers, args=settings, train_dataset=rows(name)
    )


def run(name, folder, batch=BATCH):
    made = trainer(name, folder, batch)
    train_heads(made.transfer, made.teacher, name)
    made.train()
    return made.model.state_dict(), made.transfer.state_dict()


@pytest.mark.parametrize("name", MODELS)
def test_trainer_is_the_plain_loop_and_resumes(name, tmp_path):
    with plain_loop.losses_of() as losses_expected:
        expected = plain(name)
    with plain_loop.losses_of() as losses:
        trained = run(name, tmp_path)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(losses_expected))
    for got, wanted in zip(trained, expected, strict=True):
        plain_loop.assert_equal(got, wanted)

    resumed = trainer(name, tmp_path)  # with other heads, and another student
    for parameter in resumed.model.parameters():
        parameter.data.normal_()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    plain_loop.assert_equal(resumed.model.state_dict(), expected[0])
    plain_loop.assert_equal(resumed.transfer.state_dict(), expected[1])


def test_heads_are_trained_on_the_teacher_alone(tmp_path):
    made = trainer("bert", tmp_path)
    before = {n: p.clone() for n, p in made.transfer.named_parameters()}
    made.train_heads()
    moved = {n.split(".")[0] for n, p in made.transfer.named_parameters() if not p.equal(before[n])}
    assert moved == {"estimators"}


def test_more_padding_changes_nothing():
    student, teacher = pair("bert")
    student_hooks, teacher_hooks = (FeatureHooks(m, MODELS["bert"][2]) for m in (student, teacher))
    transfer = GraphTransferLoss([12] * 3, student_channels=[8] * 3, squash="scaled")
    losses = []
    batch = next(iter(batches("bert")))
    for extra in (0, 5):
        padded = {n: nn.functional.pad(batch[n], (0, extra)) for n in batch if n != "labels"}
        for model in (student, teacher):
            model(**padded)
        mask = padded["attention_mask"]
        losses.append(
            transfer(recipe.features(student_hooks, mask), recipe.features(teacher_hooks, mask))
        )
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)


# Where there is no GPU, torch warns of pinned memory, which is the Trainer's default.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
def test_script_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain_loop.forget_accelerate()
    recipe.main()
    assert (tmp_path / "runs/bert/checkpoint-8/distillation.pt").exists()


def work(_rank, folder):
    return run("bert", folder / "run", BATCH // 2)[0]


def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    expected, _ = plain("bert")
    for got in plain_loop.in_two_processes(work, tmp_path):
        plain_loop.assert_equal(got, expected)
