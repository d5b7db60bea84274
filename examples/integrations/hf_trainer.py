"""MHGD in the Hugging Face Trainer: a ViT and a BERT with padding, random data and weights.

    python examples/integrations/hf_trainer.py

The Trainer accumulates, clips, schedules and saves as usual. Teachers are untrained: put yours in
their place. Students are narrower than teachers and have attention heads of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from graph_kd import FeatureHooks, GatedGradClip, GraphTransferLoss

SMALL = {"num_attention_heads": 2, "intermediate_size": 16, "num_labels": 4}


class DistillationTrainer(Trainer):
    """Train `model` by its labels and by the graphs of `teacher`."""

    def __init__(self, model: nn.Module, teacher: nn.Module, points: list[str], **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self.of_student, self.of_teacher = FeatureHooks(model, points), FeatureHooks(teacher, points)
        self.transfer = GraphTransferLoss(
            [teacher.config.hidden_size] * len(points),  # type: ignore[union-attr]
            student_channels=[model.config.hidden_size] * len(points),  # type: ignore[union-attr]
            process_group=dist.group.WORLD,  # None in a single process
        ).to(self.args.device)
        self.add_callback(KeepHeads(self.transfer))

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            inner = super().create_optimizer(*args)
            inner.add_param_group({"params": list(self.transfer.student_heads.parameters())})
            self.optimizer = GatedGradClip(inner, process_group=dist.group.WORLD)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        # DDP must not average gradients on its own: GatedGradClip does, both of them.
        with self.accelerator.no_sync(model), self.accelerator.autocast():
            task = model(**inputs).loss / self.current_gradient_accumulation_steps
            self.teacher(**inputs)
            mask = inputs.get("attention_mask")
            transfer = self.transfer(features(self.of_student, mask), features(self.of_teacher, mask))
            losses = [task, transfer / self.current_gradient_accumulation_steps]
            if self.accelerator.scaler is not None:  # fp16=True
                losses = [self.accelerator.scaler.scale(loss) for loss in losses]
            # `self.optimizer` is accelerate's shell, which has no `backward`.
            self.optimizer.optimizer.backward(*losses)  # type: ignore[union-attr]
        return task.detach()

    def train_heads(self, learning_rate: float = 0.1) -> None:
        """Train the attention heads on the teacher; with real data, until the loss settles."""
        optimizer = torch.optim.SGD(self.transfer.estimators.parameters(), lr=learning_rate)
        for batch in self.get_train_dataloader():
            inputs = self._prepare_inputs(batch)
            self.teacher(**inputs)
            loss = self.transfer.estimator_loss(features(self.of_teacher, inputs.get("attention_mask")))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def features(hooks: FeatureHooks, mask: Tensor | None) -> list[Tensor]:
    """Return the features, with zeros for padding tokens: these change no singular vector."""
    return [f if mask is None else f * mask[..., None] for f in hooks.features]


class KeepHeads(TrainerCallback):
    """Keep the attention heads in ``checkpoint-N``, and restore them when a run goes on."""

    def __init__(self, transfer: GraphTransferLoss) -> None:
        self.transfer = transfer

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.is_world_process_zero:
            # The model once more: transformers 5.24 saves a ViT by other names than it loads.
            kept = {"heads": self.transfer.state_dict(), "model": model.state_dict()}
            torch.save(kept, self.path(args, state))

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step > 0:
            kept = torch.load(self.path(args, state), map_location=args.device, weights_only=True)
            self.transfer.load_state_dict(kept["heads"])
            model.load_state_dict(kept["model"])

    def path(self, args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "distillation.pt"


def vit(hidden_size: int, layers: int) -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=hidden_size, num_hidden_layers=layers, image_size=16, patch_size=4, **SMALL
    )
    return ViTForImageClassification(config)


def bert(hidden_size: int, layers: int) -> BertForSequenceClassification:
    config = BertConfig(
        hidden_size=hidden_size, num_hidden_layers=layers, vocab_size=50, pad_token_id=0, **SMALL
    )
    return BertForSequenceClassification(config)


def images(count: int) -> list[dict[str, Tensor]]:
    return [
        {"pixel_values": torch.randn(3, 16, 16), "labels": torch.randint(4, ())}
        for _ in range(count)
    ]


def texts(count: int) -> list[dict[str, Tensor]]:
    rows = []
    for _ in range(count):
        mask = (torch.arange(12) < torch.randint(3, 13, ())).long()
        ids = torch.randint(1, 50, (12,)) * mask
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": torch.randint(4, ())})
    return rows


def main() -> None:
    for make, points, data in (
        (vit, ["vit.layers.0", "vit.layers.1", "vit.layers.2"], images(64)),
        (bert, [f"bert.encoder.layer.{n}" for n in range(3)], texts(64)),
    ):
        args = TrainingArguments(
            output_dir=f"runs/{make.__name__}",
            max_steps=8,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            max_grad_norm=1.0,
            lr_scheduler_type="cosine",
            report_to="none",
        )
        trainer = DistillationTrainer(make(8, 3), make(12, 4), points, args=args, train_dataset=data)
        trainer.train_heads()
        print(make.__name__, trainer.train().metrics["train_loss"])


if __name__ == "__main__":
    main()
