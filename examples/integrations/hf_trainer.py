"""MHGD in the Hugging Face Trainer: a ViT, and a BERT with padding.

    python examples/integrations/hf_trainer.py

The Trainer accumulates, clips, schedules and saves as usual. Models are tiny, random and untrained,
data are random: put yours in their place. Students are narrower than their teachers and have
attention heads of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from graph_kd import FeatureHooks, GatedGradClip, GraphTransferLoss


class DistillationTrainer(Trainer):
    """Train ``model`` by its labels and by the graphs of ``teacher``."""

    def __init__(self, model: Any, teacher: Any, layers: list[str], **settings: Any) -> None:
        super().__init__(model, **settings)
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self.student_hooks = FeatureHooks(model, layers)
        self.teacher_hooks = FeatureHooks(teacher, layers)
        self.transfer = GraphTransferLoss(
            [teacher.config.hidden_size] * len(layers),
            student_channels=[model.config.hidden_size] * len(layers),
            squash="scaled",
            process_group=dist.group.WORLD,  # None in a single process
        ).to(self.args.device)
        self.add_callback(HeadsCallback(self.transfer))

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            inner = super().create_optimizer(*args)
            own_heads = list(self.transfer.student_heads.parameters())
            # Without its own value the group would have AdamW's weight decay, not the Trainer's.
            inner.add_param_group({"params": own_heads, "weight_decay": self.args.weight_decay})
            self.optimizer = GatedGradClip(inner, bound=3.0, process_group=dist.group.WORLD)
        return self.optimizer

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        # DDP must not average gradients on its own: GatedGradClip does, both of them.
        with self.accelerator.no_sync(model), self.accelerator.autocast():
            task: Tensor = model(**inputs).loss
            self.teacher(**inputs)
            mask = inputs.get("attention_mask")
            loss = self.transfer(
                features(self.student_hooks, mask), features(self.teacher_hooks, mask)
            )
        losses = [x / self.current_gradient_accumulation_steps for x in (task, loss)]
        if self.accelerator.scaler is not None:  # with fp16=True
            losses = [self.accelerator.scaler.scale(x) for x in losses]
        # Around the GatedGradClip is accelerate's shell, which has no `backward`.
        self.optimizer.optimizer.backward(*losses)  # type: ignore[union-attr]
        return task.detach() / self.current_gradient_accumulation_steps

    def train_heads(self) -> None:
        """Train the attention heads on the teacher; with real data, until convergence."""
        heads = torch.optim.SGD(self.transfer.estimators.parameters(), lr=0.1, momentum=0.9)
        for inputs in self.get_train_dataloader():
            inputs = self._prepare_inputs(inputs)
            self.teacher(**inputs)
            maps = features(self.teacher_hooks, inputs.get("attention_mask"))
            heads.zero_grad()
            self.transfer.estimator_loss(maps).backward()
            heads.step()


def features(hooks: FeatureHooks, mask: Tensor | None) -> list[Tensor]:
    """Return the features, with zeros for padding tokens: these change no singular vector."""
    return [f if mask is None else f * mask[..., None] for f in hooks.features]


class HeadsCallback(TrainerCallback):
    """Do for the attention heads what the Trainer does for the model alone."""

    def __init__(self, transfer: GraphTransferLoss) -> None:
        self.transfer = transfer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.transfer.zero_grad()  # or their gradients would grow from step to step

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.is_world_process_zero:
            # A resume with other heads would be silently wrong. The model is kept once more because
            # transformers 5.24 resumes a ViT with most weights as they were before: it saves them
            # by other names than it loads.
            kept = {"heads": self.transfer.state_dict(), "model": model.state_dict()}
            torch.save(kept, self.path(args, state))

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        if state.global_step > 0:  # resumed from a checkpoint
            kept = torch.load(self.path(args, state), map_location=args.device, weights_only=True)
            self.transfer.load_state_dict(kept["heads"])
            model.load_state_dict(kept["model"])

    def path(self, args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "distillation.pt"


def vit(hidden_size: int, layers: int) -> ViTForImageClassification:
    shape: Any = {"hidden_size": hidden_size, "num_hidden_layers": layers, "num_labels": 4}
    shape |= {"num_attention_heads": 2, "intermediate_size": 2 * hidden_size}
    config = ViTConfig(image_size=16, patch_size=4, **shape)
    return ViTForImageClassification(config)


def bert(hidden_size: int, layers: int) -> BertForSequenceClassification:
    shape: Any = {"hidden_size": hidden_size, "num_hidden_layers": layers, "num_labels": 4}
    shape |= {"num_attention_heads": 2, "intermediate_size": 2 * hidden_size}
    return BertForSequenceClassification(BertConfig(vocab_size=50, **shape))


def images(count: int) -> list[dict[str, Tensor]]:
    columns = torch.randn(count, 3, 16, 16), torch.randint(4, (count,))
    return [{"pixel_values": x, "labels": y} for x, y in zip(*columns, strict=True)]


def texts(count: int) -> list[dict[str, Tensor]]:
    mask = (torch.arange(12) < torch.randint(3, 13, (count, 1))).long()
    columns = torch.randint(1, 50, (count, 12)) * mask, mask, torch.randint(4, (count,))
    names = ("input_ids", "attention_mask", "labels")
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def main() -> None:
    for make, layers, data in (
        (vit, ["vit.layers.0", "vit.layers.1", "vit.layers.2"], images(64)),
        (bert, ["bert.encoder.layer.0", "bert.encoder.layer.1", "bert.encoder.layer.2"], texts(64)),
    ):
        settings = TrainingArguments(
            f"runs/{make.__name__}",
            max_steps=8,
            gradient_accumulation_steps=2,
            lr_scheduler_type="cosine",
            report_to="none",
        )
        student, teacher = make(8, 3), make(12, 3)
        trainer = DistillationTrainer(student, teacher, layers, args=settings, train_dataset=data)
        trainer.train_heads()
        trainer.train()


if __name__ == "__main__":
    main()
