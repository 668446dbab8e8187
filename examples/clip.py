"""Two towers trained with CLIP's loss and a scale that is learned: `python examples/clip.py`, seconds on a CPU.

Images and texts are stand-ins: two noisy views, of different widths, of one hidden vector a pair. The towers learn to
find a text from its image among texts they have never seen.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_infonce import ClipLoss

HIDDEN, IMAGE, TEXT, DIM = 16, 96, 48, 64
BATCH, STEPS = 256, 100


def tower(width: int) -> nn.Module:
    """Makes an encoder; put your vision model and your language model in its place."""
    return nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, DIM))


class Pairs:
    """A source of image and text pairs."""

    def __init__(self) -> None:
        self.to_image, self.to_text = torch.randn(HIDDEN, IMAGE), torch.randn(HIDDEN, TEXT)

    def sample(self, pairs: int) -> tuple[Tensor, Tensor]:
        hidden = torch.randn(pairs, HIDDEN)
        image, text = torch.tanh(hidden @ self.to_image), torch.tanh(hidden @ self.to_text)
        return image + 0.3 * torch.randn_like(image), text + 0.3 * torch.randn_like(text)


@torch.no_grad()
def recall(images: nn.Module, texts: nn.Module, image: Tensor, text: Tensor) -> float:
    """The share of images whose own text is the nearest."""
    similarity = F.normalize(images(image), dim=-1) @ F.normalize(texts(text), dim=-1).T
    return (similarity.argmax(dim=1) == torch.arange(len(image))).float().mean().item()


def main() -> None:
    """Trains the towers and prints what they learned."""
    torch.manual_seed(0)
    pairs, images, texts = Pairs(), tower(IMAGE), tower(TEXT)
    loss = ClipLoss(normalize=True, learnable_temperature=True, max_logit_scale=100.0)
    parameters: list[dict[str, Any]] = [
        {"params": [*images.parameters(), *texts.parameters()]},
        {"params": loss.parameters(), "weight_decay": 0.0},  # weight decay would pull the scale towards 1
    ]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    held_out = pairs.sample(1000)
    print(f"R@1 among 1000 unseen pairs, before: {recall(images, texts, *held_out):.3f}")
    for step in range(1, STEPS + 1):
        image, text = pairs.sample(BATCH)
        value = loss(images(image), texts(text))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        loss.clamp_logit_scale_()  # after the step: a clamp in the forward would have no gradient at the bound
        if step % 25 == 0:
            print(f"step {step}: loss {value.item():.3f}, scale {1 / float(loss.temperature):.1f}")
    print(f"R@1 among 1000 unseen pairs, after: {recall(images, texts, *held_out):.3f}")


if __name__ == "__main__":
    main()
