"""Gradients of a loss, and the leaves of its graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_loss", "check_plain_parameter", "find_leaves", "gradients_of"]

AccumulateGrad: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined] # not in the stubs

ADVICE = {  # by what torch says
    "donated buffer": (
        "A compiled student must keep its buffers for the second gradient; this one donated them "
        "to the first. Set `torch._functorch.config.donated_buffer = False` (after `import "
        "torch._functorch.config`) before the model is compiled."
    ),
    "backward through the graph a second time": (
        "`backward` frees the graph of its losses, so they can not go backward through the graph a "
        "second time. Run the student, and compute both losses anew, for each `backward`."
    ),
}


def check_loss(name: str, loss: Any) -> None:
    """Refuse what is no scalar tensor."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"`{name}` must be a tensor; got {type(loss).__name__}.")
    if loss.numel() != 1:
        raise ValueError(f"`{name}` must be a scalar; got shape {tuple(loss.shape)}.")


def check_plain_parameter(name: str, param: Tensor) -> None:
    """Refuse the parameters of sharded models: DTensor (FSDP2), flat or flattened (FSDP1)."""
    is_dtensor = hasattr(param, "device_mesh")  # wherever this torch keeps the class
    if is_dtensor or hasattr(param, "_is_flat_param") or hasattr(param, "_fsdp_flattened"):
        kind = type(param).__name__ if is_dtensor else "flattened parameter (FSDP1)"
        raise TypeError(
            f"`optimizer` and losses must hold plain parameters; {name} is a {kind} of shape "
            f"{tuple(param.shape)}. Sharded models (FSDP1, FSDP2, tensor parallelism) reduce "
            "gradients inside `.backward()`, of which there is one a step, and two gradients are "
            "needed here: use DDP under `no_sync()` with a process group."
        )


def find_leaves(*losses: Tensor) -> list[Tensor]:
    """Return the leaves that ``.backward()`` of the losses would give a gradient, each once.

    The order depends on the graph alone. Leaves that a custom function keeps to itself have no
    node in the graph. Reentrant checkpoints are refused: without an error they would leave their
    parameters no gradient. Graphed callables are refused where there are two losses: the buffers of
    their one backward pass would be used twice.
    """
    nodes: list[Any] = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
    leaves: list[Tensor] = []
    looked_at = set(nodes)
    while nodes:
        node = nodes.pop()
        if type(node) is AccumulateGrad:
            leaves.append(node.variable)
        if type(node).__name__ == "CheckpointFunctionBackward":
            raise RuntimeError(
                "The student must not use reentrant activation checkpoints: parameters inside them "
                "get their gradient from `.backward()` only. Pass use_reentrant=False to "
                "`torch.utils.checkpoint.checkpoint`."
            )
        if type(node).__name__ == "GraphedBackward" and len(losses) > 1:
            raise RuntimeError(
                "The student must not come from `torch.cuda.make_graphed_callables`: it holds one "
                "backward pass, and there are two. Capture the whole step by `torch.cuda.graph`, "
                "with capturable=True."
            )
        for source, _ in node.next_functions:
            if source is not None and source not in looked_at:
                looked_at.add(source)
                nodes.append(source)
    return [leaf for leaf in leaves if leaf.requires_grad]  # frozen after the forward pass


def gradients_of(
    name: str,
    loss: Tensor | None,
    leaves: Sequence[Tensor],
    held: int,
    *,
    retain_graph: bool,
    scale: float | Tensor = 1.0,
) -> list[Tensor | None]:
    """Return the gradients of ``loss``, which must reach one of the first ``held`` leaves.

    They are computed of scale · loss and divided by the scale.
    """

    def scale_on(device: torch.device) -> float | Tensor:
        return scale.to(device) if isinstance(scale, Tensor) else scale

    scaled = isinstance(scale, Tensor) or scale != 1
    if loss is None:
        return [None] * len(leaves)
    gradients: Sequence[Tensor | None] = ()
    if loss.requires_grad:
        try:
            # As `.backward()` should be: autocast would take float32 products in half precision.
            with torch.autocast(loss.device.type, enabled=False):
                weight = torch.ones_like(loss).mul_(scale_on(loss.device)) if scaled else None
                gradients = torch.autograd.grad(
                    loss, leaves, weight, retain_graph=retain_graph, allow_unused=True
                )
        except RuntimeError as error:
            for cause, advice in ADVICE.items():
                if cause in str(error):
                    raise RuntimeError(advice) from error
            raise
    if all(gradient is None for gradient in gradients[:held]):
        raise ValueError(
            f"`{name}` must depend on the optimizer's parameters; none of the {held} gets a "
            "gradient. Is the student run without `no_grad` and `detach`?"
            + " Are its features the first argument of the loss?"
            * (name == "transfer_loss")
        )
    for leaf, gradient in zip(leaves, gradients, strict=True):
        if gradient is not None and gradient.layout != torch.strided:
            raise ValueError(
                f"`{name}` must give dense gradients; a parameter of shape {tuple(leaf.shape)} "
                "gets a sparse one. Build the embedding with sparse=False."
            )
    if not scaled:
        return list(gradients)
    return [None if g is None else (g / scale_on(g.device)).to(g.dtype) for g in gradients]
